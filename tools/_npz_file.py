"""An .npz that a tool writes, and the metadata beside it: shared by export, convert and download."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping

import numpy as np

from models import npz
from tools import _cli
from utils import checkpoint
from utils.errors import UserError
from utils.weights import Weights


def check_output(path: str, *sources: str, with_metadata: bool = True) -> None:
    """Checks that an .npz can be written, and makes its folder if need be.

    Args:
        path: what ``--output`` gives.
        sources: the files that are read.
        with_metadata: metadata is to stand beside the .npz; beside a source of the same stem it would be taken for that
            one's, and not fit.

    Raises:
        UserError: the file or the .json beside it cannot be written, or would replace what is read or somebody's own.
    """
    beside = checkpoint.metadata_path(path)
    taken = [os.path.realpath(x) for x in (path, *sources) if os.path.exists(x)]
    if with_metadata:
        taken += [os.path.realpath(checkpoint.metadata_path(x)) for x in sources if os.path.exists(x)]
    if os.path.realpath(beside) in taken:
        raise UserError(f"--output {path} has {beside} beside it, which is read or the same; give another name")
    if os.path.lexists(beside) and not is_metadata(beside):
        raise UserError(f"--output {path} would replace {beside}, which is no metadata of weights; give another name")
    _cli.check_output(path, *sources)


def is_metadata(path: str) -> bool:
    """Tells metadata of weights, as train.py and the tools write it, from other files."""
    try:
        with open(path, encoding="utf-8") as f:
            return "crc32" in json.load(f)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def write(path: str, arrays: Mapping[str, np.ndarray], metadata: checkpoint.CheckpointMetadata | None = None) -> None:
    """Writes arrays in the order of Google's files, and their metadata beside them.

    Metadata that stood there is of the file that is replaced, and goes with it.

    Args:
        path: of the .npz.
        arrays: by Google's names; in memory as they come, such as views of others.
        metadata: of the weights; its checksum is that of the arrays by these names.

    Raises:
        OSError: it could not be written.
    """
    ordered = {name: np.ascontiguousarray(x) for name, x in npz.in_files_order(arrays).items()}
    crc32 = checkpoint.checksum(Weights(path, ordered).tensors())
    with checkpoint.write_with_metadata(path, crc32, metadata) as f:
        npz.write(f, ordered)
    beside = checkpoint.metadata_path(path)
    if metadata is None and is_metadata(beside):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
