"""The quantities of a lasso against their definitions, and bounds against minima by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize_scalar

from pyro_ext.problems import PenalizedQuadratic, Problem
from tests.oracles.lasso_data import Data, brute_force, random_data

CASES = {
    "shared": {},
    "rates of rows": {"per_row_rate": True},
    "grams of rows": {"per_row_gram": True},
    "nonnegative": {"nonnegative": True},
    "all": {"per_row_rate": True, "per_row_gram": True, "nonnegative": True},
}
cases = pytest.mark.parametrize("case", CASES)


def data_of(case: str, num_rows: int = 10, size: int = 4, num: int = 6, seed: int = 0, rate: float = 0.5) -> Data:
    return random_data(num_rows, size, num, seed, rate, **CASES[case])


def points(data: Data, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Feasible points, a third of whose entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(data.start.shape, generator=generator, dtype=torch.float64)
    x = x * (torch.rand(x.shape, generator=generator) < 0.7)
    return x if data.nonnegative is None else torch.where(data.nonnegative, x.clamp(min=0), x)


def rate_at(data: Data, row: int, i: int) -> float:
    return float(data.rate[i] if data.rate.dim() == 1 else data.rate[row, i])


def bounded_below(data: Data, i: int) -> bool:
    return data.nonnegative is not None and bool(data.nonnegative[i])


@cases
def test_objective(case):
    data = data_of(case)
    x = points(data)
    x.requires_grad_()
    residual = data.y - (data.A @ x.unsqueeze(-1)).squeeze(-1)
    smooth = 0.5 * residual.square().sum(-1) - 0.5 * data.y.square().sum(-1)
    (gradient,) = torch.autograd.grad(smooth.sum(), x)
    value, found = data.problem.smooth(x.detach())
    torch.testing.assert_close(value, smooth.detach())
    torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(data.problem.gradient(x.detach()), gradient)
    torch.testing.assert_close(data.problem.value(x.detach(), gradient), smooth.detach())
    penalty = torch.stack(
        [sum(rate_at(data, r, i) * x[r, i].abs() for i in range(x.shape[1])) for r in range(len(x))]
    ).detach()
    torch.testing.assert_close(data.problem.penalty(x.detach()), penalty)
    torch.testing.assert_close(data.problem.objective(x.detach()), smooth.detach() + penalty)


@pytest.mark.parametrize("same", [False, True])
def test_one_rate_for_all(same):
    data = data_of("shared")
    data = replace(data, rate=torch.full_like(data.rate, 0.7)) if same else data
    x = points(data)
    torch.testing.assert_close(data.problem.penalty(x), (data.rate * x.abs()).sum(-1))


@cases
@pytest.mark.parametrize("per_row_step", [False, True])
def test_shrink(case, per_row_step):
    """The minimum of |u - x|^2 / 2 + step rate |u| by a bounded search, and exact zeros within the threshold."""
    data = data_of(case, num_rows=4)
    x = 2 * torch.randn_like(data.start)
    step = torch.rand(4, 1, dtype=torch.float64) + 0.5 if per_row_step else 0.8
    found = data.problem.shrink(x, step)
    for row in range(4):
        length = float(step[row]) if isinstance(step, torch.Tensor) else step
        for i in range(4):
            rate, at = length * rate_at(data, row, i), float(x[row, i])
            low = 0.0 if bounded_below(data, i) else -20.0
            best = minimize_scalar(
                lambda u, at=at, rate=rate: 0.5 * (u - at) ** 2 + rate * abs(u), bounds=(low, 20.0), method="bounded"
            ).x
            assert float(found[row, i]) == pytest.approx(best, abs=1e-4)
            if abs(at) <= rate or (bounded_below(data, i) and at <= rate):
                assert found[row, i] == 0


@cases
def test_subgradient(case):
    """The one-sided derivatives of P: what is least in size between them, 0 where they enclose 0."""
    data = data_of(case)
    x, problem, length = points(data), data.problem, 1e-7
    found = problem.subgradient(x, problem.gradient(x))
    held = 0
    for i in range(x.shape[1]):
        unit = torch.zeros_like(x)
        unit[:, i] = length
        right = (problem.objective(x + unit) - problem.objective(x)) / length
        left = (problem.objective(x) - problem.objective(x - unit)) / length
        if bounded_below(data, i):
            left = torch.where(x[:, i] == 0, -torch.inf, left)
        least = torch.where(left > 0, left, torch.where(right < 0, right, 0))
        held += int((least == 0).sum())
        torch.testing.assert_close(found[:, i], least, rtol=0, atol=1e-5)
    assert held > 0
    torch.testing.assert_close(problem.slope(x, problem.gradient(x)), found.abs().amax(-1))


@cases
def test_minima_are_stationary(case):
    data = data_of(case)
    x = brute_force(data.problem)[0]
    assert data.problem.slope(x, data.problem.gradient(x)).max() < 1e-12
    torch.testing.assert_close(data.problem.gap(x, data.problem.gradient(x)), torch.zeros(10, dtype=torch.float64))


@cases
def test_scale(case):
    """The dual point s r meets its bounds; 1.001 s breaks them, unless s = 1."""
    data = data_of(case)
    found = []
    for factor in (0.01, 1.0, 10.0):
        gradient = factor * torch.randn_like(data.start)
        s = data.problem.scale(gradient)
        for row in range(len(s)):
            for enlarged in (1.0, 1.001):
                dual = -enlarged * s[row] * gradient[row]
                meets = all(
                    float(dual[i]) <= rate_at(data, row, i) + 1e-12
                    and (bounded_below(data, i) or float(-dual[i]) <= rate_at(data, row, i) + 1e-12)
                    for i in range(len(dual))
                )
                assert meets == (enlarged == 1 or s[row] == 1)
        found.append(s)
    assert (found[0] == 1).all()
    assert (found[2] < 1).any()


@cases
def test_energy(case):
    """|y|^2 of the part of y that A reaches, and what f falls by at most is half of it."""
    data = data_of(case)
    A = data.A if data.A.dim() == 3 else data.A.expand(10, -1, -1)
    best = torch.linalg.lstsq(A, data.y.unsqueeze(-1)).solution
    torch.testing.assert_close(data.problem.energy, (A @ best).squeeze(-1).square().sum(-1))
    lowest = data.problem.smooth(best.squeeze(-1))[0]
    torch.testing.assert_close(data.problem.unit(data.start), -lowest)


def test_energy_of_singular_problems():
    data = random_data(10, 9, 4)
    torch.testing.assert_close(data.problem.energy, data.y.square().sum(-1))
    given = PenalizedQuadratic(data.problem.quadratic, data.b, data.rate, energy=torch.arange(10.0))
    assert torch.equal(given.energy, torch.arange(10.0))


@pytest.mark.parametrize("per_row_gram", [False, True])
def test_energy_outside_the_range(per_row_gram):
    """Infinite in the rows whose b has a part that G does not reach; the unit is 1 + |P| at the start there."""
    data = random_data(4, 6, 3, per_row_gram=per_row_gram)
    b = data.b.clone()
    b[1] += 1
    b[3] += torch.linspace(-1, 1, 6)
    problem = PenalizedQuadratic(data.problem.quadratic, b, data.rate)
    assert problem.energy.isinf().tolist() == [False, True, False, True]
    torch.testing.assert_close(problem.energy[::2], data.problem.energy[::2])
    start = points(data)
    unit = problem.unit(start)
    torch.testing.assert_close(unit[1::2], 1 + problem.objective(start).abs()[1::2])
    torch.testing.assert_close(unit[::2], 0.5 * data.y.square().sum(-1)[::2])
    assert torch.equal(problem.rows(torch.tensor([1, 2])).energy.isinf(), torch.tensor([True, False]))


@cases
@pytest.mark.parametrize("num", [3, 12])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
def test_gap_is_an_upper_bound(case, num, scale):
    """At points near and far, with and without full rank; exactly the dual objective's distance without it."""
    data = data_of(case, num_rows=40, num=num)
    problem = data.problem
    minimum, value = brute_force(problem)
    near = minimum + points(data, scale, seed=1)
    if data.nonnegative is not None:
        near = torch.where(data.nonnegative, near.clamp(min=0), near)
    for x in (points(data, scale), near):
        gradient = problem.gradient(x)
        gap = problem.gap(x, gradient)
        below = problem.objective(x) - value
        assert (gap >= below - 1e-13).all()
        assert gap.isfinite().all()
        # The dual objective at s (y - A x), less |y|^2 / 2 as P is.
        y = reached(data)
        fit = (data.A @ x.unsqueeze(-1)).squeeze(-1)
        duality = problem.objective(x) + 0.5 * (y - problem.scale(gradient)[:, None] * (y - fit)).square().sum(-1)
        if num == 3:
            torch.testing.assert_close(gap, duality, rtol=1e-9, atol=1e-12)
        else:
            assert (gap <= duality + 1e-12).all()


