"""The processes that decode images: their ends, their errors, and those of the way that batches take."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import resource
import signal
import time

import pytest
import torch

from tests.helpers.error_faults import small_shared_memory
from tests.helpers.folders import as_files, numbered_images
from tests.helpers.forked import run_forked
from tests.helpers.runs import RUN, several_sizes, write_images
from utils import augment, data_utils

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    return as_files(numbered_images(12), tmp_path)


class Doing(augment.EvalTransform):
    """Does something in a worker before its third image."""

    def __init__(self, do):
        super().__init__(9)
        self.do, self.count = do, 0

    def image(self, image, draws):
        self.count += 1
        if self.count == 3:
            self.do()
        return super().image(image, draws)


def evaluated(images, do, num_workers=2):
    """Returns the batches' labels, and the class and the text of the error that ended them; keeps no error."""
    begin, labels, kind, text = time.monotonic(), [], None, ""
    try:
        labels += (y.tolist() for _, y in data_utils.eval_batches(images, 2, Doing(do), CPU, num_workers))
    except Exception as e:
        kind, text = type(e), str(e)
    assert time.monotonic() - begin < 30
    return labels, kind, text


class NeedsTwo(OSError):
    """Cannot be put together again where it arrives."""

    def __init__(self, a, b):
        super().__init__(a + b)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def crash():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


def lose_the_disk():
    raise OSError(5, "Input/output error", "a.png")


def lose_a_server():
    raise ConnectionResetError("the file server is gone")


def want_too_much():
    return bytearray(2**60)


def raise_what_cannot_be_sent():
    raise NeedsTwo("a", "b")


def raise_what_cannot_arrive():
    raise OSError(lambda: None)


KILLED = "process that decodes images was killed"


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (die, ChildProcessError, f"^a {KILLED}, perhaps for lack of memory; fewer --num_workers need less$"),
        (crash, ChildProcessError, rf"^a {KILLED} \(Segmentation fault\): an image may crash"),
        (leave, ChildProcessError, "^a process that decodes images ended with exit code 3; --num_workers 0"),
        (lose_the_disk, OSError, r"^\[Errno 5\] Input/output error: 'a.png'$"),
        (want_too_much, MemoryError, ""),
        (lose_a_server, ConnectionResetError, "^the file server is gone$"),
        (raise_what_cannot_be_sent, OSError, "^worker processes cannot hand over .*; give --num_workers 0$"),
        (raise_what_cannot_arrive, OSError, "^worker processes cannot hand over .*; give --num_workers 0$"),
    ],
)
def test_what_ends_a_worker_or_is_raised_in_one_ends_the_run_as_what_it_is(images, do, kind, message, capfd):
    _, found, text = evaluated(images, do)
    assert found is kind
    assert re.search(message, text)
    assert (KILLED in text) == (do in (die, crash))
    assert capfd.readouterr().err == ""
    assert do in (die, crash, leave) or multiprocessing.active_children() == []


@pytest.mark.parametrize("bug", [KeyError("a bug"), RuntimeError("DataLoader worker (pid 1) is killed by signal: 9")])
def test_a_bug_in_a_worker_keeps_its_traceback(tmp_path, monkeypatch, bug):
    def fail(*_):
        raise bug

    monkeypatch.chdir(tmp_path)
    write_images("pets", several_sizes())
    flags = [*RUN, "--dataset", "pets", "--num_workers", "2"]
    code, _, err = run_forked(["train.py", *flags], prepare=lambda: setattr(augment.TrainTransform, "image", fail))
    assert code == 1
    assert re.search(r"Traceback(.|\n)*in fail", err)
    assert "error:" not in err


def few_files(more):
    """Leaves this process that many more open files."""
    fds = [os.dup(0) for _ in range(more + 1)]
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_worker_without_files_ends_the_run_wherever_it_needs_one(images, capfd):
    """For the shared memory, for its copy, for the socket, to accept, to answer."""
    failed = 0
    for more in range(12):
        labels, kind, text = evaluated(images, functools.partial(few_files, more), num_workers=1)
        failed += kind is not None
        assert len(labels) == 6 or "too many open files; raise the limit (ulimit -n)" in text
    assert failed >= 3
    assert capfd.readouterr().err == ""


def test_a_run_without_files_ends_wherever_it_needs_one(tmp_path, monkeypatch):
    """To start workers, to receive a batch."""
    monkeypatch.chdir(tmp_path)
    write_images("pets", several_sizes())
    flags = [*RUN, "--dataset", "pets", "--num_workers", "2"]
    codes = []
    for more in range(4, 40, 6):
        code, _, err = run_forked(["train.py", *flags], prepare=functools.partial(few_files, more), timeout=30)
        codes.append(code)
        assert "Traceback" not in err
        assert code == 0 or "ulimit -n" in err or "Too many open files" in err
    assert set(codes) == {0, 1}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_way_to_start_processes_hands_errors_over(images, method):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        labels, kind, text = evaluated(images, raise_what_cannot_be_sent, num_workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert (labels, kind) == ([[0, 1]], OSError)
    assert text.startswith("worker processes cannot hand over")


@pytest.mark.parametrize(
    ("flags", "numbers", "remedy"),
    [
        (["--train_batch_size", "512"], r"4 of 3 MB .* need 12 MB; it has 2 MB, ", "--gradient_accumulation_steps"),
        (["--eval_batch_size", "240"], r"4 of 3 MB .* need 11 MB; it has 2 MB, ", "--eval_batch_size"),
        (["--train_batch_size", "512", "--num_workers", "0"], "", ""),
    ],
)
def test_a_small_shared_memory_is_one_line_with_numbers_that_fit(tmp_path, monkeypatch, flags, numbers, remedy):
    monkeypatch.chdir(tmp_path)
    write_images("pets", several_sizes(), per_class=120)
    flags = [*RUN, "--dataset", "pets", "--img_size", "64", "--num_steps", "2", "--num_workers", "2", *flags]
    begin = time.monotonic()
    code, _, err = run_forked(["train.py", *flags], prepare=small_shared_memory("2m"))
    assert time.monotonic() - begin < 30
    assert "Traceback" not in err
    assert code == (1 if remedy else 0)
    if remedy:
        *_, line = err.splitlines()
        assert line.startswith("train.py: error: /dev/shm is too small")
        assert re.search(numbers, line)
        assert all(text in line for text in ("--shm-size 1g", "--num_workers 0", remedy))
