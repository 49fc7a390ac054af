"""All solvers of Laplace + quadratic problems come to one answer on real patches, and to scikit-learn's."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from benchmarks.patches import draw_patches, load_images, whiten
from pyro_ext import FISTA, CoordinateDescent, FeatureSign, InTurn, SpaRSA
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import Solver

SOLVERS: list[Solver] = [
    FeatureSign(tolerance=1e-10),
    CoordinateDescent(tolerance=1e-10),
    FISTA(tolerance=1e-10, max_iterations=100_000),
    InTurn(SpaRSA(tolerance=1e-10, max_iterations=30), FeatureSign(tolerance=1e-10)),
]


def patches(side: int, num: int, seed: int = 0) -> Tensor:
    images = [whiten(image) for image in load_images()]
    return draw_patches(images, side, num, seed=seed).double()


def unit_atoms(W: Tensor) -> Tensor:
    return W / W.norm(dim=0)


def learned_like(v: Tensor) -> Tensor:
    """Real patches as atoms, twice as many as pixels."""
    return unit_atoms(patches(8, 128, seed=1).T)


def overcomplete(v: Tensor) -> Tensor:
    """Four times as many atoms as pixels."""
    return unit_atoms(patches(8, 256, seed=2).T)


def ill_conditioned(v: Tensor) -> Tensor:
    """As many atoms as pixels, with singular values down to 1e-4 of the largest."""
    torch.manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    return 10 * left @ torch.diag(torch.logspace(0, -4, 64, dtype=torch.float64)) @ right


def lasso(v: Tensor, W: Tensor, rate: float, beta: float = 1.0) -> PenalizedQuadratic:
    return PenalizedQuadratic(beta * W.T @ W, beta * v @ W, torch.full((W.shape[1],), rate, dtype=v.dtype))


def objective(v: Tensor, W: Tensor, h: Tensor, rate: float) -> Tensor:
    return 0.5 * (v - h @ W.T).square().sum(-1) + rate * h.abs().sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("dictionary", [learned_like, overcomplete, ill_conditioned])
def test_all_reach_one_objective_on_a_thousand_real_patches(dictionary):
    """Relative differences below 1e-8, row by row, in float64; each row's gap bounds how far it is from the best."""
    v = patches(8, 1000)
    W, rate = dictionary(v), 0.5
    problem = lasso(v, W, rate)
    start = torch.zeros(len(v), W.shape[1], dtype=v.dtype)
    ends = [solver.solve(problem, start) for solver in SOLVERS]
    values = torch.stack([objective(v, W, end.x, rate) for end in ends])
    best = values.amin(0)
    assert ((values - best) / best).max() < 1e-8
    for value, end in zip(values, ends, strict=True):
        assert end.converged.all()
        assert (end.gap <= 1e-10 * problem.energy / 2).all()
        assert (value - best <= end.gap + 1e-12 * best).all()
    # There is something to agree on.
    assert 0.02 < float((ends[0].x != 0).double().mean()) < 0.9
    assert (best < objective(v, W, start, rate)).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_codes_are_zero_from_the_largest_correlation_on(solver):
    """rate >= beta max |W'v|: zero, and certified; just below it is not."""
    v, beta = patches(8, 50), 3.0
    W = learned_like(v)
    edge = float((beta * v @ W).abs().max())
    start = torch.zeros(50, 128, dtype=v.dtype)
    above = solver.solve(lasso(v, W, edge, beta), start)
    assert (above.x == 0).all()
    assert (above.gap == 0).all()
    below = solver.solve(lasso(v, W, 0.99 * edge, beta), start)
    assert int((below.x != 0).any(-1).sum()) >= 1


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_as_scikit_learn(solver):
    """The codes of lasso_lars and of lasso_cd at a tiny tolerance, on patches coded in twice as many atoms."""
    v = patches(8, 60, seed=4)
    W, rate = learned_like(v), 0.7
    found = solver.solve(lasso(v, W, rate), torch.zeros(60, 128, dtype=v.dtype))
    value = objective(v, W, found.x, rate)
    lars = sparse_encode(v.numpy(), W.T.numpy(), algorithm="lasso_lars", alpha=rate, max_iter=10_000)
    with warnings.catch_warnings():
        # It asks for more than rounding allows; the objective tells.
        warnings.simplefilter("ignore", ConvergenceWarning)
        descent = sparse_encode(v.numpy(), W.T.numpy(), algorithm="lasso_cd", alpha=rate, max_iter=100_000)
    for codes in (lars, descent):
        theirs = objective(v, W, torch.from_numpy(codes), rate)
        torch.testing.assert_close(value, theirs, rtol=1e-7, atol=0)
        assert (value <= theirs + 1e-9).all()
    torch.testing.assert_close(found.x, torch.from_numpy(lars), rtol=0, atol=1e-4)
