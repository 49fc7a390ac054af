"""Steps within active coordinates: the minimum along the way, by a fine grid."""

from __future__ import annotations

import pytest
import torch

from pyro_ext.active_sets import ActiveSteps
from pyro_ext.problems import PenalizedQuadratic
from tests.oracles.lasso_data import random_data


def signs_of(x: torch.Tensor, gradient: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Those of x, and one coordinate more that comes in."""
    violation = torch.where(x == 0, gradient.abs() - rate, -torch.inf)
    enters = torch.zeros_like(x).scatter_(1, violation.argmax(-1, keepdim=True), 1) * (violation > 0)
    return x.sign() - enters * gradient.sign()


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("case", ["shared", "rates of rows", "grams of rows"])
def test_no_point_along_the_way_is_lower(case, nonnegative):
    data = random_data(
        60,
        8,
        12,
        rate=0.2,
        per_row_rate=case == "rates of rows",
        per_row_gram=case == "grams of rows",
        nonnegative=nonnegative,
    )
    problem, rows = data.problem, torch.arange(60)
    torch.manual_seed(0)
    x = torch.randn_like(data.start) * (torch.rand_like(data.start) < 0.4)
    if data.nonnegative is not None:
        x = torch.where(data.nonnegative, x.clamp(min=0), x)
    gradient = problem.gradient(x)
    sign = x.sign()
    moved, fall, whole = ActiveSteps(problem)(rows, x, gradient, sign)
    value = problem.objective(moved)
    torch.testing.assert_close(problem.objective(x) - value, fall, rtol=0, atol=1e-12)
    assert (moved[sign == 0] == 0).all()
    if data.nonnegative is not None:
        assert (moved[:, data.nonnegative] >= 0).all()

    active = sign != 0
    G = torch.where(active[:, :, None] & active[:, None, :], problem.quadratic, 0) + torch.diag_embed((~active).to(x))
    direction = -torch.linalg.solve(G, torch.where(active, gradient + data.rate * sign, 0))
    for length in torch.linspace(0, 1.5, 601, dtype=torch.float64):
        point = x + length * direction
        feasible = torch.ones(60, dtype=torch.bool)
        if data.nonnegative is not None:
            feasible = (point[:, data.nonnegative] >= 0).all(-1)
        assert (value <= problem.objective(point) + 1e-12)[feasible].all()
    # Where no sign changes, the way ends in the minimum of the pattern.
    ends = (((x + direction) * sign)[:, :] > 0) | ~active
    assert torch.equal(whole, ends.all(-1))
    assert whole.any()
    assert (~whole).any()
    torch.testing.assert_close(moved[whole], (x + direction)[whole], rtol=0, atol=1e-10)


def test_coordinates_that_come_in():
    """One coordinate enters a row that is at its minimum otherwise: it moves as its sign says, and P falls."""
    data = random_data(40, 8, 12, seed=1, rate=0.5)
    problem, rows, steps = data.problem, torch.arange(40), ActiveSteps(data.problem)
    x = data.start
    for _ in range(3):
        gradient = problem.gradient(x)
        sign = signs_of(x, gradient, data.rate)
        entering = (x == 0) & (sign != 0)
        moved, fall, whole = steps(rows, x, gradient, sign)
        came = entering.any(-1) & whole
        assert came.any()
        assert (fall[came] > 0).all()
        assert ((moved * sign)[entering & came[:, None]] > 0).all()
        x = moved


def test_a_wrong_sign_stays_at_zero():
    """A coordinate that is sent in against its gradient does not move, and the others do as without it."""
    problem = PenalizedQuadratic(torch.eye(2), torch.tensor([[3.0, 3.0]]), torch.ones(2))
    x = torch.zeros(1, 2)
    moved, fall, whole = ActiveSteps(problem)(torch.tensor([0]), x, problem.gradient(x), torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(moved, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(fall, torch.tensor([2.0]))
    assert not whole.any()


def test_directions_along_which_nothing_bends():
    """G = 1 1': along (1, -1) only the rates count, and the step ends where the dearer coordinate is 0."""
    problem = PenalizedQuadratic(
        torch.ones(2, 2, dtype=torch.float64),
        torch.full((1, 2), 4.0, dtype=torch.float64),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    steps, rows = ActiveSteps(problem), torch.tensor([0])
    for _ in range(3):
        x = steps(rows, x, problem.gradient(x), x.sign())[0]
    torch.testing.assert_close(x, torch.tensor([[3.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_rounding_may_make_a_gram_indefinite():
    """G of rank 1 in single precision, taken in double: the least ridge does not serve, a larger one does."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, generator=generator)
    G = torch.outer(a, a).double()
    assert torch.linalg.eigvalsh(G)[0] < -1e-9
    problem = PenalizedQuadratic(G, 3 * a.double()[None], torch.full((8,), 0.1, dtype=torch.float64))
    x = torch.ones(1, 8, dtype=torch.float64)
    steps, rows, last = ActiveSteps(problem), torch.tensor([0]), problem.objective(x)
    for _ in range(12):
        x, fall, _ = steps(rows, x, problem.gradient(x), x.sign())
        assert fall >= 0
    assert problem.objective(x) < last - 1


def test_no_active_coordinates():
    data = random_data(3, 4, 6)
    moved, fall, whole = ActiveSteps(data.problem)(torch.arange(3), data.start, -data.b, data.start)
    assert torch.equal(moved, data.start)
    assert (fall == 0).all()
    assert whole.all()
