"""Google's pretrained files: their names, their addresses, their copies on the Hugging Face hub and on this disk.

Source: github.com/google-research/vision_transformer (README).  What confirms each row of the
Hugging Face hub's repositories:

* ``augreg_in21k``: timm's own configuration names Google's file (``timm.get_pretrained_cfg(...).url``).
* ``orig_in21k``: timm's tag.  The model cards say "Pretrained on ImageNet-21k in JAX by paper authors, ported to
  PyTorch by Ross Wightman" and "does not have a classification head" (read for B_16, B_32, L_16 and L_32).
* ``orig_in21k_ft_in1k``: timm's tag, and the sizes: 346, 347 and 396 MB and 1.23 GB on the hub, and 330.29, 331.4 and
  377.57 MiB and 1.14 GiB in Google's listing (``vit_jax.ipynb`` of github.com/google-research/vision_transformer).
* ``google/vit-...``: the cards (the weights are timm's, which Ross Wightman converted from JAX), and the sizes in the
  same way: 353 MB and twice 1.22 GB; 336.89 MiB, 1.13 and 1.14 GiB.  The two large ones have a ``pytorch_model.bin``
  only.

No row has been compared array by array with Google's file: that takes the bucket, which answered 403 in 2026.  This
module must not read the files.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from dataclasses import dataclass

from models.commands import own_path, tool_command
from models.configs import DEMO, GOOGLE_NAMES, canonical_name
from utils.errors import UserError

logger = logging.getLogger("train")

BUCKET = "https://storage.googleapis.com/vit_models"


@dataclass(frozen=True)
class GoogleFile:
    """One of Google's files.

    Attributes:
        model: this project's name of it: the model, and "-224" for what was fine-tuned at 224 px; the other files of
            imagenet2012 were at 384.
        path: where Google publishes it, below ``BUCKET`` and without the ".npz"; its folder is the upstream.
        repository: the one of the Hugging Face hub that stands for it; None if there is none.
        other_run: name of another AugReg run than the one Google recommends, where the repository has that one's
            weights.
        recommended: the file is what the model's name means if no upstream is given.
    """

    model: str
    path: str
    repository: str | None = None
    other_run: str | None = None
    recommended: bool = False

    @property
    def upstream(self) -> str:
        """Returns the name of what it was trained on, as Google's bucket has it."""
        return self.path.partition("/")[0]


