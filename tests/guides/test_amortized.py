from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_ext import EM, Gradient, WakeSleep, elbo_terms, log_evidence
from pyro_ext.guides import Amortized, DefaultEncoder
from pyro_ext.models import BinarySparseCoding, GaussianMixture, HelmholtzMachine, SigmoidBeliefNetwork
from tests.oracles.enumeration import bernoulli_log_prob, binary_states, elbo, program_log_joint
from tests.oracles.wake_sleep import Network, expected_sleep

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def randomise(guide, scale=0.3):
    """Give every encoder and table of a set-up guide random weights."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=scale)
    return guide


def set_up(model, *args, **settings):
    guide = Amortized(model, **settings)
    guide.setup(*args)
    return randomise(guide)


def log_q(guide, values, *args, **kwargs):
    """log q of each site at given values, as the guide's own trace has it."""
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in values}


def normal(params):
    """The Normal of a row of parameters: means, then logarithms of scales."""
    mean, log_scale = params.chunk(2, -1)
    return dist.Normal(mean, log_scale.exp()).to_event(1)


def autoencoder(v):
    decoder = pyro.param("decoder", torch.tensor([[1.0, -0.5, 0.3, 0.7], [0.2, 1.1, -0.8, 0.4]]))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ decoder, 0.5).to_event(1), obs=v)


# ------------------------------------------------------------------------------------- what encoders put out


def kinds(v):
    """One latent of every kind, all children of the prior and parents of v."""
    with pyro.plate("data", len(v)):
        b = pyro.sample("b", dist.Bernoulli(0.3).expand([2]).to_event(1))
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        loc = b.sum(-1) + k[..., 1] + z + x.sum(-1) + p[..., 0]
        pyro.sample("v", dist.Normal(loc[..., None], s[..., None]).expand([3, 4]).to_event(1), obs=v)


def kinds_densities(guide, v, values):
    """log q of every site of `kinds`, from the encoders' outputs."""
    out = {name: getattr(guide.encoders, name)(v) for name in values}
    stick = torch.distributions.StickBreakingTransform()
    p = stick.inv(values["p"])
    return {
        "b": bernoulli_log_prob(values["b"], out["b"]),
        "k": (out["k"].log_softmax(-1) * values["k"]).sum(-1),
        "z": out["z"].log_softmax(-1).gather(-1, values["z"][:, None]).squeeze(-1),
        "x": normal(out["x"]).log_prob(values["x"]),
        "s": normal(out["s"]).log_prob(values["s"].log()[:, None]) - values["s"].log(),
        "p": normal(out["p"]).log_prob(p) - stick.log_abs_det_jacobian(p, values["p"]),
    }


def test_log_q_of_every_kind_of_latent_is_that_of_its_encoders_output():
    v = torch.randn(3, 4)
    guide = set_up(kinds, v)
    assert guide.is_static
    sizes = {name: (e.linear.in_features, e.linear.out_features) for name, e in guide.encoders.named_children()}
    assert sizes == {"b": (4, 2), "k": (4, 3), "z": (4, 3), "x": (4, 4), "s": (4, 2), "p": (4, 4)}
    trace = poutine.trace(guide).get_trace(v)
    values = {name: trace.nodes[name]["value"].detach() for name in sizes}
    expected = kinds_densities(guide, v, values)
    found = log_q(guide, values, v)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    posterior = guide.posterior(v)
    torch.testing.assert_close(posterior.log_prob(values), sum(expected.values()))
    torch.testing.assert_close(posterior["b"].mean, guide.encoders.b(v).sigmoid())
    torch.testing.assert_close(posterior["k"].probs, guide.encoders.k(v).softmax(-1))
    torch.testing.assert_close(posterior["z"].probs, guide.encoders.z(v).softmax(-1))
    posterior = randomise(guide, 0.05).posterior(v)
    mean, log_scale = guide.encoders.s(v).T
    torch.testing.assert_close(posterior["s"].mean, (mean + log_scale.exp() ** 2 / 2).exp(), rtol=1e-6, atol=0)


def test_draws_have_the_distribution_of_the_encoders_output():
    v = torch.randn(3, 4)
    guide = set_up(kinds, v)
    S = 4000
    with pyro.plate("particles", S, dim=-2):
        values = {name: value.detach() for name, value in guide(v).items()}
    for name, expected in {"b": guide.encoders.b(v).sigmoid(), "k": guide.encoders.k(v).softmax(-1)}.items():
        error = (expected * (1 - expected) / S).sqrt()
        assert values[name].shape == (S, 3) + expected.shape[1:]
        assert ((values[name].mean(0) - expected).abs() <= K * error).all()
    mean, log_scale = guide.encoders.s(v).T
    assert ((values["s"].log().mean(0) - mean).abs() <= K * log_scale.exp() / math.sqrt(S)).all()
    assert values["p"].sum(-1).allclose(torch.ones(S, 3))


def test_any_batch_size_and_new_data():
    first = torch.randn(6, 4)
    guide = set_up(autoencoder, first)
    for N in (1, 6, 11):
        v = torch.randn(N, 4)
        h = guide(v)["h"].detach()
        assert h.shape == (N, 2)
        torch.testing.assert_close(log_q(guide, {"h": h}, v)["h"], normal(guide.encoders.h(v)).log_prob(h))
        torch.testing.assert_close(guide.posterior(v)["h"].mean, guide.encoders.h(v)[:, :2])
        # The same shape, other values: nothing of the first call is remembered.
        other = torch.randn(N, 4)
        torch.testing.assert_close(guide.posterior(other)["h"].mean, guide.encoders.h(other)[:, :2])
        torch.testing.assert_close(log_q(guide, {"h": h}, other)["h"], normal(guide.encoders.h(other)).log_prob(h))
    with pyro.plate("particles", 5, dim=-2):
        assert guide(first)["h"].shape == (5, 6, 2)


