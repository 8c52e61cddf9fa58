"""Mixed precision by NVIDIA apex's amp, for those who still have it; ``utils.precision`` has the same levels natively.

Source: nvidia.github.io/apex/amp.html, and the last commit that has amp, github.com/NVIDIA/apex at e13873de.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.precision import Precision


class ApexPrecision(Precision):
    """The levels as NVIDIA apex's amp has them, which the reference uses.

    Source: nvidia.github.io/apex/amp.html.  The initial loss scale is the reference's.

    Args:
        amp: the module ``apex.amp``; ``import_apex_amp`` finds it.
        device, opt_level, loss_scale: as for ``Precision``; the half-precision type is float16.
    """

    INITIAL_SCALE = 2.0**20
    stashes_gradients = True

    def __init__(self, amp: ModuleType, device: torch.device, opt_level: str, loss_scale: float = 0) -> None:
        super().__init__(device, opt_level, "float16", loss_scale)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)  # apex scales
        self._amp = amp
        self._optimizer: torch.optim.Optimizer | None = None
        self._weights: list[nn.Parameter] = []  # the model's
        self._applied = True

    @property
    def setting(self) -> str:
        return f"{super().setting} by apex"

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.parameters())

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer, self._weights = optimizer, list(model.parameters())
        exact = [p.data for p in self._weights]  # float32, before apex casts them
        if optimizer is None:
            self._amp.initialize(model, opt_level=self.opt_level, verbosity=0)
        else:
            scale = self.static_scale or None  # None: the level's own
            self._amp.initialize(model, optimizer, opt_level=self.opt_level, loss_scale=scale, verbosity=0)
            if self._is_dynamic():
                self._scaler()._loss_scale = self.INITIAL_SCALE
            # At O2 apex makes the masters in the first of its calls that needs them, from half weights, and casts to
            # half whatever momentum was restored before.  This call needs them.
            optimizer.zero_grad()
            self._params = list(self._amp.master_params(optimizer))
            with torch.no_grad():
                for master, weight in zip(self._params, exact):
                    master.copy_(weight)
        if self.opt_level == "O1":
            self._amp._amp_state.handle._is_active = False
        super().attach(model, optimizer)

    def _is_dynamic(self) -> bool:
        return not self.static_scale and self.opt_level in ("O1", "O2")

    def _scaler(self) -> Any:  # apex has no types
        return self._amp._amp_state.loss_scalers[0]

    def float32_weights(self, model: nn.Module) -> dict[str, Tensor]:
        state = super().float32_weights(model)
        masters = zip(model.named_parameters(), self._params)  # none in an evaluation
        return state | {name: master.detach().float() for (name, _), master in masters}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self._amp.state_dict()}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        super().load_state_dict(state, step)
        self._amp.load_state_dict(state["scaler"])

    def autocast(self) -> contextlib.AbstractContextManager:
        return self._casting() if self.opt_level == "O1" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _casting(self) -> Iterator[None]:
        """Lets the functions of torch that apex has patched at O1 cast, which they would do in the whole process.

        Crops and metrics would be computed in half precision, too.
        """
        handle = self._amp._amp_state.handle
        handle._is_active = True
        try:
            yield
        finally:
            handle._is_active = False
            # A weight whose cast is in the cache when a pass is repeated (gradient checkpointing) makes apex raise an
            # IndexError: torch 2 has nothing where it looks for the weight.  And an evaluation's would stay in memory.
            handle._clear_cache()

    def backward(self, loss: Tensor) -> None:
        scale = self._scaler().loss_scale()
        with self.autocast(), self._amp.scale_loss(loss, self._optimizer) as scaled_loss:
            scaled_loss.backward()
        self._applied = self._applied and self._scaler().loss_scale() >= scale  # halved: the next step is a no-op

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
        torch.nn.utils.clip_grad_norm_(self._params, max_grad_norm)
        with self.autocast():  # apex's step switches its casts off, and then on whatever they were
            optimizer.step()
        for p in (*self._weights, *self._params):  # apex's zero_grad would keep those of half weights in memory
            p.grad = None
        applied, self._applied = torch.tensor(self._applied), True
        self._skipped.add(applied)
        return applied.to(self.device)


def undo_patches() -> None:
    """Gives back the functions of torch that apex has patched in this process, if any; it offers no way but this."""
    handle = getattr(getattr(sys.modules.get("apex.amp"), "_amp_state", None), "handle", None)
    if handle is not None:  # it has patched some, at O1
        handle._deactivate()


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
            "--amp_backend native has the same levels without it"
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
