"""Files of weights: whole or absent, and nothing in them is ever run."""

import io
import json
import os
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch

from utils import checkpoint, files


class Touch:
    """Unpickling this creates a file: what a malicious checkpoint could do with worse."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def make_state():
    generator = torch.Generator().manual_seed(0)
    return {
        "head.weight": torch.randn(3, 4, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
        "half": torch.randn(2, generator=generator).bfloat16(),
        "count": torch.tensor(7),
    }


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def assert_same_state(got, expected):
    assert list(got) == list(expected)
    for name, x in expected.items():
        assert got[name].dtype == x.dtype
        assert torch.equal(got[name], x)


# ---- writing ----


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_gets_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.atomic_write(str(tmp_path / "a")) as f:
            f.write(b"x")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_until_the_block_ends_the_old_file_is_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with files.atomic_write(str(path)) as f:
        f.write(b"new, and longer")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_interrupted_write_leaves_what_was_there_and_no_temporary(tmp_path, error, existed):
    path = tmp_path / "a"
    if existed:
        path.write_bytes(b"old")

    def write():
        with files.atomic_write(str(path)) as f:
            f.write(b"half of the new")
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == (["a"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


class Interrupted(io.RawIOBase):
    """A file whose n-th write raises what a signal's handler would."""

    def __init__(self, f, error, nth):
        self.f, self.error, self.left = f, error, nth

    def write(self, data):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.f.write(data)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, RuntimeError])  # the last: a worker has died
