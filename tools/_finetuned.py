"""Loads a fine-tuned checkpoint's model, for the tools that use one.

Its metadata (utils/checkpoint.py) names the model and the classes; flags name them where there is none, as for
checkpoints of the reference script, and overrule it.  The shapes of the weights are checked against both.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

from models import pretrained
from models.configs import CONFIGS, canonical_name, make_config
from models.modeling import VisionTransformer
from tools import _cli
from utils import checkpoint, datasets
from utils.errors import UserError
from utils.metadata import GELUS, Metadata, open_weights

logger = logging.getLogger(__name__)

IMG_SIZE = 224


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model in evaluation mode, on the CPU.

    Attributes:
        classes: their names, in the order of the logits; None where nothing names them.
        metadata: that train.py wrote beside the checkpoint, which flags may have overruled; None without it.
    """

    model: VisionTransformer
    model_type: str
    classes: list[str] | None
    metadata: checkpoint.CheckpointMetadata | None = None

    def class_names(self) -> list[str]:
        """Returns the names of the classes.

        Raises:
            UserError: nothing names them.
        """
        if self.classes is None:
            raise UserError(
                f"no file and no flag names the {self.model.num_classes} classes; "
                "give --classes NAME,NAME,... or the --dataset of the training"
            )
        return self.classes


def add_flags(p: _cli.Parser) -> None:
    """Adds the flags that name a checkpoint, its model and its classes."""
    p.add_argument("--load_model_dir", required=True, metavar="FILE", help="the checkpoint, NAME_checkpoint.bin")
    group = p.add_argument_group(
        "for checkpoints without metadata",
        "What train.py wrote has NAME_checkpoint.json beside it, which these overrule.",
    )
    group.add_argument("--model_type", choices=CONFIGS, metavar="MODEL", help="such as ViT-B_16")
    group.add_argument("--img_size", type=_cli.parse_positive, help=f"of the training, in pixels; {IMG_SIZE} without "
                      "metadata")  # fmt: skip
    group.add_argument("--gelu", choices=GELUS, help="of the training; erf without metadata")
    group.add_argument("--classes", metavar="NAMES", help="names of the classes with commas between them, or a text "
                      "file with one a line")  # fmt: skip
    group.add_argument("--dataset", help="the data set whose classes they are: cifar10, cifar100, digits or a folder")
    group.add_argument("--data_dir", help="has no effect: the classes of cifar10 and cifar100 are known")


def load(args: argparse.Namespace, vis: bool = False) -> Finetuned:
    """Loads the model that the flags of ``add_flags`` name.

    Args:
        args: the flags.
        vis: the model returns its attention.

    Raises:
        UserError: the user got something wrong.
    """
    path = args.load_model_dir
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}; name one with --load_model_dir")
    source = pretrained.load(open_weights(path, strict=True), args.model_type)
    metadata: Metadata | None = source.metadata
    if metadata is None and args.model_type is None:
        raise UserError(
            f"there is no {checkpoint.metadata_path(path)} that names the model of {path}; "
            f"give --model_type {source.model_type}, and --img_size and --gelu if they were not the defaults"
        )
    setting(args, metadata, "model_type", "")  # for its warning
    img_size = setting(args, metadata, "img_size", IMG_SIZE)
    config = make_config(source.model_type, img_size, setting(args, metadata, "gelu", GELUS[0]))
    model = pretrained.model_to_evaluate(source, config, img_size, source.num_classes or 1, vis)
    classes = chosen_classes(args)
    where = "the flags name"
    if classes is None and metadata is not None:
        classes, where = metadata.classes, f"{metadata.source} names"
    if classes is not None and len(classes) != model.num_classes:
        raise UserError(f"{path} has {model.num_classes} classes, {where} {len(classes)}")
    return Finetuned(model.eval(), source.model_type, classes, None if metadata is None else metadata.own)


def setting(args: argparse.Namespace, metadata: Metadata | None, flag: str, default: Any) -> Any:
    """Returns a flag's value, else the metadata's, else a default; a contradiction is a warning."""
    given = getattr(args, flag)
    noted = None if metadata is None else getattr(metadata, flag)
    same = canonical_name if flag == "model_type" else str  # a model may have two names
    if given is not None and noted is not None and same(given) != same(noted):
        assert metadata is not None
        logger.warning("--%s %s is taken, but %s says %s", flag, given, metadata.source, noted)
    return next((value for value in (given, noted) if value is not None), default)


def chosen_classes(args: argparse.Namespace) -> list[str] | None:
    """Returns the names that ``--classes`` or ``--dataset`` gives, None without them.

    Raises:
        UserError: a name is missing or there twice, or there is no such data set.
    """
    if args.data_dir is not None:
        logger.warning("--data_dir has no effect: the classes of cifar10 and cifar100 are known without their images")
    if args.classes is None:
        return None if args.dataset is None else datasets.class_names(args.dataset)
    if args.dataset is not None:
        raise UserError("--classes and --dataset both name the classes; give one")
    if os.path.isfile(args.classes):
        try:
            with open(args.classes, encoding="utf-8") as f:
                names = f.read().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--classes {args.classes} cannot be read as text ({e})") from e
    else:
        names = args.classes.split(",")
    names = [name.strip() for name in names]
    if "" in names or len(set(names)) < len(names):
        wrong = next(name for name in names if not name or names.count(name) > 1)
        raise UserError(f"--classes has {'an empty name' if not wrong else f'{wrong} twice'}")
    return names
