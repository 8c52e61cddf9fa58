"""How many images a run takes at once follows from its memory, and from that of the other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils import dist_util, memory, reckoning
from utils.batch import Batch
from utils.datasets import DataSets, MemoryImages
from utils.fitting import Fitting
from utils.memory import OutOfMemory
from utils.precision import Precision


def build(num_blocks):
    with torch.device("meta"):
        return VisionTransformer(replace(CONFIGS["testing"], num_layers=num_blocks), 32, 10)


@pytest.fixture
def fitting():
    images = MemoryImages(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    data = DataSets(images, images, [str(i) for i in range(10)])
    return Fitting(build, CONFIGS["testing"].num_layers, Precision(torch.device("cpu"), "O0"), 32, data, num_ahead=2)


@pytest.fixture
def need(fitting):
    return reckoning.reckon(build, fitting.num_blocks, fitting.precision, 32, 1)


def lets_through(monkeypatch, free):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


def never_reckons(monkeypatch):
    monkeypatch.setattr(reckoning, "reckon", lambda *args: pytest.fail("reckons"))


def test_a_batch_gets_as_many_micro_batches_as_the_memory_asks_for(fitting, need, monkeypatch):
    lets_through(monkeypatch, need.bytes(16, 4))
    batch = Batch.from_flags(64, "auto", 1)
    assert fitting.micro_batches(batch, 0, is_finished=False).num_micro_batches == 4
    loaded = need.bytes(64, 1) - need.bytes(16, 4)  # of what is needed, so much is there
    assert fitting.micro_batches(batch, loaded, is_finished=False).num_micro_batches == 1


@pytest.mark.parametrize(("number", "is_finished"), [(2, False), (2, True), ("auto", True)])
def test_nothing_is_reckoned_for_a_number_that_is_given_or_a_run_that_is_finished(
    fitting, monkeypatch, number, is_finished
):
    never_reckons(monkeypatch)
    lets_through(monkeypatch, 1)
    batch = Batch.from_flags(64, number, 1)
    assert fitting.micro_batches(batch, 0, is_finished=is_finished) == batch


@pytest.mark.parametrize(("number", "expected"), [("auto", 8), (2, 2)])
def test_the_rank_that_needs_the_most_micro_batches_decides_for_all_that_leave_it_open(
    fitting, monkeypatch, number, expected
):
    lets_through(monkeypatch, 2**40)
    asked = []
    monkeypatch.setattr(dist_util, "gather", lambda mine: asked.append(mine) or [mine, 8])
    batch = fitting.micro_batches(Batch.from_flags(64, number, 2), 0, is_finished=False)
    assert batch.num_micro_batches == expected
    assert len(asked) == 1  # whatever the flags of a rank, or the others would wait for it


def test_memory_that_does_not_do_for_a_look_is_told_with_what_helps(fitting, monkeypatch):
    lets_through(monkeypatch, 2**40)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reckoning, "reckon", fail)
    with pytest.raises(OutOfMemory, match="with a few images; give a smaller --img_size or --model_type"):
        fitting.micro_batches(Batch.from_flags(64, "auto", 1), 0, is_finished=False)


def test_an_evaluation_on_a_cpu_takes_64_or_what_is_given_or_as_few_as_another_rank(fitting, monkeypatch):
    never_reckons(monkeypatch)
    assert fitting.evaluated("auto") == 64
    assert fitting.evaluated("auto", saved=16) == 64
    assert fitting.evaluated(100) == 100
    monkeypatch.setattr(dist_util, "gather", lambda mine: [mine, 32])
    assert fitting.evaluated(100) == 32
