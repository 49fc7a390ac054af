"""Gradient steps: exact gradients where L is exact (19.21-19.27), and only the block that is asked to moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from pyro_ext import EM, FixedPoint, Gradient, fit
from pyro_ext.evaluators import Enumerated, Quadratic
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.structured import Structured
from tests.oracles.enumeration import (
    binary_sparse_coding_log_joint,
    binary_states,
    factorial_posterior,
    sigmoid_belief_network_log_joint,
)
from tests.oracles.programs import (
    sigmoid_network,
    sigmoid_network_parameters,
    sparse_coding,
    sparse_coding_parameters,
)

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-10, "rtol": 1e-10}
K = 5.0


def unconstrained(name: str) -> Tensor:
    return pyro.get_param_store()[name].unconstrained()


def values_of(*names: str) -> dict[str, Tensor]:
    return {name: unconstrained(name).detach().clone() for name in names}


def everything() -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pyro.get_param_store().named_parameters()}


def changed(before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in everything().items() if name not in before or not torch.equal(before[name], value)}


def sparse_coding_gradients(v: Tensor) -> dict[str, Tensor]:
    """Gradients of sum_n log p(v_n) with respect to the unconstrained parameters, by enumeration."""
    leaves = {n: x.requires_grad_() for n, x in values_of("b", "W", "beta").items()}
    log_joint = binary_sparse_coding_log_joint(v, binary_states(3), leaves["W"], leaves["b"], leaves["beta"].exp())
    grads = torch.autograd.grad(log_joint.logsumexp(0).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def network_log_joint(v: Tensor, theta: dict[str, Tensor]) -> Tensor:
    states = binary_states(5)
    layers = [states[:, None, 2:], states[:, None, :2]]
    weights, biases = [theta["W1"], theta["W2"]], [theta["b0"], theta["b1"], theta["b2"]]
    return sigmoid_belief_network_log_joint(v, layers, weights, biases)


@pytest.mark.parametrize("quadratic", [True, False], ids=["quadratic", "enumerated"])
def test_with_the_exact_posterior_an_m_step_climbs_log_p(quadratic: bool) -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    em = EM(sparse_coding, Structured(sparse_coding), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1.0})))
    em._quadratic = quadratic
    assert isinstance(em.call(v).evaluator(), Quadratic if quadratic else Enumerated)
    before, expected = values_of("b", "W", "beta"), sparse_coding_gradients(v)
    em.step(v)
    for name, value in values_of("b", "W", "beta").items():
        torch.testing.assert_close(value - before[name], expected[name], **EXACT)


def test_a_network_climbs_log_p_too() -> None:
    sigmoid_network_parameters(4)
    v = torch.bernoulli(torch.full((6, 4), 0.5))
    model = sigmoid_network
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1.0})))
    leaves = {n: x.requires_grad_() for n, x in values_of("b2", "W2", "b1", "W1", "b0").items()}
    grads = torch.autograd.grad(network_log_joint(v, leaves).logsumexp(0).sum(), list(leaves.values()))
    em.step(v)
    for (name, old), gradient in zip(leaves.items(), grads, strict=True):
        torch.testing.assert_close(unconstrained(name) - old, gradient, **EXACT)


def test_with_a_factorised_q_an_m_step_climbs_the_bound() -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    em = EM(sparse_coding, MeanField(sparse_coding), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1.0})))
    leaves = {n: x.requires_grad_() for n, x in values_of("b", "W", "beta").items()}
    em.step(v)
    q = factorial_posterior(em.guide.posterior(v)["h"].mean)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(3), leaves["W"], leaves["b"], leaves["beta"].exp())
    grads = torch.autograd.grad((q * log_joint).sum(), list(leaves.values()))
    for (name, old), gradient in zip(leaves.items(), grads, strict=True):
        torch.testing.assert_close(unconstrained(name) - old, gradient, **EXACT)


@pytest.mark.parametrize("scale", [1, 4])
def test_a_subsampled_m_step_is_scaled_as_in_svi(scale: int) -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(8, 5)

    def model(v: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(v), subsample=index):
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("b")).to_event(1))
            noise = pyro.param("beta").rsqrt()
            pyro.sample("v", dist.Normal(h @ pyro.param("W").T, noise).to_event(1), obs=v[index])

    index = torch.randperm(8)[: 8 // scale]
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1.0})))
    before, expected = values_of("b", "W", "beta"), sparse_coding_gradients(v[index])
    loss = em.step(v, index)
    b, W, beta = before["b"], before["W"], before["beta"].exp()
    log_p = binary_sparse_coding_log_joint(v[index], binary_states(3), W, b, beta).logsumexp(0)
    assert loss == pytest.approx(-scale * log_p.sum().item(), rel=1e-10)
    for name, value in values_of("b", "W", "beta").items():
        torch.testing.assert_close(value - before[name], scale * expected[name], **EXACT)


@pytest.mark.parametrize("scaled", [False, True], ids=["batches", "subsampled"])
def test_a_fit_over_batches_is_stochastic_gradient_ascent_on_log_p(scaled: bool) -> None:
    """The whole trajectory is that of autograd on the enumerated log p(v) of each batch, N/B included."""
    sparse_coding_parameters(5, 3)
    v, rate = torch.randn(22, 5), 0.003

    def subsampled(v: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(v), subsample=index):
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("b")).to_event(1))
            noise = pyro.param("beta").rsqrt()
            pyro.sample("v", dist.Normal(h @ pyro.param("W").T, noise).to_event(1), obs=v[index])

    parts = torch.randperm(22).split(8)
    model = subsampled if scaled else sparse_coding
    leaves = values_of("b", "W", "beta")
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": rate})))
    history = fit(em, [(v, index) if scaled else v[index] for index in parts], num_epochs=3, progress=False)
    losses = []
    for index in [*parts] * 3:
        b, W, beta = (x.requires_grad_() for x in leaves.values())
        log_p = binary_sparse_coding_log_joint(v[index], binary_states(3), W, b, beta.exp()).logsumexp(0)
        losses.append(-log_p.mean().item())
        grads = torch.autograd.grad(log_p.sum() * (22 / len(index) if scaled else 1), (b, W, beta))
        leaves = {n: (x + rate * g).detach() for (n, x), g in zip(leaves.items(), grads, strict=True)}
    assert history.loss == pytest.approx(losses, rel=1e-10)
    for name, expected in leaves.items():
        torch.testing.assert_close(unconstrained(name), expected, **EXACT)


def test_an_e_step_climbs_the_bound_in_q_alone() -> None:
    b, W, beta = sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    em = EM(sparse_coding, MeanField(sparse_coding), e_step=Gradient(SGD({"lr": 0.5})), m_step=None)
    em.guide.setup(v)
    table = em.guide.table(em.guide.blocks[0])
    old = table.detach().clone()
    before = everything()
    log_joint = binary_sparse_coding_log_joint(v, binary_states(3), W, b, beta)
    leaf = old.clone().requires_grad_()
    q = factorial_posterior(leaf.sigmoid())
    (gradient,) = torch.autograd.grad((q * (log_joint - q.log())).sum(), leaf)
    loss = em.step(v)
    torch.testing.assert_close(table - old, 0.5 * gradient, **EXACT)
    assert changed(before) == {f"{em.guide._pyro_name}.tables.h"}
    q = factorial_posterior(table.detach().sigmoid())
    assert loss == pytest.approx(-(q * (log_joint - q.log())).sum().item(), rel=1e-10)


def test_momentum_moves_only_the_block_of_its_step() -> None:
    """Adam keeps moving what has a gradient of zeros: E- and M-steps must not see each other's parameters."""
    sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    theta = {"b", "W", "beta"}
    guide = MeanField(sparse_coding)
    optim = Adam({"lr": 0.1})
    both = EM(sparse_coding, guide, e_step=Gradient(optim), m_step=Gradient(optim))
    both.step(v)
    for tensor in (unconstrained(name) for name in everything()):
        tensor.grad = torch.zeros_like(tensor)  # as Pyro's SVI leaves them
    before = everything()
    only_q = EM(sparse_coding, guide, e_step=both.e_step, m_step=None)
    only_q.step(v)
    table = f"{guide._pyro_name}.tables.h"
    assert changed(before) == {table}
    before = everything()
    call = both.call(v)
    both.m_half(call, FixedPoint().improve(call, keep=False))
    assert changed(before) == theta


