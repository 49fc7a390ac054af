from __future__ import annotations

import re
from collections.abc import Callable

import pyro
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as PeerMixture
from torch import Tensor

from pyro_ext.models import (
    Covariance,
    Diagonal,
    Full,
    GaussianMixture,
    Spherical,
    Tied,
    assign_parameters,
    read_parameter,
)
from pyro_ext.models.plus_plus import plus_plus
from tests.models.covariance_structures import (
    PEER_TYPES,
    covariances_of,
    peer_precisions,
    project,
    root_of,
    structures,
)
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import (
    StatesMarginal,
    exact_posterior,
    expected_log_joint,
    gaussian_mixture_log_joint,
    log_evidence,
    one_hot_states,
    program_log_joint,
    random_posterior,
)

N, D, K = 60, 3, 4


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def random_mixture(covariance: Covariance, **kwargs: float) -> GaussianMixture:
    model = GaussianMixture(K, D, covariance, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


def joint_of(model: GaussianMixture, v: Tensor) -> Tensor:
    return program_log_joint(model, {"h": one_hot_states(model.num_components).unsqueeze(1)}, v)


def posterior_of(probs: Tensor) -> dict[str, StatesMarginal]:
    return {"h": StatesMarginal(one_hot_states(len(probs)), probs)}


def m_step(model: GaussianMixture, v: Tensor, probs: Tensor) -> None:
    model.maximize(model.statistics({"v": v}, posterior_of(probs)))


@structures
def test_joint_is_the_formula(covariance: Covariance) -> None:
    model = random_mixture(covariance)
    v = 2 * torch.randn(N, D)
    by_hand = gaussian_mixture_log_joint(v, model.weights, model.locs, covariances_of(model))
    torch.testing.assert_close(joint_of(model, v), by_hand, rtol=1e-12, atol=1e-12)


def test_tiny_weights_are_not_clamped() -> None:
    model = GaussianMixture(2, 1)
    assign_parameters(model, {"weights": torch.tensor([1e-40, 1.0])})
    v = torch.zeros(1, 1)
    by_hand = gaussian_mixture_log_joint(v, torch.tensor([1e-40, 1.0]), model.locs, covariances_of(model))
    torch.testing.assert_close(joint_of(model, v), by_hand, rtol=1e-12, atol=1e-12)


@structures
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_maximize_is_a_maximum(covariance: Covariance, shift: float) -> None:
    model = random_mixture(covariance, covariance_floor=0.0)
    model.shift.fill_(shift)
    v, q = 2 * torch.randn(N, D) + 1, random_posterior(K, N)
    m_step(model, v, q)

    def objective() -> Tensor:
        return expected_log_joint(joint_of(model, v), q)

    assert_zero_gradient(model, objective, scale=N)
    assert_maximum(model, objective)


@structures
def test_maximize_respects_an_active_floor(covariance: Covariance) -> None:
    v = torch.randn(N, D) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.3]])
    q = random_posterior(K, N)
    free = random_mixture(covariance, covariance_floor=0.0)
    m_step(free, v, q)
    floor = torch.linalg.eigvalsh(covariances_of(free)).median().item()
    model = random_mixture(covariance, covariance_floor=floor)
    m_step(model, v, q)
    least = torch.linalg.eigvalsh(covariances_of(model))
    assert (least >= floor * (1 - 1e-12)).all()
    assert (least <= floor * (1 + 1e-9)).any()
    assert (least > floor * (1 + 1e-3)).any()
    # Moving toward any other feasible covariances lowers the objective; the other parameters have zero gradient.
    best = expected_log_joint(joint_of(model, v), q)
    free_parameters = [model.weights_unconstrained, model.locs_unconstrained]
    assert all((g.abs() < 1e-9 * N).all() for g in torch.autograd.grad(best, free_parameters))
    best_covariances = covariances_of(model)
    for _ in range(20):
        noise = torch.randn(K, D, D)
        other = project(covariance, floor * torch.eye(D) + noise @ noise.mT, torch.ones(K))
        for step in (1e-1, 1e-2, 1e-3):
            mixed = (1 - step) * best_covariances + step * other
            assign_parameters(model, {covariance.parameter: root_of(covariance, mixed)})
            assert expected_log_joint(joint_of(model, v), q) <= best + 1e-12 * best.abs()


@structures
def test_maximize_equals_the_weighted_moments(covariance: Covariance) -> None:
    model = random_mixture(covariance, covariance_floor=0.0)
    v, q = 2 * torch.randn(N, D) + 1, random_posterior(K, N)
    m_step(model, v, q)
    torch.testing.assert_close(read_parameter(model, "weights"), q.mean(1), rtol=1e-12, atol=0)
    scatters = []
    for k in range(K):
        mean = sum(q[k, n] * v[n] for n in range(N)) / q[k].sum()
        scatters.append(sum(q[k, n] * torch.outer(v[n] - mean, v[n] - mean) for n in range(N)) / q[k].sum())
        torch.testing.assert_close(model.locs[k].detach(), mean, rtol=1e-12, atol=1e-12)
    expected = project(covariance, torch.stack(scatters), q.sum(1))
    torch.testing.assert_close(covariances_of(model), expected, rtol=1e-11, atol=1e-12)


