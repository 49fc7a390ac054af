"""L of programs of Markov chains: against dense quadratics, enumeration of all paths, and automatic differentiation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_ext import EM, FixedPoint, Gradient, WakeSleep, log_evidence
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.chain_form import ChainForm, chain_form
from pyro_ext.chains import Chains
from pyro_ext.evaluators import Enumerated, Parameters, Quadratic, enumerate_log_joint
from pyro_ext.fixed_point import Adaptive, BoundChange, Coloured, MeanChange, Parallel, Sequential
from pyro_ext.gradient import theta_objective
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.layout import Layout
from pyro_ext.markov_chain import MarkovChain
from pyro_ext.quadratic import NotFiniteError, quadratic_form
from pyro_ext.selected import Components, Selected

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-9, "rtol": 1e-9}
N, T, K1, K2 = 3, 3, 2, 3
Model = Callable[..., Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA = numbers(N, T, seed=1)
W1, W2 = numbers(K1, seed=2), numbers(K2, seed=3)
PI1, PI2, A1, A2 = numbers(K1, seed=4), numbers(K2, seed=5), numbers(K1, K1, seed=6), numbers(K2, K2, seed=7)


def factorial(
    *,
    scale: Tensor | float = 1.0,
    first: Callable[[], MarkovChain] = lambda: MarkovChain(PI1, A1, T),
    seen: Tensor | None = None,
    strength: float = 1.0,
) -> Model:
    """Two chains whose states add up in Gaussian data."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", first())
            h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
            noise = dist.Normal(strength * (h1 @ W1 + h2 @ W2), torch.as_tensor(scale))
            pyro.sample("v", (noise if seen is None else noise.mask(seen)).to_event(1), obs=v)

    return model


def masked_row(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
        h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
        with poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ W2, 1.0).to_event(1), obs=v)


def steps_in_a_plate(v: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-2):
        h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
        h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
        mean = (h1 @ W1 + h2 @ W2).squeeze(-2)
        with pyro.plate("time", T, dim=-1), poutine.mask(mask=torch.arange(T) != 1):
            pyro.sample("v", dist.Normal(mean, 1.0), obs=v)


def apart(v: Tensor) -> None:
    """No coupling in the data."""
    with pyro.plate("data", len(v)):
        h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
        h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
        pyro.factor("score", (h1 @ W1 * v).sum(-1) + (h2 @ W2 * v).sum(-1))


def no_rows(v: Tensor) -> None:
    h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
    h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
    pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ W2, 1.0).to_event(1), obs=v[0])


MODELS: dict[str, Model] = {
    "plain": factorial(),
    "noise a row": factorial(scale=torch.tensor([[0.5], [1.0], [2.0]])),
    "noise a step": factorial(scale=torch.tensor([0.5, 1.0, 2.0])),
    "noise an entry": factorial(scale=numbers(N, T, seed=8).exp()),
    "time-varying": factorial(first=lambda: MarkovChain(PI1, numbers(T - 1, K1, K1, seed=9), T)),
    "own start": factorial(first=lambda: MarkovChain(numbers(N, K1, seed=10), A1[None], T)),
    "own chain": factorial(first=lambda: MarkovChain(numbers(N, K1, seed=10), numbers(N, T - 1, K1, K1, seed=11), T)),
    "missing entries": factorial(seen=numbers(N, T, seed=12) > -0.5),
    "missing rows": masked_row,
    "missing steps": steps_in_a_plate,
    "no coupling": apart,
    "no rows": no_rows,
}
every_model = pytest.mark.parametrize("name", MODELS)
every_guide = pytest.mark.parametrize("make", [MeanField, Structured])


def evaluators(model: Model, make: Any, *args: Any) -> tuple[Chains, Quadratic, Enumerated]:
    guide = make(model)
    call = EM(model, guide, e_step=FixedPoint(), m_step=None).call(*args)
    found = call.evaluator()
    assert isinstance(found, Chains)
    layout = Layout(call.program.rows, call.program.latents)
    dense = Quadratic(quadratic_form(call.program), call.blocks)
    return found, dense, Enumerated(enumerate_log_joint(call.program), layout, call.blocks)


