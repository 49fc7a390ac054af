"""Kinds of sites and their features."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyro_ext.rows import sample_sites
from pyro_ext.sites import Kind, Site, kind_of

KINDS = {
    "bernoulli": (dist.Bernoulli(0.5), Kind.BINARY),
    "bernoulli vector": (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), Kind.BINARY),
    "masked bernoulli": (dist.Bernoulli(torch.full((3,), 0.5)).mask(torch.tensor(True)).to_event(1), Kind.BINARY),
    "one-hot": (dist.OneHotCategorical(torch.ones(3)), Kind.ONE_HOT),
    "one-hot groups": (dist.OneHotCategorical(torch.ones(4, 3)).to_event(1), Kind.ONE_HOT),
    "categorical": (dist.Categorical(torch.ones(3)), Kind.CATEGORICAL),
    "categorical vector": (dist.Categorical(torch.ones(4, 3)).to_event(1), Kind.CATEGORICAL),
    "normal": (dist.Normal(0.0, 1.0), Kind.REAL),
    "multivariate normal": (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), Kind.REAL),
    "gamma": (dist.Gamma(1.0, 1.0), Kind.CONSTRAINED),
    "beta": (dist.Beta(1.0, 1.0), Kind.CONSTRAINED),
    "dirichlet": (dist.Dirichlet(torch.ones(3)), Kind.CONSTRAINED),
    "lkj": (dist.LKJCholesky(3, torch.tensor(1.0)), Kind.CONSTRAINED),
    "poisson": (dist.Poisson(1.0), Kind.OTHER_DISCRETE),
    "geometric": (dist.Geometric(0.5), Kind.OTHER_DISCRETE),
}


def site_of(fn: TorchDistributionMixin) -> Site:
    trace = pyro.poutine.trace(lambda: pyro.sample("h", fn)).get_trace()
    (found,) = [Site.from_message(name, message) for name, message in sample_sites(trace)]
    return found


@pytest.mark.parametrize(("fn", "kind"), KINDS.values(), ids=KINDS.keys())
def test_kind_follows_from_the_support(fn: TorchDistributionMixin, kind: Kind) -> None:
    assert kind_of(fn) is kind


def test_kinds_know_whether_they_are_discrete() -> None:
    assert [kind.is_discrete for kind in Kind] == [True, True, True, False, False, True]


@pytest.mark.parametrize("name", [n for n, (_, kind) in KINDS.items() if kind is not Kind.OTHER_DISCRETE])
def test_features_and_values_are_one_to_one(name: str) -> None:
    site = site_of(KINDS[name][0])
    values = site.fn.sample((5, 2))
    features = site.to_features(values)
    assert features.shape == (5, 2, site.num_features)
    again = site.from_features(features)
    assert again.shape == values.shape
    torch.testing.assert_close(again, values, rtol=1e-4, atol=1e-5)


def test_number_of_features_and_classes() -> None:
    expected = {"bernoulli vector": (3, 2, 1), "one-hot groups": (12, 3, 3), "categorical vector": (12, 3, 3)}
    for name, (features, classes, unit) in expected.items():
        site = site_of(KINDS[name][0])
        assert (site.num_features, site.num_classes, site.unit_size) == (features, classes, unit)
    assert site_of(KINDS["dirichlet"][0]).num_features == 2
    assert site_of(KINDS["lkj"][0]).num_features == 3
    assert site_of(KINDS["masked bernoulli"][0]).num_classes == 2


def test_features_of_a_class_are_its_indicators() -> None:
    site = site_of(KINDS["categorical vector"][0])
    assert site.to_features(torch.tensor([0, 2, 1, 1])).tolist() == [1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0]


def test_full_batch_shape_undoes_the_subsample() -> None:
    def model() -> None:
        with pyro.plate("rows", 10, subsample_size=4, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("h", dist.Normal(0.0, 1.0))

    trace = pyro.poutine.trace(model).get_trace()
    site = Site.from_message("h", trace.nodes["h"])
    assert (site.batch_shape, site.full_batch_shape, site.at_full_size().batch_shape) == ((4, 3), (10, 3), (10, 3))
