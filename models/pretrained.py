"""Weights that a run or a tool begins with: a file of any layout in Google's, and the model that has them.

Takes what ``utils.metadata.open_weights`` has read; models/layouts.py knows what the names mean.  This module must not
read files, nor know the flags.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models import layouts, npz
from models.configs import CONFIGS, ViTConfig, canonical_name
from models.modeling import VisionTransformer
from utils.errors import UserError

logger = logging.getLogger("train")


class WeightsFile(Protocol):
    """A file that was read: ``utils.weights.Weights``."""

    @property
    def path(self) -> str: ...
    @property
    def arrays(self) -> dict[str, np.ndarray]: ...
    @property
    def metadata(self) -> Any: ...


class Source(NamedTuple):
    """Weights of a model.

    Attributes:
        path: the file.
        model_type: one of ``CONFIGS``.
        arrays: by Google's names, all that the model needs and a head where the file has one.
        metadata: a ``utils.metadata.Metadata`` of the files beside it, None without one.
    """

    path: str
    model_type: str
    arrays: npz.Matched
    metadata: Any

    @property
    def num_classes(self) -> int | None:
        """Outputs of the head; None without one."""
        return npz.num_classes(self.arrays)


def load(file: WeightsFile, model_type: str | None) -> Source:
    """Interprets weights of any layout as those of a model.

    Args:
        file: the weights and their metadata.
        model_type: one of ``CONFIGS``, or None for the metadata's or, without one, that of the names and shapes.

    Raises:
        UserError: they are another model's, or of none; the message begins with the file's path.
    """
    metadata = file.metadata
    model_type = model_type or (metadata and metadata.model_type) or layouts.model_of(file.arrays)
    if model_type not in CONFIGS:
        known = f"; known models: {', '.join(CONFIGS)}"
        if model_type is None:
            raise UserError(f"{file.path} has names or shapes of none of the known models{known}")
        raise UserError(f"{metadata.source if metadata else file.path} names {model_type}, which is not known{known}")
    config = CONFIGS[model_type]
    with _naming(file.path, model_type):
        arrays = layouts.to_google(file.arrays, config)
        matched = npz.match(arrays, config, npz.num_classes(arrays))
        if metadata is not None:
            metadata.check(config.num_heads)
    return Source(file.path, model_type, matched, metadata)


def checksum(source: Source) -> str:
    """Returns what tells weights from others: a CRC-32 of all arrays as the float32 numbers that a model takes.

    Layouts and types make no difference, nor do position embeddings resized later: it is of what the file holds.
    """
    crc = 0
    for entry in source.arrays.entries:
        array = np.ascontiguousarray(source.arrays[entry.google], np.float32)
        crc = zlib.crc32(array.reshape(-1).data, crc)
    return f"weights {crc:08x}"


def model_to_train(
    source: Source | None, config: ViTConfig, img_size: int, num_classes: int, keep_head: bool
) -> VisionTransformer:
    """Returns a model with the weights of a file, or with random ones from torch's global generator.

    Args:
        source: the weights; None for random ones.
        config: the architecture.
        img_size: side of the images, in pixels.
        num_classes: outputs of the head.
        keep_head: load the file's head, instead of zeros.

    Raises:
        UserError: the weights do not fit; the message begins with the file's path.
    """
    if source is None:
        return VisionTransformer(config, img_size, num_classes, zero_head=True)
    model = _empty(config, img_size, num_classes, zero_head=not keep_head)
    with _naming(source.path, source.model_type):
        model.load_from(source.arrays)
    return model


def model_to_resume(
    weights: Mapping[str, Tensor], model_type: str, config: ViTConfig, img_size: int, num_classes: int
) -> VisionTransformer:
    """Returns a model with the weights of a training state; raises UserError if they are another model's."""
    model = _empty(config, img_size, num_classes)
    with _naming("the state to resume from", model_type):
        model.load_finetuned(weights)
    return model


def model_to_evaluate(
    source: Source, config: ViTConfig, img_size: int, num_classes: int, vis: bool = False
) -> VisionTransformer:
    """Returns a model with fine-tuned weights, its head included.

    Args:
        source: the weights.
        config, img_size, num_classes, vis: as for ``VisionTransformer``.

    Raises:
        UserError: the weights are of another model, size of images or number of classes, or have no head.
    """
    model = _empty(config, img_size, num_classes, vis=vis)
    with _naming(source.path, source.model_type):
        model.load_exactly(source.arrays)
    return model


def _empty(config: ViTConfig, img_size: int, num_classes: int, **options: bool) -> VisionTransformer:
    """Returns a model without weights, which draws none that are then overwritten."""
    with torch.device("meta"):
        return VisionTransformer(config, img_size, num_classes, **options)


@contextlib.contextmanager
def _naming(source: str, model_type: str) -> Iterator[None]:
    """Lets an error say which weights do not fit which model."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{source} cannot be loaded as {model_type}: {e}") from e


def keeps_head(source: Source, classes: list[str], zero_head: bool) -> bool:
    """Tells whether a training keeps the weights' own head, which it does only for the same classes; logs the reason.

    Args:
        source: the weights.
        classes: names of the data set's, in the order of their labels.
        zero_head: a head of zeros is asked for.
    """
    trained = None if source.metadata is None else source.metadata.classes
    if zero_head:
        reason = "--zero_head"
    elif source.num_classes is None:
        reason = "the weights have none"
    elif trained is None:
        reason = "nothing tells the names of its classes"
    elif trained != classes or source.num_classes != len(classes):
        reason = "it was trained for other classes"
    else:
        logger.info("The head is kept: it was trained for the same %d classes", len(classes))
        return True
    logger.info("The head starts from zeros: %s", reason)
    return False


def warn_of_contradictions(source: Source, model_type: str, gelu: str) -> None:
    """Warns where the flags differ from those of the training that the metadata names."""
    metadata = source.metadata
    if metadata is None:
        return
    if metadata.model_type is not None and canonical_name(metadata.model_type) != canonical_name(model_type):
        logger.warning("%s was trained with --model_type %s, not %s", source.path, metadata.model_type, model_type)
    if metadata.gelu not in (None, gelu):
        logger.warning("%s was trained with --gelu %s, not %s", source.path, metadata.gelu, gelu)


class Trained(NamedTuple):
    """A training, as the metadata of its weights tell of it.

    Attributes:
        classes: of the head's outputs; None where nothing names them.
        test_fraction: share of its data set that was tested on; None where a part was, or nothing tells.
        is_own: this project trained it, so that the classes are as its data set has them.
    """

    classes: list[str] | None
    test_fraction: float | None
    is_own: bool


def trained_on(source: Source) -> Trained:
    """Returns the metadata's facts of the data set that weights were trained on."""
    metadata = source.metadata
    if metadata is None:
        return Trained(None, None, False)
    return Trained(metadata.classes, metadata.own and metadata.own.test_fraction, metadata.own is not None)


def warn_of_other_classes(source: Source, dataset: str, classes: list[str]) -> None:
    """Warns where an evaluation is on as many classes as the training was, but on others."""
    trained = None if source.metadata is None else source.metadata.classes
    if trained is not None and len(trained) == len(classes) and trained != classes:
        first = next(i for i, name in enumerate(classes) if trained[i] != name)
        logger.warning(
            "%s was trained on other classes than %s has: number %d was %s, here it is %s",
            source.path, dataset, first, trained[first], classes[first],
        )  # fmt: skip
