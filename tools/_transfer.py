"""One file over HTTP: resumed where it stopped, verified, whole or not there.

The checks are the size and the md5 that Google's store sends (cloud.google.com/storage/docs/xml-api/reference-headers).
What came of a file is in ``<path>.part``, and what is known of it in ``<path>.part.json``.  This module must not know
which files there are.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from utils import dist_util, files

TIMEOUT_SECS = 30.0
#: Waits after failures in a row; one more ends the download.  Bytes that arrive start the row anew.
PAUSES_SECS = (1.0, 2.0, 4.0, 8.0, 16.0)
CHUNK_BYTES = 2**18


class SourceError(OSError):
    """A server does not give the file, which the disk has no part in: another server may."""


class TransientError(SourceError):
    """A failure after which another try may do."""


class SilentError(TransientError):
    """Nothing came within ``TIMEOUT_SECS``."""


class CorruptError(TransientError):
    """All bytes came, and they are not those of the server's file."""


@dataclass(frozen=True)
class Remote:
    """A file as a server describes it; None where it does not say.

    Attributes:
        url: where it is.
        size: in bytes.
        md5: in hexadecimal.
        version: what changes with the file: an ETag, or a date.
        generation: Google's number of the object's version.
    """

    url: str
    size: int | None = None
    md5: str | None = None
    version: str | None = None
    generation: str | None = None


def describe(url: str, headers: Any, size: int | None) -> Remote:
    """What a response's headers say about the whole file."""
    etag = headers.get("ETag")
    if etag is None or etag.startswith("W/"):  # weak ones do not promise the same bytes
        etag = headers.get("Last-Modified")
    return Remote(url, size, sent_md5(headers), etag, headers.get("x-goog-generation"))


def sent_md5(headers: Any) -> str | None:
    """The md5, in hexadecimal, of ``x-goog-hash: crc32c=...,md5=...``, if there is one."""
    for part in ",".join(headers.get_all("x-goog-hash", [])).split(","):
        kind, _, value = part.strip().partition("=")
        if kind == "md5":
            try:
                digest = base64.b64decode(value, validate=True)
            except ValueError:
                return None
            return digest.hex() if len(digest) == 16 else None
    return None


# ---- one file ----


