"""Single steps as train.train takes them, of the testing model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.precision import Precision

CONFIG = replace(CONFIGS["testing"], dropout_rate=0.0)


def make_optimizer(model: nn.Module, precision: Precision, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Prepares a model, and returns the optimizer of its weights or masters."""
    params = precision.prepare(model)
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
    precision.attach(model, optimizer)
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns what an optimizer changes, in the model's order."""
    return optimizer.param_groups[0]["params"]


def make_model(config=CONFIG) -> VisionTransformer:
    """Returns a model with the same random weights every time, its head included."""
    torch.manual_seed(0)
    model = VisionTransformer(config, img_size=32, num_classes=10)
    nn.init.normal_(model.head.weight, std=0.5)  # as it is, zero, nothing below it would learn
    return model


def make_batch(size: int = 8) -> tuple[Tensor, Tensor]:
    """Returns the same random images every time, and their labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 3, 32, 32, generator=generator) * 2 - 1, torch.arange(size) % 10


def take_step(
    model: nn.Module,
    precision: Precision,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float = 1.0,
    factor: float = 1.0,
) -> tuple[bool, float]:
    """Takes a step, the loss's gradients multiplied by a factor; returns if it was applied, and the loss."""
    images, labels = make_batch()
    with precision.autocast():
        loss = model(images, labels)
    precision.backward(loss * factor)
    applied = bool(precision.step(optimizer, max_grad_norm))
    assert all(p.grad is None for p in [*model.parameters(), *params_of(optimizer)])  # gone, whatever the outcome
    return applied, loss.item()


def until_applied(model: nn.Module, precision: Precision, optimizer: torch.optim.Optimizer) -> None:
    """Takes steps until the loss scale fits and one is applied."""
    while not take_step(model, precision, optimizer)[0]:
        precision.collect_skipped()


def flat(state: Mapping[str, Tensor]) -> Tensor:
    """Returns all weights in one row."""
    return torch.cat([x.float().flatten() for x in state.values()])


def moved(model: nn.Module, precision: Precision) -> Tensor:
    """Returns by how much the weights of ``make_model`` have changed."""
    return flat(precision.float32_weights(model)) - flat(make_model().state_dict())
