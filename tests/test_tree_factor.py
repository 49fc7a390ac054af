"""Tree factors against enumeration of all joint states, and against joint factors with the same distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyro_ext.discrete_factors import JointFactor
from pyro_ext.forest import parents_of
from pyro_ext.tree_distribution import TreeDistribution
from pyro_ext.tree_factor import TreeFactor

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""

TREES: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "chain": ([1, 1, 1, 1], [(0, 1), (1, 2), (2, 3)]),
    "chain out of order": ([1, 1, 1, 1], [(3, 1), (1, 0), (0, 2)]),
    "star": ([1, 1, 1, 1, 1], [(2, 0), (2, 1), (2, 3), (2, 4)]),
    "tree of mixed units": ([1, 3, 1, 4, 1], [(0, 1), (1, 2), (1, 3), (3, 4)]),
    "forest": ([1, 1, 3, 1, 1], [(0, 3), (2, 4)]),
    "no edges": ([1, 3, 1], []),
    "one edge": ([3, 1], [(0, 1)]),
    "one unit": ([3], []),
}


def factor_of(name: str) -> TreeFactor:
    units, edges = TREES[name]
    return TreeFactor(units, parents_of(len(units), edges))


def joint_states(units: list[int]) -> tuple[list[tuple[int, ...]], Tensor]:
    """All joint states, as numbers and as features (S, size)."""
    numbers = list(itertools.product(*(range(2 if size == 1 else size) for size in units)))
    bits = [[0], [1]]
    rows = []
    for state in numbers:
        parts = [
            bits[c] if size == 1 else [int(i == c) for i in range(size)] for size, c in zip(units, state, strict=True)
        ]
        rows.append([x for part in parts for x in part])
    return numbers, torch.tensor(rows, dtype=torch.get_default_dtype())


def enumerate_tree(name: str, params: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all states (S, size) and q of each, (R, S): the product of the softmaxed tables."""
    units, edges = TREES[name]
    parents = parents_of(len(units), edges)
    numbers, features = joint_states(units)
    counts = [2 if size == 1 else size for size in units]
    probs, start = torch.ones(len(params), len(numbers)), 0
    for unit, parent in enumerate(parents):
        rows = 1 if parent < 0 else counts[parent]
        table = params[:, start : start + rows * counts[unit]].reshape(-1, rows, counts[unit]).softmax(-1)
        start += rows * counts[unit]
        probs = probs * torch.stack([table[:, 0 if parent < 0 else s[parent], s[unit]] for s in numbers], -1)
    assert start == params.shape[-1]
    return features, probs


def on_edges(name: str, quadratic: Tensor) -> Tensor:
    """Q with the couplings off the tree left out."""
    units, edges = TREES[name]
    owner = [unit for unit, size in enumerate(units) for _ in range(size)]
    near = {(unit, unit) for unit in owner} | {pair for a, b in edges for pair in ((a, b), (b, a))}
    keep = torch.tensor([[(a, b) in near for b in owner] for a in owner])
    return quadratic * keep


def symmetric(*shape: int) -> Tensor:
    root = torch.randn(*shape, shape[-1])
    return root + root.mT


@pytest.mark.parametrize(
    ("edges", "parents"),
    [
        ([(1, 0), (1, 2)], (-1, 0, 1, -1)),
        ([(3, 1), (2, 3)], (-1, -1, 3, 1)),
        ([], (-1, -1, -1, -1)),
        ([(0, 1), (0, 2), (0, 3)], (-1, 0, 0, 0)),
    ],
)
def test_every_tree_is_rooted_at_its_first_unit(edges: list[tuple[int, int]], parents: tuple[int, ...]) -> None:
    assert parents_of(4, edges) == parents


