"""The norm of a step's gradients, which tells whether they are finite and by which they are clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def trained(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """Return the parameters that an optimiser steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_norm(parameters: Iterable[Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar; not finite if any element is not, 0 without any.

    Gradients of sharded parameters (DTensor) count as a whole, so that all processes find the same.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
