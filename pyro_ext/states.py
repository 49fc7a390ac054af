"""Enumeration of the joint states of discrete units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def num_states(units: Sequence[int]) -> int:
    """Number of joint states of units of the given feature sizes (1 is a binary unit, K a one-hot one).

    Example:
        >>> num_states([1, 1, 3])
        12
    """
    return math.prod(2 if size == 1 else size for size in units)


def enumerate_states(units: Sequence[int], *, device: torch.device | None = None) -> Tensor:
    """All joint states as features, in lexicographic order (the first unit changes slowest).

    Args:
        units: feature size of every unit: 1 for a binary unit, K for a one-hot unit of K classes.
        device: where the result lives.

    Returns:
        Tensor ``(num_states, sum(units))`` of zeros and ones.

    Example:
        >>> enumerate_states([1, 1])
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    choices = [torch.tensor([[0.0], [1.0]]) if size == 1 else torch.eye(size) for size in units]
    if all(size == 1 for size in units):
        shifts = torch.arange(len(units) - 1, -1, -1, device=device)
        bits = torch.arange(2 ** len(units), device=device)[:, None] >> shifts
        return (bits & 1).to(torch.get_default_dtype())
    grid = itertools.product(*(range(len(c)) for c in choices))
    index = torch.tensor(list(grid), dtype=torch.long)
    columns = [choice[index[:, i]] for i, choice in enumerate(choices)]
    return torch.cat(columns, -1).to(device=device, dtype=torch.get_default_dtype())


def state_weights(units: Sequence[int], *, device: torch.device | None = None) -> Tensor:
    """Weights w such that ``state @ w`` is the state's index in `enumerate_states`, shape ``(sum(units),)``."""
    weights: list[float] = []
    radix = num_states(units)
    for size in units:
        radix //= 2 if size == 1 else size
        weights += [float(radix)] if size == 1 else [float(radix * j) for j in range(size)]
    return torch.tensor(weights, device=device, dtype=torch.float64)


def draw_states(units: Sequence[int], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Joint states drawn evenly, features ``shape + (sum(units),)`` in torch's default type, on the CPU.

    Example:
        >>> draw_states([1, 3], (2,), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 4])
    """
    pieces = []
    for size in units:
        classes = max(size, 2)
        picks = torch.randint(classes, tuple(shape), generator=generator)
        one_hot = torch.nn.functional.one_hot(picks, classes).to(torch.get_default_dtype())
        pieces.append(one_hot[..., 1:] if size == 1 else one_hot)
    return torch.cat(pieces, -1)