def reached(data: Data) -> torch.Tensor:
    """The part of y in the range of A."""
    A = data.A if data.A.dim() == 3 else data.A.expand(len(data.y), -1, -1)
    return (A @ torch.linalg.lstsq(A, data.y.unsqueeze(-1)).solution).squeeze(-1)


@cases
def test_strong_convexity(case):
    """With full rank, the gap is at most |g|^2 / (2 mu), and this is what holds near the minimum."""
    data = data_of(case, num=12)
    problem = data.problem
    minimum, value = brute_force(problem)
    x = torch.where(minimum != 0, minimum + 1e-6 * points(data), 0)
    gradient = problem.gradient(x)
    least = torch.linalg.eigvalsh(problem.quadratic)[..., 0]
    bound = problem.subgradient(x, gradient).square().sum(-1) / (2 * least)
    gap = problem.gap(x, gradient)
    torch.testing.assert_close(gap, torch.minimum(gap, bound), rtol=1e-9, atol=0)
    assert torch.isclose(gap, bound, rtol=1e-9, atol=0).any()
    assert (gap >= problem.objective(x) - value - 1e-15).all()
    assert gap.max() < 1e-9


def test_gap_outside_the_range():
    """G = 1 1', b = (2, 1), rates 1: infinite off the dual's feasible set, and exact where s = 1."""
    problem = PenalizedQuadratic(torch.ones(2, 2), torch.tensor([[2.0, 1.0]]), torch.ones(2))
    for x, expected in (([1.0, 0.0], 0.0), ([0.0, 1.0], 1.0), ([0.0, 0.0], torch.inf)):
        point = torch.tensor([x])
        assert problem.gap(point, problem.gradient(point)).tolist() == [expected]