def test_several_steps_raise_the_bound() -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    e_step, m_step = Gradient(Adam({"lr": 0.05}), num_steps=5), Gradient(Adam({"lr": 0.02}), num_steps=5)
    em = EM(sparse_coding, MeanField(sparse_coding), e_step=e_step, m_step=m_step)
    losses = [em.step(v) for _ in range(40)]
    assert losses[-1] < losses[0] - 5
    assert em.parts == (e_step.optim, m_step.optim)


# ---------------------------------------------------------------- where L is not exact


def link(v: Tensor) -> None:
    """Real latents behind a sigmoid: no exact L; theta is one weight."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Bernoulli(logits=pyro.param("w", torch.tensor(0.5)) * h + 1), obs=v)


def test_without_an_exact_bound_a_pyro_elbo_serves() -> None:
    v = torch.bernoulli(torch.full((20,), 0.7))
    em = EM(link, MeanField(link), e_step=Gradient(Adam({"lr": 0.05})), m_step=Gradient(Adam({"lr": 0.05})))
    before = em.evaluate_loss(v)
    for _ in range(100):
        em.step(v)
    after = sum(em.evaluate_loss(v) for _ in range(20)) / 20
    assert after < before
    assert changed({}) == {"w", f"{em.guide._pyro_name}.tables.h"}


def test_sampled_loss_is_the_mean_of_that_of_pyro() -> None:
    v = torch.bernoulli(torch.full((20,), 0.7))
    guide = MeanField(link)
    em = EM(link, guide, e_step=Gradient(SGD({"lr": 1e-12}), num_particles=500), m_step=None)
    loss = em.step(v)
    draws = torch.tensor([Trace_ELBO().loss(link, guide, v) for _ in range(500)])
    error = draws.std().item() / 500**0.5
    assert abs(loss - draws.mean().item()) < K * 2**0.5 * error


@pytest.mark.parametrize("explicit", [True, False])
def test_a_given_elbo_is_used_and_agrees_with_the_exact_gradient(explicit: bool) -> None:
    """Gaussian latents: the reparametrised gradient's mean is the exact gradient."""
    w = torch.tensor([1.0, -0.5])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[..., None] * pyro.param("w", w.clone()), 1.0).to_event(1), obs=v)

    v = torch.randn(5, 2)
    loss = Trace_ELBO(num_particles=4000, vectorize_particles=True) if explicit else None
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1.0}), loss=loss))
    em.step(v)
    posterior = em.guide.posterior(v)["h"]
    expected = posterior.cross(v)[0] - posterior.gram()[0, 0] * w
    moved = unconstrained("w") - w
    h = posterior.sample(4000)[..., None]
    error = (h * (v - h * w)).sum(1).std(0) / 4000**0.5
    assert bool(((moved - expected).abs() <= (K * error if explicit else 1e-10)).all())


