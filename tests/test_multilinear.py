"""Programs at the means of q: against enumeration of all states, and against closed forms where these are too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import EM, Adaptive, BoundChange, Coloured, FixedPoint, Gradient, elbo_terms
from pyro_ext.affine import NotMultilinearError
from pyro_ext.choose import choose_evaluator
from pyro_ext.evaluators import Enumerated, Evaluator, NoEvaluatorError, Parameters, enumerate_log_joint
from pyro_ext.guides import Dirac, MeanField, Structured
from pyro_ext.layout import Layout
from pyro_ext.multilinear import Multilinear
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError
from tests.oracles.programs import sigmoid_network, sigmoid_network_parameters

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-10, "rtol": 1e-10}


def triples(v: Tensor) -> None:
    """Products of three binary units, of a one-hot choice and two units; the data weigh them."""
    w = torch.linspace(-2, 3, 12).reshape(3, 4)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7, 0.4])).to_event(1))
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.factor("three", 2 * v * h[..., 0] * h[..., 1] * h[..., 2])
        pyro.factor("choice", (z @ w * h).sum(-1) - 3 * z[..., 1] * h[..., 2] * h[..., 3])
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)


def switched(v: Tensor) -> None:
    """An integer class changes what products of units cost: affine in the units, not in the class."""
    table = torch.tensor([[1.0, -2.0], [0.3, 1.5], [-1.0, 2.5]])
    with pyro.plate("data", len(v)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        cost = table[k]
        pyro.factor("cost", cost[..., 0] * h.prod(-1) + cost[..., 1] * v * h[..., 0] * h[..., 2])
        pyro.sample("v", dist.Normal(k.to(v), 1.0), obs=v)


def in_plates(v: Tensor) -> None:
    """Triples across an inner plate of which a part was drawn; v is (3, N)."""
    with pyro.plate("rows", v.shape[1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3).expand([2]).to_event(1))
        with pyro.plate("inner", 6, dim=-2, subsample=torch.tensor([5, 0, 3])):
            c = pyro.sample("c", dist.Bernoulli(0.6).expand([2]).to_event(1))
            pyro.factor("three", v * a[..., 0] * c[..., 0] * c[..., 1] - 2 * a.prod(-1) * c[..., 1])
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(c.shape[:-1]), obs=v)


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], Callable[[Any], Any]]] = {
    "triples": (triples, (5,), MeanField),
    "triples, one block": (triples, (5,), lambda m: Structured(m, blocks=[[("h", [0, 2])]])),
    "triples, two blocks": (triples, (5,), lambda m: Structured(m, blocks=[["z", ("h", [1])], [("h", [2, 3])]])),
    "triples, points": (triples, (5,), Dirac),
    "all in one block": (triples, (5,), Structured),
    "switched": (switched, (5,), MeanField),
    "switched, points": (switched, (5,), Dirac),
    "plates": (in_plates, (3, 4), MeanField),
    "plates, blocks": (in_plates, (3, 4), lambda m: Structured(m, blocks=[["c"]])),
}


def both(name: str) -> tuple[Multilinear, Enumerated]:
    model, shape, guide = CASES[name]
    program = Program(model, (torch.randn(shape),), {})
    blocks = guide(model).make_blocks(program)
    enumerated = Enumerated(enumerate_log_joint(program), Layout(program.rows, program.latents), blocks)
    return Multilinear(program, blocks), enumerated


def random_parameters(evaluator: Evaluator) -> Parameters:
    rows = evaluator.layout.rows.count
    found = {}
    for b in evaluator.blocks:
        shape = (rows, evaluator.layout.copies(b.site))
        mean = torch.rand(*shape, b.factor.size)
        found[b.name] = b.factor.initial(mean, 1.0) if b.factor.is_point else torch.randn(*shape, b.factor.num_params)
    return found


def assert_same(evaluator: Evaluator, found: Parameters, expected: Parameters, atol: float = 1e-10) -> None:
    for block in evaluator.blocks:
        marginals = [block.factor.marginal(p[block.name], 0, block.factor.size) for p in (found, expected)]
        torch.testing.assert_close(marginals[0].mean, marginals[1].mean, atol=atol, rtol=0)
        entropies = [block.factor.entropy(p[block.name]) for p in (found, expected)]
        torch.testing.assert_close(entropies[0], entropies[1], atol=10 * atol, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_bound_and_optima_are_those_of_all_states(name: str) -> None:
    multilinear, enumerated = both(name)
    for _ in range(3):
        params = random_parameters(multilinear)
        torch.testing.assert_close(multilinear.bound(params), enumerated.bound(params), **EXACT)
        if not enumerated.exact_posterior:
            assert_same(multilinear, multilinear.jump(params), enumerated.jump(params))


@pytest.mark.parametrize("name", CASES)
def test_sweeps_never_lower_the_bound_and_rest_where_enumerated_ones_do(name: str) -> None:
    multilinear, enumerated = both(name)
    params = random_parameters(multilinear)
    before = multilinear.bound(params)
    for _ in range(500):
        params = multilinear.sweep(params)
        after = multilinear.bound(params)
        assert bool((after >= before - 1e-11).all())
        if bool((after - before <= 1e-15).all()):
            break
        before = after
    assert_same(multilinear, enumerated.sweep(params), params, atol=1e-6)


def test_a_sweep_goes_through_the_colours_in_turn() -> None:
    """In `triples` only the first unit and the last do not interact."""
    multilinear, enumerated = both("triples")
    params = random_parameters(multilinear)
    expected = {name: value.clone() for name, value in params.items()}
    for name, columns in (("h", [0, 3]), ("h", [1]), ("h", [2]), ("z", [0, 1, 2])):
        expected[name][..., columns] = enumerated.jump(expected)[name][..., columns]
    assert_same(multilinear, multilinear.sweep(params), expected)
    assert_same(multilinear, multilinear.coloured_sweep(params), expected)


def test_one_block_over_all_latents_is_the_exact_posterior() -> None:
    multilinear, enumerated = both("all in one block")
    assert multilinear.exact_posterior
    params, bound = multilinear.solve()
    torch.testing.assert_close(bound, enumerated.log_joint.logsumexp(-1), **EXACT)
    assert_same(multilinear, params, enumerated.solve()[0])


def test_what_is_enumerated_and_what_is_not() -> None:
    names = {name: [g.block.name for g in both(name)[0].tables] for name in CASES}
    assert names["triples"] == names["triples, points"] == names["plates"] == []
    assert names["switched"] == names["switched, points"] == ["k"]
    assert len(names["triples, two blocks"]) == 2
    assert len(names["plates, blocks"]) == 3


# ---------------------------------------------------------------- too wide to enumerate

WIDTH = 60


def cubic_chain(v: Tensor) -> None:
    """Each unit with its two neighbours to the right: 2^60 states; v is (N, 58) and weighs the products."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.linspace(-1, 1, WIDTH)).to_event(1))
        pyro.factor("three", (v * h[..., 2:] * h[..., 1:-1] * h[..., :-2]).sum(-1))
        pyro.sample("v", dist.Normal(torch.zeros(WIDTH - 2), 1.0).expand(v.shape).to_event(1), obs=v)


