"""PSD: a shallow predictor of sparse codes."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_ext.guides import LISTA, PSD, Amortized

pytestmark = pytest.mark.usefixtures("float64")

D, F = 5, 4


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, rate, beta and bias."""
    return torch.randn(D, F), 0.2 + torch.rand(F), 0.5 + torch.rand(D), torch.randn(D)


def perturbed(network: PSD) -> PSD:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("nonnegative", [False, True])
def test_it_computes_its_formula(nonnegative: bool) -> None:
    network = perturbed(PSD(D, F, nonnegative=nonnegative))
    with torch.no_grad():
        network.gain[0] = -0.7
    v = torch.randn(200, D)
    x = v @ network.A.T + network.c
    theta = network.log_theta.exp()
    if nonnegative:
        expected = network.gain.abs() * torch.maximum(x - theta, torch.tensor(0.0))
    else:
        expected = network.gain * x.sign() * torch.maximum(x.abs() - theta, torch.tensor(0.0))
    found = network(v)
    torch.testing.assert_close(found, expected)
    assert bool((found == 0).any())
    assert bool((found < 0).any()) != nonnegative


@pytest.mark.parametrize("nonnegative", [False, True])
def test_untrained_it_is_the_first_iteration_of_ista(nonnegative: bool) -> None:
    dictionary, v = parts(), 2 * torch.randn(20, D)
    expected = LISTA.from_dictionary(*dictionary, num_layers=1, nonnegative=nonnegative)(v)
    found = PSD.from_dictionary(*dictionary, nonnegative=nonnegative)
    torch.testing.assert_close(found(v), expected, rtol=1e-12, atol=1e-12)
    W, rate, beta, bias = dictionary
    model = SimpleNamespace(W=W, rate=rate, beta=beta, bias=bias)
    assert torch.equal(PSD.from_model(model, nonnegative=nonnegative)(v), found(v))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_all_parameters_have_the_gradient_of_finite_differences(nonnegative: bool) -> None:
    network, v = perturbed(PSD(D, F, nonnegative=nonnegative)), 3 * torch.randn(6, D)
    names = [name for name, _ in network.named_parameters()]
    assert names == ["A", "c", "log_theta", "gain"]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (v,))

    assert torch.autograd.gradcheck(run, tuple(network.parameters()))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_it_learns_inside_amortized(nonnegative: bool) -> None:
    W, rate, noise = torch.randn(D, F), 1.0, 0.5

    def model(v: Tensor) -> None:
        prior = dist.Exponential(rate) if nonnegative else dist.Laplace(0.0, 1 / rate)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", prior.expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, noise).to_event(1), obs=v)

    network = PSD.from_dictionary(W, rate, 1 / noise**2, nonnegative=nonnegative)
    guide = Amortized(model, network, name="predictor")
    codes = torch.distributions.Exponential(torch.tensor(rate)).sample((60, F))
    v = codes @ W.T + noise * torch.randn(60, D)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(v) for _ in range(150)]
    assert losses[-1] < 0.8 * losses[0]
    assert set(pyro.get_param_store()) == {f"predictor.encoders.h$$${n}" for n in ("A", "c", "log_theta", "gain")}
    assert bool((network.theta > 0).all())
    for rows in (v[:1], v[:7], torch.randn(90, D)):
        torch.testing.assert_close(guide.posterior(rows)["h"].mean, network(rows).detach(), rtol=1e-10, atol=0)


def test_copies_shapes_and_random_numbers() -> None:
    dictionary = parts()
    state = torch.get_rng_state()
    network = PSD.from_dictionary(*dictionary)
    assert torch.equal(torch.get_rng_state(), state)
    v = torch.randn(6, D)
    codes = network(v)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(v), codes)
        with torch.no_grad():
            other.A.zero_()
        assert torch.equal(network(v), codes)
    torch.testing.assert_close(network(v.reshape(2, 3, D)), codes.reshape(2, 3, F))
    torch.testing.assert_close(network(v[0]), codes[0])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected num_visible >= 1, but got 0"):
        PSD(0, 2)
    with pytest.raises(ValueError, match="Expected num_latents >= 1, but got 0"):
        PSD(2, 0)
    with pytest.raises(ValueError, match="Expected rate > 0, but got 0"):
        PSD.from_dictionary(torch.eye(2), 0.0)
    with pytest.raises(ValueError, match="Expected W of shape"):
        PSD.from_dictionary(torch.ones(2), 1.0)
    with pytest.raises(
        TypeError, match="with the attributes W, rate, beta, bias, but got SimpleNamespace without 'bias'"
    ):
        PSD.from_model(SimpleNamespace(W=torch.eye(2), rate=1.0, beta=1.0))
    with pytest.raises(ValueError, match=r"Expected inputs of shape \(\.\.\., 5\), but got \(5, 2\)\."):
        PSD(D, F)(torch.randn(5, 2))
