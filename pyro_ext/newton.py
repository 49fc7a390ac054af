"""Newton's method, a matrix of second derivatives for every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyro_ext.descent import Descent, Progress, check_smooth
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.solvers import Solution, Solver, SolverError

SUFFICIENT = 1e-4
"""The share of the predicted fall that a step must bring (Armijo)."""

MOST_TRIALS = 40
"""Trials of one line search."""


class Newton(Solver):
    r"""Newton's method with a line search, for smooth problems of few features a row.

    .. math:: x \leftarrow x - \alpha H^{-1} g, \qquad g = \nabla f(x),\; H = \nabla^2 f(x)

    with alpha the first of 1, ... that lowers f enough (Armijo). Where H is not positive definite its eigenvalues,
    after scaling to a unit diagonal, are taken in size, so that the step leads away from saddles (Dauphin et al.,
    2014); where g vanishes at a saddle, along the eigenvector of the most negative one. A quadratic f takes one step.
    An iteration is one H (a product a feature, all rows at once) and the trials of the line search.

    A row is solved when the fall that the next step predicts, half the Newton decrement g'H^-1 g, is at most
    ``tolerance * max(1, |f|)`` nats, with the tolerance never below 32 units of rounding; that step is still taken
    where it lowers f or the slope. A row is also solved where no step lowers f and the predicted fall is below
    ``sqrt(eps) * max(1, |f|)``, rounding of f itself. There is no duality gap: `Solution.gap` is NaN. The minimum may
    be a local one.

    Args:
        tolerance: of the predicted fall, relative to max(1, |f|).
        max_iterations: most steps of a row.

    Raises:
        ValueError: a tolerance that is not above 0, or max_iterations below 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.program import Program
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 0.5), obs=v)
        >>> problem = ProgramProblem(Program(model, (torch.tensor([0.0, 4.0]),), {}))
        >>> Newton().solve(problem, torch.zeros(2, 1)).x
        tensor([[0.0000],
                [3.7814]])
    """

    def __init__(self, tolerance: float = 1e-12, max_iterations: int = 500) -> None:
        super().__init__(tolerance, max_iterations)

    def check(self, problem: Problem) -> None:
        """Refuse absolute values, bounds, and problems without second derivatives.

        Raises:
            SolverError: named, with the solver that serves.
        """
        check_smooth(problem, "Newton")
        if not isinstance(problem, ProgramProblem | PenalizedQuadratic):
            raise SolverError(
                f"Expected a problem with second derivatives for Newton, but got {type(problem).__name__}. "
                "Use `LBFGS()`."
            )

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        """Minimise from a start ``(R, F)``.

        Raises:
            SolverError: absolute values or bounds; too many features for a matrix a row; or a row has no minimum.
            NotFiniteError: log p is not finite at the start.
        """
        self.check(problem)
        descent = Descent(problem, start, self.tolerance)
        state = _State(descent)
        stopped = torch.zeros_like(state.done)
        while bool((~state.done).any()):
            self._iterate(problem, descent, state)
            descent.check_bounded(state.x, state.value, ~state.done)
            stopped = state.num_iterations >= self.max_iterations
            state.done |= stopped
        descent.check_ends(state.x, state.value, state.last, state.solved, stopped)
        slope = state.gradient.abs().amax(-1)
        return Solution(state.x, torch.full_like(slope, torch.nan), slope, state.num_iterations, state.solved)

    def _iterate(self, problem: Problem, descent: Descent, state: _State) -> None:
        """One step of every row that is not done."""
        x, value, gradient = state.x, state.value, state.gradient
        direction, bend = _direction(_hessian(problem, x), gradient, ~state.done)
        fall = -(gradient * direction).sum(-1)
        near = ~state.done & (0.5 * fall <= descent.goal(value))
        # At a saddle the gradient vanishes: the fall is that of the curvature.
        saddle = near & (bend.curvature < -(torch.finfo(x.dtype).eps ** 0.5))
        uphill = (gradient * bend.direction).sum(-1, keepdim=True) > 0
        escape = torch.where(uphill, -bend.direction, bend.direction)
        direction = torch.where(saddle[:, None], escape, direction)
        fall = torch.where(saddle, -(gradient * escape).sum(-1), fall)
        curve = torch.where(saddle, -bend.curvature, 0)

        step = descent.longest(direction).clamp(max=1)
        pending = ~state.done
        for _ in range(MOST_TRIALS):
            move = torch.where(pending, step, 0)[:, None] * direction
            found, slopes = problem.smooth(torch.where(pending[:, None], x + move, x))
            lower = found <= value - SUFFICIENT * step * (fall + 0.5 * step * curve)
            along = (slopes * direction).sum(-1).abs()
            flatter = (found <= value + descent.noise(value)) & (along <= 0.9 * fall) & ~saddle
            taken = pending & (lower | flatter)
            state.move(taken, move, found, slopes)
            state.num_iterations += (taken & (saddle | ~near)).long()
            # The last step is a bonus: what it does not improve it leaves.
            state.done |= near & ~saddle & pending
            state.solved |= near & ~saddle & pending
            pending &= ~taken & ~state.done
            if not bool(pending.any()):
                break
            step = torch.where(pending, step * _shorter(found - value, step * fall), step)
        over = pending | state.progress.is_over(state.value, state.gradient, ~state.done & ~pending)
        state.done |= over
        state.solved |= over & descent.blurred(value, 0.5 * fall)


class _State:
    """Where the rows are."""

    def __init__(self, descent: Descent) -> None:
        self.x, self.value, self.gradient = descent.start.clone(), descent.value, descent.gradient
        self.progress = Progress(descent)
        self.last = torch.zeros_like(self.x)
        self.num_iterations = torch.zeros_like(self.value, dtype=torch.long)
        self.done = torch.zeros_like(self.value, dtype=torch.bool)
        self.solved = self.done.clone()

    def move(self, taken: Tensor, move: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Move some rows to where they were evaluated."""
        rows = taken[:, None]
        self.x = torch.where(rows, self.x + move, self.x)
        self.last = torch.where(rows, move, self.last)
        self.value = torch.where(taken, value, self.value)
        self.gradient = torch.where(rows, gradient, self.gradient)


