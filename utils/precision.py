"""One object owns the number formats of a run: casts, loss scaling, clipping and the optimizer's step.

The levels are those of NVIDIA apex (nvidia.github.io/apex/amp.html), done with torch's own means:

    O0  float32
    O1  float32 weights, matrix products in half precision (autocast)
    O2  half-precision weights for the matrix products, float32 masters in the optimizer; norms, class
        token and position embeddings stay float32
    O3  half precision throughout

Half is float16 on CUDA, with loss scaling at O1 and O2, and bfloat16 without on CPUs.  The training loop reads the same
for all of them.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

OPT_LEVELS = ("O0", "O1", "O2", "O3")
AMP_DTYPES = ("auto", "float16", "bfloat16")


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

    def __str__(self) -> str:
        return "float32" if self.opt_level == "O0" else f"{self.half} {self.opt_level}".removeprefix("torch.")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Casts the model's weights as the level asks, in place."""
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
        return model

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates, in the model's order."""
        return self._parameters

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

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> bool:
        """One update: unscale, clip, step; gradients are gone afterwards.

        Returns:
            False if the update was skipped because a scaled gradient overflowed.
        """
        for p, master in self._pairs:
            master.grad = None if p.grad is None else p.grad.float()
        if self.static_scale:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], 1 / self.static_scale)
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters, max_grad_norm)
        # Dynamic scaling waits for the device in any case: the scaler must know whether to skip.
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        self.scaler.step(optimizer)
        self.scaler.update()
        with torch.no_grad():
            for p, master in self._pairs:
                p.copy_(master)
        model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        return not (self.scaler.is_enabled() and self.scaler.get_scale() < scale)
