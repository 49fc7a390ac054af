from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_ext.models import Covariance, Diagonal, Full, Spherical, Tied
from pyro_ext.models.gaussian_components import DiagonalComponents, FullComponents, TiedComponents
from pyro_ext.models.patterns import Patterns
from tests.models.covariance_structures import random_root, structures, whole

N, D, K = 50, 3, 4


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of a few rows, the last one shorter."""
    monkeypatch.setattr("pyro_ext.models.gaussian_components._NARROW", 8 * 4 * 7)
    monkeypatch.setattr("pyro_ext.models.gaussian_components._WIDE", 8 * 12 * 7)
    monkeypatch.setattr("pyro_ext.models.covariance._CHUNK_BYTES", 8 * 12 * 7)


def by_hand(covariance: Covariance, v: Tensor, locs: Tensor, root: Tensor) -> Tensor:
    return MultivariateNormal(locs, whole(covariance, root, locs)).log_prob(v.unsqueeze(1))


@structures
@pytest.mark.parametrize("center", [0.0, 1e3])
@pytest.mark.usefixtures("small_chunks")
def test_densities(covariance: Covariance, center: float) -> None:
    locs, root = torch.randn(K, D) + center, random_root(covariance, K, D)
    v = 2 * torch.randn(N, D) + center
    found = covariance.components(locs, root).log_prob(v)
    torch.testing.assert_close(found, by_hand(covariance, v, locs, root), rtol=1e-12, atol=1e-10)


@structures
@pytest.mark.parametrize("hidden", [False, True], ids=["complete", "missing"])
@pytest.mark.usefixtures("small_chunks")
def test_derivatives_of_densities(covariance: Covariance, hidden: bool) -> None:
    locs, start = torch.randn(2, 2, requires_grad=True), random_root(covariance, 2, 2)
    v = 2 * torch.randn(5, 2)
    observed = torch.rand(5, 2) < 0.6 if hidden else None

    def log_prob(locs: Tensor, entries: Tensor) -> Tensor:
        root = start.index_put(start.nonzero(as_tuple=True), entries)
        return covariance.components(locs, root, observed).log_prob(v)

    entries = start[start.nonzero(as_tuple=True)].requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (locs, entries))
    assert torch.autograd.gradgradcheck(log_prob, (locs, entries))


def test_derivatives_where_one_parameter_depends_on_the_other() -> None:
    scale = random_root(Diagonal(), K, D).requires_grad_()
    v, direction = torch.randn(N, D), torch.randn(D)

    def log_prob(scale: Tensor) -> Tensor:
        return Diagonal().components(scale * direction, scale).log_prob(v)

    assert torch.autograd.gradcheck(log_prob, (scale,))


@pytest.mark.parametrize(("num", "width"), [(4, 3), (3, 4), (2, 2)])
@pytest.mark.usefixtures("small_chunks")
def test_second_moments_in_chunks(num: int, width: int) -> None:
    weights, x = torch.rand(N, num), torch.randn(N, width)
    expected = torch.einsum("nk,nd,ne->kde", weights, x, x)
    torch.testing.assert_close(Full().second_moment(weights, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Tied().second_moment(weights, x).sum(0), expected.sum(0), rtol=1e-12, atol=1e-12)
    trace = expected.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(Spherical().second_moment(weights, x), trace, rtol=1e-12, atol=1e-12)


@structures
def test_densities_of_observed_entries(covariance: Covariance) -> None:
    locs, root = torch.randn(K, D), random_root(covariance, K, D)
    v, observed = 2 * torch.randn(N, D), torch.rand(N, D) < 0.6
    assert not observed.any(1).all()
    assert observed.all(1).any()
    matrices = whole(covariance, root, locs)
    expected = torch.zeros(N, K)
    for n in range(N):
        o = observed[n].nonzero()[:, 0]
        for k in range(K):
            if len(o):
                expected[n, k] = MultivariateNormal(locs[k, o], matrices[k][o][:, o]).log_prob(v[n, o])
    components = covariance.components(locs, root, observed)
    found = components.log_prob(v.masked_fill(~observed, torch.nan))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    twice = components.log_prob(torch.cat([v, v]))
    torch.testing.assert_close(twice, torch.cat([expected, expected]), rtol=1e-10, atol=1e-10)


@structures
def test_moments_given_observed_entries(covariance: Covariance) -> None:
    locs, root = torch.randn(K, D), random_root(covariance, K, D)
    x, observed, weights = 2 * torch.randn(N, D), torch.rand(N, D) < 0.6, torch.rand(N, K)
    matrices = whole(covariance, root, locs)
    total, second = torch.zeros(K, D), torch.zeros(K, D, D)
    for n in range(N):
        o, m = observed[n].nonzero()[:, 0], (~observed[n]).nonzero()[:, 0]
        for k in range(K):
            mean, spread = x[n].clone(), torch.zeros(D, D)
            regression = matrices[k][m][:, o] @ torch.linalg.inv(matrices[k][o][:, o])
            mean[m] = locs[k, m] + regression @ (x[n, o] - locs[k, o])
            spread[m.unsqueeze(1), m] = matrices[k][m][:, m] - regression @ matrices[k][o][:, m]
            total[k] += weights[n, k] * mean
            second[k] += weights[n, k] * (torch.outer(mean, mean) + spread)
    zeroed = x.masked_fill(~observed, 0)
    found_total, found_second = covariance.observed_moments(weights, zeroed, observed, locs, root)
    torch.testing.assert_close(found_total, total, rtol=1e-10, atol=1e-10)
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    expected = {1: diagonal.sum(-1), 2: diagonal, 3: second}[found_second.dim()]
    if isinstance(covariance, Tied):
        found_second, expected = found_second.sum(0), expected.sum(0)
    torch.testing.assert_close(found_second, expected, rtol=1e-10, atol=1e-10)


@structures
def test_moments_of_complete_rows_are_plain_moments(covariance: Covariance) -> None:
    locs, root = torch.randn(K, D), random_root(covariance, K, D)
    weights, x = torch.rand(N, K), torch.randn(N, D)
    total, second = covariance.observed_moments(weights, x, torch.ones(N, D, dtype=torch.bool), locs, root)
    torch.testing.assert_close(total, weights.mT @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, covariance.second_moment(weights, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [2, 5, 130])
def test_patterns_part_the_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_ext.models.patterns._BATCH", 16)
    mask = torch.rand(200, width) < 0.5
    mask[50:100] = mask[7]
    mask[100, width - 1] ^= True
    patterns = Patterns.of(mask)
    rows = torch.cat([rows.flatten() for _, rows in patterns.batches])
    assert rows.sort().values.tolist() == list(range(200))
    assert torch.equal(rows[patterns.places], torch.arange(200))
    for observed, rows in patterns.batches:
        assert (mask[rows] == observed.unsqueeze(1)).all()
        assert len(rows) == 1 or rows.numel() <= 16
    assert Patterns.of(mask) is patterns
    mask[0] = ~mask[0]
    assert Patterns.of(mask) is not patterns


@pytest.mark.parametrize("apart", [1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("kind", [DiagonalComponents, TiedComponents, FullComponents])
def test_means_far_apart_cost_no_digits_in_single_precision(kind: type, apart: float) -> None:
    torch.manual_seed(0)
    locs = (apart * torch.randn(4, 3)).float()
    root = {
        DiagonalComponents: torch.rand(4, 3) + 0.5,
        TiedComponents: torch.eye(3) + 0.1 * torch.ones(3, 3).tril(),
        FullComponents: (torch.eye(3) + 0.1 * torch.ones(3, 3).tril()).expand(4, 3, 3),
    }[kind].float()
    chosen = torch.randint(4, (50,))
    v = locs[chosen] + torch.randn(50, 3).float()
    found = kind(locs, root).log_prob(v)[torch.arange(50), chosen].double()
    # The same numbers in double precision, whose products lose nothing here.
    truth = kind(locs.double(), root.double()).log_prob(v.double())[torch.arange(50), chosen]
    # Rounding of the differences themselves, of which whitening knows no better.
    assert float((found - truth).abs().max()) < (1e-5 if kind is DiagonalComponents else 1e-3 + 3e-6 * apart)
