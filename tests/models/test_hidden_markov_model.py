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
from pyro_ext.guides import MeanField
from pyro_ext.history import Status
from pyro_ext.models import (
    BernoulliEmission,
    CategoricalEmission,
    Emission,
    Full,
    GaussianEmission,
    HiddenMarkovModel,
    PoissonEmission,
    assign_parameters,
    read_parameter,
)
from pyro_ext.models.sequences import floored
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.models.test_emissions import FAMILIES, families, random_hmm, step_log_probs
from tests.oracles.enumeration import (
    exact_posterior,
    expected_log_joint,
    log_evidence,
    program_log_joint,
    random_posterior,
)
from tests.oracles.paths import PathsMarginal, hmm_log_joint, one_hot_paths

N, T, K, D = 6, 4, 3, 2
S = K**T
LENGTHS = torch.tensor([4, 2, 1, 3, 4, 2])
MASK = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]]).bool()
HIDING: dict[str, dict[str, Tensor]] = {
    "all": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": MASK},
    "both": {"lengths": LENGTHS, "mask": MASK},
}
hidings = pytest.mark.parametrize("hiding", HIDING)


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def hmm(emission: Emission, **kwargs: float) -> HiddenMarkovModel:
    """A model whose probabilities all differ, and whose states can be told apart."""
    model = random_hmm(emission, **kwargs)
    if isinstance(emission, GaussianEmission):
        assign_parameters(model, {"locs": 1.5 * torch.randn(K, D)})
    return model


def seen_of(hiding: str) -> Tensor:
    given = HIDING[hiding]
    seen = given.get("mask", torch.ones(N, T, dtype=torch.bool)).clone()
    for n, length in enumerate(given.get("lengths", torch.full((N,), T)).tolist()):
        seen[n, length:] = False
    return seen


