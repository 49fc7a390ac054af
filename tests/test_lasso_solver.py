"""Feature-sign search and coordinate descent find the minima that other routes find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.decomposition import sparse_encode
from torch import Tensor

from benchmarks.patches import draw_patches, load_images
from pyro_ext.coordinate_descent import CoordinateDescent
from pyro_ext.feature_sign import FeatureSign
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import Solver, SolverError
from tests.oracles.lasso_data import Data, brute_force, random_data, scikit_learn

KINDS = [FeatureSign, CoordinateDescent]
both = pytest.mark.parametrize("kind", KINDS)


CLOSE = {FeatureSign: 1e-10, CoordinateDescent: 2e-6}
"""How close x comes to the minimum when P is within 1e-13: feature-sign search ends in an exact active set."""


def exact(kind: type[Solver]) -> Solver:
    return kind(tolerance=1e-13)


def check_solved(problem: PenalizedQuadratic, solver: Solver, start: Tensor, value: Tensor, rtol: float) -> Tensor:
    """The solution is converged, its gap covers the distance to the minimum, and P is the minimum's."""
    found = solver.solve(problem, start)
    assert found.converged.all()
    below = problem.objective(found.x) - value
    unit = problem.unit(start)
    assert (below.abs() <= rtol * unit).all()
    assert (found.gap >= below - 1e-14 * unit).all()
    assert torch.equal(found.gap, problem.gap(found.x, problem.gradient(found.x)))
    assert torch.equal(found.slope, problem.slope(found.x, problem.gradient(found.x)))
    return found.x


@both
def test_two_coordinates_in_closed_form(kind):
    """G = [[2, 1], [1, 2]]: both active, one active, none, and a sign that differs."""
    G = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, 4.0], [3.0, 1.0], [0.9, -1.0], [4.0, -4.0]], dtype=torch.float64)
    problem = PenalizedQuadratic(G, b, torch.ones(2, dtype=torch.float64))
    expected = torch.tensor([[5 / 3, 2 / 3], [1.0, 0.0], [0.0, 0.0], [3.0, -3.0]], dtype=torch.float64)
    found = exact(kind).solve(problem, torch.zeros_like(b))
    torch.testing.assert_close(found.x, expected, rtol=0, atol=CLOSE[kind])
    assert torch.equal(found.x == 0, expected == 0)
    assert found.num_iterations[2] == 0


@both
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("per_row_rate", [False, True])
@pytest.mark.parametrize("per_row_gram", [False, True])
def test_all_patterns_of_signs(kind, size, nonnegative, per_row_rate, per_row_gram):
    data = random_data(
        12, size, 8, per_row_rate=per_row_rate, per_row_gram=per_row_gram, nonnegative=nonnegative, rate=0.6
    )
    x, value = brute_force(data.problem)
    found = check_solved(data.problem, exact(kind), data.start, value, 1e-12)
    torch.testing.assert_close(found, x, rtol=0, atol=CLOSE[kind])
    assert torch.equal(found == 0, x == 0)


@both
@pytest.mark.parametrize("nonnegative", [False, True])
def test_more_atoms_than_data(kind, nonnegative):
    """G has rank 2 of 6: whatever x is, P is that of the best pattern."""
    data = random_data(20, 6, 2, seed=1, rate=0.1, nonnegative=nonnegative)
    check_solved(data.problem, exact(kind), data.start, brute_force(data.problem)[1], 1e-12)


@both
@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_duplicate_atoms(kind, turn):
    """The second half of A repeats the first, or turns it around; warm starts have both copies active."""
    data = random_data(20, 3, 5, seed=2, per_row_rate=True)
    doubled = Data(torch.cat((data.A, turn * data.A), 1), data.y, torch.cat((data.rate, data.rate), 1))
    value = brute_force(data.problem)[1]
    for start in (doubled.start, torch.ones_like(doubled.start), torch.randn_like(doubled.start)):
        check_solved(doubled.problem, exact(kind), start, value, 1e-12)


