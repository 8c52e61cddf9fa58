"""Trainings beside published figures: which rows, which commands, what is kept when they end, fail or are stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tools import _published_results as published_rows
from tools import reproduce

#: Rows like the published ones, of a training of a second; what comes of "slow" takes minutes.
SHORT = ("--warmup_steps", "2", "--eval_every", "4", "--log_every", "2", "--learning_rate", "0.1")
TINY = {
    row.name: row
    for row in (
        reproduce.Row("predecessor-a", "testing", "digits", 32, 6, 16, 50.0, 12.5, SHORT),
        reproduce.Row("predecessor-b", "testing", "digits", 32, 8, 16, 0.0, None, SHORT),
        reproduce.Row("google-slow", "testing", "digits", 32, 100000, 64, 99.0, None, SHORT),
    )
}
CPU = ["--", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """With the testing model's weights where the rows look for them; every process computes with one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(reproduce, "ROWS", TINY)
    (tmp_path / "checkpoint").mkdir()
    from models import npz

    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    with open("checkpoint/imagenet21k_testing.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 32))


@pytest.fixture
def published(monkeypatch):
    """The real rows, each of which begins with the same call."""
    monkeypatch.setattr(reproduce, "ROWS", published_rows.ROWS)
    return published_rows.ROWS


def run(capfd, *args):
    """Status, standard output and the last line of standard error."""
    try:
        status = reproduce.main(list(args))
    except SystemExit as e:
        status = e.code
    out, err = capfd.readouterr()
    return status, out, (err.splitlines() or [""])[-1]


def record_of(name, **changes):
    """What is kept of a row that is done."""
    row = TINY[name]
    published = {"source": row.source, **{k: getattr(row, k) for k in (
        "name", "model_type", "dataset", "img_size", "num_steps", "batch_size", "accuracy", "secs")}}  # fmt: skip
    return {
        "status": "done", "accuracy": 61.25, "last_accuracy": 60.5, "secs": 3.0, "command": "python train.py",
        "hardware": "a processor", "versions": {}, "published": published, **changes,
    }  # fmt: skip


def write_results(**records):
    os.makedirs("output", exist_ok=True)
    rows = {name.replace("_", "-"): record for name, record in records.items()}
    Path("output/results.json").write_text(json.dumps({"rows": rows}))


def results():
    return json.loads(Path("output/results.json").read_text())["rows"]


# ---- the rows ----


def test_the_published_figures_are_those_of_the_page(published):
    docs = REPOSITORY / "docs"
    text = (docs / "results.md").read_text(encoding="utf-8").split("\n## Published by others\n")[1]
    assert f"Without `--rows` all {len(published)} are trained" in (docs / "tools.md").read_text(encoding="utf-8")
    tables = {}
    for head, body in re.findall(r"^(\| model \|.*)\n\|[ \-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        tables[head] = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    predecessor, reference, google = tables.values()

    names = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
    expected = {
        (model, names[data], int(px), int(steps), int(batch), float(accuracy), float(secs))
        for model, data, px, steps, batch, accuracy, secs in predecessor
    }
    found = [row for row in published.values() if row.name.startswith("predecessor-")]
    assert len(found) == 9
    assert expected == {
        (r.model_type, r.dataset, r.img_size, r.num_steps, r.batch_size, r.accuracy, r.secs) for r in found
    }

    model_of = {
        "B/16": "ViT-B_16",
        "B/32": "ViT-B_32",
        "L/16": "ViT-L_16",
        "L/32": "ViT-L_32",
        "R50+B/16": "R50-ViT-B_16",
    }
    expected = set()
    for first, px, *cells in reference:
        short, steps, warmup = re.match(r"([^,]+)(?:, (\d+) steps, (\d+) of warm-up)?", first).groups()
        for data, cell in zip(("cifar10", "cifar100"), cells):
            accuracy, hours, minutes = re.match(r"([\d.]+)(?: \((\d+) h (\d+) min\))?", cell).groups()
            secs = None if hours is None else 3600 * int(hours) + 60 * int(minutes)
            expected.add((model_of[short], data, int(px), int(steps or 10000), warmup or "500", float(accuracy), secs))
    found = [row for row in published.values() if row.name.startswith("reference-")]
    assert len(found) == len(expected)
    assert expected == {
        (r.model_type, r.dataset, r.img_size, r.num_steps, r.flags[1], r.accuracy, r.secs) for r in found
    }

    expected = {
        (model_of[short], data, dropout, float(accuracy))
        for short, *cells in google
        for data, cell in zip(("cifar10", "cifar100"), cells)
        for dropout, accuracy in zip(("0", "0.1"), cell.split(" / "))
    }
    found = [row for row in published.values() if row.name.startswith("google-")]
    assert len(found) == len(expected) == 20
    assert {(r.img_size, r.num_steps) for r in found} == {(384, 10000)}
    assert expected == {(r.model_type, r.dataset, r.flags[1], r.accuracy) for r in found}


def test_the_demo_is_that_of_make_demo(published, capfd):
    makefile = dict(re.findall(r"^(\w+) := (.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    words = f"{makefile['DEMO']} {makefile['DEMO_TRAINING']} --pretrained_dir checkpoint/ViT-demo.npz".split()
    _, out, _ = run(capfd, "--rows", "demo", "--dry_run")
    parse = train.make_parser().parse_args
    ours, theirs = vars(parse(shlex.split(out)[2:])), vars(parse(words))
    assert {k for k in ours if ours[k] != theirs[k]} == {"name", "resume"}  # make demo trains anew each time


def test_every_row_is_a_training_that_train_py_takes(published, capfd):
    status, out, _ = run(capfd, "--dry_run", "--", "--fp16")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == len(published)
    for line, row in zip(lines, published.values()):
        args = train.make_parser().parse_args(shlex.split(line)[2:])
        train.check_args(args)
        assert args.name == f"reproduce-{row.name}"
        shape = (args.model_type, args.dataset, args.img_size, args.num_steps, args.train_batch_size)
        assert shape == (row.model_type, row.dataset, row.img_size, row.num_steps, row.batch_size)
        if row.name != "demo":
            upstream = f"checkpoint/imagenet21k_{row.model_type}.npz"
            assert (args.learning_rate, args.weight_decay, args.pretrained_dir) == (0.03, 0, upstream)
        assert args.fp16
        assert args.gelu == ("tanh" if row.name.startswith("google") else "erf")
        assert args.hflip == row.name.startswith("google")


def test_rows_are_chosen_by_name_and_pattern_in_their_own_order(published):
    assert [row.name for row in reproduce.choose(["google-cifar10-ViT-B_32-dropout0", "demo"])] == [
        "demo", "google-cifar10-ViT-B_32-dropout0",
    ]  # fmt: skip
    assert len(reproduce.choose(["predecessor-*"])) == 9
    assert len(reproduce.choose(None)) == len(published)


def test_list_prints_every_row_and_what_is_known(capfd):
    write_results(predecessor_a=record_of("predecessor-a"))
    status, out, _ = run(capfd, "--list")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[1:] == [
        ["predecessor-a", "50.00", "12.50", "61.25", "%"], ["predecessor-b", "0.00"], ["google-slow", "99.00"],
    ]  # fmt: skip


def test_weights_are_found_under_the_usual_names(published):
    row = published["reference-cifar10-R50-ViT-B_16-224-10000"]
    assert reproduce.weights(row, "checkpoint") == "checkpoint/imagenet21k_R50-ViT-B_16.npz"
    for name in ("R50+ViT-B_16.npz", "imagenet21k_R50+ViT-B_16.npz"):
        Path("checkpoint", name).touch()
        assert reproduce.weights(row, "checkpoint") == f"checkpoint/{name}"


# ---- training them ----


def test_rows_are_trained_kept_and_not_trained_again(capfd):
    status, out, _ = run(capfd, "--rows", "predecessor-*", *CPU, "--seed", "7")
    assert status == 0
    found = results()
    assert list(found) == ["predecessor-a", "predecessor-b"]
    for name, row in list(TINY.items())[:2]:
        lines = [json.loads(x) for x in Path("logs", f"reproduce-{name}", "metrics.jsonl").read_text().splitlines()]
        accuracies = [100 * line["test/accuracy"] for line in lines if "test/accuracy" in line]
        assert len(accuracies) == 2
        told = json.loads(Path(f"output/reproduce-{name}_checkpoint.json").read_text())
        record = found[name]
        assert record["status"] == "done"
        assert record["accuracy"] == pytest.approx(max(accuracies), abs=1e-4)
        assert record["accuracy"] == pytest.approx(100 * told["accuracy"], abs=1e-4)
        assert record["last_accuracy"] == pytest.approx(accuracies[-1], abs=1e-4)
        assert 0 < record["secs"] < 120
        assert record["command"].endswith("--device cpu --seed 7")
        assert record["hardware"]
        assert record["versions"]["torch"]
        assert record["published"]["accuracy"] == row.accuracy
        assert record["command"] in out
        shown = f"{name}: {record['accuracy']:.2f} %, published {row.accuracy:.2f} %; see output/results.md"
        assert shown in out

    text = Path("output/results.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| testing" in line]
    a = found["predecessor-a"]
    assert rows[0][:11] == [
        "testing", "digits", "32", "6", "16", f"{a['accuracy']:.2f}", f"{a['last_accuracy']:.2f}", "50.00",
        f"{a['accuracy'] - 50:+.2f}", f"{a['secs']:.2f}", "12.50",
    ]  # fmt: skip
    assert rows[1][10] == ""
    assert len(rows) == 2
    assert text.count("## Published by") == 1

    before = Path("output/results.json").read_bytes()
    status, out, _ = run(capfd, "--rows", "predecessor-*", *CPU)
    assert status == 0
    assert out.count("is done") == 2
    assert Path("output/results.json").read_bytes() == before


def test_again_trains_a_row_that_is_done(capfd):
    assert run(capfd, "--rows", "predecessor-a", *CPU)[0] == 0
    assert run(capfd, "--rows", "predecessor-a", "--again", *CPU, "--seed", "7")[0] == 0
    assert "--seed 7" in results()["predecessor-a"]["command"]
    assert os.path.isdir("logs/reproduce-predecessor-a/earlier-1")


def test_rows_that_another_process_trains_meanwhile_are_kept_and_not_trained(capfd, monkeypatch):
    real = reproduce.Child.run

    def train_beside(self, words):
        write_results(predecessor_b=record_of("predecessor-b"))
        return real(self, words)

    monkeypatch.setattr(reproduce.Child, "run", train_beside)
    status, out, _ = run(capfd, "--rows", "predecessor-*", *CPU)
    assert status == 0
    assert "predecessor-b is done: 61.25 %" in out
    assert {name: record["status"] for name, record in results().items()} == {
        "predecessor-a": "done", "predecessor-b": "done",
    }  # fmt: skip
    assert results()["predecessor-b"] == record_of("predecessor-b")


def test_results_that_two_processes_write_at_once_are_both_kept():
    os.makedirs("output", exist_ok=True)
    other = """
import fcntl, json, sys, time
lock = open("output/.results.lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(1)
with open("output/results.json", "w") as f:
    f.write(sys.argv[1])
"""
    text = json.dumps({"rows": {"predecessor-b": record_of("predecessor-b")}})
    with subprocess.Popen([sys.executable, "-c", other, text], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        reproduce.keep("output", "predecessor-a", record_of("predecessor-a"))
    assert results().keys() == {"predecessor-a", "predecessor-b"}


def test_a_training_whose_logs_are_gone_is_not_called_done(capfd):
    assert run(capfd, "--rows", "predecessor-a", *CPU)[0] == 0
    os.remove("output/results.json")
    shutil.rmtree("logs")
    status, _, error = run(capfd, "--rows", "predecessor-a", *CPU)
    assert status == 1
    assert "logs/reproduce-predecessor-a cannot be read" in error
    assert "--again" in error
    assert results()["predecessor-a"]["status"] == "failed"
    assert run(capfd, "--rows", "predecessor-a", "--again", *CPU)[0] == 0
    assert results()["predecessor-a"]["status"] == "done"


def start(*args):
    """The tool as a process of its own, with the rows of this module."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from tests import test_reproduce as t"
            "; [t.signal.signal(n, t.signal.SIG_DFL) for n in t.reproduce.SIGNALS]"  # these tests may be under nohup
            "; t.reproduce.ROWS = t.TINY; sys.exit(t.reproduce.main(sys.argv[2:]))")  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code, str(REPOSITORY), *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(name, count):
    path, deadline = Path("logs", f"reproduce-{name}", "metrics.jsonl"), time.monotonic() + 100
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stopped_by(process, number):
    """Sends a signal; what the tool and the training then print."""
    process.send_signal(number)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number
    assert errors.count("stopped after update") == 1
    assert "at once" not in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_training_once(number):
    process = start("--rows", "google-slow", *CPU)
    wait_for_lines("google-slow", 3)
    stopped_by(process, number)
    assert results()["google-slow"]["status"] == "stopped"


def test_after_ctrl_c_the_same_command_goes_on():
    rows = ("--rows", "predecessor-a", "google-slow")
    process = start(*rows, *CPU)
    wait_for_lines("google-slow", 3)
    stopped_by(process, signal.SIGINT)
    first = results()
    assert {name: record["status"] for name, record in first.items()} == {
        "predecessor-a": "done", "google-slow": "stopped",
    }  # fmt: skip
    assert first["google-slow"]["secs"] > 0
    assert first["google-slow"]["accuracy"] is None
    assert "| stopped |" in Path("output/results.md").read_text()

    process = start(*rows, *CPU)
    for line in process.stderr:  # ends with the process, if the line never comes
        if "Going on after update" in line:
            break
    stopped_by(process, signal.SIGINT)
    second = results()
    assert second["predecessor-a"] == first["predecessor-a"]
    assert second["google-slow"]["status"] == "stopped"
    assert second["google-slow"]["secs"] > first["google-slow"]["secs"]


def test_the_time_of_a_training_whose_beginning_nobody_measured_is_not_told(capfd):
    args = reproduce.make_parser().parse_args(["--rows", "predecessor-a", *CPU])
    assert train.main(reproduce.command(TINY["predecessor-a"], args, args.extra)) == 0
    assert run(capfd, "--rows", "predecessor-a", *CPU)[0] == 0
    record = results()["predecessor-a"]
    assert (record["status"], record["secs"]) == ("done", None)


def test_a_row_that_fails_is_kept_as_such_and_the_others_go_on(capfd, monkeypatch):
    bad = reproduce.Row("predecessor-a", "testing", "digits", 32, 6, 16, 50.0, 12.5, (*SHORT[:-1], "1e38"))
    monkeypatch.setattr(reproduce, "ROWS", {**TINY, "predecessor-a": bad})
    assert run(capfd, "--rows", "predecessor-*", *CPU, "--eval_batch_size", "8")[0] == 1
    assert [record["status"] for record in results().values()] == ["failed", "done"]
    assert "| failed |" in Path("output/results.md").read_text()


@pytest.mark.parametrize("flags", [["--turbo"], ["--device", "tpu"], ["--device"]])
def test_what_train_py_does_not_take_ends_it(capfd, flags):
    status, _, error = run(capfd, "--rows", "predecessor-*", "--", *flags)
    assert status == 2
    assert error.startswith("train.py: error: ")
    assert flags[0] in error
    assert list(results()) == ["predecessor-a"]


# ---- wrong input ----


def test_missing_weights_name_the_download_before_any_work(published, capfd):
    shutil.rmtree("checkpoint")
    status, out, error = run(capfd, "--rows", "predecessor-*", "reference-cifar10-R50*")
    assert status == 2
    assert "tools/download.py ViT-B_32 ViT-L_32 R50-ViT-B_16" in error
    assert error.count("ViT-B_32.npz") == 1
    assert "--to" not in error
    assert out == ""
    assert os.listdir() == []
    assert error.startswith("tools.reproduce: error: ")
    assert run(capfd, "--rows", "predecessor-*", "--checkpoint_dir", "w")[2].endswith("ViT-B_32 ViT-L_32 --to w")
    status, _, error = run(capfd, "--rows", "demo")
    assert status == 2
    folder = error.split("it comes with this repository: give --checkpoint_dir ")[1]
    assert (Path(folder) / "ViT-demo.npz").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rows", "nosuch*"], "nosuch*"),
        (["--rows", "predecessor-a", "--", "--num_steps", "5"], "--num_steps"),
        (["--rows", "predecessor-a", "--", "--num_st=5"], "--num_st=5"),
        (["--rows", "predecessor-a", "--", "-v"], "-v"),
        (["--rows", "predecessor-a", "--", "--hflip"], "--hflip"),
        (["--turbo"], "--turbo"),
        (["--rows"], "--rows"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(args, words, capfd):
    status, out, error = run(capfd, *args)
    assert status == 2
    assert words in error
    assert error.startswith("tools.reproduce: error: ")
    assert out == ""
    assert sorted(os.listdir()) == ["checkpoint"]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"rows": []}', '{"rows": {"a": {"status": "done"}}}', '{"rows": {"a": 3}}',
        *(json.dumps({"rows": {"predecessor-a": record_of("predecessor-a", **change)}})
          for change in ({"accuracy": None}, {"published": {}}, {"secs": "long"})),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_results_is_not_replaced(text, capfd):
    os.makedirs("output")
    Path("output/results.json").write_text(text)
    status, _, error = run(capfd, "--rows", "predecessor-a", *CPU)
    assert status == 2
    assert "output/results.json does not hold results" in error
    assert Path("output/results.json").read_text() == text
