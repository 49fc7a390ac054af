"""Refine: q* is solved from the network's q, the network regresses on it, and nothing else moves (19.5.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import (
    EM,
    FISTA,
    LBFGS,
    ClosedForm,
    Cold,
    FeatureSign,
    FixedPoint,
    Gradient,
    Maximize,
    MeanChange,
    Newton,
    Parallel,
    Sampled,
    fit,
)
from pyro_ext.guides import LISTA, PSD, Amortized, MeanField, PointEncoder, Structured
from pyro_ext.local_gradient import LocalGradient
from pyro_ext.models import BinarySparseCoding, SigmoidBeliefNetwork, SparseCoding
from pyro_ext.program import Program
from pyro_ext.refine import Refine
from tests.oracles.enumeration import binary_states, elbo, factorial_posterior, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")

D, F, N = 4, 3, 6
BETA, RATE = 2.0, 0.5


class Linear(PointEncoder):
    """f(v) = A v, or exp(A v / 4) for positive latents."""

    def __init__(self, outputs: int = F, inputs: int = D, *, positive: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(0.3 * torch.randn(outputs, inputs))
        self.positive = positive

    def forward(self, v: Tensor) -> Tensor:
        found = v @ self.A.mT
        return (found / 4).exp() if self.positive else found


class Rectified(Linear):
    """f(v) = max(A v, 0), with exact zeros."""

    def forward(self, v: Tensor) -> Tensor:
        return super().forward(v).clamp(min=0)


def lasso(v: Tensor) -> None:
    W = pyro.param("W", lambda: torch.randn(D, F))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1 / RATE).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, BETA**-0.5).to_event(1), obs=v)


def data(n: int = N, width: int = D) -> Tensor:
    return 2 * torch.randn(n, width)


def network_of(model: Any, v: Tensor, encoder: Any = None, name: str | None = None) -> Amortized:
    guide = Amortized(model, encoder=encoder, name=name)
    guide.setup(v)
    return guide


def everything() -> dict[str, Tensor]:
    store = pyro.get_param_store()
    return {name: value.detach().clone() for name, value in store.named_parameters()}


def changed(before: dict[str, Tensor]) -> set[str]:
    after = everything()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def descend(v: Tensor, W: Tensor, f: Tensor, alpha: float) -> Tensor:
    """Coordinate descent on beta/2 |v - W h|^2 + rate |h|_1 + alpha/2 |h - f|^2, row by row."""
    G, b = BETA * W.mT @ W + alpha * torch.eye(F), BETA * v @ W + alpha * f
    h = torch.zeros_like(b)
    for _ in range(2000):
        for i in range(F):
            rest = b[:, i] - h @ G[i] + h[:, i] * G[i, i]
            h[:, i] = rest.sign() * (rest.abs() - RATE).clamp(min=0) / G[i, i]
    return h


# ---------------------------------------------------------------------- the step


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_step_is_solving_and_one_gradient_step_of_the_regression(alpha: float) -> None:
    v, lr = data(), 0.02
    encoder = Linear()
    guide = network_of(lasso, v, encoder)
    e_step = Refine(Maximize(FeatureSign(tolerance=1e-13)), SGD({"lr": lr}), num_steps=2, strength=alpha)
    em = EM(lasso, guide, e_step=e_step, m_step=None)
    A, W = encoder.A.detach().clone(), pyro.param("W").detach().clone()
    wanted = descend(v, W, v @ A.mT, alpha)

    result = em.e_half(em.call(v))

    torch.testing.assert_close(result.posterior["h"].mean, wanted, rtol=0, atol=1e-10)
    assert bool((wanted == 0).any())
    assert bool((wanted != 0).any())
    assert torch.equal(result.posterior["h"].mean == 0, wanted == 0)
    for _ in range(2):
        distance = v @ A.mT - wanted
        assert e_step.last_loss is not None
        loss = 0.5 * distance.square().sum(-1).mean()
        A = A - lr * distance.mT @ v
    torch.testing.assert_close(encoder.A.detach(), A, rtol=0, atol=1e-10)
    assert e_step.last_loss == pytest.approx(float(loss), abs=1e-10)
    # L is log p(v, h*), without the pull.
    log_p = dist.Normal(wanted @ W.mT, BETA**-0.5).log_prob(v).sum(-1) + dist.Laplace(0, 1 / RATE).log_prob(wanted).sum(
        -1
    )
    torch.testing.assert_close(result.bound, log_p, rtol=0, atol=1e-10)
    assert (result.exact, result.start, result.monotone) == (True, "warm", False)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 5.0])
def test_points_are_optimal_for_the_objective_with_the_pull(alpha: float) -> None:
    v = data()
    guide = network_of(lasso, v, Linear())
    W, f = pyro.param("W").detach(), guide.posterior(v)["h"].mean
    em = EM(lasso, guide, e_step=Refine(Maximize(), SGD({"lr": 0.0}), strength=alpha), m_step=None)
    h = em.e_half(em.call(v)).posterior["h"].mean
    slope = BETA * (h @ W.mT - v) @ W + alpha * (h - f)
    # KKT: the slope balances the penalty where h is not 0, and stays within it where h is.
    excess = torch.where(h == 0, (slope.abs() - RATE).clamp(min=0), slope + RATE * h.sign())
    assert float(excess.abs().max()) < 1e-2
    assert bool((em.e_step.target.certificate.gap < 1e-4).all())  # type: ignore[attr-defined]


def two_kinds(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.3, 2.0).expand([2]).to_event(1))
        z = pyro.sample("z", dist.Normal(1.0, 0.5))
        pyro.sample(
            "v", dist.Normal(torch.stack([h[..., 0] + z, h[..., 1] - h[..., 0], z], -1), 0.7).to_event(1), obs=v
        )


def gaussian(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.5, 2.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]]), 0.7).to_event(1), obs=v)


def rates(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([2]).to_event(1))
        pyro.sample("v", dist.Poisson((h.sum(-1, keepdim=True)).exp()).expand([len(v), 3]).to_event(1), obs=v)


def heavy(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.StudentT(4.0, 0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).expand([len(v), 3]).to_event(1), obs=v)


def widths(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        s = pyro.sample("s", dist.Gamma(3.0, 2.0))
        pyro.sample("v", dist.Normal(0.0, s.unsqueeze(-1)).expand([len(v), 3]).to_event(1), obs=v)


def positive(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(0.8).expand([2]).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(2.0))
        pyro.sample(
            "v", dist.Normal(torch.cat([h, s.unsqueeze(-1)], -1) - h.mean(-1, keepdim=True), 0.7).to_event(1), obs=v
        )


def counted(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(0.8).expand([2]).to_event(1))
        pyro.sample("v", dist.Poisson(h.sum(-1, keepdim=True) + 0.3).expand([len(v), 3]).to_event(1), obs=v)


CASES: dict[str, tuple[Any, dict[str, Any], Callable[[], Tensor], Maximize]] = {
    "eliminated": (two_kinds, {"h": (2, False), "z": (1, False)}, lambda: data(5, 3), Maximize(FISTA(1e-13))),
    "all eliminated": (gaussian, {"h": (2, False)}, lambda: data(5, 3), Maximize()),
    "Laplace and counts": (
        rates,
        {"h": (2, False)},
        lambda: torch.tensor([[0.0, 2, 1], [5, 3, 4]]),
        Maximize(FISTA(1e-12)),
    ),
    "heavy tails": (heavy, {"h": (2, False)}, lambda: data(5, 3), Maximize(LBFGS(1e-14))),
    "as a program": (gaussian, {"h": (2, False)}, lambda: data(5, 3), Maximize(Newton(1e-14))),
    "positive": (widths, {"s": (1, True)}, lambda: data(5, 3), Maximize(LBFGS(1e-14))),
    "positive and sparse": (positive, {"h": (2, True), "s": (1, True)}, lambda: data(5, 3), Maximize(FISTA(1e-13))),
    "positive, zeros on the way": (
        counted,
        {"h": (2, None)},
        lambda: torch.tensor([[1.0, 2, 1], [5, 3, 4]]),
        Maximize(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pull_serves_every_kind_of_program(case: str) -> None:
    """Against the density with the pull: no point of a cloud around the answer is better, nor is one far away."""
    model, widths_of, make, target = CASES[case]
    v, alpha = make(), 0.9
    encoders = {
        name: (Rectified(w, 3) if sign is None else Linear(w, 3, positive=sign))
        for name, (w, sign) in widths_of.items()
    }
    guide = network_of(model, v, encoders)
    em = EM(model, guide, e_step=Refine(target, SGD({"lr": 0.0}), strength=alpha), m_step=None)
    before = guide.posterior(v)
    f = {name: before[name].mean for name in widths_of}
    program = Program(model, (v,), {})

    def objective(values: dict[str, Tensor]) -> Tensor:
        pull = sum((values[n] - f[n]).square().reshape(len(v), -1).sum(-1) for n in values)
        return program.log_joint(values) - 0.5 * alpha * pull

    result = em.e_half(em.call(v))
    h = {name: result.posterior[name].mean for name in widths_of}
    torch.testing.assert_close(result.bound, program.log_joint(h), rtol=0, atol=1e-9)
    best = objective(h)
    assert bool((best >= objective(f) - 1e-9).all())
    gains = []
    for radius in (1e-3, 1e-2, 0.1, 0.5):
        for _ in range(60):
            moved = {n: x + radius * torch.randn_like(x) for n, x in h.items()}
            moved = {n: x.abs() if widths_of[n][1] is not False else x for n, x in moved.items()}
            gains.append(objective(moved) - best)
    assert float(torch.stack(gains).max()) < 1e-8
    # Strictly: it is the pull that decides here.
    free = EM(model, guide, e_step=Refine(target, SGD({"lr": 0.0})), m_step=None)
    loose = free.e_half(free.call(v)).posterior
    assert max(float((loose[n].mean - h[n]).abs().max()) for n in h) > 1e-2


def coding(v: Tensor) -> BinarySparseCoding:
    model = BinarySparseCoding(num_visible=D, num_latents=F)
    model.initialize(v)
    return model


def test_one_sweep_of_mean_field_starts_from_the_network() -> None:
    """(19.44), unit by unit, from the network's probabilities; then the KL's gradient in a bias."""
    v = data()
    model = coding(v)
    guide = network_of(model, v, nn.Linear(D, F))
    before, p = guide.posterior(v)["h"].mean.clone(), None
    em = EM(model, guide, e_step=Refine(FixedPoint(max_sweeps=1), SGD({"lr": 0.1})), m_step=None)
    call = em.call(v)
    W, b, beta = model.W.detach(), model.b.detach(), model.beta.detach()
    bias = guide.encoders.h.bias.detach().clone()

    result = em.e_half(call)

    p, drive = before.clone(), v * beta
    for i in range(F):
        others = p @ (W.mT * beta @ W)[:, i] - p[:, i] * (W[:, i].square() * beta).sum()
        p[:, i] = torch.sigmoid(b[i] + drive @ W[:, i] - 0.5 * (W[:, i].square() * beta).sum() - others)
    torch.testing.assert_close(result.posterior["h"].mean, p, rtol=0, atol=1e-10)
    torch.testing.assert_close(guide.encoders.h.bias.detach(), bias - 0.1 * (before - p).sum(0), rtol=0, atol=1e-10)
    kl = (p * (p / before).log() + (1 - p) * ((1 - p) / (1 - before)).log()).sum(-1)
    assert em.e_step.last_loss == pytest.approx(float(kl.mean()), abs=1e-10)  # type: ignore[attr-defined]
    params = call.parameters(result)
    torch.testing.assert_close(result.bound, call.evaluator().bound(params), rtol=0, atol=1e-10)


def test_gaussian_factors_regress_on_the_posterior_by_kl() -> None:
    v = data(5, 3)
    guide = network_of(gaussian, v)
    before = guide.posterior(v)["h"].distribution
    em = EM(gaussian, guide, e_step=Refine(FixedPoint(), SGD({"lr": 0.01})), m_step=None)
    result = em.e_half(em.call(v))
    kl = torch.distributions.kl_divergence(result.posterior["h"].distribution, before).sum() / 5
    assert em.e_step.last_loss == pytest.approx(float(kl), abs=1e-10)  # type: ignore[attr-defined]


def test_points_under_fixed_point_sweeps_are_compared_by_value() -> None:
    v = data(5, 3)
    guide = network_of(gaussian, v, Linear(2, 3))
    f = guide.posterior(v)["h"].mean
    em = EM(gaussian, guide, e_step=Refine(FixedPoint(max_sweeps=1), SGD({"lr": 0.01})), m_step=None)
    result = em.e_half(em.call(v))
    wanted = 0.5 * (result.posterior["h"].mean - f).square().sum(-1).mean()
    assert em.e_step.last_loss == pytest.approx(float(wanted), abs=1e-12)  # type: ignore[attr-defined]


def test_positive_codes_are_compared_by_value_zeros_included() -> None:
    v = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0], [4.0, 3.0, 0.0]])
    encoder = Rectified(2, 3)
    guide = network_of(counted, v, encoder)
    f = guide.posterior(v)["h"].mean
    assert bool((f == 0).any())
    assert bool((f > 0).any())
    A = encoder.A.detach().clone()
    em = EM(counted, guide, e_step=Refine(Maximize(), SGD({"lr": 0.1}), strength=0.2), m_step=None)
    h = em.e_half(em.call(v)).posterior["h"].mean
    assert em.e_step.last_loss == pytest.approx(float(0.5 * (h - f).square().sum(-1).mean()), abs=1e-10)  # type: ignore[attr-defined]
    # Where f is 0 the rectifier passes no gradient; elsewhere it is that of the values.
    torch.testing.assert_close(encoder.A.detach(), A - 0.1 * ((f - h) * (f > 0)).mT @ v, rtol=0, atol=1e-10)


def subsampled(v: Tensor) -> None:
    with pyro.plate("data", len(v), subsample_size=3) as index:
        h = pyro.sample("h", dist.Laplace(0.0, 2.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.eye(D)[:F], 1.0).to_event(1), obs=v[index])


def test_a_subsampled_regression_speaks_for_all_rows() -> None:
    v = data(12)
    encoder = Linear()
    guide = network_of(subsampled, v, encoder)
    A = encoder.A.detach().clone()
    em = EM(subsampled, guide, e_step=Refine(Maximize(), SGD({"lr": 0.01})), m_step=None)
    call = em.call(v)
    rows = v[call.program.indices["data"]]
    h = em.e_half(call).posterior["h"].mean
    torch.testing.assert_close(encoder.A.detach(), A - 0.01 * 4 * (rows @ A.mT - h).mT @ rows, rtol=0, atol=1e-10)


def pixels(v: Tensor, u: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-2):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Normal(g, 1.0), obs=u)
        with pyro.plate("pixel", v.shape[1], subsample_size=2, dim=-1) as index:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[:, index])


class Times(PointEncoder):
    """f(v) = v / 10."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1))

    def forward(self, v: Tensor) -> Tensor:
        return self.a * v


