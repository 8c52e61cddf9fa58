"""Files of weights: written whole or not at all, read without running anything in them.

Beside fine-tuned weights, ``<name>_checkpoint.bin``, stand their metadata, ``<name>_checkpoint.json``: what a
program needs to use them.  A training state, ``<name>_last.pt``, is what a run needs to resume.  Source of the
habits: timm (safe loading with an explanation).  This module must not know models.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import itertools
import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pickle import UnpicklingError
from types import NoneType
from typing import IO, Any

import torch
from torch import Tensor

from utils import files
from utils.errors import UserError

STATE_FORMAT = 2


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of fine-tuned weights.

    Attributes:
        model_type, img_size, gelu: as the flags of the training.
        classes: their names, in the order of the head's outputs.
        dataset: what they were trained on; empty where it is not known.
        step: steps of their training; 0 where it is not known.
        accuracy: on the test images, 0 to 1; -1 where it is not known.
        test_fraction: share of the data set that was tested on, by the images' names (utils/split.py); None where the
            data set has a part to test on, or it is not known.
    """

    model_type: str
    img_size: int
    classes: list[str]
    gelu: str
    dataset: str
    step: int
    accuracy: float
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        kinds: tuple[Any, ...] = (str, int, list, str, str, int, (int, float), (int, float, NoneType))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        wrong = [n for (n, x), kind in zip(values.items(), kinds) if not isinstance(x, kind) or isinstance(x, bool)]
        if wrong or not all(isinstance(name, str) for name in self.classes):
            raise UserError(f"{', '.join(wrong) or 'classes'}: of another kind than expected")
        if self.img_size < 1 or not self.classes or len(set(self.classes)) < len(self.classes):
            raise UserError("img_size or classes: impossible values")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError("test_fraction: impossible value")


def save_weights(path: str, state: Mapping[str, Tensor], metadata: CheckpointMetadata | None = None) -> int:
    """Writes a plain state_dict, its tensors on the CPU, and their metadata beside it; see ``write_with_metadata``.

    Returns:
        The checksum of the weights.
    """
    tensors = {name: x.detach().cpu() for name, x in state.items()}
    crc32 = checksum(tensors)
    with write_with_metadata(path, crc32, metadata) as f:
        torch.save(tensors, f)
    return crc32


@contextlib.contextmanager
def write_with_metadata(path: str, crc32: int, metadata: CheckpointMetadata | None = None) -> Iterator[IO[bytes]]:
    """Opens a file for weights, as ``files.atomic_write`` does, and writes their metadata beside it.

    The weights are on the disk under a temporary name when the metadata take their place, and take
    their own at once after it: a full disk leaves the old pair as it was.  For a kill between the two,
    the metadata hold a checksum of their weights, by which ``read_metadata`` knows them.

    Args:
        path: of the weights.
        crc32: ``checksum`` of what the block writes, by the names that the file has.
        metadata: of the weights; None to write none.
    """
    with files.atomic_write(path) as f:
        yield f
        if metadata is not None:
            files.flush(f)
            known = {name: value for name, value in asdict(metadata).items() if value is not None}
            text = json.dumps({**known, "crc32": crc32}, indent=1, allow_nan=False)
            with files.atomic_write(metadata_path(path)) as beside:
                beside.write(text.encode() + b"\n")


def keep_earlier(path: str) -> str:
    """Gives weights, and the metadata beside them, a second name, ``<path>.earlier-N``, under which they stay.

    Whoever writes ``path`` afterwards replaces only the first name.  A kill at any point leaves both files under the
    first name or both under the second, and trying again takes the second name that is there already.

    Returns:
        The second name of the weights.

    Raises:
        OSError: the disk cannot hold them twice, where it has no links.
    """
    beside, (stem, ending) = metadata_path(path), os.path.splitext(path)
    for n in itertools.count(1):
        kept, kept_beside = f"{stem}.earlier-{n}{ending}", f"{stem}.earlier-{n}.json"
        if _same_file(path, kept):
            return kept
        if not os.path.exists(kept) and (not os.path.exists(kept_beside) or _same_file(beside, kept_beside)):
            break
    files.remove_stale(kept, kept_beside)  # of a copy that a kill interrupted, where the disk has no links
    if os.path.exists(beside) and not os.path.exists(kept_beside):
        _link(beside, kept_beside)
    _link(path, kept)
    return kept


