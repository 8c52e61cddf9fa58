"""Ranks: one alone, and two that are real."""

import os
import socket
import time

import pytest
import torch
from torch import nn

from tests.helpers.launching import ranks
from utils import dist_errors, dist_util
from utils.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def alone(monkeypatch):
    """This process as the only one that a launcher started."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**env, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    yield
    dist_util.cleanup()


# ---- one rank ----


@pytest.mark.parametrize("local_rank", [-1, 0])
def test_a_single_rank_needs_no_group(local_rank):
    assert dist_util.setup("cpu", local_rank) == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (0, 1, True)
    dist_util.barrier()
    dist_util.cleanup()


def test_for_a_single_rank_everything_does_nothing():
    x, model = torch.tensor([1.0, 2.0]), nn.Linear(2, 2)
    assert dist_util.sum_over_ranks(x) is x
    assert x.tolist() == [1, 2]
    assert dist_util.wrap(model) is model
    with dist_util.main_process_first():
        pass
    for now in (False, True):
        with dist_util.sync_gradients(model, now):
            model(x).sum().backward()
    assert model.bias.grad.tolist() == [2, 2]


def test_an_error_passes_through_main_first():
    with pytest.raises(RuntimeError, match="of the block"), dist_util.main_process_first():
        raise RuntimeError("of the block")


def test_the_launchers_rank_is_known_before_the_group_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert dist_util.rank() == 3
    assert not dist_util.is_main()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "3"},
        {"LOCAL_RANK": "3"},
        {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
        {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "nowhere"},
        dict.fromkeys(LAUNCHER_VARIABLES, ""),
        {"WORLD_SIZE": "", "RANK": "1", "LOCAL_RANK": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # sbatch and salloc
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "1"},  # the user means it
    ],
    ids=str,
)
def test_what_makes_no_ranks_is_one_process(monkeypatch, variables):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist_util.setup("cuda", -1) == torch.device("cuda", 0)
    assert (dist_util.rank(), dist_util.is_main(), dist_util.is_first_of_machine()) == (0, True, True)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"^{name}=2: .*torchrun"):
        dist_util.setup("cpu", -1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher that forgot the rest
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT missing"):
        dist_util.setup("cpu", -1)


@pytest.mark.parametrize(("given", "of_launcher"), [(0, 1), (1, 0), (2, 1)])
def test_a_local_rank_that_contradicts_the_launcher_is_refused(monkeypatch, given, of_launcher, alone):
    monkeypatch.setenv("LOCAL_RANK", str(of_launcher))
    with pytest.raises(UserError, match=rf"--local_rank {given} contradicts LOCAL_RANK={of_launcher}"):
        dist_util.setup("cpu", given)


@pytest.mark.parametrize("text", ["0", "soon", "-5", "1e3", ""])
def test_a_timeout_that_is_none_is_refused(monkeypatch, alone, text):
    monkeypatch.setenv("TRAIN_TIMEOUT_SECS", text)
    with pytest.raises(UserError, match=f"TRAIN_TIMEOUT_SECS={text}: expected seconds"):
        dist_util.setup("cpu", -1)


# ---- two ranks ----


def outcome(body) -> list | None:
    """Returns the class and text of what the block raises on this rank."""
    try:
        with dist_util.all_ranks_or_none():
            body()
    except Exception as e:
        return [type(e).__name__, str(e)]
    return None


def watch(local_rank: int) -> dict:
    """Returns what one of two ranks sees, which work in the same folder."""
    seen = {"before": dist_util.rank(), "device": str(dist_util.setup("cpu", local_rank))}
    rank = dist_util.rank()
    seen["who"] = [rank, dist_util.world_size(), dist_util.is_main()]
    x = torch.tensor([1.0 + rank, 10.0], dtype=torch.float64)
    seen["sum"] = [dist_util.sum_over_ranks(x) is x, *x.tolist()]
    seen["max"] = dist_util.max_over_ranks(5 - rank)
    with dist_util.main_process_first():
        seen["prepared on entry"] = os.path.exists("prepared")
        if rank == 0:
            time.sleep(0.3)
            open("prepared", "w").close()

    def fail(on, error):
        if rank in on:
            raise error

    def download(before=(), within=()):
        fail(before, UserError("no such file"))
        with dist_util.main_process_first():
            fail(within, OSError("no such download"))
            seen["entered"] = True

    seen["outcomes"] = {
        "well": outcome(lambda: None),
        "all": outcome(lambda: fail([0, 1], UserError("no such model"))),
        "second": outcome(lambda: fail([1], UserError("no such file"))),
        "download": outcome(lambda: download(within=[0])),
        "before a download": outcome(lambda: download(before=[1])),
        "a bug": outcome(lambda: fail([1], TypeError("not callable"))),
        "same": outcome(lambda: dist_util.check_same({"--seed": 1, "--name": "a"}, "as one")),
        "not the same": outcome(lambda: dist_util.check_same({"--seed": rank, "--name": "a"}, "as one")),
    }
    mine = {"weights": torch.full((3,), float(rank)), "step": 3 + rank}
    seen["newest"] = [
        dist_util.broadcast_newest(x, version)["weights"].tolist()
        for x, version in ((mine, (3 + rank,)), (mine, (3,)), (mine if rank == 0 else None, (3 if rank == 0 else -1,)))
    ]
    seen["reports"] = [dist_errors.is_error_reporter(), dist_errors.is_error_reporter()]
    if rank == 1:
        time.sleep(0.3)
        open("passed", "w").close()
    dist_util.barrier()
    seen["passed after barrier"] = os.path.exists("passed")

    inner = nn.Linear(3, 1)
    model = dist_util.wrap(inner)
    seen["gradients"] = []
    for now in (False, True):
        with dist_util.sync_gradients(model, now):
            model(torch.full((1, 3), 1.0 + rank)).sum().backward()
        seen["gradients"].append(inner.weight.grad.mean().item())
    dist_util.cleanup()
    seen["left"] = not torch.distributed.is_initialized()
    return seen


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Returns what each of two ranks saw."""
    # The first hears of its rank from the environment only, the second from the flag as well.
    with ranks(tmp_path_factory.mktemp("two"), [-1, 1], watch) as run:
        results = run.results()
        assert all(isinstance(seen, dict) for seen in results), run.output()
    return results


