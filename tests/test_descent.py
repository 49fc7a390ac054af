"""Where a descent ends: minima, ends of supports, and rows that fall without end."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.descent import FARTHEST, MOST_STALE, Descent, Progress
from pyro_ext.lbfgs import LBFGS
from pyro_ext.newton import Newton
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.solvers import ROUNDING, SolverError

SOLVERS = pytest.mark.parametrize("solver", [Newton(), LBFGS()], ids=["newton", "lbfgs"])


def bounded(prior: Any, noise: float) -> ProgramProblem:
    """One latent in (0, 1), drawn to its upper end."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", prior)
            pyro.sample("v", dist.Normal(h, noise), obs=v)

    return ProgramProblem(Program(model, (torch.tensor([2.0, 2.0]),), {}))


@pytest.mark.usefixtures("float64")
def test_a_cut_off_end_is_an_end_only_where_the_density_is_finite() -> None:
    """At 40 the value is cut off and the slope 0 by rounding; before that it tells which is the case."""
    x, step = torch.tensor([[40.0], [0.0]]), torch.zeros(2, 1)
    solved, stopped = torch.tensor([True, False]), torch.tensor([False, False])
    for prior, is_end in ((dist.Uniform(0.0, 1.0), True), (dist.Beta(1.0, 1.0), True), (dist.Beta(1.0, 0.5), False)):
        problem = bounded(prior, 0.01)
        value, gradient = problem.smooth(x)
        assert float(gradient[0]) == 0
        descent = Descent(problem, torch.zeros(2, 1), 1e-30)
        if is_end:
            descent.check_ends(x, value, step, solved, stopped)
            continue
        with pytest.raises(SolverError, match=r"'h' in row 0 still rising at \|h\| = 1\. Give 'h' a proper prior"):
            descent.check_ends(x, value, step, solved, stopped)


@SOLVERS
def test_the_end_of_a_support_is_no_flight_in_single_precision(solver: Newton | LBFGS) -> None:
    """Values still move when the tolerance of the dtype ends the row, and grow; but not for long."""
    for noise in (0.3, 3.0, 30.0):
        solution = solver.solve(bounded(dist.Uniform(0.0, 1.0), noise), torch.zeros(2, 1))
        assert solution.converged.all()
        assert (solution.x > 2).all()


@SOLVERS
def test_a_scale_that_shrinks_to_a_finite_density_is_an_end_in_single_precision(solver: Newton | LBFGS) -> None:
    def model(v: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(v)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(mean + tau * z, 10.0), obs=v)

    problem = ProgramProblem(Program(model, (torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0]),), {}))
    assert solver.solve(problem, torch.zeros(1, 8)).converged.all()


@SOLVERS
def test_a_far_start_is_no_flight(solver: Newton | LBFGS) -> None:
    """From e^9 to 10^-8 is a long way, and ends."""
    v = 1e-8 * torch.tensor([[1.0, -2.0, 0.5, 1.5]])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            scale = pyro.sample("scale", dist.HalfNormal(1.0))
            pyro.sample("v", dist.Normal(torch.zeros(4), scale[:, None]).to_event(1), obs=v)

    problem = ProgramProblem(Program(model, (v,), {}))
    solution = solver.solve(problem, torch.full((1, 1), 9.0))
    torch.testing.assert_close(problem.values(solution.x), v.square().mean().sqrt().reshape(1, 1), atol=0, rtol=1e-3)


@SOLVERS
@pytest.mark.usefixtures("float64")
def test_a_problem_of_its_own_without_a_minimum_names_its_feature(solver: Newton | LBFGS) -> None:
    """Not every problem is a program: b outside the range of G falls along the second feature."""
    problem = PenalizedQuadratic(torch.diag(torch.tensor([1.0, 0.0])), torch.ones(2, 2), torch.zeros(2))
    with pytest.raises(SolverError, match=r"got feature 1 in row 0 still rising at \|h\| = .*e\+"):
        solver.solve(problem, torch.zeros(2, 2))


@pytest.mark.usefixtures("float64")
def test_rows_that_are_far_are_stopped_only_while_they_are_active() -> None:
    problem = PenalizedQuadratic(torch.eye(1), torch.zeros(2, 1), torch.zeros(1))
    descent = Descent(problem, torch.zeros(2, 1), 1e-9)
    x = torch.tensor([[0.0], [2.0]]) * torch.tensor(FARTHEST).exp()
    value = torch.zeros(2)
    descent.check_bounded(x, value, torch.tensor([True, False]))
    with pytest.raises(SolverError, match="feature 0 in row 1"):
        descent.check_bounded(x, value, torch.tensor([True, True]))
    with pytest.raises(SolverError, match="feature 0 in row 0"):
        descent.check_bounded(x, torch.tensor([-torch.inf, 0.0]), torch.tensor([False, False]))


@pytest.mark.usefixtures("float64")
def test_rows_that_get_nowhere_are_counted_row_by_row() -> None:
    """A fall by more than rounding, or a smaller slope, begins the count anew; rows that took no step keep theirs."""
    problem = PenalizedQuadratic(torch.eye(1), torch.zeros(4, 1), torch.zeros(1))
    descent = Descent(problem, torch.ones(4, 1), 1e-9)
    progress = Progress(descent)
    value, slope = descent.value.clone(), torch.ones(4, 1)
    moved = torch.tensor([True, True, True, False])
    over = moved
    for _ in range(MOST_STALE):
        value[1] -= 1e-3
        slope[2] *= 0.99
        over = progress.is_over(value, slope, moved)
    assert over.tolist() == [True, False, False, False]
    assert not progress.is_over(value, slope, ~moved).any()
    assert not progress.is_over(value - 1, slope, moved).any()


@pytest.mark.usefixtures("float64")
def test_a_row_is_in_flight_only_where_f_is_lower_and_still_falls_farther_on() -> None:
    """Beyond a hill, or at the far side of another valley, there is a minimum nearby or there."""

    class Valleys(Problem):
        num_rows, rate, nonnegative = 1, torch.zeros(1), None

        def __init__(self, height: float, slope: float) -> None:
            self.height, self.slope_beyond = height, slope

        def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
            beyond = x > 5
            return torch.where(beyond[:, 0], self.height, 0.0), torch.where(beyond, self.slope_beyond, 0.0)

        def rows(self, index: Tensor) -> Problem:
            return self

    x, one, solved = torch.ones(1, 1), torch.ones(1, 1), torch.tensor([True])
    for height, slope, is_refused in ((1.0, -1.0, False), (-1.0, 1.0, False), (-1.0, -1.0, True)):
        descent = Descent(Valleys(height, slope), torch.zeros(1, 1), 1e-9)
        if not is_refused:
            descent.check_ends(x, torch.zeros(1), one, solved, ~solved)
            continue
        descent.check_ends(x, torch.zeros(1), one, ~solved, ~solved)
        with pytest.raises(SolverError, match="feature 0 in row 0"):
            descent.check_ends(x, torch.zeros(1), one, solved, ~solved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerances_are_not_below_what_the_dtype_can_tell(dtype: torch.dtype) -> None:
    problem = PenalizedQuadratic(torch.eye(1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype))
    start = torch.ones(1, 1, dtype=dtype)
    assert Descent(problem, start, 1e-30).tolerance == ROUNDING * torch.finfo(dtype).eps
    assert Descent(problem, start, 1e-3).goal(torch.tensor([-5.0, 0.1], dtype=dtype)).tolist() == pytest.approx(
        [5e-3, 1e-3]
    )
