"""The judge of closed-form M-steps: no feasible move may raise the objective, and its gradient vanishes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def assert_maximum(
    module: nn.Module, objective: Callable[[], Tensor], feasible: Callable[[], bool] = lambda: True
) -> None:
    """Move all unconstrained parameters in random directions, together and one by one; put them back.

    Args:
        module: owner of the parameters, at the supposed maximum.
        objective: the function maximized, at the present parameters.
        feasible: whether the present parameters respect the floors; moves that leave them are not judged.
    """
    parameters = list(module.parameters())
    with torch.no_grad():
        start = [p.clone() for p in parameters]
        best = objective().item()
        tolerance = 1e-12 * abs(best)
        tried = 0
        for moved in [parameters, *([p] for p in parameters)]:
            for size in (1e-1, 1e-2, 1e-3):
                for _ in range(10):
                    for p in moved:
                        p.add_(size * torch.randn_like(p))
                    if feasible():
                        tried += 1
                        assert objective().item() <= best + tolerance
                    for p, value in zip(parameters, start, strict=True):
                        p.copy_(value)
        assert tried >= 30


def assert_zero_gradient(module: nn.Module, objective: Callable[[], Tensor], scale: float) -> None:
    """Gradient of the objective in the unconstrained coordinates, relative to `scale` (the number of rows, say)."""
    parameters = list(module.parameters())
    for gradient in torch.autograd.grad(objective(), parameters):
        assert gradient.abs().max().item() <= 1e-9 * scale
