"""L and its coordinate maxima: against the book's formulas, and against enumeration of all states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.choose import choose_evaluator
from pyro_ext.evaluators import (
    Enumerated,
    Evaluator,
    NoEvaluatorError,
    Parameters,
    Quadratic,
    can_enumerate,
    enumerate_log_joint,
)
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.structured import Structured
from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.quadratic import quadratic_form
from tests.oracles.enumeration import binary_sparse_coding_log_joint, binary_states, factorial_posterior
from tests.oracles.programs import (
    class_means,
    sigmoid_network,
    sigmoid_network_parameters,
    sparse_coding,
    sparse_coding_parameters,
)
from tests.oracles.variational import (
    coordinate_sweep,
    sparse_coding_bound,
    table_bound,
    update_19_44,
    update_19_45,
)

EXACT = {"atol": 1e-10, "rtol": 1e-10}
float64 = pytest.mark.usefixtures("float64")


def evaluators(model: Callable[..., Any], guide: Any, *args: Any) -> tuple[Quadratic, Enumerated]:
    """Both evaluators of a program that both serve."""
    program = Program(model, args, {})
    blocks = guide.make_blocks(program)
    layout = Layout(program.rows, program.latents)
    return Quadratic(quadratic_form(program), blocks), Enumerated(enumerate_log_joint(program), layout, blocks)


def random_parameters(evaluator: Evaluator) -> Parameters:
    rows = evaluator.layout.rows.count
    return {
        b.name: torch.randn(rows, evaluator.layout.copies(b.site), b.factor.num_params).to(torch.get_default_dtype())
        for b in evaluator.blocks
    }


def both(num_latents: int = 4, num_rows: int = 6) -> tuple[list[Evaluator], Tensor, tuple[Tensor, Tensor, Tensor]]:
    b, W, beta = sparse_coding_parameters(5, num_latents)
    v = torch.randn(num_rows, 5)
    return list(evaluators(sparse_coding, MeanField(sparse_coding), v)), v, (b, W, beta)


@float64
@pytest.mark.parametrize("repeat", range(3))
def test_bound_is_equation_19_36(repeat: int) -> None:
    pyro.set_rng_seed(repeat)
    found, v, (b, W, beta) = both()
    for evaluator in found:
        params = random_parameters(evaluator)
        means = params["h"][:, 0].sigmoid()
        torch.testing.assert_close(evaluator.bound(params), sparse_coding_bound(v, means, W, b, beta), **EXACT)


@float64
@pytest.mark.parametrize("repeat", range(3))
def test_sweep_is_equations_19_44_and_19_45(repeat: int) -> None:
    pyro.set_rng_seed(repeat)
    found, v, (b, W, beta) = both()
    start = random_parameters(found[0])
    for rule in (update_19_44, update_19_45):
        means = start["h"][:, 0].sigmoid()
        for i in range(4):
            means = means.clone()
            means[:, i] = rule(v, means, W, b, beta, i)
        old = start["h"][:, 0].sigmoid()
        jumped = torch.stack([rule(v, old, W, b, beta, i) for i in range(4)], -1)
        for evaluator in found:
            torch.testing.assert_close(evaluator.sweep(start)["h"][:, 0].sigmoid(), means, **EXACT)
            torch.testing.assert_close(evaluator.jump(start)["h"][:, 0].sigmoid(), jumped, **EXACT)


@float64
def test_bound_lies_below_log_p_by_the_divergence() -> None:
    found, v, (b, W, beta) = both()
    log_joint = binary_sparse_coding_log_joint(v, binary_states(4), W, b, beta)
    log_p = log_joint.logsumexp(0)
    for evaluator in found:
        for scale in (0.1, 1.0, 10.0):
            params = {"h": scale * torch.randn(6, 1, 4)}
            q = factorial_posterior(params["h"][:, 0].sigmoid())
            bound = evaluator.bound(params)
            divergence = (q * (q.log() - (log_joint - log_p))).sum(0)
            assert bool((bound <= log_p + 1e-12).all())
            torch.testing.assert_close(log_p - bound, divergence, **EXACT)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_bound_and_gradient_stay_finite_in_single_precision(size: float) -> None:
    found, _, _ = both()
    for evaluator in found:
        params = {"h": (size * torch.randn(6, 1, 4).sign()).requires_grad_()}
        bound = evaluator.bound(params)
        assert bound.dtype == torch.float32
        bound.sum().backward()
        assert bool(torch.isfinite(bound).all())
        assert bool(torch.isfinite(params["h"].grad).all())
        means = evaluator.means(params)
        assert bool(((means > 0) & (means < 1)).all())


def test_strongly_driven_units_stay_finite_in_single_precision() -> None:
    sparse_coding_parameters(5, 4)
    with torch.no_grad():
        pyro.param("W").mul_(100)
    v = 100 * torch.randn(6, 5)
    for evaluator in evaluators(sparse_coding, MeanField(sparse_coding), v):
        params = evaluator.sweep(random_parameters(evaluator))
        assert bool(torch.isfinite(evaluator.bound(params)).all())
        means = evaluator.means(params)
        assert bool(((means > 0) & (means < 1)).all())


# ---------------------------------------------------------------- both evaluators are one


def plain_mixture(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        a = pyro.sample("a", dist.Bernoulli(0.4).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(z @ torch.tensor([-1.0, 0.5, 2.0]) + a.sum(-1), 0.8), obs=v)


def inner_plate(v: Tensor) -> None:
    with pyro.plate("rows", v.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", v.shape[-2], dim=-2):
            c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
            pyro.sample("v", dist.Normal(a + c @ torch.tensor([-1.0, 0.5, 2.0]), 0.5), obs=v)


def subsampled_inner_plate(v: Tensor) -> None:
    with pyro.plate("rows", v.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", 6, dim=-2, subsample=torch.tensor([5, 0, 3])):
            c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
            pyro.sample("v", dist.Normal(a + c @ torch.tensor([-1.0, 0.5, 2.0]), 0.5), obs=v)


PROGRAMS = {
    "subsampled inner plate": (subsampled_inner_plate, (3, 4), [["c"]]),
    "one-hot and binary": (plain_mixture, (6,), [[("a", [0]), "z"]]),
    "inner plate": (inner_plate, (3, 4), [["c"]]),
}
GUIDES: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "mean field": lambda model, blocks: MeanField(model),
    "structured": lambda model, blocks: Structured(model, blocks=blocks),
    "dirac": lambda model, blocks: Dirac(model),
}


def settled(evaluator: Evaluator, params: Parameters) -> Parameters:
    """Parameters that are legal for point masses too: those of one jump."""
    return evaluator.jump(params) if any(b.factor.is_point for b in evaluator.blocks) else params


@float64
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("family", GUIDES)
def test_matrices_and_enumeration_agree(program: str, family: str) -> None:
    model, shape, blocks = PROGRAMS[program]
    quadratic, enumerated = evaluators(model, GUIDES[family](model, blocks), torch.randn(shape))
    params = settled(quadratic, random_parameters(quadratic))
    for _ in range(3):
        torch.testing.assert_close(quadratic.bound(params), enumerated.bound(params), **EXACT)
        swept, jumped = quadratic.sweep(params), quadratic.jump(params)
        for name, value in enumerated.sweep(params).items():
            assert _same(value, swept[name], quadratic.blocks, name)
        for name, value in enumerated.jump(params).items():
            assert _same(value, jumped[name], quadratic.blocks, name)
        params = swept


def _same(a: Tensor, b: Tensor, blocks: Any, name: str) -> bool:
    factor = next(block.factor for block in blocks if block.name == name)
    probs = [factor.marginal(x, 0, factor.size).mean for x in (a, b)]
    torch.testing.assert_close(*probs, **EXACT)
    torch.testing.assert_close(factor.entropy(a), factor.entropy(b), **EXACT)
    return True


@float64
def test_couplings_a_row_give_the_same_numbers() -> None:
    W = torch.randn(5, 3)
    mask = torch.rand(6, 5) > 0.3

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, 1.0).mask(mask).to_event(1), obs=v)

    for guide in (MeanField(model), Structured(model), Dirac(model)):
        quadratic, enumerated = evaluators(model, guide, torch.randn(6, 5))
        assert quadratic.form.coupling.dim() == 3
        params = settled(quadratic, random_parameters(quadratic))
        torch.testing.assert_close(quadratic.bound(params), enumerated.bound(params), **EXACT)
        assert all(
            _same(x, quadratic.sweep(params)[n], quadratic.blocks, n) for n, x in enumerated.sweep(params).items()
        )


@float64
def test_a_joint_factor_is_the_exact_posterior_after_one_sweep() -> None:
    program = Program(plain_mixture, (torch.randn(6),), {})
    log_joint = enumerate_log_joint(program)
    layout = Layout(program.rows, program.latents)
    evaluator = Enumerated(log_joint, layout, Structured(plain_mixture, blocks=[["z", "a"]]).make_blocks(program))
    assert evaluator.exact_posterior
    for exact in (evaluator, Quadratic(quadratic_form(program), evaluator.blocks)):
        start = random_parameters(exact)
        solution, bound = exact.solve()
        torch.testing.assert_close(bound, log_joint.logsumexp(-1), **EXACT)
        for params in (solution, exact.sweep(start), exact.jump(start)):
            torch.testing.assert_close(exact.bound(params), log_joint.logsumexp(-1), **EXACT)
            torch.testing.assert_close(params["block_0"][:, 0].softmax(-1), log_joint.softmax(-1), **EXACT)


@float64
def test_blocks_in_different_plates_promise_no_exact_posterior() -> None:
    program = Program(inner_plate, (torch.randn(3, 4),), {})
    evaluator = Quadratic(quadratic_form(program), Structured(inner_plate).make_blocks(program))
    assert len(evaluator.blocks) == 2
    assert not evaluator.exact_posterior


# ---------------------------------------------------------------- programs that are not quadratic


def choices_of(units: list[int]) -> Tensor:
    """Class index of every unit in every state, the last unit fastest."""
    return torch.tensor(list(itertools.product(*(range(k) for k in units))))


def tables_of(evaluator: Evaluator, params: Parameters) -> list[Tensor]:
    """The factors' tables unit by unit, in the order of a row's vector."""
    found = []
    for block in sorted(evaluator.blocks, key=lambda b: evaluator.layout.offsets[b.site.name]):
        for copy in range(params[block.name].shape[1]):
            for group in block.factor.groups:
                logits = params[block.name][:, copy, block.factor.columns(group)]
                zeros = torch.zeros_like(logits[:, :1])
                found.append((torch.cat([zeros, logits], -1) if logits.shape[-1] == 1 else logits).softmax(-1))
    return found


def network() -> tuple[Callable[..., Any], tuple[Tensor], list[int]]:
    sigmoid_network_parameters(4)
    return sigmoid_network, (torch.bernoulli(torch.full((6, 4), 0.5)),), [2] * 5


def classes() -> tuple[Callable[..., Any], tuple[Tensor], list[int]]:
    pyro.param("logits", torch.randn(3))
    pyro.param("mu", torch.randn(3, 2))
    return class_means, (torch.randn(6, 2),), [3]


def coupled_classes() -> tuple[Callable[..., Any], tuple[Tensor], list[int]]:
    table = torch.randn(3, 4)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            y = pyro.sample("y", dist.Categorical(logits=table[z]))
            a = pyro.sample("a", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(z * y + a, 0.8), obs=v)

    return model, (torch.randn(6),), [3, 4, 2]


NETWORKS = {"sigmoid network": network, "classes": classes, "coupled classes": coupled_classes}


@float64
@pytest.mark.parametrize("name", NETWORKS)
def test_sweeps_are_brute_force_coordinate_maximisation(name: str) -> None:
    model, args, units = NETWORKS[name]()
    program = Program(model, args, {})
    evaluator = choose_evaluator(program, MeanField(model).make_blocks(program))
    assert isinstance(evaluator, Enumerated)
    choices, log_joint = choices_of(units), evaluator.log_joint.mT
    params = random_parameters(evaluator)
    for sequential in (True, False, True):
        tables = tables_of(evaluator, params)
        torch.testing.assert_close(evaluator.bound(params), table_bound(log_joint, choices, tables), **EXACT)
        expected = coordinate_sweep(log_joint, choices, tables, sequential=sequential)
        params = evaluator.sweep(params) if sequential else evaluator.jump(params)
        for new, table in zip(tables_of(evaluator, params), expected, strict=True):
            torch.testing.assert_close(new, table, **EXACT)


@float64
@pytest.mark.parametrize("name", NETWORKS)
def test_tables_of_log_joints_are_those_of_single_states(name: str) -> None:
    model, args, _ = NETWORKS[name]()
    program = Program(model, args, {})
    layout = Layout(program.rows, program.latents)
    log_joint = enumerate_log_joint(program)
    states = Enumerated(log_joint, layout, ()).states
    for s, state in enumerate(states):
        values = layout.values(state.expand(program.rows.count, -1))
        torch.testing.assert_close(log_joint[:, s], program.log_joint(values).reshape(-1))


@float64
@pytest.mark.parametrize("name", NETWORKS)
def test_discrete_points_are_coordinate_wise_map(name: str) -> None:
    model, args, units = NETWORKS[name]()
    program = Program(model, args, {})
    evaluator = choose_evaluator(program, Dirac(model).make_blocks(program))
    assert isinstance(evaluator, Enumerated)
    choices, log_joint = choices_of(units), evaluator.log_joint.mT
    params = evaluator.jump(random_parameters(evaluator))
    here = [int(evaluator.bound(params)[n].sub(log_joint[:, n]).abs().argmin()) for n in range(6)]
    for _ in range(3):
        params = evaluator.sweep(params)
        for n in range(6):
            state = choices[here[n]].clone()
            for i in range(len(units)):
                rivals = [_with(state, i, k) for k in range(units[i])]
                scores = [log_joint[(choices == r).all(-1), n].item() for r in rivals]
                state = rivals[int(torch.tensor(scores).argmax())]
            here[n] = int((choices == state).all(-1).nonzero())
        expected = torch.stack([log_joint[s, n] for n, s in enumerate(here)])
        torch.testing.assert_close(evaluator.bound(params), expected, **EXACT)


def _with(state: Tensor, i: int, k: int) -> Tensor:
    changed = state.clone()
    changed[i] = k
    return changed


def test_working_precision_is_the_programs() -> None:
    """Double parameters under torch's single default."""
    W = torch.randn(3, 2, dtype=torch.float64)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((2,), 0.3, dtype=torch.float64)).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=(h @ W.T) ** 2).to_event(1), obs=v)

    program = Program(model, (torch.ones(4, 3, dtype=torch.float64),), {})
    evaluator = choose_evaluator(program, MeanField(model).make_blocks(program))
    assert isinstance(evaluator, Enumerated)
    assert evaluator.log_joint.dtype == torch.float64