def test_observed_classes_are_read_as_indicators():
    def words(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.4))
            pyro.sample(
                "v",
                dist.Categorical(logits=torch.outer(h, torch.arange(5.0))[:, None].expand(-1, 3, -1)).to_event(1),
                obs=v,
            )

    v = torch.randint(5, (4, 3))
    guide = set_up(words, v)
    assert guide.encoders.h.linear.in_features == 15
    x = nn.functional.one_hot(v, 5).double().reshape(4, 15)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, guide.encoders.h(x).sigmoid().squeeze(-1))
    h = guide(v)["h"]
    torch.testing.assert_close(log_q(guide, {"h": h}, v)["h"], bernoulli_log_prob(h[:, None], guide.encoders.h(x)))


def test_several_visible_sites_are_read_side_by_side():
    def pair(x, y):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((h + g)[:, None], 1.0).expand([len(x), 2]).to_event(1), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=h), obs=y)

    x, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    guide = set_up(pair, x, y.double())
    both = torch.cat([x, y[:, None].double()], -1)
    torch.testing.assert_close(guide.posterior(x, y.double())["h"].mean, guide.encoders.h(both)[:, 0])
    # "y" does not depend on g.
    torch.testing.assert_close(guide.posterior(x, y.double())["g"].mean, guide.encoders.g(x)[:, 0])


def test_a_latent_in_an_inner_plate_has_an_output_for_every_element():
    def program(v):
        with pyro.plate("data", len(v), dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.3).expand([2]).to_event(1))
                pyro.sample("v", dist.Normal(h + z.sum(-1), 1.0), obs=v)

    v = torch.randn(5, 3)
    guide = set_up(program, v)
    sizes = {name: (e.linear.in_features, e.linear.out_features) for name, e in guide.encoders.named_children()}
    assert sizes == {"h": (3, 2), "z": (3, 6)}
    trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h, z = (trace.nodes[name] for name in ("h", "z"))
    assert (h["value"].shape, z["value"].shape) == ((5, 1), (5, 3, 2))
    logits = guide.encoders.z(v).reshape(5, 3, 2)
    torch.testing.assert_close(z["log_prob"], bernoulli_log_prob(z["value"], logits))
    torch.testing.assert_close(h["log_prob"], normal(guide.encoders.h(v)).log_prob(h["value"])[:, None])
    new = torch.randn(2, 3)
    torch.testing.assert_close(guide.posterior(new)["z"].mean, guide.encoders.z(new).reshape(2, 3, 2).sigmoid())
    total = guide.posterior(v).log_prob({"h": h["value"], "z": z["value"]})
    torch.testing.assert_close(total, h["log_prob"].squeeze(-1) + z["log_prob"].sum(-1))


def test_a_program_without_plates_is_one_row():
    def schools(v):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        theta = pyro.sample("theta", dist.Normal(mu, 1.0).expand([4]).to_event(1))
        pyro.sample("v", dist.Normal(theta, 1.0).to_event(1), obs=v)

    v = torch.randn(4)
    guide = set_up(schools, v)
    x = v[None]
    mean = guide.posterior(v)["theta"].sample(3)
    assert mean.shape == (3, 4)
    theta, mu = torch.randn(4), torch.tensor(0.4)
    found = log_q(guide, {"theta": theta, "mu": mu}, v)
    torch.testing.assert_close(found["theta"], normal(guide.encoders.theta(x)).log_prob(theta).squeeze(0))
    torch.testing.assert_close(found["mu"], normal(guide.encoders.mu(theta[None])).log_prob(mu[None]).squeeze(0))


# ------------------------------------------------------------------------------------- layers, bottom up


def layers_by_hand(guide, v, h1, h2):
    return (
        bernoulli_log_prob(h1, guide.encoders.h1(v)),
        bernoulli_log_prob(h2, guide.encoders.h2(h1)),
    )


def network(num_rows=3):
    model = SigmoidBeliefNetwork([2, 3, 5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    v = model.dream(num_rows)
    return model, v, set_up(model, v)


def test_layers_are_read_from_the_bottom_up():
    _, v, guide = network()
    assert not guide.is_static
    assert [site.name for site in guide.order] == ["h1", "h2"]
    sizes = {name: (e.linear.in_features, e.linear.out_features) for name, e in guide.encoders.named_children()}
    assert sizes == {"h1": (5, 3), "h2": (3, 2)}
    total = torch.zeros(3)
    for s1, s2 in itertools.product(binary_states(3), binary_states(2)):
        h1, h2 = s1.expand(3, 3), s2.expand(3, 2)
        found = log_q(guide, {"h1": h1, "h2": h2}, v)
        expected = layers_by_hand(guide, v, h1, h2)
        torch.testing.assert_close(found["h1"], expected[0])
        torch.testing.assert_close(found["h2"], expected[1])
        joint = guide.posterior(v).log_prob({"h1": h1[None], "h2": h2[None]}).squeeze(0)
        torch.testing.assert_close(joint, sum(expected))
        total = total + joint.exp()
    torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.parametrize("nesting", [1, 2])
def test_layers_under_a_plate_of_particles(nesting):
    _, v, guide = network()
    with pyro.plate("particles", 7, dim=-nesting - 1):
        trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name]["value"] for name in ("h1", "h2"))
    lead = (7,) + (1,) * (nesting - 1)
    assert (h1.shape, h2.shape) == (lead + (3, 3), lead + (3, 2))
    assert len(torch.unique(h1.reshape(-1, 9), dim=0)) > 1
    for name, expected in zip(("h1", "h2"), layers_by_hand(guide, v, h1, h2), strict=True):
        torch.testing.assert_close(trace.nodes[name]["log_prob"], expected)


