"""A stand-in for ``apex.amp`` that needs no CUDA: it casts, scales, unscales and skips, and records how it is called.

Written from apex's documentation (nvidia.github.io/apex/amp.html) and its behaviour as read in github.com/NVIDIA/apex:
the optimizer's ``step`` and ``zero_grad`` take no arguments, masters replace half weights in its groups, and an
overflow halves a dynamic scale and makes the next step do nothing.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

HALF = torch.float16


class LossScaler:
    """A dynamic or fixed loss scale."""

    def __init__(self, scale):
        self.dynamic = scale == "dynamic"
        self._loss_scale = 2.0**16 if self.dynamic else scale

    def loss_scale(self):
        return self._loss_scale


class FakeAmp:
    """Takes the place of the module.

    Attributes:
        initialized: (model, optimizer, opt_level, loss_scale) of each call of ``initialize``.
        scaled: (optimizer, scale) of each ``scale_loss``.
        norms: of the masters' gradients, at each step that was not skipped.
    """

    def __init__(self):
        self._amp_state = SimpleNamespace(loss_scalers=[])
        self.initialized, self.scaled, self.norms = [], [], []

    def initialize(self, models, optimizers=None, opt_level="O1", loss_scale=None, verbosity=1):
        self.initialized.append((models, optimizers, opt_level, loss_scale))
        if loss_scale is None:
            loss_scale = "dynamic" if opt_level in ("O1", "O2") else 1.0
        self._amp_state.loss_scalers = [LossScaler(loss_scale)]
        self._patch_forward(models, opt_level)
        if optimizers is None:
            return models
        self._patch_optimizer(optimizers, masters=opt_level == "O2")
        return models, optimizers

    def state_dict(self):
        return {f"loss_scaler{i}": {"loss_scale": x.loss_scale()} for i, x in enumerate(self._amp_state.loss_scalers)}

    def load_state_dict(self, state):
        for i, scaler in enumerate(self._amp_state.loss_scalers):
            scaler._loss_scale = state[f"loss_scaler{i}"]["loss_scale"]

    @staticmethod
    def _patch_forward(model, opt_level):
        forward = model.forward
        if opt_level == "O1":

            def new_forward(*args):
                with torch.autocast("cpu", HALF):
                    return forward(*args)

            model.forward = new_forward
        elif opt_level in ("O2", "O3"):
            model.half()

            def new_forward(*args):
                out = forward(*(x.half() if x.is_floating_point() else x for x in args))
                return out.float() if isinstance(out, torch.Tensor) else (out[0].float(), *out[1:])

            model.forward = new_forward

    def _patch_optimizer(self, optimizer, masters):
        (group,) = optimizer.param_groups
        self.model_weights = list(group["params"])
        if masters:
            group["params"] = [p.detach().float().requires_grad_() for p in self.model_weights]
        self.masters = group["params"]
        step = optimizer.step

        def new_step():
            grads = [p.grad for p in self.masters]
            self.norms.append(torch.stack([g.float().norm() for g in grads]).norm().item())
            step()
            with torch.no_grad():
                for p, master in zip(self.model_weights, self.masters):
                    p.copy_(master)

        def new_zero_grad():
            for p in (*self.model_weights, *self.masters):
                p.grad = None

        optimizer.step, optimizer.zero_grad = new_step, new_zero_grad

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer):
        (scaler,) = self._amp_state.loss_scalers
        scale = scaler.loss_scale()
        self.scaled.append((optimizer, scale))
        earlier = [p.grad for p in self.masters]
        for p in self.model_weights:
            p.grad = None
        yield loss.float() * scale
        overflow = False
        for p, master, grad in zip(self.model_weights, self.masters, earlier):
            overflow |= not torch.isfinite(p.grad).all()
            new = p.grad.to(master.dtype) / scale
            p.grad = None
            master.grad = new if grad is None else grad + new
        if overflow and scaler.dynamic:
            scaler._loss_scale /= 2
            self._skip_next(optimizer)

    @staticmethod
    def _skip_next(optimizer):
        if getattr(optimizer.step, "skips", False):
            return
        step = optimizer.step

        def skip():
            optimizer.step = step

        skip.skips = True
        optimizer.step = skip

    def master_params(self, optimizer):
        for group in optimizer.param_groups:
            yield from group["params"]
