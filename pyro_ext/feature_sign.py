"""Feature-sign search (Lee, Battle, Raina & Ng, 2007): a lasso for every row by its exact active set."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ext.active_sets import ActiveSteps
from pyro_ext.lasso_solver import LassoSolver
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import ROUNDING

SHARE = 0.6
"""Coordinates enter together whose gradients pass their rates by this share of the most."""
PATIENCE = 3
"""Steps to x_a by which P falls no more than rounding, after which a row is left as it is."""


class FeatureSign(LassoSolver):
    r"""Solve the rows' own linear systems over the coordinates that are active, and find these by descent.

    .. math:: x_a = G_{aa}^{-1} (b_a - rate_a\, sign_a)

    An iteration moves every row towards x_a and stops at the exact minimum of P along the way, where coordinates that
    reach 0 leave. Once a row stands at x_a, the coordinates that break :math:`|b - G x|_i \le rate_i` most enter: all
    within a share of the worst. Those of them that x_a would send against their gradients stay at 0, and what is left
    is a direction of descent, as it is for one alone. P never rises, and no active set is solved twice with the same
    signs, so that the search ends. Rows are solved together, their systems padded to a few sizes. Best where few
    coordinates are active: a system costs the cube of their number.

    Serves `PenalizedQuadratic`. A row is solved when its duality gap is small enough. One whose steps have become
    rounding before that is returned as it is, and not called converged; so are rows with rates of 0 where G has no
    clear full rank, since no gap is known there.

    Args:
        tolerance: see `Solver`.
        max_iterations: most linear systems of a row.

    Source:
        Algorithm 1 of Lee, Battle, Raina & Ng, "Efficient sparse coding algorithms" (2007).

    Example:
        >>> from pyro_ext.problems import PenalizedQuadratic
        >>> problem = PenalizedQuadratic(torch.eye(3), torch.tensor([[3.0, -2.0, 0.5]]), torch.ones(3))
        >>> FeatureSign().solve(problem, torch.zeros(1, 3)).x
        tensor([[ 2., -1.,  0.]])
    """

    def __init__(self, tolerance: float = 1e-6, max_iterations: int = 1000) -> None:
        super().__init__(tolerance, max_iterations)

    def solve_chunk(self, problem: PenalizedQuadratic, x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        floor = _least_fall(problem)
        steps = ActiveSteps(problem)
        solved, iterations = x.clone(), torch.zeros(len(x), dtype=torch.long, device=x.device)
        rows, part = torch.arange(len(x), device=x.device), problem
        settled = (x == 0).all(-1)
        idle = torch.zeros_like(rows)
        for iteration in range(self.max_iterations + 1):
            gradient = part.gradient(x)
            done = (part.gap(x, gradient) <= goal) & (settled | (iteration == 0)) | (idle == PATIENCE)
            if iteration == self.max_iterations:
                done.fill_(True)
            if bool(done.any()):
                solved[rows[done]], iterations[rows[done]] = x[done], iteration
                keep = (~done).nonzero().squeeze(1)
                if not len(keep):
                    break
                rows, part = rows[keep], problem.rows(rows[keep])
                x, gradient, goal, floor = x[keep], gradient[keep], goal[keep], floor[keep]
                settled, idle = settled[keep], idle[keep]
            violation = part.subgradient(x, gradient).masked_fill_(x != 0, 0)
            enters = settled[:, None] & (violation.abs() >= SHARE * violation.abs().amax(-1, keepdim=True))
            moved, fall, whole = steps(rows, x, gradient, x.sign() - violation.sign() * enters)
            # A row that did not move stands where it stood; one that lost a tiny coordinate is on its way.
            settled = whole | (moved == x).all(-1)
            idle = torch.where(fall > floor, 0, idle + settled)
            x = moved
        return solved, iterations


def _least_fall(problem: PenalizedQuadratic) -> Tensor:
    """What P may fall by, shape ``(n,)``, nats, where all entries of the gradient are rounding.

    A fall is known from the gradient, far more finely than from the values of P.
    """
    diagonal = problem.quadratic.diagonal(dim1=-2, dim2=-1)
    size = torch.where(diagonal > 0, problem.linear.square() / diagonal, 0).amax(-1)
    return (ROUNDING * torch.finfo(size.dtype).eps) ** 2 * size
