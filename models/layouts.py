"""Other programs' layouts of a Vision Transformer's weights, and the way from each to Google's.

Everything that is not Google's is converted to Google's names at the door, so that the rest of the program knows one
pretrained format.  PyTorch's layouts all store the same tensors under other names (timm joins queries, keys and
values), so each is a table of names beside this project's own.  big_vision's files are Flax's, as Google's are.

Sources: timm (``models/vision_transformer.py``, ``models/resnetv2.py``), transformers 4 and 5 (``models/vit``),
github.com/google-research/big_vision (``models/vit.py``).  This module must not read files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import npz
from models.configs import CONFIGS, ViTConfig
from utils.errors import UserError

#: Patterns of this project's names and what they become, tried in turn on a whole name.
Names = tuple[tuple[str, str], ...]

_BLOCK, _STEM = r"transformer\.encoder\.layer\.(\d+)\.", r"transformer\.embeddings\.hybrid_model\."
_TIMM_NAMES: Names = (
    (_STEM + r"root\.conv\.", "patch_embed.backbone.stem.conv."),
    (_STEM + r"root\.gn\.", "patch_embed.backbone.stem.norm."),
    (r"transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"transformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"transformer\.embeddings\.cls_token", "cls_token"),
    (_BLOCK + r"attention_norm\.", r"blocks.\1.norm1."),
    (_BLOCK + r"ffn_norm\.", r"blocks.\1.norm2."),
    (_BLOCK + r"ffn\.", r"blocks.\1.mlp."),
    (_BLOCK + r"attn\.out\.", r"blocks.\1.attn.proj."),
    (_BLOCK + r"attn\.(?:query|key|value)\.", r"blocks.\1.attn.qkv."),
    (r"transformer\.encoder\.encoder_norm\.", "norm."),
)
_HF_ENDS: Names = (
    (r"transformer\.embeddings\.patch_embeddings\.", "vit.embeddings.patch_embeddings.projection."),
    (r"transformer\.embeddings\.", "vit.embeddings."),
    (r"transformer\.encoder\.encoder_norm\.", "vit.layernorm."),
    (r"head\.", "classifier."),
)
#: What the hub's files have, and what ``save_pretrained`` of transformers 4 and 5 writes.
_HF_NAMES: Names = (
    (_BLOCK + r"attention_norm\.", r"vit.encoder.layer.\1.layernorm_before."),
    (_BLOCK + r"ffn_norm\.", r"vit.encoder.layer.\1.layernorm_after."),
    (_BLOCK + r"ffn\.fc1\.", r"vit.encoder.layer.\1.intermediate.dense."),
    (_BLOCK + r"ffn\.fc2\.", r"vit.encoder.layer.\1.output.dense."),
    (_BLOCK + r"attn\.out\.", r"vit.encoder.layer.\1.attention.output.dense."),
    (_BLOCK + r"attn\.", r"vit.encoder.layer.\1.attention.attention."),
    *_HF_ENDS,
)
#: What transformers 5 calls its weights in ``state_dict()``, as this project's exports once did.
_HF5_NAMES: Names = (
    (_BLOCK + r"attention_norm\.", r"vit.layers.\1.layernorm_before."),
    (_BLOCK + r"ffn_norm\.", r"vit.layers.\1.layernorm_after."),
    (_BLOCK + r"ffn\.", r"vit.layers.\1.mlp."),
    (_BLOCK + r"attn\.(.)\w*\.", r"vit.layers.\1.attention.\2_proj."),
    *_HF_ENDS,
)
_UNIT = re.compile(_STEM + r"body\.block(\d+)\.unit(\d+)\.")
_UNIT_PARTS = {"conv": "conv", "gn": "norm", "downsample.": "downsample.conv.", "gn_proj.": "downsample.norm."}


class Layout(NamedTuple):
    """A program's names of a model's tensors, whose shapes are this project's.

    Attributes:
        names: its names beside this project's; what no pattern matches is called as here.
        marker: begins names that only this layout has.
        prefix: begins the names of a model with a head; a model without one may lack it.
        head: begins the names of the head.
        unused: what this project's models do without, as a pattern of whole names.
    """

    names: Names
    marker: str
    prefix: str = ""
    head: str = "head."
    unused: str = "$."

    def name(self, ours: str, has_stages: bool = True) -> str:
        """The layout's name of what this project calls ``ours``.

        Args:
            ours: a name of the state_dict.
            has_stages: False for a hybrid whose stem is only the root, for which timm has no name.
        """
        unit = _UNIT.match(ours)
        if unit and self is TIMM:
            rest = ours[unit.end() :]
            part = max((part for part in _UNIT_PARTS if rest.startswith(part)), key=len)
            stage, block = int(unit[1]) - 1, int(unit[2]) - 1
            return f"patch_embed.backbone.stages.{stage}.blocks.{block}.{_UNIT_PARTS[part]}{rest[len(part) :]}"
        for pattern, theirs in self.names:
            if re.match(pattern, ours):
                ours = re.sub(pattern, theirs, ours)
                break
        return ours if has_stages else ours.replace("backbone.stem.", "backbone.")

    def short(self, name: str) -> str:
        """A name of this layout without what a model without a head lacks."""
        return name.removeprefix(self.prefix)

    def entries(self, config: ViTConfig, num_classes: int | None = None) -> dict[str, list[npz.WeightSpec]]:
        """A model's arrays by the layout's short names: several for one name where they are joined there."""
        by_name: dict[str, list[npz.WeightSpec]] = {}
        for entry in npz.layout(config, config.stride, num_classes):
            name = self.short(self.name(entry.ours, config.resnet_units != ()))
            by_name.setdefault(name, []).append(entry)
        return by_name


_POOLER = r"pooler\.dense\.(weight|bias)"
OURS = Layout((), "transformer.")
TIMM = Layout(_TIMM_NAMES, "blocks.", unused=r"pre_logits\.fc\.(weight|bias)")
HF = Layout(_HF_NAMES, "encoder.layer.", "vit.", "classifier.", _POOLER)
HF5 = Layout(_HF5_NAMES, "layers.", "vit.", "classifier.", _POOLER)
LAYOUTS = (OURS, TIMM, HF, HF5)


def from_ours(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Renames a state_dict of this project's; queries, keys and values are joined where the layout joins them."""
    has_stages = any(_UNIT.match(name) for name in state)
    pieces: dict[str, list[Tensor]] = {}
    for name, x in state.items():
        pieces.setdefault(layout.name(name, has_stages), []).append(x)
    return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in pieces.items()}


