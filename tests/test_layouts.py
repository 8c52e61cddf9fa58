"""models/layouts.py: every layout of a model's weights gives Google's arrays back, bit for bit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models import layouts, npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import fake_npz
from utils.errors import UserError

PLAIN, HYBRID = "testing", "testing-hybrid"
TORCH_LAYOUTS = {"ours": layouts.OURS, "timm": layouts.TIMM, "hf": layouts.HF, "hf5": layouts.HF5}
#: timm has names for these hybrids; transformers has none.
CASES = [(PLAIN, name) for name in TORCH_LAYOUTS] + [(HYBRID, "ours"), (HYBRID, "timm"), ("R-ViT-Ti_16", "timm")]


def google(model_type, num_classes=10, img_size=None, **options):
    """A checkpoint in Google's layout, and the same as our state_dict."""
    config = CONFIGS[model_type]
    size = img_size or 3 * config.stride
    arrays = fake_npz.arrays(config, size, num_classes, **options)
    return arrays, npz.to_state_dict(arrays, config, size, num_classes)


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, x in expected.items():
        assert arrays[name].shape == x.shape, name
        np.testing.assert_array_equal(arrays[name], x)


def as_arrays(state):
    return {name: x.numpy() for name, x in state.items()}


@pytest.mark.parametrize(("model_type", "layout"), CASES)
def test_a_pytorch_layout_gives_googles_arrays_bit_for_bit(model_type, layout):
    arrays, state = google(model_type)
    theirs = as_arrays(layouts.from_ours(state, TORCH_LAYOUTS[layout]))
    assert layout == "ours" or theirs.keys() != state.keys()
    assert_same(layouts.to_google(theirs, CONFIGS[model_type]), arrays)


@pytest.mark.parametrize(
    ("model_type", "theirs"),
    [("ViT-Ti_16", "vit_tiny_patch16_224"), ("R-ViT-Ti_16", "vit_tiny_r_s16_p8_224")],
)
def test_what_timm_makes_of_googles_file_gives_it_back(tmp_path, model_type, theirs):
    timm = pytest.importorskip("timm", reason="needs timm (requirements-dev.txt)")
    arrays, _ = google(model_type, img_size=224)
    model = timm.create_model(theirs, num_classes=10)
    model.load_pretrained(fake_npz.save(tmp_path / "a.npz", arrays))  # timm's own reading of Google's layout
    assert_same(layouts.to_google(as_arrays(model.state_dict()), CONFIGS[model_type]), arrays)


def test_a_stem_that_was_scaled_for_timm_is_refused():
    from tools import _export_timm

    _, state = google("R-ViT-Ti_16")
    theirs = as_arrays(_export_timm.to_timm(state))
    with pytest.raises(UserError, match="its stem was scaled for timm by an export"):
        layouts.to_google(theirs, CONFIGS["R-ViT-Ti_16"])


@pytest.mark.parametrize("head", [True, False])
def test_what_transformers_saves_and_what_it_has_in_memory_give_googles_arrays(tmp_path, head):
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")
    from utils import weights

    c = CONFIGS[PLAIN]
    arrays, state = google(PLAIN, num_classes=5, img_size=32)
    settings = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=c.hidden_size, intermediate_size=c.mlp_dim,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(settings)
    model.load_state_dict(layouts.from_ours(state, layouts.HF5))
    if not head:
        arrays = {name: x for name, x in arrays.items() if not name.startswith("head/")}
        base = transformers.ViTModel(settings)  # names without vit., and a pooler
        base.load_state_dict(model.vit.state_dict(), strict=False)
        model = base
    assert_same(layouts.to_google(as_arrays(model.state_dict()), c), arrays)
    model.save_pretrained(tmp_path)
    assert_same(layouts.to_google(weights.read(str(tmp_path)).arrays, c), arrays)


def test_a_head_may_be_missing():
    arrays, state = google(PLAIN)
    expected = {name: x for name, x in arrays.items() if not name.startswith("head/")}
    for layout in TORCH_LAYOUTS.values():
        theirs = as_arrays(layouts.from_ours(state, layout))
        headless = {name: x for name, x in theirs.items() if not name.startswith(layout.head)}
        assert_same(layouts.to_google(headless, CONFIGS[PLAIN]), expected)


def test_timms_pre_logits_come_along_and_transformers_pooler_does_not():
    arrays, state = google(PLAIN, pre_logits=True)
    kernel, bias = arrays["pre_logits/kernel"], arrays["pre_logits/bias"]
    timm = as_arrays(layouts.from_ours(state, layouts.TIMM)) | {
        "pre_logits.fc.weight": kernel.T,
        "pre_logits.fc.bias": bias,
    }
    assert_same(layouts.to_google(timm, CONFIGS[PLAIN]), arrays)
    del timm["pre_logits.fc.bias"]  # half of it is none
    assert not any(name.startswith("pre_logits") for name in layouts.to_google(timm, CONFIGS[PLAIN]))
    hf = as_arrays(layouts.from_ours(state, layouts.HF)) | {
        "vit.pooler.dense.weight": kernel.T,
        "vit.pooler.dense.bias": bias,
    }
    rest = {name: x for name, x in arrays.items() if not name.startswith("pre_logits")}
    assert_same(layouts.to_google(hf, CONFIGS[PLAIN]), rest)


def test_whole_numbers_are_named_as_the_file_does():
    _, state = google(PLAIN)
    for layout in TORCH_LAYOUTS.values():
        theirs = as_arrays(layouts.from_ours(state, layout))
        name = next(name for name in theirs if name.endswith("cls_token"))
        theirs[name] = theirs[name].astype(np.int32)
        with pytest.raises(UserError, match=f"^{re.escape(name)}: expected floating-point numbers, found int32"):
            layouts.to_google(theirs, CONFIGS[PLAIN])


