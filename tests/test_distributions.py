"""Distributions of guides: tables, one-hot groups, point masses and sites made of parts."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.distributions import OneHotGroups, PointMass, SiteDistribution, Tabulated
from pyro_ext.sites import Site
from pyro_ext.states import enumerate_states

pytestmark = pytest.mark.usefixtures("float64")

TABLES = {
    "tabulated binary": (lambda: Tabulated(torch.randn(4, 8), [1, 1, 1]), [1, 1, 1]),
    "tabulated mixed": (lambda: Tabulated(torch.randn(4, 6), [1, 3]), [1, 3]),
    "one-hot groups": (lambda: Tabulated.one_hot_groups(torch.randn(4, 2, 3), [3, 3]), [3, 3]),
}
SAMPLES = 20_000
K = 5.0
"""Sampled frequencies are compared at 5 standard errors."""


def site_of(fn: TorchDistributionMixin) -> Site:
    trace = pyro.poutine.trace(lambda: pyro.sample("h", fn)).get_trace()
    return Site.from_message("h", trace.nodes["h"])


@pytest.mark.parametrize("name", TABLES)
def test_moments_are_those_of_the_states(name: str) -> None:
    make, units = TABLES[name]
    fn, states = make(), enumerate_states(units)
    log_q = fn.log_prob(states[:, None, :])
    assert log_q.shape == (len(states), 4)
    q = log_q.exp()
    torch.testing.assert_close(q.sum(0), torch.ones(4))
    torch.testing.assert_close(fn.mean, q.mT @ states)
    torch.testing.assert_close(fn.entropy(), -(q * log_q).sum(0))


@pytest.mark.parametrize("name", TABLES)
def test_draws_have_the_stated_probabilities(name: str) -> None:
    make, units = TABLES[name]
    fn = make()
    draws = fn.sample((SAMPLES,))
    assert draws.shape == (SAMPLES, 4, sum(units))
    for state in enumerate_states(units):
        probs = fn.log_prob(state.expand(4, -1)).exp()
        error = (probs * (1 - probs) / SAMPLES).sqrt()
        frequency = (draws == state).all(-1).double().mean(0)
        assert bool(((frequency - probs).abs() <= K * error + 1e-12).all())


@pytest.mark.parametrize("name", TABLES)
def test_expanding_keeps_the_probabilities(name: str) -> None:
    make, units = TABLES[name]
    fn = make()
    wide = fn.expand((5, 4))
    assert (wide.batch_shape, wide.event_shape) == ((5, 4), fn.event_shape)
    state = enumerate_states(units)[1]
    torch.testing.assert_close(wide.log_prob(state.expand(5, 4, -1)), fn.log_prob(state.expand(4, -1)).expand(5, 4))
    assert wide.support.check(wide.sample()).all()


def test_a_table_enumerates_its_support() -> None:
    fn = Tabulated(torch.randn(4, 6), [1, 3])
    assert torch.equal(fn.enumerate_support(expand=False), enumerate_states([1, 3])[:, None, :])
    assert fn.enumerate_support().shape == (6, 4, 4)


def test_one_hot_groups_is_what_the_table_makes() -> None:
    assert isinstance(Tabulated.one_hot_groups(torch.zeros(2, 3), [3, 3]), OneHotGroups)


@pytest.mark.parametrize("discrete", [True, False])
def test_point_mass(discrete: bool) -> None:
    value = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    fn = PointMass(value, discrete=discrete)
    assert fn.has_rsample is not discrete
    assert torch.equal(fn.sample((3,)), value.expand(3, 2, 2))
    assert fn.log_prob(torch.tensor([0.0, 1.0])).tolist() == [0, -torch.inf]
    assert fn.expand((3, 2)).batch_shape == (3, 2)
    assert fn.entropy().tolist() == [0, 0]
    assert torch.equal(fn.mean, value)
    assert fn.support.check(value).all()


def test_continuous_points_pass_gradients() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    fn = PointMass(value, discrete=False)
    assert fn.rsample().requires_grad
    assert not fn.sample().requires_grad


SITES = {
    "matrix": dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
    "positive": dist.Gamma(torch.ones(4), 1.0).to_event(1),
    "simplex": dist.Dirichlet(torch.ones(5)),
    "unit interval": dist.Beta(torch.ones(2, 2), 1.0).to_event(2),
}


@pytest.mark.parametrize("name", SITES)
def test_parts_of_a_continuous_site_have_the_density_of_the_transformed_whole(name: str) -> None:
    site = site_of(SITES[name])
    loc, scale = torch.randn(3, 4), torch.rand(3, 4) + 0.5
    index = ([2, 0], [1, 3])
    parts = [(i, dist.Normal(loc[:, list(i)], scale[:, list(i)]).to_event(1)) for i in index]
    fn = SiteDistribution(site, parts)
    whole = dist.Normal(loc.reshape((3,) + site.real_shape), scale.reshape((3,) + site.real_shape))
    whole = dist.TransformedDistribution(whole.to_event(len(site.real_shape)), [site.transform])
    value = fn.sample((6,))
    assert value.shape == (6, 3) + site.event_shape
    torch.testing.assert_close(fn.log_prob(value), whole.log_prob(value))
    assert fn.has_rsample
    assert fn.support.check(value).all()
    assert fn.expand((6, 3)).log_prob(value).shape == (6, 3)


def test_parts_of_a_discrete_site_are_put_in_place() -> None:
    site = site_of(dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
    pair = Tabulated(torch.randn(2, 4), [1, 1])
    single = dist.Bernoulli(logits=torch.randn(2, 1)).to_event(1)
    fn = SiteDistribution(site, [([2, 0], pair), ([1], single)])
    for state in enumerate_states([1, 1, 1]):
        expected = pair.log_prob(state[[2, 0]]) + single.log_prob(state[[1]])
        torch.testing.assert_close(fn.log_prob(state.expand(2, 3)), expected)
    draws = fn.sample((SAMPLES,))
    error = 0.5 / SAMPLES**0.5
    torch.testing.assert_close(draws.mean(0)[:, [2, 0]], pair.mean, atol=K * error, rtol=0)
    assert not fn.has_rsample


def test_parts_of_a_categorical_site_make_integers() -> None:
    site = site_of(dist.Categorical(torch.ones(2, 3)).to_event(1))
    logits = torch.randn(4, 2, 3)
    fn = SiteDistribution(site, [(range(6), OneHotGroups(logits, [3, 3]))])
    value = fn.sample((5,))
    assert (value.shape, value.dtype) == ((5, 4, 2), torch.int64)
    torch.testing.assert_close(fn.log_prob(value), dist.Categorical(logits=logits).to_event(1).log_prob(value))


def test_a_point_has_no_jacobian() -> None:
    site = site_of(dist.Gamma(torch.ones(2), 1.0).to_event(1))
    fn = SiteDistribution(site, [(range(2), PointMass(torch.randn(2), discrete=False))])
    assert fn.log_prob(fn.sample()).item() == 0


def test_gradient_estimators_on_a_discrete_point_are_refused() -> None:
    site = site_of(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    fn = SiteDistribution(site, [(range(2), PointMass(torch.ones(2), discrete=True))])
    with pytest.raises(ValueError, match="Expected a factor with a gradient at the discrete site 'h', but got a point"):
        fn.score_parts(torch.ones(2))
    pair = SiteDistribution(site, [(range(2), Tabulated(torch.zeros(4), [1, 1]))])
    assert pair.score_parts(torch.ones(2)).log_prob.item() == pair.log_prob(torch.ones(2)).item()


def _kl(q: TorchDistributionMixin, p: TorchDistributionMixin) -> Tensor:
    return torch.distributions.kl_divergence(q, p)


def test_closed_form_divergences_of_discrete_parts_are_refused() -> None:
    site = site_of(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    fn = SiteDistribution(site, [(range(2), Tabulated(torch.zeros(4), [1, 1]))])
    with pytest.raises(
        ValueError, match="Expected reparametrised factors under TraceMeanField_ELBO, but got a discrete"
    ):
        _kl(fn, site.fn)
    site = site_of(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    fn = SiteDistribution(site, [([i], dist.Normal(torch.zeros(1), 1.0).to_event(1)) for i in range(2)])
    with pytest.raises(NotImplementedError):
        _kl(fn, site.fn)
