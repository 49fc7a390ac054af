"""What the solvers of `PenalizedQuadratic` problems share: refusals, chunks of rows, the certificate."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor

from pyro_ext.bounded import check_bounded
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.solvers import Solution, Solver, check_quadratic, solution_at

CELLS = 1 << 19
"""Numbers that x of a chunk of rows may hold."""
GRAM_CELLS = 1 << 22
"""Numbers that G of a chunk of rows may hold, where each row has its own."""


class LassoSolver(Solver):
    """A `Solver` of `PenalizedQuadratic` problems that takes chunks of rows, so that its own memory is bounded."""

    def check(self, problem: Problem) -> None:
        check_quadratic(self, problem)

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        """Minimise from a start ``(R, F)``.

        Raises:
            SolverError: the problem is no `PenalizedQuadratic`, or a row has no minimum.
        """
        self.check(problem)
        problem = cast("PenalizedQuadratic", problem)
        check_bounded(problem)
        goal = self.goal(problem, start)
        x, iterations = _feasible(problem, start), torch.zeros(len(start), dtype=torch.long, device=start.device)
        size = problem.quadratic.shape[-1]
        most = CELLS // size if problem.shares else GRAM_CELLS // size**2
        for rows in torch.arange(len(start), device=start.device).split(max(1, most)):
            if not len(rows):
                continue
            part = problem if len(rows) == len(start) else problem.rows(rows)
            x[rows], iterations[rows] = self.solve_chunk(part, x[rows], goal[rows])
        return solution_at(problem, x, iterations, goal)

    @abstractmethod
    def solve_chunk(self, problem: PenalizedQuadratic, x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Minimise for as many rows as memory should hold at once.

        Args:
            problem: n rows that have a minimum.
            x: a feasible start, shape ``(n, F)``; 0 where P does not depend on x_i.
            goal: the gap at which a row is solved, shape ``(n,)``, nats.

        Returns:
            the solutions ``(n, F)`` and their numbers of iterations ``(n,)``.
        """


def _feasible(problem: PenalizedQuadratic, start: Tensor) -> Tensor:
    """A copy of a start ``(R, F)`` without negative values where none may be, and 0 where P does not depend on x_i."""
    empty = problem.quadratic.diagonal(dim1=-2, dim2=-1) <= 0
    x = torch.where(empty, 0, start)
    return x if problem.nonnegative is None else torch.where(problem.nonnegative, x.clamp(min=0), x)
