"""Google's .npz checkpoints: their names and shapes, and the way to and from our state_dict.

Source: the published files (storage.googleapis.com/vit_models) and
github.com/google-research/vision_transformer, ``vit_jax/checkpoint.py``.

Kernels are stored (in, out), convolutions HWIO, and attention projections with a separate head axis.
This module must not know data sets, devices or training, nor read files (utils/weights.py does).
It is longer than other files because it is the one place that knows Google's names, in both of their
spellings, and ours beside them: a table, its two directions and its errors are read together.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.configs import CONFIGS, ViTConfig
from utils.errors import UserError

logger = logging.getLogger(__name__)

#: How newer Flax versions number a block's layers, and how the historical ones did.
_NEW_NUMBERING = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_OLD_NUMBERING = {old: new for new, old in _NEW_NUMBERING.items()}
#: Where files keep their weights, and what else is in a train state.
_PREFIXES = ("", "opt/target/", "opt/target/params/", "params/", "target/")
_OPTIMIZER_STATE = ("opt/state/", "opt_state/", "state/")
FLOAT32_MAX = float(np.finfo(np.float32).max)
POSITIONS = "Transformer/posembed_input/pos_embedding"
_PRE_LOGITS = ("pre_logits/kernel", "pre_logits/bias")


class WeightSpec(NamedTuple):
    """One array of a checkpoint.

    Attributes:
        google: its name in the .npz.
        ours: its name in the state_dict.
        shape: its shape in the .npz.
        axes: the order of the .npz's axes in our tensor, before they are flattened to its shape.
        ours_shape: its shape in the state_dict.
    """

    google: str
    ours: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    ours_shape: tuple[int, ...]

    def to_tensor(self, array: np.ndarray) -> Tensor:
        """The .npz's array as our float32 tensor, which shares no memory with it."""
        if not array.dtype.isnative or array.dtype.itemsize > 8:  # torch has no type for it
            array = array.astype(np.float32)
        array = array.reshape(self.shape)
        if min(array.strides, default=0) < 0:  # nor has it strides like these
            array = array.copy()
        x = torch.from_numpy(np.require(array, requirements="W")).float()
        if len(self.ours_shape) == 2:  # a transposition, which torch does several times faster than numpy
            x = x.reshape(self.ours_shape[::-1]).t()
        else:
            x = x.permute(self.axes).reshape(self.ours_shape)
        return torch.empty(self.ours_shape).copy_(x)

    def to_array(self, tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
        """Our tensor as the .npz's array."""
        x = self.from_ours(tensor.detach().cpu().float().numpy())
        return np.array(x, dtype=dtype, order="C")  # a copy: training must not change it

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        """An array of our tensor's shape as one of the .npz's, which shares its memory."""
        if self.google == POSITIONS:  # of any grid
            return array
        return array.reshape([self.shape[axis] for axis in self.axes]).transpose(np.argsort(self.axes))


def _entry(google: str, ours: str, shape: tuple[int, ...]) -> WeightSpec:
    """An array whose axes follow from its rank and name."""
    leaf = google.rsplit("/", 2)[-2:]
    if len(shape) == 4 and leaf[-1] == "kernel":  # HWIO -> OIHW
        return WeightSpec(google, ours, shape, (3, 2, 0, 1), tuple(shape[i] for i in (3, 2, 0, 1)))
    if len(shape) == 3 and leaf[-1] == "kernel":
        if leaf[0] == "out":  # (A, K, D) -> (D, A * K)
            return WeightSpec(google, ours, shape, (2, 0, 1), (shape[2], shape[0] * shape[1]))
        return WeightSpec(google, ours, shape, (1, 2, 0), (shape[1] * shape[2], shape[0]))  # (D, A, K) -> (A * K, D)
    if len(shape) == 2 and leaf[-1] == "kernel":  # (in, out) -> (out, in)
        return WeightSpec(google, ours, shape, (1, 0), shape[::-1])
    if len(shape) == 2:  # a projection's bias: (A, K) -> (A * K,)
        return WeightSpec(google, ours, shape, (0, 1), (shape[0] * shape[1],))
    return WeightSpec(google, ours, shape, tuple(range(len(shape))), shape)


def layout(config: ViTConfig, img_size: int, num_classes: int | None = None) -> Iterator[WeightSpec]:
    """Yields every array of a checkpoint of this model.

    Args:
        config: the architecture.
        img_size: side of the images in pixels, which fixes the number of position embeddings.
        num_classes: outputs of the head, or None to leave the head out.
    """
    d, heads, embeddings = config.hidden_size, config.num_heads, "transformer.embeddings."
    channels = 3
    if config.resnet_units is not None:
        channels = yield from _stem_layout(config.resnet_units, embeddings + "hybrid_model.")
    p = config.patch_size
    yield _entry("embedding/kernel", embeddings + "patch_embeddings.weight", (p, p, channels, d))
    yield _entry("embedding/bias", embeddings + "patch_embeddings.bias", (d,))
    yield _entry("cls", embeddings + "cls_token", (1, 1, d))
    yield _entry(POSITIONS, embeddings + "position_embeddings", (1, 1 + config.grid_size(img_size) ** 2, d))
    for i in range(config.num_layers):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"transformer.encoder.layer.{i}."
        for number, name in ((0, "attention_norm"), (2, "ffn_norm")):
            yield _entry(f"{theirs}LayerNorm_{number}/scale", f"{ours}{name}.weight", (d,))
            yield _entry(f"{theirs}LayerNorm_{number}/bias", f"{ours}{name}.bias", (d,))
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            yield _entry(f"{attention}{name}/kernel", f"{ours}attn.{name}.weight", (d, heads, d // heads))
            yield _entry(f"{attention}{name}/bias", f"{ours}attn.{name}.bias", (heads, d // heads))
        yield _entry(f"{attention}out/kernel", f"{ours}attn.out.weight", (heads, d // heads, d))
        yield _entry(f"{attention}out/bias", f"{ours}attn.out.bias", (d,))
        for j, (fan_in, fan_out) in enumerate(((d, config.mlp_dim), (config.mlp_dim, d))):
            yield _entry(f"{theirs}MlpBlock_3/Dense_{j}/kernel", f"{ours}ffn.fc{j + 1}.weight", (fan_in, fan_out))
            yield _entry(f"{theirs}MlpBlock_3/Dense_{j}/bias", f"{ours}ffn.fc{j + 1}.bias", (fan_out,))
    yield _entry("Transformer/encoder_norm/scale", "transformer.encoder.encoder_norm.weight", (d,))
    yield _entry("Transformer/encoder_norm/bias", "transformer.encoder.encoder_norm.bias", (d,))
    if num_classes is not None:
        yield _entry("head/kernel", "head.weight", (d, num_classes))
        yield _entry("head/bias", "head.bias", (num_classes,))


def _norm_layout(google: str, ours: str, channels: int) -> Iterator[WeightSpec]:
    # Historical files keep the broadcast axes of pre-Linen Flax; newer ones are accepted too.
    for theirs, name in (("scale", "weight"), ("bias", "bias")):
        yield WeightSpec(f"{google}/{theirs}", f"{ours}.{name}", (1, 1, 1, channels), (0, 1, 2, 3), (channels,))


def _stem_layout(units: tuple[int, ...], prefix: str) -> Generator[WeightSpec, None, int]:
    """Yields the arrays of a hybrid's stem; returns the channels of its feature map."""
    channels = 64
    yield _entry("conv_root/kernel", prefix + "root.conv.weight", (7, 7, 3, channels))
    yield from _norm_layout("gn_root", prefix + "root.gn", channels)
    for stage, num_units in enumerate(units):
        width = 64 * 2**stage
        for unit in range(num_units):
            theirs, ours = f"block{stage + 1}/unit{unit + 1}/", f"{prefix}body.block{stage + 1}.unit{unit + 1}."
            if unit == 0:  # always a change of width or of stride
                yield _entry(theirs + "conv_proj/kernel", ours + "downsample.weight", (1, 1, channels, 4 * width))
                yield from _norm_layout(theirs + "gn_proj", ours + "gn_proj", 4 * width)
            for i, shape in enumerate(((1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)), 1):
                yield _entry(f"{theirs}conv{i}/kernel", f"{ours}conv{i}.weight", shape)
                yield from _norm_layout(f"{theirs}gn{i}", f"{ours}gn{i}", shape[-1])
            channels = 4 * width
    return channels


class Spelling(NamedTuple):
    """The spelling of a file's names.

    Attributes:
        prefix: where in a train state the weights are.
        new_numbering: a block's layers are numbered as newer Flax versions do.
    """

    prefix: str
    new_numbering: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> Spelling:
        """The spelling of most of a file's names."""
        names = list(names)
        marker = POSITIONS.split("/")[0] + "/"
        prefix = max(_PREFIXES, key=lambda p: sum(name.startswith(p + marker) for name in names))
        layers = [name.removeprefix(prefix).split("/")[2:3] for name in names if name.startswith(prefix + marker)]
        newer = sum(layer[0] in _NEW_NUMBERING for layer in layers if layer)
        return cls(prefix, newer > sum(layer[0] in _NEW_NUMBERING.values() for layer in layers if layer))

    def spell(self, historical: str) -> str:
        """The file's name of an array."""
        return self.prefix + (_renumber(historical, _OLD_NUMBERING) if self.new_numbering else historical)

    def historical(self, name: str) -> str | None:
        """The historical name of what the file calls ``name``, or None if it is not spelled as the others."""
        short = name.removeprefix(self.prefix)
        historical = _renumber(short, _NEW_NUMBERING) if self.new_numbering else short
        return historical if self.spell(historical) == name else None


def _renumber(name: str, numbering: Mapping[str, str]) -> str:
    parts = name.split("/")
    if len(parts) > 2 and re.fullmatch(r"encoderblock_\d+", parts[1]):
        parts[2] = numbering.get(parts[2], parts[2])
    return "/".join(parts)


class Matched(Mapping[str, np.ndarray]):
    """All arrays that a model needs, by their historical names, as ``match`` checked them.

    They are not checked again for a model that needs no others.

    Attributes:
        entries: the arrays, but for those of the layer before the head that some files have and no model here.
    """

    def __init__(self, arrays: dict[str, np.ndarray], entries: list[WeightSpec]) -> None:
        self._arrays, self.entries = arrays, entries

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def match(weights: Mapping[str, np.ndarray], config: ViTConfig, num_classes: int | None = None) -> Matched:
    """The arrays of a checkpoint that a model needs, by their historical names, all there and well-shaped.

    Args:
        weights: arrays by Google's names, of any float type; what is not needed is named in a warning.
            What was matched with such a model before, perhaps with a head as well, is returned as it is.
        config: the architecture.
        num_classes: outputs of the head, or None to leave the head out.

    Raises:
        UserError: an array is missing, has the wrong shape or holds a NaN; the message names it as the
            file does.
    """
    # Position embeddings may have any grid, so any image's size will do here.
    entries = list(layout(config, config.stride, num_classes))
    if isinstance(weights, Matched) and set(entries) <= set(weights.entries):
        return weights
    spelling = Spelling.of(weights)
    arrays: dict[str, np.ndarray] = {}
    wrong = []
    for entry in entries:
        name = spelling.spell(entry.google)
        expected = f"(1, 1 + n * n, {config.hidden_size})" if entry.google == POSITIONS else str(entry.shape)
        if name not in weights:
            wrong.append(f"{name}: expected {expected}, not in the file")
            continue
        arrays[entry.google] = array = weights[name]
        if not np.issubdtype(array.dtype, np.floating):
            wrong.append(f"{name}: expected floating-point numbers, found {array.dtype}")
        elif not fits(entry, array.shape):
            wrong.append(f"{name}: expected {expected}, found {array.shape}")
        elif not np.isfinite(array).all() or (array.dtype.itemsize > 4 and np.abs(array).max() > FLOAT32_MAX):
            wrong.append(f"{name}: it holds NaN, infinity or what float32 cannot hold")
    if wrong:
        raise UserError(first_faults(wrong) + _hint(weights, spelling, config))
    arrays |= {name: weights[spelled] for name in _PRE_LOGITS if (spelled := spelling.spell(name)) in weights}
    known = {*arrays, "head/kernel", "head/bias"}
    own = [name for name in weights if not name.startswith(_OPTIMIZER_STATE)]
    if extra := sorted(name for name in own if spelling.historical(name) not in known):
        logger.warning("The .npz holds arrays that the model has no place for: %s", ", ".join(extra))
    return Matched(arrays, entries)


def num_classes(weights: Mapping[str, np.ndarray]) -> int | None:
    """Outputs of the head of a checkpoint in Google's layout; None if it has no head."""
    bias = weights.get(Spelling.of(weights).spell("head/bias"))
    return None if bias is None else bias.size


def first_faults(faults: list[str]) -> str:
    """Joins the faults of a file's arrays for a message of one line: three of them, and the number of the others."""
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")


def _hint(weights: Mapping[str, np.ndarray], spelling: Spelling, config: ViTConfig) -> str:
    """Names the model that a checkpoint belongs to, if it is a known one and not this one."""
    if _is_of(weights, spelling, config):
        return ""
    other = model_of(weights)
    return "" if other is None else f"; it fits --model_type {other}"


def _is_of(weights: Mapping[str, np.ndarray], spelling: Spelling, config: ViTConfig) -> bool:
    entries = ((spelling.spell(entry.google), entry) for entry in layout(config, config.stride))
    return all(name in weights and fits(entry, weights[name].shape) for name, entry in entries)


def model_of(weights: Mapping[str, np.ndarray]) -> str | None:
    """The ``--model_type`` whose arrays a checkpoint in Google's layout has; None if it is none that is known."""
    spelling = Spelling.of(weights)
    return next((name for name, config in CONFIGS.items() if _is_of(weights, spelling, config)), None)


def to_state_dict(
    weights: Mapping[str, np.ndarray], config: ViTConfig, img_size: int, num_classes: int | None = None
) -> dict[str, Tensor]:
    """Converts a checkpoint in Google's layout, in full, to our float32 state_dict.

    Args:
        weights, config, num_classes: as for ``match``.
        img_size: side of the images in pixels; position embeddings of another grid are resized.

    Raises:
        UserError: an array is missing or has the wrong shape.
    """
    matched = match(weights, config, num_classes)
    if num_classes is not None and _PRE_LOGITS[0] in matched:
        logger.warning("The head was trained behind a pre_logits layer, which this model has not")
    arrays = dict(matched)
    arrays[POSITIONS] = resize_positions(arrays[POSITIONS].astype(np.float32), config.grid_size(img_size))
    return {entry.ours: entry.to_tensor(arrays[entry.google]) for entry in layout(config, img_size, num_classes)}


def fits(entry: WeightSpec, shape: tuple[int, ...]) -> bool:
    """Compares an array's shape with the entry's; position embeddings may be of any square grid."""
    if entry.google == POSITIONS:
        square = len(shape) == 3 and shape[1] > 1 and round((shape[1] - 1) ** 0.5) ** 2 == shape[1] - 1
        return square and (shape[0], shape[2]) == (1, entry.shape[2])
    return shape == entry.shape or (entry.shape[:-1] == (1, 1, 1) and shape == entry.shape[-1:])


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Resizes position embeddings to another grid; the class token's stays.

    Google uses ``scipy.ndimage.zoom(order=1)``: bilinear, the corners of both grids aligned.

    Args:
        positions: (1, 1 + n * n, D).
        grid: side of the new grid.

    Returns:
        (1, 1 + grid * grid, D).
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions
    logger.info("Resized position embeddings from a grid of %d x %d to %d x %d", old, old, grid, grid)
    at = np.linspace(0, old - 1, grid)
    # (grid, old): row i holds the weights of the two old positions around the new one
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
    x = positions[0, 1:].reshape(old, old, -1)
    x = np.einsum("yi,xj,ijd->yxd", weights, weights, x, optimize=True).astype(positions.dtype)
    return np.concatenate((positions[:, :1], x.reshape(1, grid * grid, -1)), axis=1)


def from_state_dict(
    state: Mapping[str, Tensor], config: ViTConfig, img_size: int, dtype: type[np.generic] = np.float32
) -> dict[str, np.ndarray]:
    """The inverse of ``to_state_dict``, head included: arrays by Google's names, sorted as its files are.

    Raises:
        UserError: the state_dict is not this model's at this size; the message names what differs.
    """
    if "head.bias" not in state:
        raise UserError("head.bias: not in the state_dict")
    entries = list(layout(config, img_size, num_classes=len(state["head.bias"])))
    shapes = {entry.ours: entry.ours_shape for entry in entries}
    wrong = [f"{name}: not in the state_dict" for name in shapes if name not in state]
    wrong += [f"{name}: not in this model" for name in state if name not in shapes]
    wrong += [
        f"{name}: expected {shape}, found {tuple(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    if wrong:
        raise UserError(first_faults(wrong))
    arrays = {entry.google: entry.to_array(state[entry.ours], dtype) for entry in entries}
    return in_files_order(arrays)


def in_files_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays in the order of Google's files, whose nested dictionaries are sorted at every level."""
    return dict(sorted(arrays.items(), key=lambda item: item[0].split("/")))


def write(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an uncompressed .npz, as Google's files are, to an open file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
