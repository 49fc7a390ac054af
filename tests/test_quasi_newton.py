"""Quasi-Newton M-steps: the maximum of the closed form, L never lower, and nothing but theta moved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, QuasiNewton, Status
from pyro_ext.evaluators import Enumerated, NoEvaluatorError, Quadratic
from pyro_ext.gradient import theta_objective
from pyro_ext.guides import Amortized, MeanField, Structured
from pyro_ext.models import BinarySparseCoding, FactorAnalysis, GaussianMixture, SigmoidBeliefNetwork
from pyro_ext.models.covariance import Full
from tests.models.stationarity import assert_maximum

pytestmark = pytest.mark.usefixtures("float64")


def data(num_rows: int = 40) -> Tensor:
    return torch.randn(num_rows, 3) @ torch.randn(3, 3) + (torch.arange(num_rows) % 2)[:, None]


def twins(make: Callable[[], Any], guide: Callable[[Any], Any], m_step: Any) -> tuple[list[EM], Tensor]:
    """Two drivers at the same theta: one with the M-step, one with the closed form."""
    v = data()
    models = [make(), make()]
    models[0].initialize(v)
    models[1].load_state_dict(models[0].state_dict())
    steps = (m_step, ClosedForm())
    return [EM(m, guide(m), e_step=FixedPoint(), m_step=s) for m, s in zip(models, steps, strict=True)], v


FAMILIES = [
    pytest.param(lambda: GaussianMixture(2, 3), MeanField, id="mixture"),
    pytest.param(lambda: GaussianMixture(2, 3, covariance=Full()), MeanField, id="full mixture"),
    pytest.param(lambda: FactorAnalysis(3, 2), Structured, id="factor analysis"),
    pytest.param(lambda: BinarySparseCoding(3, 3), MeanField, id="sparse coding, mean field"),
    pytest.param(lambda: BinarySparseCoding(3, 3), Structured, id="sparse coding, joint"),
]


@pytest.mark.parametrize(("make", "guide"), FAMILIES)
def test_many_steps_reach_the_maximum_of_the_closed_form(make: Any, guide: Any) -> None:
    (em, reference), v = twins(make, guide, QuasiNewton(num_steps=200))
    call = em.call(v)
    result = em.e_half(call)
    em.m_half(call, result)
    reference.step(v)
    assert_maximum(em.model, lambda: theta_objective(call, result))
    for name in em.model._pyro_params:  # constrained: logits of a simplex are free in one direction
        found, best = getattr(em.model, name), getattr(reference.model, name)
        torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("make", "guide"), FAMILIES)
def test_a_few_steps_are_a_generalised_em_that_never_falls(make: Any, guide: Any) -> None:
    (em, _), v = twins(make, guide, QuasiNewton(num_steps=2))
    history = em.run(v, max_steps=15, tolerance=0.0, progress=False)
    assert history.status is Status.MAX_STEPS
    m_halves = [(a.bound, b.bound) for a, b in itertools.pairwise(history.ledger) if b.half == "M"]
    assert len(m_halves) == 15
    assert all(after >= before - 1e-12 * abs(before) for before, after in m_halves)
    assert history.ledger[-1].bound > history.ledger[0].bound + 1


class Groups(PyroModule):
    """Logistic regression with a latent group per row: no closed form; parameters of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = PyroParam(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]))
        self.weights = PyroParam(torch.tensor([0.4, 0.6]), constraints.simplex)
        self.shared = nn.Linear(2, 1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        slopes, weights = self.slopes, self.weights
        tilt = pyro.param("tilt", torch.tensor(0.5), constraint=constraints.positive)
        pyro.module("shared", self.shared)
        with pyro.plate("data", len(y)):
            h = pyro.sample("h", dist.OneHotCategorical(weights))
            logits = ((h @ slopes) * x).sum(-1) + tilt * self.shared(x).squeeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def group_log_p(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """sum_n log p(y_n | x_n), by hand."""
    shared = x @ theta["shared.weight"].T + theta["shared.bias"]
    logits = x @ theta["slopes"].T + theta["tilt"] * shared
    signs = 2 * y[:, None] - 1
    return (theta["weights"].log() + nn.functional.logsigmoid(signs * logits)).logsumexp(-1).sum()


def theta_of(model: Groups) -> dict[str, Tensor]:
    shared = {f"shared.{name}": value for name, value in model.shared.named_parameters()}
    return {"slopes": model.slopes, "weights": model.weights, "tilt": pyro.param("tilt"), **shared}


def regression(num_rows: int = 200) -> tuple[Tensor, Tensor]:
    x = 2 * torch.randn(num_rows, 2)
    group = torch.rand(num_rows) < 0.3
    logits = torch.where(group, 2 * x[:, 0] + 1, -x[:, 0] + x[:, 1])
    return x, torch.bernoulli(logits.sigmoid())


def test_a_program_without_a_closed_form_climbs_log_p() -> None:
    x, y = regression()
    model = Groups()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=5))
    call = em.call(x, y)
    assert isinstance(call.evaluator(), Quadratic | Enumerated)
    losses = []
    for _ in range(60):
        log_p = group_log_p(theta_of(model), x, y).item()
        losses.append(em.step(x, y))
        assert losses[-1] == pytest.approx(-log_p, rel=1e-10)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 5
    # A stationary point of log p: theta is read as unconstrained leaves.
    leaves = list(dict.fromkeys([*model.parameters(), pyro.get_param_store()["tilt"].unconstrained()]))
    grads = torch.autograd.grad(group_log_p(theta_of(model), x, y), leaves)
    assert max(g.abs().max().item() for g in grads) < 0.05


