"""Standard output and error as people have them: terminals, files, pipes that close, and none at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.helpers.forked import Forked, run_forked
from tests.helpers.runs import ROOT, SHORT, every_name_is_whole, last_state, lines, several_sizes, write_images
from utils import console
from utils.signals import SIGNALS

pytestmark = pytest.mark.usefixtures("pets")
PROGRAM = shlex.join([sys.executable, str(ROOT / "train.py"), *SHORT])
LINE = re.compile(r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d - (INFO|WARNING) - [\w.]+ - ")


@pytest.fixture(autouse=True)
def usual_signals(monkeypatch):
    """These tests may be under nohup, and what they start would inherit that."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def is_finished():
    """Tells that the run trained to its end, and that its files hold nothing of others."""
    every_name_is_whole()
    assert [line["step"] for line in lines()] == [2, 3, 4, 4]
    assert Path("output/a_report.html").read_text().rstrip().endswith("</html>")
    return last_state().step == 4


# ---- no terminal ----


@pytest.mark.parametrize("flags", [(), ("--num_workers", "2", "--dataset", "sizes")])
def test_a_file_gets_lines_only_each_from_its_own_beginning(flags):
    write_images("sizes", several_sizes())
    code, _, err = run_forked(["train.py", *SHORT, *flags])
    assert code == 0
    assert [line for line in err.splitlines() if not LINE.match(line)] == []
    assert not set(err) & {"\r", "\x1b"}
    progress = re.findall(r"Training: (\d)/4 steps, loss=\d\.\d{4}, \d+\.\d images/s, .+ left of .+\n", err)
    assert progress == ["1", "4"]
    assert [line["step"] for line in lines()] == [2, 3, 4, 4]


def test_what_takes_long_shows_lines_too(monkeypatch, capsys):
    from tqdm import tqdm

    monkeypatch.setattr(console, "LINE_SECS", 0.05)
    for _ in tqdm(range(8), "Validating", leave=False, **console.bar_options()):
        time.sleep(0.02)
    shown = capsys.readouterr().err
    assert re.fullmatch(r"(Validating: \d/8 \[00:0\d<00:0\d, .+/s\]\n)+", shown)
    assert shown.count("\n") <= 4


@pytest.mark.parametrize("columns", [80, 0])
def test_a_terminal_gets_a_bar_and_one_without_a_width_lines(columns):
    with on_a_terminal(columns=columns) as (child, read):
        shown = read()
        assert child.wait() == 0
    assert ("\rTraining: 100%" in shown) == (columns > 0)
    assert ("Training: 1/4 steps, loss" in shown) == (columns == 0)
    assert is_finished()


# ---- nobody reads ----


@contextlib.contextmanager
def on_a_terminal(*flags, columns=80, prepare=lambda: None):
    """Gives a run whose output is a terminal, and a function that returns what it shows until it shows a text."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def take_terminal():
        os.close(master)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.close(slave)
        prepare()

    with Forked(["train.py", *SHORT, *flags], prepare=take_terminal) as child:
        os.close(slave)
        try:
            yield child, lambda until=None: shown_on(master, until)
        finally:
            with contextlib.suppress(OSError):
                os.close(master)


def shown_on(master, until=None):
    """Reads a terminal until it shows a text, which closes it, or until nobody writes to it any more."""
    shown, deadline = "", time.monotonic() + 60
    while until is None or until not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 65536).decode()
            except OSError:  # nobody has it open
                break
    if until is not None:
        os.close(master)
    return shown


@pytest.mark.parametrize("until", ["Running training", "Global Steps: 2"])
def test_a_terminal_that_is_gone_ends_no_training_that_ignores_the_hang_up(until):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with on_a_terminal(prepare=ignore) as (child, read):
        read(until)
        os.kill(child.pid, signal.SIGHUP)
        assert child.wait() == 0
    assert is_finished()


@pytest.mark.parametrize("until", ["Running training", "Global Steps: 2"])
def test_a_signal_is_heeded_when_its_message_reaches_nobody(until):
    with on_a_terminal("--num_steps", "100000") as (child, read):
        read(until)
        wait_for_metrics(child)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait() == 128 + signal.SIGTERM
    every_name_is_whole()
    assert last_state().step >= 2


def wait_for_metrics(child):
    deadline = time.monotonic() + 60
    while not (Path("logs/a/metrics.jsonl").exists() and Path("logs/a/metrics.jsonl").stat().st_size):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_shells_terminal_that_closes_saves_and_stops():
    """The shell sends SIGHUP to its job and ends; then the kernel sends it another."""
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "HISTFILE": "/dev/null"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    os.write(master, f"{PROGRAM} --num_steps 3000 --eval_every 3000\n".encode())
    shown_on(master, until="/3000 steps")  # and closes it; before its steps a run has nothing to save
    assert shell.wait(60) == -signal.SIGHUP
    deadline = time.monotonic() + 60
    while not Path("output/a_last.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while Path("output/.a.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 1 <= last_state().step < 3000
    assert [line["step"] for line in lines() if line["step"] > last_state().step] == []


@pytest.mark.parametrize("flags", [(), ("--num_workers", "2", "--dataset", "sizes")])
def test_a_reader_that_leaves_ends_no_training(flags):
    write_images("sizes", several_sizes())
    read, write = os.pipe()

    def take_pipe():
        os.close(read)
        for fd in (1, 2):
            os.dup2(write, fd)

    with Forked(["train.py", *SHORT, *flags], prepare=take_pipe) as child:
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        assert child.wait() == 0
    assert is_finished()


@pytest.mark.parametrize("redirection", ["2>&1 | head -n 1", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_shells_redirections_end_no_training(redirection):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{PROGRAM} {redirection}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done
    assert done.stdout.count("\n") == ("head" in redirection)
    assert "Exception" not in done.stderr
    assert is_finished()


def test_a_signal_writes_into_no_file_that_got_the_number_of_a_closed_stream():
    child = subprocess.Popen(["bash", "-c", f"exec {PROGRAM} --num_steps 3000 --eval_every 3000 2>&- >&-"])
    wait_for_metrics(child)
    held = {os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in (1, 2)}
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM
    assert held == {"/dev/null"}
    every_name_is_whole()
    for path in Path("logs/a").iterdir():
        assert b"finishing the step" not in path.read_bytes()
    assert [json.loads(line)["step"] for line in Path("logs/a/metrics.jsonl").read_text().splitlines()]


def test_a_mistake_has_its_exit_code_when_nobody_reads_the_message():
    done = subprocess.run(["bash", "-c", f"{PROGRAM} --dataset none 2>&-"], capture_output=True, timeout=120)
    assert done.returncode == 2