@pytest.mark.parametrize("name", TREES)
def test_moments_and_entropy_are_those_of_all_states(name: str) -> None:
    factor = factor_of(name)
    params = torch.randn(4, factor.num_params)
    states, q = enumerate_tree(name, params)
    torch.testing.assert_close(q.sum(-1), torch.ones(4))
    torch.testing.assert_close(factor.mean(params), q @ states)
    torch.testing.assert_close(factor.entropy(params), -(q * q.log()).sum(-1))
    pairs = torch.einsum("rs,sk,sl->rkl", q, states, states)
    quadratic = torch.randn(4, factor.size, factor.size)
    torch.testing.assert_close(factor.second_moment(params, quadratic), (pairs * quadratic).sum((-1, -2)))
    torch.testing.assert_close(factor.second_moment(params, quadratic[0]), (pairs * quadratic[0]).sum((-1, -2)))
    torch.testing.assert_close(factor.moment_sum(params), pairs.sum(0))
    weights = torch.rand(4)
    torch.testing.assert_close(factor.moment_sum(params, weights), torch.einsum("r,rkl->kl", weights, pairs))


@pytest.mark.parametrize("name", TREES)
def test_every_conditional_and_marginal_is_that_of_all_states(name: str) -> None:
    factor = factor_of(name)
    units, _ = TREES[name]
    params = torch.randn(3, factor.num_params)
    states, q = enumerate_tree(name, params)
    starts = [sum(units[:unit]) for unit in range(len(units) + 1)]
    for first, last in itertools.combinations(range(len(starts)), 2):
        start, stop = starts[first], starts[last]
        _, parts = joint_states(units[first:last])
        same = (states[:, None, start:stop] == parts).all(-1).to(q)
        marginal = factor.marginal(params, start, stop)
        torch.testing.assert_close(marginal.log_prob(parts[:, None]).exp().mT, q @ same)
        torch.testing.assert_close(marginal.mean, q @ states[:, start:stop])
        torch.testing.assert_close(marginal.entropy(), -torch.xlogy(q @ same, q @ same).sum(-1))
        _, befores = joint_states(units[:first])
        for before in befores:
            given = q * (states[:, :start] == before).all(-1)
            expected = given @ same / given.sum(-1, keepdim=True)
            conditional = factor.conditional(params, start, stop, before.expand(3, start))
            torch.testing.assert_close(conditional.log_prob(parts[:, None]).exp().mT, expected)


@pytest.mark.parametrize("name", ["chain out of order", "tree of mixed units", "forest"])
def test_draws_have_the_frequencies_of_all_states(name: str) -> None:
    factor = factor_of(name)
    params = 0.5 * torch.randn(2, factor.num_params)
    states, q = enumerate_tree(name, params)
    S = 20_000
    fn = factor.marginal(params, 0, factor.size)
    assert isinstance(fn, TreeDistribution)
    draws = fn.sample(torch.Size([S]))
    assert draws.shape == (S, 2, factor.size)
    frequency = torch.stack([(draws == state).all(-1).double().mean(0) for state in states], -1)
    torch.testing.assert_close(frequency.sum(-1), torch.ones(2))
    assert bool(((frequency - q).abs() <= K * (q * (1 - q) / S).sqrt() + 1e-12).all())
    wide = fn.expand((3, 2))
    assert wide.sample((5,)).shape == (5, 3, 2, factor.size)
    torch.testing.assert_close(wide.log_prob(states[-1]), q[:, -1].log().expand(3, 2))


