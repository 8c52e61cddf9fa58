"""Where a model's pretrained .npz is: its usual names here, and the command that downloads it.

This module must not read the files; models/npz.py does.
"""

from __future__ import annotations

import os
import shlex

from models.configs import DEMO, GOOGLE_NAMES, PUBLISHED, UPSTREAMS, canonical_name, file_name, upstreams

BUCKET = "https://storage.googleapis.com/vit_models"


def find(path: str, model_type: str) -> str:
    """The .npz file that a file's or a folder's path means.

    Raises:
        ValueError: there is none; the message has the command that downloads it.
    """
    if os.path.isfile(path):
        return path
    name = canonical_name(model_type)
    own_names = dict.fromkeys((name, GOOGLE_NAMES.get(name, name)))
    folder, file = os.path.split(path)
    problem = f"there is no file {path}"
    if os.path.isdir(path):
        folder, file = path, ""
        candidates = [f"{upstream}{own}.npz" for upstream in ("", "imagenet21k_", "augreg_") for own in own_names]
        if name in PUBLISHED and os.path.basename(PUBLISHED[name]) not in own_names:
            candidates.append(os.path.basename(PUBLISHED[name]) + ".npz")
        for candidate in candidates:
            if os.path.isfile(os.path.join(folder, candidate)):
                return os.path.join(folder, candidate)
        problem = f"{path} has none of {', '.join(candidates)}"
    if name == DEMO:
        raise ValueError(f"{problem}; this repository comes with checkpoint/{DEMO}.npz")
    if name not in PUBLISHED:
        raise ValueError(
            f"{problem}; no file of {name} is known here, give its path; --pretrained_dir '' starts from random weights"
        )
    remedy = ""
    if not any(own in file for own in own_names):
        path = os.path.join(folder, file_name(PUBLISHED[name].split("/")[0], name))
        remedy = f" and give --pretrained_dir {shlex.quote(path)}"
        problem += f", and --model_type {name} needs its own" if file else ""
    raise ValueError(f"{problem}; download it with: {download_command(path, name)}{remedy}")


def download_command(path: str, name: str) -> str:
    """The command that fetches a model's published file to ``path``, whose name may tell from which upstream."""
    folder, file = os.path.split(path)
    having = upstreams(name)
    upstream = next((u for u in having if file.startswith(file_name(u, "").removesuffix(".npz"))), None)
    if upstream is not None:
        name = next((other for other in UPSTREAMS[upstream] if file == file_name(upstream, other)), name)  # "-224"
    words = ["python", "-m", "tools.download", name]
    if upstream is not None and upstream != having[0]:
        words += ["--upstream", upstream]
    if upstream is None or file != file_name(upstream, name):
        words += ["--to", path]
    elif folder != "checkpoint":
        words += ["--to", folder or "."]
    return shlex.join(words)
