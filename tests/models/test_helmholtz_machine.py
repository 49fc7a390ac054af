from __future__ import annotations

import math
import re
from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_ext.models import HelmholtzMachine
from tests.oracles.enumeration import LOG_2PI, bernoulli_log_prob, binary_states, program_log_joint

D, H = 3, 2


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def test_joint_is_the_formula() -> None:
    model = HelmholtzMachine(D, H, hidden=5)
    v, h = binary_states(D), 2 * torch.randn(4, 8, H)
    first, _, last = model.decoder
    logits = torch.tanh(h @ first.weight.T + first.bias) @ last.weight.T + last.bias
    prior = (-0.5 * (h**2 + LOG_2PI)).sum(-1)
    expected = prior + bernoulli_log_prob(v, logits)
    torch.testing.assert_close(program_log_joint(model, {"h": h}, v), expected, rtol=1e-12, atol=1e-12)


def test_the_default_decoder() -> None:
    shapes = [tuple(p.shape) for p in HelmholtzMachine(D, H).decoder.parameters()]
    assert shapes == [(64, H), (64,), (D, 64), (D,)]


def test_dreams_have_the_frequencies_of_the_model() -> None:
    model, n = HelmholtzMachine(D, H), 20_000
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    # Quadrature on a grid: the integrand is smooth and vanishes at the ends.
    axis = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    with torch.no_grad():
        exact = program_log_joint(model, {"h": grid}, binary_states(D)).exp().sum(0) * 0.1**2
    assert exact.sum().item() == pytest.approx(1, abs=1e-9)
    index = (model.dream(n) @ torch.tensor([4.0, 2.0, 1.0])).long()
    frequency = torch.bincount(index, minlength=8) / n
    assert ((frequency - exact).abs() < 5 * (exact * (1 - exact) / n).sqrt()).all()


def test_a_decoder_of_ones_own_is_trained() -> None:
    decoder = nn.Linear(H, D)
    model = HelmholtzMachine(D, H, decoder, name="machine")
    model(binary_states(D))
    store = pyro.get_param_store()
    assert store["machine.decoder$$$weight"] is decoder.weight
    assert set(map(id, model.parameters())) == {id(decoder.weight), id(decoder.bias)}


def test_initialize_sets_the_last_bias() -> None:
    v = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    expected = torch.tensor([2.5 / 3, 0.5 / 3, 1.5 / 3])
    for decoder in (None, nn.Linear(H, D)):
        model = HelmholtzMachine(D, H, decoder)
        model.initialize(v)
        last = list(model.decoder.modules())[-1]
        torch.testing.assert_close(last.bias.detach().sigmoid(), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) * self.scale


class Resettable(Scaled):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 7.0)


def test_a_decoder_that_cannot_start_anew_is_refused() -> None:
    model = HelmholtzMachine(D, H, nn.Sequential(nn.Linear(H, H), Scaled()))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="to know how to start anew, but got Scaled without reset_parameters. Give"):
        model.initialize(binary_states(D))
    assert all(map(torch.equal, before, model.parameters()))


def test_a_decoder_starts_anew_by_its_own_method() -> None:
    model = HelmholtzMachine(D, H, Resettable())
    model.initialize(binary_states(D))
    assert (model.decoder.scale == 7).all()


def test_a_decoder_of_another_width_is_refused() -> None:
    model = HelmholtzMachine(D, H, nn.Linear(H, D + 1))
    message = "Expected the decoder to return 3 logits a row, but got shape (8, 4). End it with that many outputs."
    with pytest.raises(ValueError, match=re.escape(message)):
        model(binary_states(D))
    with pytest.raises(ValueError, match="Expected the decoder to return 3 logits a row"):
        model.dream(2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HelmholtzMachine(D, 0), ValueError, "Expected num_latents >= 1, but got 0."),
        (lambda: HelmholtzMachine(0, H), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: HelmholtzMachine(D, H, hidden=0), ValueError, "Expected hidden >= 1, but got 0."),
        (
            lambda: HelmholtzMachine(D, H, math.tanh),
            TypeError,
            "Expected decoder to be a torch.nn.Module, but got buil",
        ),
        (
            lambda: HelmholtzMachine(D, H, nn.Linear(H, D), hidden=3),
            ValueError,
            "Expected hidden only without a decoder, but got hidden=3. Pass one of the two.",
        ),
    ],
)
def test_refusals_of_the_constructor(
    build: Callable[[], HelmholtzMachine], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()
