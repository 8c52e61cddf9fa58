"""models/published.py: where a model's pretrained file is, and how to get it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from models import published
from tests.conftest import REPOSITORY
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where commands are shortest


@pytest.mark.parametrize(
    ("model_types", "names"),
    [
        ("ViT-B_16", "ViT-B_16.npz"),
        ("ViT-B_32", "imagenet21k_ViT-B_32.npz"),
        ("R50-ViT-B_16", "R50-ViT-B_16.npz R50+ViT-B_16.npz imagenet21k_R50-ViT-B_16.npz imagenet21k_R50+ViT-B_16.npz"),
        ("R26-ViT-S_32 R26+ViT-S_32 R26_S_32", "R26-ViT-S_32.npz R26+ViT-S_32.npz augreg_R26-ViT-S_32.npz"),
        ("ViT-demo", "ViT-demo.npz"),
    ],
)
def test_a_folder_stands_for_the_models_file_in_it_and_a_file_for_itself(tmp_path, model_types, names):
    (tmp_path / "ViT-L_16.npz").touch()
    for name in names.split():
        (tmp_path / name).touch()
        for model_type in model_types.split():
            assert published.find(str(tmp_path), model_type) == str(tmp_path / name)
            assert published.find(str(tmp_path / "ViT-L_16.npz"), model_type) == str(tmp_path / "ViT-L_16.npz")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("model_type", "upstream"),
    [
        ("ViT-B_16", "imagenet21k"),
        ("ViT-H_14", "imagenet21k"),
        ("R50-ViT-B_16", "imagenet21k"),
        ("ViT-S_16", "augreg"),
        ("ViT-B_8", "imagenet21k"),
        ("R26-ViT-B_32", "imagenet21k"),
        ("R26-ViT-S_32", "augreg"),
    ],
)
@pytest.mark.parametrize("given", ["missing/{}.npz", "missing/imagenet21k_{}.npz", "ViT-L_32.npz", ".", "{}"])
def test_the_message_on_a_missing_file_has_the_command_that_fetches_it(tmp_path, model_type, upstream, given):
    path = tmp_path / given.format(model_type)
    if path.suffix != ".npz":
        path.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"python -m tools\.download") as e:
        published.find(str(path), model_type)
    message = str(e.value)
    assert str(path) in message
    command, _, hub = message.split("python -m tools.download ")[1].partition("; the Hugging Face hub has another run")
    words = shlex.split(command.split(" and give ")[0])
    assert words[0] == model_type
    target = Path(words[words.index("--to") + 1])
    if target.suffix != ".npz":
        target = target / f"{upstream}_{model_type}.npz"
    if "{}.npz" in given:
        assert target == path
    else:  # not into a folder's own name, nor under another model's
        assert target.parent == (path if path.is_dir() else tmp_path)
        assert f"give --pretrained_dir {target}" in message
    target.parent.mkdir(exist_ok=True)
    target.touch()  # what the command would leave is taken the next time
    assert published.find(str(path if path.is_dir() else target), model_type) == str(target)
    if hub:  # or what it would leave where only the hub gives a file
        target.unlink()
        run = Path(shlex.split(hub)[-1])
        run.touch()
        assert published.find(str(run.parent), model_type) == str(run)
    assert bool(hub) == (target.name == "augreg_R26-ViT-S_32.npz")


@pytest.mark.parametrize(
    ("model_type", "file"),
    [("ViT-B_16", "R50-ViT-B_16.npz"), ("ViT-B_16", "R50+ViT-B_16.npz"), ("ViT-S_32", "augreg_R26-ViT-S_32.npz")],
)
def test_a_hybrids_file_is_not_a_plain_models(model_type, file):
    with pytest.raises(UserError, match=f"--model_type {model_type} needs its own; download it with: "):
        published.find(f"checkpoint/{file}", model_type)


@pytest.mark.parametrize(
    ("path", "name", "command"),
    [
        ("checkpoint/imagenet21k_ViT-B_32.npz", "ViT-B_32", "ViT-B_32"),
        ("checkpoint/ViT-B_16.npz", "ViT-B_16", "ViT-B_16 --to checkpoint/ViT-B_16.npz"),
        ("checkpoint/R50+ViT-B_16.npz", "R50-ViT-B_16", "R50-ViT-B_16 --to checkpoint/R50+ViT-B_16.npz"),
        ("checkpoint/augreg_ViT-B_16.npz", "ViT-B_16", "ViT-B_16 --upstream augreg"),
        ("checkpoint/augreg_ViT-S_16.npz", "ViT-S_16", "ViT-S_16"),
        ("checkpoint/imagenet2012_ViT-B_32.npz", "ViT-B_32", "ViT-B_32 --upstream imagenet21k+imagenet2012"),
        ("checkpoint/imagenet2012_ViT-B_16-224.npz", "ViT-B_16", "ViT-B_16-224 --upstream imagenet21k+imagenet2012"),
        ("checkpoint/augreg_ViT-B_8.npz", "ViT-B_8", "ViT-B_8 --upstream augreg"),
        ("checkpoint/augreg_R50-ViT-L_32.npz", "R50-ViT-L_32", "R50-ViT-L_32"),
        ("checkpoint/imagenet21k_R50-ViT-L_32.npz", "R50-ViT-L_32", "R50-ViT-L_32 --upstream imagenet21k"),
        ("my files/imagenet21k_ViT-B_32.npz", "ViT-B_32", "ViT-B_32 --to 'my files'"),
        ("imagenet21k_ViT-B_32.npz", "ViT-B_32", "ViT-B_32 --to ."),
    ],
)
def test_the_command_fetches_what_the_files_name_says(path, name, command):
    assert published.download_command(path, name) == f"python -m tools.download {command}"


@pytest.mark.parametrize(
    ("model_type", "advice"),
    [
        ("ViT-demo", "this repository comes with it: --pretrained_dir checkpoint/ViT-demo.npz"),
        (
            "ViT-S_14",
            "no file of ViT-S_14 is known here, give its path; --pretrained_dir '' starts from random",
        ),
        ("testing", "no file of testing is known here"),
    ],
)
def test_no_download_is_offered_for_what_google_does_not_publish(tmp_path, model_type, advice):
    with pytest.raises(UserError, match=f"there is no file .*{re.escape(advice)}") as e:
        published.find(str(tmp_path / "weights.npz"), model_type)
    assert "tools.download" not in str(e.value)


def test_a_file_under_the_full_name_of_another_run_is_found(tmp_path):
    (run,) = published.run_names("ViT-S_32")
    (tmp_path / run).touch()
    assert published.find(str(tmp_path), "ViT-S_32") == str(tmp_path / run)
    (tmp_path / "augreg_ViT-S_32.npz").touch()  # Google's recommended run goes before
    assert published.find(str(tmp_path), "ViT-S_32") == str(tmp_path / "augreg_ViT-S_32.npz")


# ---- the hub's repositories ----


def test_no_row_of_the_table_contradicts_another():
    files = published.FILES
    paths, recommended = [f.path for f in files], [f.model for f in files if f.recommended]
    for keys in (paths, recommended, [(f.upstream, f.model) for f in files]):
        assert len(set(keys)) == len(keys)
    repositories = [f.repository for f in files if f.repository is not None]
    assert len(set(repositories)) == len(repositories)
    assert {f.path for f in files if f.repository is None} == {
        "imagenet21k/ViT-B_8",
        "imagenet21k/R50+ViT-L_32",
        "imagenet21k/R26+ViT-B_32",
    }
    assert all(f.repository is not None and f.upstream == "augreg" for f in files if f.other_run is not None)


def test_the_table_is_timms():
    timm = pytest.importorskip("timm")
    tags = ("orig_in21k", "orig_in21k_ft_in1k", "augreg_in21k")
    known = {name: timm.get_pretrained_cfg(name) for tag in tags for name in timm.list_pretrained(f"vit_*.{tag}")}
    ours = {file.repository: file for file in published.FILES if (file.repository or "").startswith("timm/")}
    assert set(ours) == {config.hf_hub_id for config in known.values()}
    for name, config in known.items():
        file = ours[config.hf_hub_id]
        path = file.path
        if name.endswith("augreg_in21k"):
            run = path if file.other_run is None else f"augreg/{file.other_run}"
            assert config.url.endswith(f"/vit_models/{run}.npz")
        else:
            upstream = "imagenet21k+imagenet2012" if name.endswith("in1k") else "imagenet21k"
            assert path.startswith(f"{upstream}/")
            size = 224 if upstream == "imagenet21k" or path.endswith("-224") else 384
            assert config.input_size[-1] == size
            assert (config.num_classes == 0) == (upstream == "imagenet21k")
        shape = re.fullmatch(r"vit_(\w+?)_(?:patch(\d+)|r(\d*)_s(\d+)(?:_p8)?)_\d+", name.split(".")[0])
        letter = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}[shape[1]]
        assert f"{letter}_{shape[2] or shape[4]}" in path
        stem = re.search(r"/R(\d*)[+_]", path)
        assert (stem and stem[1]) == shape[3]
