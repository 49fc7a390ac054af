"""Calculus of variations on a grid: the entropy functional and its stationary density (19.46-19.54)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def functional_derivative(integrand: Callable[[Tensor, Tensor], Tensor], function: Tensor, grid: Tensor) -> Tensor:
    """The derivative of J[f] = integral of g(f(x), x) dx with respect to the value of f at each x (19.46).

    Euler-Lagrange without derivatives of f: it is the partial derivative of g in its first argument.

    Args:
        integrand: g(y, x), elementwise on tensors ``(G,)``.
        function: values f(x), shape ``(G,)``.
        grid: points x, shape ``(G,)``.

    Returns:
        Tensor ``(G,)``.

    Example:
        >>> functional_derivative(lambda y, x: x * y**2, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([ 6., 16.])
    """
    y = function.detach().clone().requires_grad_()
    (derivative,) = torch.autograd.grad(integrand(y, grid).sum(), y)
    return derivative


def entropy(density: Tensor, grid: Tensor) -> Tensor:
    """H[p] = -integral of p(x) log p(x) dx by the trapezoid rule (19.49), nats.

    Args:
        density: p(x) at the grid's points, shape ``(G,)``, at least 0.
        grid: increasing points, shape ``(G,)``.

    Raises:
        ValueError: density and grid of different shapes, a negative density, or a grid that does not increase.

    Example:
        >>> x = torch.linspace(0, 2, 201)
        >>> entropy(torch.full_like(x, 0.5), x)  # uniform on [0, 2]: log 2
        tensor(0.6931)
    """
    _check(density, grid)
    return -torch.trapezoid(torch.xlogy(density, density), grid)


@dataclass(frozen=True)
class StationaryDensity:
    """The density of largest entropy under the constraints, and the multipliers of those (19.53).

    p(x) = exp(lambda_1 + lambda_2 x + lambda_3 (x - mean)^2 - 1)

    Attributes:
        density: p(x) at the grid's points, shape ``(G,)``.
        multipliers: lambda_1 (total mass 1), lambda_2 (mean), lambda_3 (variance), shape ``(3,)``.
    """

    density: Tensor
    multipliers: Tensor


def maximum_entropy(grid: Tensor, mean: float, variance: float, *, max_steps: int = 100) -> StationaryDensity:
    """Maximise H[p] over densities on the grid with a given mean and variance (19.50-19.54).

    The Lagrangian's functional derivative vanishes at (19.53); its multipliers are found by Newton's method on
    the convex dual, so that the three constraints hold by the trapezoid rule. On a grid that is wide
    and fine against the standard deviation sigma they are those of the normal density (19.54):
    lambda_1 = 1 - log(sigma sqrt(2 pi)), lambda_2 = 0, lambda_3 = -1 / (2 sigma^2).

    Args:
        grid: increasing points, shape ``(G,)``.
        mean: wanted mean, inside the grid.
        variance: wanted variance, positive and small enough for the grid.
        max_steps: most Newton steps.

    Raises:
        ValueError: a mean outside the grid, or no density on it has that mean and variance.

    Example:
        >>> x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
        >>> maximum_entropy(x, mean=0.0, variance=1.0).multipliers.numpy().round(6) + 0.0
        array([ 0.081061,  0.      , -0.5     ])
    """
    _check(torch.zeros_like(grid), grid)
    low, high = float(grid[0]), float(grid[-1])
    if not (low < mean < high and 0 < variance < (high - mean) * (mean - low)):
        raise ValueError(
            f"Expected a mean inside ({low:g}, {high:g}) and a variance that a density there can have, but got mean "
            f"{mean} and variance {variance}. Widen the grid."
        )
    moments = torch.stack([torch.ones_like(grid), grid, (grid - mean).square()])
    targets = grid.new_tensor([1.0, mean, variance])
    multipliers = grid.new_tensor([1 - 0.5 * math.log(2 * math.pi * variance), 0.0, -0.5 / variance])
    for _ in range(max_steps):
        density = _density(multipliers, moments)
        error = torch.trapezoid(density * moments, grid) - targets
        if bool(error.abs().max() <= 1e-12 * targets.abs().max().clamp_min(1.0)):
            break
        curvature = torch.trapezoid(density * moments[:, None] * moments[None, :], grid)
        step = torch.linalg.solve(curvature, error)
        multipliers = _shortened(multipliers, step, moments, targets, grid)
    return StationaryDensity(_density(multipliers, moments), multipliers)


def _density(multipliers: Tensor, moments: Tensor) -> Tensor:
    return (multipliers @ moments - 1).exp()


def _shortened(multipliers: Tensor, step: Tensor, moments: Tensor, targets: Tensor, grid: Tensor) -> Tensor:
    """A Newton step, halved until the dual (the integral of p minus lambda' targets) does not rise."""

    def dual(at: Tensor) -> Tensor:
        return torch.trapezoid(_density(at, moments), grid) - at @ targets

    value = dual(multipliers)
    for _ in range(60):
        new = multipliers - step
        if bool(dual(new) <= value):
            return new
        step = step / 2
    return multipliers


def two_bumps(grid: Tensor, mean: float, variance: float, width: float) -> Tensor:
    """A density of given mean and variance whose entropy falls without end as its two bumps shrink.

    Two normal densities of standard deviation ``width`` at mean +- sqrt(variance - width^2). Once they no longer
    overlap the entropy is log(2 width sqrt(2 pi e)), so that no density of least entropy exists: what the
    constraints leave is a maximum only.

    Args:
        grid: increasing points, shape ``(G,)``, fine against the width.
        mean: mean of the density.
        variance: variance of the density.
        width: standard deviation of each bump, below sqrt(variance).

    Raises:
        ValueError: width not inside (0, sqrt(variance)).

    Example:
        >>> x = torch.linspace(-3, 3, 20001, dtype=torch.float64)
        >>> [round(entropy(two_bumps(x, 0.0, 1.0, w), x).item(), 2) for w in (0.1, 0.01, 0.001)]
        [-0.19, -2.49, -4.8]
    """
    if not 0 < width < math.sqrt(variance):
        raise ValueError(
            f"Expected a width inside (0, {math.sqrt(variance):g}), but got {width}. "
            "Bumps wider than the whole density leave no room for two."
        )
    offset = math.sqrt(variance - width**2)
    bumps = [torch.distributions.Normal(mean + side * offset, width) for side in (-1, 1)]
    return 0.5 * sum((b.log_prob(grid).exp() for b in bumps), torch.zeros_like(grid))


def _check(density: Tensor, grid: Tensor) -> None:
    if density.shape != grid.shape or grid.dim() != 1 or len(grid) < 2:
        raise ValueError(
            f"Expected a density and a grid of one shape (G,) with at least 2 points, but got "
            f"{tuple(density.shape)} and {tuple(grid.shape)}. Evaluate the density at the grid's points."
        )
    if not bool((grid.diff() > 0).all()):
        raise ValueError("Expected a grid that increases, but got one that does not. Sort it and drop repetitions.")
    if not bool((density >= 0).all()):
        raise ValueError(f"Expected a density of at least 0, but got {density.min().item():g}. Clip or correct it.")
