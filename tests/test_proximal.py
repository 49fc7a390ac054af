"""Proximal gradient solvers against brute force, scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import Lasso, LogisticRegression
from torch import Tensor

from pyro_ext import proximal
from pyro_ext.lbfgs import LBFGS
from pyro_ext.penalties import Penalties, laplace_sites, penalty_layout
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.proximal import FISTA, Proximal, SpaRSA
from pyro_ext.solvers import SolverError
from tests.oracles.lassos import random_lasso, solve_by_signs

pytestmark = pytest.mark.usefixtures("float64")

SOLVERS = [FISTA, SpaRSA]
BOUNDED = torch.tensor([True, False, True, False, True])


def objective(problem: PenalizedQuadratic, x: Tensor) -> Tensor:
    """P, written out."""
    return 0.5 * (x * problem.times(x)).sum(-1) - (x * problem.linear).sum(-1) + (problem.rate * x.abs()).sum(-1)


# --------------------------------------------------------------------------- lassos

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ill-conditioned": {"spread": 3.0},
    "overcomplete": {"rank": 3},
    "nonnegative": {"nonnegative": BOUNDED},
    "overcomplete and nonnegative": {"rank": 3, "nonnegative": BOUNDED},
    "rate per atom": {"rate": torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])},
    "rate per row": {"rate": torch.linspace(0.1, 5.0, 35).reshape(7, 5)},
    "G per row": {"own": True},
    "G and rate per row, bounded": {
        "own": True,
        "rate": torch.linspace(0.1, 5.0, 35).reshape(7, 5),
        "nonnegative": BOUNDED,
    },
    "nothing active": {"rate": 1e3},
    "half-normal beside an overcomplete lasso": {
        "rank": 3,
        "rate": torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]),
        "curvature": torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0]),
        "nonnegative": BOUNDED,
    },
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_against_all_patterns_of_signs(solver: type[Proximal], case: str) -> None:
    problem = random_lasso(7, 5, **CASES[case])
    x, least = solve_by_signs(problem)
    found = solver(1e-12, 200_000).solve(problem, torch.zeros(7, 5))
    assert bool(found.converged.all())
    value = objective(problem, found.x)
    assert torch.allclose(value, least, rtol=1e-10, atol=1e-10)
    assert bool((value - least <= found.gap + 1e-12 * (1 + least.abs())).all())
    assert bool((found.gap <= 1e-12 * problem.energy).all())
    if CASES[case].get("rank") is None:
        assert torch.allclose(found.x, x, atol=1e-3 if "ill" in case else 1e-5)
        assert torch.equal(found.x == 0, x == 0)
    if problem.nonnegative is not None:
        assert bool((found.x[:, BOUNDED] >= 0).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_against_scikit_learn(solver: type[Proximal]) -> None:
    generator = torch.Generator().manual_seed(0)
    design, y = torch.randn(50, 30, generator=generator), torch.randn(50, generator=generator)
    problem = PenalizedQuadratic(design.mT @ design / 50, (y @ design / 50)[None], torch.full((30,), 0.1))
    peer = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(design.numpy(), y.numpy())
    found = solver(1e-13).solve(problem, torch.zeros(1, 30))
    assert torch.allclose(found.x[0], torch.as_tensor(peer.coef_), atol=1e-6)
    assert torch.equal(found.x[0] == 0, torch.as_tensor(peer.coef_) == 0)
    assert 0 < int((found.x == 0).sum()) < 30


BOUNDED_WITHOUT_RATE = {"rank": 3, "rate": torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), "nonnegative": BOUNDED}


def test_the_gap_of_bounded_atoms_without_a_rate() -> None:
    """Any slope that is left on them would end the scaling at 0; the exact answer has one, by rounding."""
    for own in (False, True):
        problem = random_lasso(7, 5, own=own, **CASES["half-normal beside an overcomplete lasso"])
        x, least = solve_by_signs(problem)
        assert bool((x[:, 0] > 0).any())
        assert bool((problem.gap(x, problem.gradient(x)) < 1e-10 * problem.energy).all())
        for reach in (1e-8, 1e-4, 1e-2, 1.0):
            near = x + reach * torch.randn(7, 5)
            near = torch.where(BOUNDED, near.clamp(min=0), near)
            gap, away = problem.gap(near, problem.gradient(near)), objective(problem, near) - least
            assert bool((away <= gap + 1e-12 * (1 + least.abs())).all())
            assert reach > 0.1 or bool((gap <= 100 * reach * (1 + problem.energy)).all())


def test_the_gap_where_such_atoms_have_no_curvature_is_wide_but_true() -> None:
    problem = random_lasso(7, 5, **BOUNDED_WITHOUT_RATE)
    least = solve_by_signs(problem)[1]
    for _ in range(20):
        x = torch.where(BOUNDED, torch.randn(7, 5).abs(), torch.randn(7, 5))
        gap = problem.gap(x, problem.gradient(x))
        assert bool((objective(problem, x) - least <= gap).all())
    # What costs nothing reaches far: from 0 to 100, for a fall of 0.5 nats.
    design = torch.tensor([[1.0, 0.01]])
    problem = PenalizedQuadratic(
        design.T @ design, design, torch.tensor([1.0, 0.0]), nonnegative=torch.tensor([True, True])
    )
    assert float(problem.gap(torch.zeros(1, 2), -design)) >= 0.5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num", [1, 3, 20])
def test_the_gap_bounds_how_far_it_is(solver: type[Proximal], case: str, num: int) -> None:
    """At points on the way too: rows that ran out of iterations say so."""
    problem = random_lasso(7, 5, **CASES[case])
    least = solve_by_signs(problem)[1]
    found = solver(1e-14, num, check_every=1).solve(problem, torch.randn(7, 5))
    away = objective(problem, found.x) - least
    assert bool((away <= found.gap + 1e-12 * (1 + least.abs())).all())
    assert torch.equal(found.converged, found.gap <= 1e-14 * 0.5 * problem.energy)
    assert bool((found.num_iterations[~found.converged] == num).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_iterations_that_do_not_suffice(solver: type[Proximal]) -> None:
    problem = random_lasso(7, 5, spread=4.0)
    found = solver(1e-12, 7).solve(problem, torch.zeros(7, 5))
    assert not bool(found.converged.any())
    assert found.num_iterations.tolist() == [7] * 7
    assert bool((found.gap > 1e-12 * problem.energy).all())
    assert torch.allclose(found.gap, problem.gap(found.x, problem.gradient(found.x)))
    assert torch.allclose(found.slope, problem.slope(found.x, problem.gradient(found.x)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_leave_when_they_are_solved(solver: type[Proximal]) -> None:
    """Rows of different difficulty end after different numbers of iterations, each with its own answer."""
    spectra = torch.stack([torch.logspace(0, -hard, 5) for hard in (0.0, 1.0, 2.0, 3.0)])
    basis = torch.linalg.qr(torch.randn(5, 5))[0]
    quadratic = basis @ torch.diag_embed(spectra) @ basis.mT
    problem = PenalizedQuadratic(quadratic, torch.randn(4, 5), torch.full((5,), 0.01))
    solved = solver(1e-10, 100_000, check_every=1)
    found = solved.solve(problem, torch.zeros(4, 5))
    assert bool(found.converged.all())
    assert len(set(found.num_iterations.tolist())) >= 3
    for row in range(4):
        alone = solved.solve(problem.rows(torch.tensor([row])), torch.zeros(1, 5))
        assert torch.allclose(alone.x[0], found.x[row], atol=1e-6)
        assert int(alone.num_iterations) == int(found.num_iterations[row])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_at_the_answer_is_left_at_once(solver: type[Proximal]) -> None:
    problem = random_lasso(7, 5)
    found = solver(1e-12).solve(problem, torch.zeros(7, 5))
    again = solver(1e-8).solve(problem, found.x)
    assert bool((again.num_iterations <= 5).all())
    assert torch.allclose(again.x, found.x, atol=1e-7)
    away = solver(1e-12).solve(problem, 10 * torch.randn(7, 5))
    assert torch.allclose(objective(problem, away.x), objective(problem, found.x), rtol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("own", [False, True])
def test_chunks_change_nothing(solver: type[Proximal], own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = torch.linspace(0.1, 5.0, 115).reshape(23, 5)
    problem = random_lasso(23, 5, rate=rates, own=own, nonnegative=BOUNDED)
    # Rows of different sizes have different goals.
    problem.linear *= torch.logspace(4, 0, 23)[:, None]
    problem.rate *= torch.logspace(4, 0, 23)[:, None]
    # Rows leave at the same iteration in both; a screening of one chunk is none of another.
    monkeypatch.setattr(Proximal, "_screen", lambda self, problem, state, kept, gap, gradient: (problem, state, kept))
    whole = solver(1e-12).solve(problem, torch.zeros(23, 5))
    sizes: list[int] = []
    inner = Proximal._solve
    monkeypatch.setattr(proximal, "CHUNK_ELEMENTS", 20)
    monkeypatch.setattr(
        Proximal, "_solve", lambda self, part, *rest: sizes.append(part.num_rows) or inner(self, part, *rest)
    )
    parts = solver(1e-12).solve(problem, torch.zeros(23, 5))
    assert sizes == [4, 4, 4, 4, 4, 3]
    assert torch.allclose(whole.x, parts.x, rtol=1e-7, atol=1e-7)
    assert bool((parts.gap <= 1e-12 * problem.energy).all())
    assert torch.equal(whole.converged, parts.converged)
    assert whole.gap.shape == parts.gap.shape == (23,)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bounded", [False, True])
def test_screening_leaves_out_zeros_only(
    solver: type[Proximal], bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    design = torch.randn(30, 200, generator=generator)
    y = design[:, :4] @ torch.ones(4) + 0.1 * torch.randn(2, 30, generator=generator)
    nonnegative = torch.arange(200) % 2 == 0 if bounded else None
    problem = PenalizedQuadratic(design.mT @ design, y @ design, torch.full((200,), 8.0), nonnegative)
    widths: list[int] = []
    inner = PenalizedQuadratic.columns
    monkeypatch.setattr(
        PenalizedQuadratic, "columns", lambda self, index: widths.append(len(index)) or inner(self, index)
    )
    screened = solver(1e-12).solve(problem, torch.zeros(2, 200))
    assert widths
    assert widths[-1] < 100
    monkeypatch.setattr(Proximal, "_screen", lambda self, problem, state, kept, gap, gradient: (problem, state, kept))
    widths.clear()
    plain = solver(1e-12).solve(problem, torch.zeros(2, 200))
    assert not widths
    assert bool(screened.converged.all())
    assert torch.allclose(screened.x, plain.x, atol=1e-6)
    assert torch.equal(screened.x == 0, plain.x == 0)
    # Atoms that were left out have no slope in the whole problem either.
    assert torch.allclose(screened.slope, problem.slope(screened.x, problem.gradient(screened.x)), atol=1e-10)


@pytest.mark.parametrize("bounded", [False, True])
def test_what_may_be_active_holds_all_that_is(bounded: bool) -> None:
    """Whatever the gap was bounded by: at full rank it may be far below the duality gap of the scaled gradient."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.randn(6, generator=generator).exp()
        linear = torch.randn(1, 6, generator=generator) * torch.randn(1, 6, generator=generator).mul(2).exp()
        nonnegative = torch.arange(6) < 3 if bounded else None
        problem = PenalizedQuadratic(torch.diag(spectrum), linear, torch.ones(6), nonnegative)
        # Without couplings every entry is solved alone.
        answer = problem.shrink(linear, 1.0) / spectrum
        x, length = torch.zeros(1, 6), 1 / spectrum.max()
        for _ in range(40):
            x = problem.shrink(x - length * problem.gradient(x), length)
            gradient = problem.gradient(x)
            gap = problem.gap(x, gradient)
            if float(gap) < 1e-12 * float(problem.energy):
                break
            needed = problem.may_be_active(gap, gradient)
            assert bool(needed[answer != 0].all()), (seed, x, answer)