def test_only_theta_moves_and_no_gradient_is_left() -> None:
    x, y = regression(30)
    model = Groups()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=3))
    call = em.call(x, y)
    result = em.e_half(call)
    marked = model.slopes_unconstrained
    marked.grad = torch.full_like(marked, 7.0)
    bystander = pyro.param("bystander", torch.tensor(1.0)).unconstrained()
    table = em.guide.table(em.guide.blocks[0])
    old_table, tensors = table.detach().clone(), list(model.parameters())
    em.m_half(call, result)
    assert model.slopes[0, 0] != -1
    assert torch.equal(table, old_table)
    assert bystander.item() == 1.0
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
    assert torch.equal(marked.grad, torch.full_like(marked, 7.0))
    others = [t for _, t in pyro.get_param_store().named_parameters() if t is not marked]
    assert all(t.grad is None for t in others)


def test_a_search_that_finds_nothing_keeps_theta() -> None:
    (em, _), v = twins(lambda: GaussianMixture(2, 3), MeanField, QuasiNewton(num_steps=200))
    call = em.call(v)
    result = em.e_half(call)
    for _ in range(3):
        em.m_half(call, result)
    best = float(theta_objective(call, result).detach())
    theta = [p.detach().clone() for p in em.model.parameters()]
    em.m_half(call, result)
    assert float(theta_objective(call, result).detach()) >= best
    for old, new in zip(theta, em.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-7, rtol=1e-7)


def test_a_search_that_ends_lower_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def downhill(self: Any, closure: Callable[[], Tensor]) -> None:
        closure()
        with torch.no_grad():
            for tensor in self.param_groups[0]["params"]:
                tensor.add_(5.0)
        closure()

    monkeypatch.setattr(torch.optim.LBFGS, "step", downhill)
    (em, _), v = twins(lambda: FactorAnalysis(3, 2), Structured, QuasiNewton())
    before = [p.detach().clone() for p in em.model.parameters()]
    em.step(v)
    for old, new in zip(before, em.model.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


class Cliff(PyroModule):
    """log p rises towards a cliff, behind which it is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.0))

    def forward(self, v: Tensor) -> None:
        loc = self.loc
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.factor("cliff", (4 * loc + (1.0 - loc).log() * 1e-3).expand(len(v)))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_points_that_cannot_be_evaluated_are_walls() -> None:
    v = torch.randn(20)
    model = Cliff()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=50))
    losses = [em.step(v) for _ in range(4)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
    # The optimum: 4 = 1e-3 / (1 - loc).
    assert model.loc.item() == pytest.approx(1 - 1e-3 / 4, abs=1e-6)


def test_an_error_on_the_way_restores_theta() -> None:
    x, y = regression(30)
    model = Groups()
    calls = [0]
    forward = model.shared.forward

    def fails(value: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > fails.limit:
            raise RuntimeError("the disk is full")
        return forward(value)

    fails.limit = 10**9
    model.shared.forward = fails
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=5))
    em.step(x, y)
    before = {name: t.detach().clone() for name, t in pyro.get_param_store().named_parameters()}
    calls[0] = 0
    em.step(x, y)
    needed = calls[0]
    # Theta has moved on: go back, and fail near the end of the same step.
    with torch.no_grad():
        for name, t in pyro.get_param_store().named_parameters():
            t.copy_(before[name])
    calls[0], fails.limit = 0, needed - 2
    with pytest.raises(RuntimeError, match="the disk is full"):
        em.step(x, y)
    for name, t in pyro.get_param_store().named_parameters():
        assert torch.equal(t, before[name]), name
        assert t.grad is None


def test_a_subsampled_program_is_served() -> None:
    def model(v: Tensor, index: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.5, 0.5]))
        with pyro.plate("data", len(v), subsample=index):
            h = pyro.sample("h", dist.OneHotCategorical(torch.ones(2) / 2))
            pyro.sample("v", dist.Normal(h @ loc, 1.0), obs=v[index])

    v, index = torch.randn(20), torch.arange(5)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=50))
    call = em.call(v, index)
    result = em.e_half(call)
    em.m_half(call, result)
    r = result.posterior["h"].mean
    expected = (r * v[index, None]).sum(0) / r.sum(0)
    torch.testing.assert_close(pyro.param("loc").detach(), expected, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"history_size": 0}, {"num_steps": 1.5}, {"num_steps": True}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"Expected {name} of at least 1, but got {value}. Use m_step=None"):
        QuasiNewton(**settings)


def test_an_inexact_bound_is_refused() -> None:
    def link(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=pyro.param("w", torch.tensor(0.5)) * h + 1), obs=v)

    v = torch.bernoulli(torch.full((20,), 0.7))
    em = EM(link, MeanField(link), e_step=Gradient(Adam({"lr": 0.05})), m_step=QuasiNewton())
    with pytest.raises(NoEvaluatorError, match=r"Expected an exact L for QuasiNewton.*Use `m_step=Gradient\(optim\)`"):
        em.step(v)
    assert "w" not in pyro.get_param_store()


def test_conditional_factors_are_refused() -> None:
    model = SigmoidBeliefNetwork([2, 3, 4])
    em = EM(model, Amortized(model), e_step=Gradient(Adam({"lr": 0.01})), m_step=QuasiNewton())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NoEvaluatorError, match="got none. .Factors depend on other latents' values"):
        em.step(torch.bernoulli(torch.full((5, 4), 0.5)))
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
