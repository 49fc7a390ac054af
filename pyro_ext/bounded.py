"""Whether a lasso has a minimum, where its quadratic part has none."""

from __future__ import annotations

import torch

from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import SolverError

MAX_PROJECTIONS = 1000


def check_bounded(problem: PenalizedQuadratic) -> None:
    r"""Refuse rows of which P falls without end along some d with G d = 0.

    .. math:: b^\top d > \sum_i rate_i |d_i|, \qquad d_i \ge 0 \text{ where nonnegative}

    Only rows whose b lies outside the range of G can have one. There is none if and only if some w within the rates
    has b - w in the range of G. Projecting onto either set in turn leads to such a w, or to d as the difference.

    Args:
        problem: R rows in F coordinates.

    Raises:
        SolverError: with the number of such a row.

    Example:
        >>> G, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> check_bounded(PenalizedQuadratic(G, b, torch.tensor([1.0, 2.5])))
        >>> check_bounded(PenalizedQuadratic(G, b, torch.tensor([1.0, 1.5])))
        Traceback (most recent call last):
        pyro_ext.solvers.SolverError: Expected a minimum of -log p(v, h), but got a row (number 0) where it falls ...
    """
    open_rows = problem.energy.isinf().nonzero().squeeze(1)
    for row in open_rows:
        if _falls(problem.rows(row[None])):
            raise SolverError(
                f"Expected a minimum of -log p(v, h), but got a row (number {int(row)}) where it falls without end. "
                "Raise the rates of the sparse prior, or let every latent reach the visible values."
            )


def _falls(problem: PenalizedQuadratic) -> bool:
    """Whether the one row of a problem has no minimum."""
    values, vectors = problem._spectrum if problem.shares else (part[0] for part in problem._spectrum)
    eps = torch.finfo(problem.linear.dtype).eps
    null = vectors[:, values <= len(values) * eps * values[-1].clamp(min=0)]
    linear, rate = problem.linear[0].double(), problem.rate.double().reshape(-1)
    signed = torch.ones_like(rate, dtype=torch.bool) if problem.nonnegative is None else ~problem.nonnegative
    lowest = torch.where(signed, -rate, -torch.inf)
    within = linear.clamp(lowest, rate)
    for _ in range(MAX_PROJECTIONS):
        direction = null @ (null.mT @ (linear - within))
        size = direction.norm()
        if size <= eps * linear.norm():
            return False
        if bool((signed | (direction >= -1e-6 * size)).all()):
            fall = linear @ direction - (rate * direction.abs()).sum()
            if fall > 1e3 * eps * linear.norm() * size:
                return True
        within = (within + direction).clamp(lowest, rate)
    return False
