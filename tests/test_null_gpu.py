"""Tests of a GPU that need no numbers, run without one: on the null GPU, of tests/helpers/null_gpu.py."""

import json

import pytest

from tests.helpers.gpu_runs import precision_flags
from tests.helpers.null_gpu import ROOT, build
from tests.helpers.steps import make_model

#: Lets every piece of the null GPU's memory begin as zeros, of which what is read back is made; it hides what is held.
ZEROS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
KERNELS = "test_gpu_paths.py::test_attention_has_the_kernel_that_is_right_for_the_card"
LITTLE = "test_gpu_memory.py::test_the_fewest_micro_batches_that_fit_are_taken_and_fewer_end_with_the_remedy"
FLOAT32 = 7  # NCCL's number of it, nccl.h
#: Compute capability, GiB, variables and tests of each card.
CARDS = {
    "paths": (90, 79.1, ZEROS, ["test_gpu_paths.py"]),
    "memory": (80, 79.1, {}, ["test_gpu_memory.py", KERNELS, f"--deselect=tests/{LITTLE}"]),
    "little": (75, 1.5, {}, [LITTLE, KERNELS]),
}


def test_where_it_is_not_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("NULL_GPU", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=f"{tmp_path}, which is absent"):
        build(tmp_path / "built")


@pytest.mark.parametrize("card", CARDS)
def test_the_tests_of_a_gpu_that_need_no_numbers_pass(null_gpu, card, tmp_path):
    """One process a card; its own report tells which of its tests failed."""
    capability, gib, variables, tests = CARDS[card]
    words = [x if x.startswith("-") else str(ROOT / "tests" / x) for x in tests]
    own = ["--rootdir", str(ROOT), "-m", "gpu", "--basetemp", str(tmp_path / "inner"), "-p", "no:cacheprovider"]
    argv = ["-m", "pytest", "-q", "--tb=short", *own, *words]
    done = null_gpu.run(argv, ROOT, capability=capability, gib=gib, variables=variables)
    if done.returncode or "skipped" in done.stdout.splitlines()[-1]:  # not a single one may be left out
        pytest.fail(f"on a card of compute capability {capability}:\n{done.stdout}\n{done.stderr}", pytrace=False)


def test_ranks_share_weights_at_the_start_and_reduce_gradients_once_a_step_in_its_last_micro_batch(null_gpu, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.helpers.gpu_runs"]
    flags = ["--gradient_accumulation_steps", "2", *precision_flags("O1", "bfloat16")]
    done = null_gpu.run([*launcher, *flags], tmp_path, count=2, variables=ZEROS)
    assert done.returncode == 0, done.stderr
    steps, others = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    orders = [[line for step in x for line in step if line.startswith("NCCL")] for x in (steps, others)]
    assert orders[0][1:] == orders[1][1:]  # the first names the rank
    reduced = f"NCCL allreduce {sum(p.numel() for p in make_model().parameters())} type {FLOAT32}"
    shared = reduced.replace("allreduce", "broadcast")
    assert orders[0].index(shared) < orders[0].index(reduced)
    for step in steps[1:4]:  # before the first evaluation
        assert step.count(reduced) == 1
        attention = [i for i, line in enumerate(step) if "flash_fwd" in line]
        assert len(attention) == 4  # two layers, two micro-batches
        assert max(attention) < step.index(reduced)