@pytest.mark.parametrize("target", [Maximize(), Maximize(Newton(1e-14))])
def test_elements_of_a_subsampled_inner_plate_stand_for_the_others(target: Maximize) -> None:
    v, u, alpha = data(5, 6), data(5, 1), 0.5
    encoders = {"h": Times(), "g": Times()}
    guide = Amortized(pixels, encoder=encoders)
    em = EM(pixels, guide, e_step=Refine(target, SGD({"lr": 0.01}), strength=alpha), m_step=None)
    call = em.call(v, u)
    seen = v[:, call.program.indices["pixel"]]
    assert (call.program.rows.names, call.program.rows.scale) == (("data",), 1.0)
    result = em.e_half(call)
    h, g = result.posterior["h"].mean, result.posterior["g"].mean
    # An element of h costs 3 ((v - h)^2 / 2 + h^2 / 2 + alpha (h - f)^2 / 2), one of g a third of that.
    torch.testing.assert_close(h, (1 + alpha * 0.1) / (2 + alpha) * seen, rtol=0, atol=1e-10)
    torch.testing.assert_close(g, (1 + alpha * 0.1) / (2 + alpha) * u, rtol=0, atol=1e-10)
    log_p = 3 * (dist.Normal(0, 1).log_prob(h) + dist.Normal(h, 1).log_prob(seen)).sum(-1)
    log_p = log_p + (dist.Normal(0, 1).log_prob(g) + dist.Normal(g, 1).log_prob(u)).sum(-1)
    torch.testing.assert_close(result.bound, log_p, rtol=0, atol=1e-10)
    loss = 3 * 0.5 * (h - 0.1 * seen).square().sum() / 5 + 0.5 * (g - 0.1 * u).square().sum() / 5
    assert em.e_step.last_loss == pytest.approx(float(loss), abs=1e-10)  # type: ignore[attr-defined]
    slope = 3 * ((0.1 * seen - h) * seen).sum()
    assert float(encoders["h"].a.detach()) == pytest.approx(0.1 - 0.01 * float(slope), abs=1e-10)


