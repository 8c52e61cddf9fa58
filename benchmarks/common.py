"""Turns, processes, memory and tables: for all measurements of speed.

A contender is built by a picklable function and takes turns: ``run()`` is one turn and gives its
seconds.  ``crew`` starts each in a process of its own, so that what one sets for its process (the
allocator, the number formats of matrix products) is not the others'; only one computes at a time.

This module must not know models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from utils.hardware import device_name

PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow")
#: Starts contenders' processes with nothing loaded, so that memory and settings are their own.
START_METHOD: Any = "spawn"
#: Instruction sets that decide how fast matrix products are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "bf16", "i8mm", "sve")


class Contender(Protocol):
    """Takes turns; ``note`` names the settings it runs with."""

    note: tuple[str, ...]

    def run(self) -> float: ...


@dataclass(frozen=True)
class Job:
    """Tells how to make a contender.

    Attributes:
        build: makes it, wherever it is to run; picklable.
        imports: modules to import before memory counts as the contender's.
        device, threads: where and with how many threads it computes.
    """

    build: Callable[[], Contender]
    imports: Sequence[str]
    device: str
    threads: int


# ---- the machine ----


def cpu_info() -> tuple[str, list[str]]:
    """Returns the processor's name and those of CPU_FLAGS that it has, as Linux tells them."""
    name, flags = device_name(torch.device("cpu")), set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    return name, [flag for flag in CPU_FLAGS if flag in flags]


def version(package: str) -> str:
    """Returns a package's version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor(device: str) -> str:
    """Returns the kind of what computes: its name and what decides how fast its matrix products are."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    name, flags = cpu_info()
    return f"{name} ({', '.join(flags) or 'no known flag'})"


def hardware(threads: int, device: str) -> str:
    """Returns two lines: date, processor and what of it is used; versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{processor('cpu')}, {cores} cores, {threads} threads"
    if device == "cuda":
        machine = f"{processor(device)}; {machine}"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{date.today()}, {machine}\nPython {platform.python_version()}, {versions}"


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---- time ----


def timed(do: Callable[[], Any], repeats: int, device: str) -> float:
    """Returns the seconds of one ``do()``, the mean of ``repeats`` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        do()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def take_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs each once a round; the order rotates, so that nobody always follows the same one."""
    names = list(runs)
    results: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(runs[name]())
    return results


@dataclass(frozen=True)
class Speed:
    """Turns of equal work, as rates.

    Attributes:
        secs: of every turn.
        work: units (images) of one turn.
    """

    secs: Sequence[float]
    work: float

    @property
    def median(self) -> float:
        """Units per second in the median turn."""
        return self.work / statistics.median(self.secs)

    def times(self, other: Speed) -> float:
        """Returns how many times as fast as another this one is, in the median round.

        Turns of one round are compared with each other: a machine that is slow for a while is slow for both.
        """
        if len(self.secs) != len(other.secs):
            return self.median / other.median
        ratios = (theirs / ours for ours, theirs in zip(self.secs, other.secs))
        return statistics.median(ratios) * self.work / other.work

    @property
    def spread(self) -> str:
        """The slowest and the fastest turn."""
        return f"{number(self.work / max(self.secs))} - {number(self.work / min(self.secs))}"


# ---- memory ----


def status_bytes(key: str) -> int:
    """Returns a line of /proc/self/status, such as VmHWM (the process's peak in memory) or VmRSS (now); 0 elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as f:
        for line in f:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def peak_bytes(device: str) -> int:
    """Returns the most memory this process has held: on the GPU, or in main memory."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


@dataclass(frozen=True)
class Memory:
    """Peak of a process in bytes, and what it held after its imports, before there was a model."""

    peak: int
    imports: int

    def __str__(self) -> str:
        if not self.peak:
            return "unknown"
        return f"{self.peak / 2**20:,.0f} ({(self.peak - self.imports) / 2**20:,.0f})"


# ---- processes ----


def _serve(pipe: Connection, job: Job) -> None:
    """Runs in a contender's process: builds it, says so, and takes a turn whenever it is asked for one."""
    torch.set_num_threads(job.threads)
    try:
        for module in job.imports:
            importlib.import_module(module)
        baseline = 0 if job.device == "cuda" else status_bytes("VmRSS")
        contender = job.build()
        pipe.send(contender.note)
        while pipe.recv():
            secs = contender.run()
            pipe.send((secs, Memory(peak_bytes(job.device), baseline)))
    except EOFError:
        pass  # the other side has gone
    except Exception as e:
        traceback.print_exc()
        pipe.send(e if isinstance(e, ValueError) else RuntimeError(f"{type(e).__name__}: {e}"))


class Remote:
    """A contender in a process of its own."""

    def __init__(self, job: Job) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job))
        self._process.start()
        theirs.close()
        self.memory = Memory(0, 0)  # as of the last turn
        try:
            self.note = self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contender's process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self) -> float:
        self._pipe.send(True)
        secs, self.memory = self._receive()
        return secs

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join(30)
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def crew(jobs: dict[str, Job], one_process: bool) -> Iterator[dict[str, Contender]]:
    """Gives the contenders, ready to take turns; the next is built when the one before is ready."""
    with contextlib.ExitStack() as stack:
        ready: dict[str, Contender] = {}
        for name, job in jobs.items():
            print(f"Preparing {name}", file=sys.stderr, flush=True)
            if one_process:
                ready[name] = job.build()
            else:
                remote = Remote(job)
                stack.callback(remote.close)
                ready[name] = remote
        yield ready


def memory_of(job: Job) -> Memory:
    """Returns the memory that a contender needs, in a fresh process: its warm-up, then one turn."""
    remote = Remote(job)
    try:
        remote.run()
        return remote.memory
    finally:
        remote.close()


# ---- command lines and tables ----


def installed(package: str) -> bool:
    """Tells if a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def add_flags(p: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the flags that all measurements have."""
    p.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that compute, of each")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes")
    p.add_argument("--quick", action="store_true", help="two rounds and little else: shows that it runs, not how fast")


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace, *at_least_one: str) -> None:
    """Ends the program, with one line, for values that cannot be."""
    for name in ("rounds", "threads", *at_least_one):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this machine or this PyTorch has none")
    if args.quick:
        args.rounds = min(args.rounds, 2)


def number(x: float) -> str:
    """Returns three or four digits, whatever the size."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" if x >= 100 else f"{x:.3g}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table in the form that docs/performance.md takes."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
