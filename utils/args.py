"""The command line: one table of flags, from which the parser, the checks and docs/flags.md follow.

Names and defaults are those of the reference script (github.com/jeonsworld/ViT-pytorch) where it has the flag.
This module must not know how a flag takes effect.
"""

from __future__ import annotations

import argparse
import logging
import math
import operator
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch

from models.configs import CONFIGS, canonical_name
from utils import dist_util, hardware
from utils.batch import Batch
from utils.errors import UserError
from utils.precision import AMP_BACKENDS, AMP_DTYPES, OPT_LEVELS
from utils.scheduler import DECAY_TYPES

logger = logging.getLogger("train")


def parse_bool(text: str) -> bool:
    """Returns true/false in the usual spellings as a bool."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_auto(text: str) -> int | str:
    """Returns a whole number, or "auto"."""
    if text == "auto" or re.fullmatch(r"[+-]?\d+", text):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        options: how it is spelled, separated by spaces.
        default: its value where it is not given.
        help: what it does, for ``--help`` and docs/flags.md.
        decides: on what its value decides.  A run resumes only under the flags that decide on its result; another value
            of one that decides on the last digits is a warning.
        training_only: an evaluation (-v) does not read it; nor does it any flag of the group "Training".
        composed: the value enters ``settings`` or ``environment`` only together with other facts, such as the number of
            ranks.
        per_rank: ranks may have different values.
        least, above, most, below: the value must be at least ``least``, more than ``above``, at most ``most`` and less
            than ``below``.
        parse: makes the value from text; by default the type of ``default``, or str.
        choices: the values it may have; None for any.
        metavar: what stands for the value in ``--help``, instead of its name or its choices.
        unset: what a default of None means; "" for a flag that must be given.
    """

    options: str
    default: Any
    help: str
    decides: Literal["result", "last digits", ""] = ""
    training_only: bool = False
    composed: bool = False
    per_rank: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    unset: str = ""

    @property
    def name(self) -> str:
        """The flag's first long spelling without dashes: its name in ``args`` and, after ``--``, in saved states."""
        return next(x for x in self.options.split() if x.startswith("--")).removeprefix("--")

    def for_argparse(self) -> dict[str, Any]:
        """Returns what ``add_argument`` takes besides the spellings."""
        if self.default is False and self.parse is None:
            return {"action": "store_true", "help": self.help}
        common = {"default": self.default, "choices": self.choices, "metavar": self.metavar, "help": self.help}
        if self.parse is parse_bool:  # may be bare
            return common | {"type": parse_bool, "nargs": "?", "const": True}
        if self.default is not None:
            return common | {"type": self.parse or type(self.default)}
        default = f"default: {self.unset}" if self.unset else "required"
        return common | {"type": self.parse, "required": not self.unset, "help": f"{self.help} ({default})"}

    def check(self, value: Any) -> None:
        """Raises UserError if the value is out of bounds, as NaN always is and a word such as "auto" never."""
        bounds = [
            (words, bound, holds)
            for words, bound, holds in (
                ("at least", self.least, operator.ge),
                ("more than", self.above, operator.gt),
                ("at most", self.most, operator.le),
                ("less than", self.below, operator.lt),
            )
            if bound is not None
        ]
        if not isinstance(value, str | None) and not all(holds(value, bound) for _, bound, holds in bounds):
            expected = " and ".join(f"{words} {bound}" for words, bound, _ in bounds)
            raise UserError(f"--{self.name} is {value}, expected {expected}")


#: The names of architectures that ``--help`` lists: neither Google's for them nor those of the tests.
MODELS = [name for name in CONFIGS if name == canonical_name(name) and not name.startswith("testing")]

