"""Faults that befall a training: disk, memory, workers, losses, signals, other ranks; and its warnings.

Whatever ends a run, its files are whole, and the last saved state is there to resume from.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from models.modeling import VisionTransformer
from tests.helpers.error_inputs import finetuned
from tests.helpers.errors import Case, Group, Launch
from tests.helpers.forked import run_forked
from tests.helpers.runs import RUN, every_name_is_whole, last_state, lines, several_sizes, write_images
from utils import datasets

CLONE_NEWNS = 0x20000  # linux/sched.h

#: 13 steps; evaluations, and with them saves, after 5, 10 and 13; two micro-batches a step.
AT = 5  # the last saved step before what happens after step 7


def after_step(number: int, do: Callable[[], object]) -> Callable[[], None]:
    """Something happens in the child when the optimizer has made a step."""

    def prepare() -> None:
        steps = iter(range(1, 1_000_000))
        register_optimizer_step_post_hook(
            lambda *_: do() if next(steps) == number else None  # type: ignore[arg-type]
        )

    return prepare


def in_forward(after: int, do: Callable[[Any], Any], training: bool = True) -> Callable[[], None]:
    """From that step on, ``do`` gets what each forward pass returns, and gives what it is to return instead."""

    def prepare() -> None:
        steps = [0]
        register_optimizer_step_post_hook(lambda *_: steps.append(0))

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            due = isinstance(module, VisionTransformer) and module.training == training and len(steps) > after
            return do(output) if due else None

        register_module_forward_hook(hook)

    return prepare


def whole(step: int | None = AT) -> None:
    """Fails unless the files are whole, and the saved state is of that step; None: there is none."""
    every_name_is_whole()
    assert os.path.exists("output/a_last.pt") == (step is not None)
    assert step is None or last_state().step == step
    assert not list(Path("output").glob("*.tmp"))


def befallen(
    prepare: Callable[[], None], *flags: str, after: Callable[[], object] = whole, **options: Any
) -> Callable[[], Launch]:
    """A training to which something happens."""
    return lambda: Launch(flags, prepare=prepare, after=after, writes=True, **options)


# ---- the disk ----


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("needs the right to mount")


@contextlib.contextmanager
def mounted(folder: str) -> Iterator[None]:
    """Gives a folder a small file system of its own."""
    os.makedirs(folder, exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    try:
        yield
    finally:
        while not subprocess.run(["umount", folder], capture_output=True).returncode:
            pass


def fill(folder: str) -> None:
    """Leaves no byte free."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "filler"), "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


def resumes(*flags: str) -> None:
    """Fails unless the same command ends well."""
    code, _, err = run_forked(["train.py", *RUN, *flags])
    assert code == 0, err


def full_disk() -> Launch:
    def after() -> None:
        whole()
        os.remove("output/filler")
        resumes()
        assert last_state().step == 13

    return Launch(prepare=after_step(7, lambda: fill("output")), within=mounted("output"), after=after)


def full_logs() -> Launch:
    flags = ["--train_batch_size", "2", "--num_steps", "80", "--log_every", "1", "--eval_every", "100",
             "--save_every", "5"]  # fmt: skip

    def after() -> None:
        every_name_is_whole()
        assert last_state().step >= 5
        os.remove("logs/filler")
        resumes(*flags)
        assert [line["step"] for line in lines()] == [*range(1, 81), 80]

    return Launch(flags, prepare=after_step(6, lambda: fill("logs")), within=mounted("logs"), after=after)


def read_only() -> None:
    mount("--bind", "output", "output")
    mount("-o", "remount,bind,ro", "output")


def becomes_read_only() -> Launch:
    return Launch(prepare=after_step(7, read_only), within=mounted("output"), after=whole)


@contextlib.contextmanager
def mounted_read_only() -> Iterator[None]:
    with mounted("output"):
        read_only()
        yield


def no_locks() -> None:
    """As on a network disk without them."""
    import fcntl

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lockf


def other_output() -> Launch:
    resumes("--num_steps", "5")
    return Launch(["--num_steps", "5", "--output_dir", "other"], writes=True)


def limit_file_sizes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# ---- the machine ----

PETS = ["--dataset", "pets", "--num_steps", "200", "--eval_every", "5"]


def pets_of_several_sizes(
    prepare: Callable[[], None], *flags: str, after: Callable[[], object] = whole
) -> Callable[[], Launch]:
    """The same with images that worker processes decode."""

    def make() -> Launch:
        write_images("pets", several_sizes())
        return Launch([*PETS, *flags], prepare=prepare, after=after, writes=True)

    return make


