"""The optimizer computes as torch's, and starts sooner."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.helpers import runs
from utils.optimizer import SGD


@pytest.mark.parametrize("flags", [{"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}])
def test_steps_and_states_are_those_of_torch(flags):
    torch.manual_seed(0)
    weights, found = torch.randn(5, 3), []
    for kind in (SGD, torch.optim.SGD):
        p, stepped = torch.nn.Parameter(weights.clone()), []
        optimizer = kind([p], lr=0.1, **flags)
        optimizer.register_step_post_hook(lambda *_, p=p, stepped=stepped: stepped.append(p.grad.norm()))
        for _ in range(3):
            p.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()
        resumed = kind([p], lr=0.5, **flags)
        resumed.load_state_dict(state)
        assert p.grad is None
        assert p.is_leaf
        found.append((p, stepped, state["param_groups"], resumed.state_dict()["state"][0]["momentum_buffer"]))
    (p, *mine), (q, *theirs) = found
    assert torch.equal(p, q)
    assert mine[:2] == theirs[:2]
    assert len(mine[0]) == 3
    assert torch.equal(mine[2], theirs[2])


def test_a_training_imports_no_compiler(tmp_path):
    flags = [*runs.RUN, "--num_steps", "1", "--gradient_accumulation_steps", "auto"]
    program = f"import sys, train; train.main({flags!r}); print(*sys.modules, sep='\\n')"
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    modules = done.stdout.split()
    assert "torch.optim" in modules
    assert not {"torch._dynamo", "sympy"} & set(modules)  # of seconds, which nothing here needs without --compile
