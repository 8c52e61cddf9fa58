"""The rows of published results: figures as on the page, commands that train.py takes, weights that can be had."""

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools import reproduce
from tools._published_results import ROWS
from utils import args as flags


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *args):
    """Returns the exit code, standard output and standard error without its line break."""
    code = reproduce.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err.rstrip()


def test_the_published_figures_are_those_of_the_page():
    docs = REPOSITORY / "docs"
    text = (docs / "results.md").read_text(encoding="utf-8").split("\n## Published by others\n")[1]
    assert f"Without `--rows` all {len(ROWS)} are trained" in (docs / "tools.md").read_text(encoding="utf-8")
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        for body in re.findall(r"^\| model \|.*\n\|[ \-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    ]
    predecessor, reference, google = tables
    data_sets = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
    models = {"B/16": "ViT-B_16", "B/32": "ViT-B_32", "L/16": "ViT-L_16", "L/32": "ViT-L_32",
              "R50+B/16": "R50-ViT-B_16"}  # fmt: skip

    def rows_of(source, *facts):
        rows = [row for row in ROWS.values() if row.name.startswith(source)]
        return sorted(tuple(getattr(row, fact) for fact in facts) for row in rows)

    expected = [
        (model, data_sets[data], int(px), int(steps), int(batch), float(accuracy), float(secs))
        for model, data, px, steps, batch, accuracy, secs in predecessor
    ]
    assert len(expected) == 9
    assert sorted(expected) == rows_of(
        "predecessor-", "model_type", "dataset", "img_size", "num_steps", "batch_size", "accuracy", "secs"
    )

    expected = []
    for first, px, *cells in reference:
        short, steps, warmup = re.match(r"([^,]+)(?:, (\d+) steps, (\d+) of warm-up)?", first).groups()
        for data, cell in zip(("cifar10", "cifar100"), cells):
            accuracy, hours, minutes = re.match(r"([\d.]+)(?: \((\d+) h (\d+) min\))?", cell).groups()
            secs = None if hours is None else 3600 * int(hours) + 60 * int(minutes)
            words = ("--warmup_steps", warmup or "500")
            expected.append((models[short], data, int(px), int(steps or 10000), float(accuracy), words, secs))
    assert sorted(expected) == rows_of(
        "reference-", "model_type", "dataset", "img_size", "num_steps", "accuracy", "flags", "secs"
    )

    expected = [
        (models[short], data, 384, 10000, float(accuracy), ("--dropout", dropout, "--hflip", "--gelu", "tanh"))
        for short, *cells in google
        for data, cell in zip(("cifar10", "cifar100"), cells)
        for dropout, accuracy in zip(("0", "0.1"), cell.split(" / "))
    ]
    assert len(expected) == 20
    assert sorted(expected) == rows_of("google-", "model_type", "dataset", "img_size", "num_steps", "accuracy", "flags")


def test_the_demo_is_that_of_make_demo(capsys):
    makefile = dict(re.findall(r"^(\w+) := (.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    words = f"{makefile['DEMO']} {makefile['DEMO_TRAINING']} --pretrained_dir checkpoint/ViT-demo.npz".split()
    _, out, _ = run(capsys, "--rows", "demo", "--dry_run")
    parse = flags.make_parser().parse_args
    ours, theirs = vars(parse(shlex.split(out)[2:])), vars(parse(words))
    assert {k for k in ours if ours[k] != theirs[k]} == {"name", "resume"}  # make demo trains anew each time


def test_every_row_is_a_training_that_train_py_takes(capsys):
    code, out, _ = run(capsys, "--dry_run", "--", "--fp16")
    assert code == 0
    for line, row in zip(out.splitlines(), ROWS.values(), strict=True):
        args = flags.make_parser().parse_args(shlex.split(line)[2:])
        flags.check_args(args)
        assert args.name == f"reproduce-{row.name}"
        shape = (args.model_type, args.dataset, args.img_size, args.num_steps, args.train_batch_size)
        assert shape == (row.model_type, row.dataset, row.img_size, row.num_steps, row.batch_size)
        if row.name != "demo":
            upstream = f"checkpoint/imagenet21k_{row.model_type}.npz"
            assert (args.learning_rate, args.weight_decay, args.pretrained_dir) == (0.03, 0, upstream)
        assert args.fp16
        assert args.gelu == ("tanh" if row.name.startswith("google") else "erf")
        assert args.hflip == row.name.startswith("google")


def test_rows_are_chosen_by_name_and_pattern_in_their_own_order():
    names = ["google-cifar10-ViT-B_32-dropout0", "demo"]
    assert [row.name for row in reproduce.choose(names)] == names[::-1]
    assert len(reproduce.choose(["predecessor-*"])) == 9
    assert len(reproduce.choose(None)) == len(ROWS)


def test_weights_are_found_under_the_usual_names():
    row = ROWS["reference-cifar10-R50-ViT-B_16-224-10000"]
    assert reproduce.weights(row, "checkpoint") == "checkpoint/imagenet21k_R50-ViT-B_16.npz"
    os.makedirs("checkpoint")
    for name in ("R50+ViT-B_16.npz", "imagenet21k_R50+ViT-B_16.npz"):
        Path("checkpoint", name).touch()
        assert reproduce.weights(row, "checkpoint") == f"checkpoint/{name}"


def test_missing_weights_name_the_download_before_any_work(capsys):
    code, out, error = run(capsys, "--rows", "predecessor-*", "reference-cifar10-R50*")
    assert (code, out) == (2, "")
    assert error.startswith("tools.reproduce: error: ")
    assert "tools/download.py ViT-B_32 ViT-L_32 R50-ViT-B_16" in error
    assert error.count("ViT-B_32.npz") == 1
    assert "--to" not in error
    assert os.listdir() == []
    assert run(capsys, "--rows", "predecessor-*", "--checkpoint_dir", "w")[2].endswith("ViT-B_32 ViT-L_32 --to w")
    code, _, error = run(capsys, "--rows", "demo")
    assert code == 2
    folder = error.split("it comes with this repository: give --checkpoint_dir ")[1]
    assert (Path(folder) / "ViT-demo.npz").is_file()