#: The flags by groups, which are the headings of ``--help`` and of docs/flags.md (``make flags`` writes it).
GROUPS: dict[str, tuple[Flag, ...]] = {
    "The run and its files": (
        Flag("--name", None, "name of the run, its checkpoint and its logs"),
        Flag("--output_dir", "output", "folder for checkpoints, saved states and reports", per_rank=True),
        Flag("--log_dir", "logs", "folder for the runs' logs; the run's own is LOG_DIR/NAME, or LOG_DIR/NAME-2 where a "
             "run of another --output_dir has that", per_rank=True, training_only=True),
        Flag("--resume", "auto", "auto: resume from the run's last saved state, if there is one; none: start over; "
             "PATH: resume from that NAME_last.pt, which may be another run's", metavar="auto|none|PATH",
             training_only=True),
        Flag("--save_every", None, "steps between two saved states", parse=int, least=1, unset="that of --eval_every",
             training_only=True),
        Flag("--log_every", 10, "steps between two lines of metrics", least=1, training_only=True),
    ),
    "Data": (
        Flag("--dataset", "cifar10", "cifar10, cifar100, digits, or a folder of images: train/CLASS/ and test/CLASS/ "
             "or val/CLASS/, or CLASS/ alone, of which a part is tested on", "result", composed=True, per_rank=True),
        Flag("--test_fraction", None, "share of a folder's images to test on where it has no part for that, chosen by "
             "their names; 1, with -v, for all", "result", composed=True, parse=float, above=0, most=1,
             unset="0.2; with -v that of the training"),
        Flag("--data_dir", "./data", "folder that has cifar10 and cifar100, or that they are downloaded to; may be "
             "cifar-10-batches-py or cifar-100-python itself", per_rank=True),
        Flag("--img_size", 224, "side of the images that the model sees, in pixels; a multiple of the patch, any for "
             "R50 and R26 hybrids", "result", least=1),
        Flag("--hflip", False, "mirror half of the training images", "result", training_only=True),
        Flag("--jpeg_decoding", None, "how training decodes JPEGs in files; scaled: no larger than a crop needs, by "
             "libjpeg, and in less time; full: as evaluations do", "result", composed=True, parse=str,
             choices=("scaled", "full"), unset="scaled; full in a training begun before there was a choice",
             training_only=True),
        Flag("--num_workers", None, "processes of each rank that decode images, for folders of large images; "
             "0: the rank decodes them itself", per_rank=True, parse=int, least=0, unset="the rank's CPUs, at most 8"),
    ),
    "Model": (
        Flag("--model_type", "ViT-B_16", ", ".join(MODELS) + ", or Google's name of one", "result", composed=True,
             choices=tuple(CONFIGS), metavar="MODEL"),
        Flag("--pretrained_dir", None, "weights to start from: Google's .npz, a .safetensors or PyTorch file with the "
             "names of timm, transformers or this project, or a folder with one; '' trains from random weights",
             "result", composed=True, per_rank=True, metavar="PATH", unset="MODEL's file in checkpoint/",
             training_only=True),
        Flag("--zero_head", False, "start from a head of zeros, even if the pretrained head has the data set's classes",
             "result", training_only=True),
        Flag("--dropout", None, "dropout rate", "result", composed=True, parse=float, least=0, below=1,
             unset="MODEL's own, 0.1 or 0", training_only=True),
        Flag("--gelu", "erf", "erf: the exact GELU; tanh: the approximation that Google's code computes", "result",
             choices=("erf", "tanh")),
    ),
    "Training": (
        Flag("--num_steps", 10000, "steps in all", "result", least=1),
        Flag("--train_batch_size", 512, "training images per step and rank", "result", composed=True, least=1),
        Flag("--gradient_accumulation_steps", "auto", "micro-batches into which each rank's batch is split, to need "
             "less memory; auto: as few as fit", "last digits", composed=True, least=1, parse=parse_auto,
             metavar="auto|N"),
        Flag("--gradient_checkpointing", False, "compute each block once more in the backward pass instead of keeping "
             "what is inside it: much less memory, about a third more time"),
        Flag("--learning_rate", 3e-2, "peak learning rate of SGD", "result", least=0, below=math.inf),
        Flag("--warmup_steps", 500, "warm-up: steps over which the learning rate rises to its peak", "result", least=0),
        Flag("--decay_type", "cosine", "how the learning rate falls to 0 after the warm-up", "result",
             choices=DECAY_TYPES),
        Flag("--weight_decay", 0.0, "weight decay of SGD, on all weights", "result", least=0, below=math.inf),
        Flag("--max_grad_norm", 1.0, "norm to which gradients are clipped; inf never clips", "result", above=0),
        Flag("--seed", 42, "seed of the data order, crops, dropout and initial weights", "result", least=0,
             below=2**63),
    ),
    "Evaluation": (
        Flag("--eval_every", 100, "steps between two evaluations", "result", least=1, training_only=True),
        Flag("--eval_batch_size", "auto", "images evaluated at once, per rank; auto: 64, on a GPU as many as fit, at "
             "most 512", "last digits", composed=True, least=1, parse=parse_auto, metavar="auto|N"),
        Flag("-v --eval_only", False, "evaluate a fine-tuned checkpoint instead of training; bare, or with true or "
             "false", parse=parse_bool, metavar="BOOL"),
        Flag("--load_model_dir", None, "checkpoint to evaluate: a file or folder as for --pretrained_dir, with its "
             "head", per_rank=True, metavar="PATH", unset="the run's own, OUTPUT_DIR/NAME_checkpoint.bin"),
    ),
    "Mixed precision": (
        Flag("--fp16", False, "mixed precision; the other flags of this group need it", "result", composed=True),
        Flag("--fp16_opt_level", "O2", "apex's level: O0 float32, O1 autocast, O2 half-precision weights with float32 "
             "masters, O3 half precision throughout", "result", composed=True, choices=OPT_LEVELS),
        Flag("--amp_dtype", "auto", "half-precision type; auto: float16 on CUDA, else bfloat16, on a CPU float32 "
             "where that is measured to be faster", "result", composed=True, choices=AMP_DTYPES),
        Flag("--loss_scale", 0, "fixed loss scale; 0: a dynamic one where float16 needs it", "result", parse=float,
             least=0, below=math.inf),
        Flag("--amp_backend", "native", "native: PyTorch's own; apex: NVIDIA's, in a version that still has amp",
             "result", composed=True, choices=AMP_BACKENDS),
    ),
    "Hardware": (
        Flag("--device", "auto", "what computes; auto: the GPU if there is one", "last digits", composed=True,
             choices=hardware.DEVICES),
        Flag("--compile", False, "torch.compile the model; pays off in long runs", "last digits"),
        Flag("--deterministic", False, "the same bits in every run on CUDA, too; slower, no effect elsewhere",
             "last digits"),
        Flag("--local_rank --local-rank", -1, "set by launchers such as torch.distributed.launch", per_rank=True),
    ),
}  # fmt: skip
FLAGS = tuple(flag for flags in GROUPS.values() for flag in flags)