# ---------------------------------------------------------------- the choice


def _blocks(model: Callable[..., Any], *args: Tensor) -> tuple[Program, tuple[Block, ...]]:
    program = Program(model, args, {})
    return program, MeanField(model).make_blocks(program)


@float64
def test_the_choice_of_evaluator() -> None:
    sparse_coding_parameters(5, 4)
    program, blocks = _blocks(sparse_coding, torch.randn(6, 5))
    assert isinstance(choose_evaluator(program, blocks), Quadratic)
    assert isinstance(choose_evaluator(program, blocks, try_quadratic=False), Enumerated)
    with_graph = choose_evaluator(program, blocks, create_graph=True)
    params = {"h": torch.zeros(6, 1, 4)}
    assert with_graph.bound(params).requires_grad
    assert not choose_evaluator(program, blocks).bound(params).requires_grad
    with_graph = choose_evaluator(program, blocks, try_quadratic=False, create_graph=True)
    assert with_graph.bound(params).requires_grad


@float64
def test_programs_that_nothing_exact_serves_are_refused() -> None:
    def link(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=h), obs=v)

    def wide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([20]).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=h.sum(-1)), obs=v)

    program, blocks = _blocks(link, torch.ones(4))
    with pytest.raises(NoEvaluatorError, match="Expected log p.* to be quadratic in 'h' on their support"):
        choose_evaluator(program, blocks)
    program, blocks = _blocks(wide, torch.ones(4))
    assert not can_enumerate(program)
    assert can_enumerate(program, max_states=2**20)
    with pytest.raises(NoEvaluatorError, match="Expected log p.* quadratic"):
        choose_evaluator(program, blocks)
    with pytest.raises(
        NoEvaluatorError, match=r"at most 65536 joint states of a row, but got no quadratic form and 2\^20 states"
    ):
        choose_evaluator(program, blocks, try_quadratic=False)


@float64
def test_a_state_without_probability_is_named() -> None:
    program, blocks = _blocks(plain_mixture, torch.randn(3))
    log_joint = enumerate_log_joint(program)
    log_joint[2, 5] = -torch.inf
    with pytest.raises(ValueError, match=r"Expected p.* above 0 .*19.56.* log p = -inf at state 5 of row 2. Keep"):
        Enumerated(log_joint, Layout(program.rows, program.latents), blocks)