def test_layers_under_particles_and_an_inner_plate():
    def program(v):
        with pyro.plate("data", len(v), dim=-2):
            h2 = pyro.sample("h2", dist.Bernoulli(0.4).expand([2]).to_event(1))
            with pyro.plate("inner", 3, dim=-1):
                h1 = pyro.sample("h1", dist.Bernoulli(logits=h2).to_event(1))
                pyro.sample("v", dist.Normal(h1.sum(-1), 1.0), obs=v)

    v = torch.randn(4, 3)
    guide = set_up(program, v)
    with pyro.plate("particles", 7, dim=-3):
        trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name]["value"] for name in ("h1", "h2"))
    assert (h1.shape, h2.shape) == ((7, 4, 3, 2), (7, 4, 1, 2))
    found = trace.nodes["h2"]["log_prob"].squeeze(-1)
    torch.testing.assert_close(found, bernoulli_log_prob(h2.squeeze(-2), guide.encoders.h2(h1.reshape(7, 4, 6))))
    expected = bernoulli_log_prob(h1, guide.encoders.h1(v).reshape(4, 3, 2))
    torch.testing.assert_close(trace.nodes["h1"]["log_prob"], expected)


def test_layers_in_the_right_plate_of_two():
    """The rows' plate stands right of another: particles must still stand left of both."""

    def program(v):
        with pyro.plate("data", v.shape[1], dim=-1):
            h2 = pyro.sample("h2", dist.Bernoulli(0.4).expand([2]).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=h2).to_event(1))
            with pyro.plate("repeats", 3, dim=-2):
                pyro.sample("v", dist.Normal(h1.sum(-1), 1.0), obs=v)

    v = torch.randn(3, 4)
    guide = set_up(program, v)
    with pyro.plate("particles", 7, dim=-3):
        trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name]["value"] for name in ("h1", "h2"))
    assert (h1.shape, h2.shape) == ((7, 1, 4, 2), (7, 1, 4, 2))
    for name, expected in zip(("h1", "h2"), layers_by_hand(guide, v.mT, h1, h2), strict=True):
        torch.testing.assert_close(trace.nodes[name]["log_prob"], expected.detach())
    draws, log_density = guide.posterior(v).sample_with_log_prob(7)
    torch.testing.assert_close(log_density, sum(layers_by_hand(guide, v.mT, draws["h1"], draws["h2"])).detach())
    assert math.isfinite(
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2).loss(program, guide, v)
    )


def test_draws_of_a_layered_posterior():
    _, v, guide = network()
    S = 20_000
    draws, log_density = guide.posterior(v).sample_with_log_prob(S)
    torch.testing.assert_close(log_density, sum(layers_by_hand(guide, v, draws["h1"], draws["h2"])))
    states = binary_states(3)
    q1 = bernoulli_log_prob(states.unsqueeze(1), guide.encoders.h1(v)).exp()
    mean = torch.einsum("sn,sh->nh", q1, guide.encoders.h2(states).sigmoid())
    assert ((draws["h2"].mean(0) - mean).abs() <= K * (mean * (1 - mean) / S).sqrt()).all()
    posterior = guide.posterior(v)
    with pytest.raises(ValueError, match="Expected factors that do not depend on each other's values for an entropy"):
        posterior.entropy()


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("nesting", [1, 2])
def test_the_loss_of_a_layered_guide(elbo_class, nesting):
    model, v, guide = network()
    pairs = list(itertools.product(binary_states(3), binary_states(2)))
    h1, h2 = (torch.stack([pair[i] for pair in pairs]).unsqueeze(1).expand(-1, 3, -1) for i in (0, 1))
    log_joint = program_log_joint(model, {"h1": h1, "h2": h2}, v).detach()
    log_density = sum(layers_by_hand(guide, v, h1, h2)).detach()
    expected = -elbo(log_joint, log_density.exp()).sum().item()
    log_w = log_joint - log_density
    q = log_density.exp()
    variance = ((q * log_w**2).sum(0) - (q * log_w).sum(0) ** 2).sum().item()
    S = 3000
    loss = elbo_class(num_particles=S, vectorize_particles=True, max_plate_nesting=nesting)
    found = loss.loss_and_grads(model, guide, v)
    assert abs(found - expected) <= K * math.sqrt(variance / S)
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0) for p in guide.parameters())


# ------------------------------------------------------------------------------------- global latents


def scaled_autoencoder(v, batch_size=None):
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    decoder = torch.tensor([[1.0, -0.5, 0.3, 0.7], [0.2, 1.1, -0.8, 0.4]])
    with pyro.plate("data", len(v), subsample_size=batch_size) as rows:
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ decoder, sigma[..., None]).to_event(1), obs=v[rows])