# ---------------------------------------------------------------------- who moves


NO_NORM = "ignore:Expected log p:pyro_ext.unbounded.UnboundedWarning"


@pytest.mark.filterwarnings(NO_NORM)
@pytest.mark.parametrize("target", [Maximize(), FixedPoint()])
def test_the_e_step_moves_the_network_alone_and_the_m_step_theta_alone(target: Any) -> None:
    v = data()
    if isinstance(target, Maximize):
        model: Any = lasso
        guide = network_of(model, v, Linear())
    else:
        model = coding(v)
        guide = network_of(model, v)
    prefix = f"{guide._pyro_name}."
    # Momentum would move what an earlier step left a gradient at.
    em = EM(
        model,
        guide,
        e_step=Refine(target, Adam({"lr": 0.01}), num_steps=3),
        m_step=Gradient(SGD({"lr": 1e-4, "momentum": 0.9})),
    )
    em.guide.posterior(v)
    em.step(v)
    call = em.call(v)
    before = everything()
    result = em.e_half(call)
    moved = changed(before)
    assert moved
    assert all(name.startswith(prefix) for name in moved)
    before, kept = everything(), result.posterior["h"].mean.clone()
    em.m_half(call, result)
    moved = changed(before)
    assert moved
    assert not any(name.startswith(prefix) for name in moved)
    assert torch.equal(result.posterior["h"].mean, kept)
    assert all(tensor.grad is None for _, tensor in pyro.get_param_store().named_parameters())