# ---- to Google's ----


def to_google(arrays: Mapping[str, np.ndarray], config: ViTConfig) -> dict[str, np.ndarray]:
    """Converts a model's arrays from any layout to Google's names and shapes, exactly.

    Args:
        arrays: numbers by the names of the file they come from; they are not copied.
        config: the architecture.

    Returns:
        Arrays by Google's names, with a head and pre_logits where there are any.  What has Google's names already
        is returned as it is, for ``npz.match`` to check.

    Raises:
        UserError: they are another model's, or have parts that this project's models have no place for.
    """
    if _is_flax(arrays):
        return _from_flax(arrays)
    layout = _detect(arrays)
    files = {layout.short(name): name for name in arrays}
    entries = layout.entries(config, _num_classes(arrays, layout))
    unused = [name for name in files if re.fullmatch(layout.unused, name) or name.startswith(layout.head)]
    wrong = [f"{files[name]}: not in this model" for name in files if name not in entries and name not in unused]
    wrong += [
        fault
        for name, parts in entries.items()
        if (fault := _fault(files.get(name, name), parts, arrays.get(files.get(name, name))))
    ]
    if wrong:
        raise UserError(f"{npz.first_faults(wrong)}{_hint(arrays, layout, config)}")
    if layout is TIMM and _is_scaled(arrays):
        raise UserError("its stem was scaled for timm by an export of this project; give the model that was exported")
    converted: dict[str, np.ndarray] = {}
    for name, parts in entries.items():
        thirds = np.split(arrays[files[name]], len(parts))
        converted |= {entry.google: entry.from_ours(x) for entry, x in zip(parts, thirds)}
    if layout is TIMM and {"pre_logits.fc.weight", "pre_logits.fc.bias"} <= arrays.keys():
        converted["pre_logits/kernel"] = arrays["pre_logits.fc.weight"].T
        converted["pre_logits/bias"] = arrays["pre_logits.fc.bias"]
    return converted


