from __future__ import annotations

import math
import re
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from pyro_ext import EM, Gradient, WakeSleep
from pyro_ext.dream import Dream
from pyro_ext.guides import Amortized
from pyro_ext.models import HelmholtzMachine
from tests.oracles.enumeration import LOG_2PI, bernoulli_log_prob, binary_states, program_log_joint

D, H = 3, 2


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def test_joint_is_the_formula() -> None:
    model = HelmholtzMachine(D, H, hidden=5)
    v, h = binary_states(D), 2 * torch.randn(4, 8, H)
    first, _, last = model.decoder
    logits = torch.tanh(h @ first.weight.T + first.bias) @ last.weight.T + last.bias
    prior = (-0.5 * (h**2 + LOG_2PI)).sum(-1)
    expected = prior + bernoulli_log_prob(v, logits)
    torch.testing.assert_close(program_log_joint(model, {"h": h}, v), expected, rtol=1e-12, atol=1e-12)


def test_the_default_decoder() -> None:
    shapes = [tuple(p.shape) for p in HelmholtzMachine(D, H).decoder.parameters()]
    assert shapes == [(64, H), (64,), (D, 64), (D,)]


def test_dreams_have_the_frequencies_of_the_model() -> None:
    model, n = HelmholtzMachine(D, H), 20_000
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    # Quadrature on a grid: the integrand is smooth and vanishes at the ends.
    axis = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    with torch.no_grad():
        exact = program_log_joint(model, {"h": grid}, binary_states(D)).exp().sum(0) * 0.1**2
    assert exact.sum().item() == pytest.approx(1, abs=1e-9)
    index = (model.dream(n) @ torch.tensor([4.0, 2.0, 1.0])).long()
    frequency = torch.bincount(index, minlength=8) / n
    assert ((frequency - exact).abs() < 5 * (exact * (1 - exact) / n).sqrt()).all()


def test_a_decoder_of_ones_own_is_trained() -> None:
    decoder = nn.Linear(H, D)
    model = HelmholtzMachine(D, H, decoder, name="machine")
    model(binary_states(D))
    store = pyro.get_param_store()
    assert store["machine.decoder$$$weight"] is decoder.weight
    assert set(map(id, model.parameters())) == {id(decoder.weight), id(decoder.bias)}


def test_initialize_sets_the_last_bias() -> None:
    v = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    expected = torch.tensor([2.5 / 3, 0.5 / 3, 1.5 / 3])
    for decoder in (None, nn.Linear(H, D)):
        model = HelmholtzMachine(D, H, decoder)
        model.initialize(v)
        last = list(model.decoder.modules())[-1]
        torch.testing.assert_close(last.bias.detach().sigmoid(), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) * self.scale


class Resettable(Scaled):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 7.0)


def test_a_decoder_that_cannot_start_anew_is_refused() -> None:
    model = HelmholtzMachine(D, H, nn.Sequential(nn.Linear(H, H), Scaled()))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="to know how to start anew, but got Scaled without reset_parameters. Give"):
        model.initialize(binary_states(D))
    assert all(map(torch.equal, before, model.parameters()))


def test_a_decoder_starts_anew_by_its_own_method() -> None:
    model = HelmholtzMachine(D, H, Resettable())
    model.initialize(binary_states(D))
    assert (model.decoder.scale == 7).all()


def test_a_decoder_of_another_width_is_refused() -> None:
    model = HelmholtzMachine(D, H, nn.Linear(H, D + 1))
    message = "Expected the decoder to return 3 logits a row, but got shape (8, 4). End it with that many outputs."
    with pytest.raises(ValueError, match=re.escape(message)):
        model(binary_states(D))
    with pytest.raises(ValueError, match="Expected the decoder to return 3 logits a row"):
        model.dream(2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HelmholtzMachine(D, 0), ValueError, "Expected num_latents >= 1, but got 0."),
        (lambda: HelmholtzMachine(0, H), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: HelmholtzMachine(D, H, hidden=0), ValueError, "Expected hidden >= 1, but got 0."),
        (
            lambda: HelmholtzMachine(D, H, math.tanh),
            TypeError,
            "Expected decoder to be a torch.nn.Module, but got buil",
        ),
        (
            lambda: HelmholtzMachine(D, H, nn.Linear(H, D), hidden=3),
            ValueError,
            "Expected hidden only without a decoder, but got hidden=3. Pass one of the two.",
        ),
    ],
)
def test_refusals_of_the_constructor(
    build: Callable[[], HelmholtzMachine], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


# ------------------------------------------------------------------------------------- wake, sleep, and both
#
# The machine of one Gaussian latent and three pixels: all 8 states of v are enumerated, and h is integrated on a grid.

AXIS = torch.linspace(-9, 9, 1201, dtype=torch.float64)
STEP = 18 / 1200
K = 5.0


class Recognition(nn.Module):
    """Mean and log-scale of q(h | v), linear in v."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, v: Tensor) -> Tensor:
        return v @ self.weight.T + self.bias


def small_machine() -> tuple[HelmholtzMachine, Amortized, Recognition, Tensor]:
    """Model, guide, the guide's network, and all states of v as data (with one doubled)."""
    model = HelmholtzMachine(D, 1, nn.Linear(1, D))
    network = Recognition(0.5 * torch.randn(2, D), torch.tensor([0.3, -0.4]))
    guide = Amortized(model, encoder=network)
    v = torch.cat([binary_states(D), binary_states(D)[5:6]])
    guide(v)
    return model, guide, network, v


def log_p_on_the_grid(weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """log p(v, h) by hand, (G, N)."""
    h = AXIS[:, None, None]
    return -0.5 * (AXIS**2 + LOG_2PI)[:, None] + bernoulli_log_prob(v, h @ weight.T + bias)


def log_q_on_the_grid(weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
    """log q(h | v) by hand, (G, N)."""
    mean, log_scale = (v @ weight.T + bias).unbind(-1)
    return -0.5 * (((AXIS[:, None] - mean) / log_scale.exp()) ** 2 + LOG_2PI) - log_scale


def exact(model: HelmholtzMachine, network: Recognition, v: Tensor) -> tuple[Tensor, Tensor]:
    """log p(v) and L per row."""
    with torch.no_grad():
        log_p = log_p_on_the_grid(model.decoder.weight, model.decoder.bias, v)
        log_q = log_q_on_the_grid(network.weight, network.bias, v)
        return log_p.logsumexp(0) + math.log(STEP), (log_q.exp() * (log_p - log_q)).sum(0) * STEP


def assert_near(samples: Tensor, expected: Tensor) -> None:
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() < K * error + 1e-6).all(), (samples.mean(0), expected, error)


def moves(step: Callable[[], object], parameters: list[Tensor], repeats: int) -> Tensor:
    """How far a half-step moves parameters from where they are, each time from there."""
    before, found = [p.detach().clone() for p in parameters], []
    for _ in range(repeats):
        step()
        found.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]))
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
    return torch.stack(found)