def test_no_proof_without_a_gap() -> None:
    """Where b leaves the range of G the gap is infinite, and nothing may be left out."""
    problem = PenalizedQuadratic(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[3.0, 2.0]]), torch.ones(2))
    gradient = problem.gradient(torch.zeros(1, 2))
    gap = problem.gap(torch.zeros(1, 2), gradient)
    assert bool(gap.isinf().all())
    assert problem.may_be_active(gap, gradient).tolist() == [[True, True]]


def test_accelerated_steps_need_fewer_iterations() -> None:
    """FISTA's momentum and SpaRSA's long steps are worth a good deal where G is ill-conditioned."""
    problem = random_lasso(3, 20, spread=1.0)
    start = torch.zeros(3, 20)

    class Plain(FISTA):
        def advance(self, problem: Any, state: Any, num: int) -> Any:
            x, y, t, step = state
            for _ in range(num):
                x = problem.shrink(x - step * problem.gradient(x), step)
            return (x, y, t, step), problem.gradient(x)

    plain, fast, spectral = (s(1e-8, 20_000).solve(problem, start) for s in (Plain, FISTA, SpaRSA))
    assert bool((fast.num_iterations < plain.num_iterations / 5).all())
    assert bool((spectral.num_iterations < plain.num_iterations / 5).all())
    assert torch.allclose(fast.x, spectral.x, atol=1e-2)


