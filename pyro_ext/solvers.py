"""Solvers of the row-wise problems of MAP inference: what they are given, and what they promise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyro_ext.problems import PenalizedQuadratic, Problem

ROUNDING = 32
"""Gaps below so many units of rounding, relative to the problem's own size, cannot be told from 0."""


class SolverError(ValueError):
    """A solver does not serve a problem, or the problem has no minimum."""


@dataclass(frozen=True)
class Solution:
    """Where a solver ended.

    Attributes:
        x: the points, shape ``(R, F)``, with exact zeros where the sparse penalty holds them.
        gap: an upper bound on P(x) - min P, shape ``(R,)``, nats; NaN where none is known.
        slope: largest entry of the least subgradient, shape ``(R,)``, nats per unit of x.
        num_iterations: iterations of each row, integers ``(R,)``.
        converged: rows whose stopping rule was met, boolean ``(R,)``.
    """

    x: Tensor
    gap: Tensor
    slope: Tensor
    num_iterations: Tensor
    converged: Tensor


class Solver(ABC):
    """An algorithm that minimises a `Problem`, all rows at once.

    Args:
        tolerance: a row is solved when its duality gap is at most this share of the most that the smooth part can
            fall (|y|^2 / 2 of a lasso); never below what the dtype can tell. Problems without a gap say so in their
            solver's documentation.
        max_iterations: most iterations of a row.

    Raises:
        ValueError: a tolerance that is not above 0, or max_iterations below 1.
    """

    def __init__(self, tolerance: float = 1e-6, max_iterations: int = 10_000) -> None:
        if not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
            raise ValueError(f"Expected a tolerance above 0, but got {tolerance!r}. It is relative; 1e-6 is usual.")
        if not isinstance(max_iterations, int) or isinstance(max_iterations, bool) or max_iterations < 1:
            raise ValueError(f"Expected max_iterations of at least 1, but got {max_iterations!r}. Use 1000 or more.")
        self.tolerance = float(tolerance)
        self.max_iterations = max_iterations

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tolerance={self.tolerance:g}, max_iterations={self.max_iterations})"

    def check(self, problem: Problem) -> None:  # noqa: B027 (some serve everything)
        """Refuse a problem that the solver does not serve.

        Raises:
            SolverError: named, with the solver that does.
        """

    @abstractmethod
    def solve(self, problem: Problem, start: Tensor) -> Solution:
        """Minimise from a start ``(R, F)``.

        Raises:
            SolverError: the problem is of a kind that the solver does not serve, or a row has no minimum.
        """

    def goal(self, problem: Problem, start: Tensor) -> Tensor:
        """The gap ``(R,)``, nats, at which a row is solved."""
        precision = ROUNDING * torch.finfo(start.dtype).eps
        return max(self.tolerance, precision) * problem.unit(start)


def joined(parts: list[Solution]) -> Solution:
    """The solutions of consecutive rows as one."""
    found = {}
    for field in fields(Solution):
        pieces = [getattr(part, field.name) for part in parts]
        found[field.name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return Solution(**found)


def solution_at(problem: Problem, x: Tensor, num_iterations: Tensor, goal: Tensor) -> Solution:
    """The solution at x with its certificate, for solvers that stop on the gap."""
    gradient = problem.smooth(x)[1]
    gap = problem.gap(x, gradient)
    return Solution(x, gap, problem.slope(x, gradient), num_iterations, gap <= goal)


def check_quadratic(solver: Solver, problem: Problem) -> None:
    """Refuse what is not Laplace + quadratic.

    Raises:
        SolverError: with the solvers that serve it.
    """
    if not isinstance(problem, PenalizedQuadratic):
        raise SolverError(
            f"Expected log p(v, h) to be quadratic beside its sparse prior for {type(solver).__name__}, but it is not. "
            f"Use FISTA(){', LBFGS() or Newton()' if problem.is_smooth else ''}."
        )


def instance(value: Any, kind: type, name: str, choices: str) -> None:
    """Refuse what is no object of a kind.

    Raises:
        TypeError: named.
    """
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be {choices}, but got {value!r}. Pass an object, not its name or class.")