@structures
def test_statistics_are_additive(covariance: Covariance) -> None:
    model = random_mixture(covariance)
    v, q = torch.randn(N, D), random_posterior(K, N)
    whole = model.statistics({"v": v}, posterior_of(q))
    parts = [model.statistics({"v": v[rows]}, posterior_of(q[:, rows])) for rows in (slice(0, 25), slice(25, N))]
    assert whole["count"].item() == N
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-12, atol=1e-12)


@structures
@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_em_follows_scikit_learn(covariance: Covariance, num_steps: int) -> None:
    truth = random_mixture(covariance)
    assign_parameters(truth, {"locs": 3 * torch.randn(K, D)})
    v = truth.dream(500)
    model = GaussianMixture(K, D, covariance, covariance_floor=0.0)
    model.initialize(v)
    peer = PeerMixture(
        K,
        covariance_type=PEER_TYPES[covariance],
        reg_covar=0.0,
        tol=0.0,
        max_iter=num_steps,
        weights_init=model.weights.detach().numpy(),
        means_init=model.locs.detach().numpy(),
        precisions_init=peer_precisions(covariance, covariances_of(model)).numpy(),
    )
    with pytest.warns(ConvergenceWarning):
        peer.fit(v.numpy())
    with torch.no_grad():
        for _ in range(num_steps):
            m_step(model, v, exact_posterior(joint_of(model, v)))
        ours = log_evidence(joint_of(model, v)).mean().item()
    assert ours == pytest.approx(peer.score(v.numpy()), rel=1e-8)
    torch.testing.assert_close(model.locs.detach(), torch.as_tensor(peer.means_), rtol=1e-6, atol=1e-6)


@structures
def test_data_far_from_zero(covariance: Covariance) -> None:
    x, q = torch.randn(N, D), random_posterior(K, N)
    near = GaussianMixture(K, D, covariance, covariance_floor=0.0)
    m_step(near, x, q)
    far = GaussianMixture(K, D, covariance, covariance_floor=0.0)
    v = x + 1e7
    far.initialize(v)
    m_step(far, v, q)
    # v itself is rounded at 1e7 * 2^-53 = 1e-9; raw moments would lose 1e14 * 2^-53 = 1e-2.
    torch.testing.assert_close(covariances_of(far), covariances_of(near), rtol=1e-6, atol=1e-6)


