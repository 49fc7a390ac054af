"""q(h | v) = prod_i q(h_i | h_<i, v) over binary units."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam, ClippedAdam
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext import EM, FixedPoint, Gradient, Refine, WakeSleep, elbo_terms, log_evidence
from pyro_ext.guides import Amortized
from pyro_ext.guides.autoregressive import AutoregressiveBernoulli
from pyro_ext.guides.encoders import MLP
from pyro_ext.guides.flows import ConditionalFlow
from pyro_ext.models import SigmoidBeliefNetwork
from tests.oracles.enumeration import bernoulli_log_prob, binary_states, elbo, factorial_posterior, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def explaining_away(v):
    """v is the number of units that are on, but for noise: given v they compete."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.25), obs=v)


def randomised(model, *args, scale=1.0, encoder=None):
    """Random weights, of such a size that units depend on each other and none is certain."""
    guide = Amortized(model, AutoregressiveBernoulli() if encoder is None else encoder)
    guide.setup(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=scale * (1 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5))
    return guide


def log_density_by_hand(encoder, x, states):
    """log q of states (S, H) for rows (N, D): unit after unit, each from a vector in which later ones are 0."""
    output = encoder.base(x)
    H = states.shape[1]
    logits, context = output[:, :H], output[:, H:]
    total = torch.zeros(len(states), len(x))
    for unit in range(H):
        before = torch.zeros(len(states), len(x), H)
        before[..., :unit] = states[:, None, :unit]
        found = encoder.network(before, context.expand(len(states), -1, -1)) + logits
        total = total + bernoulli_log_prob(states[:, None, unit : unit + 1], found[..., unit : unit + 1])
    return total


def test_probabilities_of_all_states_sum_to_one_and_are_those_of_the_network():
    v = torch.tensor([0.0, 1.2, -0.4, 3.0])
    guide = randomised(explaining_away, v)
    states = binary_states(3)
    marginal = guide.posterior(v)["h"]
    found = marginal.log_prob(states[:, None])
    torch.testing.assert_close(found, log_density_by_hand(guide.encoders.h, v[:, None], states).detach())
    torch.testing.assert_close(found.exp().sum(0), torch.ones(4))
    assert not found.requires_grad
    # It is no product: the log-odds of a unit move with those before it.
    table = found.exp().reshape(2, 2, 2, 4)
    first = table.sum((1, 2))[1]
    both = table[1, 1].sum(0)
    assert ((both - first * table.sum((0, 2))[1]).abs() > 1e-3).any()


def test_draws_have_the_probabilities_of_log_prob():
    v = torch.tensor([0.0, 1.2])
    guide = randomised(explaining_away, v)
    S = 20_000
    posterior = guide.posterior(v)
    values, log_q = posterior.sample_with_log_prob(S)
    states = binary_states(3)
    probs = posterior["h"].log_prob(states[:, None]).exp()
    assert (probs > 0.01).sum() > 6
    counts = (values["h"][:, None] == states[None, :, None]).all(-1).double().mean(0)
    assert ((counts - probs).abs() <= K * (probs * (1 - probs) / S).sqrt()).all()
    torch.testing.assert_close(log_q, posterior["h"].log_prob(values["h"]))
    with pyro.plate("particles", 4000, dim=-2):
        h = guide(v)["h"]
    assert h.shape == (4000, 2, 3)
    error = (probs * (1 - probs) / 4000).sqrt()
    counts = (h[:, None] == states[None, :, None]).all(-1).double().mean(0)
    assert ((counts - probs).abs() <= K * error).all()


def test_it_starts_at_the_prior():
    v = torch.tensor([0.0, 1.2])
    guide = Amortized(explaining_away, AutoregressiveBernoulli())
    states = binary_states(3)
    expected = bernoulli_log_prob(states, torch.tensor(0.3).logit())[:, None].expand(-1, 2)
    torch.testing.assert_close(guide.posterior(v)["h"].log_prob(states[:, None]), expected)


