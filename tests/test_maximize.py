"""Maximize as an E-step: points, certificate, ledger, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from scipy.optimize import minimize
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import (
    EM,
    FISTA,
    LBFGS,
    Better,
    Cold,
    CoordinateDescent,
    FeatureSign,
    FixedPoint,
    Gradient,
    InTurn,
    Maximize,
    Newton,
    SpaRSA,
    Status,
    Warm,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_ext.guides import Dirac, MeanField, Structured
from pyro_ext.maximize import default_solver
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.solvers import SolverError
from tests.oracles.lassos import random_lasso

pytestmark = pytest.mark.usefixtures("float64")

N, D, F = 12, 6, 4
V = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(F, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lasso(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v)


def learned(v: Tensor) -> None:
    """What can be learned is bounded: the noise and the prior."""
    noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
    offset = pyro.param("offset", torch.zeros(D))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W + offset, noise + 0.1).to_event(1), obs=v)


def nonnegative(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(2.0).expand([F]).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W + s @ W[:2].flip(-1), 1.0).to_event(1), obs=v)


def mixed(v: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-1):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        h = pyro.sample("h", dist.Laplace(0.2, 0.5).expand([F]).to_event(1))
        with pyro.plate("inner", D, dim=-2):
            e = pyro.sample("e", dist.Exponential(3.0))
        pyro.sample("v", dist.Normal(h @ W + z[..., None] + e.mT, 1.0).to_event(1), obs=v)


def heavy(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(5.0, h @ W, 1.0).to_event(1), obs=v)


def smooth(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(5.0, h @ W, 1.0).to_event(1), obs=v)


def gaussian(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.3, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v)


def em_of(model: Callable[..., Any], e_step: Maximize | None = None, **kwargs: Any) -> EM:
    step = Maximize() if e_step is None else e_step
    return EM(model, Dirac(model), **{"e_step": step, "m_step": None, **kwargs})


def step_of(em: EM) -> Maximize:
    assert isinstance(em.e_step, Maximize)
    return em.e_step


def log_joint_at(model: Callable[..., Any], values: dict[str, Tensor], *args: Any) -> float:
    """log p(v, h) in nats, by Pyro alone."""
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
    return float(trace.log_prob_sum().detach())


def answers(em: EM, *args: Any) -> dict[str, Tensor]:
    posterior = em.infer(*args)
    return {block.site.name: posterior[block.site.name].mean for block in em.call(*args).blocks}


# --------------------------------------------------------------------------- the points


@pytest.mark.parametrize("model", [lasso, nonnegative, mixed, heavy, smooth, gaussian], ids=lambda m: m.__name__)
def test_no_point_nearby_is_better(model: Callable[..., Any]) -> None:
    """Every row is its own problem: moves of all rows at once are tried, and no sum may rise."""
    em = em_of(model)
    found = answers(em, V)
    best = log_joint_at(model, found, V)
    assert em.evaluate_loss(V) == pytest.approx(-best, rel=1e-10)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            moved = {name: x + size * torch.randn(x.shape, generator=generator) for name, x in found.items()}
            moved = {name: x.abs() if name in "es" or model is nonnegative else x for name, x in moved.items()}
            assert log_joint_at(model, moved, V) < best
    assert bool(step_of(em).certificate.converged.all())
    assert step_of(em).certificate.gap.shape == (N,)
    assert bool(step_of(em).certificate.gap.isnan().all()) == (model in (heavy, smooth))


def test_a_mixed_program_against_scipy() -> None:
    found = answers(em_of(mixed, Maximize(InTurn(SpaRSA(1e-12), FeatureSign(1e-12)))), V[:1])

    def loss(u: Any) -> float:
        x = torch.as_tensor(u)
        h = x[1 : 1 + F] - x[1 + F : 1 + 2 * F]
        residual = V[0] - ((h + 0.2) @ W + x[0] + x[1 + 2 * F :])
        fit = 0.5 * residual.square().sum() + (x[0] - 0.5) ** 2 / 8
        return float(fit + 2 * x[1 : 1 + 2 * F].sum() + 3 * x[1 + 2 * F :].sum())

    bounds = [(None, None)] + [(0, None)] * (2 * F + D)
    peer = minimize(
        loss, torch.full((1 + 2 * F + D,), 0.1).numpy(), method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15}
    )
    x = torch.as_tensor(peer.x)
    assert torch.allclose(found["z"], x[:1], atol=1e-4)
    assert torch.allclose(found["h"][0], x[1 : 1 + F] - x[1 + F : 1 + 2 * F] + 0.2, atol=1e-4)
    assert torch.allclose(found["e"][:, 0], x[1 + 2 * F :], atol=1e-4)


def test_zeros_are_exact() -> None:
    h = answers(em_of(lasso), V)["h"]
    assert 0 < int((h == 0).sum()) < h.numel()
    found = answers(em_of(nonnegative), V)
    for name in ("h", "s"):
        assert bool((found[name] >= 0).all())
        assert 0 < int((found[name] == 0).sum()) < found[name].numel()


def test_of_a_gaussian_it_is_the_posterior_mean() -> None:
    guide = Structured(gaussian, [["h"]])
    exact = EM(gaussian, guide, e_step=FixedPoint(), m_step=None).infer(V)["h"].mean
    em = em_of(gaussian)
    assert torch.allclose(answers(em, V)["h"], exact, atol=1e-10)
    assert bool((step_of(em).certificate.gap == 0).all())
    assert bool((step_of(em).certificate.num_iterations == 0).all())


def test_the_posterior_of_points() -> None:
    em = em_of(lasso)
    marginal = em.infer(V)["h"]
    h = marginal.mean
    assert h.shape == (N, F)
    assert torch.allclose(marginal.gram(), h.T @ h, rtol=1e-12)
    assert torch.allclose(marginal.cross(V), h.T @ V, rtol=1e-12)
    em.step(V)
    assert torch.equal(em.guide.posterior(V)["h"].mean, h)
    assert torch.equal(em.guide(V)["h"], h)


def test_plates_of_two_dimensions() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 4, dim=-2):
            h = pyro.sample("h", dist.Laplace(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    em = em_of(model)
    v = torch.randn(4, 3) * 3
    assert torch.allclose(answers(em, v)["h"], v.sign() * (v.abs() - 1).clamp(min=0))
    assert step_of(em).certificate.gap.shape == step_of(em).certificate.converged.shape == (4, 3)


def test_without_a_plate_the_program_is_one_row() -> None:
    def model(v: Tensor) -> None:
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    em = em_of(model)
    v = torch.randn(7, 3)
    total = v.sum(0)
    assert torch.allclose(answers(em, v)["h"], total.sign() * (total.abs() - 1).clamp(min=0) / 7)
    assert step_of(em).certificate.gap.shape == ()
    assert repr(step_of(em).certificate).startswith("Certificate(gap at most ")


def test_conditioned_programs() -> None:
    """One latent is held: the other is alone."""
    held = torch.full((N,), 0.7)
    model = poutine.condition(mixed, data={"z": held})
    found = answers(em_of(model), V)
    assert found.keys() == {"h", "e"}
    both = {**found, "z": held}
    best = log_joint_at(mixed, both, V)
    for _ in range(10):
        moved = {
            "z": held,
            "h": found["h"] + 0.1 * torch.randn(N, F),
            "e": (found["e"] + 0.1 * torch.randn(D, N)).abs(),
        }
        assert log_joint_at(mixed, moved, V) < best


def test_scales_of_positive_latents_are_found_where_the_density_ends() -> None:
    """The density at h = 0 is 0: no lasso, and yet there is a maximum."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            s = pyro.sample("s", dist.HalfNormal(1.0))
            pyro.sample("v", dist.Normal(0.0, s[..., None]).expand([len(v), D]).to_event(1), obs=v)

    s = answers(em_of(model), V)["s"]
    # d/ds of -D log s - |v|^2 / (2 s^2) - s^2 / 2.
    assert torch.allclose(-D / s + V.square().sum(-1) / s**3 - s, torch.zeros(N), atol=1e-6)