def random_parameters(chains: Chains) -> Parameters:
    rows = chains.layout.rows.count
    return {b.name: numbers(rows, 1, b.factor.num_params, seed=20) for b in chains.blocks}


def close(one: Parameters, other: Parameters, chains: Chains) -> None:
    for block in chains.blocks:
        means = (block.factor.mean(params[block.name]) for params in (one, other))
        torch.testing.assert_close(*means, **EXACT)


@every_model
@every_guide
def test_bound_sweep_and_jump_are_those_of_matrices_and_of_all_paths(name: str, make: Any) -> None:
    chains, dense, brute = evaluators(MODELS[name], make, DATA)
    params = random_parameters(chains)
    torch.testing.assert_close(chains.bound(params), dense.bound(params), **EXACT)
    torch.testing.assert_close(chains.bound(params), brute.bound(params), **EXACT)
    close(chains.sweep(params), dense.sweep(params), chains)
    close(chains.jump(params), dense.jump(params), chains)
    close(chains.coloured_sweep(params), dense.coloured_sweep(params), chains)
    swept = chains.sweep(params)
    assert bool((chains.bound(swept) >= chains.bound(params) - 1e-10).all())
    torch.testing.assert_close(chains.bound(swept), brute.bound(swept), **EXACT)


@every_model
def test_one_factor_over_all_chains_is_the_posterior(name: str) -> None:
    chains, _, brute = evaluators(MODELS[name], Structured, DATA)
    assert chains.exact_posterior
    params, bound = chains.solve()
    torch.testing.assert_close(bound, brute.log_joint.logsumexp(-1), **EXACT)
    torch.testing.assert_close(chains.log_evidence(), bound, **EXACT)
    torch.testing.assert_close(chains.bound(params), bound, **EXACT)
    expected = brute.log_joint.softmax(-1) @ brute.states
    torch.testing.assert_close(chains.means(params), expected, **EXACT)


@every_model
def test_no_move_of_one_chain_beats_its_sweep(name: str) -> None:
    chains, _, _ = evaluators(MODELS[name], MeanField, DATA)
    params = random_parameters(chains)
    for _ in range(200):
        params = chains.sweep(params)
    best = chains.bound(params)
    for block in chains.blocks:
        for size in (1e-2, 1.0):
            moved = {**params, block.name: params[block.name] + size * torch.randn_like(params[block.name])}
            assert bool((chains.bound(moved) <= best + 1e-9).all())


def test_what_rows_and_steps_share_is_held_once() -> None:
    def coupling(name: str) -> tuple[int, ...] | None:
        form = evaluators(MODELS[name], MeanField, DATA)[0].form
        return None if form.coupling is None else tuple(form.coupling.shape[:2])

    assert [coupling(n) for n in ("plain", "noise a row", "noise a step", "noise an entry", "no coupling")] == [
        (1, 1),
        (N, 1),
        (1, T),
        (N, T),
        None,
    ]


@every_model
def test_the_form_is_the_log_joint(name: str) -> None:
    chains, _, brute = evaluators(MODELS[name], MeanField, DATA)
    form: ChainForm = chains.form
    one, two = brute.states.split([T * K1, T * K2], -1)
    for state in range(0, len(brute.states), 7):
        path = torch.cat([one[state].reshape(T, K1), two[state].reshape(T, K2)], -1)
        found = form.log_joint(path.expand(form.linear.shape))
        torch.testing.assert_close(found, brute.log_joint[:, state], **EXACT)


