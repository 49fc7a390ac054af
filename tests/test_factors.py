"""Factor families: moments, entropies, optima and conditionals against enumeration and linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.continuous_factors import MultivariateNormalFactor, NormalFactor
from pyro_ext.discrete_factors import BernoulliFactor, JointFactor, OneHotFactor
from pyro_ext.distributions import PointMass
from pyro_ext.factors import Factor
from pyro_ext.point_factor import DeltaFactor
from pyro_ext.states import enumerate_states

pytestmark = pytest.mark.usefixtures("float64")

DISCRETE: dict[str, tuple[Callable[[], Factor], list[int]]] = {
    "bernoulli": (lambda: BernoulliFactor(3), [1, 1, 1]),
    "one-hot": (lambda: OneHotFactor(2, 3), [3, 3]),
    "joint binary": (lambda: JointFactor([1, 1, 1]), [1, 1, 1]),
    "joint mixed": (lambda: JointFactor([1, 3, 1]), [1, 3, 1]),
}
CONTINUOUS: dict[str, Callable[[], Factor]] = {
    "normal": lambda: NormalFactor(3),
    "multivariate normal": lambda: MultivariateNormalFactor(3),
}
UNGROUPED = {"joint binary", "joint mixed", "multivariate normal"}


def factor_of(name: str) -> Factor:
    return DISCRETE[name][0]() if name in DISCRETE else CONTINUOUS[name]()


ALL = [*DISCRETE, *CONTINUOUS]


def moments_of(name: str, factor: Factor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (k,), second moments (k, k) and entropy of one parameter vector, by enumeration or by covariances."""
    if name in DISCRETE:
        states = enumerate_states(DISCRETE[name][1])
        log_q = factor.marginal(params, 0, factor.size).log_prob(states)
        q = log_q.exp()
        return q @ states, (states * q[:, None]).mT @ states, -(q * log_q).sum()
    fn = factor.marginal(params, 0, factor.size)
    covariance = torch.diag(fn.variance) if name == "normal" else fn.covariance_matrix
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    return fn.mean, covariance + torch.outer(fn.mean, fn.mean), entropy


def random_params(factor: Factor, *batch: int) -> Tensor:
    return torch.randn(batch + (factor.num_params,))


def objective(factor: Factor, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
    energy = (linear * factor.mean(params)).sum(-1) + 0.5 * factor.second_moment(params, quadratic)
    return energy + factor.entropy(params)


def random_problem(name: str, factor: Factor) -> tuple[Tensor, Tensor]:
    """l (4, k) and Q (k, k): negative definite for continuous families; coupled within a group only."""
    k = factor.size
    root = torch.randn(k, k)
    quadratic = -(root @ root.mT) - torch.eye(k) if name in CONTINUOUS else root + root.mT
    if name not in UNGROUPED:
        keep = torch.zeros(k, k)
        for group in factor.groups:
            keep[group[0] : group[-1] + 1, group[0] : group[-1] + 1] = 1
        quadratic = quadratic * keep
    return torch.randn(4, k), quadratic


@pytest.mark.parametrize("name", ALL)
def test_mean_second_moment_and_entropy(name: str) -> None:
    factor = factor_of(name)
    params = random_params(factor, 2, 4)
    quadratic = torch.randn(2, 4, factor.size, factor.size)
    mean, second, entropy = factor.mean(params), factor.second_moment(params, quadratic), factor.entropy(params)
    assert (mean.shape, second.shape, entropy.shape) == ((2, 4, factor.size), (2, 4), (2, 4))
    for i in range(2):
        for j in range(4):
            expected_mean, moments, expected_entropy = moments_of(name, factor, params[i, j])
            torch.testing.assert_close(mean[i, j], expected_mean)
            torch.testing.assert_close(second[i, j], (moments * quadratic[i, j]).sum())
            torch.testing.assert_close(entropy[i, j], expected_entropy)
    shared, linear = quadratic[0, 0], torch.randn(2, 4, factor.size)
    torch.testing.assert_close(factor.second_moment(params, shared)[0, 0], second[0, 0])
    for matrix in (quadratic, shared):
        expected = objective(factor, params, linear, matrix)
        torch.testing.assert_close(factor.objective(params, linear, matrix), expected)


@pytest.mark.parametrize("name", [*ALL, "point"])
def test_second_moments_summed_over_rows(name: str) -> None:
    factor = DeltaFactor(3, discrete=False) if name == "point" else factor_of(name)
    params, weights = random_params(factor, 5), torch.rand(5)
    if name == "point":
        moments = params[:, :, None] * params[:, None, :]
    else:
        moments = torch.stack([moments_of(name, factor, row)[1] for row in params])
    torch.testing.assert_close(factor.moment_sum(params), moments.sum(0))
    torch.testing.assert_close(factor.moment_sum(params, weights), (weights[:, None, None] * moments).sum(0))


@pytest.mark.parametrize("name", list(DISCRETE))
def test_probabilities_sum_to_one(name: str) -> None:
    factor = factor_of(name)
    states = enumerate_states(DISCRETE[name][1])
    log_q = factor.marginal(random_params(factor, 5, 1), 0, factor.size).log_prob(states)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(5))


