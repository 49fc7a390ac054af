"""A network's proposal and local steps from it: never below the proposal, up to the optimum, and without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, MeanChange, Refine, Sequential
from pyro_ext.dream import Dream
from pyro_ext.guides import Amortized, MeanField
from pyro_ext.local_gradient import LocalGradient
from pyro_ext.models import BinarySparseCoding, HelmholtzMachine, SigmoidBeliefNetwork, assign_parameters
from pyro_ext.semi_amortized import SemiAmortized
from tests.oracles.enumeration import (
    binary_sparse_coding_log_joint,
    binary_states,
    elbo,
    factorial_posterior,
    log_evidence,
    program_log_joint,
)

pytestmark = pytest.mark.usefixtures("float64")

D, H, N = 5, 3, 7


def sparse_coding() -> tuple[BinarySparseCoding, Tensor]:
    model = BinarySparseCoding(D, H)
    assign_parameters(model, {"b": torch.randn(H), "W": torch.randn(D, H), "beta": 0.5 + torch.rand(D)})
    return model, torch.randn(N, D)


def everything() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def changed(before: dict[str, Tensor]) -> set[str]:
    after = everything()
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def network(model: Any, v: Tensor) -> Amortized:
    """A network that is far from any optimum."""
    guide = Amortized(model, encoder=nn.Linear(v.shape[1], H))
    guide(v)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(torch.randn_like(p))
    return guide


def sweep_by_hand(model: BinarySparseCoding, v: Tensor, mean: Tensor) -> Tensor:
    """One sequential sweep of (19.44)."""
    W, b, beta = (x.detach() for x in (model.W, model.b, model.beta))
    mean = mean.clone()
    for i in range(H):
        others = mean @ W.T - mean[:, i, None] * W[:, i]
        mean[:, i] = torch.sigmoid(b[i] + ((v - others - 0.5 * W[:, i]) * beta * W[:, i]).sum(-1))
    return mean


@pytest.mark.parametrize("num_sweeps", [1, 3])
def test_sweeps_start_at_the_network(num_sweeps: int) -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    mean = guide.posterior(v)["h"].mean
    for _ in range(num_sweeps):
        mean = sweep_by_hand(model, v, mean)
    em = EM(
        model, guide, e_step=SemiAmortized(FixedPoint(criterion=MeanChange(0.0), max_sweeps=num_sweeps)), m_step=None
    )
    before = everything()
    torch.testing.assert_close(em.infer(v)["h"].mean, mean, rtol=0, atol=1e-12)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(H), model.W, model.b, model.beta).detach()
    expected = elbo(log_joint, factorial_posterior(mean))
    result = em.e_half(em.call(v))
    torch.testing.assert_close(result.bound, expected, rtol=0, atol=1e-10)
    assert (result.exact, result.start) == (True, "warm")
    assert not changed(before)


@pytest.mark.parametrize(
    "local",
    [FixedPoint(max_sweeps=2), LocalGradient(3, 0.3), LocalGradient(5, 30.0)],
    ids=["sweeps", "gradient", "steps much too long"],
)
def test_local_steps_never_lower_the_bound_of_a_row(local: Any) -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(H), model.W, model.b, model.beta).detach()
    proposed = elbo(log_joint, factorial_posterior(guide.posterior(v)["h"].mean))
    found = EM(model, guide, e_step=SemiAmortized(local), m_step=None).e_half(
        EM(model, guide, e_step=SemiAmortized(local), m_step=None).call(v)
    )
    reached = elbo(log_joint, factorial_posterior(found.posterior["h"].mean))
    torch.testing.assert_close(found.bound, reached, rtol=0, atol=1e-10)
    assert (reached >= proposed - 1e-12).all()
    assert (reached <= log_evidence(log_joint) + 1e-12).all()
    if not isinstance(local, LocalGradient) or local.learning_rate < 1:
        assert (reached > proposed + 1e-3).all()


def product_posterior(v: Tensor) -> None:
    """Each unit has pixels of its own: the posterior is a product, and mean field is exact."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.tensor([-1.0, 0.5, 0.2])).to_event(1))
        pyro.sample("v", dist.Bernoulli(logits=2 * h - 0.7).to_event(1), obs=v)