def test_a_subsampled_program_is_scaled() -> None:
    index = torch.tensor([0, 2])

    def model(v: Tensor) -> None:
        with pyro.plate("data", N, subsample=index):
            h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
            h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
            pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ W2, 1.0).to_event(1), obs=v[index])

    chains, dense, brute = evaluators(model, Structured, DATA)
    whole = evaluators(factorial(), Structured, DATA)[0].solve()[1]
    torch.testing.assert_close(chains.solve()[1], whole[index], **EXACT)
    params = random_parameters(chains)
    torch.testing.assert_close(chains.bound(params), brute.bound(params), **EXACT)
    torch.testing.assert_close(chains.bound(params), dense.bound(params), **EXACT)
    loss = EM(model, Structured(model), e_step=FixedPoint(), m_step=None).evaluate_loss(DATA)
    assert math.isclose(loss, -1.5 * float(whole[index].sum()), rel_tol=1e-10)


@pytest.mark.parametrize("schedule", [Sequential(), Coloured(), Adaptive(), Parallel(0.5)])
def test_every_schedule_ends_at_a_fixed_point(schedule: Any) -> None:
    model = factorial(scale=0.7)
    step = FixedPoint(schedule, MeanChange(1e-11), max_sweeps=500)
    em = EM(model, MeanField(model), e_step=step, m_step=None)
    posterior = em.infer(DATA)
    assert step.converged
    chains, _, _ = evaluators(model, MeanField, DATA)
    params = {b.name: posterior.conditioner(b, {})[:, None] for b in chains.blocks}
    # Where L is flat to its last digit, the means are known to half of theirs.
    torch.testing.assert_close(chains.means(chains.sweep(params)), chains.means(params), atol=1e-7, rtol=0)


# ---------------------------------------------------------------------- gradients


def log_evidence_by_paths(model: Model, *args: Any) -> Tensor:
    """log p(v) per row with its graph to theta, by enumeration."""
    guide = MeanField(model)
    call = EM(model, guide, e_step=FixedPoint(), m_step=None).call(*args)
    return enumerate_log_joint(call.program).logsumexp(-1)


def with_parameters(v: Tensor) -> None:
    """Parameters of every kind; some rows, steps and couplings are equal, or 0, only at the start."""
    start, matrix = pyro.param("start", numbers(K1, seed=30)), pyro.param("matrix", numbers(K2, K2, seed=31))
    weight = pyro.param("weight", numbers(K2, seed=32))
    scale = pyro.param("scale", torch.ones(N, T), constraint=constraints.positive)
    bond = pyro.param("bond", torch.zeros(K1, K2))
    with pyro.plate("data", len(v)):
        h1 = pyro.sample("h1", MarkovChain(start, A1, T))
        h2 = pyro.sample("h2", MarkovChain(PI2, matrix, T))
        pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ weight, scale).to_event(1), obs=v)
        pyro.factor("bond_score", ((h1 @ bond) * h2).sum((-1, -2)))


def only_a_bond(v: Tensor) -> None:
    bond = pyro.param("bond", torch.zeros(K1, K2))
    with pyro.plate("data", len(v)):
        h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
        h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
        pyro.factor("score", ((h1 @ bond) * h2).sum((-1, -2)) + (h1 @ W1 * v).sum(-1))


