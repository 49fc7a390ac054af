from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_ext import EM, FixedPoint, elbo_terms
from pyro_ext.continuous_factors import MultivariateNormalFactor
from pyro_ext.discrete_factors import BernoulliFactor, JointFactor, OneHotFactor
from pyro_ext.fixed_point import BoundChange, Cold, Warm
from pyro_ext.guides import MeanField, Structured, Tree
from pyro_ext.models import BinarySparseCoding
from pyro_ext.schedules import Adaptive, Coloured, Parallel, Sequential
from pyro_ext.tree_factor import TreeFactor
from tests.oracles.enumeration import elbo, exact_posterior, log_evidence, program_log_joint
from tests.oracles.variational import coordinate_sweep
from tests.oracles.wake_sleep import expected_bound

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


# ------------------------------------------------------------------------------------- programs and their states


def coupled(v):
    """Two binary units of "a", two of "c" that depend on them."""
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        c = pyro.sample("c", dist.Bernoulli(logits=a @ torch.tensor([[1.0, -2.0], [0.5, 1.5]])).to_event(1))
        loc = a @ torch.tensor([1.5, -1.0]) + c @ torch.tensor([1.2, 0.7]) - 0.8 * a[..., 0] * c[..., 1]
        pyro.sample("v", dist.Normal(loc, 0.7), obs=v)


def one_hot(v):
    """A one-hot site of three classes, and two binary units that depend on it."""
    with pyro.plate("data", len(v)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        b = pyro.sample(
            "b", dist.Bernoulli(logits=k @ torch.tensor([[1.0, -1.0], [0.3, 2.0], [-2.0, 0.1]])).to_event(1)
        )
        pyro.sample("v", dist.Normal(k @ torch.tensor([0.0, 1.0, -1.0]) + b @ torch.tensor([1.0, 2.0]), 0.8), obs=v)


def categorical(v):
    """An integer site of three classes, and a scalar binary site that depends on it."""
    with pyro.plate("data", len(v)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        b = pyro.sample("b", dist.Bernoulli(logits=torch.tensor([1.0, -2.0, 0.4])[k]))
        pyro.sample("v", dist.Normal(torch.tensor([0.0, 1.0, -1.0])[k] * (1 + b), 0.8), obs=v)


def three(v):
    """Three sites of three kinds."""
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.Categorical(logits=torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.3, 0.3]])[k.argmax(-1)]))
        pyro.sample("v", dist.Normal(a.sum(-1) * (1 - z) + k[..., 0] + 0.5 * z, 0.6), obs=v)


V = torch.tensor([0.4, -1.3, 2.2], dtype=torch.float64)

UNITS = {
    coupled: [("a", "binary", 2), ("a", "binary", 2), ("c", "binary", 2), ("c", "binary", 2)],
    one_hot: [("k", "one-hot", 3), ("b", "binary", 2), ("b", "binary", 2)],
    categorical: [("k", "categorical", 3), ("b", "scalar", 2)],
    three: [("a", "binary", 2), ("a", "binary", 2), ("k", "one-hot", 3), ("z", "categorical", 2)],
}

CASES = [
    (coupled, [["a"]]),
    (coupled, [["a", "c"]]),
    (coupled, [["c", "a"]]),
    (coupled, [[("a", [0]), ("c", [1])]]),
    (coupled, [[("a", [0])], [("c", [1])]]),
    (coupled, [[("a", [1]), ("c", [0])], [("a", [0]), ("c", [1])]]),
    (coupled, [[("a", [1]), "c"]]),
    (coupled, None),
    (coupled, []),
    (one_hot, [["k", "b"]]),
    (one_hot, [["k", ("b", [1])]]),
    (one_hot, [[("k", [0]), ("b", [0])], [("b", [1])]]),
    (categorical, [["k", "b"]]),
    (categorical, None),
    (three, [["a", "k", "z"]]),
    (three, [[("a", [0]), "z"], [("a", [1]), "k"]]),
    (three, [[("a", [1]), "k", "z"]]),
]


TREES = [
    (coupled, [Tree(["a", "c"], [(0, 2), (2, 1), (1, 3)])]),
    (coupled, [Tree([("c", [1]), ("a", [0]), ("c", [0])], [(0, 1), (1, 2)]), [("a", [1])]]),
    (coupled, [Tree([("a", [0]), ("c", [1])], []), Tree.chain([("c", [0]), ("a", [1])])]),
    (one_hot, [Tree(["k", "b"], [(0, 1), (0, 2)])]),
    (one_hot, [Tree.chain([("b", [0]), "k"])]),
    (categorical, [Tree.chain(["k", "b"])]),
    (three, [Tree(["a", "k", "z"], [(0, 3), (3, 2), (2, 1)])]),
    (three, [Tree.chain([("a", [1]), "z"]), ["k", ("a", [0])]]),
]


def name_of(case):
    program, blocks = case
    return f"{program.__name__}-{blocks}"


