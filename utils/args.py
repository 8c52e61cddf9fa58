"""The command line: every flag, what is wrong with their values, and the files that they name.

The flags and their defaults are the reference script's (github.com/jeonsworld/ViT-pytorch), and this
project's own.  This module must not know what the flags do.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any, NoReturn

import torch

from models.configs import CONFIGS, canonical_name
from utils import dist_util, hardware
from utils.errors import UserError
from utils.precision import AMP_BACKENDS, AMP_DTYPES, OPT_LEVELS
from utils.scheduler import DECAY_TYPES

logger = logging.getLogger("train")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once a machine: each has its own command line; the flags are for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n" if dist_util.is_first_of_machine() else None)


def parse_bool(text: str) -> bool:
    """true/false in the usual spellings."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def make_parser() -> Parser:
    """Every flag of the command line."""
    p = Parser(
        prog="train.py",
        description="Fine-tune a Vision Transformer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--name", required=True, help="name of this run: of its checkpoint and its logs")
    p.add_argument("--dataset", default="cifar10", help="cifar10, cifar100, digits, or a folder of pictures")
    p.add_argument("--data_dir", default="./data", help="where cifar10 and cifar100 are downloaded to")
    p.add_argument("--model_type", choices=CONFIGS, default="ViT-B_16", metavar="MODEL", help=", ".join(CONFIGS))
    p.add_argument(
        "--pretrained_dir",
        default=None,
        metavar="PATH",
        help="weights to start from: Google's .npz, a .safetensors or PyTorch file in the names of timm, transformers "
        "or this project, or a folder with one; by default MODEL's in checkpoint/; '' trains from random weights",
    )
    p.add_argument("--zero_head", action="store_true", help="start from a head of zeros, also where the classes of "
                   "--pretrained_dir are the data set's")  # fmt: skip
    p.add_argument("--output_dir", default="output", help="where checkpoints are written")
    p.add_argument("--img_size", type=int, default=224, help="side of the pictures the model sees, in pixels")
    p.add_argument("--train_batch_size", type=int, default=512, help="pictures of one update, per process")
    p.add_argument("--eval_batch_size", type=int, default=64, help="pictures evaluated at once")
    p.add_argument("--eval_every", type=int, default=100, help="updates between two evaluations")
    p.add_argument("--log_every", type=int, default=10, help="updates between two lines of metrics")
    p.add_argument("--learning_rate", type=float, default=3e-2, help="of SGD, at its highest")
    p.add_argument("--weight_decay", type=float, default=0.0, help="of SGD, on all weights")
    p.add_argument("--num_steps", type=int, default=10000, help="updates")
    p.add_argument("--decay_type", choices=DECAY_TYPES, default="cosine", help="how the learning rate falls")
    p.add_argument("--warmup_steps", type=int, default=500, help="updates over which the learning rate rises")
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="norm to which gradients are clipped")
    p.add_argument("--dropout", type=float, default=None, help="dropout rate, instead of the model's own")
    p.add_argument("--gelu", choices=("erf", "tanh"), default="erf", help="tanh is what Google's code computes")
    p.add_argument("--hflip", action="store_true", help="mirror half of the training pictures")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="what computes")
    p.add_argument("--num_workers", type=int, default=None, help="decoding processes, for folders of large pictures")
    p.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH",
        help="auto: go on where a run of this name was stopped; none: start over; or a <name>_last.pt",
    )  # fmt: skip
    p.add_argument(
        "--save_every", type=int, default=None, help="updates between two saved states; default: at each evaluation"
    )
    p.add_argument("--deterministic", action="store_true", help="the same bits in each run on CUDA, too; costs speed")
    p.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by torch.distributed.launch")
    p.add_argument("--seed", type=int, default=42, help="of the data order, crops, dropout and initial weights")
    p.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="parts into which the batch of an update is split"
    )
    p.add_argument("--fp16", action="store_true", help="mixed precision")
    p.add_argument("--fp16_opt_level", choices=OPT_LEVELS, default="O2", help="how much of it, as apex counts")
    p.add_argument("--amp_dtype", choices=AMP_DTYPES, default="auto", help="auto: float16 on CUDA, else bfloat16")
    p.add_argument("--amp_backend", choices=AMP_BACKENDS, default="native", help="apex needs one that still has amp")
    p.add_argument("--compile", action="store_true", help="torch.compile the model, for long runs")
    p.add_argument("--loss_scale", type=float, default=0, help="fixed loss scale for --fp16; 0: dynamic if needed")
    p.add_argument(
        "-v", "--eval_only", type=parse_bool, nargs="?", const=True, default=False, metavar="BOOL",
        help="evaluate a fine-tuned checkpoint instead of training",
    )  # fmt: skip
    p.add_argument("--load_model_dir", default=None, help="what -v evaluates, if not OUTPUT_DIR/NAME_checkpoint.bin: a "
                   "file or folder as for --pretrained_dir, with its head")  # fmt: skip
    return p


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for what the types of the flags let through; fills in the defaults that depend on others."""
    at_least_one = (
        "img_size", "train_batch_size", "eval_batch_size", "eval_every", "log_every", "num_steps",
        "gradient_accumulation_steps", "save_every",
    )  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected at least 1")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "seed", "loss_scale"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    if not args.max_grad_norm > 0:
        raise UserError(f"--max_grad_norm is {args.max_grad_norm}, expected more than 0 (inf never clips)")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UserError(f"--dropout is {args.dropout}, expected at least 0 and less than 1")
    if os.path.basename(args.name) != args.name or args.name in ("", ".", "..") or not args.name.isprintable():
        raise UserError(f"--name {args.name!r} names files; it must not be empty, a path or unprintable")
    if len(os.fsencode(args.name)) > 200:
        raise UserError(f"--name has {len(args.name)} characters, too many for the names of files")
    if args.train_batch_size % args.gradient_accumulation_steps:
        raise UserError(
            f"--train_batch_size {args.train_batch_size} is not a multiple of "
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"
        )
    if args.seed >= 2**63:
        raise UserError(f"--seed is {args.seed}, expected less than 2**63")
    if args.warmup_steps >= args.num_steps and not args.eval_only:
        logger.warning(
            "--warmup_steps %d of --num_steps %d: the learning rate does not get to fall",
            args.warmup_steps,
            args.num_steps,
        )
    half = (args.fp16_opt_level, args.amp_dtype, args.amp_backend, args.loss_scale) != ("O2", "auto", "native", 0)
    if half and not args.fp16:
        logger.warning("--fp16_opt_level, --amp_dtype, --amp_backend and --loss_scale have no effect without --fp16")
    if args.fp16 and args.amp_backend == "apex" and args.amp_dtype == "bfloat16":
        raise UserError("--amp_backend apex computes in float16 only; use --amp_backend native for bfloat16")
    if args.load_model_dir is not None and not args.eval_only:
        raise UserError("--load_model_dir names what -v evaluates; training starts from --pretrained_dir")
    if args.zero_head and (args.eval_only or args.pretrained_dir == ""):
        logger.warning("--zero_head has no effect without weights to train on from")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers is {args.num_workers}, expected 0 or more")


#: TEMPORARY
RESULT_FLAGS = (
    "zero_head", "img_size", "learning_rate", "weight_decay", "num_steps", "decay_type", "warmup_steps",
    "max_grad_norm", "gelu", "hflip", "seed", "eval_every", "loss_scale",
)  # fmt: skip
OWN_FLAGS = ("local_rank", "dataset", "data_dir", "pretrained_dir", "output_dir", "load_model_dir", "num_workers")


def decoding_workers(args: argparse.Namespace) -> int:
    """Returns how many processes decode images."""
    return min(8, hardware.num_cpus()) if args.num_workers is None else args.num_workers


def settings(
    args: argparse.Namespace, pretrained: str, dataset_checksum: str, dropout_rate: float, batch: int, precision: str
) -> dict[str, Any]:
    """Returns what decides on a run's result, by the names of the flags: a run resumes only under the same.

    Args:
        args: the flags.
        pretrained: path of the weights that the run starts from, given or found.
        dataset_checksum, dropout_rate, precision: of the images, of the model, and the name of the number formats.
        batch: images of one step on all ranks.
    """
    is_folder = os.path.isdir(args.dataset) and args.dataset not in ("cifar10", "cifar100", "digits")
    return {
        "--pretrained_dir": pretrained,
        "--model_type": canonical_name(args.model_type),
        "--dataset": f"{'folder' if is_folder else args.dataset} {dataset_checksum}",
        **{f"--{name}": getattr(args, name) for name in RESULT_FLAGS},
        "--dropout": dropout_rate,
        "--train_batch_size of all processes": batch,
        "precision": precision,
    }


def environment(args: argparse.Namespace, batch: int, num_micro_batches: int, device: str) -> dict[str, Any]:
    """Returns what may change the last digits of a run's result.

    Args:
        args: the flags.
        batch, num_micro_batches: of one step on each rank.
        device: its kind.
    """
    return {
        "--device": device,
        "--train_batch_size": batch,
        "--gradient_accumulation_steps": num_micro_batches,
        "--eval_batch_size": args.eval_batch_size,
        "--compile": args.compile,
        "--deterministic": args.deterministic,
        "processes": dist_util.world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def defaults() -> dict[str, Any]:
    """Returns the default of every flag that has one, by its name: what a setting counts as that a state lacks."""
    parser = make_parser()
    return {f"--{a.dest}": a.default for a in parser._actions if a.default is not None}


def same_on_all_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that must be the same on all ranks."""
    return {f"--{name}": value for name, value in vars(args).items() if name not in OWN_FLAGS}