def test_a_part_without_a_place_is_named():
    _, state = google(PLAIN)
    extras = {
        "timm": ["blocks.0.ls1.gamma", "dist_token", "reg_token", "norm_pre.weight", "fc_norm.weight",
                 "blocks.1.attn.q_norm.weight", "head_dist.weight"],
        "hf": ["vit.embeddings.mask_token", "vit.encoder.layer.0.layer_scale1.lambda1"],
        "ours": ["transformer.encoder.extra"],
    }  # fmt: skip
    for layout, names in extras.items():
        theirs = as_arrays(layouts.from_ours(state, TORCH_LAYOUTS[layout]))
        for extra in names:
            with pytest.raises(UserError, match=f"^{re.escape(extra)}: not in this model$"):
                layouts.to_google({**theirs, extra: np.zeros(32, np.float32)}, CONFIGS[PLAIN])


@pytest.mark.parametrize("layout", ["timm", "hf", "ours"])
def test_another_models_weights_are_named_as_the_file_does_with_the_model_that_they_fit(layout):
    _, state = google(PLAIN)
    theirs = as_arrays(layouts.from_ours(state, TORCH_LAYOUTS[layout]))
    with pytest.raises(UserError, match="it fits --model_type testing") as e:
        layouts.to_google(theirs, CONFIGS["ViT-demo"])
    named = re.findall(r"(\S+): expected \(", str(e.value))
    assert named
    assert all(layout == "ours" or not name.startswith("transformer.") for name in named)
    assert layouts.model_of(theirs) == PLAIN


def test_a_missing_third_of_timms_joined_matrix_is_a_wrong_shape():
    _, state = google(PLAIN)
    theirs = as_arrays(layouts.from_ours(state, layouts.TIMM))
    theirs["blocks.0.attn.qkv.weight"] = theirs["blocks.0.attn.qkv.weight"][:64]
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.weight: expected \(96, 32\), found \(64, 32\)"):
        layouts.to_google(theirs, CONFIGS[PLAIN])


@pytest.mark.parametrize(
    "names", [["conv1.weight", "fc.bias"], ["class_token", "encoder.layers.encoder_layer_0.ln_1.weight"]]
)
def test_names_of_no_layout_are_said(names):
    with pytest.raises(UserError, match=f"{names[0]}.*none of Google's, timm's"):
        layouts.to_google({name: np.zeros(3, np.float32) for name in names}, CONFIGS[PLAIN])
    assert layouts.model_of({name: np.zeros(3, np.float32) for name in names}) is None


# ---- big_vision's ----


def big_vision(arrays, prefix="params/", scan=False, pool="tok"):
    """The same model as big_vision stores it: positions without the class token's, blocks perhaps stacked."""
    newer = {}
    for name, x in arrays.items():
        for old, new in fake_npz.NEWER_NAMES.items():
            name = name.replace(old, new)
        newer[name] = x
    newer["pos_embedding"] = newer.pop(npz.POSITIONS)[:, 1:]
    if pool != "tok":
        del newer["cls"]
    if pool == "map":
        newer["MAPHead_0/probe"] = np.zeros((1, 1, 32), np.float32)
    if scan:
        for name in [name for name in newer if "encoderblock_0/" in name]:
            stack = np.stack([newer.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(CONFIGS[PLAIN].num_layers)])
            newer[name.replace("encoderblock_0", "encoderblock")] = stack
    return {prefix + name: x for name, x in newer.items()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/", "params/img/"])
def test_big_visions_class_token_models_convert_exactly(scan, prefix):
    arrays, _ = google(PLAIN)
    arrays[npz.POSITIONS][:, 0] = 0  # which has no position there
    momentum = {f"opt/0/mu/{name}": x + 1 for name, x in big_vision(arrays, "", scan).items()}
    theirs = momentum | big_vision(arrays, prefix, scan)
    converted = layouts.to_google(theirs, CONFIGS[PLAIN])
    matched = npz.match(converted, CONFIGS[PLAIN], num_classes=10)
    assert_same(dict(matched), arrays)
    assert layouts.model_of(theirs) == PLAIN
    model = VisionTransformer(CONFIGS[PLAIN], 48, 10)
    model.load_from(converted)


@pytest.mark.parametrize(("pool", "words"), [("gap", r"pool_type=gap"), ("map", r"pool_type=map")])
def test_big_visions_other_poolings_are_refused_by_name(pool, words):
    arrays, _ = google(PLAIN)
    with pytest.raises(UserError, match=f"big_vision .*{words}"):
        layouts.to_google(big_vision(arrays, pool=pool), CONFIGS[PLAIN])


def test_big_visions_computed_positions_are_refused_by_name():
    arrays, _ = google(PLAIN)
    theirs = {name: x for name, x in big_vision(arrays).items() if "pos_embedding" not in name}
    with pytest.raises(UserError, match=r"big_vision .*posemb=sincos2d"):
        layouts.to_google(theirs, CONFIGS[PLAIN])


@pytest.mark.soak
@pytest.mark.parametrize("model_type", ["ViT-H_14", "ViT-L_16", "ViT-L_32", "R50-ViT-L_32", "R50-ViT-B_16"])
def test_large_models_of_timm_and_transformers_convert_bit_for_bit(model_type):
    config = CONFIGS[model_type]
    arrays, state = google(model_type, num_classes=10, img_size=7 * config.stride)
    for layout in (layouts.TIMM,) if config.resnet_units else (layouts.TIMM, layouts.HF, layouts.HF5):
        theirs = as_arrays(layouts.from_ours(state, layout))
        converted = layouts.to_google(theirs, config)
        assert converted.keys() == arrays.keys()
        assert all(np.array_equal(converted[name], x) for name, x in arrays.items())
