"""Encoders whose outputs are distributions: the hook, its contract, and the ELBOs that serve it."""

from __future__ import annotations

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_ext import WakeSleep, elbo_terms, log_evidence
from pyro_ext.guides import Amortized
from pyro_ext.guides.density_encoders import DensityEncoder, Folded
from pyro_ext.guides.density_posterior import DensityPosterior

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


class Gaussian(DensityEncoder):
    """A density that has moments, written as if it had none: what factors say can be compared with it."""

    def __init__(self, num_inputs, num_features):
        super().__init__()
        self.linear = nn.Linear(num_inputs, 2 * num_features)

    def forward(self, x):
        mean, log_scale = self.linear(x).chunk(2, -1)
        return dist.Normal(mean, log_scale.exp()).to_event(1)


class Mixture(DensityEncoder):
    """Without rsample."""

    def __init__(self, num_inputs, num_features):
        super().__init__()
        self.linear = nn.Linear(num_inputs, 2 * num_features)

    def forward(self, x):
        means = self.linear(x).unflatten(-1, (2, -1))
        weights = dist.Categorical(logits=torch.zeros(means.shape[:-1]))
        return dist.MixtureSameFamily(weights, dist.Normal(means, 1.0).to_event(1))


class Given(DensityEncoder):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear_gaussian(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.tensor([[1.0, -0.5, 0.3]] * 2), 0.5).to_event(1), obs=v)


def both(model, v, num_features):
    """The same q as parameters of a factor and as a density."""
    guides = []
    for encoder in (nn.Linear(v.shape[-1], 2 * num_features), Gaussian(v.shape[-1], num_features)):
        guide = Amortized(model, encoder)
        guide.setup(v)
        guides.append(guide)
    guides[1].encoders.h.linear.load_state_dict(guides[0].encoders.h.state_dict())
    return guides


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceGraph_ELBO, RenyiELBO, WakeSleep])
def test_every_elbo_sees_the_same_density_as_from_parameters(elbo_class):
    v = torch.randn(6, 3)
    factor, density = both(linear_gaussian, v, 2)
    settings = {"alpha": 0.5} if elbo_class is RenyiELBO else {}
    settings |= {"insomnia": 0.5} if elbo_class is WakeSleep else {}
    losses, grads = [], []
    for guide in (factor, density):
        pyro.set_rng_seed(1)
        loss = elbo_class(num_particles=4, vectorize_particles=True, max_plate_nesting=1, **settings)
        losses.append(loss.loss_and_grads(linear_gaussian, guide, v))
        grads.append([p.grad.clone() for p in guide.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_trace_mean_field_is_right_where_draws_can_be_differentiated():
    """With the KL in closed form it has less noise than Trace_ELBO, and the same mean."""
    v = torch.randn(6, 3)
    factor, density = both(linear_gaussian, v, 2)
    exact = TraceMeanField_ELBO().loss(linear_gaussian, factor, v)
    assert math.isfinite(exact)
    pyro.enable_validation(False)
    for guide in (factor, density):
        pyro.set_rng_seed(2)
        loss = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        loss.loss_and_grads(linear_gaussian, guide, v)
    for a, b in zip(factor.parameters(), density.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_rsample_means_score_functions_and_no_mean_field_elbo():
    v = torch.randn(6, 3)
    guide = Amortized(linear_gaussian, Mixture(3, 2))
    guide.setup(v)
    linear = guide.encoders.h.linear
    # The exact gradient of L by a grid over h.
    x = torch.linspace(-6, 6, 121)
    points = torch.cartesian_prod(x, x)
    log_joint = dist.Normal(0.0, 1.0).log_prob(points).sum(-1)[:, None] + dist.Normal(
        (points @ torch.tensor([[1.0, -0.5, 0.3]] * 2))[:, None], 0.5
    ).log_prob(v).sum(-1)
    log_q = guide.encoders.h(v).log_prob(points[:, None])
    bound = ((log_q.exp() * (log_joint - log_q)).sum() * float(x[1] - x[0]) ** 2).sum()
    expected = torch.autograd.grad(-bound, linear.bias)[0]
    found = []
    for _ in range(60):
        Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
            linear_gaussian, guide, v
        )
        found.append(linear.bias.grad.clone())
        guide.zero_grad()
    samples = torch.stack(found)
    assert ((samples.mean(0) - expected).abs() <= K * samples.std(0) / math.sqrt(60)).all()
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().loss(linear_gaussian, guide, v)
    pyro.enable_validation(False)
    with pytest.raises(ValueError, match="Expected reparametrised factors under TraceMeanField_ELBO"):
        TraceMeanField_ELBO().loss(linear_gaussian, guide, v)


def test_reports_are_sampled_and_agree_with_the_exact_ones():
    v = torch.randn(4, 3)
    factor, density = both(linear_gaussian, v, 2)
    exact, sampled = (elbo_terms(linear_gaussian, g, v, num_samples=4000) for g in (factor, density))
    assert exact.exact
    assert not sampled.exact
    assert ((exact.bound - sampled.bound).abs() <= K * sampled.standard_error).all()
    found = log_evidence(linear_gaussian, density, v)
    torch.testing.assert_close(found.mean, log_evidence(linear_gaussian, factor, v).mean)


def test_posteriors_have_draws_and_densities_and_no_moments():
    v = torch.randn(4, 3)
    factor, density = both(linear_gaussian, v, 2)
    h = torch.randn(4, 2)
    one, other = factor.posterior(v), density.posterior(v)
    assert isinstance(other, DensityPosterior)
    torch.testing.assert_close(other["h"].log_prob(h), one["h"].log_prob(h))
    torch.testing.assert_close(other.log_prob({"h": h[None]}), one.log_prob({"h": h[None]}))
    pyro.set_rng_seed(1)
    draws = one["h"].sample(5)
    pyro.set_rng_seed(1)
    assert torch.equal(other["h"].sample(5), draws)
    assert not other.sample_with_log_prob(3)[1].requires_grad
    for ask in (lambda: other["h"].mean, other.entropy, other["h"].entropy, lambda: density.median(v)):
        with pytest.raises(
            ValueError, match=r"but got the density encoder of 'h'\. Average over draws, `posterior.sam"
        ):
            ask()
    assert not density.is_static


def test_other_sites_keep_their_moments():
    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            g = pyro.sample("g", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True) + g[..., None], 0.5).to_event(1), obs=v)

    v = torch.randn(4, 1)
    guide = Amortized(model, {"h": Gaussian(1, 2)})
    posterior = guide.posterior(v)
    torch.testing.assert_close(posterior["g"].mean, guide.encoders.g(v).sigmoid().squeeze(-1).detach())
    torch.testing.assert_close(posterior["g"].entropy(), dist.Bernoulli(posterior["g"].mean).entropy())
    with pytest.raises(ValueError, match=r"but got the density encoder of 'h'"):
        _ = posterior["h"].mean
    values, log_q = posterior.sample_with_log_prob(3)
    expected = posterior["h"].log_prob(values["h"]) + posterior["g"].log_prob(values["g"])
    torch.testing.assert_close(log_q, expected)
    Trace_ELBO().loss_and_grads(model, guide, v)
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


