"""The optimizer against torch.optim.SGD."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.precision import SGD

SHAPES = [(5, 3), (7,), (2, 2, 4)]


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def step(optimizer, step, lr):
    """One step on gradients that depend on the step only; the second parameter has none in the second."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if step == 2 and i == 1 else grad
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch_to_the_bit(dtype, weight_decay):
    own = SGD(params(dtype), weight_decay)
    torchs = torch.optim.SGD(params(dtype), lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
    for number, lr in enumerate((0.1, 0.3, 0.2), 1):
        for optimizer in (own, torchs):
            step(optimizer, number, lr)
        for p, q in zip(own.param_groups[0]["params"], torchs.param_groups[0]["params"]):
            assert torch.equal(p, q)
    assert all(p.grad is None for p in own.param_groups[0]["params"])


def test_a_state_of_torchs_optimizer_goes_on_here():
    whole = torch.optim.SGD(params(), lr=0.0, momentum=0.9)
    first, second = torch.optim.SGD(params(), lr=0.0, momentum=0.9), SGD(params())
    for optimizer in (whole, first):
        for number in (1, 2):
            step(optimizer, number, 0.1)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p, q in zip(second.param_groups[0]["params"], first.param_groups[0]["params"]):
            p.copy_(q)
    for optimizer in (whole, second):
        step(optimizer, 3, 0.1)
    for p, q in zip(whole.param_groups[0]["params"], second.param_groups[0]["params"]):
        torch.testing.assert_close(p, q)


def test_a_state_of_a_fresh_one_goes_on_in_torchs_optimizer():
    own, torchs = SGD(params(), weight_decay=0.1), torch.optim.SGD(params(), lr=1.0)
    torchs.load_state_dict(copy.deepcopy(own.state_dict()))
    for number in (1, 2):
        for optimizer in (own, torchs):
            step(optimizer, number, 0.1)
    for p, q in zip(own.param_groups[0]["params"], torchs.param_groups[0]["params"]):
        assert torch.equal(p, q)
        assert torch.equal(own.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"])


def test_gradients_are_let_go_of_or_zeroed():
    optimizer = SGD(params())
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None


def test_a_first_update_does_not_import_the_compiler():
    code = """
import sys, torch
from utils.precision import Precision
model, precision = torch.nn.Linear(2, 2), Precision(torch.device("cpu"), "O2")
optimizer = precision.make_optimizer(model, 0.0)
with precision.autocast():
    loss = model(torch.ones(1, 2)).float().sum()
precision.backward(loss)
precision.step(optimizer, 1.0)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent).returncode == 0