@pytest.mark.parametrize("name", ALL)
def test_optimum_is_stationary_and_no_move_beats_it(name: str) -> None:
    factor = factor_of(name)
    linear, quadratic = random_problem(name, factor)
    best = factor.optimum(linear, quadratic).requires_grad_()
    value = objective(factor, best, linear, quadratic)
    (gradient,) = torch.autograd.grad(value.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)
    best = best.detach()
    for size in (1e-3, 0.1, 1.0, 5.0):
        for _ in range(20):
            moved = best + size * torch.randn_like(best)
            assert bool((objective(factor, moved, linear, quadratic) <= value + 1e-12).all())


@pytest.mark.parametrize("name", [*ALL, "point", "discrete point"])
def test_solve_gives_the_optimum_and_its_objective(name: str) -> None:
    factor = DeltaFactor(3, discrete=name == "discrete point") if "point" in name else factor_of(name)
    linear, quadratic = random_problem("normal" if "point" in name else name, factor)
    params, value = factor.solve(linear, quadratic)
    torch.testing.assert_close(params, factor.optimum(linear, quadratic))
    torch.testing.assert_close(value, objective(factor, params, linear, quadratic))


@pytest.mark.parametrize("name", ALL)
def test_gradient_of_the_objective_is_that_of_finite_differences(name: str) -> None:
    factor = factor_of(name)
    linear, quadratic = random_problem(name, factor)
    params = random_params(factor, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: objective(factor, p, linear, quadratic), (params,))


@pytest.mark.parametrize("name", ALL)
def test_optimum_takes_a_matrix_a_row(name: str) -> None:
    factor = factor_of(name)
    problems = [random_problem(name, factor) for _ in range(4)]
    linear, quadratic = torch.stack([p[0][0] for p in problems]), torch.stack([p[1] for p in problems])
    rows = [factor.optimum(a, b) for a, b in zip(linear, quadratic, strict=True)]
    torch.testing.assert_close(factor.optimum(linear, quadratic), torch.stack(rows))


@pytest.mark.parametrize("name", ["joint binary", "joint mixed"])
def test_joint_optimum_is_the_normalised_exponential(name: str) -> None:
    factor = factor_of(name)
    linear, quadratic = random_problem(name, factor)
    states = enumerate_states(DISCRETE[name][1])
    energy = linear @ states.mT + 0.5 * torch.einsum("sk,kl,sl->s", states, quadratic, states)
    torch.testing.assert_close(factor.optimum(linear, quadratic).softmax(-1), energy.softmax(-1))


def test_multivariate_normal_optimum_is_the_gaussian_posterior() -> None:
    factor = MultivariateNormalFactor(3)
    linear, quadratic = random_problem("multivariate normal", factor)
    fn = factor.marginal(factor.optimum(linear, quadratic), 0, 3)
    covariance = torch.linalg.inv(-quadratic)
    torch.testing.assert_close(fn.mean, linear @ covariance)
    torch.testing.assert_close(fn.covariance_matrix, covariance.expand(4, 3, 3))


@pytest.mark.parametrize("name", ["bernoulli", "one-hot", "joint binary", "joint mixed"])
def test_scores_of_a_group_give_its_normalised_exponential(name: str) -> None:
    factor = factor_of(name)
    group = factor.groups[0]
    part = factor.part(group)
    scores = torch.randn(4, 2 if name == "bernoulli" else part.num_params)
    states = enumerate_states(DISCRETE[name][1] if name in UNGROUPED else DISCRETE[name][1][:1])
    log_q = part.marginal(part.from_scores(scores)[:, None, :], 0, part.size).log_prob(states)
    torch.testing.assert_close(log_q.exp(), scores.softmax(-1))