@pytest.mark.parametrize("model", [with_parameters, only_a_bond])
def test_gradient_in_theta_at_the_posterior_is_that_of_the_evidence(model: Model) -> None:
    guide = Structured(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    result = em.e_half(call)
    names = sorted(n for n in pyro.get_param_store() if "guide" not in n.lower() and "Structured" not in n)
    leaves = [pyro.param(n).unconstrained() for n in names]
    found = torch.autograd.grad(theta_objective(call, result), leaves)
    total = enumerate_log_joint(call.program).logsumexp(-1).sum()
    expected = torch.autograd.grad(total, leaves)
    assert len(names) == (5 if model is with_parameters else 1)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert bool((other != 0).any())


def test_gradient_m_step_climbs_the_evidence() -> None:
    em = EM(with_parameters, Structured(with_parameters), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 0.02})))
    losses = [em.step(DATA) for _ in range(10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_gradient_e_step_reaches_the_fixed_point() -> None:
    model = factorial()
    exact = EM(model, MeanField(model), e_step=FixedPoint(criterion=BoundChange(1e-13), max_sweeps=500), m_step=None)
    best = exact.evaluate_loss(DATA)
    em = EM(model, MeanField(model), e_step=Gradient(Adam({"lr": 0.1}), num_steps=20), m_step=None)
    losses = [em.step(DATA) for _ in range(8)]
    assert losses[-1] == pytest.approx(best, abs=1e-5)
    assert losses[-1] >= best - 1e-9


# ---------------------------------------------------------------------- sampled objectives


@every_guide
def test_the_loss_of_svi_is_minus_l_on_average(make: Any) -> None:
    """Within 5 standard errors of 50 losses of 50 particles."""
    model = factorial()
    guide = make(model)
    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.3}), num_steps=2), m_step=None)
    em.step(DATA)
    exact = float(em.call(DATA).evaluator().bound(parameters(em)).sum())
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True)
    draws = torch.tensor([elbo.loss(model, guide, DATA) for _ in range(50)])
    assert abs(float(draws.mean()) + exact) <= 5 * float(draws.std()) / math.sqrt(len(draws))
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(DATA)) for _ in range(3))


def parameters(em: EM) -> Parameters:
    call = em.call(DATA)
    with torch.no_grad():
        return em.guide.rows_parameters(call.program)


def test_wake_sleep_trains_an_encoder_of_chains() -> None:
    def model(v: Tensor | None = None, count: int = N) -> None:
        weight = pyro.param("weight", numbers(K1, seed=32))
        with pyro.plate("data", count if v is None else len(v)):
            h = pyro.sample("h", MarkovChain(PI1, A1, T))
            pyro.sample("v", dist.Normal(h @ weight, 1.0).to_event(1), obs=v)

    guide = Amortized(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), WakeSleep(num_particles=4))
    assert all(math.isfinite(svi.step(DATA)) for _ in range(5))
    assert isinstance(guide.blocks[0].factor, MarkovChainFactor)
    found = guide.posterior(DATA)
    assert found["h"].mean.shape == (N, T, K1)
    torch.testing.assert_close(found["h"].mean.sum(-1), torch.ones(N, T))
    assert found["h"].mode().shape == (N, T, K1)


# ---------------------------------------------------------------------- what falls through


def test_points_on_paths_are_coordinate_wise_map() -> None:
    model = factorial()
    em = EM(model, Dirac(model), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    result = em.e_half(call)
    path = result.posterior.mode()
    _, _, brute = evaluators(model, MeanField, DATA)
    features = torch.cat([path["h1"].flatten(-2), path["h2"].flatten(-2)], -1)
    index = (features[:, None] == brute.states).all(-1).double().argmax(-1)
    found = brute.log_joint.gather(-1, index[:, None]).squeeze(-1)
    torch.testing.assert_close(result.bound, found, **EXACT)
    groups = features.split([K1] * T + [K2] * T, -1)
    for state, value in enumerate(brute.states):
        other = value.split([K1] * T + [K2] * T, -1)
        differing = sum((~(a == b).all(-1)).long() for a, b in zip(groups, other, strict=True))
        assert bool((brute.log_joint[:, state] <= found + 1e-10)[differing == 1].all())


def coupled_steps(power: float) -> Model:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", MarkovChain(PI1, A1, 4))
            level = h @ W1
            pyro.sample("v", dist.Normal(level, 1.0).to_event(1), obs=torch.cat([v, v[:, :1]], 1))
            pyro.factor("smooth", -power * (level[..., 1:] - level[..., :-1]).square().sum(-1))

    return model


def test_neighbouring_steps_that_are_coupled_in_the_data_stay_exact() -> None:
    model = coupled_steps(0.8)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    assert isinstance(call.evaluator(), Quadratic)
    log_joint = enumerate_log_joint(call.program)
    torch.testing.assert_close(em.e_half(call).bound, log_joint.logsumexp(-1), **EXACT)


def test_steps_that_are_coupled_from_afar_are_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", MarkovChain(PI1, A1, T))
            pyro.sample("v", dist.Normal((h @ W1).sum(-1), 1.0), obs=v[:, 0])

    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    with pytest.raises(ValueError, match="Expected couplings between neighbouring steps of a chain only"):
        em.step(DATA)


def test_hard_zeros_are_named() -> None:
    barred = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    model = factorial(first=lambda: MarkovChain(PI1, barred, T))
    call = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None).call(DATA)
    with pytest.raises(NotFiniteError, match="prior above 0 on every state of 'h1'"):
        chain_form(call.program)
    with pytest.raises(NotFiniteError, match="proviso of 19.56"):
        EM(model, MeanField(model), e_step=FixedPoint(), m_step=None).step(DATA)


