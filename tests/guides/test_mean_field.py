"""MeanField as a Pyro guide: under every ELBO, with every kind of latent, plates, particles and Predictive."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.elbo import ELBO
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_ext import EM, BoundChange, FixedPoint
from pyro_ext.guides import MeanField
from tests.oracles.enumeration import program_log_joint
from tests.oracles.programs import sparse_coding, sparse_coding_parameters

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Sampled losses are compared at 5 standard errors."""
DRAWS = 60

ELBOS: dict[str, Callable[..., ELBO]] = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "Renyi": lambda **kwargs: RenyiELBO(alpha=0.5, **{"num_particles": 2, **kwargs}),
    "TraceEnum": lambda **kwargs: TraceEnum_ELBO(strict_enumeration_warning=False, **kwargs),
    "TraceMeanField": TraceMeanField_ELBO,
}


def randomise(guide: MeanField) -> None:
    with torch.no_grad():
        for block in guide.blocks:
            guide.table(block).copy_(0.5 * torch.randn_like(guide.table(block)))


# ---------------------------------------------------------------- programs


def units(v: Tensor) -> None:
    """One binary site a unit, summed out where an ELBO can."""
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        c = pyro.sample("c", dist.Bernoulli(0.2 + 0.5 * a), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer={"enumerate": "parallel"})
        pyro.sample("v", dist.Normal(a + 2 * c - z, 0.8), obs=v)


def vector(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.8), obs=v)