def best_factorised(log_joint, num_units):
    """The largest L of any product of Bernoullis, per row: coordinate ascent from many starts."""
    states = binary_states(num_units)
    N = log_joint.shape[1]
    means = torch.rand(24, N, num_units)
    best = torch.full((N,), -math.inf)
    for _ in range(40):
        for unit in range(num_units):
            others = [u for u in range(num_units) if u != unit]
            s = states[:, None, None, :]
            weight = (s * means + (1 - s) * (1 - means))[..., others].prod(-1)
            on = states[:, unit].bool()
            field = (weight * log_joint[:, None])[on].sum(0) - (weight * log_joint[:, None])[~on].sum(0)
            means[..., unit] = field.sigmoid()
    for start in means:
        best = torch.maximum(best, elbo(log_joint, factorial_posterior(start)))
    return best


def test_exact_wake_phi_steps_reach_the_evidence_where_no_factorised_q_can():
    """-E_{p(h|v)}[log q(h|v)], what the wake and sleep phases of phi estimate, summed over all states."""
    v = torch.tensor([0.0, 1.0, 2.0, 3.0])
    guide = Amortized(explaining_away, AutoregressiveBernoulli())
    guide.setup(v)
    states = binary_states(3)
    log_joint = program_log_joint(explaining_away, {"h": states[:, None]}, v).detach()
    target = log_joint.softmax(0)
    optim = torch.optim.Adam(guide.parameters(), lr=0.03)
    for step in range(400):
        optim.param_groups[0]["lr"] = 0.03 * 0.99 ** max(0, step - 200)
        loss = -(target * guide.encoders.h(v[:, None]).log_prob(states[:, None])).sum()
        optim.zero_grad()
        loss.backward()
        optim.step()
    evidence = log_joint.logsumexp(0)
    found = elbo(log_joint, guide.posterior(v)["h"].log_prob(states[:, None]).exp())
    assert ((evidence - found) >= -1e-10).all()
    assert (evidence - found < 2e-3).all()
    factorised = best_factorised(log_joint, 3)
    assert (evidence - factorised)[1:3].min() > 0.9  # log 3, nearly: one of the three units is chosen
    # The guide's own reports agree, up to their standard errors.
    terms = elbo_terms(explaining_away, guide, v, num_samples=2000)
    assert not terms.exact
    assert ((terms.bound - found).abs() <= K * terms.standard_error + 1e-9).all()
    torch.testing.assert_close(log_evidence(explaining_away, guide, v).mean, float(evidence.mean()), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_wake_sleep_reaches_what_no_factorised_q_can():
    with torch.no_grad():
        v = poutine.trace(poutine.uncondition(explaining_away)).get_trace(torch.zeros(200)).nodes["v"]["value"]
    guide = Amortized(explaining_away, AutoregressiveBernoulli(base=MLP((32,))))
    optim = ClippedAdam({"lr": 0.03, "lrd": 0.985})
    svi = SVI(explaining_away, guide, optim, WakeSleep())
    for _ in range(160):
        svi.step(v)
    states = binary_states(3)
    log_joint = program_log_joint(explaining_away, {"h": states[:, None]}, v).detach()
    found = elbo(log_joint, guide.posterior(v)["h"].log_prob(states[:, None]).exp())
    gap = (log_joint.logsumexp(0) - found).mean()
    factorised = (log_joint.logsumexp(0) - best_factorised(log_joint, 3)).mean()
    assert factorised > 0.5
    assert gap < 0.15


def test_trace_elbo_estimates_the_gradient_of_the_exact_bound():
    v = torch.tensor([0.2, 1.2])
    guide = randomised(explaining_away, v, scale=0.5)
    states = binary_states(3)
    log_joint = program_log_joint(explaining_away, {"h": states[:, None]}, v).detach()
    log_q = guide.encoders.h(v[:, None]).log_prob(states[:, None])
    expected = torch.autograd.grad((log_q.exp() * (log_q - log_joint)).sum(), list(guide.parameters()))
    scale = torch.cat([g.flatten() for g in expected])
    for elbo_class in (Trace_ELBO, TraceGraph_ELBO):
        loss, found = elbo_class(num_particles=50, vectorize_particles=True, max_plate_nesting=1), []
        for _ in range(60):
            loss.loss_and_grads(explaining_away, guide, v)
            found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
            guide.zero_grad()
        samples = torch.stack(found)
        error = samples.std(0) / math.sqrt(len(samples))
        live = error > 0
        assert ((samples.mean(0) - scale).abs()[live] <= K * error[live]).all()
        assert scale[~live].abs().max() < 1e-12
        # The error is small against the gradient, or the test would see nothing.
        assert error.norm() < 0.4 * scale.norm()


def test_enumeration_and_mean_field_elbos_are_refused():
    v = torch.tensor([0.2, 1.2])
    guide = randomised(explaining_away, v)
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        TraceMeanField_ELBO().loss(explaining_away, guide, v)
    # Not enumerated, it is a site like others.
    with pytest.warns(UserWarning, match="found no sample sites configured for enumeration"):
        assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(explaining_away, guide, v))
    pyro.enable_validation(False)
    with pytest.raises(ValueError, match="Expected reparametrised factors under TraceMeanField_ELBO"):
        TraceMeanField_ELBO().loss(explaining_away, guide, v)


