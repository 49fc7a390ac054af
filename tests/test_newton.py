"""Newton's method on programs: one step of a quadratic, saddles, line search, refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_ext.program_problem as program_problem
from pyro_ext.lbfgs import LBFGS
from pyro_ext.newton import Newton
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.solvers import SolverError

pytestmark = pytest.mark.usefixtures("float64")


def cauchy_pairs(v: Tensor) -> None:
    """A wide prior and two Cauchy observations a row: one mode between near ones, two at far ones."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 100.0))
        pyro.sample("v", dist.Cauchy(h[:, None], 1.0).to_event(1), obs=v)


def problem_of(model: object, *args: Tensor) -> ProgramProblem:
    return ProgramProblem(Program(model, args, {}))  # pyright: ignore[reportArgumentType]


def random_quadratic(count: int, width: int, *, shared: bool) -> PenalizedQuadratic:
    root = torch.randn(width, width) if shared else torch.randn(count, width, width)
    return PenalizedQuadratic(root @ root.mT + torch.eye(width), torch.randn(count, width), torch.zeros(width))


@pytest.mark.parametrize("shared", [True, False])
def test_a_quadratic_takes_one_step(shared: bool) -> None:
    problem = random_quadratic(4, 3, shared=shared)
    solution = Newton().solve(problem, torch.randn(4, 3))
    truth = torch.linalg.solve(problem.quadratic.expand(4, 3, 3), problem.linear)
    torch.testing.assert_close(solution.x, truth, atol=1e-12, rtol=1e-12)
    assert solution.num_iterations.tolist() == [1, 1, 1, 1]
    assert solution.converged.all()
    assert solution.gap.isnan().all()
    torch.testing.assert_close(solution.slope, problem.smooth(solution.x)[1].abs().amax(-1))


def test_a_quadratic_program_takes_one_step() -> None:
    W = torch.randn(4, 3)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, 0.1).to_event(1), obs=v)

    v = torch.randn(5, 4)
    solution = Newton().solve(problem_of(model, v), torch.randn(5, 3))
    truth = torch.linalg.solve(torch.eye(3) / 4 + W.T @ W / 0.01, W.T @ v.T / 0.01).T
    torch.testing.assert_close(solution.x, truth, atol=1e-11, rtol=1e-11)
    assert solution.num_iterations.tolist() == [1] * 5


def test_a_start_at_the_maximum_stays() -> None:
    problem = random_quadratic(2, 3, shared=True)
    x = torch.linalg.solve(problem.quadratic, problem.linear.T).T
    solution = Newton().solve(problem, x)
    torch.testing.assert_close(solution.x, x, atol=1e-14, rtol=1e-14)
    assert solution.num_iterations.tolist() == [0, 0]
    assert solution.converged.all()


def test_a_start_at_a_saddle_is_left_for_a_mode() -> None:
    """At 0 the slope is exactly 0: a maximum for the near pair, a minimum of p between the far ones."""
    problem = problem_of(cauchy_pairs, torch.tensor([[-0.5, 0.5], [-5.0, 5.0]]))
    start = torch.zeros(2, 1)
    assert torch.equal(problem.smooth(start)[1], start)
    solution = Newton().solve(problem, start)
    grid = torch.linspace(4, 6, 2_000_001)
    height = dist.Cauchy(-5.0, 1.0).log_prob(grid) + dist.Cauchy(5.0, 1.0).log_prob(grid) - grid**2 / 2e4
    assert float(solution.x[0].abs()) < 1e-12
    assert abs(float(solution.x[1].abs()) - float(grid[height.argmax()])) < 2e-6
    assert solution.converged.all()


def test_every_step_lowers_f_where_full_steps_would_not() -> None:
    """From far out on a flat tail the full Newton step leads farther away."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Cauchy(0.0, 1.0))
            pyro.sample("v", dist.Cauchy(h, 0.5), obs=v)

    problem = problem_of(model, torch.tensor([0.0, 0.2, -0.3]))
    start = torch.tensor([[50.0], [-20.0], [3.0]])
    found = [problem.smooth(start)[0]]
    for steps in range(1, 12):
        found.append(problem.smooth(Newton(max_iterations=steps).solve(problem, start).x)[0])
    heights = torch.stack(found)
    assert (heights[1:] <= heights[:-1] + 1e-12).all()
    assert Newton().solve(problem, start).converged.all()


def test_points_that_cannot_be_evaluated_are_stepped_back_from() -> None:
    """h log h - c h has no values below 0; full steps from 10 lead there."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(4.0, 0.1).mask(False))
            pyro.factor("f", v * h - 20 * h + torch.log(h))
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    v = torch.tensor([0.0, 10.0])
    solution = Newton().solve(problem_of(model, v), torch.full((2, 1), 4.0))
    torch.testing.assert_close(solution.x[:, 0], 1 / (20 - v), atol=1e-9, rtol=0)


