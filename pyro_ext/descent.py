"""What the solvers of smooth problems share: their start, their rounding, and the search for rows without a maximum."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from pyro_ext.problems import Problem
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.solvers import ROUNDING, SolverError

LONGEST_STEP = 5.0
"""How far a mapped feature moves in one step: a positive value by a factor of exp(5)."""

STILL_GROWING = 1e-3
"""A value that grew by this share of its size in the last step may be on its way to infinity."""

STEPS_BEYOND = 10
"""How many such steps farther on it is looked whether f has begun to rise."""

CUT_OFF = 1e-3
"""A feature that comes back from its value this far off was cut off at the end of its support."""

MOST_STALE = 10
"""Steps in a row that lower neither f, by more than its rounding, nor the gradient: what is left is rounding."""

FAR = 12.0
"""A row that got stuck so far away has no maximum: exp(12) times the scale that it started from."""

FARTHER = 20.0
"""The same of a row that was stopped by its number of iterations."""

FARTHEST = 28.0
"""A real value that went so far, 10^12 times the scale that it started from, has no maximum."""


def check_smooth(problem: Problem, solver: str) -> None:
    """Refuse absolute values and bounds.

    Raises:
        SolverError: named.
    """
    if not problem.is_smooth:
        raise SolverError(
            f"Expected a smooth log p(h, v) for {solver}, but got absolute values or bounds (Laplace or exponential "
            "priors). Use `FISTA()`, which serves them."
        )


class Descent:
    """The start of a descent, and what tells whether a row that ended is at a minimum.

    Args:
        problem: a smooth problem.
        start: shape ``(R, F)``.
        tolerance: the solver's.

    Attributes:
        value: f at the start, ``(R,)``.
        gradient: its gradient, ``(R, F)``.

    Raises:
        NotFiniteError: f or its gradient is NaN or infinite at the start.
    """

    def __init__(self, problem: Problem, start: Tensor, tolerance: float) -> None:
        self.problem = problem
        self.program = problem if isinstance(problem, ProgramProblem) else None
        self.start = start
        self.tolerance = max(tolerance, ROUNDING * torch.finfo(start.dtype).eps)
        self.value, self.gradient = problem.smooth(start)
        finite = self.value.isfinite() & self.gradient.isfinite().all(-1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise NotFiniteError(
                f"Expected log p(h, v) and its gradient finite at the start, but got log p = "
                f"{-float(self.value[row]):g} in row {row}. Look for NaN in the data and in the parameters, and start "
                "inside the support."
            )

    @staticmethod
    def unit(value: Tensor) -> Tensor:
        """The nats that tolerances are relative to: max(1, |f|)."""
        return value.abs().clamp(min=1)

    def goal(self, value: Tensor) -> Tensor:
        """The tolerance in nats, ``(R,)``."""
        return self.tolerance * self.unit(value)

    def noise(self, value: Tensor) -> Tensor:
        """Differences of f that are rounding, ``(R,)``."""
        return ROUNDING * torch.finfo(value.dtype).eps * self.unit(value)

    def blurred(self, value: Tensor, predicted: Tensor) -> Tensor:
        """Whether a predicted fall is so small that f, a sum of larger terms, may hide it, boolean ``(R,)``."""
        return predicted <= math.sqrt(torch.finfo(value.dtype).eps) * self.unit(value)

    def longest(self, direction: Tensor) -> Tensor:
        """The largest step along a direction, ``(R,)``: infinite where nothing is mapped to a support."""
        if self.program is None:
            return torch.full_like(direction[:, 0], torch.inf)
        return LONGEST_STEP / (direction.abs() * self.program.constrained).amax(-1)

    def check_bounded(self, x: Tensor, value: Tensor, active: Tensor) -> None:
        """Stop rows that fall without end.

        Raises:
            SolverError: f is minus infinity, or the features of an active row are beyond what the dtype can map.
        """
        mapped = torch.zeros_like(x[0], dtype=torch.bool) if self.program is None else self.program.constrained
        far = self.travel(x) > torch.where(mapped, _end(x.dtype), FARTHEST)
        gone = value.isneginf() | (active & far.any(-1))
        if bool(gone.any()):
            self._refuse(x, int(gone.nonzero()[0]))

    def check_ends(self, x: Tensor, value: Tensor, step: Tensor, solved: Tensor, stopped: Tensor) -> None:
        """Tell minima from rows that only became flat on their way to infinity, and from those that went far.

        Args:
            x: where the rows ended.
            value: f there.
            step: the last step of each row, ``(R, F)``.
            solved: rows whose stopping rule was met.
            stopped: rows that took as many steps as they may.

        Raises:
            SolverError: a row has no minimum.
        """
        for found in (
            self._still_falling(x, value, step) & solved,
            self._falling_at_end(x) & solved,
            ~solved & (self.travel(x).amax(-1) > torch.where(stopped, FARTHER, FAR)),
        ):
            if bool(found.any()):
                self._refuse(x, int(found.nonzero()[0]))

    def travel(self, x: Tensor) -> Tensor:
        """How far each feature went from its start, and a mapped one from 0 too, ``(R, F)``: logarithms of scales."""
        moved = (x - self.start).abs()
        grown = torch.log1p(moved / (1 + self.start.abs()))
        if self.program is None:
            return grown
        return torch.where(self.program.constrained, torch.minimum(moved, x.abs()), grown)

    def _still_falling(self, x: Tensor, value: Tensor, step: Tensor) -> Tensor:
        """Rows whose values still grew in the last step, and where f still falls many such steps farther on."""
        sizes = [self._values(point).abs() for point in (x - step, x, x + STEPS_BEYOND * step)]
        grown, beyond = sizes[1] - sizes[0], sizes[2] - sizes[1]
        # Where a support ends, values do not grow for long.
        growing = (grown > STILL_GROWING * (1 + sizes[1])) & (beyond > 0.5 * STEPS_BEYOND * grown)
        rows = growing.any(-1)
        if not bool(rows.any()):
            return rows
        height, gradient = self.problem.smooth(torch.where(rows[:, None], x + STEPS_BEYOND * step, x))
        return rows & (height <= value + self.noise(value)) & ((gradient * step).sum(-1) <= 0)

    def _falling_at_end(self, x: Tensor) -> Tensor:
        """Rows at the end of a support, cut off by the dtype, where f falls without end on the way there."""
        none = torch.zeros_like(x[:, 0], dtype=torch.bool)
        if self.program is None or not bool(self.program.constrained.any()):
            return none
        end = _end(x.dtype)
        back = self.program.roundtrip(x).nan_to_num(nan=0.0, posinf=end, neginf=-end)
        cut = self.program.constrained & ((back - x).abs() > CUT_OFF * (1 + x.abs()))
        if not bool(cut.any()):
            return none
        slopes = []
        for share in (0.8, 0.9):
            value, gradient = self.problem.smooth(torch.where(cut, share * back, x))
            slopes.append((torch.where(cut, -gradient * back.sign(), 0).amax(-1), value))
        # Where the density is finite at the end, the slope vanishes like the distance from it.
        (before, _), (near, value) = slopes
        return value.isfinite() & (near > self.goal(value)) & (near > 0.5 * before)

    def _values(self, x: Tensor) -> Tensor:
        return x if self.program is None else self.program.values(x)

    def _refuse(self, x: Tensor, row: int) -> NoReturn:
        feature = int(self.travel(x)[row].argmax())
        if self.program is None:
            what, size = f"feature {feature}", float(x[row, feature].abs())
        else:
            name = self.program.site_name(feature)
            what, size = repr(name), self.program.size_of(name, row, x)
        raise SolverError(
            f"Expected log p(h, v) with a maximum in h, but got {what} in row {row} still rising at |h| = {size:.3g}. "
            f"Give {what} a proper prior, reparametrise, or use `MeanField`."
        )


class Progress:
    """Whether rows still get anywhere.

    Args:
        descent: the descent.
    """

    def __init__(self, descent: Descent) -> None:
        self._noise = descent.noise
        self._lowest, self._flattest = descent.value, descent.gradient.abs().amax(-1)
        self._count = torch.zeros_like(self._lowest, dtype=torch.long)

    def is_over(self, value: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        """Which of the rows that took a step took `MOST_STALE` in vain, boolean ``(R,)``."""
        slope = gradient.abs().amax(-1)
        lower = value < self._lowest - self._noise(value)
        better = rows & (lower | (slope < self._flattest))
        self._count = torch.where(better, 0, self._count + rows.long())
        self._lowest = torch.where(rows & lower, value, self._lowest)
        self._flattest = torch.where(better, slope, self._flattest)
        return rows & (self._count >= MOST_STALE)


def _end(dtype: torch.dtype) -> float:
    """The logarithm of a scale of which the dtype still holds the fourth power, as second derivatives need."""
    return -0.25 * math.log(torch.finfo(dtype).tiny)