def test_hidden_entries_are_never_read() -> None:
    seen = torch.rand(N, D, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[0] = False

    def model(v: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.3, 0.5).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 1.0).mask(seen).to_event(1), obs=v)

    em = em_of(model)
    holed = answers(em, torch.where(seen, V, torch.nan), seen)["h"]
    assert bool(step_of(em).certificate.converged.all())
    assert torch.equal(holed, answers(em, torch.where(seen, V, 7.0), seen)["h"])
    # Nothing seen: the prior's mode.
    assert torch.allclose(holed[0], torch.tensor(0.3))
    alone = em_of(lambda v: model(v, seen[3:4]))
    assert torch.allclose(answers(alone, V[3:4])["h"], holed[3:4], atol=1e-4)


# --------------------------------------------------------------------------- solvers and starts


@pytest.mark.parametrize(
    "solver", [FeatureSign(), SpaRSA(1e-10), FISTA(1e-10), InTurn(SpaRSA(), FISTA()), None], ids=str
)
def test_solvers_agree(solver: Any) -> None:
    for model in (lasso, nonnegative, mixed):
        mine, default = (
            em_of(model, Maximize(solver)),
            em_of(model, Maximize(InTurn(SpaRSA(1e-13), FeatureSign(1e-13)))),
        )
        for name, value in answers(mine, V).items():
            assert torch.allclose(value, answers(default, V)[name], atol=1e-3), (model, name)
        assert mine.evaluate_loss(V) == pytest.approx(default.evaluate_loss(V), abs=1e-4)
        assert bool(step_of(mine).certificate.converged.all())


