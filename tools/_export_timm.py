"""Writes a folder for timm, which ``timm.create_model("local-dir:...", pretrained=True)`` takes from version 1.0.16 on.

Source: timm (``models/_hub.py``, ``models/vision_transformer_hybrid.py``, ``models/resnetv2.py``).

Its hybrids compute two things otherwise than Google's, and no configuration changes it: they add 1e-8 to a
kernel's variance, not 1e-5 to its deviation, and 1e-5 in group norms, not 1e-6.  The weights are scaled such that the
answers are Google's all the same, and say so under the key ``STEM``: they are no longer those of the other formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import layouts
from models.configs import ViTConfig, canonical_name
from tools import _export_folder as folders
from tools import _finetuned
from utils.errors import UserError

#: Key and value in config.json and in the metadata of model.safetensors, of hybrids only.
STEM, SCALED = "stem", "scaled for timm"

GROUP_NORM_EPS, TIMM_GROUP_NORM_EPS = 1e-6, 1e-5
STANDARDISE_EPS = 1e-5  # added to the deviation, in models/modeling_resnet.py
TIMM_STANDARDISE_EPS = 1e-8  # added to the variance, in timm's hybrids

#: timm's plain models of a shape; the first stands for the others, whose shape is in the arguments.
_PLAIN = {
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-B_32": "vit_base_patch32_224",
    "ViT-B_8": "vit_base_patch8_224",
    "ViT-L_16": "vit_large_patch16_224",
    "ViT-L_32": "vit_large_patch32_224",
    "ViT-H_14": "vit_huge_patch14_224",
    "ViT-Ti_16": "vit_tiny_patch16_224",
    "ViT-S_16": "vit_small_patch16_224",
    "ViT-S_32": "vit_small_patch32_224",
}
#: timm's hybrids by the units of their stems; the width and the rest are in the arguments.
_HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def write(loaded: _finetuned.Finetuned, path: str) -> str:
    """Writes the folder; returns the lines that use it.

    Raises:
        UserError: timm has no such model.
        OSError: it could not be written.
    """
    config = model_config(loaded)
    metadata = {key: config[key] for key in (STEM,) if key in config}
    with folders.new_folder(path) as folder:
        folders.write_weights(folder, to_timm(loaded.model.state_dict()), metadata)
        folders.write_json(folder, folders.CONFIG, config)
    root = "" if loaded.model.config.resnet_units is None else (
        f"model.get_submodule({_in_backbone(loaded.model.config, 'norm')!r}).eps = {GROUP_NORM_EPS}  "
        "# timm's 1e-5 is felt where an image is almost one grey\n"
    )  # fmt: skip
    label = "index" if loaded.classes is None else 'model.pretrained_cfg["label_names"][index]'
    return (
        "import timm  # 1.0.16 or newer\n"
        "import torch\n"
        "from PIL import Image, ImageOps\n"
        f"model = timm.create_model({'local-dir:' + path!r}, pretrained=True).eval()  # random without pretrained\n"
        f"{root}"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"{folders.OPEN_IMAGE}"
        "with torch.no_grad():\n"
        "    logits = model(transform(image)[None])\n"
        "index = int(logits.argmax())\n"
        f"print({label})"
    )


def model_config(loaded: _finetuned.Finetuned) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        UserError: timm has no such model.
    """
    model, config = loaded.model, loaded.model.config
    names = {} if loaded.classes is None else {"label_names": loaded.classes}
    return {
        "architecture": architecture(loaded.model_type, config),
        "num_classes": model.num_classes,
        "num_features": config.hidden_size,
        "global_pool": "token",
        **names,
        **({} if config.resnet_units is None else {STEM: SCALED}),
        "model_args": model_args(config, model.img_size),
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, model.img_size, model.img_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # the training did not keep the aspect either
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "first_conv": "patch_embed.proj" if config.resnet_units is None else _in_backbone(config, "conv"),
            "classifier": "head",
        },
    }


def _in_backbone(config: ViTConfig, name: str) -> str:
    """Returns timm's name of a layer of a hybrid's root."""
    return f"patch_embed.backbone.{'stem.' if config.resnet_units else ''}{name}"


def architecture(model_type: str, config: ViTConfig) -> str:
    """Returns timm's name of a model that ``model_args`` makes this one.

    Raises:
        UserError: there is none.
    """
    if config.resnet_units is None:
        return _PLAIN.get(canonical_name(model_type), next(iter(_PLAIN.values())))
    if config.resnet_units not in _HYBRIDS:
        raise UserError(f"--format timm: timm has no hybrid of the shape of {model_type}")
    return _HYBRIDS[config.resnet_units]


def model_args(config: ViTConfig, img_size: int) -> dict[str, Any]:
    """Returns the arguments of timm's VisionTransformer."""
    return {
        "img_size": img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_dim / config.hidden_size,
        "act_layer": "gelu" if config.gelu == "erf" else "gelu_tanh",
    }


# ---- weights ----


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state_dict to timm's; queries, keys and values are one matrix there."""
    return layouts.from_ours({**state, **_scaled_stem(state)}, layouts.TIMM)


def _scaled_stem(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a hybrid that timm needs in another scale; none of a plain model.

    With f^2 the ratio of the group norms' epsilons, f * x has under timm's the norm that x has under Google's.  So
    every norm's output is f times as large, and with it every later convolution's; the patches' kernel undoes it.
    Only the root's norm keeps timm's epsilon, for its input comes of the image: without the printed line, logits of
    images that are almost one grey (8 levels of contrast) differed by up to 0.02, others by 2e-5 (random weights).
    """
    factor = (TIMM_GROUP_NORM_EPS / GROUP_NORM_EPS) ** 0.5
    stem = {name: x for name, x in state.items() if ".hybrid_model." in name}
    if not stem:
        return {}
    patches = "transformer.embeddings.patch_embeddings.weight"
    scaled = {name: for_timms_standardisation(x) if x.ndim == 4 else x * factor for name, x in stem.items()}
    return {**scaled, patches: state[patches] / factor}


def for_timms_standardisation(kernel: Tensor) -> Tensor:
    """Returns the kernel (O, I, H, W) of which timm's standardisation makes what Google's makes of the given one.

    Google divides by s + 1e-5, where s is the deviation of an output channel; timm by sqrt(v + 1e-8).
    Scaling a channel to the deviation d gives d / sqrt(d * d + 1e-8) there, and the d for which that is
    s / (s + 1e-5) is computed here.
    """
    s, mean = torch.std_mean(kernel.double(), dim=(1, 2, 3), keepdim=True, correction=0)
    # With r = s / (s + e), d = r * sqrt(eps / (1 - r * r)); 1 - r * r = (2 * s * e + e * e) / (s + e)^2.
    e = STANDARDISE_EPS
    scale = TIMM_STANDARDISE_EPS**0.5 / (2 * s * e + e * e) ** 0.5  # d / s
    return ((kernel - mean) * scale).to(kernel.dtype)