def test_an_inner_plate_of_chains_falls_through() -> None:
    def rows(v: Tensor) -> None:
        with pyro.plate("data", 2, dim=-1):
            with pyro.plate("inner", 2, dim=-2):
                h = pyro.sample("h", MarkovChain(PI1, A1, 2))
            pyro.sample("v", dist.Normal((h @ W1).sum(-3, keepdim=True), 1.0).to_event(1), obs=v)

    em = EM(rows, MeanField(rows), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA[:2, :2])
    evaluator = call.evaluator()
    assert not isinstance(evaluator, Chains)
    layout = Layout(call.program.rows, call.program.latents)
    brute = Enumerated(enumerate_log_joint(call.program), layout, call.blocks)
    result = em.e_half(call)
    params = {"h": layout.to_rows(result.posterior.conditioner(call.blocks[0], {}), call.program.latents[0])}
    torch.testing.assert_close(result.bound, brute.bound(params), **EXACT)
    with pytest.raises(ValueError, match="Expected one path of 'h' in a row, but got 2"):
        result.posterior["h"].pairwise()


@pytest.mark.parametrize("kind", ["scaled", "masked"])
def test_a_prior_that_counts_otherwise_falls_through(kind: str) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.scale(scale=0.5 if kind == "scaled" else 1.0):
                prior = MarkovChain(PI1, A1, T)
                h1 = pyro.sample("h1", prior.mask(torch.tensor([True, False, True])) if kind == "masked" else prior)
            h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
            pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ W2, 1.0).to_event(1), obs=v)

    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    assert not isinstance(call.evaluator(), Chains)
    log_joint = enumerate_log_joint(call.program)
    torch.testing.assert_close(em.e_half(call).bound, log_joint.logsumexp(-1), **EXACT)
    torch.testing.assert_close(log_evidence(model, None, DATA).log_evidence, log_joint.logsumexp(-1), **EXACT)


