"""Gradient checkpointing: a module keeps its input alone, and is computed once more in the backward pass.

Source: Chen et al., arXiv 1604.06174; the name of the switch is that of Hugging Face's transformers.
This module must not know the modules that it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Base of modules whose parts may be recomputed.

    Attributes:
        gradient_checkpointing: they are, in training.
    """

    gradient_checkpointing = False

    def compute(self, part: nn.Module, *args: Any) -> Any:
        """Returns ``part(*args)``, with the same dropout and number formats if it is computed once more."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)
