"""L-BFGS, every row with a memory of its own: known minima, independent rows, refusals."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
from torch import Tensor

from pyro_ext.lbfgs import LBFGS, _Memory
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.solvers import SolverError

pytestmark = pytest.mark.usefixtures("float64")


class Rosenbrock(Problem):
    """Curved valleys, one of its own depth a row; counts how often it is evaluated."""

    def __init__(self, depth: Tensor, width: int) -> None:
        self.depth, self.num_rows = depth, len(depth)
        self.rate, self.nonnegative = torch.zeros(width), None
        self.num_evaluations = 0

    def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.num_evaluations += 1
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            bend = (leaf[:, 1:] - leaf[:, :-1] ** 2) ** 2
            value = (self.depth[:, None] * bend + (1 - leaf[:, :-1]) ** 2).sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    def rows(self, index: Tensor) -> Problem:
        return Rosenbrock(self.depth[index], len(self.rate))


def test_a_quadratic_of_every_row_is_solved() -> None:
    root = torch.randn(6, 5, 5)
    quadratic = root @ root.mT + 0.1 * torch.eye(5)
    problem = PenalizedQuadratic(quadratic, torch.randn(6, 5), torch.zeros(5))
    solution = LBFGS(tolerance=1e-12).solve(problem, torch.randn(6, 5))
    torch.testing.assert_close(solution.x, torch.linalg.solve(quadratic, problem.linear), atol=1e-9, rtol=1e-9)
    assert solution.converged.all()
    assert solution.gap.isnan().all()
    torch.testing.assert_close(solution.slope, problem.smooth(solution.x)[1].abs().amax(-1))


def test_valleys_end_at_ones() -> None:
    problem = Rosenbrock(torch.tensor([1.0, 100.0, 10000.0]), 6)
    solution = LBFGS(tolerance=1e-10).solve(problem, torch.tensor([-1.2, 1.0] * 3).expand(3, 6))
    torch.testing.assert_close(solution.x, torch.ones(3, 6), atol=1e-7, rtol=0)
    assert solution.converged.all()
    # The memory is what makes it quick: without, thousands of steps are needed.
    assert int(solution.num_iterations[1]) < 100
    assert problem.num_evaluations < 1000


def test_rows_together_are_rows_alone() -> None:
    """Steps, evaluations and points of a row do not depend on its neighbours, to the last bit."""
    depth = torch.tensor([1.0, 5.0, 100.0, 1000.0])
    start = torch.randn(4, 4)
    together = LBFGS().solve(Rosenbrock(depth, 4), start)
    for row in range(4):
        alone = LBFGS().solve(Rosenbrock(depth[row : row + 1], 4), start[row : row + 1])
        torch.testing.assert_close(together.x[row], alone.x[0], atol=1e-9, rtol=0)
        assert together.num_iterations[row] == alone.num_iterations[0]


def test_the_memory_is_the_bfgs_matrix() -> None:
    """Against the update of the inverse Hessian written out (Nocedal and Wright, 2006, 6.17); one row skips a pair."""
    memory = _Memory(3, torch.zeros(2, 4))
    matrices = [torch.eye(4), torch.eye(4)]
    pairs: list[list[tuple[Tensor, Tensor]]] = [[], []]
    bend = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for number in range(5):
        step = torch.randn(2, 4)
        change = step @ bend + 0.01 * torch.randn(2, 4)
        taken = torch.tensor([True, number != 3])
        memory.push(taken, step, change)
        for row in range(2):
            if taken[row]:
                pairs[row] = [*pairs[row], (step[row], change[row])][-3:]
    # A step along which f bends down is no pair.
    memory.push(torch.tensor([True, True]), torch.ones(2, 4), -torch.ones(2, 4))
    gradient = torch.randn(2, 4)
    for row in range(2):
        s, y = pairs[row][-1]
        matrices[row] = (s @ y) / (y @ y) * torch.eye(4)
        for s, y in pairs[row]:
            left = torch.eye(4) - torch.outer(s, y) / (s @ y)
            matrices[row] = left @ matrices[row] @ left.T + torch.outer(s, s) / (s @ y)
        torch.testing.assert_close(memory.direction(gradient)[row], -matrices[row] @ gradient[row])
    memory.clear(torch.tensor([True, False]))
    assert memory.known.tolist() == [False, True]
    small = gradient / 100
    torch.testing.assert_close(memory.direction(small)[0], -small[0])


def test_sparse_logistic_regression_without_its_absolute_values_is_that_of_scipy() -> None:
    x, w = torch.randn(60, 8), torch.randn(8)
    y = torch.bernoulli(torch.sigmoid(x @ w))

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(8), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    solution = LBFGS().solve(ProgramProblem(Program(model, (x, y), {})), torch.zeros(1, 8))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x.numpy() @ w
        value = np.logaddexp(0, z).sum() - (y.numpy() * z).sum() + (w**2).sum() / 18
        return value, x.numpy().T @ (1 / (1 + np.exp(-z)) - y.numpy()) + w / 9

    truth = scipy.optimize.minimize(loss, np.zeros(8), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    torch.testing.assert_close(solution.x[0], torch.as_tensor(truth), atol=1e-7, rtol=0)


def test_long_steps_are_found_from_afar() -> None:
    """The first trial is of length 1; the minimum stands a million away."""
    problem = PenalizedQuadratic(1e-6 * torch.eye(1), torch.ones(1, 1), torch.zeros(1))
    solution = LBFGS(tolerance=1e-12).solve(problem, torch.zeros(1, 1))
    torch.testing.assert_close(solution.x, torch.full((1, 1), 1e6), atol=1e-3, rtol=0)


def test_points_that_cannot_be_evaluated_are_stepped_back_from() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(4.0, 0.1).mask(False))
            pyro.factor("f", v * h - 20 * h + torch.log(h))
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    v = torch.tensor([0.0, 10.0])
    solution = LBFGS().solve(ProgramProblem(Program(model, (v,), {})), torch.full((2, 1), 0.5))
    torch.testing.assert_close(solution.x[:, 0], 1 / (20 - v), atol=1e-8, rtol=0)


def test_too_few_steps_do_not_converge_and_are_no_error() -> None:
    solution = LBFGS(max_iterations=3).solve(
        Rosenbrock(torch.tensor([100.0, 1.0]), 2), torch.tensor([[-1.2, 1.0], [1, 1]])
    )
    assert solution.converged.tolist() == [False, True]
    assert solution.num_iterations.tolist() == [3, 0]
    assert torch.equal(solution.x[1], torch.ones(2))


def test_the_tolerance_is_of_the_slope() -> None:
    """The largest of the first steps' slopes that is below it ends the row."""
    start = torch.tensor([[-1.2, 1.0]])
    slopes = []
    for steps in range(1, 45):
        solution = LBFGS(tolerance=1e-14, max_iterations=steps).solve(Rosenbrock(torch.tensor([100.0]), 2), start)
        slopes.append(float(solution.slope))
    for tolerance in (1e-2, 1e-5, 1e-9):
        solution = LBFGS(tolerance=tolerance).solve(Rosenbrock(torch.tensor([100.0]), 2), start)
        assert int(solution.num_iterations) == next(n for n, slope in enumerate(slopes, 1) if slope <= tolerance)
        assert solution.converged.all()


