"""Files of weights from the Hugging Face hub, by ``huggingface_hub``, compared with the sha256 that the hub sends.

``huggingface_hub`` knows HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and proxies, and keeps the files in its cache.
It compares their sizes only (file_download.py of 0.36 and 2.4): a byte that was changed on the way gets through.  This
module must not know which files there are, and imports that library only when it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
from typing import Any

from tools._transfer import CHUNK_BYTES, SourceError
from utils.weights import FOLDER_FILES as FILES

SHA256 = re.compile(r"[0-9a-f]{64}")


def load() -> Any:
    """Imports the library, with what its import reads from the environment.

    Raises:
        SourceError: it is not installed.
    """
    if os.environ.get("HF_ENDPOINT"):  # xet would go past a mirror to Hugging Face's own servers
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    if not sys.stderr.isatty():  # its bars write many lines into a file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would say all twice
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as e:
        raise SourceError(f"huggingface_hub cannot be imported ({e}): pip install 'huggingface_hub>=0.34'") from e
    return huggingface_hub


def address(repository: str) -> str:
    """Returns the address at which a repository can be looked at and its files fetched by hand."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{repository}"


def fetch(repository: str) -> str:
    """Brings a repository's weights into the hub's cache, once more if they are damaged, or finds them there.

    Returns:
        The path of the file, whose sha256 is the one that the hub sends.

    Raises:
        SourceError: it cannot be had; nothing damaged stays in the cache.
    """
    library = load()
    for is_last in (library.constants.HF_HUB_OFFLINE, True):
        path = take(library, repository)
        fault = fault_of(library, repository, path)
        if fault is None:
            return path
        discard(path)
        if is_last:
            break
        print(f"{fault}; fetching it again", file=sys.stderr)
    raise SourceError(f"{fault}; it was removed from the cache")


def take(library: Any, repository: str) -> str:
    """Returns the path in the cache of the best of ``FILES`` that a repository has.

    Args:
        library: what ``load`` returns.
        repository: "owner/name".

    Raises:
        SourceError: the hub does not give it.
    """
    for file in FILES:
        try:
            return library.hf_hub_download(repository, file)
        except Exception as e:  # requests, httpx, httpx2 and xet raise errors without a common base
            missing = lacks_file(library, e)
            if missing and file != FILES[-1]:
                continue
            raise SourceError(explain(library, repository, e, missing)) from e
        except KeyboardInterrupt:
            print(f"{file} of {repository} had not come whole; the same command starts it again", file=sys.stderr)
            raise
    raise AssertionError("unreachable")


def origin(error: BaseException) -> BaseException:
    """Returns the cause of an error, which the library's own errors leave out and requests' wrap."""
    while True:
        inner = error.__cause__ or getattr(error, "reason", None) or next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            return error
        error = inner


def status_of(error: BaseException) -> int | None:
    """Returns the status that a server answered, of an error that came of an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def lacks_file(library: Any, error: BaseException) -> bool:
    """Returns True for the error of a repository that is there, or in the cache, without the file."""
    errors = library.errors
    if isinstance(error, errors.RepositoryNotFoundError):
        return False
    if isinstance(error, errors.LocalEntryNotFoundError):  # also raised where nothing could be asked
        return library.constants.HF_HUB_OFFLINE or status_of(origin(error)) == 404
    return isinstance(error, errors.EntryNotFoundError) or status_of(error) == 404


def explain(library: Any, repository: str, error: BaseException, missing: bool) -> str:
    """Says in one line what went wrong, and names the hub and the remedy."""
    place, cause = address(repository), origin(error)
    status = status_of(cause)
    if library.constants.HF_HUB_OFFLINE:
        cache = library.constants.HF_HUB_CACHE
        return f"HF_HUB_OFFLINE is set, and the cache {cache} has none of {', '.join(FILES)} of {repository}"
    if isinstance(error, library.errors.GatedRepoError):
        return f"{place} asks for consent: give it there, and set HF_TOKEN"
    if isinstance(error, library.errors.RepositoryNotFoundError) or status == 401:
        return f"{place} is not there, or wants an HF_TOKEN"
    if missing:
        return f"{place} has none of {', '.join(FILES)}"
    if status is not None:
        return f"the server answered {status} for {place}"
    text = cause.args[0] if cause.args and isinstance(cause.args[0], str) else str(cause)
    text = text.partition("\n")[0].partition(". ")[0]
    return f"{place} could not be fetched ({text or type(cause).__name__}); the same command starts it again"


def fault_of(library: Any, repository: str, path: str) -> str | None:
    """Compares a file in the cache with the sha256 that the hub sends; returns what is wrong, None if nothing is."""
    expected = expected_sha256(library, repository, path)
    if expected is None:
        print(f"{address(repository)} sends no sha256 of {os.path.basename(path)}: only its size is known to be right",
              file=sys.stderr)  # fmt: skip
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    if (got := digest.hexdigest()) != expected:
        return f"{path} has the sha256 {got}, the hub's file {expected}"
    return None


def expected_sha256(library: Any, repository: str, path: str) -> str | None:
    """Returns the sha256 of a file in the cache: in the ETag that the hub sent, or in the list of its files.

    The cache keeps the ETag: ``path`` is a link to a file of that name, where the system has links.
    """
    commit, file = path.split(os.sep)[-2:]
    with contextlib.suppress(OSError):
        if SHA256.fullmatch(etag := os.path.basename(os.readlink(path))):
            return etag
    with contextlib.suppress(Exception):  # as in ``take``; a hub without a list is no reason to stop
        for entry in library.HfApi().list_repo_tree(repository, revision=commit):
            if entry.path == file and SHA256.fullmatch(entry.lfs.sha256):
                return entry.lfs.sha256
    return None


def discard(path: str) -> None:
    """Removes a file from the cache, so that nobody else takes it for whole."""
    paths = [path]
    with contextlib.suppress(OSError):
        paths.append(os.path.join(os.path.dirname(path), os.readlink(path)))
    for each in paths:
        with contextlib.suppress(OSError):
            os.remove(each)