def test_the_m_step_learns_from_the_solved_codes() -> None:
    """A closed-form M-step at q* of a network that is far off: W is the regression of v on h*, not on f."""
    v = data(20)
    model = SparseCoding(D, F, rate=0.2, beta=4.0, bias=False)
    guide = network_of(model, v, Linear())
    f = guide.posterior(v)["h"].mean
    em = EM(model, guide, e_step=Refine(Maximize(), SGD({"lr": 1e-3}), strength=0.1), m_step=ClosedForm())
    call = em.call(v)
    result = em.e_half(call)
    h = result.posterior["h"].mean
    em.m_half(call, result)
    W = model.W.detach()

    def error(codes: Tensor, dictionary: Tensor) -> float:
        return float((v - codes @ dictionary.mT).square().sum())

    assert bool((W.norm(dim=0) <= 1 + 1e-9).all())
    nearby = [W + 0.01 * torch.randn_like(W) for _ in range(100)]
    nearby = [U / U.norm(dim=0).clamp(min=1) for U in nearby]
    assert all(error(h, U) >= error(h, W) - 1e-9 for U in nearby)
    assert any(error(f, U) < error(f, W) for U in nearby)


@pytest.mark.filterwarnings(NO_NORM)
@pytest.mark.parametrize("keep", ["infer", "evaluate_loss", "posterior"])
def test_inference_of_new_data_is_the_networks_and_trains_nothing(keep: str) -> None:
    v, new = data(), data(4)
    encoder = Linear()
    guide = network_of(lasso, v, encoder)
    e_step = Refine(Maximize(), Adam({"lr": 0.01}), strength=0.5)
    em = EM(lasso, guide, e_step=e_step, m_step=Gradient(SGD({"lr": 1e-4})))
    em.step(v)
    before, loss, noise = everything(), e_step.last_loss, torch.get_rng_state()
    f, W = (new @ encoder.A.mT).detach(), pyro.param("W").detach()
    log_p = dist.Normal(f @ W.mT, BETA**-0.5).log_prob(new).sum() + dist.Laplace(0, 1 / RATE).log_prob(f).sum()
    if keep == "evaluate_loss":
        assert em.evaluate_loss(new) == pytest.approx(-float(log_p), abs=1e-9)
    else:
        posterior = em.infer(new) if keep == "infer" else guide.posterior(new)
        torch.testing.assert_close(posterior["h"].mean, f, rtol=0, atol=1e-12)
    if keep == "infer":
        result = e_step.improve(em.call(new), keep=False)
        assert float(result.bound.sum()) == pytest.approx(float(log_p), abs=1e-9)
        assert (result.exact, result.start, result.monotone) == (True, "warm", False)
    assert not changed(before)
    assert e_step.last_loss == loss
    assert torch.equal(torch.get_rng_state(), noise)


