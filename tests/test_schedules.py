"""Schedules: colours that do not interact, damping in natural parameters, and the controller of damping."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import EM, Adaptive, BoundChange, Coloured, FixedPoint, MeanChange, Parallel, Sequential
from pyro_ext.choose import choose_evaluator
from pyro_ext.colours import batches_of, colour_groups, coupled_features, groups_of
from pyro_ext.continuous_factors import MultivariateNormalFactor, NormalFactor
from pyro_ext.discrete_factors import BernoulliFactor, JointFactor, OneHotFactor
from pyro_ext.evaluators import Enumerated, Evaluator, Parameters, Quadratic
from pyro_ext.guides import Dirac, MeanField, Structured
from pyro_ext.initial import cold_parameters
from pyro_ext.program import Program
from pyro_ext.schedules import interpolate
from tests.oracles.programs import sigmoid_network, sigmoid_network_parameters, sparse_coding, sparse_coding_parameters

pytestmark = pytest.mark.usefixtures("float64")


def evaluator_of(guide: Any, *args: Any) -> Evaluator:
    program = Program(guide.model, args, {})
    return choose_evaluator(program, guide.make_blocks(program))


def random_parameters(evaluator: Evaluator) -> Parameters:
    rows = evaluator.layout.rows.count
    return {
        b.name: b.factor.initial(torch.rand(rows, evaluator.layout.copies(b.site), b.factor.size), 0.7)
        for b in evaluator.blocks
    }


# ---------------------------------------------------------------- colours


def chain(v: Tensor) -> None:
    """Neighbours in a row of eight units, real and binary, explain one observation together."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([8]).to_event(1))
        pyro.sample("v", dist.Normal(h[..., 1:] - 2 * h[..., :-1], 0.8).to_event(1), obs=v)


def layers(v: Tensor) -> None:
    """An energy between two layers of binary units, and none within."""
    w = torch.linspace(-2, 2, 12).reshape(4, 3)
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(0.4).expand([4]).to_event(1))
        c = pyro.sample("c", dist.OneHotCategorical(torch.ones(3)))
        pyro.factor("energy", ((a @ w) * c).sum(-1))
        pyro.sample("v", dist.Normal(a, 1.0).to_event(1), obs=v)