def _detect(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Finds the layout whose names the arrays have.

    Raises:
        UserError: it is none that is known.
    """
    for layout in LAYOUTS:
        if any(layout.short(name).startswith(layout.marker) for name in arrays):
            return layout
    names = ", ".join(list(arrays)[:3])
    raise UserError(
        f"its names ({names}, ...) are none of Google's, timm's, transformers' or this project's Vision Transformers"
    )


def _is_scaled(arrays: Mapping[str, np.ndarray]) -> bool:
    """Tells if an export of this project scaled a stem's kernels for timm: each of their channels has the mean 0.

    No trained kernel has, to a millionth: nothing in Google's arithmetic depends on the mean, so only a weight decay
    moves it from its first value.
    """
    kernels = [x for name, x in arrays.items() if name.startswith("patch_embed.backbone.") and x.ndim == 4]
    means = [(x.mean((1, 2, 3), np.float64), x.std((1, 2, 3), np.float64)) for x in kernels]
    return bool(means) and all((np.abs(mean) <= 1e-6 * std).all() for mean, std in means)


def _num_classes(arrays: Mapping[str, np.ndarray], layout: Layout) -> int | None:
    """Outputs of the head in a file; None without one."""
    bias = arrays.get(f"{layout.head}bias")
    return None if bias is None or bias.ndim != 1 else len(bias)


def _fault(name: str, parts: list[npz.WeightSpec], array: np.ndarray | None) -> str | None:
    """Says what is wrong with the array that a file has under a name, if anything."""
    entry = parts[0]
    expected = str((len(parts) * entry.ours_shape[0], *entry.ours_shape[1:]))
    if entry.google == npz.POSITIONS:
        expected = f"(1, 1 + n * n, {entry.ours_shape[2]})"
    if array is None:
        return f"{name}: expected {expected}, not in the file"
    if not np.issubdtype(array.dtype, np.floating):
        return f"{name}: expected floating-point numbers, found {array.dtype}"
    fits = npz.fits(entry, array.shape) if entry.google == npz.POSITIONS else str(array.shape) == expected
    return None if fits else f"{name}: expected {expected}, found {array.shape}"


def _hint(arrays: Mapping[str, np.ndarray], layout: Layout, config: ViTConfig) -> str:
    """Names the model whose arrays a file has, if that is a known one and not this one."""
    if _is_of(arrays, layout, config):
        return ""
    other = _model_of(arrays, layout)
    return "" if other is None else f"; it fits --model_type {other}"


def _is_of(arrays: Mapping[str, np.ndarray], layout: Layout, config: ViTConfig) -> bool:
    files = {layout.short(name): array for name, array in arrays.items()}
    return not any(_fault(name, parts, files.get(name)) for name, parts in layout.entries(config).items())


def _model_of(arrays: Mapping[str, np.ndarray], layout: Layout) -> str | None:
    return next((name for name, config in CONFIGS.items() if _is_of(arrays, layout, config)), None)


def model_of(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The ``--model_type`` whose arrays these are, of any layout; None if it is none that is known."""
    try:
        if not _is_flax(arrays):
            return _model_of(arrays, _detect(arrays))
        arrays = _from_flax(arrays)
    except UserError:
        return None
    return npz.model_of(arrays)


# ---- big_vision's ----


def _is_flax(arrays: Mapping[str, np.ndarray]) -> bool:
    return not arrays or any(name.endswith(("/kernel", "/scale")) for name in arrays)


_SCANNED = "Transformer/encoderblock/"


def _from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts big_vision's arrays to Google's names; returns those of other Flax files as they are.

    big_vision adds the position embeddings before the class token is put in front of the patches, so its class token
    has none, which is the same as zeros.  Its blocks may be stacked along the first axis (``scan=True``).

    Raises:
        UserError: the model pools its tokens in another way than by a class token.
    """
    if any("/MAPHead_" in f"/{name}" for name in arrays):
        raise UserError("it is a model of big_vision with a pooling head (pool_type=map), which has no class token")
    own = [name.removesuffix("pos_embedding") for name in arrays
           if re.search(r"(^|/)pos_embedding$", name) and not re.search(r"posembed_input|^(opt|opt_state|state)/", name)
           ]  # fmt: skip
    prefix = next((prefix for prefix in own if f"{prefix}embedding/kernel" in arrays), None)
    if prefix is None:
        if any("/MlpBlock_0/" in name for name in arrays) and not any("pos_embed" in name for name in arrays):
            raise UserError("it is a model of big_vision whose position embeddings are computed (posemb=sincos2d), "
                             "which no model here does")  # fmt: skip
        return dict(arrays)
    converted = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    if "cls" not in converted:
        raise UserError("it is a model of big_vision that averages its tokens (pool_type=gap), without a class token")
    positions = converted.pop("pos_embedding")  # (1, n * n, D)
    if positions.ndim == 3:
        converted[npz.POSITIONS] = np.concatenate((np.zeros_like(positions[:, :1]), positions), axis=1)
    for name in [name for name in converted if name.startswith(_SCANNED)]:
        stacked, rest = converted.pop(name), name.removeprefix(_SCANNED)
        converted |= {f"Transformer/encoderblock_{i}/{rest}": x for i, x in enumerate(stacked)}
    return converted
