"""Trainings beside published figures: the rows, their commands, and what is kept when one ends, fails or is stopped."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tests.helpers.forked import Forked
from tools import _results, reproduce

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


def train_here(child, words):
    """Runs train.py in this process, in the place of a child."""
    try:
        return train.main(words[2:])
    except SystemExit as e:
        return e.code


def write_weights():
    """Makes the testing model's pretrained file where the rows look for it."""
    os.makedirs("checkpoint")
    fake_npz.save("checkpoint/imagenet21k_testing.npz", fake_npz.arrays(CONFIGS["testing"], 32))


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


def test_list_prints_every_row_and_what_is_known(capfd):
    write_results(record_of("predecessor-a"))
    code, out, _ = run(capfd, "--list")
    assert code == 0
    assert [line.split() for line in out.splitlines()][1:] == [
        ["predecessor-a", "50.00", "12.50", "61.25", "%"], ["predecessor-b", "0.00"], ["google-slow", "99.00"],
    ]  # fmt: skip


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
@pytest.mark.parametrize(("log_dir", "number"), [("x/y", ""), ("logs", "-2")])
def test_logs_are_found_in_log_dir_and_beside_those_of_another_output_dir(log_dir, number, capfd):
    words = ["--rows", "predecessor-a", "--output_dir", "other", "--log_dir", log_dir, *CPU]
    assert run(capfd, *words)[0] == 0  # else the training counts as failed
    assert os.path.exists(f"{log_dir}/reproduce-predecessor-a{number}/metrics.jsonl")


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