@dataclass
class Enumeration:
    """All joint states of a program: class indices (S, units), values of each site, log p(v_n, s) of shape (S, N)."""

    choices: torch.Tensor
    values: dict[str, torch.Tensor]
    log_joint: torch.Tensor

    @classmethod
    def of(cls, program, v=V):
        units = UNITS[program]
        choices = torch.tensor(list(itertools.product(*(range(size) for _, _, size in units))))
        values = {}
        for name in dict.fromkeys(name for name, _, _ in units):
            mine = [i for i, unit in enumerate(units) if unit[0] == name]
            kind = units[mine[0]][1]
            if kind == "binary":
                values[name] = choices[:, mine].double()
            elif kind == "scalar":
                values[name] = choices[:, mine[0]].double()
            elif kind == "one-hot":
                values[name] = torch.eye(units[mine[0]][2])[choices[:, mine[0]]]
            else:
                values[name] = choices[:, mine[0]]
        led = {name: value.unsqueeze(1) for name, value in values.items()}
        return cls(choices, values, program_log_joint(program, led, v))


def tables_of(guide, program, params=None):
    """Each independent group of q as (its units, its table (N, states)), read off the raw parameters."""
    units = UNITS[program]
    found = []
    for block in guide.blocks:
        table = (guide.table(block) if params is None else params[block.name]).detach()
        mine = []
        for site, components in block.parts:
            first = [i for i, unit in enumerate(units) if unit[0] == site.name]
            mine += [first[c // site.unit_size] for c in components[:: site.unit_size]]
        if isinstance(block.factor, JointFactor):
            found.append((mine, table.softmax(-1)))
        elif isinstance(block.factor, TreeFactor):
            found.append((mine, tree_table(block.factor, [units[u][2] for u in mine], table)))
        elif isinstance(block.factor, BernoulliFactor):
            found += [([u], torch.stack([-x, x], -1).div(2).softmax(-1)) for u, x in zip(mine, table.mT, strict=True)]
        else:
            assert isinstance(block.factor, OneHotFactor)
            assert len(mine) == 1
            found.append((mine, table.softmax(-1)))
    return found


def tree_table(factor, counts, table):
    """q of all joint states (N, S) from the conditional tables of a tree."""
    states = list(itertools.product(*(range(count) for count in counts)))
    probs, start = torch.ones(len(table), len(states)), 0
    for unit, parent in enumerate(factor.forest.parents):
        rows = 1 if parent < 0 else counts[parent]
        part = table[:, start : start + rows * counts[unit]].reshape(-1, rows, counts[unit]).softmax(-1)
        start += rows * counts[unit]
        probs = probs * torch.stack([part[:, 0 if parent < 0 else s[parent], s[unit]] for s in states], -1)
    return probs


def index_of(choices, program, units):
    """The number of each state's part over some units, the first unit counting most, shape (S,)."""
    index = torch.zeros(len(choices), dtype=torch.long)
    for unit in units:
        index = index * UNITS[program][unit][2] + choices[:, unit]
    return index


def product(tables, choices, program):
    """q (S, N) of a product of tables."""
    return torch.stack([table.mT[index_of(choices, program, units)] for units, table in tables]).prod(0)


def randomised(program, blocks, v=V):
    guide = Structured(program, blocks)
    guide.setup(v)
    with torch.no_grad():
        for block in guide.blocks:
            guide.table(block).normal_(std=1.5)
    return guide


def log_q_of_trace(guide, values, v=V):
    """log q of one state by the guide's own sites, shape (N,)."""
    held = {name: value.expand((len(v),) + value.shape) for name, value in values.items()}
    trace = poutine.trace(poutine.condition(guide, data=held)).get_trace(v)
    trace.compute_log_prob()
    assert {n for n, s in trace.nodes.items() if s["type"] == "sample"} == {*values, "data"}
    return sum(trace.nodes[name]["log_prob"] for name in values)


# ------------------------------------------------------------------------------------- density


@pytest.mark.parametrize("case", CASES + TREES, ids=name_of)
def test_the_density_is_the_product_of_the_blocks_tables(case):
    program, blocks = case
    guide = randomised(program, blocks)
    states = Enumeration.of(program)
    q = product(tables_of(guide, program), states.choices, program)
    torch.testing.assert_close(q.sum(0), torch.ones(3))

    log_q = torch.stack([log_q_of_trace(guide, {n: x[s] for n, x in states.values.items()}) for s in range(len(q))])
    torch.testing.assert_close(log_q, q.log(), rtol=1e-9, atol=1e-9)

    led = {name: x.unsqueeze(1).expand((len(q), 3) + x.shape[1:]) for name, x in states.values.items()}
    torch.testing.assert_close(guide.posterior(V).log_prob(led), q.log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES + TREES, ids=name_of)
@pytest.mark.parametrize("route", ["posterior", "guide in a plate of particles"])
def test_draws_have_the_frequencies_of_the_density(case, route):
    program, blocks = case
    guide = randomised(program, blocks)
    states = Enumeration.of(program)
    q = product(tables_of(guide, program), states.choices, program)
    S = 20_000
    if route == "posterior":
        draws, log_q = guide.posterior(V).sample_with_log_prob(S)
    else:
        with pyro.plate("particles", S, dim=-2):
            trace = poutine.trace(guide).get_trace(V)
        trace.compute_log_prob()
        draws = {name: trace.nodes[name]["value"] for name in states.values}
        log_q = sum(trace.nodes[name]["log_prob"] for name in states.values)
    match = torch.ones(len(q), S, 3, dtype=torch.bool)
    for name, value in states.values.items():
        assert draws[name].shape == (S, 3) + value.shape[1:]
        same = draws[name].unsqueeze(0) == value[:, None, None]
        match &= same.reshape(same.shape[:3] + (-1,)).all(-1)
    assert match.any(0).all()
    error = (q * (1 - q) / S).sqrt()
    assert ((match.double().mean(1) - q).abs() <= K * error + 1e-12).all()
    torch.testing.assert_close(log_q, (match * q.log().unsqueeze(1)).sum(0))


def test_blocks_in_an_inner_plate_have_a_table_for_every_element():
    def program(v):
        with pyro.plate("data", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(0.4).expand([2]).to_event(1))
            c = pyro.sample("c", dist.Bernoulli(0.7))
            pyro.sample("v", dist.Normal(a.sum(-1) * c, 1.0), obs=v)

    guide = Structured(program, [[("a", [1]), "c"]])
    v = torch.randn(2, 3)
    guide.setup(v)
    joint = next(block for block in guide.blocks if block.factor.is_joint)
    assert guide.table(joint).shape == (2, 3, 4)
    with torch.no_grad():
        for block in guide.blocks:
            guide.table(block).normal_()
    p = guide.table(joint).softmax(-1).reshape(2, 3, 2, 2)
    rest = next(guide.table(block) for block in guide.blocks if block is not joint).sigmoid().squeeze(-1)
    for a0, a1, c in itertools.product((0, 1), repeat=3):
        held = {"a": torch.tensor([a0, a1]).double().expand(2, 3, 2), "c": torch.tensor(float(c)).expand(2, 3)}
        trace = poutine.trace(poutine.condition(guide, data=held)).get_trace(v)
        trace.compute_log_prob()
        found = trace.nodes["a"]["log_prob"] + trace.nodes["c"]["log_prob"]
        torch.testing.assert_close(found, (p[:, :, a1, c] * (rest if a0 else 1 - rest)).log())


# ------------------------------------------------------------------------------------- fixed points


def infer(model, guide, v, **settings):
    return EM(model, guide, e_step=FixedPoint(**settings), m_step=None).infer(v)


def sparse_coding(num_visible=5, num_latents=4):
    """Overlapping components: units explain each other away."""
    model = BinarySparseCoding(num_visible, num_latents)
    with torch.no_grad():
        model.W.copy_(torch.randn(num_visible, 1) + 0.5 * torch.randn(num_visible, num_latents))
        model.b.fill_(-0.5)
    model.beta = torch.full((num_visible,), 3.0)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_latents)))
    v = model.dream(6)
    return model, v, states, program_log_joint(model, {"h": states.unsqueeze(1)}, v).detach()


