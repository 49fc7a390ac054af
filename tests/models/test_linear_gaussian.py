"""The linear-Gaussian model: the chapter's example (19.57)-(19.67), its M-step, and the found form by any optimizer."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import ExponentialLR
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, MeanChange, log_evidence
from pyro_ext.choose import choose_evaluator
from pyro_ext.evaluators import Evaluator
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import LinearGaussian, assign_parameters, read_parameter
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import program_log_joint

pytestmark = pytest.mark.usefixtures("float64")
priors = pytest.mark.parametrize("learn_prior", [False, True])
W = torch.tensor([[1.3, -0.8]], dtype=torch.float64)


def example() -> LinearGaussian:
    """(19.57): two latents, one visible variable."""
    model = LinearGaussian(num_visible=1, num_latents=2)
    assign_parameters(model, {"W": W})
    return model


def random_model(num_visible: int = 3, num_latents: int = 2, **kwargs: bool) -> LinearGaussian:
    model = LinearGaussian(num_visible, num_latents, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


def moments(model: LinearGaussian) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and covariance of the prior, those of v."""
    prior = model.prior_tril @ model.prior_tril.T
    noise = model.noise_tril @ model.noise_tril.T
    return model.prior_mean, prior, model.W @ model.prior_mean + model.bias, model.W @ prior @ model.W.T + noise


