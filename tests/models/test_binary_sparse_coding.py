from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext.models import BinarySparseCoding, assign_parameters, read_parameter
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import (
    StatesMarginal,
    binary_sparse_coding_log_joint,
    binary_states,
    exact_posterior,
    expected_log_joint,
    factorial_posterior,
    log_evidence,
    program_log_joint,
    random_posterior,
)

N, D, H = 40, 5, 3
precisions = pytest.mark.parametrize("shared", [False, True], ids=["diagonal", "shared"])


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def random_model(shared: bool = False, **kwargs: float) -> BinarySparseCoding:
    model = BinarySparseCoding(D, H, shared_precision=shared, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


def joint_of(model: BinarySparseCoding, v: Tensor) -> Tensor:
    return program_log_joint(model, {"h": binary_states(model.num_latents).unsqueeze(1)}, v)


def m_step(model: BinarySparseCoding, v: Tensor, probs: Tensor) -> None:
    marginal = StatesMarginal(binary_states(model.num_latents), probs)
    model.maximize(model.statistics({"v": v}, {"h": marginal}))


def snapshot(model: BinarySparseCoding) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@precisions
def test_joint_is_the_formula(shared: bool) -> None:
    model, v = random_model(shared), 2 * torch.randn(N, D)
    by_hand = binary_sparse_coding_log_joint(v, binary_states(H), model.W, model.b, model.beta)
    torch.testing.assert_close(joint_of(model, v), by_hand, rtol=1e-12, atol=1e-12)


@precisions
@pytest.mark.parametrize("family", ["joint", "factorial"])
def test_maximize_is_a_maximum(shared: bool, family: str) -> None:
    model, v = random_model(shared, variance_floor=0.0), 2 * torch.randn(N, D) + 1
    q = random_posterior(2**H, N) if family == "joint" else factorial_posterior(torch.rand(N, H))
    m_step(model, v, q)

    def objective() -> Tensor:
        return expected_log_joint(joint_of(model, v), q)

    assert_zero_gradient(model, objective, scale=N)
    assert_maximum(model, objective)


@precisions
def test_maximize_respects_active_floors(shared: bool) -> None:
    v, q = 2 * torch.randn(N, D), random_posterior(2**H, N)
    free = random_model(shared)
    m_step(free, v, q)
    variance_floor = 1.001 / read_parameter(free, "beta").median().item()
    probability_floor = 1.001 * read_parameter(free, "b").sigmoid().min().item()
    assert probability_floor < 0.5
    model = random_model(shared, variance_floor=variance_floor, probability_floor=probability_floor)
    m_step(model, v, q)

    def is_feasible() -> bool:
        probability = read_parameter(model, "b").sigmoid()
        beta = read_parameter(model, "beta")
        inside = (probability >= probability_floor) & (probability <= 1 - probability_floor)
        return bool(inside.all() and (1 / beta >= variance_floor).all())

    assert (1 / read_parameter(model, "beta")).min().item() == pytest.approx(variance_floor, rel=1e-12)
    assert read_parameter(model, "b").sigmoid().min().item() == pytest.approx(probability_floor, rel=1e-12)
    assert_maximum(model, lambda: expected_log_joint(joint_of(model, v), q), is_feasible)


def test_probability_floor_keeps_the_prior_finite() -> None:
    model, v = random_model(probability_floor=1e-3), torch.randn(N, D)
    states = binary_states(H)
    q = random_posterior(2**H, N) * ((states[:, 0] == 0) & (states[:, 1] == 1)).unsqueeze(-1)
    m_step(model, v, q / q.sum(0))
    probability = read_parameter(model, "b").sigmoid()
    torch.testing.assert_close(probability[:2], torch.tensor([1e-3, 1 - 1e-3]))
    assert 1e-3 < probability[2] < 1 - 1e-3


def test_the_component_of_a_unit_that_is_never_on_stays() -> None:
    model, v = random_model(variance_floor=0.0), torch.randn(N, D)
    old = read_parameter(model, "W")
    q = random_posterior(2**H, N) * (binary_states(H)[:, 1] == 0).unsqueeze(-1)
    q = q / q.sum(0)
    m_step(model, v, q)
    torch.testing.assert_close(read_parameter(model, "W")[:, 1], old[:, 1], rtol=1e-12, atol=1e-12)
    assert_maximum(
        model,
        lambda: expected_log_joint(joint_of(model, v), q),
        lambda: read_parameter(model, "b")[1].sigmoid().item() >= model.probability_floor,
    )


def test_units_always_on_together_share_what_their_sum_explains() -> None:
    model, v = random_model(variance_floor=0.0), torch.randn(N, D)
    old = read_parameter(model, "W")
    states = binary_states(H)
    q = random_posterior(2**H, N) * (states[:, 0] == states[:, 1]).unsqueeze(-1)
    q = q / q.sum(0)
    m_step(model, v, q)
    new = read_parameter(model, "W")
    torch.testing.assert_close(new[:, 0] - new[:, 1], old[:, 0] - old[:, 1], rtol=1e-12, atol=1e-12)

    def objective() -> Tensor:
        return expected_log_joint(joint_of(model, v), q)

    assert_zero_gradient(model, objective, scale=N)
    assert_maximum(model, objective)


def test_a_rare_unit_is_not_taken_for_one_that_is_never_on() -> None:
    model, v = random_model(variance_floor=0.0), torch.randn(N, D)
    means = torch.rand(N, H)
    means[:, 2] *= 1e-20
    q = factorial_posterior(means)
    m_step(model, v, q)
    # The rare unit fits the residuals of the rows that it serves.
    W = read_parameter(model, "W")
    residual = v - means[:, :2] @ W[:, :2].T
    expected = means[:, 2] @ residual / means[:, 2].sum()
    torch.testing.assert_close(W[:, 2], expected, rtol=1e-6, atol=1e-6)


@precisions
def test_beta_uses_the_new_components(shared: bool) -> None:
    model, v = random_model(shared), torch.randn(N, D)
    q = random_posterior(2**H, N)
    m_step(model, v, q)
    difference = v - (binary_states(H) @ read_parameter(model, "W").T).unsqueeze(1)
    variance = (q.unsqueeze(-1) * difference.square()).sum((0, 1)) / N
    variance = variance.mean() if shared else variance
    torch.testing.assert_close(1 / read_parameter(model, "beta"), variance, rtol=1e-12, atol=0)


def test_statistics_are_additive() -> None:
    model, v, q = random_model(), torch.randn(N, D), random_posterior(2**H, N)
    states = binary_states(H)
    whole = model.statistics({"v": v}, {"h": StatesMarginal(states, q)})
    parts = [
        model.statistics({"v": v[rows]}, {"h": StatesMarginal(states, q[:, rows])})
        for rows in (slice(0, 15), slice(15, N))
    ]
    assert whole["count"].item() == N
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-12, atol=1e-12)