def test_a_joint_factor_over_the_site_is_the_exact_posterior_in_one_sweep():
    model, v, states, log_joint = sparse_coding()
    guide = Structured(model, [["h"]])
    posterior = infer(model, guide, v, max_sweeps=1)
    exact = exact_posterior(log_joint)
    (block,) = posterior.blocks
    torch.testing.assert_close(block.factor.probs(posterior.conditioner(block, {})).mT, exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(posterior["h"].mean, exact.mT @ states)
    em = EM(model, guide, e_step=FixedPoint(max_sweeps=1), m_step=None)
    assert em.step(v) == pytest.approx(-float(log_evidence(log_joint).sum()), rel=1e-10)


@pytest.mark.parametrize("program", [coupled, one_hot, categorical, three])
def test_a_joint_factor_over_all_sites_is_the_exact_posterior_in_one_sweep(program):
    guide = Structured(program)
    posterior = infer(program, guide, V, max_sweeps=1)
    (block,) = posterior.blocks
    found = block.factor.probs(posterior.conditioner(block, {}))
    torch.testing.assert_close(found.mT, exact_posterior(Enumeration.of(program).log_joint), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_fixed_point_is_block_coordinate_maximisation(case):
    program, blocks = case
    guide = Structured(program, blocks)
    guide.setup(V)
    states = Enumeration.of(program)
    settings = {"start": Cold(), "criterion": BoundChange(1e-13)}

    def sweep(tables):
        choices = torch.stack([index_of(states.choices, program, units) for units, _ in tables], -1)
        new = coordinate_sweep(states.log_joint, choices, [table for _, table in tables], sequential=True)
        return [(units, table) for (units, _), table in zip(tables, new, strict=True)]

    def after(num_sweeps):
        posterior = infer(program, guide, V, max_sweeps=num_sweeps, **settings)
        return tables_of(guide, program, {b.name: posterior.conditioner(b, {}) for b in guide.blocks})

    tables = tables_of(guide, program)
    for num_sweeps in (1, 2):
        tables = sweep(tables)
        for (units, found), (_, expected) in zip(after(num_sweeps), tables, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=f"units {units}")

    end = after(500)
    bound = elbo(states.log_joint, product(end, states.choices, program))
    assert (bound <= log_evidence(states.log_joint) + 1e-9).all()
    for (_, found), (_, expected) in zip(end, sweep(end), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # No small move of any table raises L: it is a maximum in each of them.
    for position in range(len(end)):
        for _ in range(20):
            units, table = end[position]
            moved = (table.clamp_min(1e-300).log() + 0.05 * torch.randn_like(table)).softmax(-1)
            others = [*end[:position], (units, moved), *end[position + 1 :]]
            assert (elbo(states.log_joint, product(others, states.choices, program)) <= bound + 1e-9).all()


SCHEDULES = [Sequential(), Coloured(), Adaptive(), Parallel(0.5)]


def swept(model, guide, v, schedule, num_sweeps):
    """L after the last of some sweeps from the guide's tables, which then hold that answer."""
    call = EM(model, guide, e_step=FixedPoint(), m_step=None).call(v)
    evaluator = call.evaluator()
    sweep, params = schedule.sweeper(evaluator), guide.rows_parameters(call.program)
    bounds = []
    with torch.no_grad():
        for _ in range(num_sweeps):
            params = sweep(params)
            bounds.append(evaluator.bound(params))
    guide.assign(call.program, params)
    if schedule.monotone:
        assert all((after >= before - 1e-11).all() for before, after in itertools.pairwise(bounds))
    return bounds[-1]


@pytest.mark.parametrize(
    ("case", "schedule"),
    [(case, SCHEDULES[0]) for case in TREES] + [(TREES[0], schedule) for schedule in SCHEDULES[1:]],
    ids=lambda x: name_of(x) if isinstance(x, tuple) else type(x).__name__,
)
def test_the_fixed_point_of_trees_is_a_maximum_in_every_table(case, schedule):
    """None of these programs is quadratic: their states are enumerated."""
    program, blocks = case
    guide = Structured(program, blocks)
    states = Enumeration.of(program)
    bound = swept(program, guide, V, schedule, 60)
    q = product(tables_of(guide, program), states.choices, program)
    torch.testing.assert_close(elbo(states.log_joint, q), bound)
    assert (bound <= log_evidence(states.log_joint) + 1e-10).all()
    for block in guide.blocks:
        table = guide.table(block)
        best = table.detach().clone()
        for size in (1e-3, 0.05, 1.0):
            with torch.no_grad():
                table.copy_(best + size * torch.randn_like(best))
            moved = elbo(states.log_joint, product(tables_of(guide, program), states.choices, program))
            assert (moved <= bound + 1e-8).all()
        with torch.no_grad():
            table.copy_(best)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("blocks", [[Tree(["h"], [(0, 1), (1, 2)])], [Tree.chain([("h", [3, 0, 1])])]], ids=str)
def test_trees_of_a_program_whose_couplings_leave_the_tree(schedule, blocks):
    """All four units are coupled with each other: the maximum over trees has no closed form."""
    model, v, states, log_joint = sparse_coding()
    guide = Structured(model, blocks)
    last = swept(model, guide, v, schedule, 60)
    log_q = guide.posterior(v).log_prob({"h": states.unsqueeze(1).expand(16, 6, 4)})
    bound = elbo(log_joint, log_q.exp())
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(6))
    torch.testing.assert_close(bound, last)
    assert bound.sum() < log_evidence(log_joint).sum() - 1e-4
    call = EM(model, guide, e_step=FixedPoint(), m_step=None).call(v)
    assert not call.evaluator().exact_posterior
    value = call.evaluator().bound(guide.rows_parameters(call.program, detach=False)).sum()
    for block in guide.blocks:
        (gradient,) = torch.autograd.grad(value, guide.table(block), retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def put(guide, v, posterior):
    """Set a guide's tables to the means of a posterior, each unit on its own."""
    guide.setup(v)
    with torch.no_grad():
        for block in guide.blocks:
            mean = torch.cat([posterior[site.name].features[..., list(parts)] for site, parts in block.parts], -1)
            guide.table(block).copy_(block.factor.initial(mean, 1.0))
    guide.holds_answer = True


@pytest.mark.parametrize("route", ["quadratic", "enumerated"])
def test_structure_lies_between_mean_field_and_the_evidence(route):
    if route == "quadratic":
        model, v, _, log_joint = sparse_coding()
        blocks = [[("h", [0, 3])], [("h", [1, 2])]]
    else:
        model, v, log_joint, blocks = coupled, V, Enumeration.of(coupled).log_joint, [["a", ("c", [1])]]
    bounds: list[torch.Tensor] = []
    start = None
    for guide in (MeanField(model), Structured(model, blocks), Structured(model)):
        # Coordinate ascent finds a maximum near its start: each family starts at the answer of the one below it.
        if start is not None:
            put(guide, v, start)
        e_step = FixedPoint(criterion=BoundChange(1e-12), max_sweeps=500, start=Warm())
        em = EM(model, guide, e_step=e_step, m_step=None)
        result = em.e_half(em.call(v))
        bounds.append(result.bound)
        start = result.posterior
        assert float(result.bound.sum()) == pytest.approx(-em.evaluate_loss(v), rel=1e-10)
        if route == "quadratic":
            torch.testing.assert_close(elbo_terms(model, guide, v).bound, result.bound)
    mean_field, structured, exact = bounds
    torch.testing.assert_close(exact, log_evidence(log_joint))
    assert (structured <= exact + 1e-9).all()
    assert (mean_field <= structured + 1e-9).all()
    assert (structured - mean_field).max() > 0.01
    assert (exact - structured).max() > 0.001


# ------------------------------------------------------------------------------------- continuous blocks


def positive(v):
    """A real vector and a positive scale, coupled by the data."""
    with pyro.plate("data", len(v)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("v", dist.Normal(x.sum(-1), s), obs=v)


@pytest.mark.parametrize("blocks", [None, [["x", "s"]], [["s", ("x", [1])]], [[("x", [0]), "s"], [("x", [1])]]])
def test_a_gaussian_block_across_a_real_and_a_positive_site(blocks):
    guide = Structured(positive, blocks)
    guide.setup(V)
    dense = torch.zeros(3, 3, 3)  # the Cholesky factor over (x0, x1, log s) of the whole q
    mean = torch.zeros(3, 3)
    with torch.no_grad():
        for block in guide.blocks:
            table = guide.table(block)
            table.copy_(0.6 * torch.randn_like(table))
            where = [{"x": c, "s": 2}[site.name] for site, parts in block.parts for c in parts]
            rows = torch.tensor(where)
            if isinstance(block.factor, MultivariateNormalFactor):
                loc, tril = block.factor.moments(table)
                assert (tril.diagonal(dim1=-2, dim2=-1) > 0).all()
            else:
                loc, scale = block.factor.moments(table)
                tril = torch.diag_embed(scale)
            mean[:, rows] = loc
            dense[:, rows[:, None], rows] = tril
    covariance = dense @ dense.mT
    normal = torch.distributions.MultivariateNormal(mean, covariance)

    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(V)
    trace.compute_log_prob()
    x, s = (trace.nodes[name]["value"] for name in ("x", "s"))
    assert (s > 0).all()
    # log q(x, s) = log N((x, log s)) - log s.
    expected = normal.log_prob(torch.cat([x, s.log()[..., None]], -1)) - s.log()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"] + trace.nodes["s"]["log_prob"], expected)

    S = 20_000
    draws, log_q = guide.posterior(V).sample_with_log_prob(S)
    flat = torch.cat([draws["x"], draws["s"].log()[..., None]], -1)
    torch.testing.assert_close(log_q, normal.log_prob(flat) - draws["s"].log())
    centred = flat - mean
    products = centred[..., :, None] * centred[..., None, :]
    assert ((products.mean(0) - covariance).abs() <= K * products.std(0) / math.sqrt(S)).all()
    assert (centred.mean(0).abs() <= K * centred.std(0) / math.sqrt(S)).all()

    marginal = guide.posterior(V)["s"]
    torch.testing.assert_close(marginal.mean, (mean[:, 2] + covariance[:, 2, 2] / 2).exp())
    torch.testing.assert_close(guide.posterior(V)["x"].mean, mean[:, :2])
    gram = (covariance[:, :2, :2] + mean[:, :2, None] * mean[:, None, :2]).sum(0)
    torch.testing.assert_close(guide.posterior(V)["x"].gram(), gram)


def linear_gaussian(v):
    W, U = torch.tensor([[1.0, 0.5, -0.2], [0.3, -1.0, 0.8]]), torch.tensor([[0.7, -0.4, 1.1]])
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Normal(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0])).to_event(1))
        c = pyro.sample("c", dist.Normal(0.3 * a.sum(-1, keepdim=True), 0.5).to_event(1))
        pyro.sample("v", dist.Normal(a @ W + c @ U, 0.6).to_event(1), obs=v)


def test_a_gaussian_block_is_the_exact_posterior_of_a_linear_gaussian_program():
    W, U = torch.tensor([[1.0, 0.5, -0.2], [0.3, -1.0, 0.8]]), torch.tensor([[0.7, -0.4, 1.1]])
    # The joint of (a, c, v) is Gaussian: build it from its noise, then condition.
    A = torch.zeros(6, 6)
    A[:2, :2] = torch.diag(torch.tensor([1.0, 2.0]))
    A[2, :2], A[2, 2] = 0.3 * torch.tensor([1.0, 2.0]), 0.5
    A[3:] = torch.cat([W, U]).mT @ A[:3]
    A[3:, 3:] += 0.6 * torch.eye(3)
    mean = torch.tensor([0.5, -0.5, 0.0])
    mean = torch.cat([mean, torch.cat([W, U]).mT @ mean])
    joint = A @ A.mT
    gain = joint[:3, 3:] @ torch.linalg.inv(joint[3:, 3:])
    v = torch.randn(4, 3)
    expected_mean = mean[:3] + (v - mean[3:]) @ gain.mT
    expected_covariance = joint[:3, :3] - gain @ joint[3:, :3]

    guide = Structured(linear_gaussian)
    em = EM(linear_gaussian, guide, e_step=FixedPoint(max_sweeps=1), m_step=None)
    loss = em.step(v)
    posterior = guide.posterior(v)
    (block,) = posterior.blocks
    loc, tril = block.factor.moments(posterior.conditioner(block, {}))
    torch.testing.assert_close(loc, expected_mean)
    torch.testing.assert_close(tril @ tril.mT, expected_covariance.expand(4, 3, 3))
    evidence = torch.distributions.MultivariateNormal(mean[3:], joint[3:, 3:]).log_prob(v)
    assert loss == pytest.approx(-float(evidence.sum()), rel=1e-10)

    mean_field = EM(linear_gaussian, MeanField(linear_gaussian), e_step=FixedPoint(max_sweeps=200), m_step=None)
    assert mean_field.step(v) > loss + 0.1


# ------------------------------------------------------------------------------------- Pyro's ELBOs


ELBO_BLOCKS = [[("a", [1]), ("c", [0])], [("a", [0]), ("c", [1])]]


def exact_loss(guide, states):
    """-L by enumeration, differentiable in the tables, and the variance of one particle's estimate."""
    terms = []
    for block in guide.blocks:
        units = [{"a": 0, "c": 2}[site.name] + c for site, parts in block.parts for c in parts]
        terms.append(guide.table(block).log_softmax(-1).mT[index_of(states.choices, coupled, units)])
    log_q = sum(terms)
    log_w = states.log_joint - log_q
    mean, square = (log_q.exp() * log_w).sum(0), (log_q.exp() * log_w**2).sum(0)
    return -mean.sum(), log_q, (square - mean**2).sum().item()


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceGraph_ELBO])
def test_the_loss_and_its_gradient_under_pyros_elbos(elbo_class):
    guide = randomised(coupled, ELBO_BLOCKS)
    states = Enumeration.of(coupled)
    guide(V)  # puts the tables into the store
    loss, _, variance = exact_loss(guide, states)
    tables = [guide.table(block) for block in guide.blocks]
    expected = torch.autograd.grad(loss, tables)

    S, repeats = 100, 60
    svi_loss = elbo_class(num_particles=S, vectorize_particles=True, max_plate_nesting=1)
    losses, grads = [], []
    for _ in range(repeats):
        losses.append(svi_loss.loss_and_grads(coupled, guide, V))
        grads.append([table.grad.clone() for table in tables])
        for table in tables:
            table.grad = None
    assert abs(sum(losses) / repeats - loss.item()) <= K * math.sqrt(variance / (S * repeats))
    for position, wanted in enumerate(expected):
        found = torch.stack([grad[position] for grad in grads])
        assert ((found.mean(0) - wanted).abs() <= K * found.std(0) / math.sqrt(repeats)).all()


