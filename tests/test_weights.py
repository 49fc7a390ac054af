from __future__ import annotations

import math

import pytest
import torch

from pyro_ext.weights import SelfNormalized, Uniform, Weights

pytestmark = pytest.mark.usefixtures("float64")


def test_self_normalized_weights_and_bound():
    w = torch.rand(5, 3)
    torch.testing.assert_close(SelfNormalized().normalise(w.log()), w / w.sum(0))
    torch.testing.assert_close(SelfNormalized().bound(w.log()), w.mean(0).log())


def test_uniform_weights_and_bound():
    log_w = torch.randn(5, 3)
    assert torch.equal(Uniform().normalise(log_w), torch.full((5, 3), 0.2))
    torch.testing.assert_close(Uniform().bound(log_w), log_w.mean(0))


@pytest.mark.parametrize("weights", [SelfNormalized(), Uniform()])
def test_one_particle_has_weight_one(weights):
    log_w = torch.tensor([[-3.0, 0.0, -math.inf]])
    assert torch.equal(weights.normalise(log_w), torch.ones(1, 3))
    assert torch.equal(weights.bound(log_w), log_w[0])


@pytest.mark.parametrize("magnitude", [1e-9, 1.0, 1e3, 1e12])
def test_weights_are_finite_at_any_magnitude(magnitude):
    log_w = magnitude * torch.randn(4, 100)
    W = SelfNormalized().normalise(log_w)
    torch.testing.assert_close(W.sum(0), torch.ones(100))
    bound = SelfNormalized().bound(log_w)
    assert (bound <= log_w.max(0).values + 1e-12).all()
    assert (bound >= log_w.max(0).values - math.log(4) - 1e-12).all()


def test_impossible_particles():
    log_w = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    assert torch.equal(SelfNormalized().normalise(log_w), torch.tensor([[0.0, 0.5], [1.0, 0.5]]))
    torch.testing.assert_close(SelfNormalized().bound(log_w), torch.tensor([-math.log(2.0), -math.inf]))


def test_weights_are_values():
    assert SelfNormalized() == SelfNormalized()
    assert repr(Uniform()) == "Uniform()"
    with pytest.raises(TypeError, match="abstract"):
        Weights()