def real(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        pyro.sample("v", dist.Normal(h.sum((-1, -2)), 0.8), obs=v)


def positive(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("v", dist.Normal(0.0, s), obs=v)


def simplex(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("v", dist.Normal(p @ torch.tensor([-1.0, 0.0, 2.0]), 0.8), obs=v)


def interval(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        p = pyro.sample("p", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(p.sum(-1), 0.8), obs=v)


def mixed(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
        o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        x = pyro.sample("x", dist.Normal(h.sum(-1), 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("v", dist.Normal(x + o[..., 0], 0.1 + s), obs=v)


def nested(v: Tensor) -> None:
    """Rows at dim -1, an inner plate at -2, latents in both and one outside; v is (3, N)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", v.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("inner", v.shape[-2], dim=-2):
            x = pyro.sample("x", dist.Normal(a, 1.0))
            pyro.sample("v", dist.Normal(x, 0.8), obs=v)


CONTINUOUS = {"real": real, "positive": positive, "simplex": simplex, "interval": interval, "nested": nested}
DISCRETE = {"vector": vector, "mixed": mixed}
ALL = {**CONTINUOUS, **DISCRETE, "units": units}


def data_for(name: str) -> Tensor:
    return torch.randn(3, 4) if name == "nested" else torch.randn(4)


# ---------------------------------------------------------------- every ELBO


SCORED = [name for name in ELBOS if name != "TraceMeanField"]


@pytest.mark.parametrize(
    ("name", "elbo"), [*itertools.product([n for n in ALL if n != "units"], SCORED), ("units", "TraceEnum")]
)
def test_svi_moves_the_table(name: str, elbo: str) -> None:
    model, v = ALL[name], data_for(name)
    guide = MeanField(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), ELBOS[elbo]())
    guide.setup(v)
    cold = [guide.table(block).detach().clone() for block in guide.blocks]
    for _ in range(3):
        assert torch.isfinite(torch.tensor(svi.step(v)))
    assert torch.isfinite(torch.tensor(svi.evaluate_loss(v)))
    for block, old in zip(guide.blocks, cold, strict=True):
        assert guide.table(block).shape == old.shape
        assert not torch.equal(guide.table(block), old)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_trace_mean_field_takes_continuous_latents(name: str) -> None:
    model, v = CONTINUOUS[name], data_for(name)
    svi = SVI(model, MeanField(model), Adam({"lr": 0.05}), TraceMeanField_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(v))) for _ in range(3))


@pytest.mark.parametrize("name", ["vector", "mixed"])
def test_trace_mean_field_refuses_discrete_latents(name: str) -> None:
    svi = SVI(ALL[name], MeanField(ALL[name]), Adam({"lr": 0.05}), TraceMeanField_ELBO())
    with pytest.raises(NotImplementedError, match="must be fully reparameterized"):
        svi.step(torch.randn(4))


@pytest.mark.parametrize(
    ("name", "factor"),
    [("vector", "GuideBernoulli"), ("mixed", "GuideBernoulli|GuideOneHot"), ("units", "GuideBernoulli")],
)
def test_the_refusal_names_the_factor_where_pyro_would_stay_silent(name: str, factor: str) -> None:
    pyro.enable_validation(False)
    guide = MeanField(ALL[name])
    match = (
        f"Expected reparametrised factors under TraceMeanField_ELBO, but got a discrete one, ({factor}), whose gradient"
    )
    for method in (TraceMeanField_ELBO().loss, TraceMeanField_ELBO().loss_and_grads):
        with pytest.raises(ValueError, match=match):
            method(ALL[name], guide, torch.randn(4))
        guide = MeanField(ALL[name])


def test_one_hot_and_categorical_factors_are_refused_too() -> None:
    pyro.enable_validation(False)

    def one_hot(v: Tensor) -> None:
        o = pyro.sample("o", dist.OneHotCategorical(torch.ones(3)))
        pyro.sample("v", dist.Normal(o[..., 0], 1.0), obs=v)

    def categorical(v: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("v", dist.Normal(z.double(), 1.0), obs=v)

    for model, name in ((one_hot, "GuideOneHot"), (categorical, "GuideCategorical")):
        with pytest.raises(ValueError, match=f"but got a discrete one, {name}"):
            TraceMeanField_ELBO().loss_and_grads(model, MeanField(model), torch.tensor(0.0))


@pytest.mark.parametrize("elbo", ["Trace", "TraceGraph", "TraceEnum"])
@pytest.mark.parametrize("name", ["vector", "mixed", "nested", "positive"])
def test_losses_are_unbiased(name: str, elbo: str) -> None:
    """The mean loss is -L: that of draws of q under log p and log q, each by another route."""
    model, v = ALL[name], data_for(name)
    guide = MeanField(model)
    guide.setup(v)
    randomise(guide)
    losses = torch.tensor([ELBOS[elbo]().loss(model, guide, v) for _ in range(DRAWS)])
    posterior = guide.posterior(v)
    values, log_q = posterior.sample_with_log_prob(DRAWS)
    traces = [
        poutine.trace(poutine.condition(model, data={n: x[s] for n, x in values.items()})).get_trace(v).log_prob_sum()
        for s in range(DRAWS)
    ]
    bounds = torch.stack(traces) - log_q.reshape(DRAWS, -1).sum(-1)
    error = ((losses.var() + bounds.var()) / DRAWS).sqrt()
    assert abs(losses.mean() + bounds.mean()) < K * error


def unit_log_joint(v: Tensor) -> tuple[Tensor, Tensor]:
    states = torch.tensor(list(itertools.product((0, 1), (0, 1), (0, 1, 2))))
    latents = {"a": states[:, :1].double(), "c": states[:, 1:2].double(), "z": states[:, 2:]}
    latents = {name: value.expand(12, len(v)) for name, value in latents.items()}
    rows = [program_log_joint(units, {n: x[s] for n, x in latents.items()}, v) for s in range(12)]
    return states, torch.stack(rows)


def exact_loss(tables: list[Tensor], states: Tensor, log_joint: Tensor) -> Tensor:
    log_q = torch.zeros_like(log_joint)
    for i, table in enumerate(tables):
        logits = torch.cat([torch.zeros_like(table), table], -1) if table.shape[-1] == 1 else table
        log_q = log_q + logits.log_softmax(-1).mT[states[:, i]]
    return -(log_q.exp() * (log_joint - log_q)).sum()


def test_trace_enum_is_exact_for_a_site_a_unit() -> None:
    v = torch.randn(4)
    states, log_joint = unit_log_joint(v)
    guide = MeanField(units)
    guide.setup(v)
    randomise(guide)
    tables = [guide.table(block).detach().clone().requires_grad_() for block in guide.blocks]
    expected = exact_loss(tables, states, log_joint)
    gradients = torch.autograd.grad(expected, tables)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert elbo.loss_and_grads(units, guide, v) == pytest.approx(expected.item(), rel=1e-10)
    for block, gradient in zip(guide.blocks, gradients, strict=True):
        torch.testing.assert_close(guide.table(block).grad, gradient, atol=1e-10, rtol=1e-10)


def test_svi_with_exact_enumeration_reaches_the_fixed_point() -> None:
    v = torch.randn(4)
    guide = MeanField(units)
    svi = SVI(units, guide, Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(120):
        svi.step(v)
    em = EM(units, guide, e_step=FixedPoint(criterion=BoundChange(1e-12), max_sweeps=500), m_step=None)
    assert svi.evaluate_loss(v) == pytest.approx(em.evaluate_loss(v), rel=1e-10)
    assert em.step(v) == pytest.approx(svi.evaluate_loss(v), abs=1e-3)


@pytest.mark.parametrize("nesting", [None, 2])
@pytest.mark.parametrize(
    ("name", "elbo"),
    [*itertools.product(["real", "positive", "simplex", "nested"], ELBOS), *itertools.product(["mixed"], SCORED)],
)
def test_particles_may_be_vectorised(name: str, elbo: str, nesting: int | None) -> None:
    model, v = ALL[name], data_for(name)
    guide = MeanField(model)
    settings: dict[str, Any] = {} if nesting is None else {"max_plate_nesting": nesting}
    loss = ELBOS[elbo](num_particles=5, vectorize_particles=True, **settings)
    svi = SVI(model, guide, SGD({"lr": 1e-3}), loss)
    for _ in range(2):
        assert torch.isfinite(torch.tensor(svi.step(v)))
    for block in guide.blocks:
        assert guide.table(block).shape == block.site.batch_shape + (block.factor.num_params,)


# ---------------------------------------------------------------- the guide's trace


@pytest.mark.parametrize("name", ALL)
def test_every_latent_is_one_site_with_a_true_density(name: str) -> None:
    model, v = ALL[name], data_for(name)
    guide = MeanField(model)
    guide.setup(v)
    randomise(guide)
    trace = poutine.trace(guide).get_trace(v)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(v)
    trace.compute_log_prob()
    replayed.compute_log_prob()
    latents = {n for n, s in replayed.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    assert latents == {n for n, s in trace.nodes.items() if s["type"] == "sample"}
    values = {site.name: trace.nodes[site.name]["value"] for site in guide.order}
    log_q = guide.posterior(v).log_prob({n: x[None] for n, x in values.items()})
    torch.testing.assert_close(log_q.sum(), trace.log_prob_sum())
    for site in guide.order:
        assert replayed.nodes[site.name]["fn"].support.check(values[site.name]).all()
        assert trace.nodes[site.name]["log_prob"].shape == replayed.nodes[site.name]["log_prob"].shape


def test_the_start_is_the_prior() -> None:
    posterior = MeanField(mixed).posterior(torch.randn(4))
    torch.testing.assert_close(posterior["h"].mean, torch.full((4, 2), 0.3))
    torch.testing.assert_close(posterior["o"].mean, torch.tensor([0.2, 0.5, 0.3]).expand(4, 3))
    assert MeanField(units, name="other").posterior(torch.randn(4))["z"].mean.shape == (4, 3)


def test_median_is_the_mean_of_every_site() -> None:
    v = torch.randn(4)
    guide = MeanField(mixed)
    median = guide.median(v)
    posterior = guide.posterior(v)
    assert set(median) == {"h", "o", "x", "s"}
    assert torch.equal(median["h"], posterior["h"].mean)


# ---------------------------------------------------------------- Predictive


def test_predictive_returns_data_and_unconditioned_predictive_draws_them() -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(6, 5)
    guide = MeanField(sparse_coding)
    guide(v)
    seen = Predictive(sparse_coding, guide=guide, num_samples=3)(v)
    assert torch.equal(seen["v"], v.expand(3, 6, 5))
    assert seen["h"].shape == (3, 6, 3)
    draws = Predictive(poutine.uncondition(sparse_coding), guide=guide, num_samples=500)(v)["v"]
    mean = guide.posterior(v)["h"].mean @ pyro.param("W").detach().T
    error = draws.std(0) / 500**0.5
    assert bool(((draws.mean(0) - mean).abs() <= K * error).all())


def test_predictive_in_parallel() -> None:
    v = torch.randn(4)
    guide = MeanField(mixed)
    guide(v)
    draws = Predictive(poutine.uncondition(mixed), guide=guide, num_samples=7, parallel=True)(v)
    assert draws["v"].shape == (7, 4)
    assert draws["h"].shape == (7, 4, 2)


# ---------------------------------------------------------------- refusals


def test_only_models_can_be_given() -> None:
    with pytest.raises(TypeError, match="Expected a model that can be called, but got int. Pass a Pyro model."):
        MeanField(3)


def no_visible(v: Tensor) -> None:
    pyro.param("w", torch.tensor(1.0))
    pyro.sample("h", dist.Normal(0.0, 1.0))


def no_latent(v: Tensor) -> None:
    pyro.param("w", torch.tensor(1.0))
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)


def counting(v: Tensor) -> None:
    pyro.param("w", torch.tensor(1.0))
    with pyro.plate("data", len(v)):
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("v", dist.Normal(n, 1.0), obs=v)


def sequential(v: Tensor) -> None:
    pyro.param("w", torch.tensor(1.0))
    for i in pyro.plate("steps", len(v)):
        h = pyro.sample(f"h{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"v{i}", dist.Normal(h, 1.0), obs=v[i])


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (no_visible, "Expected a model with a visible site"),
        (no_latent, "Expected a model with a latent site"),
        (counting, "Expected binary, categorical, one-hot or continuous latents, but got site 'n' with Poisson"),
        (sequential, "Expected vectorised plates, but got the sequential plate 'steps' around site 'h0'"),
    ],
)
def test_models_that_no_factor_can_treat_are_refused_without_a_trace(model: Callable[..., Any], match: str) -> None:
    guide = MeanField(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for call in (guide, guide.setup, guide.posterior, svi.evaluate_loss):
        with pytest.raises(ValueError, match=match):
            call(torch.randn(4))
        assert not list(pyro.get_param_store())
        assert not guide.is_set_up
        assert not list(guide.parameters())


def test_names_are_not_shared() -> None:
    first = MeanField(real, name="q")
    with pytest.raises(ValueError, match="Expected a name that no other live module holds, but got 'q'. Pass another"):
        MeanField(real, name="q")
    other = MeanField(real)
    first(torch.randn(4))
    other(torch.randn(5))
    assert {"q.tables.h"} < set(pyro.get_param_store().keys())
    assert len(pyro.get_param_store()) == 2
