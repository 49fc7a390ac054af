"""Blocks and trees that a structured guide finds from the couplings of a program, against enumeration."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam

from pyro_ext import EM, FixedPoint, Gradient
from pyro_ext.discrete_factors import JointFactor
from pyro_ext.fixed_point import BoundChange
from pyro_ext.guides import MeanField, Structured, Tree
from pyro_ext.guides.found_blocks import Couplings, find_couplings, strongest_blocks, strongest_forest
from pyro_ext.models import BinarySparseCoding
from pyro_ext.program import Program
from pyro_ext.tree_factor import TreeFactor
from tests.oracles.enumeration import log_evidence, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------------- strengths


def mixed(v):
    """Binary, one-hot and dependent binary units; the noise differs from row to row."""
    W, U = torch.tensor([[1.0, -0.5], [0.3, 0.9]]), torch.tensor([[0.2, 1.0], [-1.0, 0.4], [0.6, 0.6]])
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.8])).to_event(1))
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        scale = 0.5 + torch.arange(len(v)).unsqueeze(-1)
        pyro.sample("v", dist.Normal(a @ W + k @ U, scale).to_event(1), obs=v)


def interaction(table, first, second):
    """Standard deviation under a product of (first, second) of what neither unit explains alone, from (I, J)."""
    table = table - (first @ table)[None, :]
    table = table - (table @ second)[:, None]
    return float((first @ table.square() @ second).sqrt())


def test_a_strength_is_the_spread_of_the_interaction_under_the_prior():
    v = torch.randn(3, 2)
    found = find_couplings(Program(mixed, (v,), {}))
    assert (found.units, found.counts) == ([("a", 0), ("a", 1), ("k", 0)], [2, 2, 3])
    states = {"a": torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), "k": torch.eye(3)}
    grid = {
        "a": states["a"].repeat_interleave(3, 0).unsqueeze(1),
        "k": states["k"].repeat(4, 1).unsqueeze(1),
    }
    log_joint = program_log_joint(mixed, grid, v).reshape(2, 2, 3, 3)  # a0, a1, k, row
    prior = [torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8]), torch.tensor([0.2, 0.5, 0.3])]
    tables = {(0, 1): log_joint[:, :, 0], (0, 2): log_joint[:, 0], (1, 2): log_joint[0]}
    expected = torch.zeros(3, 3)
    for (i, j), table in tables.items():
        each = [interaction(table[..., row], prior[i], prior[j]) for row in range(3)]
        expected[i, j] = expected[j, i] = math.sqrt(sum(x**2 for x in each) / 3)
    torch.testing.assert_close(found.strength, expected)


def test_priors_that_depend_on_a_latent_count_as_even():
    def program(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            c = pyro.sample("c", dist.Bernoulli(0.9 + 0 * a))
            pyro.sample("v", dist.Normal(a + c, 0.5), obs=v)

    found = find_couplings(Program(program, (torch.zeros(2),), {}))
    torch.testing.assert_close(found.strength[0, 1], torch.tensor(4 * math.sqrt(0.3 * 0.7) * 0.5))


def test_half_a_squared_strength_is_the_mutual_information_of_a_weak_coupling():
    coupling, p = 0.02, torch.tensor([0.3, 0.6])

    def program(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(p[0]))
            c = pyro.sample("c", dist.Bernoulli(p[1]))
            pyro.factor("coupling", coupling * (a - p[0]) * (c - p[1]))
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    a = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    c = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    v = torch.zeros(1)
    q = program_log_joint(program, {"a": a, "c": c}, v).softmax(0).reshape(2, 2)
    product = q.sum(1, keepdim=True) * q.sum(0, keepdim=True)
    information = float((q * (q / product).log()).sum())
    strength = float(find_couplings(Program(program, (v,), {})).strength[0, 1])
    assert strength**2 / 2 == pytest.approx(information, rel=0.02)


def test_the_strength_of_real_units_is_their_partial_correlation():
    W = torch.randn(3, 4)

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, torch.tensor([1.0, 2.0, 0.1])).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 0.7).to_event(1), obs=v)

    precision = torch.diag(torch.tensor([1.0, 0.25, 100.0])) + W @ W.mT / 0.49
    scale = precision.diagonal().rsqrt()
    expected = (precision * scale[:, None] * scale).abs()
    found = find_couplings(Program(program, (torch.randn(5, 4),), {})).strength
    torch.testing.assert_close(found, expected - torch.eye(3))


def test_units_of_different_plates_or_kinds_are_never_coupled():
    def program(v):
        with pyro.plate("data", 3, dim=-2):
            a = pyro.sample("a", dist.Bernoulli(0.5).expand([2]).to_event(1))
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 2, dim=-1):
                w = pyro.sample("w", dist.Bernoulli(0.5).expand([2]).to_event(1))
                pyro.sample("v", dist.Normal(a.sum(-1) + x + w @ torch.tensor([1.0, 3.0]), 1.0), obs=v)

    v = torch.randn(3, 2)
    found = find_couplings(Program(program, (v,), {}))
    expected = torch.zeros(5, 5)
    # Two observations a row see "a", one each element of "w".
    expected[0, 1] = expected[1, 0] = 2 / 4
    expected[3, 4] = expected[4, 3] = 3 / 4
    torch.testing.assert_close(found.strength, expected)
    guide = Structured(program, max_block_size=4)
    guide.setup(v)
    assert guide.block_entries == [[("a", [0, 1])], [("w", [0, 1])]]
    assert guide.table(guide.blocks[1]).shape == (3, 2, 4)


# ------------------------------------------------------------------------------------- blocks


def couplings_of(pairs, num_units, counts=2):
    strength = torch.zeros(num_units, num_units)
    for (i, j), value in pairs.items():
        strength[i, j] = strength[j, i] = value
    return Couplings([("h", i) for i in range(num_units)], [counts] * num_units, [0] * num_units, strength)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, []), (2, [[0, 2], [1, 4]]), (3, [[0, 2], [1, 3, 4]]), (4, [[0, 1, 2, 4]]), (5, [[0, 1, 2, 3, 4]])],
)
def test_the_strongest_pairs_are_joined_first(size, expected):
    """After 0-2 and 1-4, at 4 units the sum of squares 0-1 and 2-4 beats 3-4."""
    pairs = {(0, 2): 5.0, (1, 4): 4.0, (0, 1): 1.0, (2, 4): 1.0, (3, 4): 1.2}
    found = strongest_blocks(couplings_of(pairs, 6), size, 2**16)
    assert found == [[("h", unit) for unit in block] for block in expected]


def test_blocks_capture_as_much_as_the_best_partition_into_pairs_of_a_clear_case():
    strength = torch.rand(6, 6) * 0.1
    for i, j in [(0, 4), (1, 3), (2, 5)]:
        strength[i, j] = 1 + torch.rand(())
    pairs = {(i, j): float(strength[i, j]) for i, j in itertools.combinations(range(6), 2)}
    found = strongest_blocks(couplings_of(pairs, 6), 2, 4)
    assert found == [[("h", 0), ("h", 4)], [("h", 1), ("h", 3)], [("h", 2), ("h", 5)]]


def sparse_coding(columns, num_visible=8):
    model = BinarySparseCoding(num_visible, columns.shape[1])
    with torch.no_grad():
        model.W.copy_(columns)
        model.b.fill_(-1.5)
    model.beta = torch.full((num_visible,), 4.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_components_are_not_coupled(dtype):
    """Figure 19.1's caption: in pPCA with orthogonal columns nothing has to be explained away."""
    torch.set_default_dtype(dtype)
    W = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].mT * torch.tensor([[3.0], [1.0], [0.3]])
    W = W.to(dtype)

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 0.5).to_event(1), obs=v)

    v = torch.randn(20, 8)
    guide = Structured(program, max_block_size=3)
    losses = []
    for q in (guide, MeanField(program)):
        e_step = FixedPoint(criterion=BoundChange(0.0), max_sweeps=3)
        losses.append(EM(program, q, e_step=e_step, m_step=None).step(v))
    assert guide.block_entries == []
    assert [type(block.factor).__name__ for block in guide.blocks] == ["NormalFactor"]
    covariance = W.double().mT @ W.double() + 0.25 * torch.eye(8, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance)
    exact = -float(normal.log_prob(v.double()).sum())
    assert losses == pytest.approx([exact, exact], rel=1e-10 if dtype == torch.float64 else 1e-5)