@pytest.mark.parametrize("solver", [LBFGS(), Newton(), FISTA(), None], ids=str)
def test_solvers_of_smooth_programs_agree(solver: Any) -> None:
    em = em_of(smooth, Maximize(solver))
    reference = em_of(smooth, Maximize(Newton()))
    assert torch.allclose(answers(em, V)["h"], answers(reference, V)["h"], atol=1e-4)
    assert repr(step_of(em).certificate).startswith("Certificate(gap unknown, slope at most ")


def test_the_default_solver() -> None:
    assert isinstance(default_solver(random_lasso(3, 4)), InTurn)
    call = em_of(heavy).call(V)
    assert isinstance(default_solver(Maximize()._view(call.program).problem), FISTA)
    call = em_of(smooth).call(V)
    assert isinstance(default_solver(Maximize()._view(call.program).problem), LBFGS)
    # A smooth solver is given the program, also where it is a lasso or a linear system.
    call = em_of(gaussian).call(V)
    assert isinstance(Maximize(LBFGS())._view(call.program).problem, ProgramProblem)
    assert isinstance(Maximize()._view(call.program).problem, PenalizedQuadratic)


def test_the_gap_of_few_iterations_is_honest() -> None:
    best = -em_of(lasso, Maximize(FeatureSign(1e-13))).evaluate_loss(V)
    em = em_of(lasso, Maximize(FISTA(1e-10, 2)))
    bound = -em.step(V)
    certificate = step_of(em).certificate
    assert not bool(certificate.converged.all())
    assert 0 < best - bound <= float(certificate.gap.sum())
    assert bool((certificate.num_iterations <= 2).all())


def test_a_warm_start_that_nothing_beats_is_not_called_solved() -> None:
    """An iteration that leads upwards is dropped, and what is left is as far from the maximum as it was."""

    class Uphill(FISTA):
        def solve(self, problem: Any, start: Tensor) -> Any:
            return super().solve(problem, start + 1.0)

    em = em_of(lasso, Maximize(FISTA(1e-10, 2)))
    first = -em.step(V)
    step_of(em).solver = Uphill(1e-10, 1)
    assert -em.step(V) == pytest.approx(first, rel=1e-13)
    certificate = step_of(em).certificate
    assert not bool(certificate.converged.any())
    assert certificate.num_iterations.tolist() == [0] * N
    step_of(em).solver = FeatureSign()
    assert -em.step(V) > first
    assert bool(step_of(em).certificate.converged.all())


