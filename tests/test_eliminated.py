"""Unpenalised coordinates that are eliminated, against the whole problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_ext.eliminated import Eliminated
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.proximal import FISTA
from pyro_ext.solvers import SolverError
from tests.oracles.lassos import random_lasso

pytestmark = pytest.mark.usefixtures("float64")

RATE = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5], dtype=torch.float64)
BOUNDED = torch.tensor([True, False, False, False, True, False])


def whole_problem(*, own: bool = False, bounded: bool = False, per_row: bool = False) -> PenalizedQuadratic:
    rate = RATE * (1 + torch.arange(7.0))[:, None] if per_row else RATE
    return random_lasso(7, 6, own=own, rate=rate, nonnegative=BOUNDED if bounded else None)


def of(problem: PenalizedQuadratic) -> Eliminated:
    found = Eliminated.of(problem)
    assert found is not None
    return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_against_a_solver_of_the_whole(own: bool, bounded: bool, per_row: bool) -> None:
    whole = whole_problem(own=own, bounded=bounded, per_row=per_row)
    direct = FISTA(1e-13, 100_000).solve(whole, torch.zeros(7, 6))
    part = of(whole)
    # A bounded latent without a rate stays: its minimum is no linear function of the others.
    assert part.problem.linear.shape == (7, 4 if bounded else 3)
    found = FISTA(1e-13, 100_000).solve(part.problem, torch.zeros(7, part.problem.linear.shape[1]))
    x = part.complete(found.x)
    assert torch.allclose(x, direct.x, atol=1e-6)
    assert torch.allclose(part.problem.objective(found.x) + part.offset, whole.objective(direct.x), rtol=1e-10)
    # Eliminated ones stand where the gradient is 0.
    free = (RATE == 0) & ~(BOUNDED if bounded else torch.zeros(6, dtype=torch.bool))
    assert torch.allclose(whole.gradient(x)[:, free], torch.zeros(()), atol=1e-9)
    assert torch.equal(part.reduce(x), found.x)


@pytest.mark.parametrize("own", [False, True])
def test_the_two_problems_differ_by_the_offset_everywhere(own: bool) -> None:
    whole = whole_problem(own=own)
    part = of(whole)
    for _ in range(3):
        x = torch.randn(7, 3)
        assert torch.allclose(whole.objective(part.complete(x)), part.problem.objective(x) + part.offset, rtol=1e-10)
        # No other value of the eliminated ones is lower.
        other = part.complete(x)
        other[:, RATE == 0] += 0.1 * torch.randn(7, 3)
        assert bool((whole.objective(other) > whole.objective(part.complete(x))).all())


@pytest.mark.parametrize("own", [False, True])
def test_where_nothing_is_penalised_it_is_a_linear_system(own: bool) -> None:
    whole = random_lasso(7, 4, own=own, rate=0.0)
    part = of(whole)
    x = part.complete(torch.zeros(7, 0))
    answer = torch.linalg.solve(whole.quadratic.expand(7, 4, 4), whole.linear)
    assert torch.allclose(x, answer)
    assert torch.allclose(part.offset, whole.objective(answer))
    assert part.problem.linear.shape == (7, 0)


def test_where_all_are_penalised_there_is_nothing_to_do() -> None:
    assert Eliminated.of(random_lasso(7, 4)) is None
    assert Eliminated.of(random_lasso(7, 4, rate=0.0, nonnegative=torch.ones(4, dtype=torch.bool))) is None


def test_a_rate_that_is_0_in_some_rows_only_is_kept() -> None:
    rate = torch.ones(7, 4)
    rate[:3, 1] = 0
    assert Eliminated.of(random_lasso(7, 4, rate=rate)) is None


def singular(*, own: bool) -> Tensor:
    direction = torch.ones(3, 1)
    quadratic = torch.eye(4)
    quadratic[:3, :3] = direction @ direction.T
    return quadratic.expand(2, 4, 4).clone() if own else quadratic


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["flat", "flat but for rounding", "rising", "a saddle", "without curvature"])
def test_no_unique_minimum_is_told(own: bool, kind: str) -> None:
    quadratic = singular(own=own)
    if kind == "flat but for rounding":
        # The factorisation succeeds: a share of two units of rounding is left.
        quadratic[..., :3, :3] = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 4.4e-16, 0.0], [0.0, 0.0, 1.0]])
    if kind == "rising":
        quadratic[..., 0, 0] = -1.0
    if kind == "a saddle":
        quadratic[..., :3, :3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    if kind == "without curvature":
        quadratic[..., :3, :3] = 0.0
    problem = PenalizedQuadratic(quadratic, torch.randn(2, 4), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    with pytest.raises(SolverError, match=r"one maximum in the latents without a sparse prior, but got .*proper prior"):
        Eliminated.of(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_of_different_scales_are_not_flat(dtype: torch.dtype) -> None:
    """A curvature of 1 beside one of 1e10 is as good as any other: only what is shared counts."""
    quadratic = torch.diag(torch.tensor([1e10, 1.0, 1e-10, 1.0], dtype=dtype))
    problem = PenalizedQuadratic(
        quadratic, torch.ones(2, 4, dtype=dtype), torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype)
    )
    x = of(problem).complete(torch.zeros(2, 1, dtype=dtype))
    assert torch.allclose(x[:, :3], torch.tensor([1e-10, 1.0, 1e10], dtype=dtype), rtol=1e-5)