def test_global_latents_have_a_table_and_local_ones_an_encoder():
    v = torch.randn(6, 4)
    guide = set_up(scaled_autoencoder, v)
    assert guide.is_static
    assert [name for name, _ in guide.encoders.named_children()] == ["h"]
    assert guide.tables.sigma.shape == (2,)
    loc, log_scale = guide.tables.sigma.detach()
    values = {"sigma": torch.tensor(0.7), "h": torch.randn(6, 2)}
    found = log_q(guide, values, v)
    torch.testing.assert_close(found["sigma"], dist.LogNormal(loc, log_scale.exp()).log_prob(values["sigma"]))
    torch.testing.assert_close(found["h"], normal(guide.encoders.h(v)).log_prob(values["h"]))
    posterior = guide.posterior(torch.randn(2, 4))
    assert posterior.rows.shape == ()
    torch.testing.assert_close(posterior["sigma"].mean, (loc + log_scale.exp() ** 2 / 2).exp())
    assert posterior["h"].mean.shape == (2, 2)
    Trace_ELBO(num_particles=3, vectorize_particles=True).loss_and_grads(scaled_autoencoder, guide, v)
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


def test_a_global_scale_is_learnt_from_minibatches():
    h = torch.randn(200, 2)
    decoder = torch.tensor([[1.0, -0.5, 0.3, 0.7], [0.2, 1.1, -0.8, 0.4]])
    v = h @ decoder + 0.4 * torch.randn(200, 4)
    guide = Amortized(scaled_autoencoder)
    svi = SVI(scaled_autoencoder, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(200):
        svi.step(v, 50)
    assert float(guide.posterior(v)["sigma"].mean) == pytest.approx(0.4, abs=0.1)
    # q of a row approaches its exact posterior, that of a linear Gaussian program.
    precision = decoder @ decoder.T / 0.16 + torch.eye(2)
    exact = v @ decoder.T / 0.16 @ torch.linalg.inv(precision)
    assert (guide.posterior(v)["h"].mean - exact).abs().mean() < 0.1


def mixture(v, enumerate_=None):
    """Weights and locations are latent, too."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 5.0)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0))
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": enumerate_})
        pyro.sample("v", dist.Normal(locs[z], 0.7), obs=v)


def test_a_mixture_with_global_parameters_under_enumeration():
    v = torch.cat([torch.randn(60) * 0.7 - 3, torch.randn(40) * 0.7 + 2])
    guide = Amortized(mixture)
    svi = SVI(mixture, guide, Adam({"lr": 0.04}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step(v, "parallel") for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert [name for name, _ in guide.encoders.named_children()] == ["z"]
    posterior = guide.posterior(v)
    locs, weights = posterior["locs"].mean, posterior["weights"].mean
    torch.testing.assert_close(locs, torch.tensor([-3.0, 2.0]), rtol=0, atol=0.4)
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.4]), rtol=0, atol=0.1)
    exact = (weights.log() + dist.Normal(locs, 0.7).log_prob(v[:, None])).softmax(-1)
    assert (posterior["z"].mean - exact).abs().mean() < 0.03
    assert (guide.posterior(torch.tensor([-3.0, 2.0]))["z"].mean.argmax(-1) == torch.tensor([0, 1])).all()


def test_enumeration_in_the_guide_is_exact():
    """With the globals held, TraceEnum's loss is -L by enumeration, without any error of sampling."""
    v = torch.randn(5)
    held = {"weights": torch.tensor([0.3, 0.7]), "locs": torch.tensor([-1.0, 1.0])}
    model = poutine.condition(mixture, data=held)
    guide = set_up(model, v)
    log_joint = held["weights"].log()[:, None] + dist.Normal(held["locs"][:, None], 0.7).log_prob(v)
    q = guide.encoders.z(v[:, None]).softmax(-1).T.detach()
    bound = elbo(log_joint, q).sum()
    bound = bound + dist.Dirichlet(torch.full((2,), 5.0)).log_prob(held["weights"])
    bound = bound + dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).log_prob(held["locs"]).sum()
    enumerating = set_up(model, v, "parallel")
    enumerating.load_state_dict(guide.state_dict())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, enumerating, v, "parallel")
    assert loss == pytest.approx(-bound.item(), rel=1e-9)
    # Without enumeration it is right up to the error of sampling.
    log_w = log_joint - q.log()
    variance = ((q * log_w**2).sum(0) - (q * log_w).sum(0) ** 2).sum().item()
    found = [Trace_ELBO().loss(model, guide, v) for _ in range(200)]
    assert abs(sum(found) / 200 + bound.item()) <= K * math.sqrt(variance / 200)


def test_a_global_latent_of_the_columns_is_no_latent_of_the_rows():
    """Probabilistic PCA with a latent W, a vector a column of the data."""

    def program(v):
        columns, rows = pyro.plate("columns", 4, dim=-1), pyro.plate("data", len(v), dim=-2)
        with columns:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with rows:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("v", dist.Normal(h * w, 1.0), obs=v)

    v = torch.randn(6, 4)
    guide = set_up(program, v)
    assert [name for name, _ in guide.encoders.named_children()] == ["h"]
    assert guide.tables.w.shape == (4, 2)
    new = torch.randn(3, 4)
    torch.testing.assert_close(guide.posterior(new)["h"].mean.squeeze(-1), guide.encoders.h(new)[:, 0])
    assert guide(new)["h"].shape == (3, 1)
    Trace_ELBO().loss_and_grads(program, guide, new)


