"""Conditional flows as encoders."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext import WakeSleep, elbo_terms, log_evidence
from pyro_ext.guides import Amortized
from pyro_ext.guides.encoders import MLP
from pyro_ext.guides.flows import ConditionalFlow, affine_layer, spline_layer

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""

LAYERS = pytest.mark.parametrize("layer", [affine_layer, spline_layer])


def banana(v):
    """Given v, h lies along a parabola."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h[..., 1] - h[..., 0] ** 2 + 1, 0.2), obs=v)


def positive(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def simplex(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Dirichlet(torch.ones(3)))
        pyro.sample("v", dist.Normal(h[..., 0], 1.0), obs=v)


def scalar(v):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h.abs(), 0.3), obs=v)


def randomised(model, v, encoder, scale=0.5):
    """Random weights, of such a size that log q bends but stays within a few units."""
    guide = Amortized(model, encoder)
    guide.setup(v)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=scale / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else scale / 2)
    return guide


def grid(low, high, num):
    """Points of a square ``(num^2, 2)``, cell by cell, and the logarithm of a cell's area."""
    x = torch.linspace(low, high, num)
    return torch.cartesian_prod(x, x), 2 * math.log(float(x[1] - x[0]))


@LAYERS
def test_densities_integrate_to_one_and_depend_on_the_data(layer):
    v = torch.tensor([-1.0, 0.5])
    guide = randomised(banana, v, ConditionalFlow(num_flows=2, layer=layer), scale=0.4)
    points, area = grid(-9.0, 9.0, 181)
    log_q = guide.posterior(v)["h"].log_prob(points[:, None])
    assert not log_q.requires_grad
    # Splines have kinks, which a grid sees coarsely.
    torch.testing.assert_close(log_q.logsumexp(0) + area, torch.zeros(2), rtol=0, atol=2e-2)
    assert (log_q[:, 0] - log_q[:, 1]).abs().max() > 0.1
    # No Gaussian: log q is no parabola along a line.
    line = torch.linspace(-2, 2, 5)[:, None] * torch.tensor([[1.0, 0.3]])
    bend = guide.posterior(v)["h"].log_prob(line[:, None])
    assert (bend[0] - 4 * bend[1] + 6 * bend[2] - 4 * bend[3] + bend[4]).abs().max() > 1e-3


@LAYERS
def test_draws_are_distributed_as_log_prob_says(layer):
    v = torch.tensor([0.5, 2.0])
    guide = randomised(banana, v, ConditionalFlow(num_flows=2, layer=layer), scale=0.4)
    posterior, S = guide.posterior(v), 20_000
    values, log_q = posterior.sample_with_log_prob(S)
    # A copy of a draw is not remembered: its density takes the way back through the inverse.
    torch.testing.assert_close(log_q, posterior["h"].log_prob(values["h"].clone()), rtol=1e-5, atol=1e-6)
    points, area = grid(-9.0, 9.0, 181)
    q = (posterior["h"].log_prob(points[:, None]) + area).exp()
    for moment in (lambda h: h[..., 0], lambda h: h[..., 1], lambda h: h[..., 0] * h[..., 1], lambda h: h[..., 1] ** 2):
        expected = (q * moment(points)[:, None]).sum(0)
        draws = moment(values["h"])
        assert ((draws.mean(0) - expected).abs() <= K * draws.std(0) / math.sqrt(S) + 2e-2).all()


def test_a_single_feature_bends_by_splines_only():
    v = torch.tensor([0.5, 2.0])
    guide = randomised(scalar, v, ConditionalFlow(num_flows=2, layer=spline_layer))
    x = torch.linspace(-12, 12, 2001)
    log_q = guide.posterior(v)["h"].log_prob(x[:, None])
    torch.testing.assert_close(log_q.logsumexp(0) + math.log(float(x[1] - x[0])), torch.zeros(2), rtol=0, atol=2e-3)
    assert guide(v)["h"].shape == (2,)
    for refused in (Amortized(scalar, ConditionalFlow()),):
        with pytest.raises(
            ValueError, match=r"Expected at least 2 features for affine_layer, .*, but got 1\. Use spline_la"
        ):
            refused(v)
        assert not refused.is_set_up


def test_it_starts_at_the_factorised_normal():
    v = torch.randn(5)
    h = torch.randn(5, 2)
    found = []
    for encoder in (ConditionalFlow(num_flows=3), None):
        pyro.set_rng_seed(1)
        found.append(Amortized(banana, encoder).posterior(v)["h"].log_prob(h))
    torch.testing.assert_close(*found)