def test_solving_from_a_given_q_leaves_the_guide_alone() -> None:
    """`FixedPoint.solve` sweeps from what it is given, though its own start is cold; None is a cold start."""
    v = data()
    model = coding(v)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(max_sweeps=1), m_step=None)
    em.step(v)
    call, before = em.call(v), everything()
    start = {"h": torch.randn(N, 1, F)}
    result, params = em.e_step.solve(call, start)  # type: ignore[attr-defined]
    assert torch.equal(params["h"], call.evaluator().sweep(start)["h"])
    assert (result.start, result.monotone) == ("warm", False)
    torch.testing.assert_close(result.bound, call.evaluator().bound(params))
    cold, cold_params = em.e_step.solve(call, None)  # type: ignore[attr-defined]
    assert cold.start == "cold"
    assert torch.equal(cold_params["h"], call.parameters(em.e_step.improve(call, keep=False))["h"])
    assert not torch.equal(cold_params["h"], params["h"])
    assert not changed(before)


def test_a_cold_maximize_starts_where_it_says() -> None:
    v = data()
    guide = network_of(lasso, v, Linear())
    em = EM(lasso, guide, e_step=Refine(Maximize(start=Cold()), SGD({"lr": 0.0}), strength=0.4), m_step=None)
    cold = em.e_half(em.call(v))
    em.e_step = Refine(Maximize(FeatureSign(1e-12)), SGD({"lr": 0.0}), strength=0.4)
    warm = em.e_half(em.call(v))
    assert (cold.start, warm.start) == ("cold", "warm")
    torch.testing.assert_close(cold.posterior["h"].mean, warm.posterior["h"].mean, rtol=0, atol=2e-3)