def test_the_gradient_of_a_gaussian_block_across_sites():
    """Draws are reparametrised through both sites: the mean gradient is that of the exact L."""
    v = torch.randn(4, 3)
    guide = Structured(linear_gaussian)
    guide(v)
    (table,) = (guide.table(block) for block in guide.blocks)
    with torch.no_grad():
        table.normal_(std=0.3)
    em = EM(linear_gaussian, guide, e_step=FixedPoint(), m_step=None)
    call = em.call(v)
    bound = call.evaluator().bound(guide.rows_parameters(call.program, detach=False)).sum()
    (expected,) = torch.autograd.grad(-bound, table)
    S, repeats = 50, 60
    for elbo_class in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
        elbo_loss = elbo_class(num_particles=S, vectorize_particles=True, max_plate_nesting=1)
        losses, grads = [], []
        for _ in range(repeats):
            losses.append(elbo_loss.loss_and_grads(linear_gaussian, guide, v))
            grads.append(table.grad.clone())
            table.grad = None
        losses, grads = torch.tensor(losses), torch.stack(grads)
        assert (losses.mean() + bound).abs().item() <= K * losses.std().item() / math.sqrt(repeats)
        assert ((grads.mean(0) - expected).abs() <= K * grads.std(0) / math.sqrt(repeats)).all()