def data_of(model: HiddenMarkovModel, hiding: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Dreams in which what is hidden is NaN, or no category."""
    v = model.dream(N, num_steps=T)
    v[~seen_of(hiding)] = 99 if model.event_dim == 0 else math.nan
    return v, HIDING[hiding]


def by_hand(model: HiddenMarkovModel, v: Tensor, hiding: str) -> Tensor:
    seen = seen_of(hiding)
    safe = torch.where(seen.reshape(seen.shape + (1,) * model.event_dim), v, 0)
    steps = step_log_probs(model, safe.flatten(0, 1)).reshape(N, T, K)
    lengths = HIDING[hiding].get("lengths", torch.full((N,), T))
    return hmm_log_joint(model.initial, model.transition, steps, seen, lengths)


def joint_of(model: HiddenMarkovModel, v: Tensor, **hidden: Tensor) -> Tensor:
    return program_log_joint(model, {"h": one_hot_paths(K, T).unsqueeze(1)}, v, **hidden)


def posterior_of(probs: Tensor) -> dict[str, PathsMarginal]:
    return {"h": PathsMarginal(one_hot_paths(K, T), probs)}


def m_step(model: HiddenMarkovModel, v: Tensor, probs: Tensor, **hidden: Tensor) -> None:
    model.maximize(model.statistics({"v": v, **hidden}, posterior_of(probs)))


def snapshot(model: HiddenMarkovModel) -> list[Tensor]:
    return [p.detach().clone() for p in [*model.parameters(), *model.buffers()]]


def untouched(model: HiddenMarkovModel, before: list[Tensor]) -> bool:
    return all(map(torch.equal, before, [*model.parameters(), *model.buffers()]))


@families
@hidings
def test_joint_is_the_formula(emission: Emission, hiding: str) -> None:
    model = hmm(emission)
    v, hidden = data_of(model, hiding)
    torch.testing.assert_close(joint_of(model, v, **hidden), by_hand(model, v, hiding), rtol=1e-12, atol=1e-12)


@families
@hidings
def test_inference_is_enumeration_over_paths(emission: Emission, hiding: str) -> None:
    model = hmm(emission)
    v, hidden = data_of(model, hiding)
    table = by_hand(model, v, hiding).detach()
    exact = PathsMarginal(one_hot_paths(K, T), exact_posterior(table))
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    assert em.evaluate_loss(v, **hidden) == pytest.approx(-log_evidence(table).sum().item(), rel=1e-12)
    found = em.infer(v, **hidden)["h"]
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.pairwise(), exact.pairwise(), rtol=1e-10, atol=1e-12)
    weights = torch.rand(N, T - 1)
    torch.testing.assert_close(found.pairwise(weights), exact.pairwise(weights), rtol=1e-10, atol=1e-12)
    for n, path in enumerate(found.mode()):
        best = (exact.states == path).all(-1).all(-1)
        assert table[best, n].item() == pytest.approx(table[:, n].max().item(), rel=1e-12)


@families
@hidings
def test_maximize_is_a_maximum(emission: Emission, hiding: str) -> None:
    model = hmm(emission)
    if isinstance(emission, GaussianEmission):
        model.shift.fill_(3.0)
    v, hidden = data_of(model, hiding)
    q = random_posterior(S, N)
    m_step(model, v, q, **hidden)

    def objective() -> Tensor:
        return expected_log_joint(joint_of(model, v, **hidden), q)

    assert_zero_gradient(model, objective, scale=N * T)
    assert_maximum(model, objective)


@families
def test_statistics_are_additive(emission: Emission) -> None:
    model = hmm(emission)
    v, hidden = data_of(model, "both")
    q = random_posterior(S, N)
    whole = model.statistics({"v": v, **hidden}, posterior_of(q))
    assert whole["count"].item() == N
    assert whole["initial"].sum().item() == pytest.approx(N)
    assert whole["transition"].sum().item() == pytest.approx(float((LENGTHS - 1).sum()))
    assert whole["responsibility"].sum().item() == pytest.approx(float(seen_of("both").sum()))
    parts = []
    for rows in (slice(0, 2), slice(2, N)):
        given = {name: value[rows] for name, value in hidden.items()}
        parts.append(model.statistics({"v": v[rows], **given}, posterior_of(q[:, rows])))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-12, atol=1e-12)


@families
@hidings
def test_em_never_falls(emission: Emission, hiding: str) -> None:
    truth = hmm(emission)
    v, hidden = data_of(truth, hiding)
    model = HiddenMarkovModel(K, emission)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    model.initialize(v, **hidden)
    history = em.run(v, max_steps=12, tolerance=0.0, progress=False, **hidden)
    assert history.status in (Status.MAX_STEPS, Status.CONVERGED)
    bounds = [entry.bound for entry in history.ledger]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0]


def test_nothing_depends_on_how_far_the_sequences_are_padded() -> None:
    truth = hmm(GaussianEmission(D))
    v, start = truth.dream(N, num_steps=T), snapshot(hmm(GaussianEmission(D), name="start"))
    found = []
    for padding in (0, 7):
        model = HiddenMarkovModel(K, GaussianEmission(D), name=f"padded_by_{padding}")
        with torch.no_grad():
            for p, value in zip([*model.parameters(), *model.buffers()], start, strict=True):
                p.copy_(value)
        em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        padded = torch.cat([v, torch.full((N, padding, D), math.nan)], 1)
        history = em.run(padded, lengths=LENGTHS, max_steps=8, tolerance=0.0, progress=False)
        found.append(([entry.bound for entry in history.ledger], snapshot(model)))
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), rtol=1e-10, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_likelihood_of_ragged_sequences_is_that_of_each_alone() -> None:
    model = hmm(PoissonEmission(D))
    v = model.dream(N, num_steps=T)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    together = em.evaluate_loss(v, lengths=LENGTHS)
    alone = 0.0
    for row, length in zip(v, LENGTHS.tolist(), strict=True):
        single = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
        alone += single.evaluate_loss(row[None, :length])
    assert together == pytest.approx(alone, rel=1e-12)


def test_one_step_and_one_state() -> None:
    model = hmm(GaussianEmission(D))
    v = model.dream(30, num_steps=1)
    before = read_parameter(model, "transition")
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    history = em.run(v, max_steps=3, tolerance=0.0, progress=False)
    assert history.loss[-1] < history.loss[0]
    torch.testing.assert_close(read_parameter(model, "transition"), before)
    single = HiddenMarkovModel(1, GaussianEmission(D, Full(), covariance_floor=0.0))
    v = v.reshape(6, 5, D)
    EM(single, MeanField(single), e_step=FixedPoint(), m_step=ClosedForm()).step(v)
    flat = v.flatten(0, 1)
    torch.testing.assert_close(single.locs[0].detach(), flat.mean(0))
    torch.testing.assert_close((single.scale_tril @ single.scale_tril.mT)[0].detach(), flat.T.cov(correction=0))


def test_floored_is_the_maximum_over_bounded_probabilities() -> None:
    counts, floor = torch.tensor([50.0, 20.0, 0.9, 0.0, 30.0]), 0.1
    p = floored(counts, floor, torch.full((5,), 0.2))
    assert p.sum().item() == pytest.approx(1, abs=1e-15)
    assert (p >= floor).all()
    # Karush-Kuhn-Tucker: the slope c / p is the same wherever the floor does not bind, and lower where it does.
    slope = counts / p
    torch.testing.assert_close(slope[[0, 1, 4]], slope[:1].expand(3))
    assert (slope[[2, 3]] < slope[0]).all()
    # 0.105 is above the floor until the others are lifted to it.
    torch.testing.assert_close(
        floored(torch.tensor([0.795, 0.0, 0.0, 0.105, 0.1]), floor, torch.full((5,), 0.2)),
        torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]),
    )
    old = torch.tensor([[0.3, 0.7], [0.4, 0.6]])
    torch.testing.assert_close(
        floored(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), 0.01, old), torch.tensor([[0.3, 0.7], [0.25, 0.75]])
    )


@pytest.mark.parametrize(
    ("emission", "name", "least", "most"),
    [
        (CategoricalEmission(4, 0.15), "probs", 0.15, 1.0),
        (BernoulliEmission(D, 0.4), "logits", math.log(0.4 / 0.6), math.log(0.6 / 0.4)),
        (PoissonEmission(D, 1.0), "rates", 1.0, math.inf),
    ],
    ids=["categorical", "bernoulli", "poisson"],
)
def test_maximize_respects_active_floors(emission: Emission, name: str, least: float, most: float) -> None:
    model = hmm(emission, probability_floor=0.3)
    v, q = model.dream(N, num_steps=T), (6 * torch.randn(S, N)).softmax(0)
    m_step(model, v, q)
    limits = {"initial": (0.3, 1.0), "transition": (0.3, 1.0), name: (least, most)}

    def feasible() -> bool:
        values = {key: read_parameter(model, key) for key in limits}
        return all((v >= limits[k][0] - 1e-12).all() and (v <= limits[k][1] + 1e-12).all() for k, v in values.items())

    assert feasible()
    for key, (low, _) in limits.items():
        assert (read_parameter(model, key) - low).abs().min() < 1e-12
    best = expected_log_joint(joint_of(model, v), q).item()
    start = {key: read_parameter(model, key) for key in limits}
    tried = 0
    for key, (low, high) in limits.items():
        for _ in range(20):
            if key == "logits":
                other = torch.rand_like(start[key]) * (high - low) + low
            elif key == "rates":
                other = start[key] * (0.5 * torch.randn_like(start[key])).exp()
                other = other.clamp(min=low)
            else:
                width = start[key].shape[-1]
                other = low + (1 - width * low) * torch.randn_like(start[key]).softmax(-1)
            for step in (1e-1, 1e-2, 1e-3):
                assign_parameters(model, {key: (1 - step) * start[key] + step * other})
                tried += 1
                assert expected_log_joint(joint_of(model, v), q).item() <= best + 1e-12 * abs(best)
        assign_parameters(model, start)
    assert tried == 180


def test_dreams_follow_the_chain() -> None:
    model = hmm(CategoricalEmission(4))
    initial, transition, probs = (read_parameter(model, x) for x in ("initial", "transition", "probs"))
    n = 20_000
    v = model.dream(n, num_steps=3)
    assert v.shape == (n, 3)
    assert not v.is_floating_point()
    exact = torch.einsum("i,ia,ij,jb,jk,kc->abc", initial, probs, transition, probs, transition, probs)
    index = (v * torch.tensor([16, 4, 1])).sum(-1)
    found = torch.bincount(index, minlength=64) / n
    error = (exact.flatten() * (1 - exact.flatten()) / n).sqrt()
    assert ((found - exact.flatten()).abs() < 5 * error).all()


def test_posterior_draws_follow_the_posterior() -> None:
    model = hmm(GaussianEmission(D))
    v = model.dream(2, num_steps=T)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    n = 20_000
    draws = em.infer(v).sample(n)["h"]
    steps = step_log_probs(model, v.flatten(0, 1)).reshape(2, T, K)
    table = hmm_log_joint(model.initial, model.transition, steps, torch.ones(2, T).bool(), torch.full((2,), T))
    exact = exact_posterior(table).detach()
    weights = K ** torch.arange(T - 1, -1, -1)
    for row in range(2):
        found = torch.bincount((draws[:, row].argmax(-1) * weights).sum(-1), minlength=S) / n
        error = (exact[:, row] * (1 - exact[:, row]) / n).sqrt()
        assert ((found - exact[:, row]).abs() < 5 * error + 1e-12).all()


def test_dreams_are_hidden_from_handlers() -> None:
    model = hmm(GaussianEmission(D))
    with pyro.poutine.trace() as trace:
        v = model.dream(4, num_steps=5)
    assert not trace.trace.nodes
    assert v.shape == (4, 5, D)
    assert not v.requires_grad


def test_the_program_serves_svi() -> None:
    model = hmm(GaussianEmission(D))
    v, hidden = data_of(model, "both")
    svi = pyro.infer.SVI(model, MeanField(model), pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert math.isfinite(svi.step(v, **hidden))
    assert all(p.isfinite().all() for p in model.parameters())


@families
def test_initialize(emission: Emission) -> None:
    model = HiddenMarkovModel(K, emission)
    v, hidden = data_of(hmm(emission), "both")
    model.initialize(v, **hidden)
    assert all(p.isfinite().all() for p in [*model.parameters(), *model.buffers()])
    torch.testing.assert_close(read_parameter(model, "initial"), torch.full((K,), 1 / K))
    torch.testing.assert_close(read_parameter(model, "transition"), torch.full((K, K), 1 / K))
    if isinstance(emission, GaussianEmission):
        steps = v[seen_of("both")]
        torch.testing.assert_close(model.shift, steps.mean(0))
        assert all((steps == loc).all(-1).any() for loc in model.locs.detach())


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        ({"lengths": [4, 4]}, TypeError, "Expected lengths to be a tensor of integers, but got list. Write `torch.ten"),
        (
            {"lengths": torch.ones(N)},
            TypeError,
            "Expected lengths to be a tensor of integers, but got dtype torch.floa",
        ),
        ({"lengths": MASK[:, 0]}, TypeError, "Expected lengths to be a tensor of integers, but got dtype torch.bool."),
        (
            {"lengths": LENGTHS[:4]},
            ValueError,
            "Expected lengths of shape (6,), one a sequence, but got (4,). Pass the",
        ),
        (
            {"lengths": LENGTHS + 1},
            ValueError,
            "Expected lengths in 1..4, but got 5 for sequence 0. Correct it, or pad",
        ),
        (
            {"lengths": LENGTHS - 1},
            ValueError,
            "Expected lengths in 1..4, but got 0 for sequence 2. Leave empty sequen",
        ),
        ({"mask": MASK.double()}, TypeError, "Expected mask to be a boolean tensor, but got dtype torch.float64. True"),
        (
            {"mask": [True]},
            TypeError,
            "Expected mask to be a boolean tensor, but got list. True marks an observed step",
        ),
        ({"mask": MASK[:, :3]}, ValueError, "Expected mask of shape (6, 4), one entry a step, but got (6, 3). Say for"),
        (
            {"mask": MASK & (torch.arange(N) != 3)[:, None]},
            ValueError,
            "Expected at least one observed step in every sequence, but got none in sequence 3. Leave it out.",
        ),
        (
            {"mask": MASK, "lengths": torch.tensor([4, 2, 1, 1, 4, 2])},
            ValueError,
            "Expected at least one observed step in every sequence, but got none in sequence 3. Leave it out.",
        ),
        (
            {"size": 3},
            ValueError,
            "Expected either v or both size and num_steps, but got v and size. Pass v to condition",
        ),
        ({"num_steps": 3}, ValueError, "Expected either v or both size and num_steps, but got v and num_steps. Pass v"),
    ],
)
def test_bad_sequences_change_nothing(hidden: dict[str, Any], error: type[Exception], message: str) -> None:
    model = hmm(GaussianEmission(D))
    v, before = model.dream(N, num_steps=T), snapshot(model)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    with pytest.raises(error, match=re.escape(message)):
        em.step(v, **hidden)
    if "size" not in hidden and "num_steps" not in hidden:
        with pytest.raises(error, match=re.escape(message)):
            model.initialize(v, **hidden)
    assert untouched(model, before)
    assert not guide.is_set_up


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.dream(3), ValueError, "Expected either v or both size and num_steps, but got size. Pass v to"),
        (lambda m: m.dream(0, num_steps=3), ValueError, "Expected n >= 1, but got 0."),
        (lambda m: m.dream(3, num_steps=0), ValueError, "Expected num_steps >= 1, but got 0."),
        (lambda m: m.dream(3, num_steps=2.5), TypeError, "Expected num_steps to be an int, but got 2.5 of type float."),
        (lambda m: m(), ValueError, "Expected either v or both size and num_steps, but got none of them. Pass v to"),
        (
            lambda m: m(torch.zeros(3, 2)),
            ValueError,
            "Expected v with dimensions for sequences and steps, but got shape",
        ),
        (
            lambda m: m.check_data(size=3, num_steps=2, mask=MASK),
            ValueError,
            "Expected mask only together with v, but got mask and size. Dream whole sequences.",
        ),
        (
            lambda m: m.check_data(size=3, num_steps=2, lengths=LENGTHS),
            ValueError,
            "Expected lengths only together with v, but got lengths and size. Dream whole sequences.",
        ),
        (
            lambda m: m.initialize(torch.randn(1, 2, D)),
            ValueError,
            "Expected at least 3 observed steps, one per state, but got 2. Use fewer states.",
        ),
        (
            lambda m: m.initialize(torch.zeros(4, 2, D)),
            ValueError,
            "Expected at least 3 distinct rows, one per state, but got 1. Use fewer states.",
        ),
    ],
)
def test_refused_calls(call: Callable[[HiddenMarkovModel], object], error: type[Exception], message: str) -> None:
    model = hmm(GaussianEmission(D))
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        call(model)
    assert untouched(model, before)


def test_an_emptied_state_is_refused() -> None:
    model = hmm(GaussianEmission(D))
    before = snapshot(model)
    q = random_posterior(S, N)
    q[(one_hot_paths(K, T)[:, :, 1] > 0).any(1)] = 0
    with pytest.raises(RuntimeError, match="responsible for some observed steps, but got none for state 1. Use fewer"):
        m_step(model, model.dream(N, num_steps=T), q / q.sum(0))
    assert untouched(model, before)


def test_a_collapsed_state_is_refused_without_a_floor() -> None:
    model = hmm(GaussianEmission(D, covariance_floor=0.0))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="Expected a positive variance in every direction, but got none in compon"):
        m_step(model, torch.ones(N, T, D), random_posterior(S, N))
    assert untouched(model, before)


def test_bad_statistics_are_refused() -> None:
    model = hmm(GaussianEmission(D))
    before = snapshot(model)
    found = model.statistics({"v": model.dream(N, num_steps=T)}, posterior_of(random_posterior(S, N)))
    names = "count, initial, transition, responsibility, sum, second"
    with pytest.raises(ValueError, match=f"Expected statistics with {names}, but got count, initial. Pass what"):
        model.maximize({name: found[name] for name in ("count", "initial")})
    found["transition"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected finite values in the statistic 'transition'"):
        model.maximize(found)
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HiddenMarkovModel(0, GaussianEmission(2)), ValueError, "Expected num_states >= 1, but got 0."),
        (lambda: HiddenMarkovModel(2, "gaussian"), TypeError, "Expected an emission, but got 'gaussian'. Pass Gaussia"),
        (
            lambda: HiddenMarkovModel(4, GaussianEmission(2), probability_floor=0.25),
            ValueError,
            "Expected probability_floor in (0, 1/4), for 4 probabilities that sum to 1, but got 0.25. Pass 1e-10, say.",
        ),
    ],
)
def test_refusals_of_the_constructor(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


def test_all_families_are_tried() -> None:
    assert {type(e) for e in FAMILIES} == set(Emission.__subclasses__())