def test_a_row_without_a_new_low_goes_back_to_its_lowest_point() -> None:
    problem, solver = random_lasso(2, 5), SpaRSA()
    low, far = torch.zeros(2, 5), torch.full((2, 5), 50.0)
    _, gradient, step, best, best_gradient, value, checks, reach = solver.begin(problem, low)
    state = (far, problem.gradient(far), 100 * step, best, best_gradient, value, checks, reach)
    curvature = problem.curvature
    for num in range(1, proximal.MOST_CHECKS + 1):
        # Steps of length 0 are no new low.
        state, _ = solver.advance(problem, (far, problem.gradient(far), *state[2:]), 0)
        assert state[6].tolist() == [num, num]
    state, gradient = solver.advance(problem, state, 1)
    safe = problem.shrink(low - problem.gradient(low) / curvature, 1 / curvature)
    assert torch.allclose(state[0], safe)
    assert torch.allclose(gradient, problem.gradient(safe))
    assert state[6].tolist() == [0, 0]
    # Spectral steps are shorter from here on.
    assert bool((state[7] < reach).all())


def test_spectral_steps_that_do_not_help_become_shorter() -> None:
    """Rows of a badly conditioned G, in which long steps end far off again and again."""
    found = SpaRSA(1e-6, 2_000).solve(random_lasso(50, 20, spread=1.0), torch.zeros(50, 20))
    assert bool(found.converged.all())
    for num in (5, 20, 40, 60, 100):
        problem = random_lasso(50, 60, rank=30, rate=0.3)
        ended = SpaRSA(1e-12, num).solve(problem, torch.zeros(50, 60))
        # At the lowest P that a row saw, not at the last one.
        assert bool((objective(problem, ended.x) <= 0).all())
        assert torch.allclose(ended.gap, problem.gap(ended.x, problem.gradient(ended.x)))