def by_hand(v: Tensor, logits: Tensor) -> Tensor:
    """L of the cubic chain: E[h_i h_j h_k] of independent units is the product of their means."""
    m, bias = logits.sigmoid(), torch.linspace(-1, 1, WIDTH)
    energy = (bias * m).sum(-1) - torch.nn.functional.softplus(bias).sum()
    energy = energy + (v * m[:, 2:] * m[:, 1:-1] * m[:, :-2]).sum(-1)
    entropy = -(torch.xlogy(m, m) + torch.xlogy(1 - m, 1 - m)).sum(-1)
    return energy + entropy + dist.Normal(0.0, 1.0).log_prob(v).sum(-1)


def test_a_wide_program_is_served_by_its_means() -> None:
    v = 3 * torch.randn(4, WIDTH - 2)
    program = Program(cubic_chain, (v,), {})
    evaluator = choose_evaluator(program, MeanField(cubic_chain).make_blocks(program))
    assert isinstance(evaluator, Multilinear)
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.bound(params), by_hand(v, params["h"][:, 0]), **EXACT)
    assert len(evaluator._colours) == 3
    before = evaluator.bound(params)
    for _ in range(100):
        params = evaluator.sweep(params)
        after = evaluator.bound(params)
        assert bool((after >= before - 1e-11).all())
        before = after
    m = params["h"][:, 0].sigmoid()
    padded = torch.nn.functional.pad(m, (2, 2))
    w = torch.nn.functional.pad(v, (2, 2))
    products = [w[:, i : i + WIDTH] * padded[:, i : i + WIDTH] for i in range(3)]
    products = [x * padded[:, i + 1 : i + 1 + WIDTH] * padded[:, i + 2 : i + 2 + WIDTH] for i, x in enumerate(products)]
    slope = sum(products, torch.zeros(())) / m
    expected = torch.sigmoid(torch.linspace(-1, 1, WIDTH) + slope)
    torch.testing.assert_close(m, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("schedule", [Coloured(), Adaptive()])
def test_em_finds_the_fixed_point_of_a_wide_program(schedule: Any) -> None:
    v = 2 * torch.randn(4, WIDTH - 2)
    step = FixedPoint(schedule, BoundChange(1e-10), max_sweeps=300)
    guide = MeanField(cubic_chain)
    em = EM(cubic_chain, guide, e_step=step, m_step=None)
    history = em.run(v, max_steps=3, progress=False)
    assert step.converged
    assert all(entry.exact for entry in history.ledger)
    mean = guide.posterior(v)["h"].mean
    torch.testing.assert_close(history.ledger[-1].bound, by_hand(v, mean.logit()).sum().item(), atol=1e-8, rtol=1e-10)
    terms = elbo_terms(cubic_chain, guide, v)
    assert terms.exact
    torch.testing.assert_close(terms.bound.sum().item(), history.ledger[-1].bound)


def test_rows_that_differ_in_what_interacts_are_all_asked() -> None:
    """Only the last row has its triple: the first row alone would put all units into one colour."""
    on = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.0])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
            pyro.factor("three", v * h.prod(-1))
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (on,), {})
    evaluator = Multilinear(program, MeanField(model).make_blocks(program))
    assert len(evaluator._colours) == 3


