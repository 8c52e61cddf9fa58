"""Two machines as far as the network goes: two namespaces, a cable between them, and what happens if it is cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid

import pytest

from tests.helpers.launching import PACED, RESUMED, TINY, job, lines_of, set_pace, steps_done, torchrun, wait_for

ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT_SECS = 3


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines():
    """The names of two network namespaces joined by a veth pair; each has one end, called by the same name."""
    if not shutil.which("ip"):
        pytest.skip("needs the program ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    names = [f"vit-{tag}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            here, there = (("netns", name) for name in names)
            ip("link", "add", f"v{tag}", *here, "type", "veth", "peer", "name", f"v{tag}", *there)
            for name, address in zip(names, ADDRESSES):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{tag}")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", f"v{tag}", "up")
            ip("netns", "exec", names[0], "true")
        except (subprocess.CalledProcessError, OSError) as e:
            pytest.skip(f"network namespaces cannot be made here: {(getattr(e, 'stderr', '') or str(e)).strip()}")
        yield names, f"v{tag}"
    finally:
        for name in names:
            ip("netns", "del", name, check=False)  # takes the cable along


def test_a_cut_cable_ends_the_run_with_a_word_and_it_resumes_when_mended(machines, tmp_path):
    names, cable = machines
    steps, env = 40, {"GLOO_SOCKET_IFNAME": cable, "TRAIN_TIMEOUT_SECS": str(TIMEOUT_SECS), **set_pace(tmp_path, 8)}
    run = [*TINY, "--name", "a", "--num_steps", str(steps), "--warmup_steps", "2", "--eval_every", "40"]
    run += ["--save_every", "5", "--train_batch_size", "8"]

    def start(machine, name):
        flags = ["--nnodes=2", f"--node_rank={machine}", "--nproc_per_node=1", f"--master_addr={ADDRESSES[0]}"]
        args = ([*flags, "--master_port=29513", PACED, *run], names[machine])
        return job(torchrun, args, tmp_path / f"machine{machine}", name, **env)  # each has a disk of its own

    with contextlib.ExitStack() as held:
        runs = [held.enter_context(start(machine, "cut")) for machine in range(2)]
        wait_for(lambda: steps_done(tmp_path / "machine0", "a") >= 8, 90, lambda: runs[0].output() + runs[1].output())
        ip("-n", names[1], "link", "set", cable, "down")
        since = time.monotonic()
        wait_for(lambda: runs[0].errors(), 30, runs[0].output)
        assert time.monotonic() - since < 25
        assert runs[0].wait(40) == 1, runs[0].output()
        assert len(runs[0].errors()) == 1
        assert "lost contact with rank 1 (" in runs[0].errors()[0]
        assert f"without an answer for {TIMEOUT_SECS} s" in runs[0].errors()[0]
        assert "output/a_last.pt" in runs[0].errors()[0]
        # The other machine cannot reach where they all meet; it ends as well.
        wait_for(lambda: runs[1].errors(), 40, runs[1].output)
        assert "lost contact with " in runs[1].errors()[0]
        assert not os.path.exists(tmp_path / "machine1" / "output" / "a_last.pt")  # only the first machine writes
        runs[1].kill()

        ip("-n", names[1], "link", "set", cable, "up")
        set_pace(tmp_path, steps)
        runs = [held.enter_context(start(machine, "again")) for machine in range(2)]
        assert runs[0].wait(90) == 0, runs[0].output()
        assert runs[1].wait(30) == 0, runs[1].output()
        assert RESUMED in runs[0].output()  # both, from the first machine's state
    assert [line["step"] for line in lines_of(tmp_path / "machine0", "a") if "train/loss" in line] == [
        *range(1, steps + 1)
    ]