def test_the_subsampled_plate_is_that_of_the_rows():
    """Even where the program enters the columns' plate first."""

    def program(v, batch_size):
        columns = pyro.plate("columns", 4, dim=-1)
        rows = pyro.plate("data", len(v), dim=-2, subsample_size=batch_size)
        with columns:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with rows:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with columns, rows as chosen:
            pyro.sample("v", dist.Normal(h * w, 1.0), obs=v[chosen])

    v = torch.randn(6, 4)
    guide = set_up(program, v, 3)
    assert [name for name, _ in guide.encoders.named_children()] == ["h"]
    assert guide.tables.w.shape == (4, 2)
    trace = poutine.trace(guide).get_trace(v, 3)
    trace.compute_log_prob()
    rows, h = trace.nodes["data"]["value"], trace.nodes["h"]
    expected = 2 * normal(guide.encoders.h(v[rows])).log_prob(h["value"])[:, None]
    torch.testing.assert_close(h["log_prob"], expected)


def test_a_table_of_a_subsampled_global_plate_is_read_by_its_rows():
    """Rows belong to groups, which have latents of their own, and the columns' plate is subsampled."""

    def program(v, columns):
        with pyro.plate("columns", 4, dim=-1, subsample=columns):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(v), dim=-2, subsample=torch.arange(len(v))):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("columns_again", 2, dim=-1):
                pyro.sample("v", dist.Normal(h * w, 1.0), obs=v)

    v, columns = torch.randn(6, 2), torch.tensor([3, 1])
    guide = set_up(program, v, columns)
    assert guide.tables.w.shape == (4, 2)
    torch.testing.assert_close(guide.posterior(v, columns)["w"].mean, guide.tables.w[columns, 0].detach())
    values = {"w": torch.randn(1, 2), "h": torch.randn(6, 1)}
    expected = 4 / 2 * normal(guide.tables.w[columns]).log_prob(values["w"].T)
    torch.testing.assert_close(log_q(guide, values, v, columns)["w"].squeeze(0), expected)


# ------------------------------------------------------------------------------------- minibatches


def subsampled(x, batch_size):
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x[rows])


def given(x, rows):
    with pyro.plate("data", len(x), subsample=rows):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x[rows])


def test_the_rows_that_the_guide_draws_are_the_models():
    x = torch.randn(10, 3)
    guide = set_up(subsampled, x, 4)
    seen = set()
    for _ in range(6):
        guide_trace = poutine.trace(guide).get_trace(x, 4)
        model_trace = poutine.trace(poutine.replay(subsampled, trace=guide_trace)).get_trace(x, 4)
        rows = guide_trace.nodes["data"]["value"]
        assert torch.equal(model_trace.nodes["data"]["value"], rows)
        guide_trace.compute_log_prob()
        h = guide_trace.nodes["h"]
        torch.testing.assert_close(h["log_prob"], 10 / 4 * normal(guide.encoders.h(x[rows])).log_prob(h["value"]))
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 1
    Trace_ELBO(num_particles=3, vectorize_particles=True).loss_and_grads(subsampled, guide, x, 4)
    assert guide.posterior(x, 4)["h"].mean.shape == (4, 2)


@pytest.mark.parametrize("rows", [[7, 2, 5], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]], ids=["some", "all in another order"])
def test_the_rows_that_the_model_was_given(rows):
    x, rows = torch.randn(10, 3), torch.tensor(rows)
    guide = set_up(given, x, torch.tensor([0, 1, 2]))
    for chosen in (rows, rows.flip(0)):
        h = torch.randn(len(rows), 2)
        expected = normal(guide.encoders.h(x[chosen])).log_prob(h) * 10 / len(rows)
        torch.testing.assert_close(log_q(guide, {"h": h}, x, chosen)["h"], expected)
        torch.testing.assert_close(guide.posterior(x, chosen)["h"].mean, guide.encoders.h(x[chosen])[:, :2])


def test_a_minibatch_as_the_argument():
    def model(x, size):
        with pyro.plate("data", size, subsample_size=len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)

    x = torch.randn(10, 3)
    guide = set_up(model, x[:4], 10)
    for batch in (x[4:8], x[8:]):
        h = torch.randn(len(batch))
        expected = normal(guide.encoders.h(batch)).log_prob(h[:, None]) * 10 / len(batch)
        torch.testing.assert_close(log_q(guide, {"h": h}, batch, 10)["h"], expected)
        torch.testing.assert_close(guide.posterior(batch, 10)["h"].mean, guide.encoders.h(batch)[:, 0])


# ------------------------------------------------------------------------------------- dreams


def dreams_program(net, size=None):
    def model(v):
        with pyro.plate("data", len(v), subsample_size=size) as rows:
            h = pyro.sample("h", dist.Bernoulli(logits=net.c).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=h @ net.W.T + net.b).to_event(1), obs=v[rows])

    return model


@pytest.mark.parametrize("size", [None, 4])
def test_dreams_of_wake_sleep_reach_the_encoder(size):
    net = Network.random(num_visible=4, num_latents=3)
    encoder = nn.Linear(4, 3)
    with torch.no_grad():
        encoder.weight.copy_(net.R)
        encoder.bias.copy_(net.r)
    for parameter in net.parameters().values():
        parameter.requires_grad_()
    expected = torch.autograd.grad(expected_sleep(net), [net.R, net.r])
    for parameter in net.parameters().values():
        parameter.requires_grad_(False)

    N = 40
    model = dreams_program(net, size)
    guide = Amortized(model, encoder)
    v = torch.zeros(N, 4)  # data that dreams are unlike
    loss, found = WakeSleep(), []
    for _ in range(300):
        loss.loss_and_grads(model, guide, v)
        found.append((encoder.weight.grad / N, encoder.bias.grad / N))
        encoder.weight.grad = encoder.bias.grad = None
    for position, wanted in enumerate(expected):
        samples = torch.stack([grads[position] for grads in found])
        error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - wanted).abs() <= K * error).all()


