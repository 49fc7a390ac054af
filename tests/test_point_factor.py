"""Features of points: exact zeros of positive sites, and what is outside a support."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_ext.point_factor import LOG_OF_ZERO, point_features
from pyro_ext.program import Program
from pyro_ext.sites import Site

pytestmark = pytest.mark.usefixtures("float64")


def site_of(fn: TorchDistribution) -> Site:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", fn)
            pyro.sample("v", dist.Normal(h.double().reshape(len(v), -1).sum(-1), 1.0), obs=v)

    return Program(model, (torch.zeros(4),), {}).site("h")


@pytest.mark.parametrize(
    "fn",
    [
        dist.Exponential(1.0).expand([3]).to_event(1),
        dist.Gamma(2.0, 1.0).expand([3]).to_event(1),
        dist.HalfNormal(torch.ones(3, 1)).to_event(2),
    ],
    ids=["exponential", "gamma", "matrix"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_kept_exactly(fn: TorchDistribution, dtype: torch.dtype) -> None:
    site = site_of(fn)
    smallest = 2 * torch.finfo(dtype).tiny
    value = torch.tensor([0.0, smallest, 3.0], dtype=dtype).reshape(site.event_shape).expand((4,) + site.event_shape)
    features = point_features(site, value)
    assert features.shape == (4, 3)
    assert features.dtype == dtype
    assert bool(features.isfinite().all())
    assert bool((features[:, 0] == LOG_OF_ZERO).all())
    back = site.from_features(features)
    assert torch.equal(back == 0, value == 0)
    torch.testing.assert_close(back, value, rtol=1000 * torch.finfo(dtype).eps, atol=0)


def test_inside_the_support_they_are_the_features_of_the_site() -> None:
    for fn in (
        dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2),
        dist.Exponential(1.0).expand([3]).to_event(1),
        dist.Beta(2.0, 2.0),
        dist.Dirichlet(torch.ones(3)),
        dist.Bernoulli(0.5).expand([3]).to_event(1),
        dist.Categorical(torch.ones(3)),
    ):
        site = site_of(fn)
        for batch in ((4,), (2, 4)):
            value = fn.sample(batch)
            assert torch.equal(point_features(site, value), site.to_features(value))


def test_the_gradient_is_that_of_the_logarithm_and_none_at_zero() -> None:
    site = site_of(dist.Exponential(1.0).expand([3]).to_event(1))
    value = torch.tensor([0.0, 0.5, 4.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(point_features(site, value).sum(), value)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0, 0.25]))
    # There and back again the gradient is that of the value itself.
    (gradient,) = torch.autograd.grad(site.from_features(point_features(site, value)).square().sum(), value)
    torch.testing.assert_close(gradient, 2 * value.detach())


@pytest.mark.parametrize("bad", [-0.5, math.nan])
def test_values_outside_the_support_are_refused_by_name(bad: float) -> None:
    site = site_of(dist.Exponential(1.0).expand([2]).to_event(1))
    with pytest.raises(ValueError, match=r"Expected values of 'h' in its support, .*, but got values from .* Map them"):
        point_features(site, torch.tensor([bad, 1.0]))


def test_zero_is_refused_where_the_support_is_open() -> None:
    site = site_of(dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with pytest.raises(ValueError, match=r"Expected values of 'h' in its support, .*from 0 to 1\."):
        point_features(site, torch.tensor([0.0, 1.0]))