def plated(v: Tensor) -> None:
    """A global choice over an inner plate of pairs, which meet only through it; v is (3, N, 2)."""
    with pyro.plate("rows", v.shape[1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", 6, dim=-2, subsample=torch.tensor([5, 0, 3])):
            c = pyro.sample("c", dist.Bernoulli(0.6).expand([2]).to_event(1))
            x = pyro.sample("x", dist.Normal(a - c.sum(-1), 1.2))
            pyro.sample("v", dist.Normal((a + x)[..., None] + 2 * c, 0.5).to_event(1), obs=v)


COLOURED: dict[str, tuple[Callable[..., Any], tuple[int, ...], Callable[[Any], Any], int]] = {
    "chain": (chain, (5, 7), MeanField, 2),
    "blocks of a chain": (chain, (5, 7), lambda m: Structured(m, blocks=[[("h", [0, 1])], [("h", [2, 3])]]), 2),
    "points on a chain": (chain, (5, 7), Dirac, 2),
    "layers": (layers, (5, 4), MeanField, 2),
    "plates": (plated, (3, 4, 2), MeanField, 4),
    "blocks in plates": (plated, (3, 4, 2), lambda m: Structured(m, blocks=[["c"]]), 3),
}


@pytest.mark.parametrize("name", COLOURED)
def test_a_coloured_sweep_is_a_sequential_one_in_the_order_of_the_colours(name: str) -> None:
    model, shape, guide, num_colours = COLOURED[name]
    evaluator = evaluator_of(guide(model), torch.randn(shape))
    assert isinstance(evaluator, Quadratic)
    groups = groups_of(evaluator.blocks, [evaluator.indices(b) for b in evaluator.blocks])
    colours = colour_groups(groups, coupled_features(evaluator.form.coupling))
    assert len(colours) == num_colours
    params = random_parameters(evaluator)
    expected = {name: value.clone() for name, value in params.items()}
    for colour in colours:
        for number in colour:
            block, copy = groups[number].block, groups[number].copy
            columns = block.factor.columns(groups[number].features)
            expected[block.name][:, copy, columns] = evaluator.jump(expected)[block.name][:, copy, columns]
    found = evaluator.coloured_sweep(params)
    for block in evaluator.blocks:
        torch.testing.assert_close(found[block.name], expected[block.name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", COLOURED)
def test_coloured_sweeps_never_lower_the_bound_and_rest_where_sequential_ones_do(name: str) -> None:
    model, shape, guide, _ = COLOURED[name]
    evaluator = evaluator_of(guide(model), torch.randn(shape))
    params = random_parameters(evaluator)
    before = evaluator.bound(params)
    for _ in range(120):
        params = Coloured().apply(evaluator, params)
        after = evaluator.bound(params)
        assert bool((after >= before - 1e-11).all())
        before = after
    torch.testing.assert_close(evaluator.means(evaluator.sweep(params)), evaluator.means(params), atol=1e-8, rtol=0)


def test_dense_couplings_give_the_sequential_sweep() -> None:
    sparse_coding_parameters(6, 5)
    evaluator = evaluator_of(MeanField(sparse_coding), torch.randn(4, 6))
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.coloured_sweep(params), evaluator.sweep(params), atol=1e-12, rtol=0)


def test_enumerated_programs_are_swept_sequentially() -> None:
    sigmoid_network_parameters(4)
    evaluator = evaluator_of(MeanField(sigmoid_network), torch.ones(3, 4))
    assert isinstance(evaluator, Enumerated)
    params = random_parameters(evaluator)
    torch.testing.assert_close(evaluator.coloured_sweep(params), evaluator.sweep(params), atol=0, rtol=0)


def test_couplings_of_any_row_count() -> None:
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[:3] = False

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([8]).to_event(1))
            pyro.sample("v", dist.Normal(h[..., 1:] - 2 * h[..., :-1], 0.8).mask(mask).to_event(1), obs=v)

    evaluator = evaluator_of(MeanField(model), torch.randn(4, 7))
    assert isinstance(evaluator, Quadratic)
    assert evaluator.form.coupling.dim() == 3
    pairs = coupled_features(evaluator.form.coupling)
    expected = torch.diag(torch.ones(7), 1).bool()
    assert torch.equal(pairs & ~torch.eye(8).bool(), expected | expected.mT)


def test_rounding_is_no_coupling() -> None:
    coupling = torch.tensor([[1.0, 1e-17, 0.0], [1e-17, 2.0, 1e-9], [0.0, 1e-9, 1e-7]])
    assert coupled_features(coupling).tolist() == [[True, False, False], [False, True, True], [False, True, True]]


def test_a_colour_of_many_elements_is_one_batch() -> None:
    guide = MeanField(plated)
    evaluator = evaluator_of(guide, torch.randn(3, 4, 2))
    assert isinstance(evaluator, Quadratic)
    groups = groups_of(evaluator.blocks, [evaluator.indices(b) for b in evaluator.blocks])
    colours = colour_groups(groups, coupled_features(evaluator.form.coupling))
    batches = [batch for colour in colours for batch in batches_of([groups[g] for g in colour])]
    assert sorted(len(batch.copies) * len(batch.features) for batch in batches) == [1, 3, 3, 3]


# ---------------------------------------------------------------- damping


def test_gaussians_are_damped_in_precision_and_precision_times_mean() -> None:
    factor = NormalFactor(2)
    old, new = torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    damping = torch.tensor([0.0, 0.3, 0.9])[:, None]
    mean, scale = factor.moments(factor.interpolate(old, new, damping))
    naturals = [(s**-2, s**-2 * m) for m, s in (factor.moments(old), factor.moments(new))]
    precision, linear = (damping[..., None] * a + (1 - damping[..., None]) * b for a, b in zip(*naturals, strict=True))
    torch.testing.assert_close(scale, precision.rsqrt())
    torch.testing.assert_close(mean, linear / precision)


def test_joint_gaussians_are_damped_in_precision_and_precision_times_mean() -> None:
    factor = MultivariateNormalFactor(3)
    old, new = torch.randn(2, 4, 1, factor.num_params)
    damping = torch.tensor([0.0, 0.3, 0.6, 0.9])[:, None]
    mean, tril = factor.moments(factor.interpolate(old, new, damping))
    naturals = []
    for params in (old, new):
        m, t = factor.moments(params)
        precision = torch.linalg.inv(t @ t.mT)
        naturals.append((precision, (precision @ m[..., None]).squeeze(-1)))
    (p, x), (q, y) = naturals
    precision = damping[..., None, None] * p + (1 - damping[..., None, None]) * q
    linear = damping[..., None] * x + (1 - damping[..., None]) * y
    torch.testing.assert_close(torch.linalg.inv(tril @ tril.mT), precision)
    torch.testing.assert_close(mean, torch.linalg.solve(precision, linear[..., None]).squeeze(-1))


FACTORS = (BernoulliFactor(3), OneHotFactor(1, 3), JointFactor([1, 1]), NormalFactor(2), MultivariateNormalFactor(2))


@pytest.mark.parametrize("factor", FACTORS)
def test_the_ends_of_damping_are_old_and_new(factor: Any) -> None:
    old, new = torch.randn(2, 3, 1, factor.num_params)
    for damping, end in ((0.0, new), (1.0, old)):
        for share in (damping, torch.full((3, 1), damping)):
            torch.testing.assert_close(factor.interpolate(old, new, share), end)


def mixed(v: Tensor) -> None:
    """Binary, one-hot and real latents, the real ones strongly correlated."""
    w, u = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 1.5]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(0.4).expand([2]).to_event(1))
        c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        x = pyro.sample("x", dist.Normal(a.sum(-1, keepdim=True), 1.5).expand(a.shape[:-1] + (3,)).to_event(1))
        pyro.sample("v", dist.Normal(a @ u + (x + c) @ w.T, 0.4).to_event(1), obs=v)


