"""Trainings beside published figures: the rows, their commands, and what is kept when one ends, fails or is stopped."""

import contextlib
import io
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
from models import npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers.forked import Forked
from tools import _published_results as published_rows
from tools import _results, reproduce
from utils import args as flags

#: Rows like the published ones, of a training of a second; "slow" takes minutes.
SHORT = ("--warmup_steps", "2", "--eval_every", "4", "--log_every", "2", "--learning_rate", "0.1")
TINY = {
    row.name: row
    for row in (
        reproduce.Row("predecessor-a", "testing", "digits", 32, 6, 16, 50.0, 12.5, SHORT),
        reproduce.Row("predecessor-b", "testing", "digits", 32, 8, 16, 0.0, None, SHORT),
        reproduce.Row("google-slow", "testing", "digits", 32, 100000, 16, 99.0, None, SHORT),
    )
}
CPU = ["--", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROWS", TINY)


@pytest.fixture
def published(monkeypatch):
    """The real rows."""
    monkeypatch.setattr(reproduce, "ROWS", published_rows.ROWS)
    return published_rows.ROWS


def train_here(child, words):
    """Runs train.py in this process, in the place of a child."""
    try:
        return train.main(words[2:])
    except SystemExit as e:
        return e.code


def write_weights():
    """Makes the testing model's pretrained file where the rows look for it."""
    os.makedirs("checkpoint")
    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    with open("checkpoint/imagenet21k_testing.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 32))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder in which two rows have been trained, and what that printed."""
    folder, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(reproduce, "ROWS", TINY)
        patch.setattr(reproduce.Child, "run", train_here)
        write_weights()
        assert reproduce.main(["--rows", "predecessor-*", *CPU, "--seed", "7"]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def trained(once, tmp_path):
    """A copy of that folder, to work in; what the training printed."""
    shutil.copytree(once[0], tmp_path, dirs_exist_ok=True)
    return once[1]


@pytest.fixture
def here(monkeypatch):
    """Trainings run in this process."""
    monkeypatch.setattr(reproduce.Child, "run", train_here)


def run(capfd, *args):
    """Returns the exit code, standard output and the last line of standard error."""
    try:
        code = reproduce.main(list(args))
    except SystemExit as e:
        code = e.code
    out, err = capfd.readouterr()
    return code, out, (err.splitlines() or [""])[-1]


def record_of(name, **changes):
    """Returns the record of a row that is done."""
    row = TINY[name]
    published = {"source": row.source, **{k: getattr(row, k) for k in (
        "name", "model_type", "dataset", "img_size", "num_steps", "batch_size", "accuracy", "secs")}}  # fmt: skip
    return {
        "status": "done", "accuracy": 61.25, "last_accuracy": 60.5, "secs": 3.0, "command": "python train.py",
        "hardware": "a processor", "versions": {}, "published": published, **changes,
    }  # fmt: skip


def write_results(*records):
    os.makedirs("output", exist_ok=True)
    Path("output/results.json").write_text(json.dumps({"rows": {r["published"]["name"]: r for r in records}}))


def results():
    return json.loads(Path("output/results.json").read_text())["rows"]


# ---- the rows ----


def test_the_published_figures_are_those_of_the_page(published):
    docs = REPOSITORY / "docs"
    text = (docs / "results.md").read_text(encoding="utf-8").split("\n## Published by others\n")[1]
    assert f"Without `--rows` all {len(published)} are trained" in (docs / "tools.md").read_text(encoding="utf-8")
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        for body in re.findall(r"^\| model \|.*\n\|[ \-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    ]
    predecessor, reference, google = tables
    data_sets = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
    models = {"B/16": "ViT-B_16", "B/32": "ViT-B_32", "L/16": "ViT-L_16", "L/32": "ViT-L_32",
              "R50+B/16": "R50-ViT-B_16"}  # fmt: skip

    def rows_of(source, *facts):
        rows = [row for row in published.values() if row.name.startswith(source)]
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


def test_the_demo_is_that_of_make_demo(published, capfd):
    makefile = dict(re.findall(r"^(\w+) := (.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    words = f"{makefile['DEMO']} {makefile['DEMO_TRAINING']} --pretrained_dir checkpoint/ViT-demo.npz".split()
    _, out, _ = run(capfd, "--rows", "demo", "--dry_run")
    parse = flags.make_parser().parse_args
    ours, theirs = vars(parse(shlex.split(out)[2:])), vars(parse(words))
    assert {k for k in ours if ours[k] != theirs[k]} == {"name", "resume"}  # make demo trains anew each time


def test_every_row_is_a_training_that_train_py_takes(published, capfd):
    code, out, _ = run(capfd, "--dry_run", "--", "--fp16")
    assert code == 0
    for line, row in zip(out.splitlines(), published.values(), strict=True):
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


def test_rows_are_chosen_by_name_and_pattern_in_their_own_order(published):
    names = ["google-cifar10-ViT-B_32-dropout0", "demo"]
    assert [row.name for row in reproduce.choose(names)] == names[::-1]
    assert len(reproduce.choose(["predecessor-*"])) == 9
    assert len(reproduce.choose(None)) == len(published)


def test_list_prints_every_row_and_what_is_known(capfd):
    write_results(record_of("predecessor-a"))
    code, out, _ = run(capfd, "--list")
    assert code == 0
    assert [line.split() for line in out.splitlines()][1:] == [
        ["predecessor-a", "50.00", "12.50", "61.25", "%"], ["predecessor-b", "0.00"], ["google-slow", "99.00"],
    ]  # fmt: skip


def test_weights_are_found_under_the_usual_names(published):
    row = published["reference-cifar10-R50-ViT-B_16-224-10000"]
    assert reproduce.weights(row, "checkpoint") == "checkpoint/imagenet21k_R50-ViT-B_16.npz"
    os.makedirs("checkpoint")
    for name in ("R50+ViT-B_16.npz", "imagenet21k_R50+ViT-B_16.npz"):
        Path("checkpoint", name).touch()
        assert reproduce.weights(row, "checkpoint") == f"checkpoint/{name}"


# ---- training them ----


def test_rows_are_trained_and_kept(trained):
    assert list(results()) == ["predecessor-a", "predecessor-b"]
    for name, record in results().items():
        lines = [json.loads(x) for x in Path("logs", f"reproduce-{name}", "metrics.jsonl").read_text().splitlines()]
        accuracies = [100 * line["test/accuracy"] for line in lines if "test/accuracy" in line]
        assert len(accuracies) == 2
        assert record["status"] == "done"
        assert record["accuracy"] == pytest.approx(max(accuracies), abs=1e-4)
        assert record["last_accuracy"] == pytest.approx(accuracies[-1], abs=1e-4)
        assert 0 < record["secs"] < 120
        assert record["command"].endswith("--device cpu --seed 7")
        assert record["command"] in trained
        assert record["hardware"]
        assert record["versions"]["torch"]
        assert record["published"]["accuracy"] == TINY[name].accuracy
        shown = f"{name}: {record['accuracy']:.2f} %, published {TINY[name].accuracy:.2f} %; see output/results.md"
        assert shown in trained

    text = Path("output/results.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| testing" in line]
    a = results()["predecessor-a"]
    assert rows[0][:11] == [
        "testing", "digits", "32", "6", "16", f"{a['accuracy']:.2f}", f"{a['last_accuracy']:.2f}", "50.00",
        f"{a['accuracy'] - 50:+.2f}", f"{a['secs']:.2f}", "12.50",
    ]  # fmt: skip
    assert rows[1][10] == ""
    assert len(rows) == 2
    assert text.count("## Published by") == 1


@pytest.mark.usefixtures("trained", "here")
def test_a_row_that_is_done_is_trained_only_with_again(capfd):
    before = Path("output/results.json").read_bytes()
    code, out, _ = run(capfd, "--rows", "predecessor-*", *CPU)
    assert (code, out.count("is done")) == (0, 2)
    assert Path("output/results.json").read_bytes() == before
    assert run(capfd, "--rows", "predecessor-a", "--again", *CPU, "--seed", "8")[0] == 0
    assert "--seed 8" in results()["predecessor-a"]["command"]
    assert os.path.isdir("logs/reproduce-predecessor-a/earlier-1")


@pytest.mark.usefixtures("trained", "here")
def test_a_training_whose_logs_are_gone_is_not_called_done(capfd):
    os.remove("output/results.json")
    shutil.rmtree("logs")
    code, _, error = run(capfd, "--rows", "predecessor-a", *CPU, "--seed", "7")
    assert code == 1
    assert "logs/reproduce-predecessor-a cannot be read" in error
    assert "--again" in error
    assert results()["predecessor-a"]["status"] == "failed"


@pytest.mark.usefixtures("trained", "here")
def test_the_time_of_a_training_whose_beginning_nobody_measured_is_not_told(capfd):
    os.remove("output/results.json")
    assert run(capfd, "--rows", "predecessor-a", *CPU, "--seed", "7")[0] == 0
    assert (results()["predecessor-a"]["status"], results()["predecessor-a"]["secs"]) == ("done", None)


@pytest.mark.usefixtures("trained")
def test_rows_that_another_process_trains_meanwhile_are_kept_and_not_trained(capfd, monkeypatch):
    os.remove("output/results.json")
    monkeypatch.setattr(reproduce.Child, "run", lambda *_: write_results(record_of("predecessor-b")) or 0)
    code, out, _ = run(capfd, "--rows", "predecessor-*", *CPU)
    assert code == 0
    assert "predecessor-b is done: 61.25 %" in out
    assert results()["predecessor-a"]["status"] == "done"
    assert results()["predecessor-b"] == record_of("predecessor-b")


@pytest.mark.usefixtures("trained")
def test_a_row_that_fails_is_kept_as_such_and_the_others_are_trained(capfd, monkeypatch):
    os.remove("output/results.json")
    monkeypatch.setattr(reproduce.Child, "run", lambda _, words: int("reproduce-predecessor-a" in words))
    assert run(capfd, "--rows", "predecessor-*", *CPU)[0] == 1
    assert [record["status"] for record in results().values()] == ["failed", "done"]
    assert "| failed |" in Path("output/results.md").read_text()


def test_results_that_two_processes_write_at_once_are_both_kept():
    os.makedirs("output")
    other = """
import fcntl, sys, time
lock = open("output/.results.lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(0.3)
with open("output/results.json", "w") as f:
    f.write(sys.argv[1])
"""
    text = json.dumps({"rows": {"predecessor-b": record_of("predecessor-b")}})
    with subprocess.Popen([sys.executable, "-c", other, text], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        _results.keep("output", "predecessor-a", record_of("predecessor-a"), TINY)
    assert list(results()) == ["predecessor-a", "predecessor-b"]


@pytest.mark.usefixtures("here")
def test_flags_that_train_py_does_not_take_end_it(capfd):
    write_weights()
    for words in (["--turbo"], ["--device", "tpu"], ["--device"]):
        code, _, error = run(capfd, "--rows", "predecessor-*", "--", *words)
        assert code == 2
        assert error.startswith("train.py: error: ")
        assert words[0] in error
        assert list(results()) == ["predecessor-a"]


# ---- signals ----


def start(*args):
    """The tool in a process of its own."""

    def usual_signals():  # these tests may be under nohup
        for number in reproduce.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    return Forked(["tools.reproduce", *args], env={"OMP_NUM_THREADS": "1"}, prepare=usual_signals)


def wait_for_file(path, tool):
    while not os.path.exists(path) or not os.path.getsize(path):
        assert tool.poll() is None, tool.stderr()
        time.sleep(0.01)


#: In train.py's place: notes the signals of half a second.
NOTING = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: print(number, file=open("signals", "a")))
print(file=open("ready", "w"), flush=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    time.sleep(0.01)
sys.exit(1)
"""


@pytest.mark.parametrize(("number", "passed"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_a_signal_reaches_the_training_once_as_one_that_it_handles(number, passed, tmp_path, monkeypatch):
    write_weights()
    (tmp_path / "noting.py").write_text(NOTING)
    monkeypatch.setattr(reproduce, "TRAIN", str(tmp_path / "noting.py"))
    with start("--rows", "google-slow", *CPU) as tool:
        wait_for_file("ready", tool)
        os.killpg(tool.pid, signal.Signals[number])  # as a terminal does
        assert tool.wait() == 128 + signal.Signals[number]
    assert Path("signals").read_text().split() == [str(int(signal.Signals[passed]))]
    assert results()["google-slow"]["status"] == "stopped"


@pytest.mark.usefixtures("trained")
def test_after_ctrl_c_the_same_command_resumes():
    secs, done = [0.0], results()["predecessor-a"]
    for resumed in (False, True):
        with start("--rows", "predecessor-a", "google-slow", *CPU) as tool:
            if resumed:
                tool.wait_for("Resumed after step")
            else:
                wait_for_file("logs/reproduce-google-slow/metrics.jsonl", tool)
            os.kill(tool.pid, signal.SIGINT)
            assert tool.wait() == 130
            assert tool.stderr().count("stopped after step") == 1
            assert "Traceback" not in tool.stderr()
        record = results()["google-slow"]
        assert (record["status"], record["accuracy"]) == ("stopped", None)
        secs.append(record["secs"])
    assert secs == sorted(set(secs))
    assert results()["predecessor-a"] == done
    assert "| stopped |" in Path("output/results.md").read_text()


# ---- wrong input ----


def test_missing_weights_name_the_download_before_any_work(published, capfd):
    code, out, error = run(capfd, "--rows", "predecessor-*", "reference-cifar10-R50*")
    assert (code, out) == (2, "")
    assert error.startswith("tools.reproduce: error: ")
    assert "tools/download.py ViT-B_32 ViT-L_32 R50-ViT-B_16" in error
    assert error.count("ViT-B_32.npz") == 1
    assert "--to" not in error
    assert os.listdir() == []
    assert run(capfd, "--rows", "predecessor-*", "--checkpoint_dir", "w")[2].endswith("ViT-B_32 ViT-L_32 --to w")
    code, _, error = run(capfd, "--rows", "demo")
    assert code == 2
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
def test_wrong_input_is_one_line_and_exit_code_2(args, words, capfd):
    code, out, error = run(capfd, *args)
    assert (code, out) == (2, "")
    assert words in error
    assert error.startswith("tools.reproduce: error: ")
    assert os.listdir() == []


def test_flags_that_make_no_other_training_may_be_given():
    reproduce.check_extra(["--fp16", "--seed", "7", "--device", "cpu", "--gradient_accumulation_steps=8"])


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
    code, _, error = run(capfd, "--rows", "predecessor-a", *CPU)
    assert code == 2
    assert "output/results.json does not hold results" in error
    assert Path("output/results.json").read_text() == text
