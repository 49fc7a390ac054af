"""Factor analysis and probabilistic PCA: exact posterior, M-step, closed-form solution, scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn import decomposition
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, log_evidence
from pyro_ext.evaluators import choose_evaluator
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import FactorAnalysis, ProbabilisticPCA
from tests.models.stationarity import assert_maximum, assert_zero_gradient

pytestmark = pytest.mark.usefixtures("float64")
Build = Callable[..., FactorAnalysis]
both = pytest.mark.parametrize("build", [FactorAnalysis, ProbabilisticPCA])


def covariance(model: FactorAnalysis) -> Tensor:
    return model.W @ model.W.T + model.variance * torch.eye(model.num_visible)


def marginal(model: FactorAnalysis, v: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(model.mean, covariance(model)).log_prob(v)


def exact_em(model: FactorAnalysis) -> EM:
    return EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())


@both
def test_one_sweep_is_the_exact_posterior(build: Build) -> None:
    model = build(5, 2)
    v = model.dream(30).detach() + 10
    em = exact_em(model)
    result = em.e_half(em.call(v))
    torch.testing.assert_close(result.bound, marginal(model, v), rtol=1e-10, atol=1e-10)
    precision = torch.eye(2) + model.W.T @ (model.W / model.variance.expand(5).unsqueeze(-1))
    root = em.guide.posterior(v)["h"].distribution
    torch.testing.assert_close(root.precision_matrix[0], precision, rtol=1e-9, atol=1e-9)
    evidence = log_evidence(model, em.guide, v)
    assert evidence.exact
    torch.testing.assert_close(evidence.log_evidence, marginal(model, v), rtol=1e-10, atol=1e-10)


@both
def test_the_m_step_is_a_maximum(build: Build) -> None:
    model = build(4, 2)
    v = torch.randn(40, 4) @ torch.randn(4, 4) + 3
    em = exact_em(model)
    call = em.call(v)
    result = em.e_half(call)
    em.m_half(call, result)
    params = call.parameters(result)

    def objective() -> Tensor:
        return choose_evaluator(call.program, call.blocks, create_graph=True).bound(params).sum()

    assert_maximum(model, objective)
    assert_zero_gradient(model, objective, scale=40)


@both
def test_statistics_add_up(build: Build) -> None:
    model = build(4, 2)
    v = torch.randn(20, 4)
    model.initialize(v)
    em = exact_em(model)
    whole, halves = (
        [model.statistics({"v": part}, em.infer(part)) for part in parts] for parts in ([v], [v[:7], v[7:]])
    )
    for name, value in whole[0].items():
        torch.testing.assert_close(value, halves[0][name] + halves[1][name], rtol=1e-12, atol=1e-12)


def test_probabilistic_pca_reaches_the_closed_form() -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    v = torch.randn(200, 6) * torch.tensor([3.0, 2.5, 0.5, 0.4, 0.3, 0.2]) @ rotation + 5
    model = ProbabilisticPCA(6, 2)
    history = exact_em(model).run(v, max_steps=5000, tolerance=1e-15, progress=False)
    assert history.status == "converged"
    x = v - v.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(v))
    noise = values[:-2].mean()
    leading = vectors[:, -2:]
    optimum = leading @ torch.diag(values[-2:] - noise) @ leading.T + noise * torch.eye(6)
    torch.testing.assert_close(model.mean, v.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.variance, noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance(model), optimum, rtol=1e-6, atol=1e-6)


def test_factor_analysis_reaches_scikit_learns_likelihood() -> None:
    truth = FactorAnalysis(8, 2)
    v = truth.dream(500)
    peer = decomposition.FactorAnalysis(2, tol=1e-12, max_iter=20000, svd_method="lapack").fit(v.numpy())
    model = FactorAnalysis(8, 2)
    exact_em(model).run(v, max_steps=5000, tolerance=1e-13, progress=False)
    ours = marginal(model, v).mean().item()
    assert ours == pytest.approx(float(peer.score(v.numpy())), rel=1e-8)


def test_no_coupling_where_columns_are_orthogonal() -> None:
    # Figure 19.1: orthogonal columns leave the posterior factorised, and mean field is exact.
    model = ProbabilisticPCA(5, 3)
    with torch.no_grad():
        model.W = torch.linalg.qr(torch.randn(5, 3)).Q * torch.tensor([2.0, 1.0, 0.5])
    v = torch.randn(20, 5)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    assert em.evaluate_loss(v) != 0
    bound = em.e_half(em.call(v)).bound
    torch.testing.assert_close(bound, marginal(model, v), rtol=1e-9, atol=1e-9)


def test_bad_settings_and_a_heywood_case() -> None:
    with pytest.raises(ValueError, match="variance_floor >= 0, but got -1"):
        FactorAnalysis(4, 2, variance_floor=-1)
    with pytest.raises(ValueError, match="num_factors"):
        FactorAnalysis(4, 0)
    model = FactorAnalysis(2, 1, variance_floor=0)
    v = torch.randn(10, 2)
    v[:, 1] = 0
    with pytest.raises(ValueError, match="every column to vary"):
        model.initialize(v)
    before = model.W.clone()
    flat = {"count": torch.tensor(10.0), "sum": torch.zeros(1), "cross": torch.zeros(1, 2), "gram": torch.ones(1, 1)}
    with pytest.raises(RuntimeError, match="positive noise variance"):
        model.maximize({**flat, "total": torch.zeros(2), "square": torch.zeros(2)})
    assert torch.equal(model.W, before)
