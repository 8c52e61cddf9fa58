"""models/npz.py: Google's checkpoints in and out.

Every array lands in its place: tests/test_google_reference.py shows that, by Google's own numbers.
"""

from __future__ import annotations

import logging
import re
import zipfile
from dataclasses import replace
from typing import Any

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
from utils.errors import UserError

PLAIN = CONFIGS["testing"]
HYBRID = CONFIGS["testing-hybrid"]
BOTH = pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
POSITIONS = "Transformer/posembed_input/pos_embedding"
SPELLINGS: list[dict[str, Any]] = [
    {},
    {"newer_names": True},
    *({"prefix": prefix} for prefix in ("opt/target/", "opt/target/params/", "params/", "target/")),
    {"prefix": "params/", "newer_names": True, "flat_norms": True},
]


def read(path, model_type):
    """Returns a file's arrays as training has them."""
    return pretrained.load(metadata.open_weights(str(path), strict=True), model_type).arrays


def build(config: ViTConfig = PLAIN, img_size: int = 32, num_classes: int = 10, **options: bool) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config, img_size, num_classes, **options)


def loaded(weights, config: ViTConfig = PLAIN, **options: Any) -> dict[str, torch.Tensor]:
    """Returns the state_dict of a model that has loaded the weights."""
    model = build(config, **options)
    model.load_from(weights)
    return model.state_dict()


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in state.items()}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert state[name].dtype == torch.float32, name
        assert torch.equal(state[name], x), name


# ---- what is read ----


@BOTH
def test_every_spelling_of_a_checkpoint_is_read_alike_and_without_a_warning(config, caplog, make_npz):
    expected = loaded(fake_npz.arrays(config), config)
    for options in SPELLINGS:
        assert_same(loaded(fake_npz.arrays(config, **options), config), expected)
    assert_same(loaded(fake_npz.arrays(config, pre_logits=True), config, zero_head=True), {
        **expected, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10),
    })  # fmt: skip
    with np.load(make_npz(config)) as archive:
        assert_same(loaded(archive, config), expected)
    assert not caplog.records
    assert_same(loaded(fake_npz.arrays(config, pre_logits=True), config), expected)
    assert "pre_logits" in caplog.text  # a head that was trained behind a layer that is missing here


def test_float16_becomes_float32():
    weights = fake_npz.arrays(HYBRID, dtype=np.float16)
    assert_same(loaded(weights, HYBRID), loaded({name: x.astype(np.float32) for name, x in weights.items()}, HYBRID))


def test_tensors_and_arrays_share_no_memory():
    weights = fake_npz.arrays(PLAIN)
    state = npz.to_state_dict(weights, PLAIN, img_size=32, num_classes=10)
    arrays = npz.from_state_dict(state, PLAIN, 32)
    for array in weights.values():
        array.fill(np.nan)
    assert all(x.isfinite().all() for x in state.values())
    for x in state.values():
        x.fill_(torch.nan)
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_head_of_zeros_takes_none_from_the_file():
    weights = fake_npz.arrays(PLAIN, num_classes=21)
    headless = {name: x for name, x in weights.items() if not name.startswith("head/")}
    for fitting in (weights, headless):
        model = build(zero_head=True)
        torch.nn.init.ones_(model.head.weight)
        model.load_from(fitting)
        assert not model.head.weight.any()
        assert not model.head.bias.any()
    with pytest.raises(UserError, match=r"head/kernel: expected \(32, 10\), found \(32, 21\)"):
        build().load_from(weights)
    with pytest.raises(UserError, match=r"head/kernel: expected \(32, 10\), not in the file"):
        build().load_from(headless)


def test_arrays_without_a_place_are_named_as_the_file_does_and_optimizer_state_is_not(caplog):
    for options in SPELLINGS:
        caplog.clear()
        weights = fake_npz.arrays(replace(PLAIN, num_layers=3), **options)
        stray = "params/stray" if options.get("prefix") != "params/" else "stray"
        extra = {"opt/state/param_states/cls/momentum": np.zeros(3), "opt/state/step": np.array(7), stray: np.zeros(3)}
        assert_same(loaded({**extra, **weights}), loaded(fake_npz.arrays(PLAIN)))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        named = record.message.split(": ")[1].split(", ")
        assert named == sorted([stray, *(name for name in weights if "encoderblock_2/" in name)])


