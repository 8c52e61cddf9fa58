"""A stand-in for ``apex.amp`` that needs no CUDA: what apex does to CUDA tensors it does to those of CPUs.

Written from apex's documentation (nvidia.github.io/apex/amp.html) and its behaviour as read and seen in
github.com/NVIDIA/apex at e13873de, its last commit with amp.  Where apex surprises, so does this: functions of torch are
patched for the whole process and stay so, masters are made late, from half weights, gradients of earlier micro-batches
are taken out of the parameters, ``zero_grad`` detaches in place, a step switches the casts on.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

HALF, SINGLE = torch.float16, torch.float32
#: Of the functions that O1 patches, those that come near this project.
TO_HALF = {
    F: ("linear", "conv2d"), torch: ("matmul", "mm", "bmm", "addmm", "conv2d"),
    torch.Tensor: ("__matmul__", "matmul", "mm", "bmm", "addmm"),
}  # fmt: skip
TO_SINGLE = {
    F: ("softmax", "log_softmax", "gelu", "layer_norm", "group_norm", "interpolate", "cross_entropy"),
    torch: ("exp", "log", "pow", "sum", "cumsum", "prod", "norm", "std", "var"),
    torch.Tensor: ("exp", "log", "pow", "__pow__", "sum", "cumsum", "prod", "norm", "std", "var", "cpu"),
}  # fmt: skip
TO_WIDEST = {
    torch: ("add", "mul", "div", "eq", "equal", "cat", "stack"),
    torch.Tensor: ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__", "__iadd__", "add", "mul")
    + ("div", "__eq__", "eq"),
}  # fmt: skip


def float_tensors(values):
    """Yields the float tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, list | tuple):
            yield from float_tensors(value)