def bumps(v: Tensor) -> None:
    """Two maxima a row: which of them is found tells where a solver started."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(2 * pyro.param("centre", torch.tensor(1.25)), 1.0))
        pyro.sample("v", dist.Normal(h.square(), 0.5), obs=v)


def test_where_it_starts() -> None:
    v = torch.full((3,), 4.0)
    ends = {}
    for start in (Warm(), Cold(), Better()):
        pyro.clear_param_store()
        em = em_of(bumps, Maximize(start=start))
        em.step(v)
        # The maxima of the program now lie at 2 and -2, the latter is the higher one.
        pyro.param("centre").data.fill_(-0.5)
        result = em.e_half(em.call(v))
        ends[type(start)] = float(em.guide.posterior(v)["h"].mean[0])
        assert result.start == start.label
        assert result.monotone == start.monotone
    assert ends[Warm] > 1.5
    assert ends[Cold] < -1.5
    assert ends[Better] < -1.5


def shifted_heavy(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Normal(7.0, 1e-3))
        h = pyro.sample("h", dist.Laplace(0.4, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(5.0, h @ W + z[..., None], 1.0).to_event(1), obs=v)


@pytest.mark.parametrize(
    "model", [lasso, nonnegative, mixed, gaussian, smooth, shifted_heavy], ids=lambda m: m.__name__
)
def test_points_and_back(model: Callable[..., Any]) -> None:
    """A solver's x and the table's parameters tell the same points."""
    em = em_of(model)
    call = em.call(V)
    view = Maximize()._view(call.program)
    x = torch.randn(N, view.problem.rate.shape[-1])
    if view.problem.nonnegative is not None:
        x = torch.where(view.problem.nonnegative, x.clamp(min=0), x)
    params = view.to_params(x, call.blocks)
    assert torch.allclose(view.to_x(params, call.blocks), x, rtol=1e-12, atol=1e-12)
    posterior = call.posterior(params)
    values = {name: posterior[name].mean for name in params}
    value = float((view.constant - view.problem.objective(x)).sum())
    assert value == pytest.approx(log_joint_at(model, values, V), rel=1e-12)


def test_a_cold_start_is_at_the_prior() -> None:
    """At the mode of sparse priors, at the median of others."""
    call = em_of(shifted_heavy).call(V)
    view = Maximize()._view(call.program)
    params = view.to_params(view.cold_start(call.program, call.blocks), call.blocks)
    assert torch.allclose(params["h"], torch.tensor(0.4))
    assert torch.allclose(params["z"], torch.tensor(7.0), atol=0.01)


def test_a_cold_start_is_that_of_the_present_theta() -> None:
    """The program is traced once in a run, and theta moves."""
    v = torch.full((3,), 4.0)
    em = em_of(bumps, Maximize(start=Cold()))
    call = em.call(v)
    pyro.param("centre").data.fill_(-1.25)
    assert bool((em.e_half(call).posterior["h"].mean < 0).all())


# --------------------------------------------------------------------------- in EM


@pytest.mark.parametrize("model", [learned, nonnegative, mixed, heavy, smooth], ids=lambda m: m.__name__)
def test_infer_leaves_no_trace(model: Callable[..., Any]) -> None:
    em = em_of(model)
    em.step(V)
    table = {b.name: em.guide.table(b).detach().clone() for b in em.guide.blocks}
    generator = torch.get_rng_state()
    em.infer(V + 1)
    em.evaluate_loss(V + 1)
    for block in em.guide.blocks:
        assert torch.equal(em.guide.table(block), table[block.name])
    assert torch.equal(generator, torch.get_rng_state())


def test_the_table_after_a_run_is_what_infer_finds() -> None:
    em = em_of(learned, m_step=Gradient(Adam({"lr": 0.02})))
    history = em.run(V, max_steps=60, tolerance=0.0, progress=False)
    em.e_step, table = Maximize(FeatureSign(1e-12)), em.guide.posterior(V)["h"].mean
    # q belongs to the theta before the last M half-step: one more E half-step brings it up.
    em.m_step = None
    em.step(V)
    table = em.guide.posterior(V)["h"].mean
    assert torch.allclose(table, em.infer(V)["h"].mean, atol=1e-7)
    assert torch.equal(table == 0, em.infer(V)["h"].mean == 0)
    assert torch.allclose(em.infer(V[:3])["h"].mean, table[:3], atol=1e-7)
    assert history.status is Status.MAX_STEPS


@pytest.mark.parametrize("start", [Warm(), Cold(), Better()], ids=lambda s: s.label)
def test_the_ledger(start: Any) -> None:
    em = em_of(learned, Maximize(start=start), m_step=Gradient(Adam({"lr": 0.02})))
    history = em.run(V, max_steps=30, tolerance=0.0, progress=False)
    assert history.loss_label == "-log p(h, v), nats per row"
    assert history.status is Status.MAX_STEPS
    assert all(entry.exact for entry in history.ledger)
    assert {entry.start for entry in history.ledger} == {start.label}
    bounds = [entry.bound for entry in history.ledger]
    assert [entry.half for entry in history.ledger[:4]] == ["E", "M", "E", "M"]
    # No E half-step falls: the problem is convex, and solved.
    assert all(e - m >= -1e-9 * abs(m) for m, e in zip(bounds[1::2], bounds[2::2], strict=False))
    assert bounds[-1] > bounds[0] + 1
    h = em.guide.posterior(V)["h"].mean
    assert bounds[-1] == pytest.approx(log_joint_at(learned, {"h": h}, V), abs=1e-9)


@pytest.mark.parametrize("model", [lasso, heavy, smooth], ids=lambda m: m.__name__)
def test_a_run_that_holds_theta_converges_at_once(model: Callable[..., Any]) -> None:
    em = em_of(model)
    history = em.run(V, max_steps=10, progress=False)
    assert history.status is Status.CONVERGED
    assert len(history.ledger) == 2
    assert history.ledger[1].bound >= history.ledger[0].bound


def test_a_fall_is_told() -> None:
    """The promise is kept by what the step does: were it broken, the run would say so."""

    class Broken(Maximize):
        def improve(self, call: Any, *, keep: bool) -> Any:
            result = super().improve(call, keep=keep)
            assert result.monotone == keep
            if self.falls:
                object.__setattr__(result, "bound", result.bound - 1)
            self.falls = True
            return result

        falls = False

    history = em_of(lasso, Broken()).run(V, max_steps=5, progress=False)
    assert history.status is Status.DECREASED


def test_minibatches_of_a_loader() -> None:
    def unplated(v: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, noise + 0.1).to_event(1), obs=v)

    em = em_of(unplated, m_step=Gradient(Adam({"lr": 0.05})))
    loader: Any = DataLoader(TensorDataset(V), batch_size=5)
    history = fit(em, loader, num_epochs=5, progress=False)
    assert history.loss[-1] < history.loss[0]
    assert em.evaluate_loss(V) == pytest.approx(-log_joint_at(unplated, {"h": em.infer(V)["h"].mean}, V), abs=1e-9)


def test_subsampled_programs() -> None:
    """Rows of the batch move, the others stay; losses speak for all rows."""

    def model(v: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(v), subsample=index) as rows:
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v[rows])

    em, whole = em_of(model, Maximize(FeatureSign(1e-12))), em_of(lasso, Maximize(FeatureSign(1e-12)))
    whole.step(V)
    answer = whole.guide.posterior(V)["h"].mean
    index = torch.tensor([7, 2, 3])
    loss = em.step(V, index)
    assert loss == pytest.approx(-log_joint_at(lasso, {"h": answer[index]}, V[index]) * N / 3, rel=1e-6)
    assert step_of(em).certificate.gap.shape == (3,)
    table = em.guide.table(em.guide.blocks[0])
    assert torch.allclose(table[index], answer[index], atol=1e-6)
    others = torch.tensor([i for i in range(N) if i not in (7, 2, 3)])
    untouched = table[others].detach().clone()
    em.step(V, index.flip(0))
    assert torch.equal(table[others], untouched)
    em.step(V, torch.arange(N))
    assert torch.allclose(table, answer, atol=1e-6)


def test_random_subsamples_in_a_run() -> None:
    def model(v: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(v), subsample_size=4) as rows:
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, noise + 0.1).to_event(1), obs=v[rows])

    em = em_of(model, m_step=Gradient(Adam({"lr": 0.05})))
    history = em.run(V, max_steps=25, progress=False)
    assert {entry.batch for entry in history.ledger} == {"batch"}
    assert history.status is not Status.DECREASED
    assert float(pyro.param("noise").detach()) < 1.9


def test_evaluate_loss_reads_the_table_and_infers_other_data() -> None:
    em = em_of(learned)
    fresh = em.evaluate_loss(V)
    assert not em.guide.is_set_up
    em.step(V)
    assert em.evaluate_loss(V) == pytest.approx(fresh, rel=1e-9)
    em.guide.table(em.guide.blocks[0]).data.zero_()
    assert em.evaluate_loss(V) == pytest.approx(-log_joint_at(learned, {"h": torch.zeros(N, F)}, V), rel=1e-12)
    other = em.evaluate_loss(V + 1)
    assert other == pytest.approx(-log_joint_at(learned, {"h": em.infer(V + 1)["h"].mean}, V + 1), rel=1e-9)


def test_compilation_does_no_harm() -> None:
    plain, compiled = em_of(learned), em_of(learned, compile=True)
    assert plain.step(V) == compiled.step(V)
    assert torch.equal(plain.infer(V + 1)["h"].mean, compiled.infer(V + 1)["h"].mean)


@pytest.mark.parametrize("model", [lasso, nonnegative, heavy, smooth], ids=lambda m: m.__name__)
def test_single_precision(model: Callable[..., Any]) -> None:
    exact = em_of(model).evaluate_loss(V)
    torch.set_default_dtype(torch.float32)

    def single(v: Tensor) -> None:
        w = W.float()
        with pyro.plate("data", len(v)):
            if model is nonnegative:
                h = pyro.sample("h", dist.Exponential(2.0).expand([F]).to_event(1))
                s = pyro.sample("s", dist.HalfNormal(1.0).expand([2]).to_event(1))
                mean = h @ w + s @ w[:2].flip(-1)
            else:
                prior = dist.Normal(0.0, 0.5) if model is smooth else dist.Laplace(0.0, 0.5)
                mean = pyro.sample("h", prior.expand([F]).to_event(1)) @ w
            noise = dist.Normal(mean, 1.0) if model in (lasso, nonnegative) else dist.StudentT(5.0, mean, 1.0)
            pyro.sample("v", noise.to_event(1), obs=v)

    em = em_of(single)
    assert em.step(V.float()) == pytest.approx(exact, rel=1e-5)
    first = step_of(em).certificate
    assert bool(first.converged.all())
    assert first.gap.dtype == torch.float32
    # Again, from the answer.
    assert em.step(V.float()) == pytest.approx(exact, rel=1e-5)
    assert bool(step_of(em).certificate.converged.all())


@pytest.mark.parametrize("model", [lasso, heavy], ids=lambda m: m.__name__)
def test_bounds_that_points_do_not_have(model: Callable[..., Any]) -> None:
    em = em_of(model)
    em.step(V)
    for call in (elbo_terms, log_evidence):
        with pytest.raises(ValueError, match="point mass on the continuous site 'h'"):
            call(model, em.guide, V)


# --------------------------------------------------------------------------- what it refuses


def everything(em: EM) -> dict[str, Any]:
    store = pyro.get_param_store()
    found: dict[str, Any] = {name: p.detach().clone() for name, p in store.items()}
    found["rng"] = torch.get_rng_state()
    found["set up"] = em.guide.is_set_up
    return found


def refused(em: EM, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    before = everything(em)
    with pytest.raises(error, match=match) as caught:
        call()
    text = str(caught.value).splitlines()[0]
    assert text.startswith("Expected ")
    assert ", but " in text
    after = everything(em)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name


def latent_scale(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        h = pyro.sample("h", dist.Laplace(0.0, tau[..., None]).expand([len(v), F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v)


def masked_prior(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1).mask(torch.arange(len(v)) > 2))
        pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v)


def flat(v: Tensor) -> None:
    """Only the sum of the two is seen, and neither has a prior of its own."""
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)


def discrete(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("v", dist.Normal(h @ W + k[..., None], 1.0).to_event(1), obs=v)


@pytest.mark.parametrize("set_up", [False, True])
@pytest.mark.parametrize(
    ("model", "solver", "error", "match"),
    [
        (latent_scale, None, SolverError, "Laplace prior with fixed loc and scale, but got that of 'h'.*Gradient"),
        (masked_prior, None, SolverError, "that of 'h', which depends on another latent or is masked"),
        (flat, None, SolverError, "one maximum in the latents without a sparse prior.*proper prior"),
        (discrete, None, TypeError, r"continuous latents for Maximize, but got the discrete 'k'. Use FixedPoint\(\)"),
        (
            smooth,
            FeatureSign(),
            SolverError,
            r"quadratic beside .* for FeatureSign,.*Use FISTA\(\), LBFGS\(\) or Newton",
        ),
        (smooth, SpaRSA(), SolverError, r"for SpaRSA, but it is not. Use FISTA\(\), LBFGS\(\) or Newton\(\)."),
        (heavy, FeatureSign(), SolverError, r"for FeatureSign, but it is not. Use FISTA\(\).$"),
        (heavy, InTurn(FISTA(), FeatureSign()), SolverError, r"for FeatureSign, but it is not. Use FISTA\(\).$"),
        (lasso, LBFGS(), SolverError, r"smooth log p.* for LBFGS.*Use `?FISTA\(\)"),
        (lasso, Newton(), SolverError, r"smooth log p.* for Newton.*Use `?FISTA\(\)"),
    ],
    ids=lambda x: getattr(x, "__name__", repr(x))[:24],
)
def test_programs_that_it_or_its_solver_does_not_serve(
    model: Callable[..., Any], solver: Any, error: type[Exception], match: str, set_up: bool
) -> None:
    em = em_of(model, Maximize(solver), m_step=Gradient(Adam({"lr": 0.1})))
    if set_up:
        em.guide(V)
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: em.step(V),
        "infer": lambda: em.infer(V),
        "evaluate_loss": lambda: em.evaluate_loss(V) if not em.guide.holds_answer else em.infer(V),
        "run": lambda: em.run(V, progress=False),
    }
    for call in calls.values():
        refused(em, call, error, match)
    with pytest.raises(RuntimeError, match=r"an E-step before its certificate, but there was none. Call `em.infer`"):
        _ = step_of(em).certificate


def test_a_refused_step_keeps_the_last_answer() -> None:
    em = em_of(learned)
    em.step(V)
    step_of(em).solver = LBFGS()
    refused(em, lambda: em.step(V), SolverError, "for LBFGS")
    # The step is undone where q was solved and theta cannot be moved.
    before = everything(em)
    em.m_step = Broken()
    step_of(em).solver = None
    pyro.param("offset").data.add_(1.0)
    before["offset"] = pyro.param("offset").detach().clone()
    with pytest.raises(RuntimeError, match="Expected better luck"):
        em.step(V)
    for name, value in everything(em).items():
        assert torch.equal(before[name], value) if isinstance(value, Tensor) else before[name] == value, name


class Broken(Gradient):
    """An M-step that fails."""

    def __init__(self) -> None:
        super().__init__(Adam({"lr": 0.1}))

    def improve(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Expected better luck, but got none.")


@pytest.mark.parametrize("noise", ["Normal", "StudentT"])
@pytest.mark.parametrize("prior", ["Laplace", "Normal"])
def test_parameters_that_are_not_finite(prior: str, noise: str) -> None:
    def model(v: Tensor) -> None:
        offset = pyro.param("offset", torch.zeros(D))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", getattr(dist, prior)(0.0, 0.5).expand([F]).to_event(1))
            mean = h @ W + offset
            likelihood = dist.Normal(mean, 1.0) if noise == "Normal" else dist.StudentT(5.0, mean, 1.0)
            pyro.sample("v", likelihood.to_event(1), obs=v)

    em = em_of(model)
    em.step(V)
    table = em.guide.posterior(V)["h"].mean.clone()
    pyro.param("offset").data[2] = torch.nan
    pyro.enable_validation(False)
    for call in (lambda: em.step(V), lambda: em.infer(V)):
        with pytest.raises(
            NotFiniteError, match=r"finite at the start, but got (log p = )?-inf in row 0\. Look for NaN"
        ):
            call()
        assert torch.equal(em.guide.posterior(V)["h"].mean, table)


def test_nan_in_the_data() -> None:
    holed = V.clone()
    holed[2, 1] = torch.nan
    for model in (lasso, heavy):
        em = em_of(model)
        for call in (lambda em=em: em.step(holed), lambda em=em: em.infer(holed)):
            refused(em, call, ValueError, r"finite values at the visible site 'v'.*nan at \(2, 1\)")


@pytest.mark.parametrize("guide", [MeanField, Structured])
def test_guides_that_are_no_points(guide: type) -> None:
    with pytest.raises(TypeError, match=rf"a Dirac guide for Maximize, but got {guide.__name__}.*FixedPoint\(\)"):
        EM(lasso, guide(lasso), e_step=Maximize(), m_step=None)


def test_settings() -> None:
    for wrong in ("FISTA", FISTA, 3):
        with pytest.raises(TypeError, match=r"solver to be FeatureSign\(\), .* but got .*Pass an object, not its name"):
            Maximize(wrong)  # pyright: ignore[reportArgumentType]
    for wrong in ("warm", Warm, 3):
        with pytest.raises(TypeError, match=r"start to be Cold\(\), Better\(\) or Warm\(\), but got"):
            Maximize(start=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="an E-step before its certificate"):
        _ = Maximize().certificate


# --------------------------------------------------------------------------- many numbers of a latent


def many(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([64]).to_event(1))
        w = pyro.param("w", lambda: torch.randn(64, D))
        pyro.sample("v", dist.Normal(h @ w, 1.0).to_event(1), obs=v)


def test_structure_is_read_off_cheap_draws() -> None:
    """The same draw serves every row; the answers are those of few rows."""
    pyro.param("w", torch.randn(64, D))
    v = torch.randn(2000, D)
    em = em_of(many)
    whole = em.infer(v)["h"].mean
    assert whole.shape == (2000, 64)
    few = em.infer(v[:50])["h"].mean
    assert torch.allclose(whole[:50], few, atol=1e-3)


def test_programs_may_write_to_many_numbers() -> None:
    """A value that was the same memory in every row could neither be written to nor viewed."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 0.5).expand([64]).to_event(1))
            total = h.view(-1).view(len(v), 64).sum(-1)
            pyro.sample("v", dist.Normal(total, 1.0), obs=v)

    v = torch.randn(2000)
    # The mean of a Gaussian posterior: shares of v.
    assert torch.allclose(answers(em_of(model), v)["h"][:, 0], v * 0.25 / (64 * 0.25 + 1), atol=1e-9)