def test_scores_of_continuous_factors_are_refused() -> None:
    with pytest.raises(TypeError, match="Expected a discrete factor, but got NormalFactor. Its states cannot be"):
        NormalFactor(2).from_scores(torch.zeros(3))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cut", [1, 2], ids=["after one unit", "after two"])
def test_marginal_times_conditional_is_the_joint(name: str, cut: int) -> None:
    factor = factor_of(name)
    units = DISCRETE[name][1] if name in DISCRETE else [1, 1, 1]
    if cut >= len(units):
        cut = 1
    stop = sum(units[:cut])
    params = random_params(factor, 4)
    whole = factor.marginal(params, 0, factor.size)
    value = whole.sample((6,))
    first = factor.marginal(params, 0, stop)
    rest = factor.conditional(params, stop, factor.size, value[..., :stop])
    joint = first.log_prob(value[..., :stop]) + rest.log_prob(value[..., stop:])
    torch.testing.assert_close(joint, whole.log_prob(value))
    alone = factor.conditional(params, 0, stop, torch.empty(0))
    torch.testing.assert_close(alone.log_prob(value[..., :stop]), first.log_prob(value[..., :stop]))


@pytest.mark.parametrize("name", ["joint binary", "joint mixed"])
def test_inner_marginals_sum_the_joint(name: str) -> None:
    factor = factor_of(name)
    units = DISCRETE[name][1]
    start, stop = units[0], units[0] + units[1]
    params = random_params(factor)
    states = enumerate_states(units)
    q = params.softmax(-1)
    inner = enumerate_states(units[1:2])
    expected = torch.stack([q[(states[:, start:stop] == s).all(-1)].sum() for s in inner])
    torch.testing.assert_close(factor.marginal(params, start, stop).log_prob(inner).exp(), expected)


def test_inner_gaussian_conditional_is_that_of_linear_algebra() -> None:
    factor = MultivariateNormalFactor(4)
    params = random_params(factor)
    mean, tril = factor.moments(params)
    covariance = tril @ tril.mT
    earlier = torch.randn(2)
    fn = factor.conditional(params, 2, 3, earlier)
    gain = covariance[2:3, :2] @ torch.linalg.inv(covariance[:2, :2])
    torch.testing.assert_close(fn.mean, mean[2:3] + gain @ (earlier - mean[:2]))
    torch.testing.assert_close(fn.covariance_matrix, covariance[2:3, 2:3] - gain @ covariance[:2, 2:3])


@pytest.mark.parametrize("name", ALL)
def test_a_part_is_the_factor_of_its_group(name: str) -> None:
    factor = factor_of(name)
    params = random_params(factor, 4)
    for group in factor.groups:
        part = factor.part(group)
        mine = params[..., factor.columns(group)]
        torch.testing.assert_close(part.mean(mine), factor.mean(params)[..., list(group)])
    entropies = [factor.part(g).entropy(params[..., factor.columns(g)]) for g in factor.groups]
    torch.testing.assert_close(sum(entropies), factor.entropy(params))
    assert sorted(i for g in factor.groups for i in g) == list(range(factor.size))


@pytest.mark.parametrize("name", ALL)
def test_initial_parameters_have_the_wanted_mean(name: str) -> None:
    factor = factor_of(name)
    mean = torch.rand(5, factor.size)
    if name == "one-hot":
        mean = mean.reshape(5, 2, 3).softmax(-1).reshape(5, 6)
    if name == "joint mixed":
        mean = torch.cat([mean[:, :1], mean[:, 1:4].softmax(-1), mean[:, 4:]], -1)
    params = factor.initial(mean, 0.1)
    torch.testing.assert_close(factor.mean(params), mean)
    if name in CONTINUOUS:
        torch.testing.assert_close(factor.marginal(params, 0, 3).variance, torch.full((5, 3), 0.01))


