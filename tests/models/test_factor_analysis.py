"""Factor analysis and probabilistic PCA: exact posterior, M-step, closed-form solution, scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn import datasets, decomposition
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, Status, log_evidence
from pyro_ext.choose import choose_evaluator
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


def test_factor_analysis_of_the_wine_data_reaches_scikit_learns_likelihood() -> None:
    rows = datasets.load_wine().data
    rows = (rows - rows.mean(0)) / rows.std(0)
    peer = decomposition.FactorAnalysis(2, tol=1e-13, max_iter=20000, svd_method="lapack").fit(rows)
    v = torch.from_numpy(rows)
    model = FactorAnalysis(13, 2)
    torch.manual_seed(0)
    model.initialize(v)
    history = exact_em(model).run(v, max_steps=200, tolerance=1e-9, progress=False)
    # Another start may end in another local maximum, near a noise variance of 0. From this one EM takes 122 steps.
    assert history.status is Status.CONVERGED
    assert -history.loss[-1] == pytest.approx(float(peer.score(rows)), rel=1e-6)
    assert model.maximize_evidence(v) == pytest.approx(float(peer.score(rows)), rel=1e-8)


def same_start(build: Build, v: Tensor, **settings: float) -> FactorAnalysis:
    torch.manual_seed(5)
    model = build(v.shape[1], 2, **settings)
    model.initialize(v)
    return model


@both
def test_steps_on_the_evidence_never_lower_it(build: Build) -> None:
    v = build(8, 2).dream(60) @ torch.diag(torch.tensor([0.1, 1.0, 1.0, 2.0, 5.0, 1.0, 0.3, 1.0])) - 4
    values = [same_start(build, v).maximize_evidence(v, max_steps=steps, tolerance=0) for steps in range(1, 30)]
    gains = torch.tensor(values).diff()
    assert (gains > -1e-12).all()
    assert (gains[:5] > 1e-9).all()
    assert values[0] > marginal(same_start(build, v), v).mean()


@both
def test_the_evidence_is_that_of_the_gaussian_and_stationary(build: Build) -> None:
    v = build(6, 2).dream(400) + 3
    model = same_start(build, v)
    value = model.maximize_evidence(v, max_steps=20_000, tolerance=1e-15)
    assert value == pytest.approx(marginal(model, v).mean().item(), abs=1e-10)
    W, variance = (parameter.detach().clone().requires_grad_() for parameter in (model.W, model.variance))
    assert (variance > 1e-3).all()
    mean = model.mean.detach().requires_grad_()
    noise = variance * torch.eye(6)
    density = torch.distributions.MultivariateNormal(mean, W @ W.T + noise).log_prob(v).mean()
    for gradient in torch.autograd.grad(density, (mean, W, variance)):
        assert gradient.abs().max() < 1e-6
    # The present loadings and mean play no part: only the noise is a start.
    one = same_start(build, v)
    other = same_start(build, v)
    with torch.no_grad():
        other.W, other.mean = torch.randn(6, 2), torch.randn(6)
    assert one.maximize_evidence(v, max_steps=1) == other.maximize_evidence(v, max_steps=1)


def test_the_evidence_reaches_scikit_learns() -> None:
    v = FactorAnalysis(8, 2).dream(500)
    peer = decomposition.FactorAnalysis(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(v.numpy())
    ours = same_start(FactorAnalysis, v).maximize_evidence(v, max_steps=20_000, tolerance=1e-15)
    assert ours == pytest.approx(float(peer.score(v.numpy())), rel=1e-8)


def test_the_evidence_of_probabilistic_pca_reaches_the_closed_form() -> None:
    v = ProbabilisticPCA(6, 2).dream(200) * 3 + 5
    model = same_start(ProbabilisticPCA, v)
    value = model.maximize_evidence(v, tolerance=1e-16)
    x = v - v.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(v))
    noise, leading = values[:-2].mean(), vectors[:, -2:]
    optimum = leading @ torch.diag(values[-2:] - noise) @ leading.T + noise * torch.eye(6)
    torch.testing.assert_close(model.variance, noise, rtol=1e-7, atol=0)
    torch.testing.assert_close(covariance(model), optimum, rtol=1e-7, atol=1e-9)
    peer = torch.distributions.MultivariateNormal(v.mean(0), optimum).log_prob(v).mean().item()
    assert value == pytest.approx(peer, abs=1e-10)


@both
def test_condensed_data_have_the_same_evidence(build: Build) -> None:
    v = build(5, 2).dream(300) + 10
    whole, few = same_start(build, v), same_start(build, v)
    value = whole.maximize_evidence(v, max_steps=10, tolerance=0)
    assert few.maximize_evidence(few.condense(v)[0], max_steps=10, tolerance=0) == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(covariance(few), covariance(whole), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(few.mean, whole.mean, rtol=1e-12, atol=1e-12)


@both
def test_em_stops_where_the_evidence_is_at_its_maximum(build: Build) -> None:
    v = build(6, 2).dream(300)
    model = build(6, 2)
    value = model.maximize_evidence(v, max_steps=20_000, tolerance=1e-15)
    history = exact_em(model).run(v, progress=False)
    assert history.status == "converged"
    assert history.steps <= 3
    assert history.ledger[-1].bound_per_row - value == pytest.approx(0, abs=1e-9)
    assert history.ledger[0].bound_per_row == pytest.approx(value, abs=1e-10)


@both
@pytest.mark.parametrize("num_factors", [1, 4, 6])
def test_as_many_factors_as_columns_or_more_give_the_data_their_own_covariance(build: Build, num_factors: int) -> None:
    v = torch.randn(50, 4) @ torch.randn(4, 4) + 1
    model = build(4, num_factors)
    model.initialize(v)
    value = model.maximize_evidence(v, max_steps=5000, tolerance=1e-14)
    assert model.W.shape == (4, num_factors)
    assert value == pytest.approx(marginal(model, v).mean().item(), abs=1e-9)
    if num_factors >= 4:
        S = (v - v.mean(0)).T @ (v - v.mean(0)) / len(v)
        assert value == pytest.approx(
            torch.distributions.MultivariateNormal(v.mean(0), S).log_prob(v).mean().item(), abs=1e-9
        )


def test_factors_that_explain_nothing_are_left_out() -> None:
    x = torch.randn(300, 4)
    x = x - x.mean(0)
    # White data: the sphere is the best.
    v = 2 * x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 300)).T
    model = same_start(ProbabilisticPCA, v)
    value = model.maximize_evidence(v, max_steps=2000, tolerance=1e-15)
    assert value == pytest.approx(torch.distributions.Normal(0.0, 2.0).log_prob(v).sum(-1).mean().item(), abs=1e-9)


def test_refusals_of_the_evidence_change_nothing() -> None:
    model = FactorAnalysis(3, 1, variance_floor=0)
    v = torch.randn(20, 3)
    flat, hole = v.clone(), v.clone()
    flat[:, 2], hole[4, 1] = 7.0, torch.nan
    # Two columns of the same values: one factor explains both without error.
    twins = torch.stack([v[:, 0], v[:, 0], v[:, 1]], -1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refusals: list[tuple[Tensor, dict[str, float], type[Exception], str]] = [
        (v, {"tolerance": -1e-9}, ValueError, "Expected a tolerance of at least 0, but got -1e-09"),
        (v, {"tolerance": math.nan}, ValueError, "Expected a tolerance of at least 0, but got nan"),
        (v, {"max_steps": 0}, ValueError, "Expected max_steps >= 1, but got 0"),
        (v, {"max_steps": 2.5}, TypeError, "max_steps"),
        (flat, {}, ValueError, "Expected every column to vary, but got a constant one, column 2"),
        (hole, {}, ValueError, r"1 NaN or infinite, the first at \(4, 1\)"),
        (v[:, :2], {}, ValueError, r"Expected v of shape \(N, 3\), but got \(20, 2\)"),
        (twins, {"max_steps": 100_000, "tolerance": 0}, RuntimeError, "Expected a positive noise variance"),
    ]
    for data, settings, error, match in refusals:
        with pytest.raises(error, match=match):
            model.maximize_evidence(data, **settings)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
    count = {"count": torch.tensor(10.0), "observed": torch.tensor(10.0)}
    flat = {**count, "sum": torch.zeros(1), "cross": torch.zeros(1, 2), "gram": torch.ones(1, 1)}
    with pytest.raises(RuntimeError, match="positive noise variance"):
        model.maximize({**flat, "total": torch.zeros(2), "square": torch.zeros(2)})
    assert torch.equal(model.W, before)