def posterior(model: LinearGaussian, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, K) and covariance (K, K) by conditioning the joint Gaussian: no precision of h is formed."""
    mean, prior, loc, covariance = moments(model)
    gain = torch.linalg.solve(covariance, model.W @ prior).T
    return mean + (v - loc) @ gain.T, prior - gain @ model.W @ prior


def marginal(model: LinearGaussian, v: Tensor) -> Tensor:
    _, _, loc, covariance = moments(model)
    return torch.distributions.MultivariateNormal(loc, covariance).log_prob(v)


def mean_field(model: LinearGaussian, v: Tensor, max_sweeps: int = 500) -> tuple[Tensor, Tensor]:
    e_step = FixedPoint(criterion=MeanChange(1e-13), max_sweeps=max_sweeps)
    fn = EM(model, MeanField(model), e_step=e_step, m_step=None).infer(v)["h"].distribution
    return fn.mean, fn.variance


def test_the_defaults_are_the_chapters_example() -> None:
    model, v = example(), torch.randn(6, 1)
    h = torch.randn(4, 1, 2)
    by_hand = -0.5 * (h.square().sum(-1) + (v.T - (h * W).sum(-1)).square() + 3 * math.log(2 * math.pi))
    torch.testing.assert_close(program_log_joint(model, {"h": h}, v), by_hand, rtol=1e-12, atol=1e-12)
    assert set(model._pyro_params) == {"W", "bias", "noise_tril"}


def test_mean_field_is_the_solution_of_19_67() -> None:
    model, v = example(), 3 * torch.randn(7, 1)
    mean, variance = mean_field(model, v)
    # By hand from (19.67): precision 1 + w_i^2, mean_i = w_i (v - w_j mean_j) / (1 + w_i^2), solved for both means.
    w1, w2 = W[0]
    system = torch.stack([torch.stack([1 + w1**2, w1 * w2]), torch.stack([w1 * w2, 1 + w2**2])])
    torch.testing.assert_close(mean, torch.linalg.solve(system, (v * W).T).T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(1 / variance, (1 + W.square()).expand(7, 2), rtol=1e-10, atol=1e-10)


def test_mean_field_is_too_sure_and_the_structured_guide_is_exact() -> None:
    model, v = example(), 3 * torch.randn(7, 1)
    mean, covariance = posterior(model, v)
    field_mean, field_variance = mean_field(model, v)
    torch.testing.assert_close(field_mean, mean, rtol=1e-10, atol=1e-10)
    assert (field_variance < 0.8 * covariance.diagonal()).all()
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=None)
    result = em.e_half(em.call(v))
    fn = result.posterior["h"].distribution
    torch.testing.assert_close(fn.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fn.covariance_matrix, covariance.expand(7, 2, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.bound, marginal(model, v), rtol=1e-10, atol=1e-10)


@priors
def test_the_solutions_hold_for_any_prior_and_noise(learn_prior: bool) -> None:
    model, v = random_model(learn_prior=learn_prior), 2 * torch.randn(7, 3)
    mean, covariance = posterior(model, v)
    field_mean, field_variance = mean_field(model, v, max_sweeps=5000)
    torch.testing.assert_close(field_mean, mean, rtol=1e-9, atol=1e-9)
    precision = torch.linalg.inv(covariance).diagonal()
    torch.testing.assert_close(1 / field_variance, precision.expand(7, 2), rtol=1e-9, atol=1e-9)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=None)
    em.e_half(em.call(v))
    evidence = log_evidence(model, em.guide, v)
    assert evidence.exact
    torch.testing.assert_close(evidence.log_evidence, marginal(model, v), rtol=1e-10, atol=1e-10)


def found(guide: MeanField, v: Tensor) -> tuple[Tensor, Tensor]:
    fn = guide.posterior(v)["h"].distribution
    return fn.mean.detach(), fn.variance.detach()


def test_the_form_optimised_by_gradient_steps() -> None:
    model, v = example(), 3 * torch.randn(7, 1)
    mean, variance = mean_field(model, v)
    guide = MeanField(model)
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8})
    em = EM(model, guide, e_step=Gradient(optim, num_steps=50), m_step=None)
    for _ in range(40):
        em.step(v)
        optim.step()
    for one, other in zip(found(guide, v), (mean, variance), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_form_optimised_by_quasi_newton_steps() -> None:
    model, v = example(), 3 * torch.randn(7, 1)
    mean, variance = mean_field(model, v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    call = em.call(v)
    evaluator: Evaluator = choose_evaluator(call.program, call.blocks)
    params = {"h": torch.randn(7, 1, 4).requires_grad_()}
    optim = torch.optim.LBFGS(
        [params["h"]],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = -evaluator.bound(params).sum()
        loss.backward()
        return loss

    optim.step(closure)
    torch.testing.assert_close(params["h"][:, 0, :2].detach(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((2 * params["h"][:, 0, 2:]).exp().detach(), variance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_form_optimised_by_svi(loss: type[ELBO]) -> None:
    model, v = example(), 3 * torch.randn(7, 1)
    mean, variance = mean_field(model, v)
    guide = MeanField(model)
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.993})
    elbo = loss(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(pyro.poutine.block(model, hide_types=["param"]), guide, optim, loss=elbo)
    for _ in range(800):
        svi.step(v)
        optim.step()
    for one, other in zip(found(guide, v), (mean, variance), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


@priors
def test_the_m_step_is_a_maximum(learn_prior: bool) -> None:
    model = random_model(learn_prior=learn_prior)
    v = torch.randn(40, 3) @ torch.randn(3, 3) + 5
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    call = em.call(v)
    result = em.e_half(call)
    em.m_half(call, result)
    params = call.parameters(result)

    def objective() -> Tensor:
        return choose_evaluator(call.program, call.blocks, create_graph=True).bound(params).sum()

    assert_maximum(model, objective)
    assert_zero_gradient(model, objective, scale=40)
    if not learn_prior:
        assert torch.equal(model.prior_mean, torch.zeros(2))
        assert torch.equal(model.prior_tril, torch.eye(2))


@priors
def test_exact_em_reaches_the_moments_of_the_data(learn_prior: bool) -> None:
    v = torch.randn(60, 3) @ torch.randn(3, 3) + 5
    model = LinearGaussian(3, 2, learn_prior=learn_prior)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    losses = torch.tensor(em.run(v, max_steps=300, tolerance=1e-14, progress=False).loss)
    assert (losses.diff() <= 1e-10).all()
    # With any noise covariance the model can be any Gaussian: its maximum is the data's own.
    _, _, loc, covariance = moments(model)
    x = v - v.mean(0)
    torch.testing.assert_close(loc, v.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(covariance, x.T @ x / 60, rtol=1e-6, atol=1e-6)


def test_statistics_add_up() -> None:
    model, v = random_model(), torch.randn(20, 3)
    model.initialize(v)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=None)
    whole, *parts = [model.statistics({"v": part}, em.infer(part)) for part in (v, v[:7], v[7:])]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts), rtol=1e-12, atol=1e-12)


def test_the_floor_bounds_the_noise_in_every_direction() -> None:
    v = torch.randn(50, 1) @ torch.randn(1, 3)
    model = LinearGaussian(3, 2, variance_floor=1e-3)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    losses = torch.tensor(em.run(v, max_steps=20, tolerance=0, progress=False).loss)
    assert (losses.diff() <= 1e-10).all()
    tril = read_parameter(model, "noise_tril")
    values = torch.linalg.eigvalsh(tril @ tril.T)
    torch.testing.assert_close(values[0], torch.tensor(1e-3), rtol=1e-9, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Expected num_latents >= 1, but got 0"):
        LinearGaussian(1, 0)
    with pytest.raises(ValueError, match="Expected variance_floor >= 0, but got -1. Pass 0 for no floor."):
        LinearGaussian(1, 2, variance_floor=-1)
    model = LinearGaussian(2, 1, variance_floor=0, learn_prior=True)
    before = [p.clone() for p in model.parameters()]
    v = torch.randn(10, 2)
    v[:, 1] = 0
    with pytest.raises(ValueError, match="Expected every column to vary, but got a constant one"):
        model.initialize(v)
    with pytest.raises(ValueError, match="Expected statistics with count, sum, gram, cross, total, scatter, but got"):
        model.maximize({"count": torch.tensor(1.0)})
    flat = {"count": torch.tensor(10.0), "sum": torch.zeros(1), "cross": torch.zeros(1, 2), "gram": torch.ones(1, 1)}
    no_noise = {**flat, "total": torch.zeros(2), "scatter": torch.diag(torch.tensor([1.0, 0.0]))}
    with pytest.raises(
        RuntimeError, match=r"positive variance of the noise .* but got 0\. Pass a larger variance_floor"
    ):
        model.maximize(no_noise)
    points = {**no_noise, "sum": torch.tensor([1.0]), "gram": torch.tensor([[0.1]])}
    with pytest.raises(RuntimeError, match=r"positive variance of the latents .* Use a guide that is no point mass"):
        model.maximize(points)
    assert all(map(torch.equal, before, model.parameters()))