def test_wake_sleep_trains_a_layered_network():
    model, v, guide = network(50)
    svi = SVI(model, guide, Adam({"lr": 0.02}), WakeSleep())
    before = -elbo_terms(model, guide, v, num_samples=200).bound.mean().item()
    for _ in range(100):
        svi.step(v)
    after = elbo_terms(model, guide, v, num_samples=200)
    assert -after.bound.mean().item() < before - 0.5
    assert not after.exact


# ------------------------------------------------------------------------------------- encoders of the user's own


def test_an_encoder_of_the_users_own():
    encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    guide = Amortized(autoencoder, encoder)
    v = torch.randn(5, 4)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, encoder(v)[:, :2])
    svi = SVI(autoencoder, guide, Adam({"lr": 0.01}), Trace_ELBO())
    before = encoder[0].weight.clone()
    svi.step(v)
    assert not torch.equal(encoder[0].weight, before)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, encoder(v)[:, :2])


def test_a_mapping_of_encoders_leaves_the_others_their_default():
    model, v, _ = network()
    encoder = nn.Linear(3, 2)
    guide = Amortized(model, {"h2": encoder})
    guide.setup(v)
    assert guide.encoders.h2 is encoder
    assert isinstance(guide.encoders.h1, DefaultEncoder)
    assert guide(v)["h2"].shape == (3, 2)


def test_an_encoder_always_gets_rows():
    class Rows(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(inputs)
            self.shapes = []

        def forward(self, x):
            self.shapes.append(tuple(x.shape))
            return self.linear(self.norm(x))

    model, v, _ = network()
    encoders = {"h1": Rows(5, 3), "h2": Rows(3, 2)}
    guide = Amortized(model, encoders)
    guide.setup(v)
    # Trying the encoders out left their running means alone, and their mode.
    assert all(torch.equal(e.norm.running_mean, torch.zeros(e.norm.num_features)) for e in encoders.values())
    assert all(e.training and e.norm.training for e in encoders.values())
    with pyro.plate("particles", 7, dim=-2):
        guide(v)
    assert [encoders[name].shapes[-1] for name in ("h1", "h2")] == [(3, 5), (21, 3)]
    assert encoders["h2"].norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            lambda: nn.Linear(3, 4),
            r"an encoder of 'h' that reads 4 features, but it failed: .*\. Its input is \(R, 4\)\.",
        ),
        (
            lambda: nn.Linear(4, 3),
            r"an encoder of 'h' with 4 outputs, the parameters of its factor, but got \(1, 3\)\. Let its",
        ),
        (lambda: nn.LSTM(4, 4), r"an encoder of 'h' with 4 outputs, the parameters of its factor, but got tuple\."),
        (lambda: {"h": nn.Linear(4, 5)}, r"with 4 outputs, the parameters of its factor, but got \(1, 5\)\."),
        (
            lambda: {"g": nn.Linear(4, 4)},
            r"Expected encoders for the latents \['h'\], but got one for 'g'\. Name a latent",
        ),
    ],
)
def test_encoders_that_do_not_fit(encoder, message):
    guide = Amortized(autoencoder, encoder())
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            guide(torch.randn(5, 4))
    assert not guide.is_set_up
    assert not list(guide.parameters())


def test_encoders_that_are_none():
    for encoder in (torch.tanh, {"h": torch.tanh}, "linear"):
        with pytest.raises(TypeError, match=r"Expected an nn.Module, an EncoderDesign or a mapping .*, but got \w+\."):
            Amortized(autoencoder, encoder)


def test_one_encoder_for_two_latents_is_refused():
    model, v, _ = network()
    with pytest.raises(
        ValueError, match=r"one encoded latent for a single encoder, but got \['h1', 'h2'\]\. Pass a map"
    ):
        Amortized(model, nn.Linear(5, 3)).setup(v)


def test_a_global_latent_takes_no_encoder():
    with pytest.raises(ValueError, match=r"Expected encoders for the latents \['h'\], but got one for 'sigma'\."):
        Amortized(scaled_autoencoder, {"sigma": nn.Linear(4, 2)}).setup(torch.randn(3, 4))


# ------------------------------------------------------------------------------------- the visible argument


def logged(x, other=None):
    """Observes a number that no argument holds."""
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=x.log())


def test_an_argument_that_cannot_be_found_is_asked_for():
    x = torch.rand(5) + 0.1
    with pytest.raises(
        ValueError, match=r"an argument to carry the visible site 'v', but got none.*`visible=\{'v': 'arg"
    ):
        Amortized(logged).setup(x)
    guide = set_up(logged, x, visible={"v": "x"})
    h = torch.randn(5)
    expected = normal(guide.encoders.h(x[:, None])).log_prob(h[:, None])
    torch.testing.assert_close(log_q(guide, {"h": h}, x)["h"], expected)
    torch.testing.assert_close(guide.posterior(x).log_prob({"h": h}), expected)
    assert set_up(logged, x, visible={"v": 0}).posterior(x)["h"].mean.shape == (5,)
    with pytest.raises(ValueError, match=r"Expected `visible` to name visible sites of the model, but got \['w'\]"):
        Amortized(logged, visible={"w": "x"}).setup(x)