#: What rank 0 and rank 1 see.
SEEN = {
    "before": (0, 1),
    "device": ("cpu", "cpu"),
    "who": ([0, 2, True], [1, 2, False]),
    "sum": ([True, 3, 20], [True, 3, 20]),  # in place
    "max": (5, 5),
    "prepared on entry": (False, True),
    "entered": (True, None),  # rank 0, while rank 1 had yet to fail
    # A newer state of rank 1; the same version on both, which keep theirs; and none on rank 1.
    "newest": ([[1] * 3, [0] * 3, [0] * 3], [[1] * 3, [1] * 3, [0] * 3]),
    "passed after barrier": (True, True),
    # A pass adds 1 on rank 0 and 2 on rank 1; the second one averages what both have.
    "gradients": ([1, 3], [2, 3]),
    "left": (True, True),
}


@pytest.mark.parametrize("what", SEEN)
def test_two_ranks_see(two, what):
    assert tuple(seen.get(what) for seen in two) == SEEN[what]


def test_one_of_two_ranks_reports_errors(two):
    assert sorted(seen["reports"] for seen in two) == [[False, False], [True, True]]


OUTCOMES = {
    "well": (None, None),
    "all": (["UserError", "no such model"], ["FailedElsewhere"]),
    "second": (["FailedElsewhere"], ["UserError", "no such file (on rank 1 of 2, HOST)"]),
    "download": (["OSError", "no such download (on rank 0 of 2, HOST)"], ["FailedElsewhere"]),
    "before a download": (["FailedElsewhere"], ["UserError", "no such file (on rank 1 of 2, HOST)"]),
    "a bug": (["FailedElsewhere"], ["TypeError", "not callable"]),
    "same": (None, None),
    "not the same": (
        ["UserError", "--seed is 0 on rank 0 (HOST) and 1 on rank 1 (HOST); as one"], ["FailedElsewhere"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTCOMES)
def test_an_error_ends_the_block_for_both_and_one_of_them_has_it(two, case):
    for seen, expected in zip(two, OUTCOMES[case], strict=True):
        found = seen["outcomes"][case]
        assert (found and found[: len(expected)]) == (
            expected and [text.replace("HOST", socket.gethostname()) for text in expected]
        )