class Download:
    """One file on its way.

    Args:
        url: where it is.
        path: where it goes to.
        is_npz: it has to be an .npz.
        patient: it has no other source, so a server that gives nothing at all is asked again.
    """

    def __init__(self, url: str, path: str, is_npz: bool = True, patient: bool = True) -> None:
        self.path, self.part, self.notes = path, path + ".part", path + ".part.json"
        self.is_npz, self.patient = is_npz, patient
        self.remote = Remote(url)
        with contextlib.suppress(OSError, ValueError, TypeError), open(self.notes, encoding="utf-8") as f:
            noted = Remote(**json.load(f))
            if noted.url == url:
                self.remote = noted

    def offset(self) -> int:
        """Bytes that need not be fetched again: only those of a known version of the file."""
        if self.remote.version is None or not os.path.isfile(self.part):
            return 0
        return os.path.getsize(self.part)

    def forget(self) -> None:
        """Removes what is there of the file."""
        for path in (self.part, self.notes):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        self.remote = Remote(self.remote.url)

    def fetch(self) -> None:
        """Fetches what is missing, in as many tries as it takes, and verifies it; ``finish`` gives it its name.

        Raises:
            SourceError: the server does not give it; what is there of it stays for the next time.
            OSError: it could not be written.
        """
        failures, corrupt, farthest = 0, 0, self.offset()
        came_first = farthest
        while True:
            try:
                self.fetch_once()
                self.verify()
                return
            except TransientError as e:
                came = self.offset() > came_first or isinstance(e, CorruptError)
                if not (self.patient or came) and (isinstance(e, SilentError) or not self.offset()):
                    raise
                failures = 1 if self.offset() > farthest else failures + 1
                farthest = max(farthest, self.offset())
                corrupt += isinstance(e, CorruptError)
                if failures > len(PAUSES_SECS) or corrupt > 1:
                    raise
                tqdm.write(f"{os.path.basename(self.path)}: {e}; trying again", file=sys.stderr)
            time.sleep(PAUSES_SECS[failures - 1])

    def fetch_once(self) -> None:
        """One request for the bytes from ``offset`` on.

        Raises:
            TransientError: the answer broke off, or was none.
            SourceError: the server refuses.
            OSError: the disk does.
        """
        offset, url = self.offset(), self.remote.url
        if offset and offset == self.remote.size:
            return
        request = urllib.request.Request(url, headers={"User-Agent": "tools.download"})
        if offset:
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", str(self.remote.version))
        try:
            response = open_in_time(request)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # the file has become shorter
                self.forget()
            kind = TransientError if e.code in (408, 416, 429) or e.code >= 500 else SourceError
            raise kind(f"the server answered {e.code} ({e.reason}) for {url}") from e
        except urllib.error.URLError as e:
            if isinstance(e.reason, ssl.SSLCertVerificationError):
                raise SourceError(f"the certificate of {url} cannot be verified ({e.reason})") from e
            kind = SilentError if isinstance(e.reason, TimeoutError) else TransientError
            if re.match(r"Tunnel connection failed: 4\d\d", str(e.reason)):  # what a proxy refuses it goes on to refuse
                kind = SourceError
            raise kind(f"{url} cannot be reached ({e.reason})") from e
        except TimeoutError as e:
            raise SilentError(f"{url} gives no answer (not a byte within {TIMEOUT_SECS:g} s)") from e
        except (OSError, http.client.HTTPException) as e:
            raise TransientError(f"{url} gives no answer ({e or type(e).__name__})") from e
        with response:
            self.receive(response, offset)

    def receive(self, response: Any, offset: int) -> None:
        """Appends a response's body to the part, or begins it anew where the server sends the whole file."""
        headers = response.headers
        if response.status == 206:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            new = describe(self.remote.url, headers, int(sent[2]) if sent else None)
            known = replace(self.remote, md5=new.md5, size=self.remote.size or new.size)
            if sent is None or int(sent[1]) != offset or new != known:
                self.forget()
                raise TransientError("the server went on with another file, or at another byte")
        elif response.status == 200:
            self.forget()  # before the notes change: bytes of one version must not stand under another's
            length = headers.get("Content-Length", "")
            self.remote = describe(self.remote.url, headers, int(length) if length.isdecimal() else None)
            check_space(self.path, self.remote.size)
            with files.atomic_write(self.notes) as notes:
                notes.write(json.dumps(asdict(self.remote)).encode())
        else:
            raise SourceError(f"the server answered {response.status} ({response.reason}) for {self.remote.url}")
        self.append(response)

    def append(self, response: Any) -> None:
        """Appends a response's body to the part.

        Raises:
            TransientError: it ends too early.
        """
        options = dict(desc=os.path.basename(self.path), unit="B", unit_scale=True, unit_divisor=1024)
        with open(self.part, "ab") as f:
            with tqdm(total=self.remote.size, initial=f.tell(), **options, **dist_util.bar_options()) as bar:
                while chunk := read(response):
                    f.write(chunk)
                    bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
        got = os.path.getsize(self.part)
        if self.remote.size is not None and got != self.remote.size:
            raise TransientError(f"the connection broke off after {got:,} of {self.remote.size:,} bytes")

    def verify(self) -> None:
        """Compares the part, which is whole, with what the server told of the file.

        Raises:
            CorruptError: the bytes are not those of the server's file.  The part is removed: nobody
                knows which of them are wrong.
        """
        fault = self.fault()
        if fault is not None:
            self.forget()
            raise CorruptError(fault)

    def finish(self) -> None:
        """Gives the verified part its name."""
        os.replace(self.part, self.path)
        os.remove(self.notes)

    def fault(self) -> str | None:
        """What is wrong with the part, if anything."""
        if self.remote.md5 is not None:
            with open(self.part, "rb") as f:
                digest = hashlib.md5(usedforsecurity=False)
                while chunk := f.read(CHUNK_BYTES):
                    digest.update(chunk)
            if (got := digest.hexdigest()) != self.remote.md5:
                return f"what came has the md5 {got}, the server's file {self.remote.md5}"
        if self.is_npz and not zipfile.is_zipfile(self.part):
            return "what came is not an .npz archive"
        if self.is_npz and self.remote.md5 is None:  # then the archive's own checksums have to do
            try:
                with zipfile.ZipFile(self.part) as archive:
                    damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, EOFError, ValueError) as e:
                return f"what came is a damaged .npz archive ({e})"
            if damaged is not None:
                return f"what came is a damaged .npz archive (Bad CRC-32 for file {damaged!r})"
        return None


def open_in_time(request: urllib.request.Request) -> Any:
    """The response to a request, with the first byte of its body there.

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
    """The next bytes of a body; whatever the network does to it is a TransientError, unlike what the disk does."""
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as e:
        raise TransientError(f"the connection broke off ({e or type(e).__name__})") from e


def check_space(path: str, size: int | None) -> None:
    """Raises OSError if a file of ``size`` bytes cannot fit where ``path`` is."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if size is not None and size > free:
        raise OSError(f"it takes {size:,} bytes, and the disk has {free:,} free")