#: The files that this project names.  Of the AugReg files, those that Google's README recommends (B_8:
#: google-research/big_vision, ``models/vit.py``); there are others, listed in augreg/index.csv.
FILES: tuple[GoogleFile, ...] = (
    GoogleFile("ViT-B_16", "imagenet21k/ViT-B_16", "timm/vit_base_patch16_224.orig_in21k", recommended=True),
    GoogleFile("ViT-B_32", "imagenet21k/ViT-B_32", "timm/vit_base_patch32_224.orig_in21k", recommended=True),
    GoogleFile("ViT-L_16", "imagenet21k/ViT-L_16", "timm/vit_large_patch16_224.orig_in21k", recommended=True),
    GoogleFile("ViT-L_32", "imagenet21k/ViT-L_32", "timm/vit_large_patch32_224.orig_in21k", recommended=True),
    GoogleFile("ViT-H_14", "imagenet21k/ViT-H_14", "timm/vit_huge_patch14_224.orig_in21k", recommended=True),
    GoogleFile("R50-ViT-B_16", "imagenet21k/R50+ViT-B_16", "timm/vit_base_r50_s16_224.orig_in21k", recommended=True),
    GoogleFile("ViT-B_8", "imagenet21k/ViT-B_8", recommended=True),
    GoogleFile("R26-ViT-B_32", "imagenet21k/R26+ViT-B_32", recommended=True),
    GoogleFile("R50-ViT-L_32", "imagenet21k/R50+ViT-L_32"),
    GoogleFile("ViT-B_16-224", "imagenet21k+imagenet2012/ViT-B_16-224", "timm/vit_base_patch16_224.orig_in21k_ft_in1k"),
    GoogleFile("ViT-B_16", "imagenet21k+imagenet2012/ViT-B_16", "timm/vit_base_patch16_384.orig_in21k_ft_in1k"),
    GoogleFile("ViT-B_32", "imagenet21k+imagenet2012/ViT-B_32", "google/vit-base-patch32-384"),
    GoogleFile("ViT-L_16-224", "imagenet21k+imagenet2012/ViT-L_16-224", "google/vit-large-patch16-224"),
    GoogleFile("ViT-L_16", "imagenet21k+imagenet2012/ViT-L_16", "google/vit-large-patch16-384"),
    GoogleFile("ViT-L_32", "imagenet21k+imagenet2012/ViT-L_32", "timm/vit_large_patch32_384.orig_in21k_ft_in1k"),
    # Google's vit_jax.ipynb lists it.
    GoogleFile("R50-ViT-B_16", "imagenet21k+imagenet2012/R50+ViT-B_16", "timm/vit_base_r50_s16_384.orig_in21k_ft_in1k"),
    GoogleFile("ViT-Ti_16", "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
               "timm/vit_tiny_patch16_224.augreg_in21k", recommended=True),
    GoogleFile("ViT-S_16", "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
               "timm/vit_small_patch16_224.augreg_in21k", recommended=True),
    GoogleFile("ViT-S_32", "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_small_patch32_224.augreg_in21k", recommended=True,
               other_run="S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"),
    GoogleFile("R-ViT-Ti_16", "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
               "timm/vit_tiny_r_s16_p8_224.augreg_in21k", recommended=True),
    GoogleFile("R26-ViT-S_32", "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_small_r26_s32_224.augreg_in21k", recommended=True,
               other_run="R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0"),
    GoogleFile("R50-ViT-L_32", "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
               "timm/vit_large_r50_s32_224.augreg_in21k", recommended=True,
               other_run="R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"),
    GoogleFile("ViT-B_8", "augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_base_patch8_224.augreg_in21k",
               other_run="B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"),
    GoogleFile("ViT-B_16", "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_base_patch16_224.augreg_in21k"),
    GoogleFile("ViT-B_32", "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_base_patch32_224.augreg_in21k",
               other_run="B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0"),
    GoogleFile("ViT-L_16", "augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0",
               "timm/vit_large_patch16_224.augreg_in21k",
               other_run="L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"),
)  # fmt: skip

#: The path of the file that a model's name means.
PUBLISHED: dict[str, str] = {file.model: file.path for file in FILES if file.recommended}
#: All files: by upstream and model their paths.
UPSTREAMS: dict[str, dict[str, str]] = {
    upstream: {file.model: file.path for file in FILES if file.upstream == upstream}
    for upstream in dict.fromkeys(file.upstream for file in FILES)
}
#: The rows of ``FILES`` by path.
BY_PATH: dict[str, GoogleFile] = {file.path: file for file in FILES}


def upstreams(name: str) -> list[str]:
    """Lists the upstreams that have a file of a model; that of ``PUBLISHED``, the default, first."""
    having = [upstream for upstream, files in UPSTREAMS.items() if name in files]
    return sorted(having, key=lambda upstream: UPSTREAMS[upstream][name] != PUBLISHED.get(name))


def file_name(upstream: str, name: str) -> str:
    """Returns this project's name of a file of ``UPSTREAMS``, such as imagenet21k_ViT-B_32.npz."""
    return f"{upstream.split('+')[-1]}_{name}.npz"


def repository(path: str) -> str | None:
    """Returns the repository that stands for one of Google's files, or None.

    Args:
        path: as in ``UPSTREAMS``.
    """
    return BY_PATH[path].repository


def other_run(path: str) -> str | None:
    """Returns the name here of the other AugReg run that the hub has in place of one of Google's files, or None.

    Args:
        path: as in ``UPSTREAMS``.
    """
    run = BY_PATH[path].other_run
    return run and f"{run}.npz"


def run_names(model_type: str) -> list[str]:
    """Names the files of a model that the hub has of another AugReg run than the one Google recommends."""
    name = canonical_name(model_type)
    return [run for files in UPSTREAMS.values() if name in files and (run := other_run(files[name])) is not None]


#: What marks a folder that another program wrote: its weights (utils/weights.py chooses), or the list of their parts.
_OTHER_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".index.json")
#: Where files are looked for that no flag names.
FOLDER = "checkpoint"


