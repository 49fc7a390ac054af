"""L-BFGS, a memory of steps and gradient changes for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ext.descent import Descent, Progress, check_smooth
from pyro_ext.problems import Problem
from pyro_ext.solvers import Solution, Solver

SUFFICIENT = 1e-4
"""The share of the predicted fall that a step must bring (Armijo)."""

FLATTER = 0.9
"""The share of the slope along the direction that may be left after a step (Wolfe)."""

MOST_TRIALS = 25
"""Trials of one line search, once a step was too long."""

MOST_DOUBLINGS = 60
"""Trials of one line search, as long as every step was too short."""


class LBFGS(Solver):
    r"""Limited-memory BFGS with a Wolfe line search, for smooth problems of any size.

    .. math:: x \leftarrow x - \alpha B g, \qquad g = \nabla f(x)

    with B the inverse Hessian that the last `history` steps and gradient changes of the row tell of (Nocedal and
    Wright, 2006, algorithm 7.4). alpha is found by bracketing: f falls enough (Armijo) and its slope along the
    direction rises enough (Wolfe), so that B stays positive definite. Where f cannot tell any more, the slope alone
    decides (the approximate conditions of Hager and Zhang, 2005). Every evaluation is one trial point of every row: a
    row goes on to its next direction while others still search.

    A row is solved when the largest entry of g in size, and the predicted fall g'Bg / 2 too, are at most
    ``tolerance * max(1, |f|)``, with the tolerance never below 32 units of rounding. It is also solved where no step
    lowers f or g any more and the predicted fall is below ``sqrt(eps) * max(1, |f|)``, rounding of f itself. There is
    no duality gap: `Solution.gap` is NaN. The minimum may be a local one, and a start at a saddle is not left.

    Args:
        tolerance: of the gradient per unit of a feature and of the predicted fall, relative to max(1, |f|).
        max_iterations: most steps of a row.
        history: pairs of steps and gradient changes that a row remembers, 2 * history * F numbers.

    Raises:
        ValueError: a tolerance that is not above 0, max_iterations or history below 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.program import Program
        >>> from pyro_ext.program_problem import ProgramProblem
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 0.5), obs=v)
        >>> problem = ProgramProblem(Program(model, (torch.tensor([0.0, 4.0]),), {}))
        >>> LBFGS().solve(problem, torch.zeros(2, 1)).x
        tensor([[0.0000],
                [3.7814]])
    """

    def __init__(self, tolerance: float = 1e-9, max_iterations: int = 5_000, history: int = 10) -> None:
        super().__init__(tolerance, max_iterations)
        if not isinstance(history, int) or isinstance(history, bool) or history < 1:
            raise ValueError(f"Expected a history of at least 1, but got {history!r}. 10 is usual.")
        self.history = history

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, history={self.history})"

    def check(self, problem: Problem) -> None:
        """Refuse absolute values and bounds.

        Raises:
            SolverError: named, with the solver that serves.
        """
        check_smooth(problem, "LBFGS")

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        """Minimise from a start ``(R, F)``.

        Raises:
            SolverError: absolute values or bounds, or a row has no minimum.
            NotFiniteError: log p is not finite at the start.
        """
        self.check(problem)
        descent = Descent(problem, start, self.tolerance)
        search = _Search(descent, self.history)
        stopped = torch.zeros_like(search.done)
        while bool((~search.done).any()):
            search.advance(problem)
            descent.check_bounded(search.x, search.value, ~search.done)
            stopped = search.num_iterations >= self.max_iterations
            search.done |= stopped
        descent.check_ends(search.x, search.value, search.last, search.solved, stopped)
        slope = search.gradient.abs().amax(-1)
        return Solution(search.x, torch.full_like(slope, torch.nan), slope, search.num_iterations, search.solved)


class _Memory:
    """The last steps s and gradient changes y of every row, ``(m, R, F)``, the newest last."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.steps = like.new_zeros((size,) + like.shape)
        self.changes = like.new_zeros((size,) + like.shape)
        # 1 / s'y, and 0 where there is no pair.
        self.weights = like.new_zeros(size, len(like))
        self.scale = like.new_ones(len(like))

    def push(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        """Remember a pair in some rows, where f bends up along it."""
        bend = (step * change).sum(-1)
        square = change.square().sum(-1)
        size = step.square().sum(-1) * square
        rows = rows & (bend > torch.finfo(step.dtype).eps * size.sqrt())
        weight = torch.where(rows, 1 / torch.where(rows, bend, 1), 0)
        for name, new in (("steps", step), ("changes", change)):
            old = getattr(self, name)
            setattr(self, name, torch.where(rows[:, None], torch.cat([old[1:], new[None]]), old))
        self.weights = torch.where(rows, torch.cat([self.weights[1:], weight[None]]), self.weights)
        self.scale = torch.where(rows, bend / torch.where(rows, square, 1), self.scale)

    def clear(self, rows: Tensor) -> None:
        """Forget all pairs of some rows."""
        self.weights = torch.where(rows, 0, self.weights)

    @property
    def known(self) -> Tensor:
        """Rows with at least one pair."""
        return (self.weights != 0).any(0)

    def direction(self, gradient: Tensor) -> Tensor:
        """-B g, ``(R, F)``, by the two-loop recursion; -g / max(1, |g|) where nothing is remembered."""
        shares: list[Tensor] = []
        rest = gradient
        for step, change, weight in self._pairs(newest_first=True):
            shares.append(weight * (step * rest).sum(-1))
            rest = rest - shares[-1][:, None] * change
        first = 1 / torch.linalg.vector_norm(gradient, dim=-1).clamp(min=1)
        rest = rest * torch.where(self.known, self.scale, first)[:, None]
        for (step, change, weight), share in zip(self._pairs(newest_first=False), reversed(shares), strict=True):
            rest = rest + (share - weight * (change * rest).sum(-1))[:, None] * step
        return -rest

    def _pairs(self, *, newest_first: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        pairs = list(zip(self.steps, self.changes, self.weights, strict=True))
        return pairs[::-1] if newest_first else pairs


class _Search:
    """Where the rows are, and the line search of each."""

    def __init__(self, descent: Descent, history: int) -> None:
        self.descent = descent
        self.x, self.value, self.gradient = descent.start.clone(), descent.value, descent.gradient
        self.last = torch.zeros_like(self.x)
        self.num_iterations = torch.zeros(len(self.x), dtype=torch.long, device=self.x.device)
        self.solved = (self.gradient == 0).all(-1)
        self.done = self.solved.clone()
        self.memory = _Memory(history, self.x)
        # f where a row last forgot its pairs: a row that is stuck twice at one height stops.
        self.forgot = torch.full_like(self.value, torch.inf)
        self.progress = Progress(descent)
        self.lower_gradient = self.gradient
        self.direction = torch.zeros_like(self.x)
        # Of the direction: slope along it at x, longest step, trial step, the bracket, f at its lower end, trials.
        self.slope, self.longest, self.step, self.low, self.high, self.low_value = (
            torch.zeros_like(self.value) for _ in range(6)
        )
        self.trials = torch.zeros_like(self.num_iterations)
        self._turn(~self.done)

    def advance(self, problem: Problem) -> None:
        """Evaluate one trial point of every row, and judge it."""
        searching = ~self.done
        trial = torch.where(searching[:, None], self.x + self.step[:, None] * self.direction, self.x)
        value, gradient = problem.smooth(trial)
        slope = (gradient * self.direction).sum(-1)
        self.trials += 1

        level = value <= self.value + self.descent.noise(self.value)
        low = value <= self.value + SUFFICIENT * self.step * self.slope
        low |= level & (slope <= (2 * SUFFICIENT - 1) * self.slope)
        low &= ~slope.isnan() | value.isneginf()
        enough = ~(slope < FLATTER * self.slope) | (self.step >= self.longest)
        accepted = searching & low & enough
        most = torch.where(self.high.isinf(), MOST_DOUBLINGS, MOST_TRIALS)
        given_up = searching & ~accepted & (self.trials >= most)
        back_to_low = given_up & (self.low > 0)

        longer, shorter = searching & low & ~accepted, searching & ~low
        self._narrow(longer, shorter, value, gradient)
        move = torch.where(back_to_low, self.low, self.step)[:, None] * self.direction
        self._move(
            accepted | back_to_low,
            move,
            torch.where(back_to_low, self.low_value, value),
            torch.where(back_to_low[:, None], self.lower_gradient, gradient),
        )
        stuck = given_up & ~back_to_low
        self._turn(accepted | back_to_low | stuck, forget=stuck)

    def _narrow(self, longer: Tensor, shorter: Tensor, value: Tensor, gradient: Tensor) -> None:
        """The next trial step of rows whose step was too short or too long."""
        step = self.step
        self.low = torch.where(longer, step, self.low)
        self.low_value = torch.where(longer, value, self.low_value)
        self.lower_gradient = torch.where(longer[:, None], gradient, self.lower_gradient)
        self.high = torch.where(shorter, step, self.high)
        # The parabola through f and its slope at x, where nothing lower was found yet.
        rise, fall = value - self.value, -step * self.slope
        share = (fall / (2 * (rise + fall))).nan_to_num(nan=0.5).clamp(min=0.1, max=0.5)
        share = torch.where(value.isfinite(), share, 0.25)
        between = torch.where(self.low > 0, 0.5 * (self.low + self.high), share * step)
        grown = torch.minimum(2 * step, self.longest)
        narrowed = torch.where(self.high.isinf(), grown, between)
        self.step = torch.where(longer | shorter, narrowed, step)

    def _move(self, rows: Tensor, move: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Move some rows to where they were evaluated."""
        self.memory.push(rows & value.isfinite(), move, gradient - self.gradient)
        wide = rows[:, None]
        self.x = torch.where(wide, self.x + move, self.x)
        self.last = torch.where(wide, move, self.last)
        self.value = torch.where(rows, value, self.value)
        self.gradient = torch.where(wide, gradient, self.gradient)
        self.num_iterations += rows.long()
        ended = self.progress.is_over(self.value, self.gradient, rows)
        self.solved |= ended & self.descent.blurred(self.value, -0.5 * self.slope)
        self.done |= ended

    def _turn(self, rows: Tensor, forget: Tensor | None = None) -> None:
        """Begin a search along a new direction; rows that are stuck forget what they knew, or stop."""
        if not bool(rows.any()):
            return
        if forget is not None:
            ended = forget & (~self.memory.known | (self.value >= self.forgot - self.descent.noise(self.value)))
            self.forgot = torch.where(forget, self.value, self.forgot)
            self.done |= ended
            self.solved |= ended & self.descent.blurred(self.value, -0.5 * self.slope)
            self.memory.clear(forget)
        direction = self.memory.direction(self.gradient)
        slope = (self.gradient * direction).sum(-1)
        goal = self.descent.goal(self.value)
        flat = (self.gradient.abs().amax(-1) <= goal) & (-0.5 * slope <= goal)
        # Without a pair nothing is known of the scale: a small slope may lead far.
        self.solved |= rows & flat & (self.memory.known | (self.gradient == 0).all(-1))
        self.done |= self.solved
        wrong = rows & ~(slope < 0)
        if bool(wrong.any()):
            self.memory.clear(wrong)
            direction = torch.where(wrong[:, None], self.memory.direction(self.gradient), direction)
            slope = (self.gradient * direction).sum(-1)
        longest = self.descent.longest(direction)
        zero, infinite = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        self.direction = torch.where(rows[:, None], direction, self.direction)
        self.slope = torch.where(rows, slope, self.slope)
        self.longest = torch.where(rows, longest, self.longest)
        self.step = torch.where(rows, longest.clamp(max=1), self.step)
        self.low = torch.where(rows, zero, self.low)
        self.high = torch.where(rows, infinite, self.high)
        self.trials = torch.where(rows, 0, self.trials)
