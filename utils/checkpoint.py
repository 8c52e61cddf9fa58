"""Files of weights: written whole or not at all, read without running anything in them.

Source of the habits: timm (safe loading with an explanation).  This module does not know which model
the weights belong to.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

import torch
from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends well.

    Whoever looks at ``path``, even after a power cut, finds the old file or the whole new one.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    folder = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(fd, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own is 0600 whatever the user's umask
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be synced; the file itself is
        folder_fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)


def check_writable(folder: str) -> None:
    """Makes a folder if need be.

    Raises:
        ValueError: files cannot be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"the folder {folder} cannot be written ({e.strerror}); name another, or free it") from e


def save_weights(path: str, state: Mapping[str, Tensor]) -> None:
    """Writes a plain state_dict, its tensors on the CPU."""
    with atomic_write(path) as f:
        torch.save({name: x.detach().cpu() for name, x in state.items()}, f)


def load_weights(path: str) -> dict[str, Tensor]:
    """Reads a state_dict, without the ``module.`` that a data-parallel wrapper puts before names.

    Raises:
        ValueError: the file is missing, damaged, or holds something else than tensors.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}; train first, or name one with --load_model_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        # torch's own text advises to load the file without safety.
        raise ValueError(
            f"{path} is no checkpoint, or holds more than tensors, which could run code and is not read; "
            "save `model.state_dict()` and give that file"
        ) from e
    except Exception as e:  # damaged bytes lead the reader to IndexError, AssertionError, struct.error and more
        raise ValueError(f"{path} cannot be read as a checkpoint of torch.save; is it cut off or damaged?") from e
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(x, Tensor) for k, x in state.items())
    if not named or not state:
        raise ValueError(
            f"{path} holds no state_dict (names and tensors); save `model.state_dict()` and give that file"
        )
    return {name.removeprefix("module."): x for name, x in state.items()}