def test_the_loss_under_renyi():
    guide = randomised(coupled, ELBO_BLOCKS)
    states = Enumeration.of(coupled)
    _, log_q, _ = exact_loss(guide, states)
    expected = -float(expected_bound(states.log_joint, log_q.detach(), 2, self_normalized=True).sum())
    loss = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    found = torch.tensor([loss.loss(coupled, guide, V) for _ in range(400)])
    assert abs(float(found.mean()) - expected) <= K * float(found.std()) / math.sqrt(400)
    loss.loss_and_grads(coupled, guide, V)
    assert all(bool(guide.table(block).grad.isfinite().all()) for block in guide.blocks)


def test_predictive_draws_from_the_guide():
    guide = randomised(coupled, ELBO_BLOCKS)
    model = poutine.uncondition(coupled)
    draws = Predictive(model, guide=guide, num_samples=4000, parallel=True)(V)
    assert draws["v"].shape == (4000, 3)
    found, expected = draws["a"], guide.posterior(V)["a"].mean
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((found.mean(0).squeeze() - expected).abs() <= K * error).all()


# ------------------------------------------------------------------------------------- posteriors


@pytest.mark.parametrize("case", [c for c in CASES + TREES if c[0] in (coupled, one_hot, three)], ids=name_of)
def test_marginals_are_those_of_the_enumerated_density(case):
    program, blocks = case
    guide = randomised(program, blocks)
    states = Enumeration.of(program)
    tables = tables_of(guide, program)
    q = product(tables, states.choices, program)
    posterior = guide.posterior(V)
    assert [block.name for block in posterior.blocks] == [block.name for block in guide.blocks]
    torch.testing.assert_close(posterior.entropy(), -torch.xlogy(q, q).sum(0))
    weights, x = torch.rand(3), torch.randn(3, 2)
    for name, value in states.values.items():
        marginal = posterior[name]
        features = torch.eye(int(value.max()) + 1)[value] if value.dtype == torch.long else value.reshape(len(q), -1)
        mean = q.mT @ features
        torch.testing.assert_close(marginal.mean, mean)
        torch.testing.assert_close(marginal.probs, mean)
        torch.testing.assert_close(marginal.sum(), mean.sum(0))
        torch.testing.assert_close(marginal.sum(weights), weights @ mean)
        torch.testing.assert_close(marginal.cross(x), mean.mT @ x)
        second = torch.einsum("sn,sf,sg->nfg", q, features, features)
        torch.testing.assert_close(marginal.gram(), second.sum(0))
        torch.testing.assert_close(marginal.gram(weights), torch.einsum("n,nfg->fg", weights, second))
        # The marginal of the site alone: sum q over all that is equal at it.
        keys = torch.unique(features, dim=0, return_inverse=True)[1]
        table = torch.zeros(int(keys.max()) + 1, 3).index_add(0, keys, q)
        torch.testing.assert_close(marginal.entropy(), -torch.xlogy(table, table).sum(0))
        found = torch.stack([marginal.log_prob(v.expand((3,) + v.shape)) for v in value])
        torch.testing.assert_close(found, table[keys].log())
    with pytest.raises(KeyError, match=r"Expected a latent site .* but got 'v'\."):
        posterior["v"]