def deciding(on: Literal["result", "last digits"]) -> tuple[str, ...]:
    """Returns the names of the flags whose values, as they stand in ``args``, decide on it."""
    return tuple(flag.name for flag in FLAGS if flag.decides == on and not flag.composed)


def per_rank() -> frozenset[str]:
    """Returns the names of the flags that may differ between ranks."""
    return frozenset(flag.name for flag in FLAGS if flag.per_rank)


def read_by_evaluation() -> frozenset[str]:
    """Returns the names of the flags that an evaluation (-v) reads."""
    return frozenset(
        flag.name for title, flags in GROUPS.items() for flag in flags if title != "Training" and not flag.training_only
    )


def default_of(name: str) -> Any:
    """Returns the default of the flag of that name; None for a name that is no flag's, such as "precision"."""
    return next((flag.default for flag in FLAGS if flag.name == name), None)


class Parser(argparse.ArgumentParser):
    """Ends at a wrong command line with one line, once a machine; the flags are for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n" if dist_util.is_first_of_machine() else None)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default is None or action.default is False
        return action.help if has_no_default else super()._get_help_string(action)


def make_parser() -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog="train.py", description="Fine-tune a Vision Transformer.", formatter_class=_HelpFormatter)
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(*flag.options.split(), **flag.for_argparse())
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for what the types of the flags let through, and warns of flags without effect."""
    for flag in FLAGS:
        flag.check(getattr(args, flag.name))
    if os.path.basename(args.name) != args.name or args.name in ("", ".", "..") or not args.name.isprintable():
        raise UserError(f"--name {args.name!r} names files; it must not be empty, a path or unprintable")
    if len(os.fsencode(args.name)) > 200:
        raise UserError(f"--name has {len(args.name)} characters, too many for the names of files")
    if not args.log_dir:
        raise UserError("--log_dir is empty; name a folder, or . for the one that you are in")
    if args.gradient_accumulation_steps != "auto" and args.train_batch_size % args.gradient_accumulation_steps:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is not a multiple of "
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"
        )
    if args.fp16 and args.amp_backend == "apex" and args.amp_dtype == "bfloat16":
        raise UserError("--amp_backend apex computes in float16 only; use --amp_backend native for bfloat16")
    if args.load_model_dir is not None and not args.eval_only:
        raise UserError("--load_model_dir names what -v evaluates; training starts from --pretrained_dir")
    if args.test_fraction == 1 and not args.eval_only:
        raise UserError("--test_fraction 1 leaves no image to train on; it is for -v")
    _warn_of_flags_without_effect(args)


def _warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    if args.warmup_steps >= args.num_steps and not args.eval_only:
        logger.warning(
            "--warmup_steps %d of --num_steps %d: the learning rate does not get to fall",
            args.warmup_steps,
            args.num_steps,
        )
    need_fp16 = [flag for flag in GROUPS["Mixed precision"] if flag.name != "fp16"]
    if not args.fp16 and any(getattr(args, flag.name) != flag.default for flag in need_fp16):
        *others, last = (f"--{flag.name}" for flag in need_fp16)
        logger.warning("%s and %s have no effect without --fp16", ", ".join(others), last)
    if args.zero_head and (args.eval_only or args.pretrained_dir == ""):
        logger.warning("--zero_head has no effect without weights to train on from")


