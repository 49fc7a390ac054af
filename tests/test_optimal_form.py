"""The form of the optimal factor is found from the program, and matches the conjugate answer where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import EM, FixedPoint, OptimalForm, optimal_form
from pyro_ext.guides import MeanField
from pyro_ext.models import GaussianMixture, LinearGaussian

float64 = pytest.mark.usefixtures("float64")
N = 6


def data() -> pyro.plate:
    return pyro.plate("data", N)


@float64
def test_the_chapters_example_is_gaussian() -> None:
    model, v = LinearGaussian(num_visible=1, num_latents=2), torch.randn(N, 1)
    form = optimal_form(model, v)["h"]
    assert form.family is dist.Normal
    assert form.statistics == ("h", "h^2")
    # (19.67): the linear term reads v and the other latent's mean; the precision 1 + w_i^2 reads neither.
    assert form.depends_on == {"h": ("h",), "h^2": ()}
    assert form.varies["h"]
    assert form.coefficients is not None
    precision = -2 * form.coefficients[..., 1]
    torch.testing.assert_close(precision, (1 + model.W.detach()[0].square()).expand(N, 2), rtol=1e-6, atol=1e-6)
    e_step = FixedPoint(max_sweeps=3)
    q = EM(model, MeanField(model), e_step=e_step, m_step=None).infer(v)["h"].distribution
    torch.testing.assert_close(q.stddev.pow(-2), precision, rtol=1e-6, atol=1e-6)


@float64
def test_normal_mean_and_gamma_precision() -> None:
    # The conjugate pair of Bishop's section 10.1.3: q(mu) is Normal, q(tau) is Gamma.
    v = torch.randn(20) + 3

    def model(v: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 3.0))
        mu = pyro.sample("mu", dist.Normal(0.5, (0.1 * tau).rsqrt()))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(mu, tau.rsqrt()), obs=v)

    forms = optimal_form(model, v)
    mu, tau = forms["mu"], forms["tau"]
    assert (mu.family, tau.family) == (dist.Normal, dist.Gamma)
    assert mu.depends_on == {"h": ("tau",), "h^2": ("tau",)}
    assert tau.depends_on == {"log h": (), "h": ("mu",)}
    assert not any(mu.varies.values())
    assert tau.coefficients is not None
    # Gamma(a): a - 1 = (2 - 1) + 1 / 2 + N / 2.
    torch.testing.assert_close(tau.coefficients[0, 0, 0], torch.tensor(1 + 0.5 + 10.0), rtol=1e-6, atol=1e-6)


@float64
@pytest.mark.parametrize(
    ("build", "shape"), [(lambda: dist.Gamma(2.0, 3.0), 2.0), (lambda: dist.Exponential(3.0), 1.0)]
)
def test_gamma_poisson(build: Callable[[], dist.TorchDistribution], shape: float) -> None:
    v = torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0, 9.0])

    def model(v: Tensor) -> None:
        with data():
            rate = pyro.sample("rate", build())
            pyro.sample("v", dist.Poisson(rate), obs=v)

    form = optimal_form(model, v)["rate"]
    assert form.family is dist.Gamma
    assert form.coefficients is not None
    torch.testing.assert_close(form.coefficients[:, 0, 0], shape - 1 + v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(form.coefficients[:, 0, 1], torch.full((N,), -3.0 - 1), rtol=1e-6, atol=1e-6)
    assert form.varies == {"log h": True, "h": False}
    assert repr(form) == "OptimalForm('rate': Gamma, exp(c1 log h + c2 h); c1 varies, c2 is constant)"


@float64
@pytest.mark.parametrize(
    ("build", "a", "b"), [(lambda: dist.Beta(2.0, 3.0), 1.0, 2.0), (lambda: dist.Uniform(0.0, 1.0), 0.0, 0.0)]
)
def test_beta_bernoulli(build: Callable[[], dist.TorchDistribution], a: float, b: float) -> None:
    v = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])

    def model(v: Tensor) -> None:
        with data():
            p = pyro.sample("p", build())
            pyro.sample("v", dist.Bernoulli(p), obs=v)

    form = optimal_form(model, v)["p"]
    assert form.family is dist.Beta
    assert form.coefficients is not None
    torch.testing.assert_close(form.coefficients[:, 0], torch.stack([a + v, b + 1 - v], -1), rtol=1e-6, atol=1e-6)


@float64
def test_dirichlet_categorical_in_a_mixture() -> None:
    # Mixture weights outside the plate, classes inside it, which are held.
    v = torch.randn(N)

    def model(v: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
        with pyro.plate("components", 3):
            means = pyro.sample("means", dist.Normal(0.0, 2.0))
        with data():
            z = pyro.sample("z", dist.OneHotCategorical(weights))
            pyro.sample("v", dist.Normal((z * means.unsqueeze(-2)).sum(-1), 1.0), obs=v)

    forms = optimal_form(model, v)
    assert set(forms) == {"weights", "means"}
    weights = forms["weights"]
    assert weights.family is dist.Dirichlet
    assert weights.statistics == ("log h_1", "log h_2", "log h_3")
    assert weights.depends_on == dict.fromkeys(weights.statistics, ("z",))
    assert weights.coefficients is not None
    # Counts of the classes that were held, above alpha - 1.
    counts = weights.coefficients[0, 0] - torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)
    assert counts.sum().round() == N
    assert forms["means"].family is dist.Normal
    assert forms["means"].depends_on == {"h": ("z",), "h^2": ("z",)}


@float64
def test_other_families_on_positive_numbers() -> None:
    v = torch.randn(N)

    def variance(v: Tensor) -> None:
        with data():
            s = pyro.sample("s", dist.InverseGamma(3.0, 2.0))
            pyro.sample("v", dist.Normal(0.0, s.sqrt()), obs=v)

    def scale(v: Tensor) -> None:
        with data():
            s = pyro.sample("s", dist.LogNormal(0.5, 2.0))
            pyro.sample("v", dist.Normal(s.log(), 1.0), obs=v)

    form = optimal_form(variance, v)["s"]
    assert form.family is dist.InverseGamma
    assert form.coefficients is not None
    torch.testing.assert_close(form.coefficients[:, 0, 0], torch.full((N,), -4.0 - 0.5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(form.coefficients[:, 0, 1], -2 - v.square() / 2, rtol=1e-6, atol=1e-6)
    assert optimal_form(scale, v)["s"].family is dist.LogNormal


@float64
def test_no_family_where_none_fits() -> None:
    v = torch.randn(N)

    def model(v: Tensor) -> None:
        with data():
            a = pyro.sample("a", dist.Laplace(0.0, 1.0))
            b = pyro.sample("b", dist.HalfNormal(1.0))
            c = pyro.sample("c", dist.Uniform(-1.0, 1.0))
            d = pyro.sample("d", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(a + b + c + d.tanh(), 1.0), obs=v)

    forms = optimal_form(model, v)
    assert all(form.family is None for form in forms.values())
    assert "is not linear in h, h^2: off by up to" in forms["a"].reason
    assert "is not linear in log h, h: off by" in forms["b"].reason
    assert "no family is known on the support Interval(lower_bound=-1.0, upper_bound=1.0)" in repr(forms["c"])
    assert "is not linear in h, h^2" in forms["d"].reason


@float64
def test_one_unit_that_does_not_fit_spoils_the_site() -> None:
    v = torch.randn(N)

    def model(v: Tensor) -> None:
        with data():
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h[..., 0] + h[..., 1] + 0.1 * h[..., 2] ** 3, 1.0), obs=v)

    assert optimal_form(model, v)["h"].family is None


@float64
def test_a_form_that_fits_at_one_value_of_the_others_only() -> None:
    # h is Gaussian where the switch is off, and nothing known where it is on.
    v = torch.randn(40)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            s = pyro.sample("s", dist.Bernoulli(0.02))
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(torch.where(s > 0, h.sin(), h), 1.0), obs=v)

    assert optimal_form(model, v)["h"].family is None


def test_improper_coefficients_are_no_family() -> None:
    def model(v: Tensor) -> None:
        with data():
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("bump", h.square())
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    form = optimal_form(model, torch.randn(N))["h"]
    assert form.family is None
    assert form.reason == "log p(v, h) is linear in h, h^2, but with coefficients that no Normal has"


@float64
def test_hard_zeros_are_named() -> None:
    def model(v: Tensor) -> None:
        with data():
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("wall", torch.where(h > 0, 0.0, -torch.inf))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    assert optimal_form(model, torch.randn(N))["h"].reason == "log p(v, h) is not finite on the support"


def test_single_precision_finds_the_same_forms() -> None:
    v = torch.randn(N, 1)
    form = optimal_form(LinearGaussian(1, 2), v)["h"]
    assert form.family is dist.Normal
    assert form.depends_on == {"h": ("h",), "h^2": ()}

    def model(v: Tensor) -> None:
        with data():
            h = pyro.sample("h", dist.Laplace(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    assert optimal_form(model, v[:, 0])["h"].family is None


def test_it_leaves_the_generator_and_the_store_alone() -> None:
    model, v = LinearGaussian(1, 2), torch.randn(N, 1)
    model(v)
    names, state = set(pyro.get_param_store().keys()), torch.get_rng_state()
    optimal_form(model, v)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pyro.get_param_store().keys()) == names
    assert optimal_form(GaussianMixture(2, 1), v) == {}


def test_without_a_family_there_is_nothing_to_read() -> None:
    form = OptimalForm("h", None, reason="nothing fits")
    assert repr(form) == "OptimalForm('h': None, nothing fits)"
    assert form.statistics == ()
