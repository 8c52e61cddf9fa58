"""One object owns the number formats of a run: casts, loss scaling, clipping and the optimizer's step.

The levels are those of NVIDIA apex (nvidia.github.io/apex/amp.html):

    O0  float32
    O1  float32 weights, matrix products in half precision (autocast)
    O2  half-precision weights for the matrix products, float32 masters in the optimizer; norms, class
        token and position embeddings stay float32
    O3  half precision throughout

Half is float16 on CUDA, with loss scaling at O1 and O2, and bfloat16 without on CPUs, some of which are faster in
float32: there all levels may compute as O0 does (utils/number_format.py).  ``Precision`` does this with torch's own
means, ``apex.ApexPrecision`` with an apex that still has amp.  The training loop reads the same for all of them:
``prepare`` and ``attach``, then in each step ``autocast`` and ``backward`` for every micro-batch, ``collect_skipped``,
``step``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from utils import dist_util

OPT_LEVELS = ("O0", "O1", "O2", "O3")
AMP_DTYPES = ("auto", "float16", "bfloat16")
AMP_BACKENDS = ("native", "apex")
#: Gradients that one operation casts: one for each would launch a kernel for each, and one for all would hold the
#: half-precision and the float32 gradients of all weights at once.
CAST_AT_ONCE = 32
#: Dynamic scaling halves the scale at each overflow: after so many in a row no scale will help.
MAX_SKIPPED_IN_A_ROW = 50


class Precision:
    """Number formats of a run.

    Args:
        device: where the run computes.
        opt_level: one of ``OPT_LEVELS``.
        amp_dtype: the half-precision type, or "auto": float16 on CUDA, bfloat16 elsewhere.
        loss_scale: a fixed factor for the loss, or 0: dynamic for float16, none for bfloat16.

    Attributes:
        opt_level: the level at which it computes.
        is_open: the flags leave it to the processor whether to compute in float32.
        stashes_gradients: takes those of a micro-batch out of the parameters before the next one's come, so that ranks
            must reduce each micro-batch's, in tensors that the next does not write to.
    """

    stashes_gradients = False

    def __init__(
        self, device: torch.device, opt_level: str = "O0", amp_dtype: str = "auto", loss_scale: float = 0
    ) -> None:
        assert opt_level in OPT_LEVELS
        assert amp_dtype in AMP_DTYPES
        self.device = device
        self.opt_level = self._asked_level = opt_level
        self.is_open = amp_dtype == "auto" and device.type == "cpu" and opt_level != "O0"
        if amp_dtype == "auto":
            amp_dtype = "float16" if device.type == "cuda" else "bfloat16"
        self.half = torch.float16 if amp_dtype == "float16" else torch.bfloat16
        self.static_scale = loss_scale
        dynamic = loss_scale == 0 and self.half == torch.float16 and opt_level in ("O1", "O2")
        self.scaler = torch.amp.GradScaler(device.type, enabled=dynamic)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (half weight of the model, float32 master)
        self._params: list[nn.Parameter] = []  # what the optimizer changes, in the model's order
        self._skipped = SkippedSteps()

    def __str__(self) -> str:
        return self.setting if self.opt_level == self._asked_level else f"float32 in place of {self.setting}"

    @property
    def setting(self) -> str:
        """Names what the flags ask for, as the settings of saved states do."""
        return "float32" if self._asked_level == "O0" else f"{self.half} {self._asked_level}".removeprefix("torch.")

    @property
    def number_format(self) -> str:
        """The type that matrix products are computed in."""
        return "float32" if self.opt_level == "O0" else str(self.half).removeprefix("torch.")

    def compute_in_float32(self) -> None:
        """Computes as O0 does, whatever the flags ask for; must come before ``prepare``."""
        assert self.is_open
        self.opt_level, self.static_scale = "O0", 0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Casts the model's weights as the level asks, in place; returns what an optimizer changes, with masters."""
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
        self._params = [masters.get(p, p) for p in model.parameters()]
        return self._params

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Zeroes SGD's momentum, for an optimizer of what ``prepare`` returned; there is none in an evaluation.

        torch's fused kernel would leave garbage in the momentum if the very first step were skipped.
        """
        if optimizer is not None and optimizer.defaults.get("momentum"):
            for p in self._params:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def float32_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the model's state_dict in float32, from the masters where there are any."""
        masters = dict(self._pairs)
        state = {name: p.detach().float() for name, p in model.state_dict().items()}
        for name, p in model.named_parameters():
            if p in masters:
                state[name] = masters[p].detach()
        return state

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context of every forward pass."""
        if self.opt_level in ("O1", "O2"):
            return torch.autocast(self.device.type, dtype=self.half)
        return contextlib.nullcontext()

    def reusing_casts(self) -> contextlib.AbstractContextManager:
        """Returns the context of many forward passes with the same weights, which are cast in the first of them.

        Autocast keeps what it cast until the outermost of its contexts ends.  This one casts nothing itself.
        """
        return torch.autocast(self.device.type, enabled=False)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the (scaled) loss to those in the parameters."""
        self.scaler.scale(loss * self.static_scale if self.static_scale else loss).backward()
        if dist_util.world_size() == 1:  # several ranks reduce what lies in the parameters, once a step
            self._add_to_masters()

    def _add_to_masters(self) -> None:
        """Adds half gradients to the masters', so that micro-batches sum up in float32."""
        new = [(p, master) for p, master in self._pairs if p.grad is not None and master.grad is None]
        for start in range(0, len(new), CAST_AT_ONCE):
            some = new[start : start + CAST_AT_ONCE]
            grads = [torch.empty_like(master) for _, master in some]
            torch._foreach_copy_(grads, [p.grad for p, _ in some if p.grad is not None])  # all have one
            for (p, master), grad in zip(some, grads):
                p.grad, master.grad = None, grad
        for p, master in self._pairs:
            if p.grad is not None and master.grad is not None:  # of micro-batches before
                master.grad.add_(p.grad)
                p.grad = None

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        """Does one step: unscale, clip, step, zero; gradients are gone afterwards.

        Returns:
            A bool scalar on the device: False if the step was skipped because a scaled gradient overflowed.
        """
        self._add_to_masters()
        if self.static_scale:
            torch._foreach_mul_([p.grad for p in self._params if p.grad is not None], 1 / self.static_scale)
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._params, max_grad_norm)
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

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs beside the optimizer's state; waits for the last step's outcome first."""
        skipped = self.collect_skipped()
        return {"scaler": self.scaler.state_dict(), "skipped": skipped, "in_a_row": self._skipped.in_a_row}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Takes back what ``state_dict`` gave after a step."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self._skipped.total, self._skipped.in_a_row, self._skipped.step = state["skipped"], state["in_a_row"], step

    def collect_skipped(self) -> int:
        """Waits for the last step's outcome, which has arrived if a forward pass was queued since.

        Returns:
            The steps that were skipped so far.

        Raises:
            FloatingPointError: the last ``MAX_SKIPPED_IN_A_ROW`` all were; names the last.
        """
        return self._skipped.collect()


class SkippedSteps:
    """Counts steps that were skipped, without making the device wait.

    Each outcome starts on its way to the host at once, and is read when the count is asked for: after the
    next forward and backward pass have been queued, when it has long arrived.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = self.step = 0
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def add(self, applied: Tensor) -> None:
        """Takes the outcome of one step, a bool scalar on the device."""
        arrived = None
        if applied.is_cuda:
            applied, arrived = applied.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._pending = (applied, arrived)
        self.step += 1

    def collect(self) -> int:
        """Returns all skipped steps so far; raises FloatingPointError if there is no end to them."""
        if self._pending is not None:
            applied, arrived = self._pending
            if arrived is not None:
                arrived.synchronize()
            self._pending = None
            self.in_a_row = 0 if applied else self.in_a_row + 1
            self.total += not applied
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients overflowed in {self.in_a_row} steps in a row, up to step {self.step}, "
                "however small the loss scale; "
                "a lower --learning_rate or --amp_dtype bfloat16 may help"
            )
        return self.total