def test_data_inside_other_arguments():
    def model(batch, *, weight=1.0):
        x = batch["x"].reshape(len(batch["x"]), -1)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(weight * h[:, None], 1.0).expand([len(x), 6]).to_event(1), obs=x)

    batch = {"x": torch.randn(5, 2, 3), "id": torch.arange(5)}
    guide = set_up(model, batch)
    torch.testing.assert_close(guide.posterior(batch)["h"].mean, guide.encoders.h(batch["x"].reshape(5, 6))[:, 0])


def test_factors_alone_give_an_encoder_nothing_to_read():
    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("v", -((h - x) ** 2))

    with pytest.raises(
        ValueError, match=r"Expected visible data for an encoder to read, but got only the factors \['v'\]"
    ):
        Amortized(model).setup(torch.randn(3))

    def both(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("extra", -(h**2))
            pyro.sample("v", dist.Normal(h, 1.0), obs=x)

    x = torch.randn(3)
    guide = set_up(both, x)
    torch.testing.assert_close(guide.posterior(x)["h"].mean, guide.encoders.h(x[:, None])[:, 0])


def test_what_a_mask_hides_is_read_as_zero():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            obs = dist.Normal(h[:, None], 1.0).expand([len(x), 3]).mask(mask).to_event(1)
            pyro.sample("v", obs, obs=x)

    x, mask = torch.randn(5, 3), torch.rand(5, 3) < 0.6
    missing = torch.where(mask, x, torch.full_like(x, math.nan))
    guide = set_up(model, missing, mask)
    expected = guide.encoders.h(torch.where(mask, x, torch.zeros_like(x)))
    torch.testing.assert_close(guide.posterior(missing, mask)["h"].mean, expected[:, 0])
    h = torch.randn(5)
    torch.testing.assert_close(log_q(guide, {"h": h}, missing, mask)["h"], normal(expected).log_prob(h[:, None]))
    # Another mask of the same shape is another call.
    other = mask.flip(0)
    expected = guide.encoders.h(torch.where(other, x, torch.zeros_like(x)))
    torch.testing.assert_close(log_q(guide, {"h": h}, x, other)["h"], normal(expected).log_prob(h[:, None]))
    # Whatever stands there, the gradient is the same.
    grads = []
    for garbage in (0.0, 1e6):
        pyro.set_rng_seed(1)
        Trace_ELBO().loss_and_grads(model, guide, torch.where(mask, x, torch.full_like(x, garbage)), mask)
        grads.append([p.grad.clone() for p in guide.parameters()])
        guide.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_class_that_a_mask_hides_is_none():
    def model(z, mask):
        with pyro.plate("data", len(z)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            logits = (h[..., None, None] * torch.arange(3.0)).expand(h.shape + (2, 3))
            pyro.sample("z", dist.Categorical(logits=logits).mask(mask).to_event(1), obs=z)

    z, mask = torch.randint(3, (5, 2)), torch.rand(5, 2) < 0.5
    guide = set_up(model, z, mask)
    x = nn.functional.one_hot(z, 3) * mask[..., None]
    torch.testing.assert_close(
        guide.posterior(z, mask)["h"].mean, guide.encoders.h(x.double().reshape(5, 6))[:, 0].detach()
    )


def test_nan_in_the_data_is_refused_and_nothing_changes():
    v = torch.randn(5, 4)
    v[2, 1] = math.nan
    guide = Amortized(autoencoder)
    with pytest.raises(ValueError, match=r"Expected finite values at the visible site 'v', but got nan at \(2, 1\)"):
        guide.posterior(v)
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())


# ------------------------------------------------------------------------------------- inside Pyro


def test_parameters_stand_in_the_store_under_the_guides_name():
    guide = Amortized(scaled_autoencoder, name="recognition")
    v = torch.randn(5, 4)
    guide(v)
    names = {f"recognition.encoders.h$$${n}" for n, _ in guide.encoders.h.named_parameters()}
    assert set(pyro.get_param_store()) == names | {"recognition.tables.sigma"}
    assert names <= {f"recognition.encoders.h$$${n}" for n in guide.encoders.h.state_dict()}


def test_two_guides_do_not_share():
    v = torch.randn(5, 4)
    first, second = Amortized(autoencoder), Amortized(autoencoder)
    first(v), second(v)
    assert len(set(pyro.get_param_store()) - {"decoder"}) == 2 * len(list(first.parameters()))
    before = second.posterior(v)["h"].mean
    svi = SVI(autoencoder, first, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(v)
    assert torch.equal(second.posterior(v)["h"].mean, before)
    assert not torch.equal(first.posterior(v)["h"].mean, before)
    with pytest.raises(ValueError, match=r"Expected a name that no other live module holds, but got 'Amortized'\."):
        Amortized(autoencoder, name="Amortized")


def test_the_posterior_reads_the_parameters_that_a_call_does():
    """Pyro's store wins over a module's own parameters, after a load for example."""
    v = torch.randn(5, 4)
    guide = set_up(scaled_autoencoder, v, name="recognition")
    guide(v)
    state = pyro.get_param_store().get_state()
    params = {name: torch.randn_like(value) for name, value in state["params"].items()}
    pyro.get_param_store().set_state({"params": params, "constraints": state["constraints"]})
    loc, log_scale = params["recognition.tables.sigma"]
    posterior = guide.posterior(v)
    torch.testing.assert_close(posterior["sigma"].distribution.base_dist.mean, loc)
    values = {"sigma": torch.tensor(0.7), "h": torch.randn(5, 2)}
    found = log_q(guide, values, v)
    torch.testing.assert_close(found["sigma"], dist.LogNormal(loc, log_scale.exp()).log_prob(values["sigma"]))
    torch.testing.assert_close(posterior.log_prob(values), found["sigma"] + found["h"].sum())
    assert not posterior["sigma"].mean.requires_grad


def test_a_posterior_registers_nothing():
    guide = Amortized(scaled_autoencoder)
    guide.posterior(torch.randn(5, 4))
    assert not list(pyro.get_param_store())


def test_predictive_and_other_handlers():
    v = torch.randn(5, 4)
    guide = set_up(autoencoder, v)
    for parallel in (False, True):
        draws = Predictive(poutine.uncondition(autoencoder), guide=guide, num_samples=50, parallel=parallel)(v)
        assert draws["v"].shape == (50, 5, 4)
    with poutine.trace() as outside:
        poutine.block(guide)(v)
    assert not outside.trace.nodes.keys() - {"_INPUT", "_RETURN"}
    scaled = poutine.trace(poutine.scale(guide, scale=0.5)).get_trace(v)
    scaled.compute_log_prob()
    h = scaled.nodes["h"]["value"]
    expected = normal(guide.encoders.h(v)).log_prob(h)
    torch.testing.assert_close(scaled.nodes["h"]["log_prob"], 0.5 * expected)
    replayed = poutine.trace(poutine.replay(guide, trace=scaled)).get_trace(v)
    assert replayed.nodes["h"]["value"] is h
    lifted = poutine.trace(poutine.mask(guide, mask=torch.arange(5) < 2)).get_trace(v)
    lifted.compute_log_prob()
    assert (lifted.nodes["h"]["log_prob"][2:] == 0).all()


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO])
def test_a_continuous_guide_under_pyros_elbos(elbo_class):
    v = torch.randn(5, 4)
    guide = set_up(autoencoder, v)
    settings = {"alpha": 0.5} if elbo_class is RenyiELBO else {}
    svi = SVI(autoencoder, guide, Adam({"lr": 0.02}), elbo_class(num_particles=2, **settings))
    losses = [svi.step(v) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 50


def test_a_discrete_guide_is_refused_under_trace_mean_field():
    model = GaussianMixture(num_components=2, num_visible=3)
    v = model.dream(5)
    guide = Amortized(model)
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().loss(model, guide, v)
    # Without validation Pyro would go on with a wrong gradient.
    pyro.enable_validation(False)
    with pytest.raises(ValueError, match="Expected reparametrised factors under TraceMeanField_ELBO"):
        TraceMeanField_ELBO().loss(model, guide, v)


# ------------------------------------------------------------------------------------- EM


def test_gradient_em_uses_the_exact_bound_of_a_static_guide():
    model = BinarySparseCoding(num_visible=5, num_latents=3)
    v = model.dream(20)
    guide = set_up(model, v)
    states = binary_states(3)
    log_joint = program_log_joint(model, {"h": states.unsqueeze(1)}, v).detach()

    def exact():
        log_density = bernoulli_log_prob(states.unsqueeze(1), guide.encoders.h(v))
        return (log_density.exp() * (log_joint - log_density)).sum()

    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.01})), m_step=None)
    assert em.evaluate_loss(v) == pytest.approx(-exact().item(), rel=1e-10)
    expected = torch.autograd.grad(-exact(), list(guide.parameters()))
    before = [p.detach().clone() for p in guide.parameters()]
    theta = [p.detach().clone() for p in model.parameters()]
    loss = em.step(v)
    for p, start, gradient in zip(guide.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.01 * gradient / (gradient.abs() + 1e-8), rtol=1e-6, atol=1e-9)
    assert loss == pytest.approx(-exact().item(), rel=1e-10)  # after the E half-step
    assert all(torch.equal(a, b) for a, b in zip(theta, model.parameters(), strict=True))
    for _ in range(100):
        em.step(v)
    assert em.evaluate_loss(v) < loss - 1
    assert em.infer(v[:2])["h"].mean.shape == (2, 3)