def usual_names(model_type: str) -> list[str]:
    """Lists the names that a model's file may have in a folder, the preferred one first."""
    name = canonical_name(model_type)
    own = dict.fromkeys((name, GOOGLE_NAMES.get(name, name)))
    names = [f"{upstream}{each}.npz" for upstream in ("", "imagenet21k_", "augreg_") for each in own]
    if name in PUBLISHED:
        names.append(os.path.basename(PUBLISHED[name]) + ".npz")
    return list(dict.fromkeys(names + run_names(name)))


def find(path: str | None, model_type: str) -> str:
    """Returns the weights that a path means: a file, or a folder with a model's file or weights of other programs.

    Args:
        path: as --pretrained_dir has it; None looks in ``FOLDER`` and logs what is taken.
        model_type: one of ``CONFIGS``.

    Raises:
        UserError: there is none; the message has the command that downloads it.
    """
    if path is not None and os.path.isfile(path):
        return path
    if path is not None and not os.path.isdir(path):
        raise UserError(f"there is no file {path}{_remedy(*os.path.split(path), model_type)}")
    folder, names = path or FOLDER, usual_names(model_type)
    if name := next((each for each in names if os.path.isfile(os.path.join(folder, each))), None):
        file = os.path.join(folder, name)
        if path is None:
            logger.info("--pretrained_dir is not given: starting from %s", file)
        return file
    if path is not None and any(each.endswith(_OTHER_ENDINGS) for each in os.listdir(path)):
        return path
    remedy = _remedy(folder, "", model_type, looked_for=path is None)
    raise UserError(f"{folder} has none of {', '.join(names[:4])}{remedy}")


def _remedy(folder: str, file: str, model_type: str, looked_for: bool = False) -> str:
    """Says how to get the file that is missing in a folder, as the end of a message.

    Args:
        folder: where it was looked for.
        file: the name that was given; empty for any.
        model_type: whose weights it should hold.
        looked_for: the file need not be named.
    """
    name = canonical_name(model_type)
    if name == DEMO:
        return f"; this repository comes with it: --pretrained_dir {shlex.quote(own_path('checkpoint', f'{DEMO}.npz'))}"
    if name not in PUBLISHED:
        return f"; no file of {name} is known here, give its path; --pretrained_dir '' starts from random weights"
    own = "|".join(map(re.escape, (name, GOOGLE_NAMES.get(name, name))))
    is_own = (
        re.search(rf"(?<!R50[-+])(?<!R26[-+])(?<!R-)({own})", file) is not None
    )  # a hybrid's name ends as a plain one's
    target = os.path.join(folder, file if is_own else file_name(PUBLISHED[name].split("/")[0], name))
    needs = f", and --model_type {name} needs its own" if file and not is_own else ""
    give = "" if looked_for or is_own else f" and give --pretrained_dir {shlex.quote(target)}"
    if not looked_for and (run := other_run_of(target, name)):
        give += f"; the Hugging Face hub has another run: then give --pretrained_dir {shlex.quote(run)}"
    return f"{needs}; download it with: {download_command(target, name)}{give}"


def published_as(file: str, name: str) -> tuple[str | None, str]:
    """Returns the upstream that a file's name begins with, if any, and the name in ``UPSTREAMS`` of a model's file."""
    upstream = next((u for u in upstreams(name) if file.startswith(file_name(u, "").removesuffix(".npz"))), None)
    if upstream is not None:
        name = next((other for other in UPSTREAMS[upstream] if file == file_name(upstream, other)), name)  # "-224"
    return upstream, name


def other_run_of(path: str, name: str) -> str | None:
    """Returns the path that tools.download writes in place of ``path`` if the file comes from the hub; else None."""
    folder, file = os.path.split(path)
    upstream, name = published_as(file, name)
    if upstream is None or file != file_name(upstream, name):
        return None  # the file has a name of the user's choice, which every run may have
    run = other_run(UPSTREAMS[upstream][name])
    return run and os.path.join(folder, run)


def download_command(path: str, name: str) -> str:
    """Spells the command that fetches a model's published file to ``path``, from the upstream in the file's name."""
    folder, file = os.path.split(path)
    first = upstreams(name)[0]
    upstream, name = published_as(file, name)
    words = [name]
    if upstream not in (None, first):
        words += ["--upstream", str(upstream)]
    if upstream is None or file != file_name(upstream, name):
        words += ["--to", path]
    elif folder != "checkpoint":
        words += ["--to", folder or "."]
    return tool_command("download", *words)