def test_slanted_components_are_joined_and_exact():
    W = torch.randn(3, 8)

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 0.5).to_event(1), obs=v)

    v = torch.randn(20, 8)
    guide = Structured(program, max_block_size=3)
    loss = EM(program, guide, e_step=FixedPoint(), m_step=None).step(v)
    assert guide.block_entries == [[("h", [0, 1, 2])]]
    normal = torch.distributions.MultivariateNormal(torch.zeros(8), W.mT @ W + 0.25 * torch.eye(8))
    assert loss == pytest.approx(-float(normal.log_prob(v).sum()), rel=1e-10)


def nearly_parallel(pairs, num_latents=6, num_visible=10):
    """Orthogonal columns, but for some that are nearly copies of others."""
    columns = 2 * torch.linalg.qr(torch.randn(num_visible, num_visible))[0][:, :num_latents]
    for i, j in pairs:
        columns[:, j] = columns[:, i] + 0.1 * torch.randn(num_visible)
    return columns


@pytest.mark.parametrize("pairs", [[(0, 5)], [(1, 4), (2, 3)], [(3, 0), (5, 1), (2, 4)]])
def test_nearly_parallel_columns_are_found(pairs):
    model = sparse_coding(nearly_parallel(pairs), 10)
    guide = Structured(model, max_block_size=2)
    guide.setup(torch.randn(7, 10))
    found = [units for ((_, units),) in guide.block_entries]
    strongest = sorted(sorted(pair) for pair in pairs)
    # Their slant couples the others weakly: these may be joined too.
    assert [units for units in found if units in strongest] == strongest