# ---------------------------------------------------------------------- learning


def sparse_data(model: SparseCoding, n: int) -> Tensor:
    with torch.no_grad():
        return model(size=n)


@pytest.mark.parametrize(("encoder", "left"), [(PSD, 0.8), (LISTA, 0.5)])
def test_training_brings_the_network_nearer_to_the_solution(encoder: Any, left: float) -> None:
    torch.manual_seed(1)
    model = SparseCoding(8, 6, rate=2.0, beta=20.0, bias=False)
    v = sparse_data(model, 100)
    guide = network_of(model, v, encoder.from_model(model))
    step = Refine(Maximize(), Adam({"lr": 0.005}), num_steps=5)
    em = EM(model, guide, e_step=step, m_step=None)
    loss = em.evaluate_loss(v)
    em.step(v)
    first = step.last_loss
    for _ in range(40):
        best = em.step(v)
    assert step.last_loss < left * first
    assert best < em.evaluate_loss(v) < loss


def test_learned_mean_field_needs_no_sweeps_in_the_end() -> None:
    v = data(40)
    model = coding(v)
    guide = network_of(model, v)
    step = Refine(FixedPoint(max_sweeps=1), Adam({"lr": 0.02}), num_steps=5)
    em = EM(model, guide, e_step=step, m_step=None)
    em.step(v)
    first = step.last_loss
    for _ in range(60):
        em.step(v)
    assert step.last_loss < 0.2 * first
    exact = EM(model, MeanField(model), e_step=FixedPoint(max_sweeps=100), m_step=None)
    best, network = -exact.step(v), -em.evaluate_loss(v)
    assert best - 40 * 0.1 < network <= best + 1e-6


def test_a_run_and_a_fit_learn_the_dictionary_too() -> None:
    torch.manual_seed(2)
    truth = SparseCoding(8, 6, rate=2.0, beta=20.0, bias=False)
    v = sparse_data(truth, 60)
    model = SparseCoding(8, 6, rate=2.0, beta=20.0, bias=False)
    model.initialize(v)
    guide = network_of(model, v, PSD.from_model(model))
    step = Refine(Maximize(), Adam({"lr": 0.005}), strength=0.5)
    em = EM(model, guide, e_step=step, m_step=ClosedForm())
    history = em.run(v, max_steps=5, progress=False)
    assert history.steps == 5
    assert history.loss_label == "-log p(h, v), nats per row"
    assert {(entry.half, entry.start, entry.exact) for entry in history.ledger} >= {
        ("E", "warm", True),
        ("M", "warm", True),
    }
    # The M half-step raises log p(v, h*) at the h* of its own E half-step.
    halves = list(zip(history.ledger[::2], history.ledger[1::2], strict=True))
    assert all(after.bound >= before.bound - 1e-8 for before, after in halves)
    history = fit(em, DataLoader(TensorDataset(v), batch_size=20), num_epochs=3, progress=False)
    assert len(history.loss) == 9
    assert history.loss[-1] < halves[0][0].bound * -1 / 60
    assert em.step(data(7, 8)) > 0


# ---------------------------------------------------------------------- errors


