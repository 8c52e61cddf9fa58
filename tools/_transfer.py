"""One file over HTTP: resumed where it stopped, whole or not there.

Its final check is the md5 that Google's store sends (cloud.google.com/storage/docs/xml-api/reference-headers) or,
without one, the checksums in the .npz.  What came of a file is in ``<path>.part``; ``<path>.part.from`` has its address
and version.  This module must not know which files there are.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from typing import Any

from tqdm import tqdm

from utils import dist_util, files

TIMEOUT_SECS = 30.0
#: Tries in a row that bring nothing before the download ends, and the wait between them.
TRIES, PAUSE_SECS = 3, 2.0
CHUNK_BYTES = 2**16


class SourceError(OSError):
    """A server does not give the file, which the disk has no part in: another server may."""


class TransientError(SourceError):
    """A failure after which another try may do."""


class Download:
    """One file on its way.

    Args:
        url: where it is.
        path: where it goes to.
        is_npz: it has to be an .npz.
        patient: it has no other source, so a server that gives nothing at all is asked again.
    """

    def __init__(self, url: str, path: str, is_npz: bool = True, patient: bool = True) -> None:
        self.url, self.path, self.part, self.notes = url, path, path + ".part", path + ".part.from"
        self.is_npz, self.patient = is_npz, patient
        self.md5: str | None = None

    def version(self) -> str:
        """Returns the ETag or date of the file that the part is of; empty if it is another address's."""
        with contextlib.suppress(OSError, ValueError), open(self.notes, encoding="utf-8") as f:
            url, version = f.read().split("\n")
            return version if url == self.url else ""
        return ""

    def offset(self) -> int:
        """Bytes that need not be fetched again: those of a known version of the file."""
        return os.path.getsize(self.part) if self.version() and os.path.isfile(self.part) else 0

    def forget(self) -> None:
        """Removes what is there of the file."""
        for path in (self.part, self.notes):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def fetch(self) -> None:
        """Fetches what is missing and checks the whole, once more from the start if it is damaged.

        Raises:
            SourceError: the server does not give it; what is there of it stays for the next time.
            OSError: it could not be written.
        """
        for is_last in (False, True):
            self.fetch_rest()
            fault = self.fault()
            if fault is None:
                return
            self.forget()
            if is_last:
                raise SourceError(fault)
            tqdm.write(f"{os.path.basename(self.path)}: {fault}; fetching it again", file=sys.stderr)

    def fetch_rest(self) -> None:
        """Appends what is missing to the part, in as many requests as it takes while bytes come; see ``fetch``."""
        failures = 0
        while True:
            before = self.offset()
            try:
                return self.request()
            except TransientError as e:
                failures = 0 if self.offset() > before else failures + 1
                if failures >= TRIES or not (self.patient or self.offset()):
                    raise
                tqdm.write(f"{os.path.basename(self.path)}: {e}; trying again", file=sys.stderr)
            time.sleep(PAUSE_SECS)

    def request(self) -> None:
        """Asks once for the bytes that are missing.

        Raises:
            TransientError: the answer broke off, or was none.
            SourceError: the server refuses.
            OSError: the disk does.
        """
        request = urllib.request.Request(self.url, headers={"User-Agent": "tools.download"})
        if offset := self.offset():
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", self.version())  # another version comes whole
        try:
            response = open_in_time(request)
        except urllib.error.HTTPError as e:
            if e.code == 416 and offset:
                return  # nothing is after what is there: the final check decides
            kind = TransientError if e.code in (408, 429) or e.code >= 500 else SourceError
            raise kind(f"the server answered {e.code} ({e.reason}) for {self.url}") from e
        except TimeoutError as e:
            raise TransientError(f"{self.url} gives no answer (not a byte within {TIMEOUT_SECS:g} s)") from e
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", None) or e or type(e).__name__
            raise TransientError(f"{self.url} cannot be reached ({reason})") from e
        with response:
            self.append(response)

    def append(self, response: Any) -> None:
        """Appends a response's body to the part, or begins it anew where the server sends the whole file.

        Raises:
            TransientError: it ends too early.
        """
        headers = response.headers
        self.md5 = sent_md5(headers)
        check_space(self.path, response.length)
        with open(self.part, "ab" if response.status == 206 else "wb") as f:
            if response.status != 206:
                with open(self.notes, "w", encoding="utf-8") as notes:
                    notes.write(f"{self.url}\n{headers.get('ETag') or headers.get('Last-Modified') or ''}")
            total = None if response.length is None else f.tell() + response.length
            options = dict(desc=os.path.basename(self.path), unit="B", unit_scale=True, unit_divisor=1024)
            with tqdm(total=total, initial=f.tell(), **options, **dist_util.bar_options()) as bar:
                while chunk := read(response):
                    f.write(chunk)
                    bar.update(len(chunk))
            files.flush(f)
            if response.length:
                raise TransientError(f"the connection broke off after {f.tell():,} of {total:,} bytes")

    def finish(self) -> None:
        """Gives the part, which ``fetch`` has checked, its name."""
        files.replace(self.part, self.path)
        self.forget()

    def fault(self) -> str | None:
        """Compares the part, which is whole, with what the server sent of it; returns what is wrong, if anything."""
        if self.md5 is not None:
            with open(self.part, "rb") as f:
                digest = hashlib.md5(usedforsecurity=False)
                while chunk := f.read(CHUNK_BYTES):
                    digest.update(chunk)
            if (got := digest.hexdigest()) != self.md5:
                return f"what came has the md5 {got}, the server's file {self.md5}"
        if self.is_npz and not zipfile.is_zipfile(self.part):
            return "what came is no .npz archive"
        if self.is_npz and self.md5 is None:  # then the archive's own checksums have to do
            try:
                with zipfile.ZipFile(self.part) as archive:
                    if damaged := archive.testzip():
                        return f"what came is a damaged .npz archive (Bad CRC-32 for file {damaged!r})"
            except (zipfile.BadZipFile, OSError, EOFError, ValueError) as e:
                return f"what came is a damaged .npz archive ({e})"
        return None


def sent_md5(headers: Any) -> str | None:
    """Returns the md5, in hexadecimal, of ``x-goog-hash: crc32c=...,md5=...``, if there is one."""
    sent = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", ",".join(headers.get_all("x-goog-hash", [])))
    return None if sent is None else base64.b64decode(sent[1]).hex()


def open_in_time(request: urllib.request.Request) -> Any:
    """Returns the response to a request, with the first byte of its body there.

    Raises:
        TimeoutError: that took longer than ``TIMEOUT_SECS`` in all.  A socket's own limit begins anew with each
            address that is tried, with the proxy's answer, and with each byte of the headers.
        OSError: see ``urllib.request.urlopen``.
    """
    outcome: list[Any] = []

    def open_it() -> None:
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
            response.peek(1)
            outcome.append(response)
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECS)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def read(response: Any) -> bytes:
    """Returns the next bytes of a body; whatever the network does to it is a TransientError, unlike the disk's."""
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as e:
        raise TransientError(f"the connection broke off ({e or type(e).__name__})") from e


def check_space(path: str, size: int | None) -> None:
    """Raises OSError if a file of ``size`` bytes cannot fit where ``path`` is."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if size is not None and size > free:
        raise OSError(f"it takes {size:,} bytes, and the disk has {free:,} free")