# ---------------------------------------------------------------- gradients


def learned(v: Tensor) -> None:
    w = pyro.param("w", torch.linspace(-1.0, 2.0, 5))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=w).to_event(1))
        pyro.factor("three", v * (w[2:] * h[..., 2:] * h[..., 1:-1] * h[..., :-2]).sum(-1))
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)


def test_gradients_are_those_of_enumeration() -> None:
    program = Program(learned, (torch.randn(4),), {})
    blocks = MeanField(learned).make_blocks(program)
    layout = Layout(program.rows, program.latents)
    logits = torch.randn(4, 1, 5)
    found = []
    for make in (
        lambda: Multilinear(program, blocks, create_graph=True),
        lambda: Enumerated(enumerate_log_joint(program), layout, blocks),
    ):
        params = logits.clone().requires_grad_()
        w = pyro.param("w").unconstrained()
        found.append(torch.autograd.grad(make().bound({"h": params}).sum(), (params, w)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert not Multilinear(program, blocks).bound({"h": logits}).requires_grad


def test_a_gradient_step_on_q_leaves_theta_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_ext.choose.can_enumerate", lambda program: False)
    v = torch.randn(4)
    em = EM(learned, MeanField(learned), e_step=Gradient(pyro.optim.Adam({"lr": 0.1})), m_step=None)
    em.step(v)
    before = pyro.param("w").detach().clone()
    loss = em.step(v)
    assert torch.equal(pyro.param("w"), before)
    assert em.step(v) < loss
    learner = EM(learned, em.guide, e_step=FixedPoint(), m_step=Gradient(pyro.optim.Adam({"lr": 0.1})))
    learner.step(v)
    assert not torch.equal(pyro.param("w"), before)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bend", [lambda x: x * x, torch.nn.functional.softplus, lambda x: (x > 0.5).to(x), torch.abs])
def test_units_that_bend_are_enumerated_not_averaged(bend: Callable[[Tensor], Tensor]) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([4]).to_event(1))
            pyro.factor("bent", v * bend(h[..., 0] + 2 * h[..., 1] - 0.5) + h[..., 1] * h[..., 2] * h[..., 3])
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (torch.randn(3),), {})
    evaluator = Multilinear(program, MeanField(model).make_blocks(program))
    assert {0, 1} >= {g.features[0] for g in evaluator.tables} > set()
    enumerated = Enumerated(enumerate_log_joint(program), evaluator.layout, evaluator.blocks)
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.bound(params), enumerated.bound(params), **EXACT)
    assert_same(evaluator, evaluator.jump(params), enumerated.jump(params))