def cast(value, convert):
    """Returns a value, or a list or tuple of such, with every float tensor converted."""
    if isinstance(value, list | tuple):
        return type(value)(cast(x, convert) for x in value)
    return convert(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Handle:
    """The patches of O1: they cast while they are active, which they are from the start."""

    def __init__(self):
        self._is_active, self._cache, self._replaced = True, {}, []
        nn.modules.rnn._VF = SimpleNamespace()  # of RNNs of its own, which it does not give back
        for functions, prepare in ((TO_HALF, self._halve), (TO_SINGLE, self._widen), (TO_WIDEST, self._promote)):
            for owner, names in functions.items():
                for name in names:
                    self._patch(owner, name, prepare)

    def _patch(self, owner, name, prepare):
        original = getattr(owner, name)

        @functools.wraps(original)
        def patched(*args, **kwargs):
            if not self._is_active:
                return original(*args, **kwargs)
            ready = prepare([*args, *kwargs.values()])
            return original(*ready[: len(args)], **dict(zip(kwargs, ready[len(args) :])))

        self._replaced.append((owner, name, original))
        setattr(owner, name, patched)

    def _halve(self, values):
        return [self._cached(x) if isinstance(x, nn.Parameter) else cast(x, torch.Tensor.half) for x in values]

    def _cached(self, p):
        """Keeps the cast of a weight until the end of the backward pass."""
        if p.dtype != SINGLE:
            return p
        if p in self._cache:
            known = self._cache[p]
            if p.requires_grad and known.requires_grad:
                known.grad_fn.next_functions[1]  # apex asks if it is made of p: torch 2 raises IndexError
            if p.requires_grad == known.requires_grad or not torch.is_grad_enabled():
                return known
        self._cache[p] = p.half()
        return self._cache[p]

    def _widen(self, values):
        return cast(values, torch.Tensor.float)

    def _promote(self, values):
        types = {x.dtype for x in float_tensors(values)}
        if types == {HALF, SINGLE}:
            return self._widen(values)
        if len(types) > 1:
            raise NotImplementedError(f"Do not know how to handle these types to promote: {types}")
        return values

    def _clear_cache(self):
        self._cache.clear()

    def _deactivate(self):
        for owner, name, original in self._replaced:
            setattr(owner, name, original)
        self._replaced = []


class LossScaler:
    """A dynamic or fixed loss scale; grows after so many backward passes without an overflow."""

    def __init__(self, scale):
        self.dynamic = scale == "dynamic"
        self._loss_scale = 2.0**16 if self.dynamic else scale
        self._scale_seq_len, self._unskipped, self._has_overflow = 2000, 0, False

    def loss_scale(self):
        return self._loss_scale

    def unscaled(self, grad, stashed, dtype):
        """Returns a gradient without its scale, plus an earlier one; garbage after an overflow, which ends the work."""
        self._has_overflow |= self.dynamic and not grad.float().sum().isfinite()
        if self._has_overflow:
            return torch.full_like(grad, torch.nan, dtype=dtype)
        new = grad.to(dtype).mul_(1 / self._loss_scale)
        return new if stashed is None else new + stashed

    def update(self):
        """Halves or doubles the scale; returns true if the step must be skipped."""
        overflow, self._has_overflow = self._has_overflow, False
        self._unskipped = 0 if overflow else self._unskipped + 1
        if overflow:
            self._loss_scale /= 2
        elif self.dynamic and self._unskipped == self._scale_seq_len:
            self._loss_scale, self._unskipped = min(self._loss_scale * 2, 2.0**24), 0
        return overflow


class Stash:
    """What apex hangs on an optimizer: masters, made when they are first needed, and stashed gradients."""

    def __init__(self, optimizer, with_masters):
        self.optimizer, self.with_masters, self.is_ready, self.skips = optimizer, with_masters, False, False
        self.masters, self.earlier = {}, {}  # by half weight; gradients by parameter
        if with_masters:
            self._patch_optimizer()

    def _patch_optimizer(self):
        step = self.optimizer.step

        def new_step():
            step()
            with torch.no_grad():
                for p, master in self.masters.items():
                    p.copy_(master)
                    master.grad = None

        def new_zero_grad():
            self.make_ready()
            for p in self.of_model():
                if p.grad is not None:
                    p.grad.detach_().zero_()
            for master in self.masters.values():
                master.grad = None

        self.optimizer.step, self.optimizer.zero_grad = new_step, new_zero_grad

    def make_ready(self):
        """Makes the masters, from the half weights, and casts the optimizer's state to them."""
        if self.is_ready:
            return
        self.is_ready = True
        if self.with_masters:
            for group in self.optimizer.param_groups:
                for i, p in enumerate(group["params"]):
                    if p.dtype == HALF:
                        group["params"][i] = self.masters[p] = p.detach().clone().float().requires_grad_()
                        if p in self.optimizer.state:
                            self.optimizer.state[self.masters[p]] = self.optimizer.state.pop(p)
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def of_model(self):
        """Returns the model's parameters."""
        by_master = {master: p for p, master in self.masters.items()}
        return [by_master.get(p, p) for group in self.optimizer.param_groups for p in group["params"]]

    def before_backward(self):
        self.make_ready()
        for p in self.of_model():
            self.earlier[p], p.grad = (None if p in self.masters else p.grad), None

    def after_backward(self, scaler):
        for p in self.of_model():
            if (master := self.masters.get(p)) is not None:
                if p.grad is not None:
                    master.grad = scaler.unscaled(p.grad, master.grad, SINGLE)
            elif p.grad is None:
                p.grad = self.earlier[p]
            else:
                p.grad = scaler.unscaled(p.grad, self.earlier[p], p.dtype)
        self.earlier.clear()

    def skip_next_step(self):
        if self.skips:
            return
        self.skips, step = True, self.optimizer.step

        def skip():
            for master in self.masters.values():
                master.grad = None
            self.optimizer.step, self.skips = step, False

        self.optimizer.step = skip


class FakeAmp:
    """Takes the place of the module."""

    def __init__(self):
        self._amp_state = SimpleNamespace(loss_scalers=[])

    def initialize(self, models, optimizers=None, opt_level="O1", loss_scale=None, verbosity=1):
        if any(p.dtype == HALF for p in models.parameters()):
            raise RuntimeError("Found param with type torch.cuda.HalfTensor, expected torch.cuda.FloatTensor.")
        if opt_level in ("O2", "O3"):
            self._cast_model(models, keeps_batch_norm=opt_level == "O2")
            if optimizers is not None:
                optimizers.load_state_dict(optimizers.state_dict())
        if optimizers is not None:
            optimizers._amp_stash = Stash(optimizers, with_masters=opt_level == "O2")
        dynamic = opt_level in ("O1", "O2")
        self._amp_state.loss_scalers = [LossScaler(loss_scale or ("dynamic" if dynamic else 1.0))]
        self._patches = opt_level == "O1"
        if self._patches:
            self._amp_state.handle = Handle()
            if optimizers is not None:
                optimizers.step = self._without_casts(optimizers.step)
        return models if optimizers is None else (models, optimizers)

    @staticmethod
    def _cast_model(model, keeps_batch_norm):
        for module in model.modules():
            if not (keeps_batch_norm and isinstance(module, nn.BatchNorm2d)):
                for x in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                    x.data = cast(x.data, torch.Tensor.half)
            module._register_state_dict_hook(
                lambda module, state, *_: state.update({name: cast(x, torch.Tensor.float) for name, x in state.items()})
            )
        forward = model.forward
        model.forward = lambda *args: cast(forward(*cast(args, torch.Tensor.half)), torch.Tensor.float)

    def _without_casts(self, step):
        def new_step():
            self._amp_state.handle._is_active = False
            step()
            self._amp_state.handle._is_active = True  # whatever it was

        return new_step

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer):
        (scaler,), stash = self._amp_state.loss_scalers, optimizer._amp_stash
        plain = not stash.with_masters and not scaler.dynamic and scaler.loss_scale() == 1
        if plain:
            yield loss.float()
        else:
            stash.before_backward()
            yield loss.float() * scaler.loss_scale()
            stash.after_backward(scaler)
            if scaler.update():
                stash.skip_next_step()
        if self._patches:
            self._amp_state.handle._clear_cache()

    def state_dict(self):
        scalers = enumerate(self._amp_state.loss_scalers)
        return {f"loss_scaler{i}": {"loss_scale": x.loss_scale(), "unskipped": x._unskipped} for i, x in scalers}

    def load_state_dict(self, state):
        for i, scaler in enumerate(self._amp_state.loss_scalers):
            saved = state[f"loss_scaler{i}"]
            scaler._loss_scale, scaler._unskipped = saved["loss_scale"], saved["unskipped"]

    def master_params(self, optimizer):
        for group in optimizer.param_groups:
            yield from group["params"]