def snapshot(model: GaussianMixture) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@structures
def test_an_emptied_component_is_refused(covariance: Covariance) -> None:
    model = random_mixture(covariance)
    before = snapshot(model)
    q = random_posterior(K, N)
    q[2] = 0
    with pytest.raises(RuntimeError, match="responsible for some data, but got none for component 2, whose weight"):
        m_step(model, torch.randn(N, D), q / q.sum(0))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("covariance", "place"),
    [(Spherical(), "component 1"), (Diagonal(), "component 1, column 0"), (Full(), "component 1")],
    ids=["spherical", "diagonal", "full"],
)
def test_a_collapsed_component_is_refused_without_a_floor(covariance: Covariance, place: str) -> None:
    model = random_mixture(covariance, covariance_floor=0.0)
    before = snapshot(model)
    v, q = torch.randn(N, D), random_posterior(K, N)
    q[1] = 0
    q[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    v[0] = 0.5
    message = f"Expected a positive variance in every direction, but got none in {place}: the likelihood"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        m_step(model, v, q / q.sum(0))
    assert all(map(torch.equal, before, model.parameters()))
    floored = random_mixture(covariance, covariance_floor=1e-4)
    m_step(floored, v, q / q.sum(0))
    torch.testing.assert_close(covariances_of(floored)[1], 1e-4 * torch.eye(D))


def test_a_collapsed_shared_covariance_is_refused_without_a_floor() -> None:
    model = random_mixture(Tied(), covariance_floor=0.0)
    before = snapshot(model)
    v, q = torch.randn(N, D), random_posterior(K, N)
    v[:, 2] = 0.5
    with pytest.raises(RuntimeError, match="none in the covariance that the components share: the likelihood"):
        m_step(model, v, q)
    assert all(map(torch.equal, before, model.parameters()))
    floored = random_mixture(Tied(), covariance_floor=1e-4)
    m_step(floored, v, q)
    assert torch.linalg.eigvalsh(covariances_of(floored)[0]).min().item() == pytest.approx(1e-4)


def test_bad_statistics_are_refused() -> None:
    model = random_mixture(Diagonal())
    before = snapshot(model)
    statistics = model.statistics({"v": torch.randn(N, D)}, posterior_of(random_posterior(K, N)))
    with pytest.raises(ValueError, match="Expected statistics with count, responsibility, sum, second, but got count"):
        model.maximize({"count": statistics["count"]})
    statistics["sum"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected finite values in the statistic 'sum'"):
        model.maximize(statistics)
    assert all(map(torch.equal, before, model.parameters()))


@structures
def test_optimizers_go_on_after_maximize(covariance: Covariance) -> None:
    model = random_mixture(covariance)
    v, q = torch.randn(N, D), random_posterior(K, N)
    optimizer = pyro.optim.Adam({"lr": 0.01})

    def gradient_step() -> None:
        loss = -expected_log_joint(joint_of(model, v), q)
        loss.backward()
        optimizer([pyro.get_param_store()[name].unconstrained() for name in pyro.get_param_store()])

    gradient_step()
    tensors = {name: pyro.get_param_store()[name].unconstrained() for name in pyro.get_param_store()}
    m_step(model, v, q)
    maximum = snapshot(model)
    assert all(pyro.get_param_store()[name].unconstrained() is tensor for name, tensor in tensors.items())
    gradient_step()
    assert len(optimizer.optim_objs) == len(tensors) == 3
    assert not any(map(torch.equal, maximum, model.parameters()))


@structures
def test_initialize(covariance: Covariance) -> None:
    v = torch.randn(N, D) * torch.tensor([0.1, 1.0, 10.0]) + 5
    model = GaussianMixture(K, D, covariance)
    model.initialize(v)
    torch.testing.assert_close(model.shift, v.mean(0))
    torch.testing.assert_close(read_parameter(model, "weights"), torch.full((K,), 1 / K))
    distance = (v.unsqueeze(1) - model.locs.detach()).square().sum(-1)
    assert (distance == 0).any(0).all()
    nearest = model.locs.detach()[distance.argmin(1)]
    pooled = (v - nearest).square().mean(0).diag().expand(K, D, D)
    torch.testing.assert_close(covariances_of(model), project(covariance, pooled, torch.ones(K)))


def test_seeding_draws_by_squared_distance() -> None:
    v = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    draws = 4000
    pairs = [tuple(plus_plus(v, 2)[0].flatten().tolist()) for _ in range(draws)]
    # First uniform over rows; then with weights d^2: from 0: 1, 9, 9; from 1: 1, 4, 4; from 3: 9, 4.
    expected = {
        (0.0, 1.0): 1 / 4 * 1 / 19,
        (0.0, 3.0): 1 / 4 * 18 / 19,
        (1.0, 0.0): 1 / 4 * 1 / 9,
        (1.0, 3.0): 1 / 4 * 8 / 9,
        (3.0, 0.0): 1 / 2 * 9 / 13,
        (3.0, 1.0): 1 / 2 * 4 / 13,
    }
    assert sum(expected.values()) == pytest.approx(1)
    for pair, p in expected.items():
        assert abs(pairs.count(pair) / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_seeding_finds_separated_clusters_and_the_nearest_center() -> None:
    centers = 1e6 * torch.arange(5.0).unsqueeze(-1)
    v = (centers + torch.rand(5, 8)).flatten().unsqueeze(-1)
    chosen, nearest = plus_plus(v, 5)
    assert sorted((chosen / 1e6).floor().flatten().tolist()) == [0, 1, 2, 3, 4]
    assert (v - chosen[nearest]).abs().max() < 1


@pytest.mark.parametrize(
    ("v", "floor", "message"),
    [
        (torch.eye(3)[[0, 1, 2, 2, 1]], 1e-6, "Expected at least 4 distinct rows, one per component, but got 3. Use"),
        (torch.cat([torch.rand(20, 2), torch.ones(20, 1)], -1), 0.0, "no variance in column 2. Leave it out, or pass"),
    ],
    ids=["few rows", "constant column"],
)
def test_unsuitable_starts_are_refused(v: Tensor, floor: float, message: str) -> None:
    model = GaussianMixture(K, D, covariance_floor=floor)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.initialize(v.double())
    assert all(map(torch.equal, before, model.parameters()))
    assert (model.shift == 0).all()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GaussianMixture(0, 2), ValueError, "Expected num_components >= 1, but got 0."),
        (lambda: GaussianMixture(2, 0), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: GaussianMixture(2, 2, "full"), TypeError, "Expected a covariance structure, but got 'full'. Pass Dia"),
        (lambda: GaussianMixture(2, 2, covariance_floor=-1), ValueError, "Expected covariance_floor >= 0, but got -1."),
        (lambda: GaussianMixture(2, 2, covariance_floor=float("nan")), ValueError, "Expected covariance_floor >= 0"),
    ],
)
def test_refusals_of_the_constructor(
    build: Callable[[], GaussianMixture], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


@structures
def test_dreams_have_the_moments_of_the_mixture(covariance: Covariance) -> None:
    model = random_mixture(covariance)
    n = 20_000
    v = model.dream(n)
    weights, locs = read_parameter(model, "weights"), read_parameter(model, "locs")
    second = torch.einsum("k,kde->de", weights, covariances_of(model) + locs.unsqueeze(-1) * locs.unsqueeze(-2))
    products = v.unsqueeze(-1) * v.unsqueeze(-2)
    for sample, exact in ((v, weights @ locs), (products, second)):
        standard_error = sample.std(0) / n**0.5
        assert ((sample.mean(0) - exact).abs() < 5 * standard_error).all()