@pytest.mark.parametrize("name", TREES)
def test_a_start_has_the_wanted_means_and_no_dependence(name: str) -> None:
    factor = factor_of(name)
    units, _ = TREES[name]
    mean = torch.cat([torch.rand(5, 1) if size == 1 else torch.rand(5, size).softmax(-1) for size in units], -1)
    params = factor.initial(mean, 0.1)
    torch.testing.assert_close(factor.mean(params), mean)
    states, q = enumerate_tree(name, params)
    owner = torch.tensor([unit for unit, size in enumerate(units) for _ in range(size)])
    pairs = torch.einsum("rs,sk,sl->rkl", q, states, states)
    apart = owner[:, None] != owner
    torch.testing.assert_close(pairs[:, apart], (mean[:, :, None] * mean[:, None, :])[:, apart])
    hard = torch.zeros(factor.size)
    assert bool(factor.initial(hard, 0.1).isfinite().all())


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("rows", [True, False], ids=["a matrix a row", "one matrix"])
def test_the_optimum_on_edges_is_the_normalised_exponential(name: str, rows: bool) -> None:
    factor = factor_of(name)
    units, _ = TREES[name]
    linear = 2 * torch.randn(4, factor.size)
    quadratic = on_edges(name, 2 * symmetric(4, factor.size) if rows else 2 * symmetric(factor.size))
    assert factor.is_exact_for(quadratic)
    best = factor.optimum(linear, quadratic)
    joint = JointFactor(units)
    table, value = joint.solve(linear, quadratic)
    torch.testing.assert_close(enumerate_tree(name, best)[1], table.softmax(-1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(factor.objective(best, linear, quadratic), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.solve(linear, quadratic)[1], value, rtol=1e-10, atol=1e-10)
    # Where the optimum has a closed form, it does not matter where an improvement starts.
    torch.testing.assert_close(factor.improve(torch.randn_like(best), linear, quadratic), best)


OFF_TREE = ["chain", "chain out of order", "star", "tree of mixed units", "forest", "no edges"]


@pytest.mark.parametrize("name", OFF_TREE)
def test_sweeps_off_the_tree_never_lower_the_objective_and_end_at_a_maximum(name: str) -> None:
    factor = factor_of(name)
    units, _ = TREES[name]
    linear, quadratic = torch.randn(6, factor.size), 2 * symmetric(6, factor.size)
    assert not factor.is_exact_for(quadratic)
    params = 2 * torch.randn(6, factor.num_params)
    value = factor.objective(params, linear, quadratic)
    for _ in range(120):
        params = factor.improve(params, linear, quadratic)
        new = factor.objective(params, linear, quadratic)
        assert bool((new >= value - 1e-12 * (1 + value.abs())).all())
        value = new
    for end in (params, factor.optimum(linear, quadratic)):
        moving = end.detach().requires_grad_()
        value = factor.objective(moving, linear, quadratic)
        (gradient,) = torch.autograd.grad(value.sum(), moving)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-8, rtol=0)
        for size in (1e-3, 1e-2, 0.1):
            for _ in range(20):
                moved = end + size * torch.randn_like(end)
                assert bool((factor.objective(moved, linear, quadratic) <= value + 1e-10).all())
        assert bool((value <= JointFactor(units).solve(linear, quadratic)[1] + 1e-10).all())


@pytest.mark.parametrize("name", [*OFF_TREE, "one edge"])
def test_sweeps_over_scores_are_those_over_couplings(name: str) -> None:
    """Two routes: expectations by one pass over the tree, and by a score for every joint state."""
    factor = factor_of(name)
    units, _ = TREES[name]
    linear, quadratic = torch.randn(3, factor.size), symmetric(3, factor.size)
    states = joint_states(units)[1]
    scores = linear @ states.mT + 0.5 * torch.einsum("sk,rkl,sl->rs", states, quadratic, states)
    params = torch.randn(3, factor.num_params)
    torch.testing.assert_close(
        factor.improve_scores(params, scores), factor.improve(params, linear, quadratic), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", TREES)
def test_the_best_tree_for_scores_of_any_form(name: str) -> None:
    factor = factor_of(name)
    scores = 2 * torch.randn(4, len(joint_states(TREES[name][0])[0]))

    def objective(params: Tensor) -> Tensor:
        q = enumerate_tree(name, params)[1]
        return (q * scores - torch.xlogy(q, q)).sum(-1)

    best = factor.from_scores(scores).requires_grad_()
    value = objective(best)
    (gradient,) = torch.autograd.grad(value.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-8, rtol=0)
    assert bool((value <= scores.logsumexp(-1) + 1e-10).all())
    if factor.is_exact_for(None):
        torch.testing.assert_close(value, scores.logsumexp(-1))
    params = torch.randn_like(best)
    value = objective(params)
    for _ in range(20):
        params = factor.improve_scores(params, scores)
        assert bool((objective(params) >= value - 1e-12 * (1 + value.abs())).all())
        value = objective(params)


def test_only_a_tree_that_joins_all_pairs_holds_any_scores() -> None:
    assert {name for name in TREES if factor_of(name).is_exact_for(None)} == {"one edge", "one unit"}


@pytest.mark.parametrize("name", TREES)
def test_the_gradient_of_the_objective_is_that_of_finite_differences(name: str) -> None:
    factor = factor_of(name)
    linear, quadratic = torch.randn(2, factor.size), symmetric(factor.size)
    params = torch.randn(2, factor.num_params).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: factor.objective(p, linear, quadratic), (params,))


@pytest.mark.parametrize("name", ["tree of mixed units", "forest"])
@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor([0.0, 0.5, 1.0])], ids=["0", "0.3", "a number a row"])
def test_natural_parameters_are_interpolated(name: str, damping: float | Tensor) -> None:
    factor = factor_of(name)
    old, new = torch.randn(2, 3, factor.num_params)
    found = enumerate_tree(name, factor.interpolate(old, new, damping))[1]
    share = damping[:, None] if isinstance(damping, Tensor) else damping
    before, after = (enumerate_tree(name, params)[1].log() for params in (old, new))
    torch.testing.assert_close(found, (share * before + (1 - share) * after).softmax(-1))