@pytest.mark.parametrize("blocks", [[], [["a", "c"], ["x"]], [[("x", [0, 2])]]])
def test_small_steps_raise_the_bound(blocks: Any) -> None:
    evaluator = evaluator_of(Structured(mixed, blocks=blocks) if blocks else MeanField(mixed), torch.randn(20, 2))
    for _ in range(5):
        params = random_parameters(evaluator)
        before = evaluator.bound(params)
        after = evaluator.bound(interpolate(evaluator, params, evaluator.jump(params), 1 - 1e-4))
        assert bool((after > before).all())


# ---------------------------------------------------------------- the controller


def swinging(v: Tensor, bias: float = 4.5) -> None:
    """Two units that repel each other: undamped parallel sweeps swing between both on and both off, for ever."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=bias * torch.ones(2)).to_event(1))
        pyro.factor("repulsion", -9 * h[..., 0] * h[..., 1])
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)


def ring(v: Tensor) -> None:
    """Six units in a ring, each inhibited by its neighbours, with a drive of its own in every row."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.full((6,), 3.0)).to_event(1))
        pyro.factor("ring", -6 * (h * h.roll(1, -1)).sum(-1))
        pyro.sample("v", dist.Normal(0.1 * h, 1.0).to_event(1), obs=v)


def correlated(v: Tensor) -> None:
    """Real latents whose mean is observed: Jacobi's iteration on their precision diverges."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.3), obs=v)


CONTROLLED = {
    "two units": (swinging, torch.zeros(3)),
    "ring": (ring, torch.arange(30.0).reshape(5, 6)),
    "mixed": (mixed, torch.linspace(-3, 3, 12).reshape(6, 2)),
    "gaussian": (correlated, torch.tensor([-1.0, 0.0, 2.0])),
}


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_controller_reaches_a_stationary_point_without_a_fall(name: str, damping: float) -> None:
    model, v = CONTROLLED[name]
    evaluator = evaluator_of(MeanField(model), v)
    program = Program(model, (v,), {})
    params = cold_parameters(program, MeanField(model, name="cold").make_blocks(program))
    sweep = Adaptive(damping).sweeper(evaluator)
    bounds = [evaluator.bound(params)]
    for _ in range(300 if model in (mixed, correlated) else 60):
        params = sweep(params)
        bounds.append(evaluator.bound(params))
    assert bool((torch.stack(bounds).diff(dim=0) >= -1e-12).all())
    assert bool((bounds[-1] > bounds[0]).all())
    size = 1e-5
    for name_, table in params.items():
        for i in range(table.shape[-1]):
            moved = [dict(params), dict(params)]
            for sign, there in zip((1, -1), moved, strict=True):
                there[name_] = table.clone()
                there[name_][..., i] += sign * size
            slope = (evaluator.bound(moved[0]) - evaluator.bound(moved[1])) / (2 * size)
            assert slope.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["two units", "ring", "gaussian"])
def test_undamped_parallel_sweeps_do_not_get_there(name: str) -> None:
    model, v = CONTROLLED[name]
    evaluator = evaluator_of(MeanField(model), v)
    program = Program(model, (v,), {})
    params = cold_parameters(program, MeanField(model, name="cold").make_blocks(program))
    changes = []
    for _ in range(60):
        new = Parallel(0.0).apply(evaluator, params)
        changes.append((evaluator.means(new) - evaluator.means(params)).abs().max())
        params = new
    assert min(changes[10:]) > 0.5


@pytest.mark.parametrize("criterion", [BoundChange(1e-6), MeanChange(1e-4)])
def test_a_swing_between_equal_bounds_is_not_reported_as_converged(criterion: Any) -> None:
    v = torch.zeros(2)
    swing = FixedPoint(Parallel(0.0), criterion, max_sweeps=40)
    EM(swinging, MeanField(swinging), e_step=swing, m_step=None).infer(v)
    assert swing.last_sweeps == 40
    assert not swing.converged
    controlled = FixedPoint(Adaptive(0.0), criterion, max_sweeps=40)
    posterior = EM(swinging, MeanField(swinging, name="other"), e_step=controlled, m_step=None).infer(v)
    assert controlled.converged
    assert controlled.last_sweeps < 20
    mean = posterior["h"].mean
    torch.testing.assert_close(mean, torch.sigmoid(4.5 - 9 * mean.flip(-1)), atol=1e-3, rtol=0)


def test_damped_sweeps_that_settle_are_reported_as_converged() -> None:
    for schedule in (Parallel(0.8), Sequential(), Coloured(), Adaptive()):
        step = FixedPoint(schedule, BoundChange(1e-10), max_sweeps=500)
        EM(ring, MeanField(ring, name=type(schedule).__name__), e_step=step, m_step=None).infer(CONTROLLED["ring"][1])
        assert step.converged
        assert step.last_sweeps < 200
    step = FixedPoint(Sequential(), BoundChange(0.0), max_sweeps=1)
    EM(ring, MeanField(ring, name="short"), e_step=step, m_step=None).infer(CONTROLLED["ring"][1])
    assert not step.converged


def test_rows_are_damped_on_their_own() -> None:
    """A row beside one that swings takes the steps that it takes alone."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.full((2,), 1.0)).to_event(1))
            pyro.factor("repulsion", -v * h[..., 0] * h[..., 1])
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    ends = []
    for v in (torch.tensor([0.5]), torch.tensor([0.5, 30.0])):
        evaluator = evaluator_of(MeanField(model, name=f"g{len(v)}"), v)
        params = {"h": torch.ones(len(v), 1, 2)}
        sweep = Adaptive(0.2).sweeper(evaluator)
        for _ in range(4):
            params = sweep(params)
        ends.append(params["h"][0])
    torch.testing.assert_close(ends[0], ends[1], atol=1e-12, rtol=0)


