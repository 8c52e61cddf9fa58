"""models/npz.py: Google's checkpoints in and out."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import npz, pretrained
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from tests.helpers import fake_npz
from utils import metadata
from utils import weights as weights_file


def load(path, model_type):
    """A file's arrays as training has them."""
    return pretrained.load(metadata.open_weights(str(path), strict=True), model_type).arrays


PLAIN = CONFIGS["testing"]
HYBRID = CONFIGS["testing-hybrid"]
BOTH = pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


def build(config: ViTConfig, img_size: int = 32, num_classes: int = 10, **kwargs: bool) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config, img_size, num_classes, **kwargs)


def expected_state(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the state_dict has to hold, by rules of its own: regular expressions for names, one line per layout."""
    embeddings = "transformer.embeddings."
    rules = [
        (r"cls$", embeddings + "cls_token"),
        (r"Transformer/posembed_input/pos_embedding$", embeddings + "position_embeddings"),
        (r"embedding/", embeddings + "patch_embeddings/"),
        (r"Transformer/encoder_norm/", "transformer.encoder.encoder_norm/"),
        (r"Transformer/encoderblock_(\d+)/", r"transformer.encoder.layer.\1."),
        (r"conv_root/", embeddings + "hybrid_model.root.conv/"),
        (r"gn_root/", embeddings + "hybrid_model.root.gn/"),
        (r"block(\d+)/unit(\d+)/conv_proj/", embeddings + r"hybrid_model.body.block\1.unit\2.downsample/"),
        (r"block(\d+)/unit(\d+)/", embeddings + r"hybrid_model.body.block\1.unit\2."),
    ]
    parts = {
        "LayerNorm_0": "attention_norm",
        "LayerNorm_2": "ffn_norm",
        "MultiHeadDotProductAttention_1/": "attn.",
        "MlpBlock_3/Dense_0": "ffn.fc1",
        "MlpBlock_3/Dense_1": "ffn.fc2",
    }
    state = {}
    for name, array in weights.items():
        for pattern, replacement in rules:
            ours, count = re.subn("^" + pattern, replacement, name)
            if count:
                break
        for theirs, part in parts.items():
            ours = ours.replace(theirs, part)
        ours = re.sub(r"/(kernel|scale)$", ".weight", ours)
        ours = re.sub(r"/bias$", ".bias", ours)

        if "/gn" in f"/{name}":
            array = array.reshape(-1)
        elif re.search(r"/(query|key|value)/kernel", name):  # (D, A, K), applied as x @ kernel
            array = array.reshape(len(array), -1).T
        elif name.endswith("/out/kernel"):  # (A, K, D)
            array = array.reshape(-1, array.shape[-1]).T
        elif re.search(r"/(query|key|value)/bias", name):
            array = array.reshape(-1)
        elif array.ndim == 4:  # height, width, in, out
            array = np.moveaxis(array, (3, 2), (0, 1))
        elif array.ndim == 2:
            array = array.T
        state[ours] = array
    return state


def assert_same_state(model: VisionTransformer, expected: dict[str, np.ndarray]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert state[name].dtype == torch.float32, name
        np.testing.assert_array_equal(state[name].numpy(), x, err_msg=name)


# Where everything lands.


@BOTH
def test_every_array_lands_in_its_place(config):
    weights = fake_npz.arrays(config)
    model = build(config)
    model.load_from(weights)
    assert_same_state(model, expected_state(weights))


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"newer_names": True},
        {"prefix": "opt/target/"},
        {"prefix": "params/", "newer_names": True},
        {"flat_norms": True},
        {"pre_logits": True},
    ],
    ids=str,
)
def test_every_way_of_writing_a_checkpoint_is_read_alike(config, options):
    model = build(config)
    model.load_from(fake_npz.arrays(config, **options))
    assert_same_state(model, expected_state(fake_npz.arrays(config)))


def test_float16_files_load_as_float32():
    weights = fake_npz.arrays(HYBRID, dtype=np.float16)
    model = build(HYBRID)
    model.load_from(weights)
    assert_same_state(model, {name: x.astype(np.float32) for name, x in expected_state(weights).items()})


def test_an_open_npz_loads_like_its_arrays(make_npz):
    model = build(PLAIN)
    with np.load(make_npz("testing")) as archive:
        model.load_from(archive)
    assert_same_state(model, expected_state(fake_npz.arrays(PLAIN)))


def test_converted_tensors_share_no_memory_with_the_arrays():
    weights = fake_npz.arrays(PLAIN)
    state = npz.to_state_dict(weights, PLAIN, img_size=32, num_classes=10)
    for array in weights.values():
        array.fill(np.nan)
    assert all(x.isfinite().all() for x in state.values())


def test_optimizer_state_beside_the_weights_is_passed_over(caplog):
    weights = fake_npz.arrays(PLAIN, prefix="opt/target/")
    state = {name.replace("opt/target/", "opt/state/param_states/"): -x for name, x in weights.items()}
    model = build(PLAIN)
    model.load_from({**state, "opt/state/step": np.array(7), **weights})
    assert_same_state(model, expected_state(fake_npz.arrays(PLAIN)))
    assert not caplog.records


def test_zero_head_leaves_the_head_at_zero_and_loads_the_rest():
    weights = fake_npz.arrays(PLAIN, num_classes=21)
    model = build(PLAIN, num_classes=10, zero_head=True)
    model.load_from(weights)
    expected = expected_state(weights)
    expected["head.weight"], expected["head.bias"] = np.zeros((10, 32)), np.zeros(10)
    assert_same_state(model, expected)


def test_zero_head_needs_no_head_in_the_file():
    weights = {name: x for name, x in fake_npz.arrays(PLAIN).items() if not name.startswith("head/")}
    model = build(PLAIN, zero_head=True)
    model.load_from(weights)
    assert model.head.weight.count_nonzero() == 0
    with pytest.raises(ValueError, match=r"head/kernel: expected \(32, 10\), not in the file"):
        build(PLAIN).load_from(weights)


def test_a_head_of_another_size_is_refused_unless_it_is_to_be_zero():
    weights = fake_npz.arrays(PLAIN, num_classes=21)
    with pytest.raises(ValueError, match=r"head/kernel: expected \(32, 10\), found \(32, 21\)"):
        build(PLAIN, num_classes=10).load_from(weights)


# What is wrong with a file.


@BOTH
def test_any_missing_array_is_named_and_nothing_is_loaded(config):
    weights = fake_npz.arrays(config)
    model = build(config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for name, array in weights.items():
        rest = {n: x for n, x in weights.items() if n != name}
        with pytest.raises(ValueError, match="not in the file") as e:
            model.load_from(rest)
        expected = "(1, 1 + n * n, 32)" if name == POSITIONS else str(array.shape)
        assert f"{name}: expected {expected}, not" in str(e.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@BOTH
def test_any_wrong_shape_is_named_with_both_and_nothing_is_loaded(config):
    weights = fake_npz.arrays(config)
    model = build(config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for name, array in weights.items():
        # The same numbers in another order of axes would be the worst to accept; for one axis, one more.
        wrong = array.T if array.T.shape != array.shape else np.concatenate((array, array), axis=-1)
        expected = r"(1, 1 + n * n, 32)" if name == POSITIONS else str(array.shape)
        if name.split("/")[-2:-1] and re.match(r"gn", name.split("/")[-2]):
            wrong = np.concatenate((array, array), axis=-1)
        with pytest.raises(ValueError, match="expected") as e:
            model.load_from({**weights, name: wrong})
        assert f"{name}: expected {expected}, found {wrong.shape}" in str(e.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


SPELLINGS = [
    {"prefix": "opt/target/"},
    {"newer_names": True},
    {"prefix": "opt/target/", "newer_names": True},
    {"prefix": "params/", "newer_names": True, "flat_norms": True},
]


@BOTH
@pytest.mark.parametrize("options", SPELLINGS, ids=str)
@pytest.mark.parametrize("fault", ["missing", "wrong shape", "integers", "NaN"])
def test_what_is_wrong_is_told_by_the_files_own_names(config, options, fault):
    weights = fake_npz.arrays(config, **options)
    model = build(config)
    for name, array in weights.items():
        bad = dict(weights)
        if fault == "missing":
            del bad[name]
        elif fault == "wrong shape":
            bad[name] = np.concatenate((array, array), axis=-1)
        elif fault == "integers":
            bad[name] = array.astype(np.int32)
        else:
            bad[name] = np.full_like(array, np.nan)
        with pytest.raises(ValueError, match=r"expected|NaN") as e:
            model.load_from(bad)
        assert str(e.value).startswith(f"{name}: ")
        assert ";" not in str(e.value)


@pytest.mark.parametrize("options", SPELLINGS, ids=str)
def test_a_file_that_lacks_much_is_still_told_by_its_own_names(options):
    weights = fake_npz.arrays(PLAIN, **options)
    names = list(weights)
    kept = [name for name in names if "LayerNorm" in name or "posembed" in name]  # enough to see the spelling
    with pytest.raises(ValueError, match="not in the file") as e:
        build(PLAIN).load_from({name: weights[name] for name in kept})
    told = re.findall(r"(\S+): expected", str(e.value))
    assert len(told) == 3
    assert set(told) <= set(names) - set(kept)


@pytest.mark.parametrize("options", SPELLINGS, ids=str)
def test_arrays_without_a_place_are_named_as_the_file_does(options, caplog):
    weights = fake_npz.arrays(replace(PLAIN, num_layers=3), **options)
    build(PLAIN).load_from(weights)
    (record,) = caplog.records
    told = record.message.split(": ")[1].split(", ")
    assert told == sorted(name for name in weights if "encoderblock_2/" in name)


def test_an_array_of_the_other_numbering_is_no_weight(caplog):
    weights = fake_npz.arrays(PLAIN, newer_names=True)
    stray = "Transformer/encoderblock_0/LayerNorm_2/scale"
    model = build(PLAIN)
    model.load_from({**weights, stray: np.full(32, 7.0)})
    assert_same_state(model, expected_state(fake_npz.arrays(PLAIN)))
    assert stray in caplog.text


@pytest.mark.parametrize(
    "shape", [(1, 6, 32), (1, 1, 32), (2, 5, 32), (1, 5, 33), (5, 32)], ids=["no square", "none", "two", "wide", "flat"]
)
def test_position_embeddings_of_no_square_grid_are_refused(shape):
    weights = {**fake_npz.arrays(PLAIN), POSITIONS: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=re.escape(f"{POSITIONS}: expected (1, 1 + n * n, 32), found {shape}")):
        build(PLAIN).load_from(weights)


def test_long_lists_of_faults_are_cut():
    with pytest.raises(ValueError, match=r"and \d+ more") as e:
        build(PLAIN).load_from({})
    assert str(e.value).count("not in the file") == 3


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, "U3", bool])
def test_arrays_that_are_no_floats_are_refused(dtype):
    weights = fake_npz.arrays(PLAIN)
    weights["cls"] = np.zeros((1, 1, 32), dtype)
    with pytest.raises(ValueError, match="cls: expected floating-point numbers, found"):
        build(PLAIN).load_from(weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_number_that_is_none_is_named_and_nothing_loads(bad, dtype):
    weights = {name: x.astype(dtype) for name, x in fake_npz.arrays(PLAIN).items()}
    weights["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"][7] = bad
    model = build(PLAIN)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="encoderblock_1/MlpBlock_3/Dense_0/bias: it holds NaN, infinity"):
        model.load_from(weights)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("ViT-demo", {}), ("testing-hybrid", {}), ("testing-hybrid", {"newer_names": True, "flat_norms": True})],
)
def test_another_models_file_is_refused_with_the_model_it_fits(make_npz, model_type, options):
    path = make_npz(model_type, img_size=32, **options)
    with pytest.raises(ValueError, match=f"it fits --model_type {model_type}$") as e:
        load(path, "testing")
    assert str(e.value).startswith(f"{path} cannot be loaded as testing: embedding/kernel: expected (16, 16, 3, 32)")


def test_an_unknown_models_file_gets_no_hint():
    weights = fake_npz.arrays(replace(PLAIN, hidden_size=48))
    with pytest.raises(ValueError, match="found") as e:
        build(PLAIN).load_from(weights)
    assert "fits" not in str(e.value)


def test_arrays_without_a_place_are_named_in_a_warning(caplog):
    weights = fake_npz.arrays(replace(PLAIN, num_layers=3))
    model = build(PLAIN)
    model.load_from({**weights, "mystery/kernel": np.zeros(3, np.float32)})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "mystery/kernel" in record.message
    assert "Transformer/encoderblock_2/LayerNorm_0/bias" in record.message
    assert "encoderblock_1" not in record.message


@pytest.mark.parametrize(("zero_head", "warns"), [(False, True), (True, False)])
def test_a_head_trained_behind_pre_logits_is_warned_about(caplog, zero_head, warns):
    build(PLAIN, zero_head=zero_head).load_from(fake_npz.arrays(PLAIN, pre_logits=True))
    assert ("pre_logits" in caplog.text) == warns


@BOTH
def test_a_complete_file_is_loaded_without_a_warning(config, caplog):
    build(config).load_from(fake_npz.arrays(config))
    assert not caplog.records


# What is no whole file.


def test_load_reads_a_whole_file(make_npz, caplog):
    arrays = load(make_npz("testing", pre_logits=True, newer_names=True), "testing")
    expected = fake_npz.arrays(PLAIN, pre_logits=True)
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert not caplog.records


def test_what_was_found_whole_is_not_looked_through_again(make_npz, monkeypatch):
    arrays = load(make_npz("testing"), "testing")
    looked = []
    isfinite = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda x: looked.append(x.shape) or isfinite(x))
    flags = {"gelu": "tanh", "dropout_rate": 0.5}  # of which no array depends
    model = build(replace(PLAIN, **flags), img_size=48, zero_head=True)
    model.load_from(arrays)
    assert not looked
    assert arrays[POSITIONS].shape == (1, 5, 32)  # and resizing them has left the file's alone
    again = build(PLAIN, img_size=48, zero_head=True)
    again.load_from(dict(arrays))
    assert len(looked) == len(arrays) - 2  # a head of zeros needs none of the file's
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_what_was_found_whole_for_another_model_is_looked_through(make_npz):
    arrays = load(make_npz("testing"), "testing")
    with pytest.raises(ValueError, match=r"head/kernel: expected \(32, 7\), found \(32, 10\)"):
        build(PLAIN, num_classes=7).load_from(arrays)
    with pytest.raises(ValueError, match=r"encoderblock_2/.*not in the file.*it fits --model_type testing"):
        build(replace(PLAIN, num_layers=3), zero_head=True).load_from(arrays)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99, "all but one byte"])
def test_a_truncated_file_is_refused(make_npz, kept):
    path = make_npz("testing")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: -1 if isinstance(kept, str) else int(kept * len(data))])
    with pytest.raises(
        ValueError, match=r"it is empty|not an archive, or only the beginning of one|no file of torch"
    ) as e:
        load(path, "testing")
    assert path in str(e.value)


@pytest.mark.parametrize("content", [b"<html>404</html>", pickle.dumps({"cls": 1})], ids=["html", "pickle"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"it is an HTML page|it is no checkpoint|no file of torch|no state_dict"):
        load(str(path), "testing")


def test_a_single_array_is_no_npz(tmp_path):
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"it is a single array of NumPy"):
        load(str(path), "testing")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_member_is_noticed(tmp_path, compressed):
    path = tmp_path / "weights.npz"
    (np.savez_compressed if compressed else np.savez)(path, **fake_npz.arrays(PLAIN))
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{QUERY}.npy")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.compress_size - 100] ^= 1  # one bit of its numbers
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged \.npz archive"):
        load(str(path), "testing")


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
                found = weights_file.read_npz(str(path)).get("cls", array)
            except ValueError:
                continue
            except Exception as e:  # a traceback for the user
                found = e
            if not np.array_equal(found, array):
                wrong.append(f"byte {position}, flipped by {flip}: {found!r:.60}")
    assert not wrong, "\n".join(wrong)


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_never_executed(tmp_path):
    executed = tmp_path / "executed"
    weights = {**fake_npz.arrays(PLAIN), "cls": np.array([_Bomb(executed)], dtype=object)}
    path = fake_npz.save(tmp_path / "weights.npz", weights)
    with pytest.raises(ValueError, match=r"it is a pickled \.npz"):
        load(path, "testing")
    assert not executed.exists()
    np.load(path, allow_pickle=True)["cls"]  # the bomb would have gone off
    assert executed.exists()


def test_a_member_that_is_no_array_is_refused(make_npz):
    weights = fake_npz.arrays(PLAIN)
    del weights["cls"]
    path = make_npz("testing")
    fake_npz.save(path, weights)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cls.npy", b"not an array")
    with pytest.raises(ValueError, match=r"cls|damaged"):
        load(path, "testing")


# Position embeddings.


@pytest.mark.parametrize(
    ("old", "new"), [(14, 24), (24, 14), (7, 12), (12, 7), (2, 3), (3, 2), (37, 4), (1, 3), (5, 1)]
)
def test_position_embeddings_are_resized_bilinearly_with_corners_aligned(old, new):
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((1, 1 + old * old, 8)).astype(np.float32)
    resized = npz.resize_positions(positions, new)
    assert resized.shape == (1, 1 + new * new, 8)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized[:, 0], positions[:, 0])  # the class token has no place in the grid

    grid = torch.from_numpy(positions[:, 1:].astype(np.float64).reshape(1, old, old, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (new, new), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resized[0, 1:], expected.reshape(new * new, 8), rtol=0, atol=2e-6)


# scipy leaves the last row at zero for some other pairs, such as 8 to 26: rounding puts it outside the grid.
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 12), (12, 7), (2, 3), (3, 2), (37, 4)])
def test_position_embeddings_are_resized_as_google_does(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    positions = np.random.default_rng(0).standard_normal((1, 1 + old * old, 8)).astype(np.float32)
    expected = ndimage.zoom(positions[0, 1:].reshape(old, old, 8), (new / old, new / old, 1), order=1)
    np.testing.assert_allclose(npz.resize_positions(positions, new)[0, 1:], expected.reshape(-1, 8), atol=2e-6)


def test_position_embeddings_of_the_same_grid_keep_their_bits():
    positions = fake_npz.values("pos_embedding", (1, 50, 8))
    np.testing.assert_array_equal(npz.resize_positions(positions, 7), positions)


@BOTH
def test_a_checkpoint_of_another_size_differs_in_its_position_embeddings_only(config):
    weights = fake_npz.arrays(config, img_size=64)
    model = build(config, img_size=96)
    model.load_from(weights)
    expected = expected_state(weights)
    resized = npz.resize_positions(weights[POSITIONS], config.grid_size(96))
    expected["transformer.embeddings.position_embeddings"] = resized
    assert resized.shape[1] != weights[POSITIONS].shape[1]
    assert_same_state(model, expected)


# The way back.


@BOTH
def test_a_model_written_and_read_again_keeps_every_bit(config, tmp_path):
    model = build(config, img_size=48)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    arrays = npz.from_state_dict(model.state_dict(), config, img_size=48)
    shapes = fake_npz.shapes(config, img_size=48)
    assert [(name, x.shape, x.dtype) for name, x in arrays.items()] == [(*item, np.float32) for item in shapes.items()]

    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        npz.write(file, arrays)
    state = npz.to_state_dict(weights_file.read_npz(str(path)), config, img_size=48, num_classes=10)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_written_files_are_what_numpy_writes(tmp_path):
    arrays = fake_npz.arrays(PLAIN)
    with (tmp_path / "ours.npz").open("wb") as file:
        npz.write(file, arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as archive:
        assert archive.files == list(arrays)
        assert all(np.array_equal(archive[name], arrays[name]) for name in arrays)
    with zipfile.ZipFile(tmp_path / "ours.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_weights_can_be_written_as_float16():
    state = build(PLAIN).state_dict()
    halves = npz.from_state_dict(state, PLAIN, 32, dtype=np.float16)
    floats = npz.from_state_dict(state, PLAIN, 32)
    assert all(x.dtype == np.float16 for x in halves.values())
    assert all(np.array_equal(halves[name], x.astype(np.float16)) for name, x in floats.items())


def test_arrays_made_from_a_model_do_not_follow_its_training():
    model = build(PLAIN)
    arrays = npz.from_state_dict(model.state_dict(), PLAIN, 32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    assert [name for name, x in arrays.items() if np.isnan(x).any()] == []


def test_real_float16_weights_load(shared_data, caplog):
    arrays = load(str(shared_data / "ViT-S_14.npz"), "ViT-S_14")
    model = VisionTransformer(CONFIGS["ViT-S_14"], img_size=56, num_classes=10, zero_head=True)
    with caplog.at_level(logging.INFO):
        model.load_from(arrays)
    assert "from a grid of 37 x 37 to 4 x 4" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("prefix", ["", "opt/target/", "opt/target/params/", "params/", "target/"])
def test_weights_load_from_every_kind_of_train_state(prefix, caplog):
    weights = {prefix + name: x for name, x in fake_npz.arrays(PLAIN).items()}
    weights["opt/state/param_states/cls/momentum"] = np.zeros(3)
    weights["params/stray" if prefix != "params/" else "stray"] = np.zeros(3)
    plain, wrapped = build(PLAIN), build(PLAIN)
    plain.load_from(fake_npz.arrays(PLAIN))
    wrapped.load_from(weights)
    assert all(torch.equal(x, wrapped.state_dict()[name]) for name, x in plain.state_dict().items())
    assert "stray" in caplog.text
    assert "momentum" not in caplog.text


def test_numbers_beyond_float32_are_refused():
    weights = {name: x.astype(np.float64) for name, x in fake_npz.arrays(PLAIN).items()}
    weights["cls"][0, 0, 3] = 1e300
    with pytest.raises(ValueError, match="cls: it holds NaN, infinity or what float32 cannot hold"):
        build(PLAIN).load_from(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "head.bias: not in the state_dict"),
        (lambda state: state.pop("transformer.embeddings.cls_token"), "cls_token: not in the state_dict"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra: not in this model"),
        (lambda state: state.update({"head.weight": torch.zeros(32, 10)}), r"head.weight: expected \(10, 32\)"),
    ],
)
def test_a_state_dict_of_another_model_is_not_written(change, message):
    state = build(PLAIN).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        npz.from_state_dict(state, PLAIN, 32)


def test_a_head_that_was_trained_is_zeroed_for_fine_tuning():
    model = VisionTransformer(PLAIN, 32, 10, zero_head=True)
    torch.nn.init.ones_(model.head.weight)
    model.load_from(fake_npz.arrays(PLAIN))
    assert not model.head.weight.any()


# ---- files made to fill the memory ----


def _peak_kib():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**5, 10**4), (2**40,)])
def test_an_absurd_shape_is_refused_before_memory_is_taken(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as f:
        f.writestr("cls.npy", header.getvalue() + bytes(64))
    before = _peak_kib()
    with pytest.raises(ValueError, match="says it is of shape"):
        weights_file.read_npz(str(tmp_path / "a.npz"))
    assert _peak_kib() - before < 64 * 1024


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as f, f.open("cls.npy", "w") as member:
        for _ in range(300):
            member.write(bytes(2**20))
    before = _peak_kib()
    with pytest.raises(ValueError, match=r"would unpack to 0\.3 GiB"):
        weights_file.read_npz(str(tmp_path / "a.npz"))
    assert _peak_kib() - before < 64 * 1024


def test_weights_that_were_compressed_are_read(tmp_path):
    arrays = {"a": np.zeros((300, 300), np.float32), "b": np.random.default_rng(0).random(1000, np.float32)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = weights_file.read_npz(str(tmp_path / "a.npz"))
    assert all((found[name] == x).all() for name, x in arrays.items())