@precisions
def test_exact_em_never_lowers_the_evidence(shared: bool) -> None:
    v = random_model(shared).dream(200)
    model = BinarySparseCoding(D, H, shared_precision=shared)
    model.initialize(v)
    values = []
    with torch.no_grad():
        for _ in range(30):
            joint = joint_of(model, v)
            values.append(log_evidence(joint).sum())
            m_step(model, v, exact_posterior(joint))
    steps = torch.stack(values).diff()
    assert (steps >= -1e-12 * values[0].abs()).all()
    assert steps.sum() > 10


def test_vanishing_noise_is_refused_without_a_floor() -> None:
    model = random_model(variance_floor=0.0)
    before = snapshot(model)
    v = torch.cat([torch.randn(N, D - 1), torch.zeros(N, 1)], -1)
    with pytest.raises(RuntimeError, match="Expected a positive noise variance, but got .*: the components explain"):
        m_step(model, v, random_posterior(2**H, N))
    assert all(map(torch.equal, before, model.parameters()))


def test_bad_statistics_are_refused() -> None:
    model = random_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="with count, observed, sum, gram, cross, square, but got count"):
        model.maximize({"count": torch.tensor(1.0)})
    assert all(map(torch.equal, before, model.parameters()))


@precisions
def test_parameters_stay_the_same_tensors(shared: bool) -> None:
    model, v = random_model(shared), torch.randn(N, D)
    model(v)
    store = pyro.get_param_store()
    tensors = {name: store[name].unconstrained() for name in store}
    m_step(model, v, random_posterior(2**H, N))
    assert all(store[name].unconstrained() is tensor for name, tensor in tensors.items())
    assert {id(p) for p in model.parameters()} == {id(t) for t in tensors.values()}


@precisions
def test_initialize(shared: bool) -> None:
    wide = 400
    v = torch.randn(2000, wide) * torch.linspace(1, 3, wide) + torch.linspace(-5, 5, wide)
    model = BinarySparseCoding(wide, 10, shared_precision=shared)
    model.initialize(v)
    torch.testing.assert_close(read_parameter(model, "b").sigmoid(), torch.full((10,), 0.1))
    variance = v.var(0, correction=0)
    variance = variance.mean() if shared else variance
    torch.testing.assert_close(1 / read_parameter(model, "beta"), variance)
    z = (read_parameter(model, "W") - v.mean(0).unsqueeze(-1)) / (variance.sqrt().unsqueeze(-1) / 4)
    n = z.numel()
    assert abs(z.mean().item()) < 5 / n**0.5
    assert abs(z.square().mean().item() - 1) < 5 * (2 / n) ** 0.5


def test_a_single_unit_starts_at_one_half() -> None:
    model = BinarySparseCoding(2, 1)
    model.initialize(torch.randn(5, 2))
    assert read_parameter(model, "b").item() == 0.0


def test_a_constant_column_is_refused_without_a_floor() -> None:
    model = random_model(variance_floor=0.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Expected every column to vary, but got a constant one, column 0. Leave it"):
        model.initialize(torch.ones(N, D))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BinarySparseCoding(2, 0), "Expected num_latents >= 1, but got 0."),
        (lambda: BinarySparseCoding(2, 1, variance_floor=-1.0), "Expected variance_floor >= 0, but got -1.0."),
        (lambda: BinarySparseCoding(2, 1, probability_floor=0.5), "Expected 0 < probability_floor < 0.5, but got 0.5."),
    ],
)
def test_refusals_of_the_constructor(build: Callable[[], BinarySparseCoding], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@precisions
def test_dreams_have_the_moments_of_the_model(shared: bool) -> None:
    model, n = random_model(shared), 20_000
    assign_parameters(model, {"b": torch.tensor([-1.0, 0.0, 1.0])})
    v = model.dream(n)
    W, p = read_parameter(model, "W"), read_parameter(model, "b").sigmoid()
    mean = W @ p
    second = (
        (W * p * (1 - p)) @ W.T + torch.outer(mean, mean) + torch.diag((1 / read_parameter(model, "beta")).expand(D))
    )
    for sample, exact in ((v, mean), (v.unsqueeze(-1) * v.unsqueeze(-2), second)):
        assert ((sample.mean(0) - exact).abs() < 5 * sample.std(0) / math.sqrt(n)).all()
