"""Solvers one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ext.feature_sign import FeatureSign
from pyro_ext.in_turn import InTurn
from pyro_ext.lbfgs import LBFGS
from pyro_ext.problems import Problem
from pyro_ext.proximal import FISTA, SpaRSA
from pyro_ext.solvers import Solution, Solver, SolverError
from tests.oracles.lassos import random_lasso, solve_by_signs

pytestmark = pytest.mark.usefixtures("float64")


class Scripted(Solver):
    """Solves the rows whose b_0 is below a limit, by writing a number; it counts what it is asked for."""

    def __init__(self, mark: float, limit: float) -> None:
        super().__init__()
        self.mark, self.limit, self.asked, self.starts = mark, limit, list[int](), torch.zeros(0, 5)

    def solve(self, problem: Problem, start: Tensor) -> Solution:
        self.starts = start
        self.asked.append(problem.num_rows)
        own: Any = problem
        done = own.linear[:, 0] < self.limit
        ones = torch.ones(problem.num_rows)
        x = torch.full_like(start, self.mark)
        steps = torch.full((problem.num_rows,), 10)
        return Solution(x, self.mark * ones, 2 * self.mark * ones, steps, done)


def test_the_next_solver_gets_what_is_left() -> None:
    problem = random_lasso(6, 5)
    problem.linear[:, 0] = torch.arange(6.0)
    first, second, third = Scripted(1.0, 2.0), Scripted(2.0, 4.0), Scripted(3.0, 5.0)
    found = InTurn(first, second, third).solve(problem, torch.zeros(6, 5))
    assert [first.asked, second.asked, third.asked] == [[6], [4], [2]]
    assert torch.equal(second.starts, torch.ones(4, 5))
    assert torch.equal(third.starts, torch.full((2, 5), 2.0))
    assert found.x[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert found.gap.tolist() == [1, 1, 2, 2, 3, 3]
    assert found.slope.tolist() == [2, 2, 4, 4, 6, 6]
    assert found.num_iterations.tolist() == [10, 10, 20, 20, 30, 30]
    assert found.converged.tolist() == [True, True, True, True, True, False]


def test_no_row_left_is_no_call() -> None:
    problem = random_lasso(6, 5)
    first, second = Scripted(1.0, torch.inf), Scripted(2.0, torch.inf)
    assert bool(InTurn(first, second).solve(problem, torch.zeros(6, 5)).converged.all())
    assert second.asked == []


def test_all_rows_left_add_their_iterations() -> None:
    problem = random_lasso(6, 5)
    found = InTurn(Scripted(1.0, -torch.inf), Scripted(2.0, torch.inf)).solve(problem, torch.zeros(6, 5))
    assert found.num_iterations.tolist() == [20] * 6
    assert bool(found.converged.all())
    assert bool((found.x == 2).all())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rank", [3, 7])
def test_against_all_patterns_of_signs(own: bool, rank: int) -> None:
    problem = random_lasso(7, 5, own=own, rank=rank, rate=torch.linspace(0.5, 3.0, 35).reshape(7, 5))
    least = solve_by_signs(problem)[1]
    found = InTurn(SpaRSA(max_iterations=3), FeatureSign()).solve(problem, torch.zeros(7, 5))
    assert bool(found.converged.all())
    assert torch.allclose(problem.objective(found.x), least, rtol=1e-10)


def test_settings() -> None:
    turn = InTurn(SpaRSA(1e-3, 30), FISTA(1e-8, 200))
    assert (
        repr(turn) == "InTurn(SpaRSA(tolerance=0.001, max_iterations=30), FISTA(tolerance=1e-08, max_iterations=200))"
    )
    assert turn.tolerance == 1e-8
    assert turn.max_iterations == 230
    with pytest.raises(ValueError, match=r"at least one solver, but got none. Pass SpaRSA\(\)"):
        InTurn()
    for wrong in (FISTA, "FISTA", None):
        with pytest.raises(TypeError, match="every solver to be a solver such as"):
            InTurn(SpaRSA(), wrong)  # pyright: ignore[reportArgumentType]


def test_every_solver_is_checked_before_the_first_runs() -> None:
    problem = random_lasso(6, 5)
    first = Scripted(1.0, 0.0)
    with pytest.raises(SolverError, match="smooth log p"):
        InTurn(first, LBFGS()).check(problem)
    assert first.asked == []
