from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.models import SigmoidBeliefNetwork, read_parameter
from tests.oracles.enumeration import (
    binary_states,
    exact_posterior,
    log_evidence,
    program_log_joint,
    sigmoid_belief_network_log_joint,
)

SIZES = [2, 3, 4]


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def random_network() -> SigmoidBeliefNetwork:
    model = SigmoidBeliefNetwork(SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


def layer_states() -> dict[str, Tensor]:
    states = binary_states(5).unsqueeze(1)
    return {"h1": states[..., :3], "h2": states[..., 3:]}


def by_hand(model: SigmoidBeliefNetwork, v: Tensor) -> Tensor:
    latents = layer_states()
    return sigmoid_belief_network_log_joint(
        v, [latents["h1"], latents["h2"]], [model.W1, model.W2], [model.b0, model.b1, model.b2]
    )


def test_joint_is_the_formula() -> None:
    model, v = random_network(), torch.bernoulli(torch.full((10, 4), 0.5))
    torch.testing.assert_close(program_log_joint(model, layer_states(), v), by_hand(model, v), rtol=1e-12, atol=1e-12)


def test_probabilities_of_all_data_sum_to_one() -> None:
    model = random_network()
    joint = program_log_joint(model, layer_states(), binary_states(4))
    assert log_evidence(joint).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_one_latent_layer() -> None:
    model = SigmoidBeliefNetwork([3, 4])
    v, h = torch.ones(1, 4), binary_states(3).unsqueeze(1)
    expected = sigmoid_belief_network_log_joint(v, [h], [model.W1], [model.b0, model.b1])
    torch.testing.assert_close(program_log_joint(model, {"h1": h}, v), expected, rtol=1e-12, atol=1e-12)


def test_dreams_have_the_frequencies_of_the_model() -> None:
    model, n = random_network(), 20_000
    exact = log_evidence(by_hand(model, binary_states(4))).exp().detach()
    index = (model.dream(n) @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
    frequency = torch.bincount(index, minlength=16) / n
    assert ((frequency - exact).abs() < 5 * (exact * (1 - exact) / n).sqrt()).all()


def test_initialize() -> None:
    model = random_network()
    v = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    model.initialize(v)
    expected = torch.tensor([3.5 / 4, 0.5 / 4, 2.5 / 4, 1.5 / 4])
    torch.testing.assert_close(read_parameter(model, "b0").sigmoid(), expected)
    assert (read_parameter(model, "b1") == 0).all()
    assert (read_parameter(model, "b2") == 0).all()
    for name, shape in (("W1", (4, 3)), ("W2", (3, 2))):
        W = read_parameter(model, name)
        assert W.shape == shape
        assert 0.5 / shape[1] ** 0.5 < W.abs().max() <= 1 / shape[1] ** 0.5


def test_there_is_no_closed_form() -> None:
    model = random_network()
    assert not hasattr(model, "statistics")
    assert not hasattr(model, "maximize")


def test_the_gradient_of_the_evidence_is_the_expected_gradient_of_the_joint() -> None:
    model, v = random_network(), binary_states(4)[5:9]
    joint = program_log_joint(model, layer_states(), v)
    direct = torch.autograd.grad(log_evidence(joint).sum(), list(model.parameters()), retain_graph=True)
    q = exact_posterior(joint).detach()
    expected = torch.autograd.grad((q * joint).sum(), list(model.parameters()))
    for a, b in zip(direct, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SigmoidBeliefNetwork([4]), ValueError, r"Expected at least two layers, but got sizes=\[4\]. List the"),
        (lambda: SigmoidBeliefNetwork([2, 0, 4]), ValueError, "Expected every layer's size >= 1, but got 0."),
        (lambda: SigmoidBeliefNetwork([2.0, 4]), TypeError, "Expected every layer's size to be an int, but got 2.0"),
    ],
)
def test_refusals_of_the_constructor(
    build: Callable[[], SigmoidBeliefNetwork], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()