class Levels(Components):
    """A normal a state."""

    support = constraints.real

    def log_prob(self, v: Tensor) -> Tensor:
        return dist.Normal(W1, 1.0).log_prob(v[:, None])

    def draw(self, h: Tensor) -> Tensor:
        return h @ W1 + torch.randn(h.shape[:-1])


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_data_that_are_linear_by_construction(power: float) -> None:
    """Nothing of these is differentiated, or compared with the program."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.scale(scale=power):
                h = pyro.sample("h", MarkovChain(PI1, A1, T))
            pyro.sample("v", Selected(h, Levels(), num_visible=None).to_event(1), obs=v)

    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    assert isinstance(call.evaluator(), Chains) == (power == 1.0)
    paths = torch.eye(K1)[torch.cartesian_prod(*[torch.arange(K1)] * T)][:, None]
    scores = dist.Normal(paths @ W1, 1.0).log_prob(DATA).sum(-1)
    log_joint = power * MarkovChain(PI1, A1, T).log_prob(paths) + scores
    torch.testing.assert_close(em.e_half(call).bound, log_joint.logsumexp(0), **EXACT)


@pytest.mark.parametrize("make", [MeanField, Structured])
def test_noise_that_depends_on_the_state_is_enumerated(make: Any) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", MarkovChain(PI1, A1, T))
            h2 = pyro.sample("h2", MarkovChain(PI2, A2, T))
            pyro.sample("v", dist.Normal(h1 @ W1 + h2 @ W2, (h1 @ W1).exp()).to_event(1), obs=v)

    em = EM(model, make(model), e_step=FixedPoint(criterion=BoundChange(1e-12), max_sweeps=200), m_step=None)
    call = em.call(DATA)
    evaluator = call.evaluator()
    assert isinstance(evaluator, Enumerated)
    result = em.e_half(call)
    if make is Structured:
        torch.testing.assert_close(result.bound, evaluator.log_joint.logsumexp(-1), **EXACT)
    params = {b.name: result.posterior.conditioner(b, {})[:, None] for b in evaluator.blocks}
    for block in evaluator.blocks:
        for size in (1e-2, 1.0):
            moved = {**params, block.name: params[block.name] + size * torch.randn_like(params[block.name])}
            assert bool((evaluator.bound(moved) <= result.bound + 1e-9).all())


def test_a_transition_that_depends_on_a_latent_falls_through() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            logits = A1 + z[..., None, None] * torch.eye(K1)
            h = pyro.sample("h", MarkovChain(PI1.expand(logits.shape[:-1]), logits, T))
            pyro.sample("v", dist.Normal(h @ W1, 1.0).to_event(1), obs=v)

    em = EM(model, Structured(model, blocks=[["z", "h"]]), e_step=FixedPoint(), m_step=None)
    call = em.call(DATA)
    assert not isinstance(call.evaluator(), Chains)
    log_joint = enumerate_log_joint(call.program)
    torch.testing.assert_close(em.e_half(call).bound, log_joint.logsumexp(-1), **EXACT)


# ---------------------------------------------------------------------- log p(v)


@every_model
def test_evidence_is_exact(name: str) -> None:
    model = MODELS[name]
    _, _, brute = evaluators(model, MeanField, DATA)
    for guide in (None, MeanField(model)):
        found = log_evidence(model, guide, DATA, max_states=2)
        assert found.exact
        torch.testing.assert_close(found.log_evidence.reshape(-1), brute.log_joint.logsumexp(-1), **EXACT)
    assert found.gap is not None
    assert bool((found.gap >= -1e-10).all())


def test_evidence_of_long_chains_and_of_one_state() -> None:
    steps = 50
    data = numbers(2, steps, seed=40)

    def model(v: Tensor, states: int = 2) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", MarkovChain(PI1[:states], A1[:states, :states], steps))
            pyro.sample("v", dist.Normal(h @ W1[:states], 1.0).to_event(1), obs=v)

    message = PI1.log_softmax(-1) + dist.Normal(W1, 1.0).log_prob(data[:, 0, None])
    for t in range(1, steps):
        step = (message[:, :, None] + A1.log_softmax(-1)).logsumexp(1)
        message = step + dist.Normal(W1, 1.0).log_prob(data[:, t, None])
    torch.testing.assert_close(log_evidence(model, None, data).log_evidence, message.logsumexp(-1), **EXACT)
    expected = dist.Normal(W1[0], 1.0).log_prob(data).sum(-1)
    torch.testing.assert_close(log_evidence(model, None, data, states=1).log_evidence, expected, **EXACT)


def test_evidence_with_hard_zeros_is_enumerated() -> None:
    barred = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    model = factorial(first=lambda: MarkovChain(PI1, barred, T))
    nearly = factorial(first=lambda: MarkovChain(PI1, barred.clamp_min(-60.0), T))
    found = log_evidence(model, None, DATA)
    assert found.exact
    torch.testing.assert_close(found.log_evidence, log_evidence(nearly, None, DATA).log_evidence, **EXACT)