def test_an_array_of_the_other_numbering_is_no_weight(caplog):
    stray = "Transformer/encoderblock_0/LayerNorm_2/scale"
    weights = {**fake_npz.arrays(PLAIN, newer_names=True), stray: np.full(32, 7.0)}
    assert_same(loaded(weights), loaded(fake_npz.arrays(PLAIN)))
    assert stray in caplog.text


# ---- what is wrong with the arrays ----


def faults_of(name: str, array: np.ndarray):
    """Yields arrays that cannot be loaded in the place of another, None for none, and what is said of them."""
    shape = re.escape("(1, 1 + n * n, 32)" if name.endswith(POSITIONS) else str(array.shape))
    if re.search(r"(^|/)gn", name):  # newer files' flat norms are read as well
        shape = rf"\((1, 1, 1, )?{array.size},?\)"
    doubled = np.concatenate((array, array), axis=-1)
    yield None, rf"expected {shape}, not in the file"
    yield doubled, rf"expected {shape}, found {re.escape(str(doubled.shape))}"
    if array.T.shape not in (array.shape, array.shape[-1:]) and array.squeeze().ndim > 1:
        yield array.T, rf"expected {shape}, found {re.escape(str(array.T.shape))}"
    yield array.astype(np.int32), "expected floating-point numbers, found int32"
    for bad in (np.nan, np.inf):
        x = array.copy()
        x.flat[-1] = bad
        yield x, "it holds NaN, infinity"


@BOTH
def test_a_fault_of_any_array_is_named_as_the_file_does_and_nothing_is_loaded(config):
    model = build(config)
    before = copy_of(model.state_dict())
    for options in (SPELLINGS[0], SPELLINGS[-1], {"newer_names": True, "dtype": np.float16}):
        weights = fake_npz.arrays(config, **options)
        for name in {re.sub(r"block_?\d+", "", name): name for name in weights}.values():  # one of each kind
            for bad, fault in faults_of(name, weights[name]):
                wrong = {**weights, name: bad}
                if bad is None:
                    del wrong[name]
                with pytest.raises(UserError, match=f"^{re.escape(name)}: {fault}[^;]*$"):
                    model.load_from(wrong)
    assert_same(model.state_dict(), before)


def test_a_file_that_lacks_much_is_reported_by_three_of_its_own_names():
    for options in SPELLINGS:
        weights = fake_npz.arrays(PLAIN, **options)
        # Enough to see the spelling.
        kept = {name: x for name, x in weights.items() if "LayerNorm" in name or "posembed" in name}
        with pytest.raises(UserError, match=r"and \d+ more") as e:
            build().load_from(kept)
        named = re.findall(r"(\S+): expected", str(e.value))
        assert len(named) == 3
        assert set(named) <= set(weights) - set(kept)
    with pytest.raises(UserError, match=r"and \d+ more"):
        build().load_from({})


def test_position_embeddings_of_no_square_grid_are_refused():
    for shape in [(1, 6, 32), (1, 1, 32), (2, 5, 32), (1, 5, 33), (5, 32)]:
        weights = {**fake_npz.arrays(PLAIN), POSITIONS: np.zeros(shape, np.float32)}
        with pytest.raises(UserError, match=re.escape(f"{POSITIONS}: expected (1, 1 + n * n, 32), found {shape}")):
            build().load_from(weights)


def test_arrays_of_other_types_are_refused():
    for dtype in (np.complex64, "U3", bool):
        weights = {**fake_npz.arrays(PLAIN), "cls": np.zeros((1, 1, 32), dtype)}
        with pytest.raises(UserError, match="cls: expected floating-point numbers, found"):
            build().load_from(weights)
    weights["cls"] = np.full((1, 1, 32), 1e300)
    with pytest.raises(UserError, match="cls: it holds NaN, infinity or what float32 cannot hold"):
        build().load_from(weights)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("ViT-demo", {}), ("testing-hybrid", {}), ("testing-hybrid", {"newer_names": True, "flat_norms": True})],
)
def test_another_models_file_is_refused_with_the_model_it_fits(make_npz, model_type, options):
    path = make_npz(model_type, img_size=32, **options)
    with pytest.raises(UserError, match=f"it fits --model_type {model_type}$") as e:
        read(path, "testing")
    assert str(e.value).startswith(f"{path} cannot be loaded as testing: embedding/kernel: expected (16, 16, 3, 32)")