def kill_workers() -> None:
    workers = [p for p in torch.multiprocessing.active_children() if p.is_alive()]
    assert len(workers) == 2
    for p in workers:
        os.kill(p.pid, signal.SIGKILL)


def small_shared_memory(size: str) -> Callable[[], None]:
    """Gives a child, in which the result is called, a /dev/shm of its own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")

    def prepare() -> None:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)

    return prepare


def too_small_for_a_batch() -> Launch:
    write_images("pets", several_sizes())
    flags = [*PETS, "--img_size", "64", "--train_batch_size", "512", "--num_workers", "2"]
    return Launch(flags, prepare=small_shared_memory("2m"), after=lambda: whole(None), writes=True)


def use_temporary_folder(path: str) -> None:
    """Lets a child, which knows that of the test, use another."""
    os.makedirs(path)
    os.environ["TMPDIR"], tempfile.tempdir = path, None
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]


def open_no_more_files() -> None:
    """Leaves a process the files that it has."""
    fd = os.dup(0)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def cut_images() -> None:
    for path in Path("pets/train").rglob("*.png"):
        os.truncate(path, os.path.getsize(path) // 2)


def saved_since() -> None:
    """Fails unless the state is of a step that followed: processes had decoded some batches before."""
    assert last_state().step >= 7
    whole(last_state().step)


def no_memory_of_host(output: Any) -> Any:
    return torch.empty(2**60, dtype=torch.uint8)  # raises what torch raises when the system gives it no memory


def no_memory_of_gpu(output: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def little_memory() -> None:
    """Half a GiB of addresses more, which is enough for this model, and not for its batch."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**29
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def no_compiler() -> Launch:
    place = os.path.abspath("nosuch/g++")

    def prepare() -> None:
        from torch._inductor import config

        config.cpp.cxx = (place,)

    return Launch(
        [*finetuned()(), "--compile"],
        env={"CXX": place, "TORCHINDUCTOR_CACHE_DIR": "cache"},
        prepare=prepare,
        writes=True,
    )


# ---- losses and signals ----

DIVERGING = ["--learning_rate", "1e38", "--max_grad_norm", "inf"]
FLOAT16 = ["--fp16", "--fp16_opt_level", "O1", "--amp_dtype", "float16"]


def no_checkpoint() -> None:
    every_name_is_whole()
    assert "NaN" not in Path("logs/a/metrics.jsonl").read_text()
    assert not os.path.exists("output/a_checkpoint.bin")


def saved_before_it_diverged() -> None:
    no_checkpoint()
    assert last_state().step >= 1
    assert all(x.isfinite().all() for x in last_state().model.values())


def raise_signal(number: signal.Signals, times: int) -> Callable[[], None]:
    return after_step(7, lambda: [os.kill(os.getpid(), number) for _ in range(times)])


def interrupt_loading() -> None:
    datasets.load = lambda *args, **options: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[assignment]


