"""Two machines as far as the network goes: two namespaces, a cable between them, and what happens if it is cut."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid

import pytest

from tests.helpers.launching import have, job, lines_of, ready_torchrun, wait_for
from tests.test_elastic import RUN, SLOW, set_pace

ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT_SECS = 3


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines():
    """The names of two network namespaces joined by a veth pair; each has one end, called by the same name."""
    if not have("ip"):
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


def test_a_cut_cable_ends_the_run_with_a_word_and_it_goes_on_when_mended(machines, tmp_path, monkeypatch):
    names, cable = machines
    monkeypatch.setenv("PACE", str(tmp_path / "pace"))
    (tmp_path / "slow.py").write_text(SLOW)
    set_pace(tmp_path, 0.05)
    steps = 40
    flags = [*RUN, "--num_steps", str(steps), "--eval_every", "40", "--train_batch_size", "8"]

    def start(machine, turn, name):
        launcher = ["--nnodes=2", f"--node_rank={machine}", "--nproc_per_node=1", f"--master_addr={ADDRESSES[0]}"]
        launcher += ["--master_port=29513", str(tmp_path / "slow.py"), *flags]
        folder = tmp_path / f"machine{machine}"  # a disk of its own
        env = {"GLOO_SOCKET_IFNAME": cable, "TRAIN_TIMEOUT_SECS": str(TIMEOUT_SECS)}
        return job(["ip", "netns", "exec", names[machine], *ready_torchrun(turn, launcher)], folder, name, **env)

    def updates_done():
        return max((line["step"] for line in lines_of(tmp_path / "machine0", "a")), default=0)

    mended = tmp_path / "mended"
    with contextlib.ExitStack() as held:
        runs = [held.enter_context(start(machine, tmp_path, "cut")) for machine in range(2)]
        wait_for(lambda: updates_done() > 8, 90, lambda: runs[0].output() + runs[1].output())
        set_pace(tmp_path, 0.2)
        ip("-n", names[1], "link", "set", cable, "down")
        since = time.monotonic()
        again = [held.enter_context(start(machine, mended, "again")) for machine in range(2)]
        wait_for(lambda: runs[0].errors(), 30, runs[0].output)
        assert time.monotonic() - since < 25
        assert runs[0].wait(40) == 1, runs[0].output()
        assert len(runs[0].errors()) == 1
        assert "lost contact with process 1 (" in runs[0].errors()[0]
        assert f"without an answer for {TIMEOUT_SECS} s" in runs[0].errors()[0]
        assert "output/a_last.pt" in runs[0].errors()[0]
        # The other machine cannot reach where they all meet; it ends as well.
        wait_for(lambda: runs[1].errors(), 40, runs[1].output)
        assert "lost contact with " in runs[1].errors()[0]
        assert not os.path.exists(tmp_path / "machine1" / "output" / "a_last.pt")  # only the first machine writes
        runs[1].kill()

        ip("-n", names[1], "link", "set", cable, "up")
        set_pace(tmp_path, 0)
        mended.touch()
        assert again[0].wait(90) == 0, again[0].output()
        assert again[1].wait(30) == 0, again[1].output()
        assert "Going on after update" in again[0].output()  # both, from the first machine's state
    assert [line["step"] for line in lines_of(tmp_path / "machine0", "a") if "train/loss" in line] == [
        *range(1, steps + 1)
    ]
