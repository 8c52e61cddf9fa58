"""One object owns the number formats of a run: casts, loss scaling, clipping and the optimizer's step.

The levels are those of NVIDIA apex (nvidia.github.io/apex/amp.html):

    O0  float32
    O1  float32 weights, matrix products in half precision (autocast)
    O2  half-precision weights for the matrix products, float32 masters in the optimizer; norms, class
        token and position embeddings stay float32
    O3  half precision throughout

Half is float16 on CUDA, with loss scaling at O1 and O2, and bfloat16 without on CPUs.  ``Precision`` does
this with torch's own means, ``ApexPrecision`` with an apex that still has amp.  The training loop reads the
same for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from utils import dist_util

OPT_LEVELS = ("O0", "O1", "O2", "O3")
AMP_DTYPES = ("auto", "float16", "bfloat16")
AMP_BACKENDS = ("native", "apex")
MOMENTUM = 0.9
#: Dynamic scaling halves the scale at each overflow: after so many in a row no scale will help.
MAX_SKIPPED_IN_A_ROW = 50


class Precision:
    """Number formats of a run.

    Args:
        device: where the run computes.
        opt_level: one of ``OPT_LEVELS``.
        amp_dtype: the half-precision type, or "auto": float16 on CUDA, bfloat16 elsewhere.
        loss_scale: a fixed factor for the loss, or 0: dynamic for float16, none for bfloat16.
    """

    def __init__(
        self, device: torch.device, opt_level: str = "O0", amp_dtype: str = "auto", loss_scale: float = 0
    ) -> None:
        assert opt_level in OPT_LEVELS
        assert amp_dtype in AMP_DTYPES
        self.device = device
        self.opt_level = opt_level
        if amp_dtype == "auto":
            amp_dtype = "float16" if device.type == "cuda" else "bfloat16"
        self.half = torch.float16 if amp_dtype == "float16" else torch.bfloat16
        self.static_scale = loss_scale
        dynamic = loss_scale == 0 and self.half == torch.float16 and opt_level in ("O1", "O2")
        self.scaler = torch.amp.GradScaler(device.type, enabled=dynamic)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (half weight of the model, float32 master)
        self._parameters: list[nn.Parameter] = []
        self._skipped = SkippedSteps()

    def __str__(self) -> str:
        return "float32" if self.opt_level == "O0" else f"{self.half} {self.opt_level}".removeprefix("torch.")

    def prepare(self, model: nn.Module) -> None:
        """Casts the model's weights as the level asks, in place."""
        if self.device.type == "cuda":  # TF32 for the products that stay float32, but not in a float32 run
            tf32 = self.opt_level in ("O1", "O2")
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32  # convolutions, which have it on by default
        if self.opt_level == "O3":
            model.to(self.half)
        masters = {}
        if self.opt_level == "O2":
            for module in model.modules():
                # Kernels that are standardised in the forward pass keep the digits that needs.
                if isinstance(module, nn.Linear | nn.Conv2d) and not hasattr(module, "standardized"):
                    for p in module.parameters(recurse=False):
                        masters[p] = nn.Parameter(p.detach().clone())
                        p.data = p.data.to(self.half)
        self._pairs = list(masters.items())
        self._parameters = [masters.get(p, p) for p in model.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates, in the model's order."""
        return self._parameters

    def make_optimizer(self, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        """Instead of ``prepare``, for training: prepares the model, and makes the reference's optimizer of it."""
        self.prepare(model)
        return SGD(self._parameters, weight_decay)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state_dict in float32, from the masters where there are any."""
        masters = dict(self._pairs)
        state = {name: p.detach().float() for name, p in model.state_dict().items()}
        for name, p in model.named_parameters():
            if p in masters:
                state[name] = masters[p].detach()
        return state

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of every forward pass."""
        if self.opt_level in ("O1", "O2"):
            return torch.autocast(self.device.type, dtype=self.half)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the (scaled) loss to those in the parameters."""
        self.scaler.scale(loss * self.static_scale if self.static_scale else loss).backward()
        if dist_util.world_size() == 1:  # several reduce what lies in the parameters, once an update
            self._add_to_masters()

    def _add_to_masters(self) -> None:
        """Adds half gradients to the masters', so that the parts of an update sum up in float32."""
        for p, master in self._pairs:
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        """One update: unscale, clip, step; gradients are gone afterwards.

        Returns:
            A scalar on the device: False if the update was skipped because a scaled gradient overflowed.
        """
        self._add_to_masters()
        if self.static_scale:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], 1 / self.static_scale)
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_grad_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        with torch.no_grad():
            if self._pairs:
                torch._foreach_copy_([p for p, _ in self._pairs], [master for _, master in self._pairs])
        optimizer.zero_grad(set_to_none=True)
        if not self.scaler.is_enabled():
            return torch.ones((), dtype=torch.bool, device=self.device)
        applied = torch.isfinite(norm)
        self._skipped.add(applied)
        return applied

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimizer's state."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.num_skipped(), "in_a_row": self._skipped.in_a_row}

    def load_training_state(self, state: dict[str, Any], step: int) -> None:
        """Goes on from what ``training_state`` gave after update ``step``."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self._skipped.total, self._skipped.in_a_row, self._skipped.step = state["skipped"], state["in_a_row"], step

    def num_skipped(self) -> int:
        """Updates that were skipped so far.

        Raises:
            FloatingPointError: the last ``MAX_SKIPPED_IN_A_ROW`` all were; names the last.
        """
        return self._skipped.count()


class SGD(torch.optim.Optimizer):
    """v <- momentum * v + g + weight_decay * p;  p <- p - lr * v: the reference's optimizer, over torch's fused kernel.

    Arithmetic and state_dict are those of ``torch.optim.SGD(fused=True)``.  Two things differ: the momentum is there,
    and zero, from the start, so that a first update that is skipped leaves no garbage behind; and until a state is
    saved or loaded nothing imports ``torch._dynamo``, as torch's own optimizers do: that takes a second.

    Args:
        params: what to update, all on one device.
        weight_decay: added to the gradients, times the parameters.

    Whoever trains sets ``lr`` in ``param_groups`` before each step; it begins with 0.
    """

    #: torch.amp.GradScaler then leaves ``found_inf`` here: the device itself skips the step, and nobody waits for it.
    _step_supports_amp_scaling = True
    #: What torch.optim.SGD offers besides, and finds in its state_dict.
    _FIXED: ClassVar[dict[str, Any]] = {"dampening": 0.0, "nesterov": False, "maximize": False}

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float = 0.0) -> None:
        defaults = {"lr": 0.0, "momentum": MOMENTUM, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "fused": True, **self._FIXED})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes more parameters, ``param_group["params"]``, with what else is in it instead of the defaults."""
        params = list(param_group["params"])
        self.param_groups.append({**self.defaults, **param_group, "params": params})
        for p in params:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets go of the gradients, or fills them with zeros."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of what has gradients."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            sgd(
                params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params],
                fused=True, grad_scale=grad_scale, found_inf=found_inf, lr=group["lr"],
                momentum=group["momentum"], weight_decay=group["weight_decay"], **self._FIXED,
            )  # fmt: skip


class SkippedSteps:
    """Counts updates that were skipped, without making the device wait.

    Each outcome starts on its way to the host at once, and is read when the count is asked for: after the
    next forward and backward pass have been queued, when it has long arrived.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = self.step = 0
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def add(self, applied: Tensor) -> None:
        """Takes the outcome of one update, a bool scalar on the device."""
        arrived = None
        if applied.is_cuda:
            applied, arrived = applied.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._pending = (applied, arrived)
        self.step += 1

    def count(self) -> int:
        """All skipped updates so far; raises FloatingPointError if there is no end to them."""
        if self._pending is not None:
            applied, arrived = self._pending
            if arrived is not None:
                arrived.synchronize()
            self._pending = None
            self.in_a_row = 0 if applied else self.in_a_row + 1
            self.total += not applied
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients overflowed in {self.in_a_row} updates in a row, up to step {self.step}, "
                "however small the loss scale; "
                "a lower --learning_rate or --amp_dtype bfloat16 may help"
            )
        return self.total