FAULTS = [
    Group("The disk", flags=RUN, cases=[
        Case("disk-full", "no room for the state or the best weights", full_disk, "output/a_checkpoint.bin", 1),
        Case("disk-full-logs", "no room for the logs", full_logs, "logs/a/", 1),
        Case("disk-read-only", "the disk becomes read-only", becomes_read_only, "output/a_checkpoint.bin", 1),
        Case("folder-read-only", "a read-only folder, from the start", lambda: Launch(within=mounted_read_only()),
             "output"),
        Case("log-dir-empty", "an empty `--log_dir`", "--log_dir=", "--log_dir"),
        Case("logs-of-another", "a name that a run of another `--output_dir` has", other_output, "logs/a-2", 0),
        Case("folder-vanished", "the folder vanishes",
             befallen(after_step(7, lambda: shutil.rmtree("output")), after=lambda: None), "output/a_checkpoint.bin",
             1),
        Case("file-size-limit", "files may not be that large", befallen(after_step(7, limit_file_sizes)),
             "output/a_checkpoint.bin", 1),
        Case("locks-missing", "a file system without locks, such as NFS without its daemon",
             befallen(no_locks, after=lambda: whole(13)), "locked", 0),
    ]),
    Group("The machine", flags=RUN, cases=[
        Case("worker-killed", "a process that decodes images is killed",
             pets_of_several_sizes(after_step(7, kill_workers), "--num_workers", "2"), "--num_workers", 1),
        Case("shared-memory-small", "a small /dev/shm, as of a container", too_small_for_a_batch, "--shm-size", 1),
        Case("temporary-folder-long", "a temporary folder whose path is too long for a socket",
             pets_of_several_sizes(lambda: use_temporary_folder(os.path.abspath("x" * 100)), "--num_workers", "2",
                                   after=lambda: whole(None)), "TMPDIR", 1),
        Case("open-files-limit", "too many open files",
             pets_of_several_sizes(after_step(7, open_no_more_files), "--num_workers", "2"), "ulimit -n", 1),
        Case("image-turned-unreadable", "an image that turned unreadable",
             pets_of_several_sizes(after_step(7, cut_images), after=lambda: whole(7)), "pets/train/"),
        Case("image-turned-unreadable-worker", "the same, found by a worker",
             pets_of_several_sizes(after_step(7, cut_images), "--num_workers", "2", after=saved_since), "pets/train/"),
        Case("memory-step-cpu", "no memory for a step, on a CPU", befallen(in_forward(7, no_memory_of_host)),
             "--gradient_accumulation_steps 4", 1),
        Case("memory-step-gpu", "no memory for a step, on a GPU",
             befallen(in_forward(7, no_memory_of_gpu), "--gradient_accumulation_steps", "1"),
             "--gradient_accumulation_steps 2", 1),
        Case("memory-step-real", "no memory, and the system says so", lambda: Launch(
             ["--train_batch_size", "1024", "--gradient_accumulation_steps", "1", "--img_size", "192"],
             prepare=little_memory), "--gradient_accumulation_steps 2", 1),
        Case("memory-one-image", "no memory for a single image",
             befallen(in_forward(7, no_memory_of_gpu), "--gradient_accumulation_steps", "16"), "--img_size", 1),
        Case("memory-evaluation", "no memory for an evaluation",
             befallen(in_forward(7, no_memory_of_gpu, training=False)), "--eval_batch_size", 1),
        Case("compile-failed", "no C++ compiler for `--compile`", no_compiler, "--compile", 1),
    ]),
    Group("Losses that are not finite", flags=RUN, cases=[
        Case("loss-diverged", "the training diverges",
             befallen(lambda: None, *DIVERGING, "--eval_every", "100", after=no_checkpoint), "train/loss", 1),
        Case("loss-diverged-evaluation", "an evaluation finds it first",
             befallen(lambda: None, *DIVERGING, "--eval_every", "3", "--log_every", "100", after=no_checkpoint),
             "test/loss", 1),
        Case("loss-diverged-save", "a save finds it first",
             befallen(lambda: None, *DIVERGING, "--save_every", "1", "--log_every", "100", "--eval_every", "100",
                      after=saved_before_it_diverged), "weights", 1),
        Case("loss-nan-after-save", "the training diverges after a save",
             befallen(in_forward(6, lambda loss: loss * float("nan"))), "output/a_last.pt", 1),
        Case("loss-nan-before-save", "the same after an evaluation, before the first save",
             befallen(in_forward(6, lambda loss: loss * float("nan")), "--save_every", "100",
                      after=lambda: whole(None)), "output/a_checkpoint.bin", 1),
        Case("loss-scale-exhausted", "float16 gradients overflow again and again",
             befallen(in_forward(5, lambda loss: loss * 1e30), *FLOAT16, "--num_steps", "90", "--eval_every", "100",
                      "--save_every", "3", after=lambda: whole(54)), "--amp_dtype bfloat16", 1),
    ]),
    Group("Signals", flags=RUN, cases=[
        Case("interrupted-once", "Ctrl-C, once",
             befallen(raise_signal(signal.SIGINT, 1), after=lambda: whole(7)), "7", 130),
        Case("interrupted-twice", "Ctrl-C, twice", befallen(raise_signal(signal.SIGINT, 2)), "SIGINT", 130),
        Case("terminated-once", "SIGTERM, as from `kill` or a scheduler, once",
             befallen(raise_signal(signal.SIGTERM, 1), after=lambda: whole(7)), "7", 143),
        Case("terminated-twice", "SIGTERM, as from `kill` or a scheduler, twice",
             befallen(raise_signal(signal.SIGTERM, 2)), "SIGTERM", 143),
        Case("interrupted-early", "Ctrl-C before the training",
             lambda: Launch(prepare=interrupt_loading), "interrupted", 130),
    ]),
]  # fmt: skip