def test_found_blocks_stay_while_theta_moves_and_may_be_found_anew():
    model = sparse_coding(nearly_parallel([(0, 5)]), 10)
    v, w = torch.randn(7, 10), torch.randn(3, 10)
    guide = Structured(model, max_block_size=2)
    assert guide.block_entries is None
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    em.infer(w)  # looks at data, and leaves no trace
    assert not guide.is_set_up
    guide.setup(v)
    old = [[("h", [0, 5])]]
    assert guide.block_entries[:1] == old == guide.find_blocks(v)[:1]
    assert "max_block_size=2, blocks=[[('h', [0, 5])]" in repr(guide)
    blocks = guide.blocks
    with torch.no_grad():
        model.W.copy_(nearly_parallel([(1, 3)]))
    em.step(v)
    assert em.infer(w).blocks[0].parts[0][1] == (0, 5)
    assert guide.blocks is blocks
    new = guide.find_blocks(v)
    assert [("h", [1, 3])] in new
    assert [("h", [0, 5])] not in new
    other = Structured(model, blocks=new)
    other.setup(v)
    assert other.block_entries == new
    again = Structured(model, max_block_size=2)
    again.setup(v)
    assert again.block_entries == new


def test_a_block_of_one_is_mean_field():
    model, v = sparse_coding(torch.randn(8, 4)), torch.randn(6, 8)
    guides = Structured(model, max_block_size=1), MeanField(model)
    losses = [EM(model, guide, e_step=FixedPoint(), m_step=None).step(v) for guide in guides]
    assert losses[0] == losses[1]
    assert guides[0].block_entries == []


def test_a_block_of_all_coupled_units_is_the_exact_posterior():
    model, v = sparse_coding(torch.randn(8, 4)), torch.randn(6, 8)
    guide = Structured(model, max_block_size=4)
    loss = EM(model, guide, e_step=FixedPoint(), m_step=None).step(v)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    exact = log_evidence(program_log_joint(model, {"h": states.unsqueeze(1)}, v)).sum().detach()
    assert loss == pytest.approx(-float(exact), rel=1e-10)


# ------------------------------------------------------------------------------------- trees


EFFECTS = [("h", 0, "h", 1), ("h", 1, "h", 2), ("h", 1, "h", 3), ("h", 3, "g", 0), ("g", 0, "h", 4)]
"""Each effect has two causes; the causes make a tree."""