def test_good_contraction_lowers_the_damping() -> None:
    v = torch.randn(6, 6)
    sparse_coding_parameters(6, 3)
    with torch.no_grad():
        pyro.param("W").mul_(0.3)
    sweeps = []
    for schedule in (Adaptive(0.9), Parallel(0.9)):
        guide = MeanField(sparse_coding, name=type(schedule).__name__)
        step = FixedPoint(schedule, BoundChange(1e-12), max_sweeps=500)
        EM(sparse_coding, guide, e_step=step, m_step=None).infer(v)
        assert step.converged
        sweeps.append(step.last_sweeps)
    assert sweeps[0] * 4 < sweeps[1]


def test_a_run_with_the_controller_promises_and_keeps_monotony() -> None:
    from pyro_ext import ClosedForm, Warm
    from pyro_ext.models import BinarySparseCoding

    model = BinarySparseCoding(num_visible=6, num_latents=5)
    em = EM(model, MeanField(model), e_step=FixedPoint(Adaptive(0.0), start=Warm()), m_step=ClosedForm())
    history = em.run(3 * torch.randn(40, 6), max_steps=30, tolerance=0.0, progress=False)
    bounds = [entry.bound for entry in history.ledger]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(bounds))
    assert history.status.value == "max_steps"


def test_a_row_that_no_step_raises_stays() -> None:
    """Where even the smallest step would lower L, by an evaluator that errs, the row keeps its parameters."""
    inner = evaluator_of(MeanField(swinging), torch.zeros(2))

    class Erring(Quadratic):
        def jump(self, params: Parameters) -> Parameters:
            optimum, old = inner.jump(params)["h"], params["h"]
            return {"h": torch.where(torch.tensor([True, False])[:, None, None], 2 * old - optimum, optimum)}

    assert isinstance(inner, Quadratic)
    erring = Erring(inner.form, inner.blocks)
    params = {"h": torch.tensor([[[0.3, -1.0]], [[0.3, -1.0]]])}
    after = Adaptive(0.0, max_halvings=5).apply(erring, params)
    assert torch.equal(after["h"][0], params["h"][0])
    assert not torch.equal(after["h"][1], params["h"][1])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected damping in \[0, 1\), but got -0.1. Use 0 for undamped sweeps."):
        Adaptive(-0.1)
    with pytest.raises(ValueError, match="Expected max_halvings of at least 1, but got 0. 20 is plenty."):
        Adaptive(max_halvings=0)


def test_points_are_not_controlled() -> None:
    em = EM(swinging, Dirac(swinging), e_step=FixedPoint(Adaptive()), m_step=None)
    with pytest.raises(TypeError, match=r"Expected the Sequential\(\) schedule for the point masses 'h', but got"):
        em.step(torch.zeros(2))
