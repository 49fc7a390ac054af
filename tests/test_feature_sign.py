"""Feature-sign search: exact active sets, entries of one or several coordinates, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyro_ext.feature_sign import PATIENCE, FeatureSign
from pyro_ext.problems import PenalizedQuadratic
from tests.oracles.lasso_data import brute_force, random_data


def test_active_coordinates_solve_their_own_systems():
    """At a loose tolerance x is still an exact x_a = G_aa^-1 (b_a - rate_a sign_a)."""
    data = random_data(30, 40, 20, rate=0.2, per_row_rate=True)
    found = FeatureSign(tolerance=0.05).solve(data.problem, data.start)
    assert found.converged.all()
    gradient = data.problem.gradient(found.x)
    residual = (gradient + data.rate * found.x.sign())[found.x != 0]
    assert len(residual) > 30
    assert residual.abs().max() < 1e-11
    assert (found.slope > 1e-3).any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_any_number_of_entries_comes_to_the_minimum(share, monkeypatch):
    """One at a time as in the paper, or all that are violated, among atoms that are alike."""
    monkeypatch.setattr("pyro_ext.feature_sign.SHARE", share)
    data = random_data(40, 6, 3, seed=1, rate=0.1)
    data = replace(data, A=data.A + 2)
    found = FeatureSign(tolerance=1e-12).solve(data.problem, data.start)
    assert found.converged.all()
    torch.testing.assert_close(data.problem.objective(found.x), brute_force(data.problem)[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_every_entry_lowers_p(share, monkeypatch):
    """Several that enter leave a direction of descent: of two iterations of any row one falls.

    The other may find a row that has just lost a coordinate at the minimum over those left.
    """
    monkeypatch.setattr("pyro_ext.feature_sign.SHARE", share)
    data = random_data(200, 8, 6, seed=5, rate=0.05)
    data = replace(data, A=data.A + 1)
    problem, values = data.problem, [data.problem.objective(data.start)]
    for limit in range(1, 12):
        found = FeatureSign(tolerance=1e-9, max_iterations=limit).solve(problem, data.start)
        values.append(problem.objective(found.x))
        if limit > 1:
            assert (values[-1] < values[-3])[found.num_iterations == limit].all()
    assert found.converged.sum() > 100


def test_tiny_coordinates_of_a_start_are_no_end():
    """They leave one by one where G is singular, by falls that are all rounding."""
    data = random_data(30, 24, 12, seed=6, rate=0.2)
    found = FeatureSign().solve(data.problem, 1e-40 * torch.randn_like(data.start))
    assert found.converged.all()
    assert (found.num_iterations > PATIENCE).any()


def test_one_entry_at_a_time_needs_more_systems(monkeypatch):
    data = random_data(20, 60, 40, seed=2, rate=0.2)
    several = FeatureSign().solve(data.problem, data.start).num_iterations
    monkeypatch.setattr("pyro_ext.feature_sign.SHARE", 1.0)
    single = FeatureSign().solve(data.problem, data.start).num_iterations
    assert (single >= several).all()
    assert single.sum() > 1.5 * several.sum()


def test_a_system_is_one_iteration():
    """Orthogonal atoms with equal violations: all enter, and one system ends it."""
    problem = PenalizedQuadratic(torch.eye(5), torch.tensor([[3.0, -3.0, 3.0, -3.0, 0.5]]), torch.ones(5))
    found = FeatureSign().solve(problem, torch.zeros(1, 5))
    torch.testing.assert_close(found.x, torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]]))
    assert found.num_iterations.tolist() == [1]


def test_sizes_beyond_the_padded_ones(monkeypatch):
    """Systems that are larger than the largest width, among smaller ones."""
    monkeypatch.setattr("pyro_ext.active_sets.WIDTHS", (2, 3))
    data = random_data(20, 12, 30, seed=3, rate=0.05)
    data = replace(data, y=data.y * torch.logspace(-2, 0, 20, dtype=torch.float64)[:, None])
    found = FeatureSign(tolerance=1e-12).solve(data.problem, data.start)
    assert (found.x != 0).sum(-1).unique().max() > 9
    assert found.converged.all()
    assert found.slope.max() < 1e-12


def test_rows_end_where_the_dtype_ends(monkeypatch):
    """A goal that rounding never reaches: the row is left after some steps without a fall, and is not converged."""
    monkeypatch.setattr(FeatureSign, "goal", lambda self, problem, start: torch.full_like(start[:, 0], -1e-20))
    data = random_data(10, 6, 8, seed=4)
    found = FeatureSign().solve(data.problem, data.start)
    assert not found.converged.any()
    assert (found.num_iterations >= PATIENCE).all()
    assert (found.num_iterations < 30).all()
    torch.testing.assert_close(found.x, brute_force(data.problem)[0], rtol=0, atol=1e-10)
