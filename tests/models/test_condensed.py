"""Condensed data have the moments of the data, and exact EM walks the same path on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import Structured
from pyro_ext.models import FactorAnalysis, ProbabilisticPCA, condense
from pyro_ext.models import condensed as module
from tests.oracles.enumeration import binary_states

pytestmark = pytest.mark.usefixtures("float64")


def moments(v: Tensor) -> Tensor:
    """sum_n [1, v_n][1, v_n]'."""
    extended = torch.cat([torch.ones(len(v), 1), v], -1)
    return extended.T @ extended


def correlated(num_rows: int = 500, width: int = 6) -> Tensor:
    return torch.randn(num_rows, width) @ torch.randn(width, width) + torch.arange(width)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v,
        lambda v: v * torch.logspace(-6, 6, 6),
        lambda v: torch.cat([v[:, :5], v[:, :1]], -1),
        lambda v: torch.cat([v[:, :5], torch.full_like(v[:, :1], 3.0)], -1),
        lambda v: torch.full_like(v, 2.0),
        lambda v: binary_states(6).repeat(3, 1),
    ],
    ids=["full rank", "scales", "a column twice", "a constant column", "all constant", "discrete"],
)
def test_count_sum_and_scatter_are_kept(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", 77)
    v = change(correlated())
    few, weight = condense(v)
    assert few.shape == (7, 6)
    assert weight == len(v) / 7
    truth = moments(v)
    # Relative to the size that an entry can have at all: its two columns' root mean squares.
    size = truth.diagonal().sqrt()
    assert ((weight * moments(few) - truth).abs() <= 1e-12 * size * size.unsqueeze(-1)).all()


def test_far_from_zero_the_scatter_keeps_its_digits() -> None:
    v = correlated() + 1e6
    few, weight = condense(v)
    x, y = v - v.mean(0), few - few.mean(0)
    torch.testing.assert_close(weight * y.T @ y, x.T @ x, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(few.mean(0), v.mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_rows", [1, 6, 7])
def test_few_rows_stay_as_they_are(num_rows: int) -> None:
    v = correlated(num_rows)
    few, weight = condense(v)
    assert few is v
    assert weight == 1.0


def test_the_dtype_is_kept() -> None:
    v = correlated().float()
    few, weight = condense(v)
    assert few.dtype == torch.float32
    torch.testing.assert_close(weight * moments(few.double()), moments(v.double()), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("build", [FactorAnalysis, ProbabilisticPCA])
def test_exact_em_walks_the_same_path(build: Callable[..., FactorAnalysis]) -> None:
    v = correlated(400)
    paths = []
    for condensed in (False, True):
        model = build(6, 2)
        data, weight = model.condense(v) if condensed else (v, 1.0)
        assert weight * len(data) == pytest.approx(400, rel=1e-14)
        torch.manual_seed(1)
        model.initialize(data)
        em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
        path = []
        for _ in range(30):
            loss = em.step(data) / len(data)
            path.append((torch.tensor(loss), *(p.detach().clone() for p in model.parameters())))
        paths.append(path)
    for one, other in zip(*paths, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert paths[0][0][0] - paths[0][-1][0] > 0.1


def test_refusals() -> None:
    v = correlated()
    v[3, 2] = torch.nan
    for data in (v, v[:5]):
        with pytest.raises(ValueError, match=r"finite values in v, but got 1 NaN or infinite, the first at \(3, 2\)"):
            condense(data)
    with pytest.raises(ValueError, match=r"Expected v of shape \(N, 6\), but got \(6,\)"):
        condense(v[0])
    with pytest.raises(TypeError, match="Expected v of a floating dtype"):
        condense(torch.ones(10, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="Expected v to be a torch.Tensor, but got list"):
        condense([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected v of shape \(N, 5\), but got \(500, 6\)"):
        FactorAnalysis(5, 1).condense(v)