def test_units_that_bend_only_between_the_others_states_are_found() -> None:
    """On states of the others each unit is affine here; at their means it is not."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([5]).to_event(1))
            hidden = h[..., 0] * (1 - h[..., 0]) * h[..., 1] * (1 - h[..., 1])
            pyro.factor("bent", 50 * v * hidden + h[..., 2] * h[..., 3] * h[..., 4])
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (torch.randn(3),), {})
    evaluator = Multilinear(program, MeanField(model).make_blocks(program))
    assert {g.features[0] for g in evaluator.tables} == {0, 1}
    enumerated = Enumerated(enumerate_log_joint(program), evaluator.layout, evaluator.blocks)
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.bound(params), enumerated.bound(params), **EXACT)


def test_a_network_of_few_units_is_enumerated() -> None:
    sigmoid_network_parameters(4)
    program = Program(sigmoid_network, (torch.ones(3, 4),), {})
    blocks = MeanField(sigmoid_network).make_blocks(program)
    evaluator = Multilinear(program, blocks)
    enumerated = Enumerated(enumerate_log_joint(program), evaluator.layout, blocks)
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.bound(params), enumerated.bound(params), **EXACT)


def wide_network(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([20]).to_event(1))
        pyro.sample("v", dist.Bernoulli(logits=h.sum(-1) - 3), obs=v)


def test_too_many_units_that_bend_are_refused_and_the_remedy_named() -> None:
    program = Program(wide_network, (torch.ones(3),), {})
    blocks = MeanField(wide_network).make_blocks(program)
    with pytest.raises(NotMultilinearError, match=r"at most 4096 joint states .* not affine, but got 2\^20 in .* 'h'"):
        Multilinear(program, blocks)
    with pytest.raises(NoEvaluatorError, match=r"quadratic .* 2\^20 states.*FixedPoint\(evaluator=Sampled\(\)\)"):
        choose_evaluator(program, blocks)


def test_too_large_joint_factors_are_refused_by_name() -> None:
    v = torch.randn(2, WIDTH - 2)
    program = Program(cubic_chain, (v,), {})
    blocks = Structured(cubic_chain, blocks=[[("h", list(range(13)))]]).make_blocks(program)
    with pytest.raises(NotMultilinearError, match=r"at most 4096 joint states .* got 2\^13 in the blocks 'block_0'"):
        Multilinear(program, blocks)


def test_continuous_latents_and_factors_without_states_are_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(x, 1.0), obs=v)

    program = Program(model, (torch.ones(3),), {})
    with pytest.raises(NotMultilinearError, match="Expected binary, one-hot or categorical latents, .* real site 'x'"):
        Multilinear(program, MeanField(model).make_blocks(program))


def test_a_hard_zero_of_the_likelihood_is_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([40]).to_event(1))
            pyro.factor("never", torch.where((h[..., 0] > 0.5) & (v > 0), -torch.inf, h[..., :3].prod(-1)))
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (torch.ones(3),), {})
    with pytest.raises(
        NotFiniteError, match=r"Expected p.* above 0 and finite on every state .*but got log p = -inf in"
    ):
        Multilinear(program, MeanField(model).make_blocks(program))


def test_a_hard_zero_of_a_prior_is_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.tensor([0.0, 1.0, torch.inf])).to_event(1))
            pyro.factor("three", h.prod(-1))
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    pyro.enable_validation(False)
    program = Program(model, (torch.ones(3),), {})
    with pytest.raises(NotFiniteError, match=r"Expected a prior above 0 on every state of 'h' .*19.56.* hard zero"):
        Multilinear(program, MeanField(model).make_blocks(program))


def test_parameters_that_are_not_finite_are_named() -> None:
    evaluator, _ = both("triples")
    params = random_parameters(evaluator)
    params["z"][2] = torch.nan
    with pytest.raises(NotFiniteError, match="Expected p.* above 0 and finite .* but got L = nan in row 2"):
        evaluator.bound(params)


def test_rows_that_depend_on_each_other_are_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([40]).to_event(1))
            pyro.factor("across", h[..., :3].prod(-1) + h.roll(1, -2)[..., 4])
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (torch.ones(30),), {})
    with pytest.raises(ValueError, match="rows that do not depend on each other in the plates"):
        Multilinear(program, MeanField(model).make_blocks(program))