def test_a_long_chain_costs_no_more_than_its_units() -> None:
    """200 units that are all but forced to agree have 2^200 states, of which two count."""
    factor = TreeFactor([1] * 200, parents_of(200, [(i, i + 1) for i in range(199)]))
    linear, quadratic = torch.full((2, 200), -60.0), torch.zeros(200, 200)
    index = torch.arange(199)
    quadratic[index, index + 1] = quadratic[index + 1, index] = 60.0
    # The scores of all off and all on are 0 and 0.6, or 0 and -2; each pair that disagrees costs 30.
    linear[:, [0, -1]] = torch.tensor([[-29.7, -29.7], [-31.0, -31.0]])
    best = factor.optimum(linear, quadratic)
    expected = torch.tensor([0.6, -2.0]).sigmoid()
    torch.testing.assert_close(factor.mean(best), expected[:, None].expand(2, 200), atol=1e-9, rtol=0)
    torch.testing.assert_close(factor.second_moment(best, torch.ones(200, 200)), 200.0**2 * expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 3)], r"Expected edges between units 0 to 2 of the tree, but got \(0, 3\)\. Count the tree's units"),
        ([(-1, 0)], r"Expected edges between units 0 to 2 of the tree, but got \(-1, 0\)\."),
        ([(0, 1), (1, 2), (2, 0)], r"Expected edges that make a tree, but got \(2, 0\), which closes a cycle\. Leave"),
        ([(0, 1), (1, 0)], r"Expected edges that make a tree, but got \(1, 0\), which closes a cycle"),
        ([(1, 1)], r"Expected edges that make a tree, but got \(1, 1\), which closes a cycle"),
    ],
)
def test_edges_that_make_no_tree_are_refused(edges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parents_of(3, edges)


def test_parts_of_units_are_refused() -> None:
    factor = factor_of("tree of mixed units")
    params = torch.zeros(factor.num_params)
    with pytest.raises(ValueError, match=r"Expected a part of whole units, but got features 0 to 2\. Split between"):
        factor.marginal(params, 0, 2)
    with pytest.raises(ValueError, match=r"Expected features after 10 in a tree of 10, but got none\. Ask for fewer"):
        factor.conditional(params, 10, 10, torch.zeros(10))


def test_the_entropy_of_a_wide_part_is_refused() -> None:
    factor = TreeFactor([1] * 20, parents_of(20, [(i, i + 1) for i in range(19)]))
    with pytest.raises(ValueError, match="at most 65536 states of a part of a tree for its entropy, but got 18 units"):
        factor.marginal(torch.zeros(factor.num_params), 0, 18).entropy()