def _same_file(path: str, other: str) -> bool:
    """Compares two files that may be missing: links to one file, or copies of it, are the same."""
    if not (os.path.exists(path) and os.path.exists(other)):
        return False
    return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)


def _link(path: str, other: str) -> None:
    try:
        os.link(path, other)
    except OSError:  # exFAT and some network disks have no links
        try:
            with open(path, "rb") as source, files.atomic_write(other) as copy:
                shutil.copyfileobj(source, copy)
        except OSError:  # it may not be read, or there is no room for two
            os.rename(path, other)


def checksum(state: Mapping[str, Tensor]) -> int:
    """CRC-32 of all tensors' bytes, in the order of their names."""
    crc = 0
    for _, x in sorted(state.items()):
        crc = zlib.crc32(x.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


class Unmatched(UserError):
    """Metadata are of other weights than those that they stand beside."""


def metadata_path(path: str) -> str:
    """Returns the path of the metadata of weights: a .json of the same name."""
    return os.path.splitext(path)[0] + ".json"


def read_metadata(path: str, state: Mapping[str, Tensor]) -> CheckpointMetadata | None:
    """Reads the metadata beside the weights ``path``, which hold ``state``; None if there are none.

    Raises:
        UserError: it cannot be read, or it is of other weights.
    """
    beside = metadata_path(path)
    if beside == path or not os.path.isfile(beside):
        return None
    try:
        with open(beside, encoding="utf-8") as f:
            found = json.load(f)
        found = {"test_fraction": None, **found}  # which is there only where it is known
        metadata = CheckpointMetadata(**{field.name: found[field.name] for field in fields(CheckpointMetadata)})
    except KeyError as e:
        raise UserError(f"{beside} does not describe a checkpoint: it has no {e}; remove it") from e
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{beside} does not describe a checkpoint ({e}); remove it") from e
    if found.get("crc32") != checksum(state):
        raise Unmatched(
            f"{beside} describes other weights than {path} holds: one was copied without the other, "
            "or a run was stopped between writing the two; remove it"
        )
    return metadata


def _check_archive(path: str) -> None:
    """Raises UserError if a file of torch.save would take more memory than it has bytes."""
    if not zipfile.is_zipfile(path):
        return  # the format of old, whose tensors are compared with the file's size when they are read
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
            raise UserError("it would unpack to more than it holds")


def check_tensors(path: str, tensors: Iterable[Tensor]) -> None:
    """Raises UserError for a tensor that is larger than what the file holds of it, or of a special kind."""
    size = os.path.getsize(path)
    for x in tensors:
        if x.layout != torch.strided or x.device.type != "cpu" or x.is_quantized:
            raise UserError("it holds a tensor of a special kind")
        if x.numel() * x.element_size() > min(x.untyped_storage().nbytes(), size):
            raise UserError(f"it has a tensor of shape {tuple(x.shape)} without that many numbers")


SAVE_REMEDY = "save `model.state_dict()` and give that file"


def load_torch(path: str) -> Any:
    """Reads a file of torch.save: tensors and containers of them, and argparse's flags, which trainers put beside.

    Raises:
        UserError: it is damaged, or holds anything else, which could run code.  The message begins with "it".
    """
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(), open(path, "rb") as f:
            warnings.simplefilter("ignore")  # torch's words on old formats, or on bytes that are none of its own
            return torch.load(f, map_location="cpu", weights_only=True)  # a path it would judge by its ending
    except UnpicklingError as e:
        # torch's own text advises to load the file without safety.
        raise UserError(
            f"it is no checkpoint, or holds more than tensors, which could run code and is not read; {SAVE_REMEDY}"
        ) from e
    except Exception as e:  # damaged bytes lead the reader to IndexError, AssertionError, struct.error and more
        raise UserError("it is no file of torch.save, or cut off or damaged") from e


def load_weights(path: str) -> dict[str, Tensor]:
    """Reads a state_dict that this program wrote.

    Raises:
        UserError: the file is missing, damaged, or holds something else than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    try:
        state = load_torch(path)
        named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(x, Tensor) for k, x in state.items())
        if not named or not state:
            raise UserError(f"it holds no state_dict (names and tensors); {SAVE_REMEDY}")
        check_tensors(path, state.values())
    except UserError as e:
        raise UserError(f"{path} cannot be read as a checkpoint: {e}") from e
    return state


#: What a training state holds, and of which kind; ``run.Run.save`` says what each is for.
STATE_KINDS: dict[str, type] = {
    "run_id": str,
    "settings": dict,
    "environment": dict,
    "batch": dict,
    "pretrained": str,
    "step": int,
    "last_eval_step": int,
    "best_accuracy": float,
    "best_step": int,
    "best_result": dict,
    "best_crc32": int,
    "data": dict,
    "model": dict,
    "optimizer": dict,
    "precision": dict,
    "log": dict,
}
#: What a state counts as having that is older than the entry.
STATE_DEFAULTS: dict[str, Any] = {"best_crc32": 0, "data": {}, "run_id": "", "pretrained": ""}
#: Names of format 1, which is read for ever, and what they are called now.
FORMAT_1_NAMES = {"circumstances": "environment", "evaluated": "last_eval_step", "best": "best_result"}


def save_state(path: str, state: Mapping[str, Any]) -> None:
    """Writes a training state, which has the names of ``STATE_KINDS``; see ``files.atomic_write``."""
    assert state.keys() == STATE_KINDS.keys()
    with files.atomic_write(path) as f:
        torch.save({"format": STATE_FORMAT, **state}, f)


def load_state(path: str) -> dict[str, Any]:
    """Reads a training state of any format, and compares the checksums of all it holds.

    Returns:
        What it holds, by the names of ``STATE_KINDS``.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no training state {path}; --resume takes a <name>_last.pt")
    try:
        _check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged bytes lead the reader to many classes; what could run code is not read
        raise UserError(
            f"{path} cannot be read as a training state (damaged, or not written by this program); "
            "--resume none starts over"
        ) from e
    if isinstance(state, dict) and state and all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(
            f"{path} holds weights and no training state of this version; --resume takes a <name>_last.pt, "
            "or none to start over"
        )
    try:
        version = state.pop("format")
        state = STATE_DEFAULTS | (_from_format_1(state) if version == 1 else state)
        check_tensors(path, tensors_in(state))
        same = state.keys() == STATE_KINDS.keys() and version in (1, STATE_FORMAT)
        if not same or any(type(state[name]) is not kind for name, kind in STATE_KINDS.items()):
            raise UserError("another version's")
        if not 0 <= state["last_eval_step"] <= state["step"]:
            raise UserError("impossible values")
        # Older states were computed in the format that their settings ask for, such as "bfloat16 O2".
        state["environment"].setdefault("number format", state["settings"].get("precision", "").partition(" ")[0])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} holds no training state of this version; --resume none starts over") from e
    return state


def _from_format_1(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state of format 1 with today's names; what it lacks has its default."""
    renamed = {FORMAT_1_NAMES.get(name, name): value for name, value in state.items()}
    given = renamed["environment"].get("--train_batch_size", 0)
    batch = {"total": renamed["settings"].get("--train_batch_size of all processes", 0), "given": given}
    return {"batch": batch, **renamed}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for x in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(x)
