"""Downloads Google's pretrained weights into the names that train.py looks for.

    python -m tools.download ViT-B_32
    python -m tools.download --list

A file comes from Google's bucket or, where that does not give it, from the Hugging Face hub, where timm and
transformers keep the same weights: those are converted to Google's .npz, every number as it is.  Files are verified by
the md5 or sha256 that the server sends, and appear whole or not at all.  A download from the bucket that stops leaves a
.part file, and the same command resumes it; one from the hub starts again.

The names are Google's (github.com/google-research/vision_transformer); this tool must not fetch anything that it is not
asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
import urllib.parse

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models import published
from models.configs import CONFIGS, canonical_name
from models.published import BUCKET, UPSTREAMS, file_name, upstreams
from tools import _cli
from tools._sources import KINDS, Sources, Wanted, from_url
from utils import files
from utils.errors import UserError

# ---- which file ----


def check_address(flag: str, url: str) -> None:
    """Raises UserError unless files can be below such an address."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        fits = False
    if not fits or not all("!" <= letter <= "~" for letter in url):
        raise UserError(f"{flag} {url or repr(url)} is no address; expected https://HOST/PATH, or http://")


def choose(name: str, upstream: str | None) -> tuple[str, str]:
    """Returns the upstream and the name in ``UPSTREAMS`` of a model's file.

    Raises:
        UserError: there is none.
    """
    name = canonical_name(name)
    having = upstreams(name)
    if not having:
        every = dict.fromkeys(model for files in UPSTREAMS.values() for model in files)
        raise UserError(f"no file of {name} is known; there are {', '.join(every)} (--list shows where)")
    if upstream is None:
        return having[0], name
    if upstream not in having:
        raise UserError(f"--upstream {upstream} has no {name}; it is in {', '.join(having)}")
    return upstream, name


def path_in(to: str, file: str) -> str:
    """Returns the path that is written: ``to`` itself if it ends in .npz, else ``file`` in the folder ``to``."""
    return to if to.endswith(".npz") and not os.path.isdir(to) else os.path.join(to, file)


def destination(to: str, upstream: str, name: str) -> str:
    """Returns the path of a file of ``UPSTREAMS``."""
    return path_in(to, file_name(upstream, name))


def print_list(to: str) -> None:
    """Prints every file: the model, the upstream, its name here, its place on the hub, and whether it is there."""
    rows = [("MODEL", "UPSTREAM", "FILE", "ON THE HUGGING FACE HUB", "")]
    for name in dict.fromkeys(name for known in UPSTREAMS.values() for name in known):
        for upstream in upstreams(name):
            path = destination(to, upstream, name)
            google = UPSTREAMS[upstream][name]
            place, run = published.repository(google) or "-", published.other_run(google)
            state = "there" if os.path.isfile(path) else ""
            if run is not None:
                place += " (another run)"
                if not state and os.path.isfile(os.path.join(to, run)):
                    state = "another run is there"
            rows.append((name, upstream, path, place, state))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def make_parser() -> _cli.Parser:
    """Returns the parser, with every flag."""
    p = _cli.Parser("download", __doc__)
    p.add_argument("models", nargs="*", metavar="MODEL", help="names of --list, such as ViT-B_32")
    p.add_argument("--list", action="store_true", help="print what there is, without the network")
    p.add_argument("--upstream", choices=UPSTREAMS, help="what the weights were trained on; by default the model's "
                   "first in --list")  # fmt: skip
    p.add_argument("--to", default="checkpoint", help="the folder to write to, or a file ending in .npz")
    p.add_argument("--source", choices=KINDS, help="google: its bucket; hub: the Hugging Face hub, or the mirror that "
                   "HF_ENDPOINT names; auto, the default: the hub if the bucket does not give a file")  # fmt: skip
    p.add_argument("--base_url", metavar="URL", help="of a mirror of Google's bucket, with its layout: a file is at "
                   "URL/<upstream>/<file>.npz; only --source auto asks anything else, the hub, after it")  # fmt: skip
    p.add_argument("--url", help="of one file of MODEL's weights, of any kind that --pretrained_dir takes; it becomes "
                   "<MODEL>.npz, and nothing else is asked")  # fmt: skip
    return p


def settings(args: argparse.Namespace) -> Sources:
    """Returns the sources that the flags and HF_ENDPOINT name.

    Raises:
        UserError: they contradict each other, or name no address.
    """
    if args.base_url is not None:
        check_address("--base_url", args.base_url)
    if args.base_url is not None and args.source == "hub":
        raise UserError("--base_url has no effect with --source hub, whose mirror HF_ENDPOINT names; leave one out")
    source = args.source or ("auto" if args.base_url is None else "google")
    if source != "google" and "HF_ENDPOINT" in os.environ:
        check_address("HF_ENDPOINT", os.environ["HF_ENDPOINT"])
    return Sources(source, args.base_url or BUCKET)


def download_url(url: str, name: str, to: str) -> int:
    """Fetches the file of ``--url``; returns the exit code.

    Raises:
        UserError: the model is not known, or the file is something else than its weights.
        OSError: it could not be fetched or written.
    """
    model_type = canonical_name(name.removesuffix("-224"))  # which --list has of some models
    if model_type not in CONFIGS:
        raise UserError(f"no model is called {name}; expected a --model_type of train.py, such as ViT-B_32")
    path = path_in(to, f"{model_type}.npz")
    files.check_writable(os.path.dirname(path) or ".")
    with files.file_lock(f"{path}.part.lock", f"downloading {path}; wait for it, or stop it"):
        if os.path.isfile(path):
            print(f"{path} is there already; remove it to fetch it again")
        else:
            from_url(url, path, model_type)
    return 0


def download(args: argparse.Namespace) -> int:
    """Fetches what the flags name; returns the exit code: 1 if a file could not be fetched or written.

    Raises:
        UserError: the user got something wrong.
    """
    if args.list:
        print_list(args.to)
        return 0
    if not args.models:
        raise UserError("name a model, such as ViT-B_32; --list prints them")
    if args.url is not None:
        check_address("--url", args.url)
        if others := [flag for flag in ("base_url", "source", "upstream") if getattr(args, flag) is not None]:
            raise UserError(f"--url names the file itself, so --{others[0]} has no effect; leave one out")
        if len(args.models) > 1:
            raise UserError(f"--url is one file, for {len(args.models)} models; name one")
        return download_url(args.url, args.models[0], args.to)
    sources = settings(args)
    chosen = dict.fromkeys(choose(name, args.upstream) for name in args.models)
    is_folder = destination(args.to, "", "") != args.to
    if len(chosen) > 1 and not is_folder:
        raise UserError(f"--to {args.to} is one file, for {len(chosen)} models; give a folder")
    status = 0
    for upstream, name in chosen:
        wanted = Wanted(upstream, name, destination(args.to, upstream, name), is_folder)
        if os.path.isfile(wanted.path):
            print(f"{wanted.path} is there already; remove it to fetch it again")
            continue
        files.check_writable(os.path.dirname(wanted.path) or ".")
        with files.file_lock(f"{wanted.path}.part.lock", f"downloading {wanted.path}; wait for it, or stop it"):
            if os.path.isfile(wanted.path):  # another process has just brought it
                continue
            try:
                sources.bring(wanted)
            except BrokenPipeError:  # of what is printed
                raise
            except OSError as e:  # the other files may come
                status = _cli.fail("download", f"{wanted.path} could not be downloaded: {e}", 1)
    return status


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("download", lambda: download(args))


if __name__ == "__main__":
    sys.exit(main())
