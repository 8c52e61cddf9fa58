"""Files of weights as names and arrays, whatever program wrote them: .npz, .safetensors, PyTorch's, or a folder.

A file is known by its first bytes, not by its ending, and nothing that it holds is run.  This module does not know
what the names mean (models/layouts.py does), nor where files come from.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import checkpoint
from utils.errors import UserError

#: Weights hardly compress: what unpacks to more than both is no checkpoint, but made to fill the memory.
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 2**28, 20
#: A safetensors file begins with the length of its header, at most so many bytes (huggingface/safetensors, README).
MAX_HEADER_BYTES = 100_000_000
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

#: What ``save_pretrained``, timm and the hub call a model's file, the preferred one first.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_SHARDS_REMEDY = "save the model with save_pretrained(FOLDER, max_shard_size='100GB') and give that folder"
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".npz")

#: Under which keys programs keep a state_dict among other things, and what wrappers put before every name.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")

#: First bytes of what people have under the name of weights, and what it is.
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for; `git lfs pull` brings that"),
    (b"<!doctype html", "an HTML page, which servers send instead of a file they do not give away"),
    (b"<html", "an HTML page, which servers send instead of a file they do not give away"),
    (b"<?xml", "an XML page, which servers send instead of a file they do not give away"),
    (b"\x93NUMPY", "a single array of NumPy (.npy), not an .npz of a whole model"),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a compressed .gz file; unpack it"),
    (b"7z\xbc\xaf", "a compressed .7z file; unpack it"),
    (b"Rar!", "a compressed .rar file; unpack it"),
)


@dataclass(frozen=True)
class Weights:
    """The contents of a file of weights.

    Attributes:
        path: the file; the one that was read, if a folder was named.
        arrays: numbers by the names in the file, without what wrappers put before all of them.  Half precision of
            PyTorch's and safetensors' files is float32 here; an .npz's arrays are as they are.
        metadata: a ``metadata.Metadata`` of files beside it, which ``metadata.open_weights`` reads; None without one.
    """

    path: str
    arrays: dict[str, np.ndarray]
    metadata: Any = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns the arrays as tensors, which share their memory; metadata has their checksum."""
        return {name: torch.from_numpy(np.require(x, requirements="W")) for name, x in self.arrays.items()}


def read(path: str) -> Weights:
    """Reads a file of weights, or the one in a folder.

    Args:
        path: an .npz, .safetensors or PyTorch file whatever its name, or a folder as ``save_pretrained`` writes.

    Raises:
        UserError: it is something else, which the message names, or damaged, or holds more than numbers.  The
            message begins with "it".
    """
    if os.path.isdir(path):
        path = file_in(path)
    try:
        kind = kind_of(path)
        return Weights(path, {"npz": read_npz, "safetensors": _read_safetensors, "torch": _read_torch}[kind](path))
    except OSError as e:
        raise UserError(f"it cannot be read ({e.strerror or e})") from e


def _indices(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith((".safetensors.index.json", ".bin.index.json"))]


def file_in(folder: str) -> str:
    """Returns the file of weights in a folder.

    Raises:
        UserError: there is none, or it is sharded, or there are several.
    """
    names = sorted(os.listdir(folder))
    for name in FOLDER_FILES:
        if name in names:
            return os.path.join(folder, name)
    if indices := _indices(folder):
        raise UserError(f"it has its weights in several files ({indices[0]}); {_SHARDS_REMEDY}")
    endings = [name for name in names if name.endswith(_ENDINGS) and not name.startswith(".")]
    candidates = [name for name in endings if not name.endswith("_last.pt")]  # training states
    if len(candidates) == 1:
        return os.path.join(folder, candidates[0])
    fault = f"has several files of weights ({', '.join(candidates[:5])}); name one" if candidates else "has no weights"
    raise UserError(f"it is a folder that {fault}; expected {' or '.join(FOLDER_FILES)}")


