"""Noisy: a Gaussian around MAP points has a bound again (19.3)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor, nn

from pyro_ext import EM, Gradient, Maximize, Status, elbo_terms, log_evidence
from pyro_ext.guides import Amortized, Dirac, MeanField, PointEncoder
from pyro_ext.guides.noisy import Noisy

pytestmark = pytest.mark.usefixtures("float64")

W = [[1.0, 0.5], [0.0, -1.0], [2.0, 0.3]]
ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def gaussian(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.3, 1.2).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.tensor(W).mT, 0.7).to_event(1), obs=v)


def laplace(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.8))
        pyro.sample("v", dist.Normal(1.5 * h, 0.7), obs=v)


def positive(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        s = pyro.sample("s", dist.Gamma(3.0, 2.0))
        pyro.sample("v", dist.Normal(0.0, s), obs=v)


def code(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(1.0))
        pyro.sample("v", dist.Normal(h, 0.5), obs=v)


def solved(model: Any, v: Tensor) -> Dirac:
    guide = Dirac(model)
    EM(model, guide, e_step=Maximize(), m_step=None).step(v)
    return guide


def everything() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def folded(mean: Tensor, scale: float) -> Tensor:
    """E|h| of h ~ N(mean, scale^2)."""
    z = mean / scale
    return scale * math.sqrt(2 / math.pi) * (-0.5 * z * z).exp() + mean * torch.erf(z / math.sqrt(2))


def laplace_bound(v: Tensor, mean: Tensor, scale: float) -> Tensor:
    prior = -math.log(2 * 0.8) - folded(mean, scale) / 0.8
    square = (v - 1.5 * mean).square() + (1.5 * scale) ** 2
    return prior - math.log(0.7) - 0.5 * math.log(2 * math.pi) - square / (2 * 0.49) + math.log(scale) + ENTROPY


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize("scale", [0.1, {"h": 0.4}, {"h": torch.tensor([0.2, 0.6], dtype=torch.float64)}])
def test_the_bound_of_a_gaussian_model_is_the_closed_form(scale: Any) -> None:
    v = torch.randn(5, 3)
    guide = solved(gaussian, v)
    terms = elbo_terms(gaussian, Noisy(guide, scale), v)
    mean, A = guide.posterior(v)["h"].mean, torch.tensor(W)
    s = torch.as_tensor(scale["h"] if isinstance(scale, dict) else scale).expand(2)
    log_p = dist.Normal(0.3, 1.2).log_prob(mean).sum(-1) + dist.Normal(mean @ A.mT, 0.7).log_prob(v).sum(-1)
    curvature = 1.2**-2 + A.square().sum(0) / 0.49
    wanted = log_p - 0.5 * (curvature * s.square()).sum() + s.log().sum() + 2 * ENTROPY
    assert terms.exact
    torch.testing.assert_close(terms.bound, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(terms.entropy, (s.log().sum() + 2 * ENTROPY).expand(5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0])
def test_the_bound_of_a_sparse_model_has_its_closed_form(scale: float) -> None:
    """Within 5 standard errors, and below log p(v) on a grid."""
    v = torch.tensor([0.0, 0.7, -2.5, 4.0])
    guide = solved(laplace, v)
    noisy = Noisy(guide, scale)
    terms = elbo_terms(laplace, noisy, v, num_samples=4000)
    wanted = laplace_bound(v, guide.posterior(v)["h"].mean, scale)
    assert not terms.exact
    assert bool(((terms.bound - wanted).abs() <= 5 * terms.standard_error + 1e-9).all())
    assert bool((terms.standard_error < 0.1).all())

    grid = torch.linspace(-12, 12, 200_001)
    density = dist.Laplace(0.0, 0.8).log_prob(grid) + dist.Normal(1.5 * grid, 0.7).log_prob(v[:, None])
    log_p = density.logsumexp(-1) + math.log(float(grid[1] - grid[0]))
    assert bool((wanted < log_p).all())
    if scale == 0.3:
        evidence = log_evidence(laplace, noisy, v, num_samples=20_000)
        assert bool(((evidence.log_evidence - log_p).abs() < 5 * evidence.standard_error + 1e-3).all())


def test_the_bound_falls_to_minus_infinity_with_the_spread_by_the_entropy() -> None:
    v = torch.tensor([0.0, 0.7, -2.5])
    guide = solved(laplace, v)
    point = laplace_log_joint(guide, v)
    for scale in (1e-3, 1e-6, 1e-9):
        bound = elbo_terms(laplace, Noisy(guide, scale), v, num_samples=20_000).bound
        torch.testing.assert_close(bound - math.log(scale) - ENTROPY, point, rtol=0, atol=0.03)  # 5 standard errors


def laplace_log_joint(guide: Dirac, v: Tensor) -> Tensor:
    h = guide.posterior(v)["h"].mean
    return dist.Laplace(0.0, 0.8).log_prob(h) + dist.Normal(1.5 * h, 0.7).log_prob(v)


def test_a_positive_latent_is_log_normal_around_its_point() -> None:
    v = torch.tensor([0.5, -2.0, 3.0])
    guide, scale = solved(positive, v), 0.3
    noisy = Noisy(guide, scale)
    s = guide.posterior(v)["s"].mean
    marginal = noisy.posterior(v)["s"]
    torch.testing.assert_close(marginal.mean, s * math.exp(scale**2 / 2), rtol=0, atol=1e-8)
    q = dist.LogNormal(s.log(), scale)
    torch.testing.assert_close(marginal.log_prob(torch.full((3,), 1.3)), q.log_prob(torch.tensor(1.3)))
    torch.testing.assert_close(noisy.posterior(v).entropy(), s.log() + math.log(scale) + ENTROPY, rtol=0, atol=1e-8)
    # E_q log p, term by term: E s = s e^(c/2), E s^-2 = s^-2 e^(2 c), E log s = log s, with c = scale^2.
    c = scale**2
    log_gamma = 3 * math.log(2) - math.lgamma(3) + 2 * s.log() - 2 * s * math.exp(c / 2)
    log_normal = -0.5 * math.log(2 * math.pi) - s.log() - 0.5 * v.square() * s.pow(-2) * math.exp(2 * c)
    wanted = log_gamma + log_normal + s.log() + math.log(scale) + ENTROPY
    terms = elbo_terms(positive, noisy, v, num_samples=4000)
    assert bool(((terms.bound - wanted).abs() <= 5 * terms.standard_error).all())


def test_elbos_of_pyro_agree_with_it() -> None:
    """Trace_ELBO averages the closed form: 5 standard errors of 200 calls."""
    v = torch.tensor([0.0, 0.7, -2.5, 4.0])
    guide = solved(laplace, v)
    noisy = Noisy(guide, 0.3)
    noisy(v)
    before = everything()
    losses = torch.tensor([Trace_ELBO(num_particles=10).loss(laplace, noisy, v) for _ in range(200)])
    wanted = -float(laplace_bound(v, guide.posterior(v)["h"].mean, 0.3).sum())
    assert abs(float(losses.mean()) - wanted) < 5 * float(losses.std()) / math.sqrt(200)
    vectorised = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(laplace, noisy, v)
    assert abs(vectorised - wanted) < 0.2
    assert everything().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in everything().items())


# ---------------------------------------------------------------------- whose guide it is


def test_it_has_the_points_and_the_parameters_of_the_guide() -> None:
    v = torch.randn(5, 3)
    guide = solved(gaussian, v)
    noisy = Noisy(guide, 0.2)
    assert [id(p) for p in noisy.parameters()] == [id(p) for p in guide.parameters()]
    assert not noisy.eval().guide.training
    posterior = noisy.posterior(v)
    assert torch.equal(posterior["h"].mean, guide.posterior(v)["h"].mean)
    assert not posterior.is_point
    assert not noisy.is_point
    fn = posterior["h"].distribution.base_dist
    torch.testing.assert_close(fn.scale, torch.full((5, 2), 0.2), rtol=0, atol=1e-15)
    draws = posterior.sample(2000)["h"] - guide.posterior(v)["h"].mean
    assert float(draws.std()) == pytest.approx(0.2, rel=0.02)
    found = Predictive(poutine.uncondition(gaussian), guide=noisy, num_samples=3)(v)
    assert found["v"].shape == (3, 5, 3)
    assert set(pyro.get_param_store().keys()) == {f"{guide._pyro_name}.tables.h"}
    # Where the points move, so does q.
    with torch.no_grad():
        guide.table(guide.blocks[0]).add_(1.0)
    torch.testing.assert_close(noisy.posterior(v)["h"].mean, posterior["h"].mean + 1, rtol=0, atol=1e-12)


def test_under_svi_the_points_move_to_the_mean_of_the_posterior() -> None:
    """With a spread the optimum of a Gaussian model is the posterior mean, that of a sparse one lies elsewhere."""
    v = torch.tensor([0.9, 3.0])
    guide = solved(laplace, v)
    assert float(guide.posterior(v)["h"].mean[0]) == pytest.approx(0.328, abs=1e-3)
    noisy = Noisy(guide, 0.4)
    svi = SVI(laplace, noisy, SGD({"lr": 0.01}), Trace_ELBO(num_particles=50, vectorize_particles=True))
    for _ in range(150):
        svi.step(v)
    grid = torch.linspace(-1, 3, 4001)
    best = grid[laplace_bound(v[:, None], grid, 0.4).argmax(-1)]
    torch.testing.assert_close(guide.posterior(v)["h"].mean, best, rtol=0, atol=0.03)


def test_a_gradient_e_step_climbs_the_bound_of_its_points() -> None:
    v = torch.randn(5, 3)
    guide = Dirac(gaussian)
    noisy = Noisy(guide, 0.2)
    em = EM(gaussian, noisy, e_step=Gradient(SGD({"lr": 0.05}), num_steps=200), m_step=None)
    em.step(v)
    wanted = solved(gaussian, v).posterior(v)["h"].mean
    torch.testing.assert_close(guide.posterior(v)["h"].mean, wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="Expected the data that the table of 'Dirac.*' was set up with"):
        em.step(v + 1)


def test_a_run_that_went_too_far_restores_the_points() -> None:
    v = torch.randn(5, 3)
    guide = Dirac(gaussian)
    em = EM(gaussian, Noisy(guide, 0.2), e_step=Gradient(SGD({"lr": 1e300}), num_steps=3), m_step=None)
    guide.setup(v)
    before = guide.table(guide.blocks[0]).detach().clone()
    history = em.run(v, max_steps=3, progress=False)
    assert history.status is Status.NON_FINITE
    assert torch.equal(guide.table(guide.blocks[0]), before)


class Shrunk(PointEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.4))

    def forward(self, v: Tensor) -> Tensor:
        return self.a * v


def test_points_of_a_network_serve_any_data() -> None:
    v, new = torch.tensor([0.0, 0.7, -2.5]), torch.tensor([4.0, 1.0])
    guide = Amortized(laplace, encoder=Shrunk())
    noisy = Noisy(guide, 0.3)
    for rows in (v, new):
        terms = elbo_terms(laplace, noisy, rows, num_samples=4000)
        wanted = laplace_bound(rows, 0.4 * rows, 0.3)
        assert bool(((terms.bound - wanted).abs() <= 5 * terms.standard_error).all())
        assert noisy(rows)["h"].shape == rows.shape
        torch.testing.assert_close(noisy.posterior(rows)["h"].mean, 0.4 * rows, rtol=0, atol=1e-12)
    assert noisy.is_static


def chain(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(top, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_points_that_read_other_points_read_their_draws() -> None:
    v = torch.tensor([1.0, -2.0])
    guide = Amortized(chain, encoder={"h": Shrunk(), "top": Shrunk()})
    noisy = Noisy(guide, {"h": 0.2, "top": 0.5})
    posterior = noisy.posterior(v)
    assert not posterior.static
    assert not noisy.is_static
    draws = posterior.sample(20_000)
    h, top = draws["h"], draws["top"]
    torch.testing.assert_close(h.mean(0), 0.4 * v, rtol=0, atol=5 * 0.2 / math.sqrt(20_000))
    rest = top - 0.4 * h
    torch.testing.assert_close(rest.mean(0), torch.zeros(2), rtol=0, atol=5 * 0.5 / math.sqrt(20_000))
    torch.testing.assert_close(rest.std(0), torch.full((2,), 0.5), rtol=0.03, atol=0)
    assert float(h.std()) > 0.19
    trace = poutine.trace(noisy).get_trace(v)
    assert set(trace.nodes) >= {"h", "top"}
    assert elbo_terms(chain, noisy, v, num_samples=100).bound.shape == (2,)


def subsampled(v: Tensor) -> None:
    with pyro.plate("data", len(v), subsample_size=3) as index:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])


def test_rows_are_those_that_the_program_drew() -> None:
    v = torch.arange(8.0)
    guide = Dirac(subsampled)
    guide.setup(v)
    with torch.no_grad():
        guide.table(guide.blocks[0]).copy_(v[:, None] / 2)
    noisy = Noisy(guide, 0.1)
    # At h = v / 2 and any row: -v^2 / 4 - log 2 pi - 0.01 + log 0.1 + 1/2 log 2 pi e.
    terms = elbo_terms(subsampled, noisy, v)
    constant = -math.log(2 * math.pi) - 0.01 + math.log(0.1) + ENTROPY
    squares = -4 * (terms.bound - constant)
    assert terms.exact
    assert all(min((v.square() - s).abs()) < 1e-9 for s in squares)
    assert noisy.posterior(v)["h"].mean.shape == (8,)
    loss = Trace_ELBO().loss(subsampled, noisy, v)
    assert math.isfinite(loss)


def test_new_data_are_inferred_by_the_guides_own_step() -> None:
    v, new = torch.randn(5, 3), torch.randn(4, 3)
    guide = Dirac(gaussian)
    noisy = Noisy(guide, 0.2)
    noisy.setup(v)
    with pytest.raises(ValueError, match="Expected the data that the table of 'Dirac.*' was set up with"):
        noisy.posterior(new)
    em = EM(gaussian, guide, e_step=Maximize(), m_step=None)
    em.step(v)
    assert torch.equal(noisy.posterior(new)["h"].mean, em.infer(new)["h"].mean)
    torch.testing.assert_close(
        elbo_terms(gaussian, noisy, new).bound, elbo_terms(gaussian, Noisy(solved(gaussian, new), 0.2), new).bound
    )
    with pytest.raises(ValueError, match="Expected the data that the table of 'Dirac.*' was set up with"):
        noisy(new)


# ---------------------------------------------------------------------- errors


def test_guides_without_points_are_refused() -> None:
    with pytest.raises(TypeError, match="Expected a guide of pyro_ext.guides for Noisy, but got function"):
        Noisy(laplace, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected a guide of points for Noisy, but got MeanField"):
        Noisy(MeanField(laplace), 0.1)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, {"h": 0.0}, {"h": torch.tensor([0.1, -0.1])}])
def test_spreads_are_positive_and_finite(scale: Any) -> None:
    with pytest.raises(ValueError, match="Expected a scale that is positive and finite, but got"):
        Noisy(Dirac(laplace), scale)


@pytest.mark.parametrize("scale", ["0.1", None, True, torch.tensor(0.1), {"h": "0.1"}, {"h": None}])
def test_spreads_are_numbers(scale: Any) -> None:
    with pytest.raises(TypeError, match="Expected scale to be a number, or a mapping from sites"):
        Noisy(Dirac(laplace), scale)


def refused(guide: Any, scale: Any, v: Tensor, error: type[Exception], match: str) -> None:
    noisy = Noisy(guide, scale)
    was_set_up = guide.is_set_up
    before = everything()
    for call in (noisy, noisy.posterior, noisy.setup, lambda v: elbo_terms(guide.model, noisy, v)):
        with pytest.raises(error, match=match):
            call(v)
        assert not noisy.is_set_up
        assert guide.is_set_up == was_set_up
    assert everything().keys() == before.keys()


@pytest.mark.parametrize("set_up", [False, True])
def test_scales_that_do_not_fit_are_refused_at_the_first_call(set_up: bool) -> None:
    v = torch.randn(5, 3)
    for scale, match in (
        ({"z": 0.1}, r"Expected a scale for each of the latents \['h'\], but got \['z'\]"),
        ({}, r"Expected a scale for each of the latents \['h'\], but got \[\]"),
        ({"h": torch.ones(3)}, r"Expected a scale of 'h' that broadcasts to \(2,\), but got shape \(3,\)"),
    ):
        guide = Dirac(gaussian)
        if set_up:
            guide.setup(v)
        refused(guide, scale, v, ValueError, match)


def binary(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.5))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_discrete_points_are_refused() -> None:
    refused(Dirac(binary), 0.1, torch.randn(3), ValueError, "Expected continuous points for Noisy, but got the binary")


def test_densities_of_a_network_are_refused() -> None:
    refused(
        Amortized(laplace), 0.1, torch.randn(3), TypeError, "Expected points for Noisy, but got a NormalFactor for 'h'"
    )


def test_zeros_of_a_positive_code_are_refused() -> None:
    v = torch.tensor([-1.0, 3.0])
    guide = solved(code, v)
    assert guide.posterior(v)["h"].mean.tolist() == pytest.approx([0.0, 2.75])
    noisy = Noisy(guide, 0.1)
    guide(v)
    before = everything()
    match = "Expected points of 'h' inside its support, .* but got 1 of 2 at its end"
    for call in (noisy, noisy.posterior, lambda v: elbo_terms(code, noisy, v)):
        with pytest.raises(ValueError, match=match):
            call(v)
    assert everything().keys() == before.keys()
    high = torch.tensor([2.0, 3.0])
    assert elbo_terms(code, Noisy(solved(code, high), 0.1), high).bound.shape == (2,)
