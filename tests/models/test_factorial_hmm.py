from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.fixed_point import BoundChange, Warm
from pyro_ext.guides import MeanField, Structured
from pyro_ext.history import Status
from pyro_ext.models import Covariance, Diagonal, FactorialHMM, Full, Tied, assign_parameters, read_parameter
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import (
    LOG_2PI,
    expected_log_joint,
    log_evidence,
    program_log_joint,
    random_posterior,
)
from tests.oracles.paths import PathsPosterior, chain_log_prob, joint_paths, smooth_by_loops

D, STATES, G = 2, (2, 3), 5
N, T = 4, 3
LONG = 9
LENGTHS = torch.tensor([3, 2, 1, 3])
MASK = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
HIDING: dict[str, dict[str, Tensor]] = {
    "all": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": MASK},
    "both": {"lengths": LENGTHS, "mask": MASK},
}
hidings = pytest.mark.parametrize("hiding", HIDING)
structures = pytest.mark.parametrize("covariance", [Diagonal(), Full()], ids=repr)


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def random_model(covariance: Covariance, **kwargs: Any) -> FactorialHMM:
    model = FactorialHMM(D, STATES, covariance, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    model.shift.normal_()
    return model


def noise_of(model: FactorialHMM) -> Tensor:
    root = read_parameter(model, model.covariance.parameter)
    return root @ root.mT if root.dim() == 2 else root.square().diag()


def seen_of(hiding: str) -> Tensor:
    given = HIDING[hiding]
    seen = given.get("mask", torch.ones(N, T, dtype=torch.bool)).clone()
    for n, length in enumerate(given.get("lengths", torch.full((N,), T)).tolist()):
        seen[n, length:] = False
    return seen


def data_of(model: FactorialHMM, hiding: str) -> tuple[Tensor, dict[str, Tensor]]:
    v = model.dream(N, num_steps=T)
    v[~seen_of(hiding)] = math.nan
    return v, HIDING[hiding]


def log_normal(x: Tensor, covariance: Tensor) -> Tensor:
    squared = ((x @ torch.linalg.inv(covariance)) * x).sum(-1)
    return -0.5 * (squared + x.shape[-1] * LOG_2PI + torch.linalg.slogdet(covariance).logabsdet)


def by_hand(model: FactorialHMM, v: Tensor, hiding: str) -> Tensor:
    """log p(v_n, paths), shape (S, N), step by step."""
    states, seen = joint_paths(STATES, T), seen_of(hiding)
    lengths = HIDING[hiding].get("lengths", torch.full((N,), T)).tolist()
    W1, W2 = read_parameter(model, "W").split(STATES, -1)
    columns = []
    for n in range(N):
        priors = [
            chain_log_prob(read_parameter(model, f"initial{m}"), read_parameter(model, f"transition{m}"), T, lengths[n])
            for m in (1, 2)
        ]
        total = (priors[0][:, None] + priors[1]).flatten()
        for t in range(T):
            if seen[n, t]:
                mean = states["h1"][:, t] @ W1.T + states["h2"][:, t] @ W2.T
                total = total + log_normal(v[n, t] - mean, noise_of(model))
        columns.append(total)
    return torch.stack(columns, -1)


def joint_of(model: FactorialHMM, v: Tensor, **hidden: Tensor) -> Tensor:
    latents = {name: states.unsqueeze(1) for name, states in joint_paths(STATES, T).items()}
    return program_log_joint(model, latents, v, **hidden)


def product_chain(model: FactorialHMM, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same model as one chain over pairs of states: initial, transition, steps (N, T, S), states (S, G)."""
    initial = torch.kron(read_parameter(model, "initial1"), read_parameter(model, "initial2"))
    transition = torch.kron(read_parameter(model, "transition1"), read_parameter(model, "transition2"))
    pairs = list(itertools.product(range(STATES[0]), range(STATES[1])))
    states = torch.stack([torch.cat([torch.eye(STATES[0])[i], torch.eye(STATES[1])[j]]) for i, j in pairs])
    steps = log_normal(v.unsqueeze(-2) - states @ read_parameter(model, "W").T, noise_of(model))
    return initial, transition, steps, states


def snapshot(model: FactorialHMM) -> list[Tensor]:
    return [p.detach().clone() for p in [*model.parameters(), *model.buffers()]]


def untouched(model: FactorialHMM, before: list[Tensor]) -> bool:
    return all(map(torch.equal, before, [*model.parameters(), *model.buffers()]))


@structures
@hidings
def test_joint_is_the_formula(covariance: Covariance, hiding: str) -> None:
    model = random_model(covariance)
    v, hidden = data_of(model, hiding)
    torch.testing.assert_close(joint_of(model, v, **hidden), by_hand(model, v, hiding), rtol=1e-12, atol=1e-12)


@structures
def test_the_joint_factor_is_the_product_chain(covariance: Covariance) -> None:
    model = random_model(covariance)
    v = model.dream(N, num_steps=LONG)
    lengths = torch.tensor([LONG, 4, 1, 7])
    mask = torch.rand(N, LONG) < 0.8
    mask[:, 0] = True
    initial, transition, steps, states = product_chain(model, v)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=None)
    posterior = em.infer(v, lengths=lengths, mask=mask)
    gram, total = torch.zeros(G, G), 0.0
    pairs1, weights = torch.zeros(STATES[0], STATES[0]), torch.zeros(N, LONG - 1)
    for n, length in enumerate(lengths.tolist()):
        seen = mask[n, :length]
        log_p, marginals, pairs = smooth_by_loops(initial, transition, steps[n, :length] * seen.unsqueeze(-1))
        total += log_p.item()
        means = marginals @ states
        for name, mean in zip(("h1", "h2"), means.split(STATES, -1), strict=True):
            torch.testing.assert_close(posterior[name].mean[n, :length], mean, rtol=1e-10, atol=1e-12)
        gram += torch.einsum("t,ts,si,sj->ij", seen.double(), marginals, states, states)
        pairs1 += torch.einsum("tab,ai,bj->ij", pairs, states[:, : STATES[0]], states[:, : STATES[0]])
        weights[n, : length - 1] = 1
    assert em.evaluate_loss(v, lengths=lengths, mask=mask) == pytest.approx(-total, rel=1e-10)
    seen = mask & (torch.arange(LONG) < lengths[:, None])
    torch.testing.assert_close(posterior.time_gram(["h1", "h2"], seen.double()), gram, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior["h1"].pairwise(weights), pairs1, rtol=1e-10, atol=1e-10)


@structures
def test_em_with_the_joint_factor_is_em_on_the_product_chain(covariance: Covariance) -> None:
    truth = random_model(covariance)
    v = truth.dream(20, num_steps=LONG)
    model = random_model(covariance, covariance_floor=0.0)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    for _ in range(3):
        initial, transition, steps, states = product_chain(model, v)
        found = [smooth_by_loops(initial, transition, row) for row in steps]
        assert em.step(v) == pytest.approx(-sum(log_p.item() for log_p, _, _ in found), rel=1e-10)
        marginals = torch.stack([m for _, m, _ in found])
        first = marginals[:, 0].mean(0) @ states
        torch.testing.assert_close(read_parameter(model, "initial1"), first[: STATES[0]], rtol=1e-8, atol=1e-10)
        # Weighted least squares over all steps and states, by another route: a design matrix with square-root weights.
        weights = marginals.flatten(0, 1)
        design = (weights.sqrt().unsqueeze(-1) * states).reshape(-1, G)
        target = (weights.sqrt().unsqueeze(-1) * v.flatten(0, 1).unsqueeze(1)).reshape(-1, D)
        fitted = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
        torch.testing.assert_close(design @ read_parameter(model, "W").T, fitted, rtol=1e-8, atol=1e-8)
        noise = (target - fitted).T @ (target - fitted) / len(v) / LONG
        if isinstance(covariance, Diagonal):
            noise = noise.diagonal().diag()
        torch.testing.assert_close(noise_of(model), noise, rtol=1e-8, atol=1e-10)


@structures
@hidings
def test_maximize_is_a_maximum(covariance: Covariance, hiding: str) -> None:
    model = random_model(covariance, covariance_floor=0.0)
    model.shift.fill_(3.0)
    v, hidden = data_of(model, hiding)
    states = joint_paths(STATES, T)
    q = random_posterior(len(states["h1"]), N)
    model.maximize(model.statistics({"v": v, **hidden}, PathsPosterior(states, q)))

    def objective() -> Tensor:
        return expected_log_joint(joint_of(model, v, **hidden), q)

    assert_zero_gradient(model, objective, scale=N * T)
    assert_maximum(model, objective)


def test_flat_directions_of_w_keep_their_value() -> None:
    model = random_model(Diagonal())
    states = joint_paths(STATES, T)
    q = random_posterior(len(states["h1"]), N)
    # What every state of one chain gains the states of the other can lose, and the second state of h1 never occurs.
    q[(states["h1"][:, :, 1] > 0).any(1)] = 0
    before = read_parameter(model, "W")
    model.shift.fill_(2.0)
    model.maximize(model.statistics({"v": 5 + torch.randn(N, T, D)}, PathsPosterior(states, q / q.sum(0))))
    after = read_parameter(model, "W")
    torch.testing.assert_close(after[:, 1], before[:, 1])
    flat = torch.tensor([1.0, 0.0, -1.0, -1.0, -1.0])
    scale = model.statistics({"v": torch.zeros(N, T, D)}, PathsPosterior(states, q / q.sum(0)))["gram"].diagonal()
    torch.testing.assert_close(after @ (scale * flat), before @ (scale * flat))


def test_statistics_are_additive() -> None:
    model = random_model(Full())
    v, hidden = data_of(model, "both")
    states = joint_paths(STATES, T)
    q = random_posterior(len(states["h1"]), N)
    whole = model.statistics({"v": v, **hidden}, PathsPosterior(states, q))
    assert whole["count"].item() == N
    assert whole["steps"].item() == seen_of("both").sum().item()
    assert whole["transition2"].sum().item() == pytest.approx(float((LENGTHS - 1).sum()))
    parts = []
    for rows in (slice(0, 1), slice(1, N)):
        given = {name: value[rows] for name, value in hidden.items()}
        parts.append(model.statistics({"v": v[rows], **given}, PathsPosterior(states, q[:, rows])))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-12, atol=1e-12)


@structures
@pytest.mark.parametrize("guide_type", [MeanField, Structured])
@pytest.mark.parametrize("hides", [False, True])
def test_em_never_falls(covariance: Covariance, guide_type: type, hides: bool) -> None:
    v = random_model(covariance).dream(10, num_steps=LONG)
    hidden: dict[str, Tensor] = {}
    if hides:
        lengths = torch.randint(1, LONG + 1, (10,))
        mask = torch.rand(10, LONG) < 0.8
        mask[:, 0] = True
        v[~mask | (torch.arange(LONG) >= lengths[:, None])] = math.nan
        hidden = {"lengths": lengths, "mask": mask}
    model = FactorialHMM(D, STATES, covariance)
    model.initialize(v, **hidden)
    em = EM(model, guide_type(model), e_step=FixedPoint(start=Warm()), m_step=ClosedForm())
    history = em.run(v, max_steps=10, tolerance=0.0, progress=False, **hidden)
    assert history.status in (Status.MAX_STEPS, Status.CONVERGED)
    bounds = [entry.bound for entry in history.ledger]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0] + 1e-3


@structures
def test_the_factorised_chains_bound_log_p_and_end_stationary(covariance: Covariance) -> None:
    model = random_model(covariance)
    v = model.dream(N, num_steps=T)
    table = by_hand(model, v, "all")
    em = EM(model, MeanField(model), e_step=FixedPoint(criterion=BoundChange(0.0), max_sweeps=500), m_step=None)
    bound = -em.evaluate_loss(v)
    exact = log_evidence(table).sum().item()
    assert bound < exact - 1e-4
    posterior = em.infer(v)
    states = joint_paths(STATES, T)

    # Brute force: q(h1) and q(h2) as tables over whole paths, L as a function of their log-potentials.
    tables = []
    for name, other in (("h1", "h2"), ("h2", "h1")):
        first = states[other][0]
        mine = states[name][(states[other] == first).all(-1).all(-1)]
        values = {name: mine.unsqueeze(1).expand(-1, N, -1, -1)}
        tables.append(posterior[name].log_prob(values[name]).exp().detach())
    shape = (len(tables[0]), len(tables[1]), N)

    def bound_of(logits: list[Tensor]) -> Tensor:
        log_q = [x.log_softmax(0) for x in logits]
        log_joint = log_q[0][:, None] + log_q[1]
        return (log_joint.exp() * (table.reshape(shape) - log_joint)).sum()

    logits = [t.log().requires_grad_() for t in tables]
    for t in tables:
        torch.testing.assert_close(t.sum(0), torch.ones(N))
    value = bound_of(logits)
    assert value.item() == pytest.approx(bound, rel=1e-10)
    for gradient in torch.autograd.grad(value, logits):
        assert gradient.abs().max() < 1e-6
    step = 1e-5
    for x in logits:
        for index in torch.randint(len(x), (5,)).tolist():
            moved = []
            for sign in (1, -1):
                shifted = [y.detach().clone() for y in logits]
                shifted[0 if x is logits[0] else 1][index, 0] += sign * step
                moved.append(bound_of(shifted).item())
            assert abs(moved[0] - moved[1]) / (2 * step) < 1e-6


def test_data_far_from_zero() -> None:
    x = torch.randn(6, LONG, D)
    found = []
    start = snapshot(random_model(Full()))
    for shift in (0.0, 1e6):
        model = FactorialHMM(D, STATES, Full())
        model.initialize(x + shift)
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=False):
                p.copy_(value)
        assign_parameters(model, {"W": read_parameter(model, "W") + shift / 2})
        em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
        em.run(x + shift, max_steps=3, tolerance=0.0, progress=False)
        found.append(noise_of(model))
    # Data at 1e6 carry an error of 1e-10; raw moments would lose 1e12 * 2^-53 = 1e-4.
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-7)


def test_dreams_have_the_moments_of_the_model() -> None:
    model = random_model(Full())
    n = 20_000
    v = model.dream(n, num_steps=2)
    initial, transition, _, states = product_chain(model, v[:1])
    means = states @ read_parameter(model, "W").T
    second = initial @ transition
    exact = {
        "mean": torch.stack([initial @ means, second @ means]),
        "square": torch.einsum("s,si,sj->ij", second, means, means) + noise_of(model),
        "lagged": torch.einsum("s,sr,si,rj->ij", initial, transition, means, means),
    }
    draws = {
        "mean": v,
        "square": v[:, 1, :, None] * v[:, 1, None, :],
        "lagged": v[:, 0, :, None] * v[:, 1, None, :],
    }
    for name, value in exact.items():
        error = draws[name].std(0) / n**0.5
        assert ((draws[name].mean(0) - value).abs() < 5 * error).all()


def test_the_program_serves_svi() -> None:
    model = random_model(Full())
    v, hidden = data_of(model, "both")
    svi = pyro.infer.SVI(model, MeanField(model), pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert math.isfinite(svi.step(v, **hidden))
    assert all(p.isfinite().all() for p in model.parameters())


@structures
def test_initialize(covariance: Covariance) -> None:
    model = FactorialHMM(D, [40, 30, 30], covariance)
    v = torch.randn(50, 8, D) * torch.tensor([0.5, 3.0]) + 4
    lengths = torch.randint(1, 9, (50,))
    seen = torch.arange(8) < lengths[:, None]
    v[~seen] = math.nan
    model.initialize(v, lengths=lengths)
    mean, std = v[seen].mean(0), v[seen].std(0, correction=0)
    torch.testing.assert_close(model.shift, mean)
    torch.testing.assert_close(noise_of(model), std.square().diag())
    torch.testing.assert_close(read_parameter(model, "transition1"), torch.full((40, 40), 1 / 40))
    # W ~ N(mean / 3, s^2 / 3): 5 standard errors of mean and deviation over 100 columns.
    W = (read_parameter(model, "W") - mean[:, None] / 3) / (std[:, None] / 3**0.5)
    assert (W.mean(-1).abs() < 5 / 10).all()
    assert ((W.std(-1) - 1).abs() < 5 / 200**0.5).all()


def test_an_active_floor() -> None:
    model = FactorialHMM(D, STATES, Diagonal(), covariance_floor=0.5, probability_floor=0.3)
    v = torch.randn(N, T, D) * torch.tensor([0.01, 3.0])
    model.initialize(v)
    EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm()).step(v)
    noise = noise_of(model).diagonal()
    assert noise[0].item() == pytest.approx(0.5)
    assert noise[1] > 0.5
    for chain in (1, 2):
        assert (read_parameter(model, f"transition{chain}") >= 0.3 - 1e-12).all()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FactorialHMM(0, [2]), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: FactorialHMM(2, 3), TypeError, "Expected num_states with one number a chain, but got 3. Pass [2, 3]"),
        (lambda: FactorialHMM(2, []), TypeError, "Expected num_states with one number a chain, but got []. Pass [2, 3"),
        (lambda: FactorialHMM(2, [2, 0]), ValueError, "Expected every entry of num_states >= 1, but got 0."),
        (lambda: FactorialHMM(2, [2, 2.0]), TypeError, "Expected every entry of num_states to be an int, but got 2.0"),
        (
            lambda: FactorialHMM(2, [2], Tied()),
            TypeError,
            "Expected the covariance Diagonal() or Full(), but got Tied()",
        ),
        (
            lambda: FactorialHMM(2, [2], "full"),
            TypeError,
            "Expected the covariance Diagonal() or Full(), but got 'full'",
        ),
        (
            lambda: FactorialHMM(2, [2], covariance_floor=-1.0),
            ValueError,
            "Expected covariance_floor >= 0, but got -1.",
        ),
        (
            lambda: FactorialHMM(2, [2, 3], probability_floor=0.4),
            ValueError,
            "Expected probability_floor in (0, 1/3), f",
        ),
    ],
)
def test_refusals_of_the_constructor(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


GOOD = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("v", "hidden", "error", "message"),
    [
        (GOOD[0], {}, ValueError, "Expected v of shape (N, T, 2), but got (3, 2). Add the missing dimensions"),
        (GOOD[..., :1], {}, ValueError, "Expected v of shape (N, T, 2), but got (4, 3, 1). Select 2 columns"),
        (
            GOOD[:, :0],
            {},
            ValueError,
            "Expected sequences of at least one step, but got shape (4, 0, 2). Leave them out.",
        ),
        (GOOD / 0, {}, ValueError, "Expected finite values in v, but got 24 NaN or infinite, the first at (0, 0, 0)."),
        (GOOD, {"lengths": LENGTHS + 1}, ValueError, "Expected lengths in 1..3, but got 4 for sequence 0. Correct it"),
        (
            GOOD,
            {"mask": MASK.T},
            ValueError,
            "Expected mask of shape (4, 3), one entry a step, but got (3, 4). Say for",
        ),
        (
            GOOD,
            {"mask": MASK & False},
            ValueError,
            "Expected at least one observed step in every sequence, but got none",
        ),
        (GOOD, {"num_steps": 3}, ValueError, "Expected either v or both size and num_steps, but got v and num_steps."),
    ],
)
def test_bad_sequences_change_nothing(v: Tensor, hidden: dict[str, Any], error: type[Exception], message: str) -> None:
    model = random_model(Diagonal())
    before, guide = snapshot(model), MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    with pytest.raises(error, match=re.escape(message)):
        em.step(v, **hidden)
    assert untouched(model, before)
    assert not guide.is_set_up


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (GOOD[:1], "Expected at least 5 observed steps, one per state, but got 3. Use fewer states."),
        (
            GOOD * torch.tensor([1.0, 0.0]),
            "Expected every column to vary, but got a constant one, column 1. Leave it o",
        ),
    ],
)
def test_unsuitable_starts_are_refused(v: Tensor, message: str) -> None:
    model = random_model(Diagonal(), covariance_floor=0.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.initialize(v)
    assert untouched(model, before)


def test_vanishing_noise_is_refused_without_a_floor() -> None:
    model = random_model(Diagonal(), covariance_floor=0.0)
    before, states = snapshot(model), joint_paths(STATES, T)
    q = random_posterior(len(states["h1"]), N)
    with pytest.raises(RuntimeError, match="Expected a positive variance in every direction, but got none in"):
        model.maximize(model.statistics({"v": torch.zeros(N, T, D)}, PathsPosterior(states, q)))
    with pytest.raises(
        ValueError, match="Expected statistics with count, initial1, transition1, initial2, transition2"
    ):
        model.maximize({"count": torch.ones(())})
    assert untouched(model, before)