def test_layers_each_of_which_is_autoregressive():
    model = SigmoidBeliefNetwork([2, 3, 5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    v = model.dream(3)
    guide = randomised(model, v)
    assert [site.name for site in guide.order] == ["h1", "h2"]
    with pyro.plate("particles", 7, dim=-3):
        trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name]["value"] for name in ("h1", "h2"))
    assert (h1.shape, h2.shape) == ((7, 1, 3, 3), (7, 1, 3, 2))
    states1, states2 = binary_states(3), binary_states(2)
    table1 = log_density_by_hand(guide.encoders.h1, v, states1)
    table2 = log_density_by_hand(guide.encoders.h2, states1, states2)
    index1 = (h1 @ torch.tensor([4.0, 2.0, 1.0])).long().squeeze(1)
    index2 = (h2 @ torch.tensor([2.0, 1.0])).long().squeeze(1)
    torch.testing.assert_close(trace.nodes["h1"]["log_prob"].squeeze(1), table1[index1, torch.arange(3)])
    torch.testing.assert_close(trace.nodes["h2"]["log_prob"].squeeze(1), table2[index2, index1])
    # The posterior knows the same joint, and sums to one.
    posterior = guide.posterior(v)
    total = torch.zeros(3)
    for i, s1 in enumerate(states1):
        for j, s2 in enumerate(states2):
            values = {"h1": s1.expand(1, 3, 3), "h2": s2.expand(1, 3, 2)}
            log_q = posterior.log_prob(values).squeeze(0)
            torch.testing.assert_close(log_q, (table1[i] + table2[j, i]).detach())
            total = total + log_q.exp()
    torch.testing.assert_close(total, torch.ones(3))
    torch.testing.assert_close(posterior["h1"].log_prob(states1[:, None]), table1.detach())
    with pytest.raises(
        ValueError, match=r"encoder reads visible data alone, but 'h2' has one that reads other latents"
    ):
        posterior["h2"].log_prob(states2[:, None])
    for name in ("h1", "h2"):
        with pytest.raises(ValueError, match=rf"a mean in closed form, but got the density encoder of '{name}'"):
            _ = posterior[name].mean
    svi = SVI(model, guide, Adam({"lr": 0.01}), WakeSleep(num_particles=4, insomnia=0.5))
    assert math.isfinite(svi.step(v))