def test_without_blocks_discrete_latents_are_joined_and_continuous_ones_too():
    def program(v):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(0.3).expand([2]).to_event(1))
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            y = pyro.sample("y", dist.Gamma(1.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(a.sum(-1) + x * k + y.sum(-1), scale), obs=v)

    guide = Structured(program)
    guide.setup(V)
    found = {tuple(site.name for site, _ in block.parts): type(block.factor) for block in guide.blocks}
    assert found == {
        ("scale",): MultivariateNormalFactor,
        ("a", "k"): JointFactor,
        ("x", "y"): MultivariateNormalFactor,
    }
    assert {b.parts[0][0].name: guide.table(b).shape for b in guide.blocks} == {
        "scale": (2,),
        "a": (3, 12),
        "x": (3, 9),
    }
    assert Trace_ELBO().loss(program, guide, V) < math.inf


def test_a_new_guide_starts_at_the_prior():
    guide = Structured(one_hot, [["k"], ["b"]])
    guide.setup(V)
    torch.testing.assert_close(guide.posterior(V)["k"].mean, torch.tensor([0.2, 0.5, 0.3]).expand(3, 3))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([["a"], ["a"]], r"Expected blocks that do not overlap, but got unit 0 of 'a' twice\. Keep it in one\."),
        ([[("a", [1, 1])]], r"Expected blocks that do not overlap, but got unit 1 of 'a' twice\."),
        ([["a", ("c", [0])], [("c", [1, 0])]], r"do not overlap, but got unit 0 of 'c' twice\."),
        ([["z"]], r"Expected blocks over the latent sites 'a', 'c', 'x', 'w', but got 'z'\. Name a latent site\."),
        ([["v"]], r"Expected blocks over the latent sites .* but got 'v'\."),
        ([[("a", [2])]], r"Expected units of 'a' from 0 to 1, but got 2\. Count the units along the site's event\."),
        ([[("a", [-1])]], r"Expected units of 'a' from 0 to 1, but got -1\."),
        ([["a", "x"]], r"Expected a block of discrete or of continuous sites, but got 'a' \(binary\), 'x' \(real\)\."),
        (
            [["a", "w"]],
            r"Expected the sites of a block in the same plates, but got 'a' in \['data'\], 'w' in \[.*inner",
        ),
    ],
)
def test_refused_at_set_up(blocks, message):
    def program(v):
        with pyro.plate("data", len(v), dim=-2):
            a = pyro.sample("a", dist.Bernoulli(0.3).expand([2]).to_event(1))
            c = pyro.sample("c", dist.Bernoulli(0.3).expand([2]).to_event(1))
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 2, dim=-1):
                w = pyro.sample("w", dist.Bernoulli(0.3))
                pyro.sample("v", dist.Normal(a.sum(-1) + c.sum(-1) + x + w, 1.0), obs=v)

    guide = Structured(program, blocks)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            guide(torch.randn(3, 2))
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("ac", r"Expected blocks to be a list of blocks, but got 'ac'\. Write \[\["),
        (3, r"Expected blocks to be a list of blocks, but got 3\."),
        (["a", "c"], r"Expected a block to be a list of sites, but got 'a'\. Write \[\"a\", \"c\"\] or"),
        ([[]], r"Expected a block to be a list of sites, but got \[\]\."),
        ([{"a": [0]}], r"Expected a block to be a list of sites, but got \{'a': \[0\]\}\."),
        ([("a", [0])], r"Expected a site name or \(site name, unit positions\) in a block, but got \[0\]\."),
        ([[("a", 0)]], r"unit positions\) in a block, but got \('a', 0\)\. Write \"a\", or"),
        ([[("a", [])]], r"unit positions\) in a block, but got \('a', \[\]\)\."),
        ([[("a", [True])]], r"unit positions\) in a block, but got \('a', \[True\]\)\."),
        ([[("a", "0")]], r"unit positions\) in a block, but got \('a', '0'\)\."),
        ([[7]], r"unit positions\) in a block, but got 7\."),
    ],
)
def test_refused_at_the_door(blocks, message):
    with pytest.raises(ValueError, match=message):
        Structured(coupled, blocks)