@pytest.mark.parametrize("local", [FixedPoint(), LocalGradient(400, 0.1)], ids=["sweeps", "gradient"])
def test_local_steps_reach_the_exact_optimum(local: Any) -> None:
    v = binary_states(H)
    guide = network(product_posterior, v)
    log_joint = program_log_joint(product_posterior, {"h": binary_states(H).unsqueeze(1)}, v)
    em = EM(product_posterior, guide, e_step=SemiAmortized(local), m_step=None)
    result = em.e_half(em.call(v))
    assert (log_evidence(log_joint) - elbo(log_joint, factorial_posterior(guide.posterior(v)["h"].mean)) > 1e-2).all()
    torch.testing.assert_close(result.bound, log_evidence(log_joint), rtol=0, atol=1e-6)


def test_steps_that_are_too_long_leave_a_row_where_it_was() -> None:
    v = binary_states(H)
    guide = network(product_posterior, v)
    net = guide.encoders.h
    with torch.no_grad():
        net.weight.copy_(2 * torch.eye(H))
        softplus = torch.nn.functional.softplus(torch.tensor([1.3, -0.7]))
        # A little off the optimum: there the gradient would be nothing.
        net.bias.copy_(torch.tensor([-0.9, 0.4, 0.3]) - softplus[0] + softplus[1])
    log_joint = program_log_joint(product_posterior, {"h": binary_states(H).unsqueeze(1)}, v)
    start = guide.posterior(v)["h"].mean
    em = EM(product_posterior, guide, e_step=SemiAmortized(LocalGradient(1, 5.0)), m_step=None)
    result = em.e_half(em.call(v))
    torch.testing.assert_close(result.bound, elbo(log_joint, factorial_posterior(start)), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.posterior["h"].mean, start, rtol=0, atol=1e-12)


