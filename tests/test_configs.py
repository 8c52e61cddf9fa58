"""models/configs.py: the architectures and their sizes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from models.configs import CONFIGS, GOOGLE_NAMES, canonical_name
from models.modeling import VisionTransformer
from models.published import PUBLISHED
from utils import args
from utils.errors import UserError


def count_parameters(model_type: str, img_size: int, num_classes: int) -> int:
    with torch.device("meta"):  # shapes without memory
        model = VisionTransformer(CONFIGS[model_type], img_size, num_classes)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "num_parameters"),
    [
        ("ViT-B_16", 86_567_656),
        ("ViT-B_32", 88_224_232),
        ("ViT-L_16", 304_326_632),
        ("ViT-L_32", 306_535_400),
        ("ViT-H_14", 632_045_800),
        ("R50-ViT-B_16", 98_659_112),
        ("ViT-Ti_16", 5_717_416),
        ("ViT-S_16", 22_050_664),
        ("ViT-S_32", 22_878_952),
        ("ViT-B_8", 86_576_872),
        ("R-ViT-Ti_16", 6_337_704),
        ("R26-ViT-S_32", 36_431_912),
        ("R26-ViT-B_32", 101_383_976),
        ("R50-ViT-L_32", 328_994_856),
    ],
)
def test_published_models_have_the_known_parameter_counts(model_type, num_parameters):
    assert count_parameters(model_type, img_size=224, num_classes=1000) == num_parameters


#: The papers' dimensions (arXiv 2010.11929, table 1; 2106.10270, table 2): patch, width, depth, MLP, residual units.
PAPERS = {
    "ViT-Ti_16": (16, 192, 12, 768, None),
    "ViT-S_16": (16, 384, 12, 1536, None),
    "ViT-S_32": (32, 384, 12, 1536, None),
    "ViT-B_8": (8, 768, 12, 3072, None),
    "ViT-B_16": (16, 768, 12, 3072, None),
    "ViT-B_32": (32, 768, 12, 3072, None),
    "ViT-L_16": (16, 1024, 24, 4096, None),
    "ViT-L_32": (32, 1024, 24, 4096, None),
    "ViT-H_14": (14, 1280, 32, 5120, None),
    "R-ViT-Ti_16": (32, 192, 12, 768, ()),  # 8 x 8 cells of a map of stride 4, whatever its name says
    "R26-ViT-S_32": (32, 384, 12, 1536, (2, 2, 2, 2)),
    "R26-ViT-B_32": (32, 768, 12, 3072, (2, 2, 2, 2)),
    "R50-ViT-B_16": (16, 768, 12, 3072, (3, 4, 9)),
    "R50-ViT-L_32": (32, 1024, 24, 4096, (3, 4, 6, 3)),
}


#: By the width: Dosovitskiy et al., table 1; Touvron et al., table 1.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def test_published_models_have_the_papers_dimensions_and_the_dropout_documented():
    dropped = {"ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16", "R50-ViT-L_32"}
    for model_type, (patch, width, depth, mlp, units) in PAPERS.items():
        c = CONFIGS[model_type]
        assert (c.stride, c.hidden_size, c.num_layers, c.mlp_dim, c.resnet_units) == (patch, width, depth, mlp, units)
        assert (c.num_heads, c.gelu) == (HEADS[width], "erf")
        assert c.dropout_rate == (0.1 if model_type in dropped else 0.0)


def test_small_model_has_the_shape_of_its_real_weights():
    config = CONFIGS["ViT-S_14"]
    assert (config.patch_size, config.hidden_size, config.mlp_dim) == (14, 384, 1536)
    assert (config.num_heads, config.num_layers, config.resnet_units) == (6, 12, None)
    assert config.grid_size(518) == 37
    assert count_parameters("ViT-S_14", img_size=518, num_classes=1000) == 22_431_976


def test_every_published_model_has_a_config():
    assert set(PUBLISHED) <= set(CONFIGS)
    assert set(GOOGLE_NAMES) <= set(CONFIGS)
    assert set(PUBLISHED) == set(PAPERS)


#: The models of Google's vit_jax/configs/models.py by its MODEL_CONFIGS' and, second, its AUGREG_CONFIGS' names;
#: all but testing, Mixer, LiT and those whose classifier is a mean over tokens ("-gap-norep").
GOOGLES = {
    "ViT-Ti_16": ("ViT-Ti_16", "Ti_16"),
    "ViT-S_16": ("ViT-S_16", "S_16"),
    "ViT-S_32": ("ViT-S_32", "S_32"),
    "ViT-B_8": ("ViT-B_8", "B_8"),
    "ViT-B_16": ("ViT-B_16", "B_16"),
    "ViT-B_32": ("ViT-B_32", "B_32"),
    "ViT-L_16": ("ViT-L_16", "L_16"),
    "ViT-L_32": ("ViT-L_32",),
    "ViT-H_14": ("ViT-H_14",),
    "R-ViT-Ti_16": ("R+ViT-Ti_16", "R_Ti_16"),
    "R26-ViT-S_32": ("R26+ViT-S_32", "R26_S_32"),
    "R26-ViT-B_32": ("R26+ViT-B_32", "R26_B_32"),
    "R50-ViT-B_16": ("R50+ViT-B_16",),
    "R50-ViT-L_32": ("R50+ViT-L_32", "R50_L_32"),
}


def test_googles_names_are_model_types_too():
    for model_type, google_names in GOOGLES.items():
        for google_name in google_names:
            assert CONFIGS[google_name] is CONFIGS[model_type]
            assert canonical_name(google_name) == model_type
            parsed = args.make_parser().parse_args(["--name", "x", "--model_type", google_name])
            assert CONFIGS[parsed.model_type] is CONFIGS[model_type]


def test_every_name_is_known_to_be_ours_or_googles():
    own = {"ViT-S_14", "ViT-demo", "testing", "testing-hybrid"}
    assert set(CONFIGS) == own | set(GOOGLES) | {name for names in GOOGLES.values() for name in names}


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        CONFIGS["testing"].dropout_rate = 0.5
    assert replace(CONFIGS["testing"], dropout_rate=0.5).dropout_rate == 0.5
    assert CONFIGS["testing"].dropout_rate == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"gelu": "relu"}, "gelu is 'relu', expected 'erf' or 'tanh'"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIGS["testing"], **changes)


@pytest.mark.parametrize(
    ("model_type", "stride"),
    [("ViT-B_16", 16), ("ViT-B_32", 32), ("ViT-H_14", 14), ("R50-ViT-B_16", 16), ("testing-hybrid", 8)],
)
def test_stride_is_the_pixels_of_a_token(model_type, stride):
    config = CONFIGS[model_type]
    assert config.stride == stride
    assert config.grid_size(3 * stride) == 3


@pytest.mark.parametrize(("img_size", "grid"), [(64, 8), (72, 9), (100, 13), (8, 1), (1, 1)])
def test_hybrid_grids_round_up_at_every_halving(img_size, grid):
    assert CONFIGS["testing-hybrid"].grid_size(img_size) == grid


def test_a_stem_of_the_root_alone_quarters_the_image():
    config = replace(CONFIGS["testing"], patch_size=2, resnet_units=())
    assert (config.stride, config.map_size(30), config.grid_size(30)) == (8, 8, 4)


@pytest.mark.parametrize(
    ("model_type", "img_size"),
    [("ViT-B_16", 224), ("ViT-B_32", 384), ("ViT-H_14", 518), ("R50-ViT-B_16", 224), ("R50-ViT-B_16", 225)],
)
def test_sizes_of_whole_patches_are_accepted(model_type, img_size):
    CONFIGS[model_type].check_img_size(img_size)


@pytest.mark.parametrize(
    ("model_type", "img_size", "below", "above"),
    [
        ("ViT-B_16", 230, 224, 240),
        ("ViT-B_32", 383, 352, 384),
        ("ViT-H_14", 384, 378, 392),
        ("ViT-B_16", 7, 16, 32),
        ("ViT-B_16", 0, 16, 32),
        ("R50-ViT-B_16", 0, 16, 32),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_good_ones(model_type, img_size, below, above):
    config = CONFIGS[model_type]
    with pytest.raises(UserError, match=rf"--img_size {img_size} .* {config.stride} .* {below} and {above}$"):
        config.check_img_size(img_size)
    config.check_img_size(below)
    config.check_img_size(above)


def test_configs_import_no_torch(repository: Path):
    code = "import sys, models.configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