@dataclass(frozen=True)
class _Bend:
    """The most negative curvature of every row, ``(R,)`` (0 where there is none), and its direction ``(R, F)``."""

    curvature: Tensor
    direction: Tensor


def _shorter(rise: Tensor, fall: Tensor) -> Tensor:
    """The share of a refused step that the parabola through f and its slope takes, between 0.1 and 0.5."""
    share = fall / (2 * (rise + fall))
    return torch.where(rise.isfinite(), share.nan_to_num(nan=0.5), 0.25).clamp(min=0.1, max=0.5)


def _hessian(problem: Problem, x: Tensor) -> Tensor:
    if isinstance(problem, PenalizedQuadratic):
        return problem.quadratic.expand(len(x), -1, -1)
    return cast("ProgramProblem", problem).hessian(x)


def _direction(hessian: Tensor, gradient: Tensor, active: Tensor) -> tuple[Tensor, _Bend]:
    """The Newton direction of active rows, and where f bends down."""
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    # Where second derivatives are not finite the gradient itself is the direction, at unit length.
    known = active & hessian.isfinite().all(-1).all(-1)
    length = torch.linalg.vector_norm(gradient, dim=-1).clamp(min=torch.finfo(gradient.dtype).tiny)
    hessian = torch.where(known[:, None, None], hessian, eye * length[:, None, None])
    size = hessian.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    size = torch.where(size > 0, size, 1)
    scaled = hessian / (size[:, :, None] * size[:, None, :])
    factor, info = torch.linalg.cholesky_ex(scaled)
    least = scaled.shape[-1] * torch.finfo(scaled.dtype).eps
    definite = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).square().amin(-1) > least)
    factor = torch.where(definite[:, None, None], factor, eye)
    target = (gradient / size)[:, :, None]
    direction = -torch.cholesky_solve(target, factor)[:, :, 0]
    curvature, bend = torch.zeros_like(gradient[:, 0]), torch.zeros_like(gradient)
    rest = (~definite).nonzero()[:, 0]
    if len(rest):
        values, vectors = torch.linalg.eigh(scaled[rest])
        along = vectors.mT @ target[rest] / values.abs().clamp(min=10 * least)[:, :, None]
        direction[rest] = -(vectors @ along)[:, :, 0]
        curvature[rest] = values[:, 0].clamp(max=0)
        bend[rest] = vectors[:, :, 0]
    return direction / size, _Bend(curvature, bend / size)