def test_too_few_steps_do_not_converge_and_are_no_error() -> None:
    problem = problem_of(cauchy_pairs, torch.tensor([[1.0, 2.0], [-0.5, 0.5]]))
    solution = Newton(max_iterations=1).solve(problem, torch.tensor([[1.0], [0.0]]))
    assert solution.converged.tolist() == [False, True]
    assert solution.num_iterations.tolist() == [1, 0]
    assert float(solution.slope[0]) > 1e-6


def test_the_tolerance_is_of_the_predicted_fall() -> None:
    """Of a quadratic the prediction is exact: a start that is closer than the tolerance takes no counted step."""
    problem = PenalizedQuadratic(torch.eye(1), torch.zeros(2, 1), torch.zeros(1))
    start = torch.tensor([[0.9e-2], [1.1e-2]])
    steps = Newton(tolerance=0.5e-4).solve(problem, start).num_iterations
    assert steps.tolist() == [0, 1]


def test_the_last_step_is_taken_where_f_is_too_coarse_to_show_it() -> None:
    """Heights of 10^9 nats: f cannot tell 10^-4 from the minimum, the slope can."""
    offset = 1e9 * (1 + torch.rand(40))

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("f", offset)
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v = torch.randn(40)
    solution = Newton().solve(problem_of(model, v), (v / 2 + 1e-4)[:, None])
    torch.testing.assert_close(solution.x[:, 0], v / 2, atol=1e-12, rtol=0)
    assert solution.converged.all()


def test_the_gradient_is_followed_where_second_derivatives_are_not_finite() -> None:
    """|h|^1.5 has slope 0 and an infinite curvature at the start."""

    def model(v: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -(h[1].abs() ** 1.5))
        pyro.sample("v", dist.StudentT(3.0, h[0] + h[1], 1.0), obs=v)

    problem = problem_of(model, torch.tensor(2.0))
    start = torch.zeros(1, 2)
    assert problem.smooth(start)[1].isfinite().all()
    assert not problem.hessian(start).isfinite().all()
    solution = Newton().solve(problem, start)
    # The slopes of both priors are equal there: h_0 = h_1 + 1.5 sqrt(h_1).
    h = solution.x[0]
    assert float(h[1]) > 0.01
    torch.testing.assert_close(h[0], h[1] + 1.5 * h[1].sqrt(), atol=1e-9, rtol=0)
    rest = 2 - h.sum()
    torch.testing.assert_close(h[0], 4 * rest / (3 + rest**2), atol=1e-9, rtol=0)


def test_absolute_values_and_bounds_are_refused() -> None:
    quadratic, linear = torch.eye(2), torch.zeros(1, 2)
    for problem in (
        PenalizedQuadratic(quadratic, linear, torch.tensor([0.0, 1.0])),
        PenalizedQuadratic(quadratic, linear, torch.zeros(2), nonnegative=torch.tensor([True, False])),
    ):
        with pytest.raises(SolverError, match=r"smooth log p\(h, v\) for Newton, but got absolute values .* `FISTA"):
            Newton().solve(problem, torch.zeros(1, 2))


def test_problems_without_second_derivatives_are_refused() -> None:
    class Plain(Problem):
        num_rows, rate, nonnegative = 1, torch.zeros(1), None

        def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raise NotImplementedError

        def rows(self, index: Tensor) -> Problem:
            raise NotImplementedError

    with pytest.raises(SolverError, match=r"second derivatives for Newton, but got Plain. Use `LBFGS\(\)`"):
        Newton().solve(Plain(), torch.zeros(1, 1))


def test_too_many_features_are_sent_to_lbfgs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_problem, "MAX_ROW_COUPLINGS", 1)
    problem = problem_of(cauchy_pairs, torch.zeros(2, 2))
    with pytest.raises(SolverError, match=r"2 rows of 1 features. Use `LBFGS\(\)`"):
        Newton().solve(problem, torch.ones(2, 1))


@pytest.mark.parametrize("solver", [Newton(), LBFGS()])
def test_a_start_of_nan_is_named(solver: Newton | LBFGS) -> None:
    problem = problem_of(cauchy_pairs, torch.zeros(3, 2))
    with pytest.raises(NotFiniteError, match=r"finite at the start, but got log p = -inf in row 1. Look for NaN"):
        solver.solve(problem, torch.tensor([[0.0], [math.nan], [1.0]]))


def test_settings_are_checked_and_shown() -> None:
    assert repr(Newton()) == "Newton(tolerance=1e-12, max_iterations=500)"
    with pytest.raises(ValueError, match="tolerance above 0, but got 0"):
        Newton(tolerance=0)
    with pytest.raises(ValueError, match="max_iterations of at least 1, but got 0"):
        Newton(max_iterations=0)