def decoding_workers(args: argparse.Namespace) -> int:
    """Returns the number of processes that decode this rank's images."""
    return min(8, hardware.num_cpus()) if args.num_workers is None else args.num_workers


def settings(
    args: argparse.Namespace,
    pretrained: str,
    dataset: str,
    dropout_rate: float,
    batch: int,
    precision: str,
    jpeg_decoding: str = "",
) -> dict[str, Any]:
    """Returns what decides on a run's result, by the names of the flags: a run resumes only under the same.

    The names are those of saved states, which are read for ever.

    Args:
        args: the flags.
        pretrained: ``models.pretrained.checksum`` of the weights that the run starts from; "" for random ones.
        dataset: the data set's name, "folder" for any folder, and the checksum of its images.
        dropout_rate: the model's.
        batch: images of one step on all ranks.
        precision: name of the number formats.
        jpeg_decoding: how JPEGs are decoded for training; "" where there are none to decode.
    """
    return {
        "--pretrained_dir": pretrained,
        "--model_type": canonical_name(args.model_type),
        "--dataset": dataset,
        **{f"--{name}": getattr(args, name) for name in deciding("result")},
        "--dropout": dropout_rate,
        "--train_batch_size of all processes": batch,
        "precision": precision,
        **({"--jpeg_decoding": jpeg_decoding} if jpeg_decoding else {}),
    }


def environment(
    args: argparse.Namespace, batch: Batch, device: str, processor: str, number_format: str
) -> dict[str, Any]:
    """Returns what may change the last digits of a run's result, by the names of saved states.

    Args:
        args: the flags.
        batch: the division of the images.
        device: its kind.
        processor: the device's name; if those of ranks differ, all of them.
        number_format: that matrix products are computed in.
    """
    return {
        "--device": device,
        "processor": processor,
        "number format": number_format,
        **{f"--{name}": getattr(args, name) for name in deciding("last digits")},
        "--train_batch_size": batch.per_rank,
        "--gradient_accumulation_steps": batch.num_micro_batches,
        "--eval_batch_size": batch.evaluated,
        "processes": dist_util.world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def defaults() -> dict[str, Any]:
    """Returns what a setting counts as that a saved state lacks: the flag's default, but for what was new with it."""
    return {f"--{flag.name}": flag.default for flag in FLAGS if flag.default is not None} | {"--jpeg_decoding": "full"}


def with_defaults(args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Returns every flag as it is typed, with its value and its default."""
    return {f"--{name}": (value, default_of(name)) for name, value in vars(args).items()}


def to_resume(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags, by their names, that a user types to resume the same run from its own state."""
    values = {flag: getattr(args, flag.name) for flag in FLAGS if flag.name not in ("resume", "local_rank")}
    return {flag.name: value for flag, value in values.items() if value != flag.default}


def to_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Returns those of ``to_resume`` that a user types to evaluate the run's weights."""
    return {name: value for name, value in to_resume(args).items() if name in read_by_evaluation()}


def same_on_all_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that must be the same on all ranks."""
    return {f"--{name}": value for name, value in vars(args).items() if name not in per_rank()}


def flags_page() -> str:
    """Returns the text of docs/flags.md."""
    intro = (
        "The last column says on what a flag's value decides. A run resumes only under the same values of those that "
        "decide on its **result**; only --num_steps may grow, of --train_batch_size the sum over all ranks counts, and "
        "of --pretrained_dir the weights, not the path. "
        "Another value of one that decides on the **last digits** is a warning. The others may change freely. "
        f"Every rank needs the same flags, except for {', '.join(f'--{flag.name}' for flag in FLAGS if flag.per_rank)}."
    )
    lines = ["# The flags of train.py", "", "<!-- Written by `make flags` from the table in utils/args.py. -->", ""]
    lines += textwrap.wrap(_as_code(intro), 120, break_on_hyphens=False)
    for title, flags in GROUPS.items():
        lines += ["", f"## {title}", "", "| flag | default | what it does | decides on |", "| --- | --- | --- | --- |"]
        for flag in flags:
            default = "off" if flag.default is False else f"`{flag.default}`"
            if flag.default is None:
                default = _as_code(flag.unset) or "required"
            help = flag.help
            if flag.choices and not flag.metavar and not all(choice in help for choice in flag.choices):
                help += f" ({', '.join(flag.choices)})"
            cells = (", ".join(f"`{option}`" for option in flag.options.split()), default, _as_code(help), flag.decides)
            lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def _as_code(text: str) -> str:
    """Marks flags and names with underscores as code."""
    return re.sub(r"--\w+|[\w./+-]*_[\w./+-]*\w", r"`\g<0>`", text)
