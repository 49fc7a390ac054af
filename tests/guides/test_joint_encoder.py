"""Encoders of joint factors: full covariances and tables of states."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_ext import EM, FixedPoint, Gradient, Refine, elbo_terms, log_evidence
from pyro_ext.guides import Amortized, DefaultEncoder
from pyro_ext.guides.autoregressive import AutoregressiveBernoulli
from pyro_ext.guides.encoders import MLP, PointEncoder
from pyro_ext.guides.joint_encoder import Joint
from tests.guides.test_amortized import log_q, randomise
from tests.oracles.enumeration import binary_states, elbo, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")

W = torch.tensor([[1.0, -0.5, 0.3], [0.9, -0.6, 0.1]], dtype=torch.float64)


def linear_gaussian(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W, 0.5).to_event(1), obs=v)


def sums(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.25), obs=v)


def set_up(model, v, encoder):
    guide = Amortized(model, encoder)
    guide.setup(v)
    return randomise(guide)


def test_a_gaussian_with_full_covariance():
    v = torch.randn(4, 3)
    guide = set_up(linear_gaussian, v, Joint())
    assert isinstance(guide.encoders.h, DefaultEncoder)
    output = guide.encoders.h(v).detach()
    assert output.shape == (4, 5)
    tril = torch.zeros(4, 2, 2)
    tril[:, 0, 0], tril[:, 1, 0], tril[:, 1, 1] = output[:, 2].exp(), output[:, 3], output[:, 4].exp()
    h = torch.randn(4, 2)
    expected = torch.distributions.MultivariateNormal(output[:, :2], scale_tril=tril).log_prob(h)
    torch.testing.assert_close(log_q(guide, {"h": h}, v)["h"].detach(), expected)
    posterior = guide.posterior(v)
    torch.testing.assert_close(posterior["h"].log_prob(h), expected)
    second = tril @ tril.mT + output[:, :2, None] * output[:, None, :2]
    torch.testing.assert_close(posterior["h"].gram(), second.sum(0))


def test_it_reaches_the_posterior_of_a_linear_gaussian_program_and_mean_field_does_not():
    v = torch.randn(50, 3)
    gaps = []
    for encoder in (Joint(MLP(())), MLP(())):
        guide = Amortized(linear_gaussian, encoder)
        em = EM(linear_gaussian, guide, e_step=Gradient(Adam({"lr": 0.04}), 250), m_step=None)
        em.step(v)
        evidence = log_evidence(linear_gaussian, guide, v)
        assert evidence.exact
        gaps.append(float(evidence.gap.mean()))
    assert gaps[0] < 1e-3
    assert gaps[1] > 0.05


def test_a_table_of_states():
    v = torch.tensor([0.0, 1.0, 2.2])
    guide = set_up(sums, v, Joint())
    states = binary_states(3)
    expected = guide.encoders.h(v[:, None]).log_softmax(-1).T.detach()
    posterior = guide.posterior(v)
    found = torch.stack([log_q(guide, {"h": s.expand(3, 3)}, v)["h"].detach() for s in states])
    torch.testing.assert_close(found, expected)
    log_joint = program_log_joint(sums, {"h": states[:, None]}, v).detach()
    terms = elbo_terms(sums, guide, v)
    assert terms.exact
    torch.testing.assert_close(terms.bound, elbo(log_joint, expected.exp()))
    torch.testing.assert_close(posterior["h"].mean, expected.exp().T @ states)


def test_refine_regresses_a_table_on_the_exact_posterior():
    v = torch.tensor([0.0, 1.0, 2.0, 3.0])
    guide = Amortized(sums, Joint())
    em = EM(sums, guide, e_step=Refine(FixedPoint(), Adam({"lr": 0.05}), num_steps=120), m_step=None)
    for _ in range(2):
        em.step(v)
    evidence = log_evidence(sums, guide, v)
    assert float(evidence.gap.max()) < 0.01


def test_the_elbos_that_serve_it():
    v = torch.randn(5, 3)
    guide = set_up(linear_gaussian, v, Joint())
    for elbo_class in (Trace_ELBO, TraceMeanField_ELBO):
        svi = SVI(linear_gaussian, guide, Adam({"lr": 0.01}), elbo_class())
        svi.step(v)
    guide = set_up(sums, torch.tensor([0.0, 1.0]), Joint())
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().loss(sums, guide, torch.tensor([0.0, 1.0]))


def test_a_network_of_your_own_and_a_design():
    v = torch.randn(5, 3)
    network = nn.Linear(3, 5)
    guide = Amortized(linear_gaussian, Joint(network))
    guide.setup(v)
    assert guide.encoders.h is network
    with pytest.raises(
        ValueError, match=r"an encoder of 'h' with 5 outputs, the parameters of its factor, but got \(1, 4\)"
    ):
        Amortized(linear_gaussian, Joint(nn.Linear(3, 4))).setup(v)
    for given in (torch.tanh, AutoregressiveBernoulli(), Joint(), "MLP"):
        with pytest.raises(
            TypeError, match=r"Expected a network of parameters, its design, or None in Joint, but got \w+"
        ):
            Joint(given)

    class Half(PointEncoder):
        def forward(self, x):
            return x / 2

    with pytest.raises(TypeError, match=r"in Joint, but got Half"):
        Joint(Half())


def test_one_network_is_not_shared_by_two_latents():
    def two(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            g = pyro.sample("g", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h + g, 1.0).to_event(1), obs=v)

    v = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"one encoded latent for a single encoder, but got \['g', 'h'\]"):
        Amortized(two, Joint(nn.Linear(2, 5))).setup(v)
    guide = Amortized(two, Joint())
    guide.setup(v)
    assert guide.encoders.h is not guide.encoders.g


def test_too_many_states():
    def many(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([13]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 0.25), obs=v)

    guide = Amortized(many, Joint())
    with pytest.raises(
        ValueError, match=r"at most 4096 joint states for a Joint encoder, but got 13 units at 'h'\. Use Aut"
    ):
        guide(torch.randn(3))
    assert not guide.is_set_up