@pytest.mark.parametrize("name", list(DISCRETE))
def test_hard_prior_means_give_finite_parameters(name: str) -> None:
    factor = factor_of(name)
    mean = torch.zeros(factor.size)
    mean[: factor.size : max(1, len(factor.groups[0]))] = 1.0
    assert bool(torch.isfinite(factor.initial(mean, 0.1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_never_round_to_zero_or_one(dtype: torch.dtype) -> None:
    factor = BernoulliFactor(2)
    params = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    mean = factor.mean(params)
    assert bool(((mean > 0) & (mean < 1)).all())
    value = objective(factor, params, torch.tensor([3.0, -2.0], dtype=dtype), torch.eye(2, dtype=dtype))
    (gradient,) = torch.autograd.grad(value, params)
    assert math.isfinite(value.item())
    assert bool(torch.isfinite(gradient).all())
    assert bool((factor.entropy(params) > 0).all())


def test_large_entries_of_a_cholesky_factor_keep_a_finite_gradient() -> None:
    factor = MultivariateNormalFactor(2)
    params = factor.pack(torch.zeros(2), torch.tensor([[1.0, 0.0], [1e4, 1.0]])).requires_grad_()
    factor.second_moment(params, -torch.eye(2)).backward()
    assert params.grad is not None
    assert bool(torch.isfinite(params.grad).all())


@pytest.mark.parametrize("factor", [NormalFactor(2), MultivariateNormalFactor(2), DeltaFactor(2, discrete=False)])
def test_a_log_joint_without_maximum_is_refused(factor: Factor) -> None:
    with pytest.raises(ValueError, match="Expected log p.* to fall away from its maximum .* Give the latent a proper"):
        factor.optimum(torch.zeros(2), torch.tensor([[-1.0, 0.0], [0.0, 0.5]]))


def test_parts_cut_groups_at_their_ends() -> None:
    with pytest.raises(ValueError, match="Expected a part of whole groups, but got features 1 to 3. Split between"):
        OneHotFactor(2, 3).marginal(torch.zeros(6), 1, 3)


def test_discrete_points_take_the_best_state() -> None:
    units = DeltaFactor(3, discrete=True)
    linear, quadratic = torch.randn(4, 3), torch.diag(torch.randn(3))
    best = units.optimum(linear, quadratic)
    value = objective(units, best, linear, quadratic)
    for state in enumerate_states([1, 1, 1]):
        assert bool((objective(units, state.expand(4, 3), linear, quadratic) <= value).all())
    groups = DeltaFactor(6, 3, discrete=True)
    linear = torch.randn(4, 6)
    value = objective(groups, groups.optimum(linear, torch.zeros(6, 6)), linear, torch.zeros(6, 6))
    for state in enumerate_states([3, 3]):
        assert bool(((linear * state).sum(-1) <= value).all())
    assert units.initial(torch.tensor([0.2, 0.7, 0.5]), 0.1).tolist() == [0, 1, 0]
    assert groups.initial(torch.tensor([0.2, 0.7, 0.1, 0.5, 0.3, 0.2]), 0.1).tolist() == [0, 1, 0, 1, 0, 0]


def test_points_are_their_mean_and_have_no_entropy() -> None:
    factor = DeltaFactor(3, discrete=False)
    point, quadratic = torch.randn(2, 3), torch.randn(3, 3)
    assert torch.equal(factor.mean(point), point)
    assert torch.equal(factor.initial(point, 0.1), point)
    torch.testing.assert_close(
        factor.second_moment(point, quadratic), torch.einsum("nk,kl,nl->n", point, quadratic, point)
    )
    assert factor.entropy(point).tolist() == [0, 0]
    linear, quadratic = torch.randn(2, 3), -torch.diag(torch.rand(3) + 0.5)
    best = factor.optimum(linear, quadratic)
    torch.testing.assert_close(linear + best @ quadratic, torch.zeros(2, 3))
    part = factor.conditional(point, 1, 3, point[:, :1])
    assert isinstance(part, PointMass)
    assert torch.equal(part.mean, point[:, 1:])
    assert factor.part((0,)).size == 1


@pytest.mark.parametrize(
    ("unit", "scores", "best"), [(1, [0.3, 0.1], [0.0]), (1, [0.1, 0.3], [1.0]), (3, [1, 5, 2], [0, 1, 0])]
)
def test_point_of_scores_is_the_best_state(unit: int, scores: list[float], best: list[float]) -> None:
    assert (
        DeltaFactor(unit, unit, discrete=True).from_scores(torch.tensor(scores, dtype=torch.float64)).tolist() == best
    )


@pytest.mark.parametrize("name", ALL)
def test_no_features_are_more_probable_than_the_mode(name: str) -> None:
    factor = factor_of(name)
    params = random_params(factor, 4)
    mode = factor.mode(params)
    assert mode.shape == (4, factor.size)
    fn = factor.marginal(params, 0, factor.size)
    best = fn.log_prob(mode)
    if name in DISCRETE:
        states = enumerate_states(DISCRETE[name][1])[:, None]
        torch.testing.assert_close(best, fn.log_prob(states.expand(-1, 4, -1)).amax(0))
    else:
        for _ in range(20):
            assert bool((fn.log_prob(mode + 0.1 * torch.randn_like(mode)) <= best).all())


# ------------------------------------------------------------------------------------- divergences


def kl_of(name: str, factor: Factor, target: Tensor, params: Tensor) -> Tensor:
    """KL(q_target || q_params) of parameter vectors, by torch, or by enumeration where it has no such family."""
    if name in CONTINUOUS:
        q, p = (factor.marginal(x, 0, factor.size) for x in (target, params))
        return torch.distributions.kl_divergence(q, p)
    if name == "bernoulli":
        q, p = (torch.distributions.Bernoulli(logits=x) for x in (target, params))
        return torch.distributions.kl_divergence(q, p).sum(-1)
    if name == "one-hot":
        q, p = (torch.distributions.OneHotCategorical(logits=x.unflatten(-1, (2, 3))) for x in (target, params))
        return torch.distributions.kl_divergence(q, p).sum(-1)
    q, p = (torch.distributions.Categorical(logits=x) for x in (target, params))
    return torch.distributions.kl_divergence(q, p)


@pytest.mark.parametrize("name", ALL)
def test_divergence_is_the_kl_of_the_two(name: str) -> None:
    factor = factor_of(name)
    target, params = random_params(factor, 4), random_params(factor, 5, 4)
    found = factor.divergence(target, params)
    assert found.shape == (5, 4)
    torch.testing.assert_close(found, kl_of(name, factor, target.expand_as(params), params))
    assert bool((found > 0).all())
    torch.testing.assert_close(factor.divergence(params, params), torch.zeros(5, 4), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", list(DISCRETE))
def test_divergence_of_discrete_families_by_enumeration(name: str) -> None:
    factor = factor_of(name)
    target, params = random_params(factor), random_params(factor)
    states = enumerate_states(DISCRETE[name][1])
    log_q, log_p = (factor.marginal(x, 0, factor.size).log_prob(states) for x in (target, params))
    torch.testing.assert_close(factor.divergence(target, params), (log_q.exp() * (log_q - log_p)).sum())


@pytest.mark.parametrize("name", [*ALL, "point"])
def test_gradient_of_the_divergence_is_that_of_finite_differences(name: str) -> None:
    factor = DeltaFactor(3, discrete=False) if name == "point" else factor_of(name)
    target, params = random_params(factor, 4), random_params(factor, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: factor.divergence(target, p), (params,))


def test_divergence_of_points_is_half_the_squared_distance() -> None:
    factor = DeltaFactor(2, discrete=False)
    assert factor.divergence(torch.tensor([[3.0, 4.0]]), torch.zeros(5, 1, 2)).tolist() == [[12.5]] * 5


def test_divergence_of_almost_equal_scales_is_not_lost_to_rounding() -> None:
    factor = NormalFactor(1)
    found = factor.divergence(torch.tensor([0.0, 1e-9]), torch.zeros(2))
    # KL = d^2 + O(d^3) in the logarithm d of the ratio of scales.
    assert found.item() == pytest.approx(1e-18, rel=1e-3, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_of_saturated_units_is_finite_and_leads_back(dtype: torch.dtype) -> None:
    factor = BernoulliFactor(2)
    params = torch.tensor([80.0, -80.0], dtype=dtype, requires_grad=True)
    value = factor.divergence(torch.tensor([-200.0, 200.0], dtype=dtype), params)
    assert value.item() == pytest.approx(160, abs=1e-3)
    (gradient,) = torch.autograd.grad(value, params)
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1.0], dtype=dtype), atol=1e-6, rtol=0)
    infinite = factor.divergence(torch.tensor([-math.inf, math.inf], dtype=dtype), params)
    torch.testing.assert_close(infinite, value)


def test_families_without_a_divergence_say_so() -> None:
    chain = MarkovChainFactor([2], 3, homogeneous=False)
    with pytest.raises(
        TypeError, match="Expected a family with a divergence in closed form, but got MarkovChainFactor"
    ):
        chain.divergence(torch.zeros(chain.num_params), torch.zeros(chain.num_params))
    with pytest.raises(TypeError, match="Expected continuous points for a squared distance, but got discrete ones"):
        DeltaFactor(2, discrete=True).divergence(torch.zeros(2), torch.ones(2))