def test_settings_are_checked() -> None:
    optim = SGD({"lr": 0.1})
    with pytest.raises(
        TypeError,
        match=r"Expected target to be Maximize\(\), FixedPoint\(\) or LocalGradient\(\), but got <py",
    ):
        Refine(Gradient(optim), optim)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected target to be .* or LocalGradient\\(\\), but got <class"):
        Refine(Maximize, optim)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected an optimizer from pyro.optim, but got torch"):
        Refine(Maximize(), torch.optim.SGD([torch.zeros(1)], lr=0.1))  # type: ignore[arg-type]
    for num_steps in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"Expected num_steps of at least 1, but got {num_steps}"):
            Refine(Maximize(), optim, num_steps=num_steps)  # type: ignore[arg-type]
    for strength in (-0.1, float("inf"), float("nan"), "1", True):
        with pytest.raises(ValueError, match="Expected a strength of at least 0, but got"):
            Refine(Maximize(), optim, strength=strength)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected strength=0 with FixedPoint, but got 0.5"):
        Refine(FixedPoint(), optim, strength=0.5)
    with pytest.raises(RuntimeError, match="Expected an E-step before its loss"):
        _ = Refine(Maximize(), optim).last_loss


@pytest.mark.parametrize("target", [Maximize(), FixedPoint()])
@pytest.mark.parametrize("family", [MeanField, Structured])
def test_tables_are_refused_at_the_door(target: Any, family: Any) -> None:
    name = type(target).__name__
    with pytest.raises(TypeError, match=f"Expected a guide with a network .* but got {family.__name__}. Use {name}"):
        EM(lasso, family(lasso), e_step=Refine(target, SGD({"lr": 0.1})), m_step=None)


def refused(em: EM, v: Tensor, error: type[Exception], match: str) -> None:
    before, was_set_up = everything(), em.guide.is_set_up
    with pytest.raises(error, match=match):
        em.step(v)
    assert em.guide.is_set_up == was_set_up
    assert not changed(before)


@pytest.mark.parametrize("set_up", [False, True])
def test_densities_are_refused_under_maximize(set_up: bool) -> None:
    v = data()
    pyro.param("W", torch.randn(D, F))
    guide = Amortized(lasso)
    step = Refine(Maximize(), SGD({"lr": 0.1}))
    message = r"Expected points for Refine\(Maximize\(\)\), but got densities for 'h'"
    if set_up:
        guide.setup(v)
        with pytest.raises(TypeError, match=message):
            EM(lasso, guide, e_step=step, m_step=None)
        return
    refused(EM(lasso, guide, e_step=step, m_step=None), v, TypeError, message)


