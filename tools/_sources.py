"""Asks the sources of tools.download: Google's bucket, the Hugging Face hub, or an address of the user's.

What comes in another layout is converted to Google's .npz.  This module must not know flags.
"""

from __future__ import annotations

import os
import sys
import urllib.parse
from dataclasses import dataclass

from models import layouts, npz, published
from models.commands import tool_command
from models.configs import CONFIGS
from models.published import BUCKET, UPSTREAMS, file_name, upstreams
from tools import _hub, _npz_file
from tools._transfer import Download, SourceError
from utils import weights
from utils.errors import UserError

KINDS = ("auto", "google", "hub")


@dataclass(frozen=True)
class Wanted:
    """A file of Google's that is to be written.

    Attributes:
        upstream, name: as in ``UPSTREAMS``.
        path: where it goes to.
        is_folder: the user named a folder, so that the file's name is this project's choice.
    """

    upstream: str
    name: str
    path: str
    is_folder: bool

    @property
    def google(self) -> str:
        """Returns Google's name of it."""
        return UPSTREAMS[self.upstream][self.name]

    @property
    def model_type(self) -> str:
        """Returns the model that it is of."""
        return self.name.removesuffix("-224")

    @property
    def hub_path(self) -> str:
        """Returns the path of the hub's file in its place: another AugReg run keeps its own name.

        Raises:
            SourceError: the user named the file as this project calls the run that the hub does not have.
        """
        run = published.other_run(self.google)
        if run is None:
            return self.path
        if self.is_folder:
            return os.path.join(os.path.dirname(self.path), run)
        if os.path.basename(self.path) == file_name(self.upstream, self.name):
            raise SourceError(f"the hub has another run, {run}, which is not called {self.path} here; --to a folder")
        return self.path


def google_url(base_url: str, wanted: Wanted) -> str:
    """Returns the address of a file in Google's bucket, or in a mirror of it."""
    return f"{base_url.rstrip('/')}/{urllib.parse.quote(f'{wanted.google}.npz', safe='/+')}"


def fetch(file: Download) -> None:
    """Fetches a file as far as it goes, and says what stays of it if it is interrupted."""
    try:
        file.fetch()
    except KeyboardInterrupt:
        if stays := left_over(file):
            print(stays.removeprefix("; "), file=sys.stderr)
        raise


def left_over(file: Download) -> str:
    """Says what stays of a file that could not be fetched, as the end of a message."""
    return f"; {file.part} stays, and the same command resumes it" if file.offset() else ""


def from_hub(wanted: Wanted) -> None:
    """Brings what the hub has in a file's place, and converts it.

    Raises:
        SourceError: the hub does not give it.
        OSError: it cannot be written.
    """
    repository = published.repository(wanted.google)
    if repository is None:
        raise SourceError(no_repository(wanted))
    path, run = wanted.hub_path, published.other_run(wanted.google)
    which = "has the same weights"
    if run is not None:
        which = f"has another AugReg run, {run.removesuffix('.npz')}, which is written as {path}"
    print(f"{wanted.google}.npz: {_hub.address(repository)} {which}")
    if os.path.isfile(path):
        print(f"{path} is there already; remove it to fetch it again")
        return
    source = _hub.fetch(repository)
    print(f"{source} stays in the hub's cache")
    try:
        missing = convert(source, path, wanted.model_type)
    except UserError as e:
        raise SourceError(f"{source} cannot be converted to {wanted.model_type}: {e}") from e
    if wanted.upstream != "imagenet21k":
        missing = [name for name in missing if name != "pre_logits"]  # nor has Google's
    lacks = f"; without {' and '.join(missing)}, which that file lacks and a training does without" if missing else ""
    print(f"{path}: {os.path.getsize(path):,} bytes, converted{lacks}")
    if path == wanted.path:
        Download("", path).forget()  # what came of it from the bucket before


def no_repository(wanted: Wanted) -> str:
    """Says that a file is in Google's bucket only, and which upstream is on the hub."""
    others = [upstream for upstream in upstreams(wanted.name) if published.repository(UPSTREAMS[upstream][wanted.name])]
    remedy = "".join(f"; it has --upstream {upstream}" for upstream in others)
    return f"the Hugging Face hub has no {wanted.google}{remedy}"


