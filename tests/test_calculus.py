"""Calculus of variations: derivatives, the stationary density and its multipliers, and no minimum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyro_ext.calculus import entropy, functional_derivative, maximum_entropy, two_bumps

pytestmark = pytest.mark.usefixtures("float64")


def moments(density: Tensor, grid: Tensor) -> list[float]:
    mean = torch.trapezoid(density * grid, grid)
    return [
        torch.trapezoid(density, grid).item(),
        mean.item(),
        torch.trapezoid(density * (grid - mean) ** 2, grid).item(),
    ]


def test_the_derivative_is_that_of_a_sum_over_the_grid() -> None:
    # (19.47): a function on a grid is a vector, and the integral a sum.
    grid = torch.linspace(0.5, 2.0, 7)
    function = torch.rand(7) + 0.1

    def integrand(y: Tensor, x: Tensor) -> Tensor:
        return x * y**3 - torch.log(y)

    found = functional_derivative(integrand, function, grid)
    for i in range(7):
        step = torch.zeros(7)
        step[i] = 1e-6
        rise = integrand(function + step, grid).sum() - integrand(function - step, grid).sum()
        assert found[i].item() == pytest.approx(rise.item() / 2e-6, rel=1e-6)


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (2.0, 0.25), (-1.0, 3.0)])
def test_multipliers_are_those_of_the_normal_density(mean: float, variance: float) -> None:
    grid = torch.linspace(mean - 15, mean + 15, 6001)
    found = maximum_entropy(grid, mean, variance)
    sigma = math.sqrt(variance)
    wanted = torch.tensor([1 - math.log(sigma * math.sqrt(2 * math.pi)), 0.0, -0.5 / variance])
    torch.testing.assert_close(found.multipliers, wanted, rtol=1e-6, atol=1e-6)
    normal = torch.distributions.Normal(mean, sigma).log_prob(grid).exp()
    torch.testing.assert_close(found.density, normal, rtol=1e-6, atol=1e-9)
    assert moments(found.density, grid) == pytest.approx([1.0, mean, variance], abs=1e-9)
    assert entropy(found.density, grid).item() == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e * variance), abs=1e-6
    )


def test_the_lagrangian_is_stationary_and_no_feasible_move_raises_the_entropy() -> None:
    # A truncated grid: no normal density any more, but still of the form (19.53).
    grid = torch.linspace(-1.0, 2.0, 1501)
    mean, variance = 0.3, 0.5
    found = maximum_entropy(grid, mean, variance)
    assert moments(found.density, grid) == pytest.approx([1.0, mean, variance], abs=1e-9)
    one, two, three = found.multipliers

    def lagrangian(y: Tensor, x: Tensor) -> Tensor:
        return (one + two * x + three * (x - mean) ** 2) * y - y * torch.log(y)

    slope = functional_derivative(lagrangian, found.density, grid)
    assert slope.abs().max().item() < 1e-9
    best = entropy(found.density, grid).item()
    weights = torch.full_like(grid, (grid[1] - grid[0]).item())
    weights[[0, -1]] /= 2
    constraints = torch.stack([torch.ones_like(grid), grid, (grid - mean) ** 2]) * weights
    for _ in range(20):
        move = torch.randn_like(grid)
        move = move - constraints.T @ torch.linalg.solve(constraints @ constraints.T, constraints @ move)
        density = found.density + 1e-3 * found.density.min() * move / move.abs().max()
        assert moments(density, grid) == pytest.approx([1.0, mean, variance], abs=1e-9)
        assert entropy(density, grid).item() < best


def test_entropy_falls_without_end_under_the_same_constraints() -> None:
    grid = torch.linspace(-3.0, 3.0, 60001)
    values = []
    for width in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        density = two_bumps(grid, 0.0, 1.0, width)
        assert moments(density, grid) == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)
        values.append(entropy(density, grid).item())
        if width <= 0.1:
            assert values[-1] == pytest.approx(math.log(2 * width * math.sqrt(2 * math.pi * math.e)), abs=1e-6)
    assert all(later < earlier - 1 for earlier, later in itertools.pairwise(values))


def test_refusals() -> None:
    grid = torch.linspace(0.0, 1.0, 11)
    with pytest.raises(ValueError, match="one shape"):
        entropy(torch.ones(10), grid)
    with pytest.raises(ValueError, match="grid that increases"):
        entropy(torch.ones(11), grid.flip(0))
    with pytest.raises(ValueError, match="at least 0, but got -1"):
        entropy(-torch.ones(11), grid)
    with pytest.raises(ValueError, match="mean inside .* but got mean 2"):
        maximum_entropy(grid, 2, 0.1)
    with pytest.raises(ValueError, match="Widen the grid"):
        maximum_entropy(grid, 0.5, 0.3)
    with pytest.raises(ValueError, match=r"width inside \(0, 1\), but got 1.5"):
        two_bumps(grid, 0.0, 1.0, 1.5)