def test_the_flow_is_the_one_that_is_written():
    """u = m + s T_2(T_1(e)), with T_2 in the opposite order, by hand from the networks' outputs."""
    v = torch.randn(4)
    guide = randomised(banana, v, ConditionalFlow(num_flows=2))
    encoder = guide.encoders.h
    output = encoder.base(v[:, None])
    mean, scale, context = output[:, :2], output[:, 2:4].exp(), output[:, 4:]
    e = torch.randn(4, 2)
    x = e
    for layer in encoder.layers:
        shift, log_scale = layer.nn(x, context=context)
        x = shift + log_scale.exp() * x
    h = mean + scale * x
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda z, n=n: forward_by_hand(encoder, z, v[n]), e[n]) for n in range(4)]
    )
    expected = dist.Normal(0.0, 1.0).log_prob(e).sum(-1) - jacobian.det().abs().log()
    torch.testing.assert_close(guide.posterior(v)["h"].log_prob(h.detach()), expected.detach(), rtol=1e-7, atol=1e-7)
    # Both entries of the Jacobian off the diagonal: the two orders together couple everything.
    assert (jacobian[:, 0, 1].abs() > 1e-4).all()
    assert (jacobian[:, 1, 0].abs() > 1e-4).all()


def forward_by_hand(encoder, e, v):
    output = encoder.base(v.reshape(1, 1)).squeeze(0)
    x = e
    for layer in encoder.layers:
        shift, log_scale = layer.nn(x, context=output[4:])
        x = shift + log_scale.exp() * x
    return output[:2] + output[2:4].exp() * x


@LAYERS
@pytest.mark.parametrize("model", [positive, simplex], ids=["positive", "simplex"])
def test_constrained_latents_have_the_density_of_the_mapped_draw(model, layer):
    v = torch.tensor([0.5, 2.0])
    guide = randomised(model, v, ConditionalFlow(layer=layer), scale=0.2)
    posterior = guide.posterior(v)
    values, log_q = posterior.sample_with_log_prob(5)
    h = values["h"]
    # Integrated over the support, in coordinates that suit it.
    if model is positive:
        logarithms, area = grid(-12.0, 12.0, 121)
        points, area = logarithms.exp(), area + logarithms.sum(-1, keepdim=True)
    else:
        x = (torch.arange(150) + 0.5) / 150
        points = torch.cartesian_prod(x, x)
        points = torch.cat([points, 1 - points.sum(-1, keepdim=True)], -1)[points.sum(-1) < 1 - 1e-9]
        area = -2 * math.log(150)
    found = (posterior["h"].log_prob(points[:, None]) + area).logsumexp(0)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=0.05)
    torch.testing.assert_close(posterior["h"].log_prob(h), log_q, rtol=1e-5, atol=1e-6)
    trace = poutine.trace(guide).get_trace(v)
    trace.compute_log_prob()
    torch.testing.assert_close(
        trace.nodes["h"]["log_prob"], posterior["h"].log_prob(trace.nodes["h"]["value"]), rtol=1e-5, atol=1e-6
    )
    for elbo_class in (Trace_ELBO, TraceMeanField_ELBO):
        elbo_class(num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(model, guide, v)
        assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


def best_gaussian(v, num_starts=8):
    """The largest L of any Gaussian for `banana` at one v: log p is a polynomial, and quadrature is exact."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    e = torch.cartesian_prod(*[torch.tensor(nodes)] * 2)
    w = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * 2).prod(-1)
    best = -math.inf
    for _ in range(num_starts):
        params = torch.randn(5).requires_grad_()
        optim = torch.optim.LBFGS([params], max_iter=300, line_search_fn="strong_wolfe")

        def loss(params=params, optim=optim):
            optim.zero_grad()
            tril = torch.stack([params[2].exp(), torch.zeros(()), params[3], params[4].exp()]).reshape(2, 2)
            h = params[:2] + e @ tril.mT
            log_p = dist.Normal(0.0, 1.0).log_prob(h).sum(-1) + dist.Normal(h[:, 1] - h[:, 0] ** 2 + 1, 0.2).log_prob(v)
            value = -(w * log_p).sum() - params[2] - params[4] - 1 - math.log(2 * math.pi)
            value.backward()
            return value

        optim.step(loss)
        best = max(best, -float(loss().detach()))
    return best


@pytest.mark.slow
def test_a_flow_bends_to_a_banana_where_no_gaussian_can():
    v = torch.zeros(2)
    points, area = grid(-7.0, 7.0, 701)
    log_joint = dist.Normal(0.0, 1.0).log_prob(points).sum(-1)
    log_joint = log_joint + dist.Normal(points[:, 1] - points[:, 0] ** 2 + 1, 0.2).log_prob(v[0])
    evidence = float(log_joint.logsumexp(0)) + area
    guide = Amortized(banana, ConditionalFlow(num_flows=2, num_context=4, base=MLP((8,))))
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(banana, guide, ClippedAdam({"lr": 0.01, "lrd": 0.996}), loss)
    for _ in range(600):
        svi.step(v)
    terms = elbo_terms(banana, guide, v[:1], num_samples=8000)
    bound, error = float(terms.bound), float(terms.standard_error)
    gaussian = best_gaussian(v[0])
    assert gaussian < evidence - 0.9
    assert evidence - (bound - K * error) < 0.5 * (evidence - gaussian)
    assert bound - K * error < evidence
    weighted = log_evidence(banana, guide, v[:1], num_samples=4000)
    assert abs(float(weighted.mean) - evidence) < K * float(weighted.standard_error.mean()) + 0.01


def test_gradients_of_the_elbo_are_reparametrised():
    """The gradient of L in the guide's parameters, by common random numbers and finite differences."""
    v = torch.tensor([0.5, 2.0])
    guide = randomised(banana, v, ConditionalFlow(num_flows=2))

    def loss():
        pyro.set_rng_seed(5)
        return Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1).loss(banana, guide, v)

    pyro.set_rng_seed(5)
    Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(banana, guide, v)
    for parameter in (guide.encoders.h.base.linear.bias, guide.encoders.h.layers[0].nn.layers[-1].bias):
        for index in range(len(parameter)):
            grad, step = float(parameter.grad[index]), 1e-6
            with torch.no_grad():
                parameter[index] += step
                above = loss()
                parameter[index] -= 2 * step
                below = loss()
                parameter[index] += step
            assert grad == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-5)


