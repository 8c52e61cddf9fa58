"""Converts weights of any layout to Google's .npz, exactly.

    python -m tools.convert model.safetensors --model_type ViT-B_16 --output checkpoint/ViT-B_16.npz
    python -m tools.convert output/cifar10_checkpoint.bin --output cifar10.npz

Reads .npz, .safetensors and PyTorch files in the names of Google, timm, transformers, big_vision or this project, and
folders with one.  The numbers stay the same; half precision becomes float32, but for an .npz's.  A head is kept, and
where files beside the weights name its classes, so does a .json beside the .npz.
"""

from __future__ import annotations

import argparse
import os
import sys

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models import npz, pretrained
from models.configs import CONFIGS
from tools import _cli, _npz_file
from utils import checkpoint, metadata
from utils.errors import UserError


def metadata_of(source: pretrained.Source) -> checkpoint.CheckpointMetadata | None:
    """Returns the metadata to write beside the .npz; None if no file names the classes."""
    known = source.metadata or metadata.Metadata("")
    if known.own is not None:
        return known.own
    names = known.classes
    if names is None or not len(set(names)) == len(names) == source.num_classes:
        return None
    config = CONFIGS[source.model_type]
    trained_for = config.size_of(source.arrays[npz.POSITIONS].shape[1])
    return checkpoint.CheckpointMetadata(
        source.model_type, known.img_size or trained_for, names, known.gelu or config.gelu, "", 0, -1.0
    )


def make_parser() -> _cli.Parser:
    """Returns the parser, with every flag."""
    p = _cli.Parser("convert", __doc__)
    p.add_argument("file", metavar="FILE", help="the weights: a file, or a folder with one")
    p.add_argument("--model_type", choices=CONFIGS, metavar="MODEL", help="such as ViT-B_16; by default what the file "
                   "shows")  # fmt: skip
    p.add_argument("--output", required=True, metavar="X.npz", help="where to write them")
    return p


def run(args: argparse.Namespace) -> int:
    """Converts what the flags name; returns the exit code.

    Raises:
        UserError: the user got something wrong.
        OSError: the file could not be written.
    """
    if not os.path.exists(args.file):
        raise UserError(f"there is no file {args.file}")
    if not args.output.endswith(".npz"):
        raise UserError(f"--output {args.output} does not end in .npz, which is what is written")
    source = pretrained.load(metadata.open_weights(args.file, strict=True), args.model_type)
    written = metadata_of(source)
    beside = checkpoint.metadata_path(source.path)
    _npz_file.check_output(args.output, source.path, beside, with_metadata=written is not None)
    _npz_file.write(args.output, source.arrays, written)
    head = "no head" if source.num_classes is None else f"a head of {source.num_classes} classes"
    print(f"{args.output}: {source.model_type}, {head}, {os.path.getsize(args.output):,} bytes")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("convert", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
