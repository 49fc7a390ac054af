"""MeanFieldNetwork: exactly damped parallel sweeps before training, and better ones after it."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient
from pyro_ext.discrete_factors import BernoulliFactor
from pyro_ext.fixed_point import BoundChange, Parallel
from pyro_ext.guides import Amortized, MeanField, MeanFieldNetwork
from pyro_ext.models import BinarySparseCoding
from tests.oracles.variational import sparse_coding_bound, update_19_44

pytestmark = pytest.mark.usefixtures("float64")

D, H = 6, 4


def sparse_coding(*, shared: bool = False, size: float = 0.5) -> BinarySparseCoding:
    model = BinarySparseCoding(D, H, shared_precision=shared)
    with torch.no_grad():
        model.b_unconstrained.normal_()
        model.W_unconstrained.normal_(std=size)
        model.beta_unconstrained.normal_(std=0.3)
    return model


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("num_layers", "damping"), [(1, 0.5), (3, 0.5), (6, 0.3), (6, 0.7), (2, 0.0)])
def test_untrained_layers_are_sweeps_of_the_fixed_point(
    num_layers: int, damping: float, tied: bool, shared: bool
) -> None:
    model = sparse_coding(shared=shared, size=0.3)
    v = model.dream(30)
    step = FixedPoint(Parallel(damping), criterion=BoundChange(0.0), max_sweeps=num_layers)
    expected = EM(model, MeanField(model), e_step=step, m_step=None).infer(v)["h"].mean
    assert step.last_sweeps == num_layers
    network = MeanFieldNetwork.from_model(model, num_layers=num_layers, damping=damping, tied=tied)
    torch.testing.assert_close(network(v).sigmoid(), expected, rtol=0, atol=1e-10)
    found = Amortized(model, encoder=network).posterior(v)["h"].mean
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_one_undamped_layer_is_19_44_for_all_units() -> None:
    model = sparse_coding()
    v = model.dream(5)
    parameters = (model.W, model.b, model.beta)
    means = model.b.sigmoid().expand(5, H)
    expected = torch.stack([update_19_44(v, means, *parameters, i) for i in range(H)], -1)
    found = MeanFieldNetwork.from_model(model, num_layers=1, damping=0.0)(v).sigmoid()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_are_limited_as_the_factor_limits_them(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model = sparse_coding(size=8.0)
    v = 20 * torch.randn(10, D)
    network = MeanFieldNetwork.from_model(model, num_layers=4)
    limit = -math.log(torch.finfo(dtype).eps)
    logits = network(v)
    # The start counts little, so that all logits stand near their limit.
    assert bool((logits.abs() <= limit).all())
    assert bool((logits.abs() > 0.9 * limit).any())
    # A step that is wrong at its limit is led back by the gradient.
    loss = BernoulliFactor(H).divergence(-logits.detach().sign() * 5, logits).sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    assert bool(network.c.grad.abs().sum() > 1)


@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_have_the_gradient_of_finite_differences(tied: bool) -> None:
    network = MeanFieldNetwork.from_model(sparse_coding(), num_layers=3, tied=tied)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    v = torch.randn(4, D)
    names = [name for name, _ in network.named_parameters()]
    assert names == ["A", "c", "S", "start"]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (v,))

    assert torch.autograd.gradcheck(run, tuple(network.parameters()))
    network(v).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        per_layer = parameter.grad.flatten(1) if name != "start" else parameter.grad[None]
        assert bool(per_layer.any(-1).all())


def test_untied_layers_are_computed_one_after_the_other() -> None:
    network = MeanFieldNetwork(D, H, 3, damping=0.2, tied=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert {n: tuple(p.shape) for n, p in network.named_parameters()} == {
        "A": (3, H, D),
        "c": (3, H),
        "S": (3, H, H),
        "start": (H,),
    }
    v = torch.randn(5, D)
    x = network.start.expand(5, H)
    for k in range(3):
        x = 0.2 * x + 0.8 * (v @ network.A[k].T + network.c[k] + x.sigmoid() @ network.S[k].T)
    torch.testing.assert_close(network(v), x)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_on_the_bound_it_beats_as_many_sweeps(tied: bool) -> None:
    model = sparse_coding(size=1.0)
    v, new = model.dream(150), model.dream(60)
    network = MeanFieldNetwork.from_model(model, num_layers=2, tied=tied)
    guide = Amortized(model, encoder=network, name="network")

    def bound() -> Tensor:
        means = guide.posterior(new)["h"].mean
        return sparse_coding_bound(new, means, model.W, model.b, model.beta).mean().detach()

    before = bound()
    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.02}), num_steps=100), m_step=None)
    em.step(v)
    assert bound() > before + 0.05
    names = {f"network.encoders.h$$${name}" for name in ("A", "c", "S", "start")}
    assert names <= set(pyro.get_param_store())


def test_divergence_to_solved_q_trains_it() -> None:
    model = sparse_coding(size=1.0)
    v, new = model.dream(200), model.dream(50)
    em = EM(model, MeanField(model), e_step=FixedPoint(max_sweeps=200), m_step=None)
    targets, wanted = (em.infer(x)["h"].mean.logit() for x in (v, new))
    network, factor = MeanFieldNetwork.from_model(model, num_layers=2, tied=False), BernoulliFactor(H)
    before = factor.divergence(wanted, network(new)).mean()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        factor.divergence(targets, network(v)).mean().backward()
        optimizer.step()
    assert factor.divergence(wanted, network(new)).mean() < 0.5 * before


def test_copies_shapes_and_random_numbers() -> None:
    model = sparse_coding()
    state = torch.get_rng_state()
    network = MeanFieldNetwork.from_model(model, tied=False)
    assert torch.equal(torch.get_rng_state(), state)
    v = torch.randn(6, D)
    logits = network(v)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(v), logits)
        with torch.no_grad():
            other.A.zero_()
        assert torch.equal(network(v), logits)
    torch.testing.assert_close(network(v.reshape(2, 3, D)), logits.reshape(2, 3, H))
    torch.testing.assert_close(network(v[0]), logits[0])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(bool(x.any()) for x in (model.b, model.W))


def attributes(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"b": torch.zeros(2), "W": torch.eye(2), "beta": torch.ones(2)} | changes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"W": torch.ones(2)}, ValueError, r"Expected W of shape \(D, F\), but got \(2,\)"),
        ({"W": torch.full((2, 2), math.inf)}, ValueError, "Expected finite values in W"),
        ({"b": torch.full((2,), math.nan)}, ValueError, "Expected finite values in b"),
        ({"b": torch.ones(3)}, ValueError, r"Expected b of shape \(\) or \(2,\), but got \(3,\)"),
        ({"beta": torch.zeros(())}, ValueError, "Expected beta > 0, but got 0"),
    ],
)
def test_what_makes_no_network(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeanFieldNetwork.from_model(attributes(**change))


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected num_layers >= 1, but got 0"):
        MeanFieldNetwork.from_model(attributes(), num_layers=0)
    for damping in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"Expected damping in \[0, 1\), but got"):
            MeanFieldNetwork(2, 2, damping=damping)
    for sizes in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"Expected num_\w+ >= 1, but got 0"):
            MeanFieldNetwork(*sizes)
    with pytest.raises(TypeError, match="Expected a model with the attributes b, W, beta, but got .* without 'b'"):
        MeanFieldNetwork.from_model(SimpleNamespace(W=torch.eye(2), beta=1.0))
    with pytest.raises(ValueError, match=r"Expected inputs of shape \(\.\.\., 6\), but got \(6, 2\)"):
        MeanFieldNetwork(D, H)(torch.randn(6, 2))
    model = BinarySparseCoding(D + 1, H)
    with pytest.raises(ValueError, match=r"an encoder of 'h' that reads 7 features, but it failed: Expected inputs"):
        Amortized(model, MeanFieldNetwork(D, H)).setup(torch.randn(3, D + 1))
