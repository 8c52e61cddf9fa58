"""Mixed precision by NVIDIA apex's amp, for those who still have it; ``utils.precision`` does the same natively.

Source: nvidia.github.io/apex/amp.html.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.precision import Precision


class ApexPrecision(Precision):
    """The same levels by NVIDIA apex's amp, as the reference uses it.

    Source: nvidia.github.io/apex/amp.html.  The initial loss scale is the reference's.

    Args:
        amp: the module ``apex.amp``; ``import_apex_amp`` finds it.
        device, opt_level, loss_scale: as for ``Precision``; the half-precision type is float16.
    """

    INITIAL_SCALE = 2.0**20

    def __init__(self, amp: ModuleType, device: torch.device, opt_level: str, loss_scale: float = 0) -> None:
        super().__init__(device, opt_level, "float16", loss_scale)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)  # apex scales
        self._amp = amp
        self._optimizer: torch.optim.Optimizer | None = None
        self._applied = True

    @property
    def setting(self) -> str:
        return f"{super().setting} by apex"

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.parameters())

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            self._amp.initialize(model, opt_level=self.opt_level, verbosity=0)
            return
        scale = self.static_scale or None  # None: the level's own
        _, self._optimizer = self._amp.initialize(
            model, optimizer, opt_level=self.opt_level, loss_scale=scale, verbosity=0
        )
        if self._is_dynamic():
            self._scaler()._loss_scale = self.INITIAL_SCALE

    def _is_dynamic(self) -> bool:
        return not self.static_scale and self.opt_level in ("O1", "O2")

    def _scaler(self) -> Any:  # apex has no types
        return self._amp._amp_state.loss_scalers[0]

    def float32_weights(self, model: nn.Module) -> dict[str, Tensor]:
        state = super().float32_weights(model)
        if self._optimizer is not None:
            masters = self._amp.master_params(self._optimizer)
            state |= {name: p.detach().float() for (name, _), p in zip(model.named_parameters(), masters)}
        return state

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self._amp.state_dict()}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        super().load_state_dict(state, step)
        self._amp.load_state_dict(state["scaler"])

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # apex has patched the functions themselves

    def reusing_casts(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        scale = self._scaler().loss_scale()
        with self._amp.scale_loss(loss, self._optimizer) as scaled_loss:
            scaled_loss.backward()
        self._applied = self._applied and self._scaler().loss_scale() >= scale  # halved: the next step is a no-op

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        torch.nn.utils.clip_grad_norm_(self._amp.master_params(optimizer), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        applied, self._applied = torch.tensor(self._applied), True
        self._skipped.add(applied)
        return applied.to(self.device)


def import_apex_amp(device: torch.device) -> ModuleType:
    """Imports ``apex.amp``.

    Raises:
        UserError: it is not there, or the run is not on a GPU.
    """
    if device.type != "cuda":
        raise UserError(f"--amp_backend apex needs a CUDA GPU, not {device.type}; use --amp_backend native")
    try:
        from apex import amp
    except ImportError as e:
        raise UserError(
            "--amp_backend apex: no NVIDIA apex with amp is installed (apex removed amp in 25.07); "
            "--amp_backend native does the same"
        ) from e
    return amp


def make_precision(device: torch.device, opt_level: str, amp_dtype: str, loss_scale: float, backend: str) -> Precision:
    """Returns the number formats of a run; see ``Precision``.

    Args:
        device, opt_level, amp_dtype, loss_scale: as for ``Precision``.
        backend: native or apex, which level O0 does not need.

    Raises:
        UserError: there is no apex.
    """
    if backend == "apex" and opt_level != "O0":
        return ApexPrecision(import_apex_amp(device), device, opt_level, loss_scale)
    return Precision(device, opt_level, amp_dtype, loss_scale)
