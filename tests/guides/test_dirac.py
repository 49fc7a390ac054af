"""Dirac as a Pyro guide: points of continuous latents under every ELBO, points of discrete ones refused."""

from __future__ import annotations

from collections.abc import Callable

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
from pyro.infer.autoguide import AutoDelta
from pyro.infer.elbo import ELBO
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_ext.guides import Dirac

pytestmark = pytest.mark.usefixtures("float64")

ELBOS: dict[str, Callable[[], ELBO]] = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=2),
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "TraceMeanField": TraceMeanField_ELBO,
}


def real(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        pyro.sample("v", dist.Normal(h.sum((-1, -2)), 0.8), obs=v)


def constrained(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        p = pyro.sample("p", dist.Dirichlet(2 * torch.ones(3)))
        u = pyro.sample("u", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(s * p[..., 0] + u.sum(-1), 0.8), obs=v)


def binary(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.8), obs=v)


def one_hot(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("v", dist.Normal(h[..., 0], 0.8), obs=v)


def categorical(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("v", dist.Normal(h.double(), 0.8), obs=v)


def mixed(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Bernoulli(0.3))
        pyro.sample("v", dist.Normal(x + h, 0.8), obs=v)


@pytest.mark.parametrize("model", [real, constrained])
@pytest.mark.parametrize("elbo", ELBOS)
def test_the_loss_is_minus_log_p_at_the_point(model: Callable[..., None], elbo: str) -> None:
    v = torch.randn(4)
    guide = Dirac(model)
    guide.setup(v)
    with torch.no_grad():
        for block in guide.blocks:
            guide.table(block).copy_(torch.randn_like(guide.table(block)))
    values = guide.median(v)
    log_joint = poutine.trace(poutine.condition(model, data=values)).get_trace(v).log_prob_sum()
    assert ELBOS[elbo]().loss(model, guide, v) == pytest.approx(-log_joint.item(), rel=1e-10)


@pytest.mark.parametrize("elbo", ELBOS)
def test_gradients_lead_to_the_mode(elbo: str) -> None:
    w = 0.7 * torch.randn(4, 3)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h @ w.mT, 1.0).to_event(1), obs=v)

    v = torch.randn(5, 4)
    svi = SVI(model, Dirac(model), SGD({"lr": 0.1}), ELBOS[elbo]())
    for _ in range(150):
        svi.step(v)
    expected = v @ w @ torch.linalg.inv(torch.eye(3) + w.mT @ w)
    torch.testing.assert_close(svi.guide.posterior(v)["h"].mean, expected, atol=1e-3, rtol=0)


def test_points_of_constrained_latents_agree_with_pyros() -> None:
    v = torch.randn(4)
    ours, theirs = Dirac(constrained), AutoDelta(constrained)
    for guide in (ours, theirs):
        svi = SVI(constrained, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(250):
            svi.step(v)
    for name, value in theirs.median(v).items():
        torch.testing.assert_close(ours.median(v)[name], value.detach(), atol=5e-3, rtol=0)


def test_points_stay_on_the_support() -> None:
    v = torch.randn(4)
    guide = Dirac(constrained)
    values = guide(v)
    trace = poutine.trace(constrained).get_trace(v)
    for name, value in values.items():
        assert value.shape == trace.nodes[name]["value"].shape
        assert trace.nodes[name]["fn"].support.check(value).all()
    assert torch.equal(guide.posterior(v)["s"].sample(2), values["s"].expand(2, 4))


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("model", [binary, one_hot, categorical, mixed])
@pytest.mark.parametrize("elbo", ELBOS)
def test_points_of_discrete_latents_are_refused(model: Callable[..., None], elbo: str, validation: bool) -> None:
    pyro.enable_validation(validation)
    svi = SVI(model, Dirac(model), Adam({"lr": 0.05}), ELBOS[elbo]())
    match = "Expected a factor with a gradient at the discrete site 'h', but got a point mass. Use EM with FixedPoint"
    v = torch.randn(4)
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match=match):
            call(v)


@pytest.mark.parametrize("model", [binary, one_hot, categorical, mixed])
def test_points_of_discrete_latents_start_at_the_likeliest_state(model: Callable[..., None]) -> None:
    v = torch.randn(4)
    value = Dirac(model)(v)["h"]
    expected = {
        "binary": torch.zeros(4, 3),
        "one_hot": torch.eye(3)[1].expand(4, 3),
        "categorical": torch.ones(4).long(),
    }
    assert torch.equal(value, expected.get(model.__name__, torch.zeros(4)))
    draws = Predictive(poutine.uncondition(model), guide=Dirac(model), num_samples=3)(v)
    assert draws["v"].shape == (3, 4)


@pytest.mark.parametrize("nesting", [None, 1, 2])
def test_particles_may_be_vectorised(nesting: int | None) -> None:
    v = torch.randn(4)
    settings = {} if nesting is None else {"max_plate_nesting": nesting}
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True, **settings)
    guide = Dirac(constrained)
    svi = SVI(constrained, guide, Adam({"lr": 0.01}), loss)
    assert svi.evaluate_loss(v) == pytest.approx(Trace_ELBO().loss(constrained, guide, v), rel=1e-10)
    svi.step(v)
    assert guide.table(guide.blocks[0]).shape == (4, 1)