def refused_program(v):
    with pyro.plate("data", len(v), dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.3).expand([3]).to_event(1))
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("inner", 2, dim=-1):
            w = pyro.sample("w", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(a.sum(-1) + x.sum(-1) + w, 1.0), obs=v)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            [Tree(["a"], [(0, 3)])],
            r"Expected edges between units 0 to 2 of the tree, but got \(0, 3\)\. Count",
        ),
        ([Tree([("a", [2, 3])], [(0, 1)])], r"Expected units of 'a' from 0 to 2, but got 3\."),
        ([Tree(["z"], [])], r"Expected blocks over the latent sites 'a', 'x', 'w', but got 'z'\."),
        ([Tree(["a"], []), ["a"]], r"Expected blocks that do not overlap, but got unit 0 of 'a' twice\."),
        ([Tree.chain(["x"])], r"Expected discrete units in a Tree, but got the real site 'x'\. Put continuous latents"),
        ([Tree(["a", "x"], [])], r"Expected a block of discrete or of continuous sites, but got 'a' \(binary\), 'x'"),
        ([Tree(["a", "w"])], r"Expected the sites of a block in the same plates, but got 'a' in \['data'\], 'w' in"),
    ],
)
def test_trees_refused_at_set_up(blocks, message):
    guide = Structured(refused_program, blocks)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            guide(torch.randn(4, 2))
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    ("entries", "edges", "message"),
    [
        (
            ["h"],
            [(0, 1), (1, 2), (2, 0)],
            r"Expected edges that make a tree, but got \(2, 0\), which closes a cycle\.",
        ),
        (["h"], [(1, 1)], r"Expected edges that make a tree, but got \(1, 1\), which closes a cycle\."),
        (["h"], [(0, 1, 2)], r"Expected edges to be pairs of units counted from 0, but got \[\(0, 1, 2\)\]\. Write"),
        (["h"], [(0, -1)], r"Expected edges to be pairs of units counted from 0, but got \[\(0, -1\)\]\."),
        (["h"], [(0, "a")], r"Expected edges to be pairs of units counted from 0, but got"),
        (["h"], 3, r"Expected edges to be pairs of units counted from 0, but got 3\."),
        ("h", [(0, 1)], r"Expected a block to be a list of sites, but got 'h'\."),
        ([("h", 0)], None, r"Expected a site name or \(site name, unit positions\) in a block, but got \('h', 0\)\."),
    ],
)
def test_trees_refused_at_the_door(entries, edges, message):
    with pytest.raises(ValueError, match=message):
        Tree(entries, edges)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_block_size": 0}, ValueError, r"Expected max_block_size >= 1, but got 0\."),
        ({"max_block_size": 2.0}, TypeError, r"Expected max_block_size to be an int, but got 2\.0 of type float"),
        ({"max_block_size": True}, TypeError, r"Expected max_block_size to be an int, but got True"),
        (
            {"max_block_size": 2, "blocks": [["a"]]},
            ValueError,
            r"Expected blocks or max_block_size, but got both",
        ),
    ],
)
def test_block_sizes_refused_at_the_door(settings, error, message):
    with pytest.raises(error, match=message):
        Structured(refused_program, **settings)
    Structured(refused_program, max_block_size=2, name="Structured")  # the refused guides hold no name