def test_an_unknown_models_file_gets_no_hint():
    with pytest.raises(UserError, match="found") as e:
        build().load_from(fake_npz.arrays(replace(PLAIN, hidden_size=48)))
    assert "fits" not in str(e.value)


# ---- whole files ----


def test_a_whole_file_is_read_and_looked_through_once_for_all_models_that_need_the_same(make_npz, caplog):
    arrays = read(make_npz("testing", pre_logits=True, newer_names=True), "testing")
    expected = fake_npz.arrays(PLAIN, pre_logits=True)
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], x) for name, x in expected.items())
    assert not caplog.records
    assert npz.match(arrays, replace(PLAIN, gelu="tanh", dropout_rate=0.5)) is arrays  # of which no array depends

    assert_same(loaded(arrays, img_size=48, zero_head=True), loaded(expected, img_size=48, zero_head=True))
    assert arrays[POSITIONS].shape == (1, 5, 32)  # resizing them has left the file's alone
    with pytest.raises(UserError, match=r"head/kernel: expected \(32, 7\), found \(32, 10\)"):
        build(num_classes=7).load_from(arrays)
    with pytest.raises(UserError, match=r"encoderblock_2/.*not in the file.*it fits --model_type testing"):
        build(replace(PLAIN, num_layers=3), zero_head=True).load_from(arrays)


# ---- position embeddings ----


def test_position_embeddings_are_resized_bilinearly_with_corners_aligned():
    for old, new in [(14, 24), (24, 14), (7, 12), (12, 7), (2, 3), (3, 2), (37, 4), (1, 3), (5, 1)]:
        positions = fake_npz.values("pos_embedding", (1, 1 + old * old, 8))
        resized = npz.resize_positions(positions, new)
        assert resized.shape == (1, 1 + new * new, 8)
        assert resized.dtype == np.float32
        np.testing.assert_array_equal(resized[:, 0], positions[:, 0])  # the class token has no place in the grid

        grid = torch.from_numpy(positions[:, 1:].astype(np.float64).reshape(1, old, old, 8)).permute(0, 3, 1, 2)
        expected = F.interpolate(grid, (new, new), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
        np.testing.assert_allclose(resized[0, 1:], expected.reshape(new * new, 8), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(npz.resize_positions(positions, old), positions)


@BOTH
def test_a_checkpoint_of_another_size_differs_in_its_position_embeddings_only(config, caplog):
    weights = fake_npz.arrays(config, img_size=64)
    resized = npz.resize_positions(weights[POSITIONS], config.grid_size(96))
    assert resized.shape[1] != weights[POSITIONS].shape[1]
    expected = loaded({**weights, POSITIONS: resized}, config, img_size=96)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert_same(loaded(weights, config, img_size=96), expected)
    (record,) = caplog.records
    assert "position embeddings from a grid of" in record.message


# ---- the way back ----


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
    state = build().state_dict()
    halves = npz.from_state_dict(state, PLAIN, 32, dtype=np.float16)
    floats = npz.from_state_dict(state, PLAIN, 32)
    assert all(x.dtype == np.float16 for x in halves.values())
    assert all(np.array_equal(halves[name], x.astype(np.float16)) for name, x in floats.items())


def test_real_float16_weights_load(shared_data, caplog):
    arrays = read(str(shared_data / "ViT-S_14.npz"), "ViT-S_14")
    model = VisionTransformer(CONFIGS["ViT-S_14"], img_size=56, num_classes=10, zero_head=True)
    with caplog.at_level(logging.INFO):
        model.load_from(arrays)
    assert "from a grid of 37 x 37 to 4 x 4" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


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
    state = build().state_dict()
    change(state)
    with pytest.raises(UserError, match=message):
        npz.from_state_dict(state, PLAIN, 32)