@both
@pytest.mark.parametrize("case", ["tall", "overcomplete", "rates of rows", "grams of rows"])
def test_scikit_learn(kind, case):
    data = {
        "tall": random_data(10, 30, 50, rate=0.4),
        "overcomplete": random_data(10, 64, 16, rate=0.4),
        "rates of rows": random_data(10, 40, 30, rate=0.3, per_row_rate=True),
        "grams of rows": random_data(10, 40, 30, rate=0.3, per_row_gram=True),
    }[case]
    expected = scikit_learn(data)
    found = check_solved(data.problem, exact(kind), data.start, data.problem.objective(expected), 1e-10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("size", [20, 80])
def test_scikit_learn_positive(kind, size):
    data = replace(random_data(10, size, 20, rate=0.3), nonnegative=torch.ones(size, dtype=torch.bool))
    expected = scikit_learn(data, positive=True)
    found = check_solved(data.problem, exact(kind), data.start, data.problem.objective(expected), 1e-10)
    assert (found >= 0).all()
    assert (found > 0).any()


def patches(num: int) -> Tensor:
    """8 x 8 patches of scikit-learn's photographs without their means, of unit variance."""
    v = draw_patches(load_images(), 8, num, seed=0).double()
    v = v - v.mean(-1, keepdim=True)
    return v / v.std()


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_both_agree_on_patches(rate):
    """200 patches coded by 256 others: one objective to 1e-8, and no higher than that of scikit-learn's LARS."""
    v = patches(456)
    atoms = v[200:] / v[200:].norm(dim=-1, keepdim=True)
    data = Data(atoms.T, v[:200], torch.full((256,), rate, dtype=torch.float64))
    problem = data.problem
    values = []
    for kind in KINDS:
        found = kind(tolerance=1e-9).solve(problem, data.start)
        assert found.converged.all()
        values.append(problem.objective(found.x))
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)
    lars = sparse_encode(v[:40].numpy(), atoms.numpy(), algorithm="lasso_lars", alpha=rate, max_iter=10_000)
    part = problem.rows(torch.arange(40))
    assert (values[0][:40] <= part.objective(torch.from_numpy(lars)) + 1e-8 * part.unit(part.linear)).all()


@both
@pytest.mark.parametrize("scaled", [False, True])
def test_ill_conditioned(kind, scaled):
    """Condition 1e8 by correlated columns, or by columns of very different length."""
    data = random_data(10, 20, 30, seed=3, rate=1e-3)
    if scaled:
        A = data.A * torch.logspace(0, -4, 20, dtype=torch.float64)
    else:
        U, _, V = torch.linalg.svd(data.A, full_matrices=False)
        A = U * torch.logspace(0, -4, 20, dtype=torch.float64) @ V
    data = replace(data, A=A, rate=1e-5 * torch.ones(20, dtype=torch.float64))
    found = exact(kind).solve(data.problem, data.start)
    assert found.converged.all()
    assert (found.num_iterations <= 1000).all()
    other = exact(KINDS[1 - KINDS.index(kind)]).solve(data.problem, data.start)
    torch.testing.assert_close(data.problem.objective(found.x), data.problem.objective(other.x), rtol=1e-10, atol=0)


@both
def test_warm_starts_come_to_the_same_answer(kind):
    data = random_data(15, 12, 20, seed=4)
    cold = exact(kind).solve(data.problem, data.start).x
    assert (cold == 0).any()
    for start in (torch.full_like(cold, 3), -2 * torch.sign(cold), torch.randn_like(cold), cold + 1e-3):
        torch.testing.assert_close(exact(kind).solve(data.problem, start).x, cold, rtol=0, atol=CLOSE[kind])


@both
def test_the_solution_is_left_alone(kind):
    data = random_data(15, 12, 20, seed=4)
    found = exact(kind).solve(data.problem, data.start)
    again = kind(tolerance=1e-12).solve(data.problem, found.x)
    assert torch.equal(again.x, found.x)
    assert (again.num_iterations == 0).all()


@both
def test_negative_starts_of_nonnegative_coordinates(kind):
    data = random_data(10, 5, 8, seed=5, nonnegative=True)
    found = exact(kind).solve(data.problem, torch.full_like(data.start, -1))
    torch.testing.assert_close(found.x, brute_force(data.problem)[0], rtol=0, atol=CLOSE[kind])


