"""Writes a fine-tuned checkpoint in the formats of other programs.

    python -m tools.export --load_model_dir output/cifar10_checkpoint.bin --format onnx --output cifar10.onnx

npz is Google's layout, from which a training starts; the .json beside it names the classes.  onnx and pt2
(torch.export) are programs that take any number of images (B, 3, S, S) in [-1, 1] and give logits.  timm
and hf are new folders, which those libraries load as they are.  Prints the lines that use what it wrote.
onnx needs the packages onnx and onnxscript; the others need nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models import commands, npz
from tools import _cli, _export_folder, _export_hf, _export_programs, _export_timm, _finetuned, _npz_file
from utils import checkpoint
from utils.errors import UserError

FOLDERS = {"timm": _export_timm.write, "hf": _export_hf.write}
FORMATS = ("npz", "onnx", "pt2", *FOLDERS)


def write_npz(loaded: _finetuned.Finetuned, path: str) -> str:
    """Writes Google's layout, head included, and a .json beside it if the classes have names; returns what uses it."""
    model = loaded.model
    arrays = npz.from_state_dict(model.state_dict(), model.config, model.img_size)
    metadata = metadata_of(loaded)
    _npz_file.write(path, arrays, metadata)
    note = "" if metadata is not None else (
        "# its classes have no names, or share one (--classes gives them), so there is no .json: "
        "a training that starts from it has a head of zeros\n"
    )  # fmt: skip
    command = ["--name", "NAME", "--dataset", "DATASET", "--model_type", loaded.model_type]
    command += ["--img_size", str(model.img_size), "--gelu", model.config.gelu, "--pretrained_dir", path]
    return f"{note}# a training: {commands.train_command(*command)}\n{commands.import_lines()}" + (
        "from dataclasses import replace\n"
        "import numpy as np\n"
        "from models.configs import CONFIGS\n"
        "from models.modeling import VisionTransformer\n"
        f"config = replace(CONFIGS[{loaded.model_type!r}], gelu={model.config.gelu!r})\n"
        f"model = VisionTransformer(config, img_size={model.img_size}, num_classes={model.num_classes}).eval()\n"
        f"model.load_from(np.load({path!r}))"
    )


def metadata_of(loaded: _finetuned.Finetuned) -> checkpoint.CheckpointMetadata | None:
    """Returns the metadata of a model as it was loaded; None if its classes have no names, or share one."""
    if loaded.classes is None or len(set(loaded.classes)) < len(loaded.classes):
        return None
    model = loaded.model
    known = loaded.metadata or checkpoint.CheckpointMetadata(
        "", 1, loaded.classes, "", dataset="", step=0, accuracy=-1.0
    )
    return replace(
        known, model_type=loaded.model_type, img_size=model.img_size, classes=loaded.classes, gelu=model.config.gelu
    )


# ---- the command line ----


def make_parser() -> _cli.Parser:
    """Returns the parser, with every flag."""
    p = _cli.Parser("export", __doc__)
    p.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    p.add_argument("--output", required=True, metavar="PATH", help="where to write it: a file, for timm and hf a new "
                   "folder")  # fmt: skip
    p.add_argument("--opset", type=_cli.parse_positive, help="version of ONNX's operators, 17 or more (TensorRT 8.6 "
                   "takes 17); PyTorch's choice if not given")  # fmt: skip
    _finetuned.add_flags(p)
    return p


def check_output(args: argparse.Namespace, with_metadata: bool) -> None:
    """Raises UserError if what the flags name cannot be written there."""
    read = args.load_model_dir
    sources = [os.path.join(read, name) for name in os.listdir(read)] if os.path.isdir(read) else [read]
    sources.append(checkpoint.metadata_path(read))
    if args.format in FOLDERS:
        _export_folder.check_new_folder(args.output)
        return
    if args.format == "pt2" and not args.output.endswith(".pt2"):
        raise UserError(f"--output {args.output} does not end in .pt2, which torch.export.load wants")
    if args.format == "onnx" and not args.output.endswith(".onnx"):
        raise UserError(f"--output {args.output} does not end in .onnx, by which its readers know the format")
    if args.format == "npz":
        _npz_file.check_output(args.output, *sources, with_metadata=with_metadata)
    else:
        _cli.check_output(args.output, *sources)


def run(args: argparse.Namespace) -> int:
    """Writes what the flags name; returns the exit code.

    Raises:
        UserError: the user got something wrong.
        OSError: it could not be written.
    """
    if args.opset is not None and args.format != "onnx":
        raise UserError(f"--opset is of --format onnx, not {args.format}; leave it out")
    loaded = _finetuned.load(args)
    check_output(args, with_metadata=metadata_of(loaded) is not None)
    writers: dict[str, Callable[[_finetuned.Finetuned, str], str]] = {
        "npz": write_npz,
        "onnx": partial(_export_programs.write_onnx, opset=args.opset),
        "pt2": _export_programs.write_pt2,
        **FOLDERS,
    }
    lines = writers[args.format](loaded, args.output)
    print(f"# {args.output}: {size_of(args.output):,} bytes; to use it:\n{lines}")
    return 0


def size_of(path: str) -> int:
    """Returns the bytes of a file or of a folder's files."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("export", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
