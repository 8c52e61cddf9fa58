"""Small data sets in CIFAR's format, which take the place of the published ones in a test."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torchvision

from utils.datasets import class_names


class Python2Pickler(pickle._Pickler):
    """Writes strings and bools as Python 2 did, who made the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        short = len(content) < 256
        self.write(pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
        self.write(struct.pack("B" if short else "<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[bool] = lambda self, value: self.save_long(int(value))


def python2_pickle(value: Any) -> bytes:
    """Returns a value as Python 2 pickled it."""
    buffer = io.BytesIO()
    pickler = Python2Pickler(buffer, protocol=2)
    pickler.memo[None] = None  # Python 2 counts what it has written from 1
    pickler.dump(value)
    return buffer.getvalue()


def tar_gz(files: Mapping[str, bytes]) -> bytes:
    """Returns an archive of files, by their names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    """Returns the checksum by which CIFAR is published."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class FakeCifar:
    """A small data set in CIFAR's format, put in the place of the published one.

    Args:
        name: cifar10 or cifar100.
        served: the folder that its archive is written to.
        port: of this machine, that it is downloaded from.
    """

    def __init__(
        self, name: str, served: Path, port: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
    ) -> None:
        fine = name == "cifar100"
        cls = self.published = torchvision.datasets.CIFAR100 if fine else torchvision.datasets.CIFAR10
        self.classes, self.folder = class_names(name), "cifar-100-python" if fine else "cifar-10-batches-py"
        train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
        meta, key = ("meta", "fine_label_names") if fine else ("batches.meta", "label_names")
        self.rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        self.labels: dict[str, list[int]] = {"train": [], "test": []}
        self.files = {meta: python2_pickle({key: self.classes})}
        for file in [*train, "test" if fine else "test_batch"]:
            split = "test" if file.startswith("test") else "train"
            rows = rng.integers(0, 256, (7, 3072), dtype=np.uint8)
            labels = rng.integers(0, len(self.classes), 7).tolist()
            self.rows[split].append(rows)
            self.labels[split] += labels
            batch: dict[str, Any] = {"data": rows, "batch_label": file, "filenames": [f"{i}.png" for i in range(7)]}
            batch |= {"fine_labels": labels, "coarse_labels": [0] * 7} if fine else {"labels": labels}
            self.files[file] = python2_pickle(batch)
        self.archive = tar_gz({f"{self.folder}/{file}": content for file, content in self.files.items()})
        assert (cls.base_folder, cls.meta["filename"]) == (self.folder, meta)
        assert [file for file, _ in cls.train_list] == train
        self.served = served / cls.filename
        self.served.write_bytes(self.archive)
        md5s = {file: md5(content) for file, content in self.files.items()}
        monkeypatch.setattr(cls, "url", f"http://127.0.0.1:{port}/{cls.filename}")
        monkeypatch.setattr(cls, "tgz_md5", md5(self.archive))
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(cls, attribute, [[file, md5s[file]] for file, _ in getattr(cls, attribute)])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5s[meta]})

    def write(self, root: Path, *, without: str = "", archive: bytes | None = None) -> Path:
        """Writes what somebody has brought: all files but one, and the archive; returns their folder."""
        (root / self.folder).mkdir(parents=True)
        for file, content in self.files.items():
            if file != without:
                (root / self.folder / file).write_bytes(content)
        if archive is not None:
            (root / self.published.filename).write_bytes(archive)
        return root / self.folder


class Touch:
    """Its pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")