@cases
def test_what_may_be_active(case):
    """Nothing that is active at the minimum is ruled out, and near it most of the rest is."""
    data = data_of(case, num_rows=40)
    problem = data.problem
    minimum, _ = brute_force(problem)
    for scale in (1.0, 1e-2, 1e-5):
        x = torch.where(minimum != 0, minimum + scale * points(data), minimum)
        if data.nonnegative is not None:
            x = torch.where(data.nonnegative, x.clamp(min=0), x)
        gradient = problem.gradient(x)
        gap = problem.gap(x, gradient)
        active = problem.may_be_active(gap, gradient)
        # A gap of 0 says that x is the minimum, to rounding: nothing is left to rule out.
        told = gap > 1e-14
        assert told.any()
        assert active[told[:, None] & (minimum != 0)].all()
    assert (~active).sum() > 0.8 * (minimum == 0).sum()


@cases
def test_curvature(case):
    data = data_of(case)
    largest = torch.linalg.eigvalsh(data.problem.quadratic)[..., -1:]
    torch.testing.assert_close(data.problem.curvature, largest.reshape(-1, 1))


@cases
def test_rows(case):
    data = data_of(case)
    index = torch.tensor([7, 2, 2])
    x = points(data)[index]
    part = data.problem.rows(index)
    gradient = data.problem.gradient(points(data))[index]
    assert part.num_rows == 3
    torch.testing.assert_close(part.gradient(x), gradient)
    torch.testing.assert_close(part.objective(x), data.problem.objective(points(data))[index])
    torch.testing.assert_close(
        part.gap(x, gradient), data.problem.gap(points(data), data.problem.gradient(points(data)))[index]
    )
    torch.testing.assert_close(part.energy, data.problem.energy[index])
    torch.testing.assert_close(part.curvature.expand(3, 1), data.problem.curvature.expand(10, 1)[index])


@cases
def test_columns(case):
    """The problem with the others at 0; its gap speaks of the minimum among these, and y is the same."""
    data = data_of(case)
    index = torch.tensor([3, 1])
    x = torch.zeros_like(data.start)
    x[:, index] = points(data)[:, index]
    part = data.problem.columns(index)
    torch.testing.assert_close(part.objective(x[:, index]), data.problem.objective(x))
    torch.testing.assert_close(part.gradient(x[:, index]), data.problem.gradient(x)[:, index])
    torch.testing.assert_close(part.energy, data.problem.energy)
    below = part.objective(x[:, index]) - brute_force(part)[1]
    assert (part.gap(x[:, index], part.gradient(x[:, index])) >= below - 1e-13).all()


def test_smooth_problems():
    G, b = torch.eye(2), torch.ones(1, 2)
    assert PenalizedQuadratic(G, b, torch.zeros(2)).is_smooth
    assert not PenalizedQuadratic(G, b, torch.tensor([0.0, 1.0])).is_smooth
    assert not PenalizedQuadratic(G, b, torch.zeros(2), torch.tensor([True, False])).is_smooth


def test_problems_without_a_gap():
    class Fourth(Problem):
        """sum_i x_i^4."""

        num_rows, rate, nonnegative = 2, torch.zeros(3), None

        def smooth(self, x):
            return x.pow(4).sum(-1), 4 * x.pow(3)

        def rows(self, index):
            return self

    problem, x = Fourth(), torch.ones(2, 3)
    assert not problem.has_gap
    assert problem.gap(x, x).isnan().all()
    assert torch.equal(problem.unit(x), torch.ones(2))
    assert torch.equal(problem.gradient(x), 4 * x)
    assert torch.equal(problem.objective(x), torch.full((2,), 3.0))