def test_a_subsampled_program_learns_with_gradients_alone() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v), subsample_size=5) as index:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=pyro.param("w", torch.tensor(0.5)) * h + 1), obs=v[index])

    v = torch.bernoulli(torch.full((20,), 0.7))
    em = EM(model, MeanField(model), e_step=Gradient(Adam({"lr": 0.05})), m_step=Gradient(Adam({"lr": 0.05})))
    for _ in range(3):
        em.step(v)
    assert pyro.param("w").item() != 0.5


# ---------------------------------------------------------------- refusals


def test_settings_are_checked() -> None:
    with pytest.raises(
        TypeError, match=r"Expected an optimizer from pyro.optim, but got .*Adam. Write pyro.optim.Adam"
    ):
        Gradient(torch.optim.Adam(nn.Linear(1, 1).parameters()))
    with pytest.raises(ValueError, match="Expected num_steps of at least 1, but got 0. Use m_step=None to hold theta."):
        Gradient(SGD({"lr": 1.0}), num_steps=0)
    with pytest.raises(TypeError, match="Expected an ELBO of pyro.infer, but got ABCMeta. Pass an instance."):
        Gradient(SGD({"lr": 1.0}), loss=JitTrace_ELBO)


@pytest.mark.parametrize("set_up", [False, True])
@pytest.mark.parametrize("family", [MeanField, Dirac])
def test_tables_cannot_infer_new_data_by_gradient(set_up: bool, family: Callable[[Any], Any]) -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(7, 5)
    em = EM(sparse_coding, family(sparse_coding), e_step=Gradient(SGD({"lr": 1.0})), m_step=None)
    if set_up:
        em.guide.setup(v)
    before = everything()
    with pytest.raises(
        ValueError, match="Expected an E-step that can infer new data, but got Gradient on the tables of"
    ):
        em.infer(torch.randn(4, 5))
    assert em.guide.is_set_up is set_up
    assert not changed(before)
    assert everything().keys() == before.keys()


def test_discrete_points_have_no_gradient() -> None:
    sparse_coding_parameters(5, 3)
    em = EM(sparse_coding, Dirac(sparse_coding), e_step=Gradient(SGD({"lr": 1.0})), m_step=None)
    with pytest.raises(TypeError, match="Expected factors with a gradient for Gradient, but got point masses on .*'h'"):
        em.step(torch.randn(4, 5))
