"""Downloads Google's pretrained weights into the names that train.py looks for.

    python -m tools.download ViT-B_32
    python -m tools.download --list

The files are verified by the size and the md5 that the store sends, and appear whole or not at all.  A
download that stops leaves a .part file, with which the same command goes on.  The names are Google's
(github.com/google-research/vision_transformer); this tool must not fetch anything else.
"""

from __future__ import annotations

import argparse
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
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models.configs import canonical_name
from models.published import BUCKET, UPSTREAMS, file_name, upstreams
from tools import cli
from utils import checkpoint, dist_util, runs

TIMEOUT_SECS = 30.0
#: Waits after failures in a row; one more ends the download.  Bytes that arrive start the row anew.
PAUSES_SECS = (1.0, 2.0, 4.0, 8.0, 16.0)
CHUNK_BYTES = 2**18


class TransientError(OSError):
    """A failure after which another try may do."""


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
    """One file on its way, with what is there of it: ``path``.part, and what is known in ``path``.part.json."""

    def __init__(self, url: str, path: str) -> None:
        self.path, self.part, self.notes = path, path + ".part", path + ".part.json"
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
        """Fetches what is missing, in as many tries as it takes, and puts the verified file in its place.

        Raises:
            OSError: it could not be fetched or written; what is there of it stays for the next time.
        """
        failures, corrupt, farthest = 0, 0, self.offset()
        while True:
            try:
                self.fetch_once()
                self.finish()
                return
            except TransientError as e:
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
            OSError: the server refuses, or the disk does.
        """
        offset, url = self.offset(), self.remote.url
        if offset and offset == self.remote.size:
            return
        request = urllib.request.Request(url, headers={"User-Agent": "tools.download"})
        if offset:
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", str(self.remote.version))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECS) as response:
                self.receive(response, offset)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # the file has become shorter
                self.forget()
            if e.code in (408, 416, 429) or e.code >= 500:
                raise TransientError(f"the server answered {e.code} ({e.reason}) for {url}") from e
            raise OSError(f"the server answered {e.code} ({e.reason}) for {url}") from e
        except urllib.error.URLError as e:
            if isinstance(e.reason, ssl.SSLCertVerificationError):
                raise OSError(f"the certificate of {url} cannot be verified ({e.reason})") from e
            raise TransientError(f"{url} cannot be reached ({e.reason})") from e
        except (TimeoutError, ConnectionError, http.client.HTTPException) as e:
            raise TransientError(f"{url} gives no answer ({e or type(e).__name__})") from e

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
            with checkpoint.atomic_write(self.notes) as notes:
                notes.write(json.dumps(asdict(self.remote)).encode())
        else:
            raise OSError(f"the server answered {response.status} ({response.reason}) for {self.remote.url}")
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

    def finish(self) -> None:
        """Verifies the part and gives it its name.

        Raises:
            CorruptError: the bytes are not those of the server's file.  The part is removed: nobody
                knows which of them are wrong.
        """
        fault = self.fault()
        if fault is not None:
            self.forget()
            raise CorruptError(fault)
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
        if not zipfile.is_zipfile(self.part):
            return "what came is not an .npz archive"
        if self.remote.md5 is None:  # then the archive's own checksums have to do
            try:
                with zipfile.ZipFile(self.part) as archive:
                    damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, EOFError, ValueError) as e:
                return f"what came is a damaged .npz archive ({e})"
            if damaged is not None:
                return f"what came is a damaged .npz archive (Bad CRC-32 for file {damaged!r})"
        return None


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


# ---- which file ----


def check_address(url: str) -> None:
    """Raises ValueError unless files can be below such an address."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        fits = False
    if not fits or not all("!" <= letter <= "~" for letter in url):
        raise ValueError(f"--base_url {url} is no address; expected https://HOST/FOLDER, or http://")


def choose(name: str, upstream: str | None) -> tuple[str, str]:
    """The upstream and the name in ``UPSTREAMS`` of a model's file.

    Raises:
        ValueError: there is none.
    """
    name = canonical_name(name)
    having = upstreams(name)
    if not having:
        every = dict.fromkeys(model for files in UPSTREAMS.values() for model in files)
        raise ValueError(f"no file of {name} is known; there are {', '.join(every)} (--list shows where)")
    if upstream is None:
        return having[0], name
    if upstream not in having:
        raise ValueError(f"--upstream {upstream} has no {name}; it is in {', '.join(having)}")
    return upstream, name


def destination(to: str, upstream: str, name: str) -> str:
    """The path of the file that is written: ``to`` itself if it ends in .npz, else in the folder ``to``."""
    return to if to.endswith(".npz") and not os.path.isdir(to) else os.path.join(to, file_name(upstream, name))


def print_list(to: str) -> None:
    """Prints every file: the model, the upstream, what it is called here, and whether it is there."""
    rows = [("MODEL", "UPSTREAM", "FILE", "")]
    for name in dict.fromkeys(name for files in UPSTREAMS.values() for name in files):
        for upstream in upstreams(name):
            path = destination(to, upstream, name)
            rows.append((name, upstream, path, "there" if os.path.isfile(path) else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def make_parser() -> cli.Parser:
    """Every flag of the command line."""
    p = cli.Parser("download", __doc__)
    p.add_argument("models", nargs="*", metavar="MODEL", help="names of --list, such as ViT-B_32")
    p.add_argument("--list", action="store_true", help="print what there is, without the network")
    p.add_argument("--upstream", choices=UPSTREAMS, help="what the weights were trained on; by default the model's "
                   "first in --list")  # fmt: skip
    p.add_argument("--to", default="checkpoint", help="the folder to write to, or a file ending in .npz")
    p.add_argument("--base_url", default=BUCKET, help="of a mirror: <upstream>/<file>.npz are below it")
    return p


def download(args: argparse.Namespace) -> int:
    """Fetches what the flags name; returns the exit status.

    Raises:
        ValueError: the user got something wrong.
        OSError: a file could not be fetched or written.
    """
    if args.list:
        print_list(args.to)
        return 0
    if not args.models:
        raise ValueError("name a model, such as ViT-B_32; --list prints them")
    check_address(args.base_url)
    chosen = dict.fromkeys(choose(name, args.upstream) for name in args.models)
    if len(chosen) > 1 and destination(args.to, "", "") == args.to:
        raise ValueError(f"--to {args.to} is one file, for {len(chosen)} models; give a folder")
    for upstream, name in chosen:
        path = destination(args.to, upstream, name)
        if os.path.isfile(path):
            print(f"{path} is there already; remove it to fetch it again")
            continue
        checkpoint.check_writable(os.path.dirname(path) or ".")
        remote = urllib.parse.quote(f"{UPSTREAMS[upstream][name]}.npz", safe="/+")
        with runs.only_run(f"{path}.part.lock", f"downloading {path}; wait for it, or stop it"):
            if os.path.isfile(path):  # another process has just brought it
                continue
            file = Download(f"{args.base_url.rstrip('/')}/{remote}", path)
            try:
                file.fetch()
            except OSError as e:
                stays = f"; {file.part} stays, and the same command goes on with it" if file.offset() else ""
                raise OSError(f"{path} could not be downloaded: {e}{stays}") from e
            except KeyboardInterrupt:
                if file.offset():
                    print(f"{file.part} stays; the same command goes on with it", file=sys.stderr)
                raise
        print(f"{path}: {os.path.getsize(path):,} bytes")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    return cli.run("download", lambda: download(args))


if __name__ == "__main__":
    sys.exit(main())