def test_dreams_train_a_flow():
    v = torch.randn(40)
    guide = Amortized(banana, ConditionalFlow(base=MLP((16,))))
    svi = SVI(banana, guide, ClippedAdam({"lr": 0.02}), WakeSleep())
    losses = []
    for _ in range(60):
        svi.step(v)
        losses.append(float(svi.loss.__self__.last_sleep_loss))
    assert sum(losses[-10:]) < sum(losses[:10]) - 40


def test_calls_and_densities_of_given_values_can_be_traced():
    v, other, h = torch.tensor([0.2, 1.2, 0.0]), torch.tensor([1.0, -1.0, 2.0]), torch.randn(3, 2)
    guide = randomised(banana, v, ConditionalFlow())
    pyro.enable_validation(False)

    def program(v, h):
        with poutine.block():
            drawn = poutine.trace(guide).get_trace(v)
            scored = poutine.trace(poutine.condition(guide, data={"h": h})).get_trace(v)
            drawn.compute_log_prob()
            scored.compute_log_prob()
        return drawn.nodes["h"]["value"], drawn.nodes["h"]["log_prob"], scored.nodes["h"]["log_prob"]

    graph = make_fx(program)(v, h)
    for data, value in ((v, h), (other, h.flip(0))):
        pyro.set_rng_seed(3)
        eager = program(data, value)
        pyro.set_rng_seed(3)
        for found, wanted in zip(graph(data, value), eager, strict=True):
            torch.testing.assert_close(found, wanted)


def test_the_dtype_of_the_model_counts():
    torch.set_default_dtype(torch.float32)

    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), v.new_ones(2)).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), v.new_ones(())), obs=v)

    v = torch.randn(3, dtype=torch.float64)
    guide = Amortized(model, ConditionalFlow())
    assert guide(v)["h"].dtype == torch.float64
    h = torch.randn(3, 2, dtype=torch.float64)
    assert guide.posterior(v)["h"].log_prob(h).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_flows": 0}, ValueError, r"Expected num_flows >= 1, but got 0"),
        ({"num_context": True}, TypeError, r"Expected num_context to be an int"),
        ({"hidden": 3}, TypeError, r"Expected hidden to be a sequence of ints"),
        ({"layer": "spline"}, TypeError, r"Expected a layer that can be called, but got 'spline'\. Pass affine_layer"),
        ({"base": nn.Linear(1, 3)}, TypeError, r"Expected base to be a design of parameters, .*, but got Linear"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ConditionalFlow(**arguments)


def test_latents_that_are_refused():
    def binary(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    v = torch.randn(4)
    for model, encoder, message in (
        (binary, ConditionalFlow(), r"Expected a continuous latent for ConditionalFlow, but got 'h'"),
        (
            banana,
            ConditionalFlow(hidden=(1,)),
            r"hidden layers of at least 2 units, one a feature of 'h', but got \(1,\)",
        ),
    ):
        guide = Amortized(model, encoder)
        with pytest.raises(ValueError, match=message):
            guide(v)
        assert not guide.is_set_up
        assert not list(pyro.get_param_store())
