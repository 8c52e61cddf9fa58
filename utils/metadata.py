"""Reads weights and the metadata beside them: this project's .json, or the config.json of timm or transformers.

Sources: transformers (``configuration_vit.py``, ``image_processing_vit.py``) and timm (``models/_hub.py``).  This
module must not know models.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from utils import checkpoint, weights
from utils.errors import UserError
from utils.weights import Weights

logger = logging.getLogger(__name__)

#: transformers' and timm's names of the two activations that this project's models know.
_GELUS = {
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_tanh": "tanh",
    "gelu_erf": "erf",
}
GELUS = ("erf", "tanh")
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Metadata:
    """Facts about a model from files beside its weights; None where no file has one.

    Attributes:
        source: the file.
        model_type, img_size, gelu: as the flags.
        classes: their names, in the order of the head's outputs.
        num_heads: attention heads.
        pooling: how tokens become features: "token" is the class token, as here.
        images_source: the file that has what follows, where it is another.
        mean, std: what images are normalised with, for values from 0 to 1.
        own: the whole of this project's own .json, where it is that.
    """

    source: str
    model_type: str | None = None
    img_size: int | None = None
    gelu: str | None = None
    classes: list[str] | None = None
    num_heads: int | None = None
    pooling: str = "token"
    images_source: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    own: checkpoint.CheckpointMetadata | None = None

    def check(self, num_heads: int) -> None:
        """Compares what weights do not show with what this project's models compute.

        Raises:
            UserError: the model has another activation, pooling or number of attention heads.
        """
        if self.gelu not in (None, *GELUS):
            raise UserError(f"{self.source} has the activation {self.gelu}; known are {', '.join(_GELUS)}")
        if self.num_heads not in (None, num_heads):
            raise UserError(f"{self.source} has {self.num_heads} attention heads, expected {num_heads}")
        if self.pooling != "token":
            raise UserError(f"{self.source} is of a model that pools its tokens by {self.pooling}, expected token")
        mean, std = self.mean or MEAN, self.std or STD
        if (mean, std) != (MEAN, STD):
            logger.warning(
                "%s: these weights were trained on images normalised with mean %s and std %s; here they are "
                "normalised with 0.5 and 0.5", self.images_source or self.source, list(mean), list(std),
            )  # fmt: skip


def open_weights(path: str, strict: bool) -> Weights:
    """Reads a file of weights, or the one in a folder, and the metadata beside it.

    Args:
        path: as for ``weights.read``.
        strict: metadata that cannot be read, or is of other weights, is an error; else a warning, and left out.

    Raises:
        UserError: they cannot be read; the message begins with the path.
    """
    try:
        path = weights.file_in(path) if os.path.isdir(path) else path
        file = weights.read(path)
    except UserError as e:
        raise UserError(f"{path} cannot be loaded: {e}") from e
    try:
        return replace(file, metadata=read_beside(file))
    except UserError as e:
        if strict:
            raise
        logger.warning("%s", e)
        return file


def read_beside(file: Weights) -> Metadata | None:
    """Reads the metadata beside weights; returns None without any.

    Raises:
        UserError: a file there cannot be read, or is of other weights.
    """
    beside = checkpoint.metadata_path(file.path)
    if os.path.isfile(beside):
        try:
            tensors = file.tensors()
        except TypeError as e:  # arrays of a kind that no metadata is of
            raise UserError(f"{file.path} holds more than numbers of this machine ({e})") from e
        own = checkpoint.read_metadata(file.path, tensors)
        if own is not None:
            return Metadata(beside, own.model_type, own.img_size, own.gelu, own.classes, own=own)
    if file.path.endswith(".npz"):
        return None
    folder = os.path.dirname(file.path)
    sources = [os.path.join(folder, name) for name in ("config.json", "preprocessor_config.json")]
    config, images = map(_read_json, sources)
    if config is None and images is None:
        return None
    source = sources[config is None]
    try:
        if config is not None and ("pretrained_cfg" in config or "architecture" in config):
            return _from_timm(source, config)
        metadata = _from_transformers(source, config or {})
        source = sources[1]
        return replace(metadata, images_source=source, **_normalisation(images or {}))
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{source} does not describe a model as timm or transformers do ({e}); remove it") from e


def _read_json(path: str) -> dict[str, Any] | None:
    """Returns a file's dictionary; None where there is no file.

    Raises:
        UserError: it holds something else.
    """
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({e}); repair or remove it") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read (it holds no dictionary); repair or remove it")
    return content


def _from_transformers(source: str, config: dict[str, Any]) -> Metadata:
    labels = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    classes: list[str] | None = [name for _, name in sorted(labels.items())] or None
    # Some numbers may lack a name, and all have a made-up one where none was given.
    if sorted(labels) != [*range(len(labels))] or all(re.fullmatch(r"LABEL_\d+", name) for name in labels.values()):
        classes = None
    return Metadata(
        source,
        img_size=_side(config.get("image_size")),
        gelu=_gelu(config.get("hidden_act")),
        classes=classes,
        num_heads=_count(config.get("num_attention_heads")),
    )


def _normalisation(images: dict[str, Any]) -> dict[str, Any]:
    """Returns the mean and std of transformers' image processor."""
    if images.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {"mean": _triple(images.get("image_mean")), "std": _triple(images.get("image_std"))}


def _from_timm(source: str, config: dict[str, Any]) -> Metadata:
    images = config.get("pretrained_cfg") or config  # older files have these keys at the top
    given = config.get("model_args") or {}
    classes = config.get("label_names") or images.get("label_names")
    pooling = given.get("global_pool") or config.get("global_pool") or images.get("global_pool") or "token"
    return Metadata(
        source,
        img_size=_side(given.get("img_size") or (images.get("input_size") or (None,))[-1]),
        gelu=_gelu(given.get("act_layer", "gelu")),
        classes=[str(name) for name in classes] if isinstance(classes, list) and classes else None,
        num_heads=_count(given.get("num_heads")),
        pooling=str(pooling),
        mean=_triple(images.get("mean")),
        std=_triple(images.get("std")),
    )


def _side(size: Any) -> int | None:
    """Returns the side of square images in pixels, of a number or a list of equal ones; None for none."""
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    return _count(size)


def _count(number: Any) -> int | None:
    """Returns a number of pixels or heads; None for none."""
    if number is not None and (type(number) is not int or number < 1):
        raise ValueError(f"{number!r} is no whole number of at least 1")
    return number


def _gelu(name: str | None) -> str | None:
    """Returns an activation as --gelu has it, or as it is called if it is another."""
    return None if name is None else _GELUS.get(name, name)


def _triple(values: Any) -> tuple[float, ...] | None:
    """Returns a value for each channel, of one for all or one each; None for none."""
    if values is None:
        return None
    each = tuple(map(float, values if isinstance(values, list) else [values]))
    if len(each) not in (1, 3):
        raise ValueError(f"{values} is not for three channels")
    return each * (3 // len(each))