@pytest.mark.parametrize("nth", [1, 2, 7, 12])
def test_what_a_signal_raises_while_torch_writes_comes_out_as_it_is(tmp_path, kind, nth):
    """torch.save makes a RuntimeError of it that says no more than that the file is incomplete."""
    path, error = tmp_path / "a", kind("DataLoader worker (pid 1) is killed by signal: Killed. ")
    path.write_bytes(b"old")
    with pytest.raises(kind) as e, files.atomic_write(str(path)) as f:
        torch.save(make_state(), Interrupted(f, error, nth))
    assert e.value is error
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_a_failed_replacement_leaves_no_temporary(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"), files.atomic_write(str(tmp_path / "a")) as f:
        f.write(b"x")
    assert os.listdir(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with files.atomic_write(str(tmp_path / "a")) as f:
        f.write(b"x")
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder that has the name


def test_a_name_without_a_folder_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_weights("a.bin", make_state())
    assert os.listdir(tmp_path) == ["a.bin"]


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    files.check_writable(str(folder))
    files.check_writable(str(folder))
    assert os.listdir(folder) == []


@pytest.mark.parametrize("below", ["", "below"])
def test_check_writable_refuses_what_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("x")
    folder = os.path.join(tmp_path, "file", below)
    with pytest.raises(ValueError, match="cannot be written") as e:
        files.check_writable(folder)
    assert folder in str(e.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        files.check_writable(str(tmp_path))


# ---- reading ----


def test_weights_come_back_as_they_were_saved(tmp_path):
    path = str(tmp_path / "a.bin")
    state = make_state()
    checkpoint.save_weights(path, {name: torch.nn.Parameter(x, x.is_floating_point()) for name, x in state.items()})
    assert_same_state(checkpoint.load_weights(path), state)
    plain = torch.load(path, weights_only=True)
    assert type(plain) is dict
    assert not any(x.requires_grad for x in plain.values())


@pytest.mark.parametrize("make", ["missing", "folder"])
def test_a_missing_file_is_named(tmp_path, make):
    path = tmp_path / "a.bin"
    if make == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match="there is no checkpoint") as e:
        checkpoint.load_weights(str(path))
    assert str(path) in str(e.value)


def damaged_files():
    whole, old = saved(make_state()), saved(make_state(), _use_new_zipfile_serialization=False)
    for share in (0.01, 0.3, 0.6, 0.9, 0.999):
        yield pytest.param(whole[: int(share * len(whole))], id=f"cut_off_at_{share}")
    for length in (2, 10, 22, 24, 60, 150, 300, 420, len(old) - 5):
        yield pytest.param(old[:length], id=f"old_format_cut_off_at_{length}")
    yield pytest.param(b"", id="empty")
    yield pytest.param(b"<html>404 Not Found</html>", id="html")
    for text in ("epoch 3", "Model", "the weights", "0"):  # each is another kind of nonsense to an unpickler
        yield pytest.param(text.encode(), id=f"text_{text.split()[0]}")
    rng = np.random.default_rng(0)
    for length in (1, 2, 7, 100, 1000):
        yield pytest.param(rng.bytes(length), id=f"noise_{length}")


@pytest.mark.parametrize("content", list(damaged_files()))
def test_a_damaged_file_is_a_value_error_that_names_it(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.bin") as e:
        checkpoint.load_weights(str(path))
    assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize(
    "value",
    [
        {"model": make_state(), "step": 3},
        {"model": make_state()},
        {"weight": [1.0, 2.0]},
        {"weight": np.zeros(3)},
        {0: torch.zeros(3)},
        [torch.zeros(3)],
        torch.zeros(3),
        {},
        None,
        torch.nn.Linear(2, 2),
    ],
    ids=["nested_and_a_number", "nested", "lists", "arrays", "unnamed", "list", "tensor", "empty", "none", "module"],
)
def test_what_is_no_state_dict_is_a_value_error_that_says_what_to_save(tmp_path, value):
    path = tmp_path / "a.bin"
    path.write_bytes(saved(value))
    with pytest.raises(ValueError, match=r"model\.state_dict\(\)") as e:
        checkpoint.load_weights(str(path))
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("layout", ["torch", "old_torch", "pickle"])
def test_code_in_a_file_never_runs(tmp_path, layout):
    touched, path = tmp_path / "touched", tmp_path / "a.bin"
    value = {"head.weight": torch.zeros(2), "evil": Touch(touched)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"evil": Touch(touched)}, protocol=2))
    else:
        path.write_bytes(saved(value, _use_new_zipfile_serialization=layout == "torch"))
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load_weights(str(path))
    assert not touched.exists()
    torch.load(path, weights_only=False) if layout != "pickle" else pickle.loads(path.read_bytes())
    assert touched.exists()  # the trap works: whoever reads the file carelessly does run it


# ---- descriptions ----


def describe(**changes):
    fields = dict(model_type="testing", img_size=32, classes=["ant", "bee", "caf\u00e9"], gelu="erf", dataset="pets",
                  step=4, accuracy=0.5)  # fmt: skip
    return checkpoint.CheckpointMetadata(**{**fields, **changes})


def test_a_description_comes_back_with_the_weights(tmp_path):
    path, state = str(tmp_path / "a_checkpoint.bin"), make_state()
    checkpoint.save_weights(path, state, describe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_checkpoint.bin", "a_checkpoint.json"]
    loaded = checkpoint.load_weights(path)
    assert_same_state(loaded, state)
    assert checkpoint.read_metadata(path, loaded) == describe()
    wrapped = {f"module.{name}": x for name, x in state.items()}
    torch.save(wrapped, path)  # the same weights under other names
    assert checkpoint.read_metadata(path, checkpoint.load_weights(path)) == describe()


def test_weights_without_a_description_have_none(tmp_path):
    path = str(tmp_path / "a.bin")
    checkpoint.save_weights(path, make_state())
    assert checkpoint.read_metadata(path, make_state()) is None
    os.rename(path, tmp_path / "a.json")  # weights of that name are not a description of themselves
    assert checkpoint.read_metadata(str(tmp_path / "a.json"), make_state()) is None


@pytest.mark.parametrize("name", ["head.weight", "half", "count"])
def test_the_description_of_other_weights_is_refused(tmp_path, name):
    path, state = str(tmp_path / "a.bin"), make_state()
    checkpoint.save_weights(path, state, describe())
    state[name] = state[name] + 1
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"a\.json describes other weights than .*a\.bin holds"):
        checkpoint.read_metadata(path, state)


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6])  # the fourth syncs a folder, which may fail
def test_a_write_that_fails_anywhere_leaves_the_old_pair_or_a_pair_that_is_known_for_none(tmp_path, monkeypatch, call):
    """The disk fails at the n-th fsync or replace: of the weights, the description, then again the weights."""
    path, old = str(tmp_path / "a.bin"), make_state()
    checkpoint.save_weights(path, old, describe())
    calls = 0

    def fails(real):
        def wrapper(*args):
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(28, "No space left on device")
            return real(*args)

        return wrapper

    monkeypatch.setattr(os, "fsync", fails(os.fsync))
    monkeypatch.setattr(os, "replace", fails(os.replace))
    new = {name: x + 1 for name, x in old.items()}
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_weights(path, new, describe(step=8))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.json"]
    assert_same_state(checkpoint.load_weights(path), old)
    if call <= 3:
        assert checkpoint.read_metadata(path, old) == describe()
    else:
        with pytest.raises(ValueError, match="a run was stopped between"):
            checkpoint.read_metadata(path, old)


WRONG = (
    {"img_size": "32"}, {"img_size": True}, {"img_size": 0}, {"classes": "ant"}, {"classes": []},
    {"classes": ["ant", 3]}, {"classes": ["ant", "ant"]}, {"gelu": None},
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"model_type": "testing"',
        '{"model_type": "testing"}',
        "[" * 100_000,
        "\xff",
        *(json.dumps({**asdict(describe()), "crc32": 0, **change}) for change in WRONG),
    ],
)
def test_a_damaged_description_is_one_clear_line(tmp_path, text):
    path = str(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json does not describe a checkpoint") as e:
        checkpoint.read_metadata(path, make_state())
    assert "\n" not in str(e.value)
