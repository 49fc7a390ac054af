"""Lassos by brute force: every pattern of signs is tried."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from pyro_ext.problems import PenalizedQuadratic


def random_lasso(
    rows: int,
    width: int,
    *,
    rank: int | None = None,
    rate: Tensor | float = 1.0,
    nonnegative: Tensor | None = None,
    curvature: Tensor | float = 0.0,
    own: bool = False,
    spread: float = 1.0,
    seed: int = 0,
) -> PenalizedQuadratic:
    """A lasso of every row, G = A'A and b = A'y; `rank` below `width` makes it overcomplete.

    With `curvature`, of half-normal priors, on the diagonal of G.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = width + 2 if rank is None else rank
    design = torch.randn(*((rows,) if own else ()), rank, width, generator=generator, dtype=torch.float64)
    design = design * torch.logspace(0, -spread, width, dtype=torch.float64) * 10 ** (spread / 2)
    y = 3 * torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    linear = (design.mT @ y.unsqueeze(-1)).squeeze(-1) if own else y @ design
    rates = torch.as_tensor(rate, dtype=torch.float64)
    rates = rates.expand(width) if rates.dim() == 0 else rates
    quadratic = design.mT @ design + torch.diag(torch.as_tensor(curvature).double().expand(width))
    return PenalizedQuadratic(quadratic, linear, rates, nonnegative)


def solve_by_signs(problem: PenalizedQuadratic) -> tuple[Tensor, Tensor]:
    """The minimum of every row and P there: the best feasible point among those stationary for a pattern of signs."""
    count, width = problem.linear.shape
    best, best_x = torch.full((count,), torch.inf, dtype=torch.float64), torch.zeros(count, width, dtype=torch.float64)
    for signs in product((-1.0, 0.0, 1.0), repeat=width):
        sign = torch.tensor(signs, dtype=torch.float64)
        active = sign != 0
        for row in range(count):
            quadratic = (problem.quadratic if problem.shares else problem.quadratic[row]).double()
            rate = (problem.rate if problem.rate.dim() == 1 else problem.rate[row]).double()
            x = torch.zeros(width, dtype=torch.float64)
            if bool(active.any()):
                target = (problem.linear[row].double() - rate * sign)[active]
                x[active] = torch.linalg.lstsq(quadratic[active][:, active], target[:, None], driver="gelsd").solution[
                    :, 0
                ]
            if bool((x * sign < 0).any()):
                continue
            if problem.nonnegative is not None and bool((x[problem.nonnegative] < 0).any()):
                continue
            value = 0.5 * x @ quadratic @ x - problem.linear[row].double() @ x + rate @ x.abs()
            if value < best[row]:
                best[row], best_x[row] = value, x
    return best_x, best
