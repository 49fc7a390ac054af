"""Solvers one after the other: the next takes over the rows that the last left unsolved."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from pyro_ext.problems import Problem
from pyro_ext.solvers import Solution, Solver, instance, joined

CHUNK_ELEMENTS = 2**18
"""Numbers in one chunk of rows."""


class InTurn(Solver):
    """Runs solvers in turn, each from where the last one ended, on the rows that are not solved yet.

    ``InTurn(SpaRSA(max_iterations=300), CoordinateDescent())`` is what `Maximize()` takes for Laplace + quadratic
    programs: cheap steps solve almost every row, exact ones the few that such steps stall on.

    Args:
        *solvers: the solvers, in their order.

    Raises:
        ValueError: no solver.
        TypeError: another object.

    Example:
        >>> from pyro_ext.coordinate_descent import CoordinateDescent
        >>> from pyro_ext.problems import PenalizedQuadratic
        >>> from pyro_ext.proximal import SpaRSA
        >>> problem = PenalizedQuadratic(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.ones(2))
        >>> InTurn(SpaRSA(max_iterations=5), CoordinateDescent()).solve(problem, torch.zeros(1, 2)).x
        tensor([[2., 0.]])
    """

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise ValueError("Expected at least one solver, but got none. Pass SpaRSA(), for example.")
        for solver in solvers:
            instance(solver, Solver, "every solver", "a solver such as SpaRSA() or FeatureSign()")
        super().__init__(solvers[-1].tolerance, sum(solver.max_iterations for solver in solvers))
        self.solvers = solvers

    def __repr__(self) -> str:
        return f"InTurn({', '.join(map(repr, self.solvers))})"

    def check(self, problem: Problem) -> None:
        for solver in self.solvers:
            solver.check(problem)

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        self.check(problem)
        size = max(1, CHUNK_ELEMENTS // max(1, start.shape[1]))
        if not problem.can_select or len(start) <= 2 * size:
            return self._solve(problem, start)
        # Chunk by chunk, so that what one solver leaves is at hand, and memory for one chunk serves all.
        numbers = torch.arange(len(start), device=start.device).split(size)
        return joined([self._solve(problem.rows(i), start[i]) for i in numbers])

    def _solve(self, problem: Problem, start: Tensor) -> Solution:
        found = self.solvers[0].solve(problem, start)
        for solver in self.solvers[1:]:
            left = (~found.converged).nonzero().squeeze(-1)
            if not len(left):
                break
            part = problem if len(left) == problem.num_rows else problem.rows(left)
            found = _joined(found, solver.solve(part, found.x[left]), left)
        return found


def _joined(before: Solution, part: Solution, rows: Tensor) -> Solution:
    """The first solution with some rows replaced, whose iterations add up."""
    if len(rows) == len(before.x):
        return Solution(part.x, part.gap, part.slope, before.num_iterations + part.num_iterations, part.converged)
    result = {}
    for field in fields(Solution):
        old, new = getattr(before, field.name), getattr(part, field.name)
        if field.name == "num_iterations":
            new = new + old[rows]
        result[field.name] = old.index_copy(0, rows, new.to(old))
    return Solution(**result)
