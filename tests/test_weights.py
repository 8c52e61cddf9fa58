"""utils/weights.py: files of every kind as names and arrays, and messages for files that are none."""

from __future__ import annotations

import argparse
import io
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils import weights
from utils.errors import UserError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"head.weight": torch.randn(3, 4, generator=generator), "head.bias": torch.randn(3, generator=generator)}


def assert_read(path: Path | str, expected: dict[str, torch.Tensor] | None = None) -> None:
    arrays = weights.read(str(path)).arrays
    expected = tensors() if expected is None else expected
    assert arrays.keys() == expected.keys()
    for name, x in expected.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], x.numpy())


def write(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(tensors(), path)
    elif kind == "npz":
        with path.open("wb") as f:
            np.savez(f, **{name: x.numpy() for name, x in tensors().items()})
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=kind == "torch")
    return path


KINDS = ("npz", "safetensors", "torch", "old torch")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_by_what_it_holds_and_not_by_its_name(tmp_path, kind):
    for ending in (".npz", ".safetensors", ".bin", ".pth", ""):
        assert_read(write(tmp_path / f"weights{ending}", kind))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"model": x},
        lambda x: {"state_dict": x, "epoch": 3},
        lambda x: {"model_state_dict": x, "optimizer_state_dict": {}},
        lambda x: {"model": {"state_dict": x}, "step": 3},
        lambda x: {f"module.{name}": t for name, t in x.items()},
        lambda x: {f"_orig_mod.{name}": t for name, t in x.items()},
        lambda x: {"state_dict": {f"module._orig_mod.{name}": t for name, t in x.items()}},
        lambda x: {f"_orig_mod.module.{name}": t for name, t in x.items()},
        lambda x: {"model": {f"model.{name}": t for name, t in x.items()}},
        lambda x: {"state_dict": x, "args": argparse.Namespace(lr=0.1, model="vit"), "optimizer": {"state": {}}},
    ],
)
def test_what_programs_wrap_a_state_dict_in_is_taken_off(tmp_path, wrap):
    torch.save(wrap(tensors()), tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth")


def test_a_prefix_that_only_some_names_have_is_part_of_them(tmp_path):
    state = {"module.a": torch.ones(1), "b.module.c": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", state)


def test_half_precision_becomes_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        halves = {name: x.to(dtype) for name, x in tensors().items()}
        for save in (save_file, torch.save):
            save(halves, tmp_path / "a")
            assert_read(tmp_path / "a", {name: x.float() for name, x in halves.items()})
    stored = {name: x.view(torch.int16).numpy().view("V2") for name, x in halves.items()}
    np.savez(tmp_path / "a.npz", **stored)  # bfloat16 as JAX's programs write it
    assert_read(tmp_path / "a.npz", {name: x.float() for name, x in halves.items()})


def test_tensors_that_are_views_are_read_as_they_are_seen(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": x.t(), "s": x[:, ::2]}, tmp_path / "a.bin")
    assert_read(tmp_path / "a.bin", {"t": x.t(), "s": x[:, ::2]})


# ---- folders ----


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.safetensors"], None),
        (["pytorch_model.bin"], None),
        (["model.safetensors", "x.bin"], None),
        (["x.pth"], None),
        ([], "has no weights; expected model.safetensors"),
        (["a.bin", "b.bin"], "several files of weights"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "max_shard_size"),
        (["pytorch_model.bin.index.json"], "max_shard_size"),
    ],
)
def test_a_folder_stands_for_the_file_in_it_or_is_refused(tmp_path, names, words):
    for name in [*names, "config.json"]:
        (tmp_path / name).write_text("{}")
    if words:
        with pytest.raises(UserError, match=words):
            weights.read(str(tmp_path))
    else:
        write(tmp_path / names[0], "safetensors" if names[0].endswith(".safetensors") else "torch")
        assert_read(tmp_path)
        assert weights.read(str(tmp_path)).path == str(tmp_path / names[0])


# ---- what is none ----

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 345579424\n"
INDEX = b'{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"\xef\xbb\xbf<HTML><head>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML page"),
        (LFS, "Git LFS pointer"),
        (INDEX, "max_shard_size"),
        (b'{"hidden_size": 768}', "JSON"),
        (b"\x93NUMPY" + bytes(100), "single array of NumPy"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(100), "unpack"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"PK\x03\x04" + bytes(100), "only the beginning"),
        (np.random.default_rng(0).bytes(1000), "it is neither an .npz nor"),
        (b"the weights", "it begins with b'the weights'"),
        (b"\x80\x02" + bytes(100), "cut off or damaged|could run code"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, content, words):
    for name in ("a.npz", "a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as e:
            weights.read(str(tmp_path / name))
        assert str(e.value).startswith("it ")
        assert "\n" not in str(e.value)
        assert ("fetch it again" in str(e.value)) == (content[:2] in (b"", b"PK"))


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cut_off_anywhere_are_refused(tmp_path, kind):
    whole = write(tmp_path / "a", kind).read_bytes()
    for length in (1, 4, 9, 60, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"^it "):
            weights.read(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "no state_dict"),
        ({"epoch": 3}, "epoch is something else"),
        ([torch.zeros(3)], "no state_dict"),
        (torch.zeros(3), "no state_dict"),
        ({"weight": [1.0]}, "weight is something else"),
        ({"weight": torch.zeros(3).to_sparse()}, "special kind"),
        (torch.nn.Linear(2, 2), "could run code"),
    ],
)  # fmt: skip
def test_a_pytorch_file_without_a_state_dict_is_refused(tmp_path, value, words):
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(UserError, match=words):
        weights.read(str(tmp_path / "a.bin"))