def test_what_has_no_closed_form_is_refused_and_draws_are_pointed_at():
    v = torch.tensor([0.2, 1.2])
    guide = randomised(explaining_away, v)
    posterior = guide.posterior(v)
    message = r"but got the density encoder of 'h'\. Average over draws"
    for ask in (
        lambda: posterior["h"].mean,
        lambda: posterior["h"].probs,
        lambda: posterior["h"].gram(),
        lambda: posterior["h"].cross(v[:, None]),
        lambda: posterior["h"].entropy(),
        lambda: posterior.entropy(),
        lambda: posterior.mode(),
        lambda: guide.median(v),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_what_needs_closed_forms_refuses_the_guide():
    v = torch.tensor([0.2, 1.2])
    guide = randomised(explaining_away, v)
    before = [p.detach().clone() for p in guide.parameters()]
    with pytest.raises(TypeError, match=r"Expected a guide with a table .* for FixedPoint, but got Amortized"):
        EM(explaining_away, guide, e_step=FixedPoint(), m_step=None)
    with pytest.raises(TypeError, match=r"for Refine, but got a guide with"):
        EM(explaining_away, guide, e_step=Refine(FixedPoint(), Adam({"lr": 0.1})), m_step=None)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_gradient_em_is_sampled():
    v = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(5)
    guide = Amortized(explaining_away, AutoregressiveBernoulli())
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True)
    em = EM(explaining_away, guide, e_step=Gradient(Adam({"lr": 0.02}), 40, loss=loss, num_particles=100), m_step=None)
    before = em.evaluate_loss(v)
    em.step(v)
    assert em.evaluate_loss(v) < before - 5
    assert em.infer(v)["h"].sample(3).shape == (3, 20, 3)


def test_a_posterior_does_not_follow_later_training():
    v = torch.tensor([0.2, 1.2])
    guide = randomised(explaining_away, v)
    posterior, h = guide.posterior(v), torch.ones(2, 3)
    before = posterior["h"].log_prob(h)
    svi = SVI(explaining_away, guide, Adam({"lr": 0.1}), WakeSleep())
    svi.step(v)
    assert torch.equal(posterior.log_prob({"h": h[None]}).squeeze(0), before)
    assert not torch.equal(guide.posterior(v)["h"].log_prob(h), before)


def test_calls_can_be_traced():
    v, other = torch.tensor([0.2, 1.2, 0.0]), torch.tensor([1.0, -1.0, 2.0])
    guide = randomised(explaining_away, v)
    pyro.enable_validation(False)

    def program(v):
        with poutine.block():
            trace = poutine.trace(guide).get_trace(v)
            trace.compute_log_prob()
        return trace.nodes["h"]["value"], trace.nodes["h"]["log_prob"]

    graph = make_fx(program)(v)
    for data in (v, other):
        pyro.set_rng_seed(3)
        eager = program(data)
        pyro.set_rng_seed(3)
        for found, wanted in zip(graph(data), eager, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_context": 0}, ValueError, r"Expected num_context >= 1, but got 0"),
        ({"num_context": 1.5}, TypeError, r"Expected num_context to be an int"),
        ({"hidden": (0,)}, ValueError, r"Expected hidden\[0\] >= 1"),
        ({"hidden": "wide"}, TypeError, r"Expected hidden to be a sequence of ints"),
        ({"base": nn.Linear(1, 3)}, TypeError, r"Expected base to be a design of parameters, .*, but got Linear"),
        ({"base": ConditionalFlow()}, TypeError, r"Expected base to be a design of parameters"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AutoregressiveBernoulli(**arguments)


def test_latents_that_are_refused():
    def one_unit(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def one_hot(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("v", dist.Normal(h[..., 0], 1.0), obs=v)

    def real(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    v = torch.randn(4)
    for model, encoder, message in (
        (
            one_unit,
            AutoregressiveBernoulli(),
            r"at least 2 binary units for AutoregressiveBernoulli, but got 'h' with 1",
        ),
        (real, AutoregressiveBernoulli(), r"at least 2 binary units for AutoregressiveBernoulli, but got 'h' with 3"),
        (
            one_hot,
            AutoregressiveBernoulli(),
            r"a density of the one-hot site 'h' over one-hot units, but got Autoregre",
        ),
        (
            explaining_away,
            AutoregressiveBernoulli(hidden=(2,)),
            r"hidden layers of at least 3 units, one a unit of 'h'",
        ),
        (explaining_away, AutoregressiveBernoulli(hidden=()), r"hidden layers of at least 3 units"),
    ):
        guide = Amortized(model, encoder)
        with pytest.raises(ValueError, match=message):
            guide(v)
        assert not guide.is_set_up
        assert not list(pyro.get_param_store())
