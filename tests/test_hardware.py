"""Devices that are not there, memory that is kept, and processors that are shared."""

import ctypes
import os
import platform
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests.helpers.launching import clean_environment
from utils import hardware
from utils.process import process_restored


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_remedy(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"--device {name}: .*--device auto"):
        hardware.pick_device(name, -1)
    assert hardware.pick_device("auto", -1) == torch.device("cpu")


def test_a_variable_that_a_launcher_set_wrongly_is_named(monkeypatch):
    uses = {"LOCAL_RANK": lambda: hardware.pick_device("cpu", -1), "LOCAL_WORLD_SIZE": hardware.num_cpus}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable, use in uses.items():
        monkeypatch.setenv(variable, "first")
        with pytest.raises(ValueError, match=f"{variable}=first: expected a number"):
            use()
        monkeypatch.delenv(variable)


def test_attention_on_cuda_is_not_left_to_cudnn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with process_restored():
        torch.backends.cuda.enable_cudnn_sdp(True)
        hardware.pick_device("cpu", -1)
        assert torch.backends.cuda.cudnn_sdp_enabled()  # another library's choice, for all that we know
        hardware.pick_device("cuda", -1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


FAULTS = """
import resource
import torch
from utils import hardware

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
assert hardware.pick_device("cpu", -1).type == "cpu"
faults()  # until the heap has grown to what it takes
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_tensors_free_is_kept_for_the_next():
    env = {k: v for k, v in clean_environment().items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    usual, kept = map(int, done.stdout.split())
    assert usual >= 8 * 64 / 2  # pages of 2 MB at the largest
    assert kept < usual / 8


def test_a_c_library_that_has_no_such_setting_is_left_as_it_is(monkeypatch):
    for no_library in (mock.Mock(side_effect=OSError), mock.Mock(return_value=object())):
        monkeypatch.setattr(ctypes, "CDLL", no_library)
        assert hardware.pick_device("cpu", -1) == torch.device("cpu")


# ---- processors ----


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_processors_are_those_that_the_process_may_use_divided_among_the_ranks(monkeypatch):
    before = os.sched_getaffinity(0)
    assert hardware.num_cpus() == len(before)
    for number in (1, 2, 1000):  # ranks of this machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(number))
        assert hardware.num_cpus() == len(before)  # that alone makes no ranks
        with monkeypatch.context() as launched:
            launched.setenv("WORLD_SIZE", "1000")
            assert hardware.num_cpus() == max(len(before) // number, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.num_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("variables", "launchers", "expected"),
    [
        ({}, None, 3),  # nobody said anything
        ({"OMP_NUM_THREADS": "2"}, None, 7),  # the user did: PyTorch has heard it already
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"A=1\0B=2\0", 3),  # torchrun did
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, b"A=1\0OMP_NUM_THREADS=1\0", 7),  # the user, to torchrun
    ],
)
def test_threads_are_divided_unless_the_user_chose(monkeypatch, tmp_path, variables, launchers, expected):
    chosen = [7]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: chosen.append(n))
    monkeypatch.setattr(hardware, "num_cpus", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if launchers is not None:
        (tmp_path / "environ").write_bytes(launchers)
        monkeypatch.setattr(hardware, "LAUNCHERS_ENVIRONMENT", str(tmp_path / "environ"))
    hardware.share_processors()
    assert chosen[-1] == expected


def test_only_cuda_copies_without_the_host_waiting():
    """On MPS such a copy may read memory that has another use by then (PyTorch #139550)."""

    class Recording:
        def to(self, device, non_blocking):
            return device.type, not non_blocking

    for kind, waits in (("cpu", True), ("mps", True), ("cuda", False)):
        assert hardware.to_device(Recording(), torch.device(kind)) == (kind, waits)