def test_the_machine_has_the_guide_of_the_note() -> None:
    _, guide, network, v = small_machine()
    posterior = guide.posterior(v)
    mean, log_scale = (v @ network.weight.T + network.bias).detach().unbind(-1)
    torch.testing.assert_close(posterior["h"].mean[:, 0], mean)
    h = torch.randn(4, len(v), 1)
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(h[..., 0])
    torch.testing.assert_close(posterior.log_prob({"h": h}), expected)


def test_a_wake_step_is_the_expected_gradient_of_the_joint() -> None:
    """theta: sum_n E_q[grad log p(v_n, h)], by quadrature; phi does not move."""
    model, guide, network, v = small_machine()
    em = EM(model, guide, e_step=Dream(SGD({"lr": 1.0})), m_step=Gradient(SGD({"lr": 1.0})))
    call = em.call(v)
    theta = [model.decoder.weight, model.decoder.bias]
    leaves = [p.detach().clone().requires_grad_() for p in theta]
    with torch.no_grad():
        q = log_q_on_the_grid(network.weight, network.bias, v).exp() * STEP
    gradient = torch.autograd.grad((q * log_p_on_the_grid(*leaves, v)).sum(), leaves)
    result = em.e_step.improve(call, keep=False)
    phi = [p.detach().clone() for p in network.parameters()]
    found = moves(lambda: em.m_half(call, result), theta, 120)
    assert_near(found, torch.cat([g.flatten() for g in gradient]))
    assert all(map(torch.equal, phi, network.parameters()))


def test_a_sleep_step_is_the_expected_gradient_on_dreams() -> None:
    """phi: N E_p(v, h)[grad log q(h | v)], by quadrature over h and all states of v; theta does not move."""
    model, guide, network, v = small_machine()
    em = EM(model, guide, e_step=Dream(SGD({"lr": 1.0}), 1, 40), m_step=None)
    call = em.call(v)
    states = binary_states(D)
    with torch.no_grad():
        p = log_p_on_the_grid(model.decoder.weight, model.decoder.bias, states).exp() * STEP
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    leaves = [p.detach().clone().requires_grad_() for p in network.parameters()]
    gradient = torch.autograd.grad(len(v) * (p * log_q_on_the_grid(*leaves, states)).sum(), leaves)
    theta = [p.detach().clone() for p in model.parameters()]
    found = moves(lambda: em.e_step._stepper._step(lambda: em.e_step._sleep(call)), list(network.parameters()), 300)
    assert_near(found, torch.cat([g.flatten() for g in gradient]))
    assert all(map(torch.equal, theta, model.parameters()))


@pytest.mark.parametrize("by_svi", [False, True], ids=["EM", "SVI"])
def test_wake_and_sleep_in_alternation_learn_the_data(by_svi: bool) -> None:
    """Rows are 000 or 111, with one pixel in twenty flipped: log p(v) nears its maximum, and L follows it."""
    model, guide, network, _ = small_machine()
    v = (torch.rand(200, 1) < 0.5).double().expand(-1, D)
    v = (v + (torch.rand(200, D) < 0.05)) % 2
    start, alike = exact(model, network, v)[0].mean(), all_equal(model.dream(5000))
    if by_svi:
        svi = SVI(model, guide, Adam({"lr": 0.1}), loss=WakeSleep())
        for _ in range(150):
            svi.step(v)
    else:
        awake = Gradient(Adam({"lr": 0.1}), 15, loss=Trace_ELBO())
        em = EM(model, guide, e_step=Dream(Adam({"lr": 0.1}), 15), m_step=awake)
        for _ in range(10):
            em.step(v)
    log_p, bound = exact(model, network, v)
    # No model gives the rows more than their own frequencies do.
    index = (v @ torch.tensor([4.0, 2.0, 1.0])).long()
    frequency = torch.bincount(index, minlength=8) / len(v)
    best = float(torch.xlogy(frequency, frequency).sum())
    assert start < best - 0.5
    assert best - 0.15 < float(log_p.mean()) < best
    assert (bound <= log_p + 1e-9).all()
    assert float((log_p - bound).mean()) < 0.15
    # Dreams come to resemble the rows, 0.8 of which are of one colour.
    assert alike < 0.4
    assert 0.6 < all_equal(model.dream(5000)) < 0.9


def all_equal(v: Tensor) -> float:
    """Share of the rows that are of one colour."""
    return float((v == v[:, :1]).all(1).double().mean())
