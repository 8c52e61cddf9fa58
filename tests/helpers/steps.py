"""The optimizer of a training as train.train makes it, for tests that take single steps."""

from __future__ import annotations

import torch
from torch import nn

from utils.precision import Precision


def make_optimizer(model: nn.Module, precision: Precision, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Prepares a model, and returns the optimizer of its weights or masters."""
    params = precision.prepare(model)
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
    precision.attach(model, optimizer)
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns what an optimizer changes, in the model's order."""
    return optimizer.param_groups[0]["params"]