def effects(v):
    """Five binary causes at one site, one at another, and an effect of every pair along a tree."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.2, 0.6, 0.4, 0.3, 0.5])).to_event(1))
        g = pyro.sample("g", dist.Bernoulli(0.35))
        value = {("h", i): h[..., i] for i in range(5)} | {("g", 0): g}
        loc = torch.stack([value[a, i] + 0.9 * value[b, j] for a, i, b, j in EFFECTS], -1)
        pyro.sample("v", dist.Normal(loc, 0.4).to_event(1), obs=v)


def effect_states():
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    return states, {"h": states[:, None, :5], "g": states[:, None, 5]}


TRUE_EDGES = [(0, 1), (1, 2), (1, 3), (3, 5), (5, 4)]
V = torch.tensor(
    [[1.0, 0.9, 1.0, 0.1, 0.9], [1.9, 0.2, 1.0, 1.5, 1.0], [0.4, 1.2, 1.1, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize(
    "tree",
    [
        Tree(["h", "g"], edges=TRUE_EDGES),
        Tree(["g", ("h", [4, 3, 1, 0, 2])], edges=[(0, 1), (0, 2), (2, 3), (3, 4), (5, 3)]),
        Tree(["h", "g"]),
        Tree([("h", [2, 0, 1]), "g", ("h", [4, 3])]),
    ],
    ids=["edges given", "in another order", "edges found", "found in another order"],
)
def test_the_true_tree_is_the_exact_posterior(tree):
    guide = Structured(effects, blocks=[tree])
    em = EM(effects, guide, e_step=FixedPoint(max_sweeps=1), m_step=None)
    loss = em.step(V)
    states, values = effect_states()
    log_joint = program_log_joint(effects, values, V)
    assert loss == pytest.approx(-float(log_evidence(log_joint).sum()), rel=1e-10)
    assert em.evaluate_loss(V) == pytest.approx(loss, rel=1e-10)
    assert em.call(V).evaluator().exact_posterior
    posterior = guide.posterior(V)
    expected = log_joint.softmax(0)
    found = posterior.log_prob({name: x.expand((64, 4) + x.shape[2:]) for name, x in values.items()})
    torch.testing.assert_close(found.exp(), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(posterior["h"].mean, expected.mT @ states[:, :5], atol=1e-8, rtol=0)
    torch.testing.assert_close(posterior["g"].mean, expected.mT @ states[:, 5], atol=1e-8, rtol=0)
    second = torch.einsum("sn,sk,sl->kl", expected, states[:, :5], states[:, :5])
    torch.testing.assert_close(posterior["h"].gram(), second, atol=1e-8, rtol=0)
    (block,) = guide.block_entries
    assert sorted(block.edges) == sorted((min(e), max(e)) for e in TRUE_EDGES)
    assert block.entries == [("h", (0, 1, 2, 3, 4)), ("g", (0,))]


def test_mean_field_and_a_table_of_pairs_lie_below_the_tree():
    exact = float(log_evidence(program_log_joint(effects, effect_states()[1], V)).sum())
    bounds = []
    for guide in (MeanField(effects), Structured(effects, max_block_size=2), Structured(effects, blocks=[Tree(["h"])])):
        e_step = FixedPoint(criterion=BoundChange(1e-12), max_sweeps=500)
        bounds.append(-EM(effects, guide, e_step=e_step, m_step=None).step(V))
    assert bounds[0] < bounds[1] - 0.05
    assert bounds[1] < exact - 0.05
    assert bounds[0] < bounds[2] - 0.05 < exact - 0.1


def test_a_chain_joins_its_units_in_the_order_in_which_they_are_listed():
    guide = Structured(effects, blocks=[Tree.chain([("h", [4, 2]), "g", ("h", [0])])])
    guide.setup(V)
    tree = next(block for block in guide.blocks if isinstance(block.factor, TreeFactor))
    # In the order of the program: h0, h2, h4, g.
    assert guide.block_entries[0].entries == [("h", (0, 2, 4)), ("g", (0,))]
    assert sorted(guide.block_entries[0].edges) == [(0, 3), (1, 2), (1, 3)]
    assert guide.table(tree).shape == (4, 2 + 3 * 4)
    assert repr(Tree.chain(["h", ("g", [0])])) == "Tree.chain(['h', ('g', [0])])"
    assert repr(guide.block_entries[0]) == "Tree([('h', [0, 2, 4]), ('g', [0])], edges=[(0, 3), (1, 2), (1, 3)])"


def test_the_found_forest_has_the_largest_total_weight():
    strength = torch.rand(5, 5)
    strength = strength + strength.mT
    pairs = {(i, j): float(strength[i, j]) for i, j in itertools.combinations(range(5), 2)}
    found = strongest_forest(couplings_of(pairs, 5), [("h", unit) for unit in range(5)])

    def is_tree(edges):
        joined = {0}
        for _ in edges:
            joined |= {x for e in edges if joined & set(e) for x in e}
        return len(joined) == 5

    trees = [edges for edges in itertools.combinations(pairs, 4) if is_tree(edges)]
    assert len(trees) == 125
    best = max(trees, key=lambda edges: sum(pairs[e] ** 2 for e in edges))
    assert sorted(found) == sorted(best)
    assert strongest_forest(couplings_of({(0, 2): 1.0}, 4), [("h", 2), ("h", 1), ("h", 0)]) == [(0, 2)]


def test_a_tree_over_some_units_takes_their_couplings():
    guide = Structured(effects, blocks=[Tree([("h", [4, 2]), "g"])])
    guide.setup(V)
    # In the order of the program: h2, h4, g.
    assert list(guide.block_entries[0].edges) == [(1, 2)]


def test_found_edges_stay_while_theta_moves():
    model = sparse_coding(nearly_parallel([(0, 5)]), 10)
    v = torch.randn(7, 10)
    guide = Structured(model, blocks=[Tree(["h"])])
    assert guide.block_entries[0].edges is None
    guide.setup(v)
    edges = guide.block_entries[0].edges
    assert (0, 5) in edges
    assert len(edges) == 5
    with torch.no_grad():
        model.W.copy_(nearly_parallel([(0, 3)]))
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    em.step(v)
    assert guide.block_entries[0].edges == edges
    assert em.infer(v[:3] + 1).blocks[0].factor.num_params == guide.blocks[0].factor.num_params
    fresh = Structured(model, blocks=[Tree(["h"])])
    fresh.setup(v)
    assert (0, 3) in fresh.block_entries[0].edges


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("edges", [[(0, 1), (1, 2), (2, 3)], [(0, 3)]], ids=["a chain", "a forest"])
def test_the_gradient_of_a_tree_under_any_couplings_is_that_of_all_states(edges):
    """All units of the tree are coupled, on edges and off."""
    model, v = sparse_coding(0.5 * torch.randn(8, 4)), torch.randn(3, 8)
    guide = Structured(model, blocks=[Tree(["h"], edges)])
    em = EM(model, guide, e_step=Gradient(Adam({"lr": 0.1}), num_steps=100), m_step=None)
    call = em.call(v)
    (block,), table = guide.blocks, guide.table(guide.blocks[0])
    with torch.no_grad():
        table.normal_()
    bound = call.evaluator().bound(guide.rows_parameters(call.program, detach=False))
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    log_joint = program_log_joint(model, {"h": states.unsqueeze(1)}, v).detach()
    log_q = block.factor.marginal(table, 0, 4).log_prob(states.unsqueeze(1))
    expected = (log_q.exp() * (log_joint - log_q)).sum(0)
    torch.testing.assert_close(bound, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), table)[0] for x in (bound, expected)))
    sweeps = EM(model, Structured(model, blocks=[Tree(["h"], edges)]), e_step=FixedPoint(), m_step=None)
    best, before = sweeps.evaluate_loss(v), em.evaluate_loss(v)
    em.step(v)
    assert em.evaluate_loss(v) - best < 0.05 * (before - best)


def test_a_pair_on_an_edge_is_a_joint_table():
    model, v = sparse_coding(torch.randn(8, 3)), torch.randn(5, 8)
    guides = [Structured(model, blocks=[block]) for block in ([("h", [0, 2])], Tree([("h", [0, 2])], [(0, 1)]))]
    settings = {"criterion": BoundChange(1e-13), "max_sweeps": 500}
    losses = [EM(model, g, e_step=FixedPoint(**settings), m_step=None).step(v) for g in guides]
    assert [type(guide.blocks[0].factor) for guide in guides] == [JointFactor, TreeFactor]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(*(guide.posterior(v)["h"].gram() for guide in guides), rtol=1e-6, atol=1e-8)