def test_scalar_and_matrix_valued_latents():
    """Features are flat; values have the site's own shape."""

    def model(v):
        with pyro.plate("data", len(v), dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.sample("v", dist.Normal(h.sum((-1, -2)), s), obs=v)

    v = torch.randn(5, 1)
    guide = Amortized(model, {"h": Gaussian(1, 4), "s": Gaussian(1, 1)})
    trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h, s = (trace.nodes[name] for name in ("h", "s"))
    assert (h["value"].shape, s["value"].shape) == ((5, 1, 2, 2), (5, 1))
    mean, log_scale = guide.encoders.h.linear(v).chunk(2, -1)
    expected = dist.Normal(mean, log_scale.exp()).log_prob(h["value"].reshape(5, 4)).sum(-1, keepdim=True)
    torch.testing.assert_close(h["log_prob"], expected)
    mean, log_scale = guide.encoders.s.linear(v).T
    expected = dist.LogNormal(mean, log_scale.exp()).log_prob(s["value"].squeeze(-1))[:, None]
    torch.testing.assert_close(s["log_prob"], expected)
    with pyro.plate("particles", 3, dim=-3):
        assert guide(v)["h"].shape == (3, 5, 1, 2, 2)
    for name in ("h", "s"):
        with pytest.raises(ValueError, match=rf"a mean in closed form, but got the density encoder of '{name}'"):
            _ = guide.posterior(v)[name].mean


def test_classes_as_indicators():
    class Classes(DensityEncoder):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, x):
            return dist.OneHotCategorical(logits=self.linear(x))

    def model(v):
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    v = torch.randn(4)
    guide = Amortized(model, Classes())
    z = guide(v)["z"]
    assert z.shape == (4,)
    logits = guide.encoders.z.linear(v[:, None]).log_softmax(-1)
    expected = logits.gather(-1, z[:, None]).squeeze(-1).detach()
    torch.testing.assert_close(guide.posterior(v)["z"].log_prob(z), expected)


def test_a_folded_batch_is_the_same_distribution():
    mean = torch.randn(12, 2)
    rows = dist.Normal(mean, 1.0).to_event(1)
    folded = Folded(rows, torch.Size([3, 1, 4]))
    same = dist.Normal(mean.reshape(3, 1, 4, 2), 1.0).to_event(1)
    assert (folded.batch_shape, folded.event_shape) == (same.batch_shape, same.event_shape)
    assert folded.has_rsample
    for shape in ((), (5,), (2, 5)):
        pyro.set_rng_seed(0)
        found = folded.sample(torch.Size(shape))
        pyro.set_rng_seed(0)
        torch.testing.assert_close(found, same.sample(torch.Size(shape)))
    for shape in ((3, 1, 4, 2), (5, 3, 1, 4, 2), (3, 6, 4, 2), (5, 3, 6, 4, 2), (2,), (4, 2), (1, 1, 1, 2)):
        value = torch.randn(shape)
        torch.testing.assert_close(folded.log_prob(value), same.log_prob(value))
    grown = folded.expand((5, 3, 6, 4))
    value = grown.sample()
    assert value.shape == (5, 3, 6, 4, 2)
    assert (value[:, :, :1] != value[:, :, 1:2]).all()
    torch.testing.assert_close(grown.log_prob(value), same.expand((5, 3, 6, 4)).log_prob(value))


