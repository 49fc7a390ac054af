"""Proximal gradient solvers: FISTA, and spectral steps (SpaRSA)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from pyro_ext.bounded import check_bounded
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.solvers import ROUNDING, Solution, Solver, SolverError, check_quadratic, joined

CHUNK_ELEMENTS = 2**18
"""Numbers in one chunk of rows: a handful of such tensors stay in the cache."""


LONGEST = 1e4
"""Longest spectral step, in units of 1 / L."""

SHORTEST = 10.0
"""What the longest step of a row is not cut below, in units of 1 / L."""

MOST_CHECKS = 3
"""Checks without a new low of P after which spectral steps pause."""

MOST_SCREENED = 32
"""Rows up to which screening is tried."""

LEAST_LEFT = 0.75
"""Solved rows leave the batch where at most this share is left."""

LEAST_SCREENED = 0.7
"""Screening pays where at most this share of the atoms is left."""


class Proximal(Solver):
    """Steps along the gradient of the smooth part, each followed by the proximal map of the penalty.

    Rows that meet their goal leave the batch at every check. Atoms that are 0 at the optimum of all rows that are left,
    by the gap-safe rule of Ndiaye et al. (2017), are left out where that makes the problem a good deal smaller.

    Args:
        tolerance: see `Solver`.
        max_iterations: see `Solver`.
        check_every: iterations between two looks at the gap.

    Raises:
        ValueError: see `Solver`; check_every below 1.
    """

    def __init__(self, tolerance: float = 1e-6, max_iterations: int = 10_000, check_every: int = 5) -> None:
        super().__init__(tolerance, max_iterations)
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 1:
            raise ValueError(f"Expected check_every of at least 1, but got {check_every!r}. 5 or 10 is usual.")
        self.check_every = check_every

    @abstractmethod
    def begin(self, problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
        """The state at a start: tensors whose first dimension is the row; the first one is x."""

    @abstractmethod
    def advance(self, problem: Problem, state: tuple[Tensor, ...], num: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Some iterations, and the gradient of f at the new x."""

    def lowest(self, state: tuple[Tensor, ...], gradient: Tensor, met: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows end that ran out of iterations, and the gradient of f there; rows that `met` their goal stay."""
        return state[0], gradient

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        self.check(problem)
        if isinstance(problem, PenalizedQuadratic):
            check_bounded(problem)
        goal = self.goal(problem, start)
        size = max(1, CHUNK_ELEMENTS // max(1, start.shape[1]))
        if not problem.can_select or len(start) <= 2 * size:
            return self._solve(problem, start, goal)
        numbers = torch.arange(len(start), device=start.device).split(size)
        x, parts = torch.empty_like(start), []
        for i in numbers:
            part = self._solve(problem.rows(i), start[i], goal[i])
            # Not in pieces: to join them would take as much memory again.
            x[i] = part.x
            parts.append(replace(part, x=part.x[:0]))
        return replace(joined(parts), x=x)

    def _solve(self, problem: Problem, start: Tensor, goal: Tensor) -> Solution:
        count = len(start)
        x, gap, slope = start.clone(), torch.full_like(goal, torch.inf), torch.full_like(goal, torch.inf)
        steps = torch.zeros(count, dtype=torch.long, device=start.device)
        left = torch.arange(count, device=start.device)
        open_rows = torch.ones(count, dtype=torch.bool, device=start.device)
        kept = torch.arange(start.shape[1], device=start.device)
        state = self.begin(problem, start)
        done = 0
        while len(left) and done < self.max_iterations:
            num = min(self.check_every, self.max_iterations - done)
            state, gradient = self.advance(problem, state, num)
            done += num
            present = state[0]
            reached = problem.gap(present, gradient) if problem.has_gap else problem.slope(present, gradient)
            met = (reached <= goal[left]) & open_rows
            if not bool(met.any()) and done < self.max_iterations:
                if bool(open_rows.all()):
                    problem, state, kept = self._screen(problem, state, kept, reached, gradient)
                continue
            if done == self.max_iterations:
                present, gradient = self.lowest(state, gradient, met)
            ended = met if done < self.max_iterations else open_rows
            rows, part = left[ended], problem.rows(ended.nonzero().squeeze(-1))
            x[rows] = 0
            x[rows[:, None], kept] = present[ended]
            gap[rows], steps[rows] = part.gap(present[ended], gradient[ended]), done
            slope[rows] = part.slope(present[ended], gradient[ended])
            open_rows = open_rows & ~ended
            on = open_rows.nonzero().squeeze(-1)
            if not len(on):
                break
            # To pick rows costs as much as some iterations: a few that are solved may run along.
            if len(on) <= LEAST_LEFT * len(left):
                left, open_rows = left[on], open_rows[on]
                problem, state = problem.rows(on), tuple(part[on] for part in state)
        return Solution(x, gap, slope, steps, (gap if problem.has_gap else slope) <= goal)

    def goal(self, problem: Problem, start: Tensor) -> Tensor:
        """The gap ``(R,)`` at which a row is solved; the slope where no gap is known."""
        if problem.has_gap:
            return super().goal(problem, start)
        value, gradient = problem.smooth(start)
        rate = problem.rate.amax(-1).expand_as(value)
        size = torch.maximum(gradient.abs().amax(-1), rate)
        # A start that is the answer already has no slope that others could be relative to.
        size = torch.where(rate > 0, size, size.clamp(min=1))
        precision = ROUNDING * torch.finfo(start.dtype).eps
        return torch.maximum(max(self.tolerance, precision) * size, precision * value.abs())

    def _screen(
        self, problem: Problem, state: tuple[Tensor, ...], kept: Tensor, gap: Tensor, gradient: Tensor
    ) -> tuple[Problem, tuple[Tensor, ...], Tensor]:
        """Leave out the atoms that the gap proves to be 0 at the optimum of every row."""
        # Of many rows some need every atom.
        if not isinstance(problem, PenalizedQuadratic) or len(gap) > MOST_SCREENED:
            return problem, state, kept
        needed = problem.may_be_active(gap, gradient).any(0)
        if int(needed.sum()) > LEAST_SCREENED * len(needed):
            return problem, state, kept
        index = needed.nonzero().squeeze(-1)
        part = problem.columns(index)
        x = state[0][:, index]
        return part, self.begin(part, x), kept[index]


class FISTA(Proximal):
    r"""Accelerated proximal gradient descent with restarts (Beck & Teboulle, 2009; O'Donoghue & Candes, 2015).

    .. math::
        x_{k+1} = shrink(y_k - \nabla f(y_k) / L, rate / L), \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)

    Each row's momentum starts anew where it points uphill. L is the largest curvature where it is known (quadratic
    programs); else it is found by backtracking, row by row, and any program with a smooth rest is served. It has no
    duality gap then, and a row is solved when its slope is at most `tolerance` times the largest of the rates and of
    the gradient at the start (at least 1 where all rates are 0), or below what the dtype can tell.

    Args:
        tolerance: see `Solver`.
        max_iterations: see `Solver`.
        check_every: iterations between two looks at the gap.

    Raises:
        ValueError: see `Solver`; check_every below 1.

    Example:
        >>> problem = PenalizedQuadratic(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.ones(2))
        >>> FISTA().solve(problem, torch.zeros(1, 2)).x
        tensor([[2., 0.]])
    """

    def begin(self, problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones_like(x[:, :1])
        if problem.curvature is None:
            value, gradient = problem.smooth(x)
            if not bool(value.isfinite().all()):
                row = int((~value.isfinite()).nonzero()[0])
                raise NotFiniteError(
                    f"Expected log p(h, v) finite at the start, but got {-float(value[row]):g} in row {row}. "
                    "Look for NaN in the data and in the parameters, and start inside the support."
                )
            # Backtracking finds what a row can bear.
            return x, x, ones, 1 / gradient.norm(dim=-1, keepdim=True).clamp(min=1)
        return x, x, ones, ones / problem.curvature

    def advance(self, problem: Problem, state: tuple[Tensor, ...], num: int) -> tuple[tuple[Tensor, ...], Tensor]:
        x, y, t, step = state
        for _ in range(num):
            if problem.curvature is None:
                new, step = _backtracked(problem, y, step)
            else:
                new = problem.shrink(y - step * problem.gradient(y), step)
            uphill = ((y - new) * (new - x)).sum(-1, keepdim=True) > 0
            t = torch.where(uphill, 1, t)
            longer = (1 + (1 + 4 * t * t).sqrt()) / 2
            momentum = torch.where(uphill, 0, (t - 1) / longer)
            y, x, t = torch.addcmul(new, momentum, new - x), new, longer
        return (x, y, t, step), problem.gradient(x)


MOST_HALVINGS = 60
"""Most trials of one step."""

BLURRED = 100
"""Differences of f below so many times its rounding are not read off its values."""


def _backtracked(problem: Problem, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """A proximal step from y that the quadratic upper bound of f at y covers, row by row."""
    value, gradient = problem.smooth(y)
    # A little longer than the last one: the curvature may have fallen.
    step = 1.1 * step
    slack = 8 * torch.finfo(y.dtype).eps * (1 + value.abs())
    too_far = torch.ones_like(value, dtype=torch.bool)
    for _ in range(MOST_HALVINGS):
        new = problem.shrink(y - step * gradient, step)
        move = new - y
        new_value, new_gradient = problem.smooth(new)
        room = move.square().sum(-1) / (2 * step.squeeze(-1))
        bound = value + (gradient * move).sum(-1) + room + slack
        # Not finite counts as too far.
        too_far = ~(new_value <= bound)
        # Where rounding hides the difference of two values, gradients tell the curvature along the move.
        bend = 0.5 * ((new_gradient - gradient) * move).sum(-1)
        level = (bend <= room) & (new_value <= bound + BLURRED * slack)
        too_far = torch.where(room <= BLURRED * slack, ~level, too_far)
        if not bool(too_far.any()):
            return new, step
        step = torch.where(too_far.unsqueeze(-1), step / 2, step)
    raise SolverError(
        f"Expected log p(v, h) to be smooth beside the sparse prior, but row {int(too_far.nonzero()[0])} does not rise "
        "along its gradient. Look for NaN, kinks and hard limits in the program."
    )


class SpaRSA(Proximal):
    r"""Proximal gradient descent with spectral steps (Barzilai & Borwein, 1988; Wright, Nowak & Figueiredo, 2009).

    .. math::
        x_{k+1} = shrink(x_k - a_k \nabla f(x_k), a_k\, rate), \qquad
        a_k = \frac{|x_k - x_{k-1}|^2}{(x_k - x_{k-1})^\top G (x_k - x_{k-1})}

    A row's step is the inverse of the curvature along its last move, which on sparse codes is well below the largest
    one. P may rise on the way. A row whose P found no new low in three checks goes back to its lowest one, takes the
    safe steps 1 / L until the next check, and shorter spectral steps after it; with every new low they may grow again.
    Serves Laplace + quadratic programs.

    Args:
        tolerance: see `Solver`.
        max_iterations: see `Solver`.
        check_every: iterations between two looks at the gap.

    Raises:
        ValueError: see `Solver`; check_every below 1.
        SolverError: at a problem that is not quadratic.

    Example:
        >>> problem = PenalizedQuadratic(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.ones(2))
        >>> SpaRSA().solve(problem, torch.zeros(1, 2)).x
        tensor([[2., 0.]])
    """

    _held: Tensor | None = None

    def check(self, problem: Problem) -> None:
        check_quadratic(self, problem)

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        try:
            return super().solve(problem, start)
        finally:
            self._held = None

    def begin(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, problem: PenalizedQuadratic, x: Tensor
    ) -> tuple[Tensor, ...]:
        gradient = problem.gradient(x)
        value = problem.value(x, gradient) + problem.penalty(x)
        step = torch.ones_like(x[:, :1]) / problem.curvature
        return x, gradient, step, x, gradient, value, torch.zeros_like(value), torch.full_like(x[:, :1], LONGEST)

    def _memory(self, x: Tensor) -> Tensor:
        """Five tensors like x, in memory that is kept until the end of `solve`."""
        held = self._held
        if held is None or held.dtype != x.dtype or held.device != x.device or held.numel() < 5 * x.numel():
            held = self._held = x.new_empty(5 * x.numel())
        return held[: 5 * x.numel()].view(5, *x.shape)

    def lowest(self, state: tuple[Tensor, ...], gradient: Tensor, met: Tensor) -> tuple[Tensor, Tensor]:
        x, _, _, best, best_gradient, *_ = state
        stay = met.unsqueeze(-1)
        return torch.where(stay, x, best), torch.where(stay, gradient, best_gradient)

    def advance(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, problem: PenalizedQuadratic, state: tuple[Tensor, ...], num: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        x, gradient, step, best, best_gradient, value, checks, reach = state
        least = 1 / problem.curvature
        most = reach * least
        careful = (checks >= MOST_CHECKS).unsqueeze(-1)
        if bool(careful.any()):
            x, gradient = torch.where(careful, best, x), torch.where(careful, best_gradient, gradient)
            most = torch.where(careful, least, most)
            step = torch.minimum(step, most)
            reach = torch.where(careful, (reach / 4).clamp(min=SHORTEST), reach)
        # The state's own memory is not written to. New memory costs more time than what is computed in it.
        work = self._memory(x)
        new, new_gradient, rest = work[0], work[1], work[2]
        x, gradient = work[3].copy_(x), work[4].copy_(gradient)
        for _ in range(num):
            problem.shrink_(torch.addcmul(x, step, gradient, value=-1, out=new), step, rest)
            problem.gradient(new, out=new_gradient)
            move, turn = torch.sub(new, x, out=x), torch.sub(new_gradient, gradient, out=gradient)
            square = torch.linalg.vector_norm(move, dim=-1, keepdim=True).square()
            bend = turn.mul_(move).sum(-1, keepdim=True)
            step = (square / bend).nan_to_num(nan=0.0, posinf=0.0).clamp(min=least, max=most)
            x, new, gradient, new_gradient = new, x, new_gradient, gradient
        x, gradient = x.clone(), gradient.clone()
        new_value = problem.value(x, gradient) + problem.penalty(x)
        # What rounding hides counts as a fall: the gap may still close.
        fell = new_value <= value + ROUNDING * torch.finfo(x.dtype).eps * value.abs()
        better = fell.unsqueeze(-1)
        best, best_gradient = torch.where(better, x, best), torch.where(better, gradient, best_gradient)
        reach = torch.where(better & ~careful, (1.5 * reach).clamp(max=LONGEST), reach)
        checks = torch.where(fell | careful.squeeze(-1), 0, checks + 1)
        return (x, gradient, step, best, best_gradient, torch.minimum(new_value, value), checks, reach), gradient
