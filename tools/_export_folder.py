"""Writes new folders, as other libraries save models: whole or not at all.

A folder is written under a hidden temporary name and renamed when its files are on the disk, so that what a killed
export leaves is never taken for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from utils import files
from utils.errors import UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
#: Printed lines that open an image as ``images.read_image`` does, but for images of 16 bits, of floats and with damaged
#: EXIF; they need PIL's Image and ImageOps.
OPEN_IMAGE = (
    "# as in the training: turned as its EXIF says, transparency on white\n"
    'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGBA")\n'
    'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")\n'
)


def check_new_folder(path: str) -> None:
    """Makes the folder that a new one is to be in, if need be.

    Args:
        path: what ``--output`` gives.

    Raises:
        UserError: something is there already that is no empty folder, or nothing can be written there.
    """
    if os.path.realpath(path) == os.path.realpath("."):
        raise UserError(f"--output {path} is the current folder, which cannot be replaced; name a folder in it")
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"--output {path} is there already; this format writes a new folder, so give another name")
    files.check_writable(os.path.dirname(os.path.abspath(path)))


@contextlib.contextmanager
def temporary_folder(path: str) -> Iterator[str]:
    """Makes a hidden folder beside ``path`` for what is to be moved there; it is gone when the block ends.

    Raises:
        OSError: something could not be written, and says so.
    """
    parent, name = os.path.split(os.path.abspath(path))
    temporary = None
    try:
        temporary = tempfile.mkdtemp(prefix=f".{name}.", suffix=files.TEMPORARY, dir=parent)
        yield temporary
    except OSError as e:
        raise files.NotWritten(f"{path} could not be written ({e.strerror or e})") from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Makes a temporary folder that gets the name ``path`` when the block ends well.

    Args:
        path: a folder that is not there, or empty.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        files.set_usual_mode(temporary, 0o777)  # mkdtemp's own is 0700 whatever the user's umask
        for file in os.listdir(temporary):
            files.set_usual_mode(os.path.join(temporary, file), 0o666)  # and safetensors' own is 0600
            files.sync(os.path.join(temporary, file))
        files.sync(temporary)
        files.replace(temporary, path)
        files.sync(os.path.dirname(os.path.abspath(path)))


def write_weights(folder: str, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors on the CPU as safetensors, in PyTorch's dialect.

    Raises:
        OSError: they could not be written.
    """
    tensors = {name: x.detach().contiguous() for name, x in state.items()}
    try:
        safetensors.torch.save_file(tensors, os.path.join(folder, WEIGHTS), {"format": "pt", **(metadata or {})})
    except safetensors.SafetensorError as e:  # what it makes of a full disk
        raise OSError(str(e)) from e


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Writes a configuration into a folder."""
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