@both
def test_zero_where_the_rates_hold_b(kind):
    """Exactly 0 where rate >= |b|: from 0 with equality, from any start where it is above."""
    data = random_data(8, 6, 9, seed=6)
    G, most = data.problem.quadratic, data.b.abs().amax(0)
    found = exact(kind).solve(PenalizedQuadratic(G, data.b, most), data.start)
    assert torch.equal(found.x, data.start)
    assert (found.num_iterations == 0).all()
    above = PenalizedQuadratic(G, data.b, 1.01 * most)
    assert torch.equal(exact(kind).solve(above, torch.randn_like(data.start)).x, data.start)


@both
def test_rows_do_not_touch_each_other(kind):
    """Rows that end early, late and at once give what they give alone."""
    data = random_data(9, 15, 20, seed=7, per_row_rate=True)
    data = replace(data, rate=data.rate * torch.logspace(-2, 1, 9, dtype=torch.float64)[:, None])
    found = exact(kind).solve(data.problem, data.start)
    assert len(found.num_iterations.unique()) > 2
    for row in range(9):
        alone = exact(kind).solve(data.problem.rows(torch.tensor([row])), data.start[row : row + 1])
        torch.testing.assert_close(found.x[row : row + 1], alone.x, rtol=0, atol=1e-11)
        assert found.num_iterations[row] == alone.num_iterations[0]


@both
@pytest.mark.parametrize("per_row_gram", [False, True])
def test_chunks_change_nothing(kind, per_row_gram, monkeypatch):
    data = random_data(20, 30, 40, seed=8, per_row_rate=True, per_row_gram=per_row_gram)
    # Rows of very different size: each has its own goal.
    size = torch.logspace(3, -3, 20, dtype=torch.float64)[:, None]
    data = replace(data, y=size * data.y, rate=size * data.rate)
    solver = kind(tolerance=1e-5)
    whole = solver.solve(data.problem, data.start)
    monkeypatch.setattr("pyro_ext.lasso_solver.CELLS", 90)
    monkeypatch.setattr("pyro_ext.lasso_solver.GRAM_CELLS", 2700)
    monkeypatch.setattr("pyro_ext.active_sets.CELLS", 1)
    parts = solver.solve(data.problem, data.start)
    torch.testing.assert_close(parts.x / size, whole.x / size, rtol=0, atol=1e-11)
    assert torch.equal(parts.num_iterations, whole.num_iterations)


@both
@pytest.mark.parametrize("per_row_gram", [False, True])
def test_single_precision(kind, per_row_gram):
    data = random_data(20, 30, 15, seed=9, per_row_gram=per_row_gram)
    single = data.to(torch.float32)
    found = kind().solve(single.problem, single.start)
    value = data.problem.objective(exact(kind).solve(data.problem, data.start).x)
    assert found.x.dtype == torch.float32
    assert found.converged.all()
    below = (data.problem.objective(found.x.double()) - value) / data.problem.unit(data.start)
    assert (below.abs() < 5e-6).all()


@both
def test_unpenalised_coordinates(kind):
    """Rates of 0, one of them of a coordinate that may not fall below 0: the bound of full rank serves as the gap."""
    data = random_data(15, 5, 12, seed=10, nonnegative=True)
    assert data.nonnegative.any()
    for free in (data.nonnegative, ~data.nonnegative):
        problem = PenalizedQuadratic(data.problem.quadratic, data.b, torch.where(free, 0, data.rate), data.nonnegative)
        x, value = brute_force(problem)
        found = exact(kind).solve(problem, data.start)
        torch.testing.assert_close(found.x, x, rtol=0, atol=CLOSE[kind])
        torch.testing.assert_close(problem.objective(found.x), value, rtol=1e-12, atol=0)
    assert kind().solve(problem, data.start).converged.all()