def test_a_small_slope_far_from_the_minimum_is_no_end() -> None:
    """In units in which the minimum is far away slopes are small; the fall tells."""
    problem = PenalizedQuadratic(1e-14 * torch.eye(2), torch.full((1, 2), 1e-10), torch.zeros(2))
    solution = LBFGS(tolerance=1e-9).solve(problem, torch.zeros(1, 2))
    torch.testing.assert_close(solution.x, torch.full((1, 2), 1e4), atol=0, rtol=1e-3)
    assert solution.converged.all()


def test_rounding_ends_a_row_that_cannot_reach_its_tolerance() -> None:
    """f is a difference of large terms: its digits are used up long before the slope is below 1e-9."""

    class Noisy(Rosenbrock):
        def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = super().smooth(x)
            return (value + 1e9) - 1e9, gradient + 1e-7 * torch.sin(1e9 * x)

    solution = LBFGS().solve(Noisy(torch.tensor([10.0]), 2), torch.zeros(1, 2))
    torch.testing.assert_close(solution.x, torch.ones(1, 2), atol=1e-3, rtol=0)
    assert int(solution.num_iterations) < 1000


def test_absolute_values_are_refused() -> None:
    problem = PenalizedQuadratic(torch.eye(2), torch.zeros(1, 2), torch.tensor([0.0, 1.0]))
    with pytest.raises(SolverError, match=r"smooth log p\(h, v\) for LBFGS, but got absolute values .* Use `FISTA"):
        LBFGS().solve(problem, torch.zeros(1, 2))


def test_settings_are_checked_and_shown() -> None:
    assert repr(LBFGS()) == "LBFGS(tolerance=1e-09, max_iterations=5000, history=10)"
    for history in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"history of at least 1, but got {history}. 10 is usual"):
            LBFGS(history=history)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tolerance above 0, but got -1"):
        LBFGS(tolerance=-1.0)