def test_a_training_state_is_refused_with_the_name_of_its_weights(tmp_path):
    for name, best in (("a.bin", "<name>_checkpoint.bin"), ("cifar10_last.pt", f"{tmp_path}/cifar10_checkpoint.bin")):
        torch.save({"format": 1, "step": 5, "optimizer": {}, "model": tensors()}, tmp_path / name)
        with pytest.raises(UserError, match=f"--resume takes; give the weights: {best}"):
            weights.read(str(tmp_path / name))


def test_a_file_without_tensors_is_one_line(tmp_path):
    save_file({}, tmp_path / "a")
    with pytest.raises(UserError, match="it holds no tensors"):
        weights.read(str(tmp_path / "a"))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "npz", "wrapped"])
def test_nothing_in_a_file_is_run(tmp_path, kind):
    touched, path = tmp_path / "touched", tmp_path / "a.bin"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(touched), protocol=2))
    elif kind == "npz":
        with path.open("wb") as f:
            np.savez(f, cls=np.array([Touch(touched)], dtype=object))
    else:
        torch.save({"model": tensors(), "evil": Touch(touched)} if kind == "wrapped" else Touch(touched), path)
    with pytest.raises(UserError, match="could run code"):
        weights.read(str(path))
    assert not touched.exists()


# ---- archives that are damaged, or made to fill the memory ----


def test_a_damaged_member_is_noticed(tmp_path):
    path = tmp_path / "weights.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, a=np.arange(1000.0), b=np.ones(3))
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("a.npy")
        data = bytearray(path.read_bytes())
        data[member.header_offset + 30 + len(member.filename) + member.compress_size - 100] ^= 1  # a bit of its numbers
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged \.npz archive"):
            weights.read(str(path))


def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "weights.npz"
    array = np.arange(8192, dtype=np.float32).reshape(1, -1)  # more than is read, and so compared, at once
    np.savez(path, cls=array)
    data = path.read_bytes()
    wrong = []
    for position in [*range(200), *range(len(data) - 100, len(data))]:  # all but the numbers
        for flip in (0x01, 0x06):  # the second makes float16 of float32
            path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
            try:
                outcome = weights.read_npz(str(path)).get("cls", array)
            except UserError:
                continue
            except Exception as e:  # a traceback for the user
                outcome = e
            if not np.array_equal(outcome, array):
                wrong.append(f"byte {position}, flipped by {flip}: {outcome!r:.60}")
    assert not wrong, "\n".join(wrong)


def test_a_member_that_is_no_array_is_refused(tmp_path):
    path = write(tmp_path / "a.npz", "npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cls.npy", b"not an array")
    with pytest.raises(UserError, match=r"cls|damaged"):
        weights.read(str(path))


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_an_absurd_shape_is_refused_before_memory_is_taken(tmp_path):
    for shape in [(10**6, 10**6), (10**5, 10**4), (2**40,)]:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as f:
            f.writestr("cls.npy", header.getvalue() + bytes(64))
        before = peak_kib()
        with pytest.raises(UserError, match="says it is of shape"):
            weights.read_npz(str(tmp_path / "a.npz"))
        assert peak_kib() - before < 64 * 1024


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path):
    archive = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("cls.npy", "w") as member:
        for _ in range(300):
            member.write(bytes(2**20))
    before = peak_kib()
    with pytest.raises(UserError, match=r"would unpack to 0\.3 GiB"):
        weights.read_npz(str(tmp_path / "a.npz"))
    assert peak_kib() - before < 64 * 1024


def test_weights_that_were_compressed_are_read(tmp_path):
    arrays = {"a": np.zeros((300, 300), np.float32), "b": np.random.default_rng(0).random(1000, np.float32)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    read_back = weights.read_npz(str(tmp_path / "a.npz"))
    assert all((read_back[name] == x).all() for name, x in arrays.items())