def layered(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        top = pyro.sample("top", dist.Bernoulli(0.5))
        h = pyro.sample("h", dist.Normal(top, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


@pytest.mark.parametrize("set_up", [False, True])
def test_conditional_factors_are_refused(set_up: bool) -> None:
    v = torch.randn(5)
    guide = Amortized(layered)
    step = Refine(FixedPoint(), SGD({"lr": 0.1}))
    message = "Expected factors that do not depend on each other's values for Refine"
    if set_up:
        guide.setup(v)
        with pytest.raises(TypeError, match=message):
            EM(layered, guide, e_step=step, m_step=None)
        return
    refused(EM(layered, guide, e_step=step, m_step=None), v, TypeError, message)


def test_what_the_target_refuses_changes_nothing() -> None:
    v = data()
    guide = network_of(lasso, v, Linear())
    em = EM(lasso, guide, e_step=Refine(FixedPoint(), SGD({"lr": 0.1})), m_step=None)
    refused(em, v, ValueError, "Use `e_step=Maximize\\(\\)`")
    guide = network_of(gaussian, data(5, 3), Linear(2, 3))
    em = EM(gaussian, guide, e_step=Refine(FixedPoint(Parallel(0.5)), SGD({"lr": 0.1})), m_step=None)
    refused(em, data(5, 3), TypeError, "Expected the Sequential\\(\\) schedule for the point masses 'h'")


def test_sampled_sweeps_keep_their_error() -> None:
    v = data()
    model = coding(v)
    guide = network_of(model, v)
    e_step = Refine(FixedPoint(max_sweeps=2, evaluator=Sampled(num_samples=20)), SGD({"lr": 0.01}))
    result = EM(model, guide, e_step=e_step, m_step=None).e_half(EM(model, guide, e_step=e_step, m_step=None).call(v))
    assert not result.exact
    assert result.error is not None
    assert bool((result.error > 0).all())


# ---------------------------------------------------------------------- any program with fixed points


def coordinate_sweeps(log_joint: Tensor, mean: Tensor, num_sweeps: int, damping: float | None) -> Tensor:
    """(19.56) over a table of states (2^F, N): unit by unit, or all at once with the logits damped."""
    states = binary_states(F).unsqueeze(1)
    for _ in range(num_sweeps):
        found = mean.clone()
        for i in range(F):
            now = found if damping is None else mean
            others = [j for j in range(F) if j != i]
            q = (states * now + (1 - states) * (1 - now))[..., others].prod(-1)
            on = states[..., i] == 1
            difference = (q * log_joint * on).sum(0) - (q * log_joint * ~on).sum(0)
            step = 1.0 if damping is None else 1 - damping
            found[:, i] = torch.lerp(mean[:, i].logit(), difference, step).sigmoid()
        mean = found
    return mean


@pytest.mark.parametrize("num_sweeps", [1, 3])
@pytest.mark.parametrize("damping", [None, 0.5])
def test_a_belief_network_is_refined_by_enumeration(num_sweeps: int, damping: float | None) -> None:
    model, v = SigmoidBeliefNetwork([F, D]), torch.rand(N, D).round()
    with torch.no_grad():
        model.W1.mul_(3)
    guide = network_of(model, v, nn.Linear(D, F))
    log_joint = program_log_joint(model, {"h1": binary_states(F).unsqueeze(1)}, v).detach()
    schedule = None if damping is None else Parallel(damping)
    target = FixedPoint(schedule, MeanChange(0.0), max_sweeps=num_sweeps)
    start = guide.posterior(v)["h1"].mean
    wanted = coordinate_sweeps(log_joint, start, num_sweeps, damping)
    em = EM(model, guide, e_step=Refine(target, SGD({"lr": 0.1})), m_step=None)
    result = em.e_half(em.call(v))
    torch.testing.assert_close(result.bound, elbo(log_joint, factorial_posterior(wanted)), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.posterior["h1"].mean, wanted, rtol=0, atol=1e-10)


def classes(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("v", dist.Normal(torch.tensor([-2.0, 0.0, 3.0])[z], 1.0), obs=v)


def test_where_a_sweep_is_exact_the_network_learns_the_posterior() -> None:
    v = torch.linspace(-3, 4, 15)
    guide = network_of(classes, v, nn.Linear(1, 3))
    step = Refine(FixedPoint(max_sweeps=1), Adam({"lr": 0.3}), num_steps=60)
    em = EM(classes, guide, e_step=step, m_step=None)
    log_joint = torch.tensor([0.2, 0.5, 0.3]).log() + dist.Normal(torch.tensor([-2.0, 0.0, 3.0]), 1.0).log_prob(
        v[:, None]
    )
    for _ in range(3):
        loss = em.step(v)
    assert loss == pytest.approx(-float(log_joint.logsumexp(-1).sum()), abs=1e-9)
    # The posterior's logits are linear in v, and so is the network.
    torch.testing.assert_close(guide.posterior(v)["z"].mean, log_joint.softmax(-1), rtol=0, atol=0.02)


def test_local_gradients_are_a_target_too() -> None:
    v = torch.tensor([[0.0, 2.0, 1.0], [5.0, 3.0, 4.0]])
    guide = network_of(rates_of_normals, v)
    step = Refine(LocalGradient(5, 0.1, num_particles=50), Adam({"lr": 0.05}), num_steps=20)
    em = EM(rates_of_normals, guide, e_step=step, m_step=None)
    first = em.e_half(em.call(v))
    kl = torch.distributions.kl_divergence(first.posterior["h"].distribution, guide.posterior(v)["h"].distribution)
    assert not first.exact
    assert 0 < float(kl.sum() / 2) < step.last_loss + 0.05
    for _ in range(12):
        em.e_half(em.call(v))
    own = em.call(v).bound(None, guide.rows_parameters(em.call(v).program), 2000)[0]
    assert (own > first.bound).all()


def rates_of_normals(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 2.0).expand([1]).to_event(1))
        rate = h.exp() * torch.ones(3)
        pyro.sample("v", dist.Poisson(rate).to_event(1), obs=v)


def test_points_are_no_target_of_local_gradients() -> None:
    v = data()
    guide = network_of(lasso, v, Linear())
    em = EM(lasso, guide, e_step=Refine(LocalGradient(), SGD({"lr": 0.1})), m_step=None)
    before = everything()
    with pytest.raises(ValueError, match=r"with a density for LocalGradient, but got points on the sites \['h'\]"):
        em.step(v)
    assert not changed(before)
    with pytest.raises(ValueError, match="Expected strength=0 with LocalGradient, but got 0.5"):
        Refine(LocalGradient(), SGD({"lr": 0.1}), strength=0.5)
    model = coding(v)
    with pytest.raises(TypeError, match=r"Use Gradient\(optim\) itself for a table"):
        EM(model, MeanField(model), e_step=Refine(LocalGradient(), SGD({"lr": 0.1})), m_step=None)