def test_batch_norm_gets_rows_and_is_not_moved_by_trying_it_out():
    class Normalised(DensityEncoder):
        def __init__(self):
            super().__init__()
            self.norm, self.gaussian = nn.BatchNorm1d(2), Gaussian(2, 2)
            self.shapes = []

        def forward(self, x):
            self.shapes.append(tuple(x.shape))
            return self.gaussian(self.norm(x))

    def layered(v):
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2, 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h1, 1.0).to_event(1), obs=v)

    v = torch.randn(4, 2)
    guide = Amortized(layered, {"h2": Normalised()})
    guide.setup(v)
    encoder = guide.encoders.h2
    assert torch.equal(encoder.norm.running_mean, torch.zeros(2))
    assert encoder.norm.training
    with pyro.plate("particles", 3, dim=-2):
        guide(v)
    assert encoder.shapes[-1] == (12, 2)
    assert encoder.norm.running_mean.abs().sum() > 0
    before = encoder.norm.running_mean.clone()
    guide.posterior(v).sample(2)
    assert torch.equal(encoder.norm.running_mean, before)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda x: x,
            TypeError,
            r"a distribution of pyro.distributions from the density encoder of 'h', but got Tensor",
        ),
        (
            lambda x: torch.distributions.Normal(x[:, :2], 1.0),
            TypeError,
            r"a distribution of pyro.distributions from the density encoder of 'h', but got Normal",
        ),
        (
            lambda x: dist.Normal(x[:, :2], 1.0),
            ValueError,
            r"batch shape \(R,\) and event shape \(2,\), but got \(2, 2\)",
        ),
        (
            lambda x: dist.Normal(x, 1.0).to_event(1),
            ValueError,
            r"event shape \(2,\), but got \(2,\) and \(3,\) for 2 rows",
        ),
        (
            lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1),
            ValueError,
            r"with batch shape \(R,\) and event shape \(2,\), but got \(\) and \(2,\) for 2 rows",
        ),
        (
            lambda x: dist.LogNormal(x[:, :2], 1.0).to_event(1),
            ValueError,
            r"a density of the real site 'h' over real numbers, which the guide maps to the support, but got Indep",
        ),
        (
            lambda x: dist.Bernoulli(logits=x[:, :2]).to_event(1),
            ValueError,
            r"a density of the real site 'h' over real numbers",
        ),
        (lambda x: x @ torch.zeros(7, 1), ValueError, r"an encoder of 'h' that reads 3 features, but it failed: mat1"),
        (
            lambda x: dist.Delta(x[:, :2], log_density=-math.inf).to_event(1),
            ValueError,
            r"Expected finite log-densities of shape \(S, R\) for draws of 'h', but got shape \(16, 2\), 32 of them",
        ),
    ],
)
def test_densities_that_do_not_fit(function, error, message):
    guide = Amortized(linear_gaussian, Given(function))
    v = torch.randn(4, 3)
    for _ in range(2):
        with pytest.raises(error, match=message):
            guide(v)
        assert not guide.is_set_up
        assert not list(guide.parameters())
        assert not list(pyro.get_param_store())


def test_a_latent_in_an_inner_plate_takes_no_density():
    def model(v):
        with pyro.plate("data", len(v), dim=-2), pyro.plate("inner", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    def nested(v):
        with pyro.plate("data", len(v), dim=-2):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                h = pyro.sample("h", dist.Normal(g, 1.0))
                pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v = torch.randn(4, 3)
    # Both plates are the rows here: every element is a row of its own.
    assert Amortized(model, Gaussian(1, 2)).posterior(v)["h"].sample(2).shape == (2, 4, 3, 2)
    with pytest.raises(
        ValueError, match=r"a latent outside inner plates for a density encoder, but got 'h' with 3 elem"
    ):
        Amortized(nested, {"h": Gaussian(3, 1)}).setup(v)


def test_a_guide_is_freed_with_its_last_reference():
    guide = Amortized(linear_gaussian, Gaussian(3, 2))
    guide(torch.randn(4, 3))
    reference = weakref.ref(guide)
    gc.disable()
    try:
        del guide
        assert reference() is None
    finally:
        gc.enable()


def test_a_density_is_trained_by_svi():
    v = torch.randn(30, 3)
    guide = Amortized(linear_gaussian, Gaussian(3, 2))
    svi = SVI(linear_gaussian, guide, Adam({"lr": 0.03}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    losses = [svi.step(v) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 100
