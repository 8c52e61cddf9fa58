"""Weights that a run or a tool begins with: a file of any layout, as a model in Google's, and what is told of it.

Joins utils/weights.py, which reads files, and models/layouts.py, which knows what the names in them mean.  This module
must not know the flags.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from models import layouts, npz
from models.configs import CONFIGS, canonical_name
from utils import metadata, weights
from utils.errors import UserError

logger = logging.getLogger("train")


class Source(NamedTuple):
    """Weights of a model.

    Attributes:
        path: the file.
        model_type: one of ``CONFIGS``.
        arrays: by Google's names, all that the model needs and a head where the file has one.
        told: what files beside it tell, None where nothing does.
    """

    path: str
    model_type: str
    arrays: npz.Matched
    told: metadata.Metadata | None

    @property
    def num_classes(self) -> int | None:
        """Outputs of the head; None without one."""
        return npz.num_classes(self.arrays)


def load(path: str, model_type: str | None, strict: bool = True) -> Source:
    """Reads weights of any layout as those of a model.

    Args:
        path: a file, or a folder with one.
        model_type: one of ``CONFIGS``, or None for what is told or, if nothing tells it, shown by the weights.
        strict: an unreadable or mismatched description is an error, not a warning.

    Raises:
        UserError: they cannot be read, or are another model's; the message names the file.
    """
    try:
        path = weights.file_in(path) if os.path.isdir(path) else path
        file = weights.read(path)
    except UserError as e:
        as_model = "" if model_type is None else f" as {model_type}"
        raise UserError(f"{path} cannot be loaded{as_model}: {e}") from e
    try:
        told = metadata.read_beside(file)
    except UserError as e:
        if strict:
            raise
        logger.warning("%s", e)
        told = None
    model_type = model_type or (told and told.model_type) or layouts.model_of(file.arrays)
    if model_type not in CONFIGS:
        known = f"; known models: {', '.join(CONFIGS)}"
        if model_type is None:
            raise UserError(f"{path} has names or shapes of none of the known models{known}")
        raise UserError(f"{told.source if told else path} names {model_type}, which is not known here{known}")
    config = CONFIGS[model_type]
    try:
        arrays = layouts.to_google(file.arrays, config)
        matched = npz.match(arrays, config, npz.num_classes(arrays))
        if told is not None:
            told.check(config.num_heads)
    except UserError as e:
        raise UserError(f"{file.path} cannot be loaded as {model_type}: {e}") from e
    return Source(file.path, model_type, matched, told)


def keeps_head(source: Source, classes: list[str], zero_head: bool) -> bool:
    """Decides whether a training goes on with the weights' own head: only where it is for the same classes; logs why.

    Args:
        source: the weights.
        classes: names of the data set's, in the order of their labels.
        zero_head: a head of zeros is asked for.
    """
    trained = None if source.told is None else source.told.classes
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
    """Warns where the flags differ from the training that is told of beside the weights."""
    told = source.told
    if told is None:
        return
    if told.model_type is not None and canonical_name(told.model_type) != canonical_name(model_type):
        logger.warning("%s was trained with --model_type %s, not %s", source.path, told.model_type, model_type)
    if told.gelu not in (None, gelu):
        logger.warning("%s was trained with --gelu %s, not %s", source.path, told.gelu, gelu)


def warn_of_other_classes(source: Source, dataset: str, classes: list[str]) -> None:
    """Warns where an evaluation is on as many classes as the training was, but on others."""
    trained = None if source.told is None else source.told.classes
    if trained is not None and len(trained) == len(classes) and trained != classes:
        first = next(i for i, name in enumerate(classes) if trained[i] != name)
        logger.warning(
            "%s was trained on other classes than %s has: number %d was %s, here it is %s",
            source.path, dataset, first, trained[first], classes[first],
        )  # fmt: skip