def test_parameters_created_before_many_numbers_are_those_of_a_plain_run() -> None:
    def model(v: Tensor) -> None:
        w = pyro.param("w", lambda: torch.randn(64, D))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([64]).to_event(1))
            pyro.sample("v", dist.Normal(h @ w, 1.0).to_event(1), obs=v)

    v = torch.randn(2000, D)
    found = []
    for run in (lambda: model(v), lambda: em_of(model).infer(v), lambda: em_of(model).call(v)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        run()
        found.append(pyro.param("w").detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_many_numbers_leave_the_generator_alone() -> None:
    pyro.param("w", torch.randn(64, D))
    em = em_of(many)
    v = torch.randn(2000, D)
    em.guide.setup(v)
    generator = torch.get_rng_state()
    em.call(v)
    assert torch.equal(generator, torch.get_rng_state())


def upward(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(torch.zeros((), dtype=v.dtype), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        pyro.factor("upward", h**2)


@pytest.mark.parametrize("solver", [FeatureSign(), SpaRSA(), FISTA(), None], ids=str)
def test_a_density_that_bends_upwards_is_refused(solver: Any) -> None:
    """Its stationary points are no maxima, whatever the data: the gap of a lasso knows nothing of it."""
    for v in ([-1.5], [0.5, 3.0]):
        em = EM(upward, Dirac(upward), e_step=Maximize(solver), m_step=None)
        with pytest.raises(SolverError, match="concave in h, but got a second derivative of 1 along"):
            em.infer(torch.tensor(v))


def tilted(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(torch.zeros((), dtype=v.dtype), 1.0))
        pyro.sample("v", dist.Normal(0 * h, 1.0), obs=v)
        pyro.factor("tilt", 2 * h)


@pytest.mark.parametrize("solver", [FeatureSign(), CoordinateDescent(), SpaRSA(), FISTA(), None], ids=str)
def test_a_density_without_a_maximum_is_refused_by_every_solver(solver: Any) -> None:
    v = torch.tensor([0.5, 3.0])
    guide = Dirac(tilted)
    em = EM(tilted, guide, e_step=Maximize(solver), m_step=None)
    with pytest.raises(SolverError, match="falls without end"):
        em.step(v)
    assert not guide.holds_answer


@pytest.mark.parametrize("prior", [dist.StudentT(3.0), dist.Cauchy(0.0, 0.5)], ids=["Student-t", "Cauchy"])
def test_a_heavy_tailed_prior_is_seen_beside_a_sharp_likelihood(prior: Any) -> None:
    """In float32 their sum looks quadratic: the prior is rounding in it."""
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", prior.expand([6]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T.to(h), 0.01).to_event(1), obs=v)

    v = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    em = EM(model, Dirac(model), e_step=Maximize(), m_step=None)
    h = em.infer(v)["h"].mean
    assert bool((h @ W.T - v).abs().max() < 0.05)
    assert bool(em.e_step.certificate.gap.isnan().all())


def test_fit_names_the_loss_of_a_guide_that_it_sets_up() -> None:
    em = EM(plain_lasso, Dirac(plain_lasso), e_step=Maximize(), m_step=None)
    history = fit(em, [torch.tensor([0.5, 3.0])], num_epochs=1, progress=False)
    assert history.loss_label == "-log p(h, v), nats per row"


def plain_lasso(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(torch.zeros((), dtype=v.dtype), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_a_refused_step_leaves_a_called_guide_without_an_answer() -> None:
    guide, v = Dirac(tilted), torch.tensor([0.5, 3.0])
    guide(v)
    em = EM(tilted, guide, e_step=Maximize(), m_step=None)
    with pytest.raises(SolverError, match="falls without end"):
        em.step(v)
    assert not guide.holds_answer