def test_momentum_restarts_where_it_points_uphill() -> None:
    """On a strongly convex problem plain momentum swings; with restarts the error falls linearly."""
    problem = PenalizedQuadratic(torch.diag(torch.logspace(0, -3, 20)), torch.ones(1, 20), torch.full((20,), 1e-4))
    found = FISTA(1e-13, 3_000).solve(problem, torch.zeros(1, 20))
    assert bool(found.converged.all())

    x = y = torch.zeros(1, 20)
    t = torch.ones(1, 1)
    for _ in range(int(found.num_iterations)):
        new = problem.shrink(y - problem.gradient(y), 1.0)
        longer = (1 + (1 + 4 * t * t).sqrt()) / 2
        x, y, t = new, new + (t - 1) / longer * (new - x), longer
    least = objective(problem, found.x)
    assert float(objective(problem, x) - least) > 100 * float(found.gap)


def test_spectral_steps_may_be_long() -> None:
    """P may rise on the way, and yet the answer is found where 1 / L would take far longer."""
    problem = PenalizedQuadratic(torch.diag(torch.logspace(0, -4, 12)), torch.ones(1, 12), torch.full((12,), 1e-3))
    found = SpaRSA(1e-12, 1_500).solve(problem, torch.zeros(1, 12))
    assert bool(found.converged.all())
    assert torch.allclose(found.x, (torch.ones(12) - 1e-3) / torch.logspace(0, -4, 12), rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_single_precision_stops_at_its_rounding(solver: type[Proximal]) -> None:
    double = random_lasso(50, 20, spread=0.0)
    single = PenalizedQuadratic(double.quadratic.float(), double.linear.float(), double.rate.float())
    found = solver(1e-12, 5_000).solve(single, torch.zeros(50, 20, dtype=torch.float32))
    assert found.x.dtype == found.gap.dtype == torch.float32
    assert bool(found.converged.all())
    answer = solver(1e-12, 50_000).solve(double, torch.zeros(50, 20))
    away = objective(double, found.x.double()) - objective(double, answer.x)
    assert bool((away <= 64 * torch.finfo(torch.float32).eps * double.energy).all())


def test_a_row_of_zeros_needs_nothing() -> None:
    problem = PenalizedQuadratic(torch.eye(3), torch.zeros(2, 3), torch.ones(3))
    for solver in SOLVERS:
        found = solver().solve(problem, torch.zeros(2, 3))
        assert torch.equal(found.x, torch.zeros(2, 3))
        assert bool(found.converged.all())
        found = solver().solve(problem, torch.randn(2, 3))
        assert torch.equal(found.x, torch.zeros(2, 3))
        assert bool(found.converged.all())


# --------------------------------------------------------------------------- programs

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRUE = torch.tensor([[2.0, -1.0, 0, 0, 0, 0], [0, 0, 1.5, 0, 0, 0.5]], dtype=torch.float64)
K = torch.bernoulli(torch.sigmoid(TRUE @ X.T), generator=torch.Generator().manual_seed(1))


def sparse_logistic(k: Tensor) -> None:
    with pyro.plate("data", len(k)):
        w = pyro.sample("w", dist.Laplace(0.0, 0.25).expand([6]).to_event(1))
        pyro.sample("k", dist.Bernoulli(logits=w @ X.T.to(w)).to_event(1), obs=k)


def shifted_poisson(k: Tensor) -> None:
    """An intercept without a penalty, and weights that are drawn to a loc that is not 0."""
    with pyro.plate("data", len(k)):
        w = pyro.sample("w", dist.Laplace(0.3, 0.25).expand([6]).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("k", dist.Poisson((0.3 * w @ X.T.to(w) + z[..., None]).exp()).to_event(1), obs=k)


def problem_of(model: Callable[..., Any], *args: Tensor) -> ProgramProblem:
    program = Program(model, args, {})
    names = laplace_sites(program)
    layout = penalty_layout(program, names)
    penalties = Penalties.read(program, names, layout, {site.name: site.fn for site in program.latents})
    return ProgramProblem(program, layout, shift=penalties.shift, rate=penalties.rate, skip=names)


def test_sparse_logistic_regression_against_scikit_learn() -> None:
    found = FISTA(1e-9).solve(problem_of(sparse_logistic, K), torch.zeros(2, 6))
    assert bool(found.converged.all())
    assert bool(found.gap.isnan().all())
    for row in range(2):
        peer = LogisticRegression(
            l1_ratio=1.0, C=0.25, solver="saga", fit_intercept=False, tol=1e-10, max_iter=100_000
        ).fit(X.numpy(), K[row].numpy())
        assert torch.allclose(found.x[row], torch.as_tensor(peer.coef_[0]), atol=1e-6)
        assert torch.equal(found.x[row] == 0, torch.as_tensor(peer.coef_[0]) == 0)
        assert 0 < int((found.x[row] == 0).sum()) < 6


def test_a_program_against_scipy() -> None:
    """w - loc = p - m with p, m >= 0 makes it smooth; an unpenalised latent stands beside."""
    counts = torch.poisson(torch.full((2, 40), 2.0), generator=torch.Generator().manual_seed(2))
    problem = problem_of(shifted_poisson, counts)
    found = FISTA(1e-9, 50_000).solve(problem, torch.zeros(2, 7))
    assert bool(found.converged.all())
    for row in range(2):

        def loss(u: Any, row: int = row) -> tuple[float, Any]:
            point = torch.as_tensor(u)
            x = torch.zeros(2, 7)
            x[row] = torch.cat([point[:6] - point[6:12], point[12:]])
            value, gradient = problem.smooth(x)
            g = torch.cat([gradient[row, :6] + 4.0, 4.0 - gradient[row, :6], gradient[row, 6:]])
            return float(value[row] + 4.0 * point[:12].sum()), g.numpy()

        peer = minimize(
            loss,
            torch.zeros(13).numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * 12 + [(None, None)],
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
        )
        assert float(problem.objective(found.x)[row]) == pytest.approx(peer.fun, abs=1e-7)
        expected = torch.as_tensor(peer.x[:6] - peer.x[6:12])
        assert torch.allclose(found.x[row, :6], expected, atol=1e-4)
    assert 0 < int((found.x[:, :6] == 0).sum()) < 12


def test_programs_in_single_precision_converge_too() -> None:
    torch.set_default_dtype(torch.float32)
    single = problem_of(sparse_logistic, K.float())
    found = FISTA(1e-9).solve(single, torch.zeros(2, 6))
    assert bool(found.converged.all())
    torch.set_default_dtype(torch.float64)
    answer = FISTA(1e-9).solve(problem_of(sparse_logistic, K), torch.zeros(2, 6))
    assert torch.allclose(found.x.double(), answer.x, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_programs_from_their_own_answer(dtype: torch.dtype) -> None:
    """No slope at the start: nothing to be relative to, and f cannot tell its own differences."""
    torch.set_default_dtype(dtype)

    def model(k: Tensor) -> None:
        with pyro.plate("data", len(k)):
            w = pyro.sample("w", dist.Normal(0.0, 0.5).expand([6]).to_event(1))
            pyro.sample("k", dist.Bernoulli(logits=w @ X.T.to(w)).to_event(1), obs=k)

    problem = problem_of(model, K.to(dtype))
    first = FISTA(max_iterations=500).solve(problem, torch.zeros(2, 6))
    again = FISTA(max_iterations=500).solve(problem, first.x)
    assert bool(first.converged.all())
    assert bool(again.converged.all())
    assert bool((again.num_iterations <= 20).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_goal_of_a_program(dtype: torch.dtype) -> None:
    """Relative to rates and to the slope at the start, and not below what the dtype can tell."""
    torch.set_default_dtype(dtype)
    eps = 32 * torch.finfo(dtype).eps
    problem = problem_of(sparse_logistic, K.to(dtype))
    start = torch.zeros(2, 6)
    value, gradient = problem.smooth(start)
    slope = gradient.abs().amax(-1)
    assert bool((slope > 4).all())
    assert torch.allclose(FISTA(0.01).goal(problem, start), 0.01 * slope)
    answer = FISTA(1e-9).solve(problem, start).x
    # Where the slope is that of the rates, they are what it is relative to.
    assert torch.allclose(FISTA(0.01).goal(problem, answer), torch.tensor(0.04), rtol=0.01)
    assert torch.allclose(FISTA(1e-30).goal(problem, start), eps * torch.maximum(slope, value))
    problem.rate = torch.full((6,), 1000.0)
    assert torch.allclose(FISTA(1e-30).goal(problem, start), torch.tensor(eps * 1000))
    problem.rate = torch.zeros(6)
    smooth = LBFGS().solve(problem, start).x
    assert torch.allclose(FISTA(0.01).goal(problem, smooth), torch.tensor(0.01))


def test_slopes_far_below_the_rounding_of_f_are_reached() -> None:
    """Differences of f of that size are rounding; those of its gradient are not."""
    found = FISTA(1e-13, 2_000).solve(problem_of(sparse_logistic, K), torch.zeros(2, 6))
    assert bool(found.converged.all())
    assert bool((found.slope < 1e-11).all())


def test_iterations_that_do_not_suffice_for_a_program() -> None:
    problem = problem_of(sparse_logistic, K)
    found = FISTA(1e-9, 2).solve(problem, torch.zeros(2, 6))
    assert not bool(found.converged.any())
    assert found.num_iterations.tolist() == [2, 2]
    assert torch.allclose(found.slope, problem.slope(found.x, problem.smooth(found.x)[1]))


def test_what_has_no_slope_is_told() -> None:
    def cliff(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)
            # Its value jumps where its gradient tells nothing.
            pyro.factor("cliff", -1e3 * (h > 0).double())

    problem = problem_of(cliff, torch.tensor([3.0]))
    with pytest.raises(SolverError, match="smooth beside the sparse prior, but row 0 does not rise"):
        FISTA().solve(problem, torch.zeros(1, 1))


# --------------------------------------------------------------------------- the door


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_settings(solver: type[Proximal], value: Any) -> None:
    with pytest.raises(ValueError, match=rf"check_every of at least 1, but got {value!r}"):
        solver(check_every=value)
    with pytest.raises(ValueError, match=rf"max_iterations of at least 1, but got {value!r}"):
        solver(max_iterations=value)
    with pytest.raises(ValueError, match="tolerance above 0, but got -1"):
        solver(tolerance=-1)


def test_spectral_steps_refuse_what_is_not_quadratic() -> None:
    with pytest.raises(SolverError, match=r"quadratic beside its sparse prior for SpaRSA, .* Use FISTA\(\)\."):
        SpaRSA().solve(problem_of(sparse_logistic, K), torch.zeros(2, 6))