def test_rows_are_climbed_apart() -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    em = EM(model, guide, e_step=SemiAmortized(LocalGradient(5, 0.2)), m_step=None)
    together = em.infer(v)["h"].mean
    alone = torch.cat([em.infer(v[n : n + 1])["h"].mean for n in range(N)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_the_gradient_is_adam_on_the_enumerated_bound() -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(H), model.W, model.b, model.beta).detach()
    logits = guide.posterior(v)["h"].mean.logit().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(4):
        adam.zero_grad()
        (-elbo(log_joint, factorial_posterior(logits.sigmoid())).sum()).backward()
        adam.step()
    em = EM(model, guide, e_step=SemiAmortized(LocalGradient(4, 0.05)), m_step=None)
    torch.testing.assert_close(em.infer(v)["h"].mean, logits.detach().sigmoid(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "train",
    [
        lambda: Gradient(SGD({"lr": 0.1})),
        lambda: Dream(SGD({"lr": 0.1}), 2, 20),
        lambda: Refine(FixedPoint(max_sweeps=1), SGD({"lr": 0.1})),
    ],
    ids=["gradient", "dreams", "refine"],
)
def test_the_network_learns_by_its_own_step_and_theta_at_the_local_q(train: Callable[[], Any]) -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    step = train()
    em = EM(model, guide, e_step=SemiAmortized(FixedPoint(max_sweeps=2), train=step), m_step=ClosedForm())
    assert em.parts == (step.optim,)
    own = {name for name, _ in pyro.get_param_store().named_parameters() if name.startswith(guide._pyro_name)}
    before = everything()
    call = em.call(v)
    result = em.e_half(call)
    assert changed(before)
    assert changed(before) <= own
    before = everything()
    em.m_half(call, result)
    assert changed(before)
    assert not changed(before) & own
    # Theta solves the normal equations of the local q, not of the network's.
    probs = result.posterior["h"].mean
    second = probs.T @ probs - torch.diag((probs * probs).sum(0)) + torch.diag(probs.sum(0))
    torch.testing.assert_close(model.W.detach() @ second, v.T @ probs, rtol=0, atol=1e-8)


def test_without_a_trainer_the_network_is_held() -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    em = EM(model, guide, e_step=SemiAmortized(FixedPoint(max_sweeps=1)), m_step=Gradient(Adam({"lr": 0.1})))
    own = {name for name, _ in pyro.get_param_store().named_parameters() if name.startswith(guide._pyro_name)}
    before = everything()
    history = em.run(v, max_steps=3, tolerance=0, progress=False)
    assert changed(before)
    assert not changed(before) & own
    assert all(entry.exact for entry in history.ledger)
    assert len(em.parts) == 1


# ------------------------------------------------------------------------------------- sampled L


def gaussian(v: Tensor) -> None:
    """log p(v, h) is no polynomial: nothing exact serves."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Bernoulli(logits=h * torch.tensor([3.0, -2.0]) + 0.5).to_event(1), obs=v)


def best_gaussian_bound(v: float, a: float) -> float:
    """max over m and s of E_N(m, s)[log p(v, h)] + H for one unit, by quadrature and a grid that is refined."""
    x = torch.linspace(-7, 7, 1401)
    weight = torch.exp(-0.5 * x * x) / torch.exp(-0.5 * x * x).sum()
    centre, width = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 2.0])
    best = -math.inf
    for _ in range(12):
        m = centre[0] + width[0] * torch.linspace(-1, 1, 21)
        s = centre[1] + width[1] * torch.linspace(-1, 1, 21)
        M, S = torch.meshgrid(m, s, indexing="ij")
        h = M[..., None] + S.exp()[..., None] * x
        logits = a * h + 0.5
        log_p = dist.Normal(0.0, 1.0).log_prob(h) + dist.Bernoulli(logits=logits).log_prob(torch.tensor(v))
        bound = (log_p * weight).sum(-1) + S + 0.5 * math.log(2 * math.pi * math.e)
        index = int(bound.argmax())
        best = float(bound.flatten()[index])
        centre, width = torch.stack([M.flatten()[index], S.flatten()[index]]), width / 2
    return best


def test_a_sampled_bound_is_climbed_to_the_best_gaussian() -> None:
    v = binary_states(2)
    guide = Amortized(gaussian)
    local = LocalGradient(40, 0.15, num_particles=100)
    em = EM(gaussian, guide, e_step=SemiAmortized(local), m_step=None)
    result = em.e_half(em.call(v))
    best = torch.tensor([best_gaussian_bound(float(a), 3.0) + best_gaussian_bound(float(b), -2.0) for a, b in v])
    assert not result.exact
    assert result.error is not None
    assert ((result.bound - best).abs() < 5 * result.error + 0.02).all()
    start = em.call(v).bound(None, guide.rows_parameters(em.call(v).program), 1000)[0]
    assert (result.bound > start + 0.1).all()


def test_a_sampled_climb_leaves_no_trace() -> None:
    v = binary_states(2)
    guide = Amortized(gaussian)
    em = EM(gaussian, guide, e_step=SemiAmortized(LocalGradient(3)), m_step=None)
    em.call(v)
    guide(v)
    before = everything()
    em.infer(v)
    assert not changed(before)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    pyro.set_rng_seed(3)
    first = em.infer(v)["h"].mean
    second = em.infer(v)["h"].mean
    pyro.set_rng_seed(3)
    assert torch.equal(em.infer(v)["h"].mean, first)
    assert not torch.equal(second, first)


def test_one_particle_has_no_error_to_speak_of() -> None:
    v = binary_states(2)
    em = EM(gaussian, Amortized(gaussian), e_step=SemiAmortized(LocalGradient(1, 0.1, 1)), m_step=None)
    error = em.e_half(em.call(v)).error
    assert error is not None
    assert error.isnan().all()


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: SemiAmortized(Gradient(Adam({"lr": 1.0}))),
            TypeError,
            r"Expected local to be FixedPoint\(\) or Local",
        ),
        (lambda: SemiAmortized(FixedPoint), TypeError, r"Expected local to be FixedPoint\(\) or Local"),
        (lambda: SemiAmortized(FixedPoint(), Adam({"lr": 1.0})), TypeError, "Expected train to be an E-step or None"),
        (lambda: LocalGradient(0), ValueError, "Expected num_steps >= 1, but got 0."),
        (lambda: LocalGradient(num_particles=1.5), TypeError, "Expected num_particles to be an int"),
        (lambda: LocalGradient(learning_rate=0.0), ValueError, "Expected a learning_rate above 0, but got 0.0"),
        (lambda: LocalGradient(learning_rate=math.inf), ValueError, "Expected a learning_rate above 0, but got inf"),
        (
            lambda: LocalGradient(learning_rate="fast"),
            TypeError,
            "Expected learning_rate to be a number, but got",
        ),
    ],
)
def test_refusals_of_the_settings(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_refusals_at_the_door() -> None:
    model, _ = sparse_coding()
    with pytest.raises(TypeError, match=r"a network \(Amortized\) for SemiAmortized, but got MeanField. For a table"):
        EM(model, MeanField(model), e_step=SemiAmortized(FixedPoint()), m_step=None)
    layers = SigmoidBeliefNetwork([2, 3, 4])
    guide = Amortized(layers)
    data = torch.rand(N, 4).round()
    em = EM(layers, guide, e_step=SemiAmortized(FixedPoint(), train=Dream(Adam({"lr": 0.1}))), m_step=None)
    em.call(data)
    guide(data)
    before = everything()
    with pytest.raises(TypeError, match="do not depend on each other's values for SemiAmortized"):
        em.step(data)
    assert not changed(before)
    with pytest.raises(TypeError, match="do not depend on each other's values for SemiAmortized"):
        EM(layers, guide, e_step=SemiAmortized(FixedPoint()), m_step=None)


def test_discrete_draws_have_no_gradient() -> None:
    """25 coupled units: too many states to sum, and no quadratic form."""
    model = SigmoidBeliefNetwork([25, 4])
    v = torch.rand(N, 4).round()
    em = EM(model, Amortized(model), e_step=SemiAmortized(LocalGradient()), m_step=None)
    with pytest.raises(ValueError, match=r"with a gradient, for LocalGradient, but got the discrete sites \['h1'\]"):
        em.infer(v)


def test_a_schedule_of_the_local_sweeps_is_kept() -> None:
    local = FixedPoint(Sequential(), max_sweeps=3)
    assert SemiAmortized(local).local is local
    assert SemiAmortized(local).optim is None
    assert repr(LocalGradient(3)) == "LocalGradient(3, 0.1, 10)"


def test_a_gaussian_machine_is_served() -> None:
    model = HelmholtzMachine(4, 2)
    v = torch.rand(N, 4).round()
    em = EM(
        model, Amortized(model), e_step=SemiAmortized(LocalGradient(2), train=Dream(Adam({"lr": 0.1}))), m_step=None
    )
    assert math.isfinite(em.step(v))


# ------------------------------------------------------------------------------------- the driver sees the local q


def test_evaluation_takes_the_local_steps() -> None:
    model, v = sparse_coding()
    guide = network(model, v)
    em = EM(model, guide, e_step=SemiAmortized(FixedPoint()), m_step=None)
    before = everything()
    assert em.evaluate_loss(v) == pytest.approx(em.step(v), abs=1e-10)
    own = EM(model, guide, e_step=Gradient(SGD({"lr": 0.1})), m_step=None)
    assert em.evaluate_loss(v) < own.evaluate_loss(v) - 1
    assert not changed(before)


def test_where_nothing_is_exact_theta_is_learned_at_the_local_q_too() -> None:
    """The M-step's expected move is sum_n E_q[d log p / d b] at the local q, by quadrature; not at the network's."""

    def model(v: Tensor) -> None:
        b = pyro.param("b", torch.tensor(0.5))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=4 * h + b).to_event(1), obs=v)

    v = torch.tensor([[0.0], [1.0], [1.0]])
    guide = Amortized(model)
    e_step = SemiAmortized(LocalGradient(30, 0.1, num_particles=100))
    em = EM(model, guide, e_step=e_step, m_step=Gradient(SGD({"lr": 1.0})))
    call = em.call(v)
    guide(v)
    result = em.e_half(call)
    x = torch.linspace(-8, 8, 2001)
    expected = {}
    for name, q in (("local", result.posterior), ("network", guide.posterior(v))):
        density = q["h"].distribution.base_dist
        weight = torch.stack(
            [torch.distributions.Normal(density.loc[n, 0], density.scale[n, 0]).log_prob(x) for n in range(3)]
        )
        slope = v - (4 * x + 0.5).sigmoid()
        expected[name] = float((weight.exp() * slope).sum() * (x[1] - x[0]))
    moves = []
    for _ in range(400):
        em.m_half(call, result)
        moves.append(float(pyro.param("b").detach()) - 0.5)
        with torch.no_grad():
            pyro.get_param_store()._params["b"].fill_(0.5)
    samples = torch.tensor(moves)
    error = float(samples.std()) / 20
    assert abs(float(samples.mean()) - expected["local"]) < 5 * error
    assert abs(expected["network"] - expected["local"]) > 10 * error
