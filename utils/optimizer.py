"""torch's SGD without the wrappers for which a process imports torch._dynamo before its first step: a second.

They keep an optimizer's methods out of what torch.compile traces, which here is a model alone.
"""

from __future__ import annotations

from inspect import unwrap

import torch


class SGD(torch.optim.SGD):
    """Computes and saves as its parent does."""

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))  # whose wrapper switches gradients off, too
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
