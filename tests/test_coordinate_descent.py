"""Coordinate descent: the sweeps of the textbook, and steps within the active coordinates where they are slow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyro_ext.active_sets import ActiveSteps
from pyro_ext.coordinate_descent import BLOCK, PATIENCE, SWEEPS, CoordinateDescent
from tests.oracles.lasso_data import Data, brute_force, random_data


def textbook(data: Data, start: Tensor, sweeps: int) -> Tensor:
    """One coordinate of one row after the other, each to its minimum."""
    problem, x = data.problem, start.clone()
    for row in range(len(x)):
        G = (problem.quadratic if problem.shares else problem.quadratic[row]).tolist()
        b, point = problem.linear[row].tolist(), x[row].tolist()
        rate = (data.rate if data.rate.dim() == 1 else data.rate[row]).tolist()
        for _ in range(sweeps):
            for i in range(len(point)):
                u = b[i] - sum(G[i][j] * point[j] for j in range(len(point)) if j != i)
                point[i] = math.copysign(max(abs(u) - rate[i], 0.0), u) / G[i][i]
                if data.nonnegative is not None and data.nonnegative[i]:
                    point[i] = max(point[i], 0.0)
        x[row] = torch.tensor(point, dtype=x.dtype)
    return x


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("per_row_rate", [False, True])
@pytest.mark.parametrize("per_row_gram", [False, True])
@pytest.mark.parametrize("sweeps", [1, SWEEPS - 1])
def test_sweeps_are_those_of_the_textbook(nonnegative, per_row_rate, per_row_gram, sweeps):
    """Across the borders of blocks, from 0 and from elsewhere."""
    data = random_data(
        4, 2 * BLOCK + 3, 20, nonnegative=nonnegative, per_row_rate=per_row_rate, per_row_gram=per_row_gram
    )
    for start in (data.start, torch.rand_like(data.start)):
        found = CoordinateDescent(tolerance=1e-13, max_iterations=sweeps).solve(data.problem, start)
        torch.testing.assert_close(found.x, textbook(data, start, sweeps), rtol=0, atol=1e-12)
        assert (found.num_iterations == sweeps).all()


def correlated(rows: int = 8) -> Data:
    """Columns that are nearly one: sweeps alone take ten thousands of passes."""
    data = random_data(rows, 10, 20, seed=1)
    A = data.A.mean(-1, keepdim=True) + 1e-3 * data.A
    return replace(data, A=A, rate=torch.full((10,), 1e-6, dtype=torch.float64))


def test_steps_within_the_active_coordinates_end_slow_problems(monkeypatch):
    data = correlated()
    solver = CoordinateDescent(tolerance=1e-10, max_iterations=500)
    found = solver.solve(data.problem, data.start)
    assert found.converged.all()
    # The same sweeps without the steps are nowhere near.
    monkeypatch.setattr(ActiveSteps, "__call__", lambda self, rows, x, gradient, sign: (x, x[:, 0], rows >= 0))
    assert not solver.solve(data.problem, data.start).converged.any()


def test_the_gap_is_looked_at_every_few_sweeps():
    data = random_data(30, 20, 30, seed=2, rate=0.05)
    found = CoordinateDescent().solve(data.problem, data.start)
    assert found.converged.all()
    assert (found.num_iterations % SWEEPS == 0).all()
    assert len(found.num_iterations.unique()) > 1


def test_rows_end_where_the_dtype_ends(monkeypatch):
    """A goal that rounding never reaches: the row is left after some looks without a fall, and is not converged."""
    monkeypatch.setattr(CoordinateDescent, "goal", lambda self, problem, start: torch.full_like(start[:, 0], -1e-20))
    data = random_data(10, 6, 8, seed=4)
    found = CoordinateDescent().solve(data.problem, data.start)
    assert not found.converged.any()
    assert (found.num_iterations >= PATIENCE * SWEEPS).all()
    assert (found.num_iterations < 200).all()
    torch.testing.assert_close(found.x, brute_force(data.problem)[0], rtol=0, atol=1e-10)


def test_single_precision_looks_at_the_gap_too(monkeypatch):
    """P cannot tell the last steps on correlated columns apart in single precision; the gap can."""
    data = random_data(100, 64, 32, seed=1, rate=0.05)
    data = replace(data, A=data.A + data.A.mean(-1, keepdim=True) * 4).to(torch.float32)
    found = CoordinateDescent().solve(data.problem, data.start)
    assert found.converged.float().mean() > 0.9
    monkeypatch.setattr("pyro_ext.coordinate_descent.CLOSING", 0.0)
    assert CoordinateDescent().solve(data.problem, data.start).converged.sum() < found.converged.sum()