def convert(source: str, path: str, model_type: str) -> list[str]:
    """Writes the weights of a file in any layout as Google's .npz.

    Returns:
        What Google's files have and the source has not, of "head" and "pre_logits".

    Raises:
        UserError: it holds something else than the model's weights.
        OSError: it cannot be written.
    """
    config = CONFIGS[model_type]
    google = layouts.to_google(weights.read(source).arrays, config)
    arrays = npz.match(google, config, npz.num_classes(google))
    _npz_file.write(path, arrays)
    return [name for name in ("head", "pre_logits") if f"{name}/kernel" not in arrays]


def from_url(url: str, path: str, model_type: str) -> None:
    """Brings one file of a model's weights, in any layout.

    Raises:
        UserError: the file is something else than the model's weights.
        OSError: it could not be fetched or written; it says what stays of it.
    """
    file = Download(url, path, is_npz=False)
    try:
        fetch(file)
    except OSError as e:
        raise OSError(f"{path} could not be downloaded: {e}{left_over(file)}") from e
    try:
        missing = convert(file.part, path, model_type)
    except UserError as e:
        other = str(e).partition("; it fits --model_type ")[2]
        if other:  # the bytes are good: the same command with the right name needs not fetch them again
            stays = f"; {file.part} stays: convert it with " + tool_command(
                "convert",
                file.part,
                "--model_type",
                other,
                "--output",
                os.path.join(os.path.dirname(path), f"{other}.npz"),
            )
            raise UserError(f"{url} is of {other}, not {model_type}{stays}") from e
        file.forget()
        raise UserError(f"{url} cannot be loaded as {model_type}: {e}") from e
    file.forget()
    lacks = ", without a head, as that file is" if "head" in missing else ""
    print(f"{path}: {os.path.getsize(path):,} bytes{lacks}")


def by_hand(wanted: Wanted, url: str) -> str:
    """Says what to do where no source gives a file, which would be at ``url`` in Google's bucket."""
    repository = published.repository(wanted.google)
    convert_it = tool_command("convert", "FILE", "--model_type", wanted.model_type, "--output", wanted.path)
    places = f"{url} as {wanted.path}"
    if repository is not None:
        file = f"{_hub.address(repository)}/resolve/main/{_hub.FILES[0]} (or {_hub.FILES[1]})"
        places += f", or {file}"
        if run := published.other_run(wanted.google):  # which must not be written under the recommended run's name
            output = os.path.join(os.path.dirname(wanted.path), run)
            convert_it = tool_command("convert", "FILE", "--model_type", wanted.model_type, "--output", output)
            places += f", which is another run, {run.removesuffix('.npz')}"
    return f"by hand: fetch {places}; a file that you have is converted by: {convert_it}"


class Sources:
    """Asks for files at each source in turn; one that did not answer in auto is not asked again.

    Args:
        source: one of ``KINDS``.
        base_url: of Google's bucket, or of a mirror.
    """

    def __init__(self, source: str, base_url: str) -> None:
        self.source, self.base_url = source, base_url
        self.refusal: str | None = None

    def bring(self, wanted: Wanted) -> None:
        """Brings one file.

        Raises:
            OSError: no source gives it, or it cannot be written.
        """
        file = Download(google_url(self.base_url, wanted), wanted.path, patient=self.source != "auto")
        reasons = [] if self.refusal is None else [self.refusal]
        if self.source != "hub" and self.refusal is None:
            try:
                fetch(file)
                file.finish()
            except SourceError as e:
                reasons.append(str(e))
                if self.source == "auto":
                    self.refusal = str(e)
                    print(f"{self.refusal}: the Hugging Face hub is taken from here on", file=sys.stderr)
            except OSError as e:
                raise OSError(f"{e}{left_over(file)}") from e
            else:
                print(f"{file.path}: {os.path.getsize(file.path):,} bytes")
                return
        if self.source != "google":
            try:
                from_hub(wanted)
                return
            except SourceError as e:
                reasons.append(str(e))
        remedy = "" if self.source == "google" and self.base_url != BUCKET else f"; {by_hand(wanted, file.url)}"
        raise OSError(f"{'; '.join(reasons)}{left_over(file)}{remedy}")