def test_gradient_em_of_a_layered_guide_is_sampled():
    model, v, guide = network(30)
    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.02}), num_particles=50), m_step=Gradient(Adam({"lr": 0.02})))
    first = em.step(v)
    for _ in range(100):
        em.step(v)
    assert em.evaluate_loss(v) < first


def test_the_bound_stays_below_the_evidence_and_approaches_it():
    model = GaussianMixture(num_components=3, num_visible=2)
    v = model.dream(60)
    guide = Amortized(model)
    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.05}), num_steps=200), m_step=None)
    start = em.evaluate_loss(v)
    em.step(v)
    evidence = log_evidence(model, guide, v)
    assert evidence.exact
    assert (evidence.gap > 0).all()
    assert float(evidence.gap.mean()) < 0.02 + 0.1 * (start / 60 + evidence.mean)


def test_a_helmholtz_machine_learns_by_svi():
    model = HelmholtzMachine(num_visible=6, num_latents=2)
    v = (torch.rand(50, 1) < 0.5).double().expand(50, 6).contiguous()
    guide = Amortized(model)
    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    before = elbo_terms(model, guide, v, num_samples=100).bound.mean()
    for _ in range(200):
        svi.step(v)
    after = elbo_terms(model, guide, v, num_samples=100).bound.mean()
    # Half the rows are zeros and half are ones: no model gives more than -log 2 a row.
    assert before + 2 < after < -math.log(2)