def kind_of(path: str) -> str:
    """Returns the format of a file, by its first bytes: npz, safetensors or torch.

    Raises:
        UserError: it is none of these.
    """
    with open(path, "rb") as f:
        head = f.read(512)
    if not head:
        raise UserError("it is empty; fetch it again")
    if head.startswith(b"PK"):
        return _kind_of_archive(path)
    if len(head) > 8 and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{":
        return "safetensors"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in _OTHER_FILES:
        if head.startswith(start) or text.startswith(start.lower()):
            raise UserError(f"it is {what}")
    if text.startswith(b"{"):
        is_index = b"weight_map" in text or path.endswith(".index.json")
        raise UserError(f"it is the list of several files; {_SHARDS_REMEDY}" if is_index else "it is a JSON text")
    if not head.startswith(b"\x80"):  # as every pickle does, which PyTorch's files of old are
        raise UserError(f"it is neither an .npz nor a .safetensors nor a PyTorch file: it begins with {head[:12]!r}")
    return "torch"


def _kind_of_archive(path: str) -> str:
    if not zipfile.is_zipfile(path):
        raise UserError("it is not an archive, or only the beginning of one: cut off or damaged; fetch it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise UserError(f"it is a zip archive with neither arrays nor tensors in it ({', '.join(names[:3])})")


# ---- .npz ----


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Reads every array of an .npz into memory.

    Raises:
        UserError: the file is no .npz, is damaged, or holds something other than numbers.
    """
    if not zipfile.is_zipfile(path):
        raise UserError("it is not an .npz archive, or only the beginning of one")
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * os.path.getsize(path)):
                raise UserError(f"it would unpack to {total / 2**30:.1f} GiB")
            # archive.read compares the checksum before anything of a member is believed; np.load does not.
            return {name.removesuffix(".npy"): _read_array(name, archive.read(name)) for name in archive.namelist()}
    except Pickled:
        raise
    except (ValueError, EOFError, KeyError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"it is a damaged .npz archive ({e}); fetch it again") from e


class Pickled(UserError):
    """An .npz holds objects of Python, which could run code."""


def _read_array(name: str, data: bytes) -> np.ndarray:
    """Reads one array of an .npz.

    Raises:
        UserError: it is none, before memory is taken for more numbers than are there.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise UserError(f"{name} is of a format that is not known")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise Pickled(f"it is a pickled .npz ({name} holds objects of Python, which could run code and are not read); "
                      "save its arrays as numbers")  # fmt: skip
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise UserError(f"{name} says it is of shape {shape}, and has {len(data) - file.tell():,} bytes")
    # np.lib.format.read_array copies piece by piece: a file of 419 MB takes 0.8 s instead of 0.5.
    numbers = bytearray(memoryview(data)[file.tell() :])
    array: np.ndarray = np.ndarray(shape, dtype, numbers, order="F" if is_fortran else "C")
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        # bfloat16, for which NumPy has no type: JAX's programs store its bits so
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


# ---- PyTorch's and safetensors' files ----


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _arrays(load_file(path))
    except (SafetensorError, OSError, KeyError, TypeError) as e:
        raise UserError(f"it is a damaged .safetensors file, cut off perhaps ({e}); fetch it again") from e


def _read_torch(path: str) -> dict[str, np.ndarray]:
    content = checkpoint.load_torch(path)
    if isinstance(content, dict) and {"format", "step", "optimizer"} <= content.keys():
        best = path.removesuffix("_last.pt") if path.endswith("_last.pt") else "<name>"
        raise UserError(f"it is a training state, which --resume takes; give the weights: {best}_checkpoint.bin")
    state = _unwrapped(content)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"it holds no state_dict (names and tensors); {checkpoint.SAVE_REMEDY}")
    if odd := [str(name) for name, x in state.items() if not isinstance(x, Tensor)]:
        raise UserError(
            f"it holds no state_dict (names and tensors): {', '.join(odd[:3])} is something else; "
            f"{checkpoint.SAVE_REMEDY}"
        )
    checkpoint.check_tensors(path, state.values())
    return _arrays({str(name): x for name, x in state.items()})


def _unwrapped(value: Any) -> Any:
    """Returns a state_dict without what programs wrap one in."""
    while isinstance(value, dict):
        inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), dict) and value[key]), None)
        if inner is None:
            break
        value = inner
    return value


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns tensors as arrays, half precision as float32, under names without what wrappers put before all."""
    names = list(tensors)
    if not names:
        raise UserError("it holds no tensors")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return {name: _array(x.detach()) for name, x in zip(names, tensors.values())}


def _array(x: Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy()
