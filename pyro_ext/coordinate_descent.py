"""Cyclic coordinate descent (Fu, 1998; Friedman, Hastie & Tibshirani, 2010): a lasso for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ext.active_sets import ActiveSteps
from pyro_ext.lasso_solver import LassoSolver
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import ROUNDING

BLOCK = 24
"""Coordinates after which one product brings all residual correlations up to date."""
SWEEPS = 5
"""Sweeps between two looks at the gap."""
PATIENCE = 6
"""Looks in a row without progress, after which a row is left as it is."""
CLOSING = 0.9
"""Progress is a gap below this share of the least so far, or a measurable fall of P."""


class CoordinateDescent(LassoSolver):
    r"""Minimise P exactly in one coordinate after the other, for all rows at once.

    .. math:: x_i \leftarrow S(r_i + G_{ii} x_i,\; rate_i) / G_{ii}, \qquad r = b - G x

    with S(u, t) = sign(u) max(|u| - t, 0), or max(u - t, 0) where x_i may not fall below 0. Every few sweeps, rows
    whose signs have stayed the same take a step to the exact minimum over their active coordinates (never uphill), so
    that ill-conditioned problems end as well. Best where many rows share one G, or starts are near.

    Serves `PenalizedQuadratic`. A row is solved when its duality gap is small enough. One on which neither the gap nor
    P falls any more before that is returned as it is, and not called converged; so are rows with rates of 0 where G
    has no clear full rank, since no gap is known there.

    Args:
        tolerance: see `Solver`.
        max_iterations: most sweeps of a row.

    Source:
        Friedman, Hastie & Tibshirani, "Regularization paths for generalized linear models via coordinate descent"
        (2010), (5) with covariance updates; Fu, "Penalized regressions" (1998).

    Example:
        >>> from pyro_ext.problems import PenalizedQuadratic
        >>> problem = PenalizedQuadratic(torch.eye(3), torch.tensor([[3.0, -2.0, 0.5]]), torch.ones(3))
        >>> CoordinateDescent().solve(problem, torch.zeros(1, 3)).x
        tensor([[ 2., -1.,  0.]])
    """

    def solve_chunk(self, problem: PenalizedQuadratic, x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps
        floor = goal * (4 * eps / max(self.tolerance, ROUNDING * eps))
        steps, sweeps = ActiveSteps(problem), Sweeps(problem)
        solved, iterations = x.clone(), torch.zeros(len(x), dtype=torch.long, device=x.device)
        rows, part = torch.arange(len(x), device=x.device), problem
        lowest = least = torch.full_like(goal, torch.inf)
        idle = torch.zeros_like(rows)
        sign, iteration = x.sign(), 0
        while True:
            gradient = part.gradient(x)
            if iteration and iteration % SWEEPS == 0:
                steady = (idle > 0) | (sign == x.sign()).all(-1)
                sign = x.sign()
                at = (steady & (sign != 0).any(-1)).nonzero().squeeze(1)
                if len(at):
                    x[at] = steps(rows[at], x[at], gradient[at], sign[at])[0]
                    gradient = part.gradient(x)
            value, gap = part.value(x, gradient) + part.penalty(x), part.gap(x, gradient)
            # Near the end the gap still tells steps apart that P does not.
            idle = torch.where((value < lowest - floor) | (gap < CLOSING * least), 0, idle + 1)
            lowest, least = torch.minimum(lowest, value), torch.minimum(least, gap)
            done = (gap <= goal) | (idle == PATIENCE)
            if iteration == self.max_iterations:
                done.fill_(True)
            if bool(done.any()):
                solved[rows[done]], iterations[rows[done]] = x[done], iteration
                keep = (~done).nonzero().squeeze(1)
                if not len(keep):
                    return solved, iterations
                rows, part, sweeps = rows[keep], problem.rows(rows[keep]), sweeps.rows(keep)
                x, gradient, sign, goal, floor = x[keep], gradient[keep], sign[keep], goal[keep], floor[keep]
                lowest, least, idle = lowest[keep], least[keep], idle[keep]
            count = min(SWEEPS, self.max_iterations - iteration)
            x = sweeps(x, gradient, count)
            iteration += count


class Sweeps:
    """Sweeps over the coordinates of all rows, in the units in which every G_ii is 1.

    A coordinate of all rows lies side by side. Within a block of coordinates their own part of G keeps the residual
    correlations exact; one product then brings those of all coordinates up to date.

    Args:
        problem: the rows.
    """

    def __init__(self, problem: PenalizedQuadratic) -> None:
        diagonal = problem.quadratic.diagonal(dim1=-2, dim2=-1)
        self._shares = problem.shares
        # Where P does not depend on x_i, x_i is 0, and b_i lies within its rate.
        self._scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
        scaled = problem.quadratic / self._scale.unsqueeze(-1) / self._scale.unsqueeze(-2)
        self._quadratic = scaled if self._shares else scaled.permute(1, 2, 0).contiguous()
        # u - clamp(u, lowest, highest) is the soft threshold, one-sided where lowest is infinite.
        highest = problem.rate / self._scale
        lowest = -highest if problem.nonnegative is None else torch.where(problem.nonnegative, -torch.inf, -highest)
        self._lowest, self._highest = (bound.reshape(-1, bound.shape[-1]).T.contiguous() for bound in (lowest, highest))

    def rows(self, index: Tensor) -> Sweeps:
        """The sweeps of some rows, given their numbers."""
        part = object.__new__(Sweeps)
        part._shares = self._shares
        part._scale = self._scale if self._shares else self._scale[index]
        part._quadratic = self._quadratic if self._shares else self._quadratic[..., index]
        single = self._lowest.shape[1] == 1 and self._shares
        part._lowest = self._lowest if single else self._lowest[:, index]
        part._highest = self._highest if single else self._highest[:, index]
        return part

    def __call__(self, x: Tensor, gradient: Tensor, count: int) -> Tensor:
        """The point ``(R, F)`` after some sweeps, from a point and its gradient of the smooth part ``(R, F)``."""
        along = (x * self._scale).T.contiguous()
        residual = (-gradient / self._scale).T.contiguous()
        for _ in range(count):
            self._sweep(along, residual)
        return (along.T / self._scale).contiguous()

    def _sweep(self, x: Tensor, residual: Tensor) -> None:
        """One sweep in place, over x and b - G x of shape ``(F, R)``."""
        width = BLOCK if self._shares else len(x)
        for first in range(0, len(x), width):
            block = slice(first, first + width)
            if not self._shares:
                for i in range(len(x)):
                    residual.addcmul_(self._quadratic[i], self._update(i, x[i], residual[i]), value=-1)
                continue
            before, entered, inner = x[block].clone(), residual[block].clone(), self._quadratic[block, block]
            for i in range(len(before)):
                moved = self._update(first + i, x[first + i], entered[i])
                entered.addr_(inner[i], moved, alpha=-1)
            residual.addmm_(self._quadratic[:, block], x[block] - before, alpha=-1)

    def _update(self, i: int, x: Tensor, residual: Tensor) -> Tensor:
        """Move one coordinate ``(R,)`` to its minimum in place; by how much it moved."""
        at = residual + x
        moved = at.sub_(at.clamp(self._lowest[i], self._highest[i])).sub_(x)
        x += moved
        return moved