def test_a_block_size_with_too_many_states_is_refused():
    guide = Structured(refused_program, max_block_size=3, max_states=7)
    v = torch.randn(4, 2)
    with pytest.raises(
        ValueError,
        match=r"at most 7 joint states in a block of max_block_size=3 units, but got up to 8\. Use",
    ):
        guide.setup(v)
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())
    Structured(refused_program, max_block_size=2, max_states=7).setup(v)


@pytest.mark.parametrize("program", [coupled, categorical])
def test_blocks_cannot_be_found_without_couplings(program):
    value = {coupled: "it is not at the present theta", categorical: "but got the categorical site 'k'"}[program]
    for guide, remedy in (
        (Structured(program, max_block_size=2), r"give `blocks=` in place of `max_block_size`\."),
        (Structured(program, blocks=[Tree(["a" if program is coupled else "k"])]), r"give the tree its `edges`\."),
    ):
        with pytest.raises(ValueError, match=rf"{value}\. The couplings tell what to join: {remedy}"):
            guide.setup(V)
        assert not guide.is_set_up
        assert not list(pyro.get_param_store())


def test_finding_blocks_is_refused_where_they_are_given_or_the_data_are_bad():
    with pytest.raises(ValueError, match=r"Expected a guide with max_block_size, but got one whose blocks are given"):
        Structured(coupled, [["a"]]).find_blocks(V)
    model = BinarySparseCoding(3, 2)
    before = set(pyro.get_param_store().keys())
    with pytest.raises(ValueError, match=r"Expected v of shape \(N, 3\)"):
        Structured(model, max_block_size=2).find_blocks(torch.zeros(5, 4))
    assert set(pyro.get_param_store().keys()) == before


def test_too_many_states_are_refused():
    guide = Structured(coupled, [["a", "c"]], max_states=15)
    with pytest.raises(
        ValueError, match=r"at most 15 joint states in a block, but got 4 units of 'a', 'c'\. Use smaller"
    ):
        guide.setup(V)
    Structured(coupled, [["a", "c"]], max_states=16).setup(V)

    def wide(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([70]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    with pytest.raises(ValueError, match=r"but got 70 units of 'h'"):
        Structured(wide).setup(V)