@both
def test_coordinates_that_p_does_not_depend_on(kind):
    """G_ii = 0 and |b_i| within the rate, or b_i below it where x_i may not fall below 0: x_i = 0 from any start."""
    data = random_data(6, 4, 8, seed=11)
    G = torch.zeros(6, 6, dtype=torch.float64)
    G[:4, :4] = data.problem.quadratic
    b = torch.cat((data.b, torch.tensor([[0.1, -5.0]], dtype=torch.float64).expand(6, 2)), 1)
    rate = torch.cat((data.rate, torch.tensor([0.2, 0.3], dtype=torch.float64)))
    problem = PenalizedQuadratic(G, b, rate, torch.tensor([False] * 5 + [True]))
    assert problem.energy.isinf().all()
    for start in (0.0, 1.0):
        found = exact(kind).solve(problem, torch.full_like(b, start)).x
        torch.testing.assert_close(found[:, :4], brute_force(data.problem)[0], rtol=0, atol=CLOSE[kind])
        assert (found[:, 4:] == 0).all()


@both
def test_b_outside_the_range(kind):
    """G = 1 1', b = (2, 1), rates 1: along (1, -1) P rises although f falls; the minimum is at (1, 0)."""
    problem = PenalizedQuadratic(
        torch.ones(2, 2, dtype=torch.float64),
        torch.tensor([[2.0, 1.0]], dtype=torch.float64),
        torch.ones(2, dtype=torch.float64),
    )
    assert problem.energy.isinf().all()
    found = exact(kind).solve(problem, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(found.x, torch.tensor([[1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.num_iterations < 100).all()


@both
@pytest.mark.parametrize("per_row_gram", [False, True])
def test_no_minimum_is_refused(kind, per_row_gram):
    """G = 1 1', b = (2, -2), rates 1: P falls without end along (1, -1) in the second of two rows."""
    G = torch.ones(2, 2, dtype=torch.float64)
    b = torch.tensor([[2.0, 2.0], [2.0, -2.0]], dtype=torch.float64)
    problem = PenalizedQuadratic(G.repeat(2, 1, 1) if per_row_gram else G, b, torch.ones(2, dtype=torch.float64))
    with pytest.raises(SolverError, match=r"Expected a minimum.*row \(number 1\) where it falls without end.*Raise"):
        kind().solve(problem, torch.zeros(2, 2, dtype=torch.float64))


@both
def test_inputs_are_left_as_they_are(kind):
    data = random_data(6, 8, 10, seed=12, per_row_rate=True, nonnegative=True)
    problem, start = data.problem, torch.randn_like(data.start)
    tensors = [problem.quadratic, problem.linear, problem.rate, problem.nonnegative, problem.energy, start]
    before = [tensor.clone() for tensor in tensors]
    exact(kind).solve(problem, start)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@both
def test_the_limit_of_iterations(kind):
    data = random_data(10, 30, 20, seed=13, rate=0.05)
    found = kind(max_iterations=2).solve(data.problem, data.start)
    assert (found.num_iterations <= 2).all()
    assert not found.converged.all()
    assert torch.equal(found.converged, found.gap <= kind().goal(data.problem, data.start))


@both
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_objective_never_rises(kind, start, nonnegative):
    """From each number of iterations to the next, with systems that are singular on the way."""
    data = random_data(12, 24, 12, seed=14, rate=0.05, nonnegative=nonnegative)
    problem = data.problem
    last = problem.objective(torch.full_like(data.start, start))
    first, fell = last, 0
    for limit in range(1, 26):
        value = problem.objective(kind(tolerance=1e-13, max_iterations=limit).solve(problem, data.start + start).x)
        assert (value <= last + 1e-14 * problem.unit(data.start)).all()
        fell += int((value < last).any())
        last = value
    assert (last < first).all()
    assert fell > 5


@both
def test_no_rows(kind):
    data = random_data(3, 4, 6)
    none = torch.empty(0, dtype=torch.long)
    found = kind().solve(data.problem.rows(none), data.start[none])
    assert found.x.shape == (0, 4)
    assert found.converged.shape == (0,)


@both
def test_other_problems_are_refused(kind):
    class Other:
        is_smooth = False

    with pytest.raises(SolverError, match=rf"Expected log p\(v, h\) to be quadratic.*{kind.__name__}.*FISTA"):
        kind().solve(Other(), torch.zeros(1, 2))
    with pytest.raises(SolverError, match="Expected log p"):
        kind().check(Other())
