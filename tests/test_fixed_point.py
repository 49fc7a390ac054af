"""Fixed-point E-steps: monotony, exactness, starts, schedules and criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext import EM, Better, BoundChange, Cold, FixedPoint, Gradient, MeanChange, Parallel, Sequential, Warm
from pyro_ext.choose import choose_evaluator
from pyro_ext.continuous_factors import NormalFactor
from pyro_ext.evaluators import (
    Enumerated,
    Evaluator,
    NoEvaluatorError,
    Parameters,
    Quadratic,
    enumerate_log_joint,
    group_units,
)
from pyro_ext.fixed_point import Schedule
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.structured import Structured
from pyro_ext.initial import cold_parameters
from pyro_ext.layout import Layout
from pyro_ext.multilinear import Multilinear
from pyro_ext.program import Program
from pyro_ext.quadratic import quadratic_form
from pyro_ext.states import enumerate_states
from tests.oracles.enumeration import binary_sparse_coding_log_joint, binary_states, factorial_posterior
from tests.oracles.programs import (
    sigmoid_network,
    sigmoid_network_parameters,
    sparse_coding,
    sparse_coding_parameters,
)
from tests.oracles.variational import update_19_44

pytestmark = pytest.mark.usefixtures("float64")


def problem(num_latents: int = 5) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    parameters = sparse_coding_parameters(6, num_latents)
    return torch.randn(8, 6), parameters


def em_of(model: Callable[..., Any], *, e_step: FixedPoint, guide: Any = None) -> EM:
    return EM(model, MeanField(model) if guide is None else guide, e_step=e_step, m_step=None)


class Recording(Schedule):
    """A schedule that notes L after each sweep of another."""

    def __init__(self, inner: Schedule) -> None:
        self.inner = inner
        self.monotone = inner.monotone
        self.bounds: list[Tensor] = []

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        if not self.bounds:
            self.bounds.append(evaluator.bound(params))
        params = self.inner.apply(evaluator, params)
        self.bounds.append(evaluator.bound(params))
        return params


def test_the_answer_solves_19_44() -> None:
    v, (b, W, beta) = problem()
    em = em_of(sparse_coding, e_step=FixedPoint(criterion=BoundChange(1e-14), max_sweeps=1000))
    em.step(v)
    means = em.guide.posterior(v)["h"].mean
    for i in range(5):
        torch.testing.assert_close(means[:, i], update_19_44(v, means, W, b, beta, i), atol=1e-7, rtol=0)


@pytest.mark.parametrize("model", ["sparse coding", "sigmoid network"])
@pytest.mark.parametrize("family", [MeanField, Dirac, Structured])
def test_sequential_sweeps_never_lower_the_bound(model: str, family: Any) -> None:
    if model == "sparse coding":
        (v, _), program = problem(), sparse_coding
        guide: Any = Structured(program, blocks=[[("h", [0, 2])]]) if family is Structured else family(program)
    else:
        sigmoid_network_parameters(4)
        v, program = torch.bernoulli(torch.full((8, 4), 0.5)), sigmoid_network
        guide = Structured(program, blocks=[["h2", ("h1", [1])]]) if family is Structured else family(program)
    schedule = Recording(Sequential())
    em = em_of(program, e_step=FixedPoint(schedule, BoundChange(1e-12), start=Cold()), guide=guide)
    em.infer(v)
    bounds = torch.stack(schedule.bounds)
    assert len(bounds) > 2
    assert bool((bounds.diff(dim=0) >= -1e-12).all())
    assert bool((bounds[-1] > bounds[0]).any())


def test_one_joint_factor_gives_the_exact_posterior() -> None:
    v, (b, W, beta) = problem()
    log_joint = binary_sparse_coding_log_joint(v, binary_states(5), W, b, beta)
    step = FixedPoint()
    em = em_of(sparse_coding, e_step=step, guide=Structured(sparse_coding))
    assert em.step(v) == pytest.approx(-log_joint.logsumexp(0).sum().item(), rel=1e-12)
    posterior = (log_joint - log_joint.logsumexp(0)).exp()
    torch.testing.assert_close(em.guide.posterior(v)["h"].mean, posterior.mT @ binary_states(5))
    assert step.last_sweeps == 1


def test_bound_of_the_answer_is_that_of_all_states() -> None:
    v, (b, W, beta) = problem()
    em = em_of(sparse_coding, e_step=FixedPoint())
    loss = em.step(v)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(5), W, b, beta)
    q = factorial_posterior(em.guide.posterior(v)["h"].mean)
    bound = (q * (log_joint - q.log())).sum(0)
    assert loss == pytest.approx(-bound.sum().item(), rel=1e-10)
    assert em.evaluate_loss(v) == pytest.approx(loss, rel=1e-12)
    assert bool((bound <= log_joint.logsumexp(0)).all())


# ---------------------------------------------------------------- schedules


def coupled(v: Tensor) -> None:
    """Two units that repel each other so strongly that parallel sweeps swing between (0, 0) and (1, 1)."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=4 * torch.ones(2)).to_event(1))
        pyro.factor("repulsion", -9 * h[..., 0] * h[..., 1])
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)


def test_undamped_parallel_sweeps_oscillate_where_damped_ones_converge() -> None:
    v = torch.zeros(1)
    swinging = Recording(Parallel(0.0))
    step = FixedPoint(swinging, max_sweeps=30, start=Cold())
    em_of(coupled, e_step=step).infer(v)
    bounds = torch.stack(swinging.bounds)[10:, 0]
    assert step.last_sweeps == 30
    assert (bounds[2:] - bounds[:-2]).abs().max() < 1e-6
    assert (bounds[1:] - bounds[:-1]).abs().min() > 0.1
    damped = FixedPoint(Parallel(0.6), BoundChange(1e-12), max_sweeps=500, start=Cold())
    posterior = em_of(coupled, e_step=damped, guide=MeanField(coupled, name="other")).infer(v)
    assert damped.last_sweeps < 500
    mean = posterior["h"].mean[0]
    torch.testing.assert_close(mean, torch.sigmoid(4 - 9 * mean.flip(0)), atol=1e-5, rtol=0)


def test_damped_sweeps_mix_natural_parameters() -> None:
    v, _ = problem()
    program = Program(sparse_coding, (v,), {})
    evaluator = choose_evaluator(program, MeanField(sparse_coding).make_blocks(program))
    old = {"h": torch.randn(8, 1, 5)}
    new = Parallel(0.3).apply(evaluator, old)
    torch.testing.assert_close(new["h"], 0.3 * old["h"] + 0.7 * evaluator.jump(old)["h"])


def test_a_sequential_answer_is_a_fixed_point_of_parallel_sweeps() -> None:
    v, _ = problem()
    em = em_of(sparse_coding, e_step=FixedPoint(criterion=BoundChange(0), max_sweeps=2000))
    em.step(v)
    call = em.call(v)
    params = em.guide.rows_parameters(call.program)
    for damping in (0.0, 0.5):
        moved = Parallel(damping).apply(call.evaluator(), params)
        torch.testing.assert_close(moved["h"].sigmoid(), params["h"].sigmoid(), atol=1e-7, rtol=0)


# ---------------------------------------------------------------- criteria


def test_criteria_stop_when_little_changes() -> None:
    v, _ = problem()
    tight, loose = FixedPoint(criterion=BoundChange(1e-12)), FixedPoint(criterion=BoundChange(1.0))
    for step in (tight, loose):
        em_of(sparse_coding, e_step=step, guide=MeanField(sparse_coding, name=f"guide_{id(step)}")).infer(v)
    assert loose.last_sweeps < tight.last_sweeps
    means = FixedPoint(criterion=MeanChange(1e-9), max_sweeps=500)
    posterior = em_of(sparse_coding, e_step=means, guide=MeanField(sparse_coding, name="means")).infer(v)
    program = Program(sparse_coding, (v,), {})
    evaluator = choose_evaluator(program, MeanField(sparse_coding, name="again").make_blocks(program))
    after = evaluator.sweep({"h": posterior["h"].mean.logit()[:, None]})
    assert (after["h"][:, 0].sigmoid() - posterior["h"].mean).abs().max() <= 1e-9


def test_criteria_compare_what_they_say() -> None:
    zero, one = torch.zeros(4), torch.full((4,), 0.5)
    means = (torch.zeros(4, 2), torch.tensor([0.0, 0.3]).expand(4, 2))
    assert BoundChange(0.5).met((zero, one), means)
    assert not BoundChange(0.4).met((zero, one), means)
    assert not BoundChange(0.4).met((one, zero), means)
    assert MeanChange(0.3 + 1e-12).met((zero, one), means)
    assert not MeanChange(0.2).met((zero, one), means)


def test_the_number_of_sweeps_is_limited() -> None:
    v, _ = problem()
    step = FixedPoint(criterion=BoundChange(0), max_sweeps=3)
    em_of(sparse_coding, e_step=step).infer(v)
    assert step.last_sweeps == 3


# ---------------------------------------------------------------- starts


def two_modes(v: Tensor) -> None:
    """Either unit explains v = 1, both together do not: mean field has two solutions, and the prior favours one."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("b")).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 0.1), obs=v)


def warm_in_the_worse_mode(start: Any) -> tuple[EM, Tensor]:
    pyro.param("b", torch.tensor([1.0, -1.0]))
    v = torch.ones(3)
    em = em_of(two_modes, e_step=FixedPoint(start=start))
    em.guide.setup(v)
    worse = torch.tensor([-20.0, 20.0]).expand(3, 1, 2)
    em.guide.assign(em.call(v).program, {"h": worse})
    return em, v


def test_warm_starts_stay_where_they_are() -> None:
    em, v = warm_in_the_worse_mode(Warm())
    em.step(v)
    assert bool((em.guide.posterior(v)["h"].mean[:, 1] > 0.99).all())


@pytest.mark.parametrize("start", [Cold(), Better()])
def test_cold_and_better_starts_leave_the_worse_mode(start: Any) -> None:
    em, v = warm_in_the_worse_mode(start)
    em.step(v)
    assert bool((em.guide.posterior(v)["h"].mean[:, 0] > 0.99).all())


def test_better_keeps_the_higher_bound_row_by_row() -> None:
    pyro.param("b", torch.tensor([1.0, -1.0]))
    v = torch.ones(2)
    losses = {}
    better, worse = torch.tensor([20.0, -20.0]), torch.tensor([-20.0, 20.0])
    for name, start in {"better": Better(), "warm": Warm()}.items():
        em = em_of(two_modes, e_step=FixedPoint(start=start), guide=MeanField(two_modes, name=name))
        em.guide.setup(v)
        em.guide.assign(em.call(v).program, {"h": torch.stack([better, worse])[:, None]})
        losses[name] = em.step(v)
        means = em.guide.posterior(v)["h"].mean
        assert means[0, 0] > 0.99
        assert bool(means[1, 0] > 0.99) is (name == "better")
    assert losses["better"] < losses["warm"] - 1


def test_first_warm_start_is_cold() -> None:
    v, _ = problem()
    losses = []
    for number, start in enumerate((Warm(), Cold(), Better())):
        step = FixedPoint(start=start)
        losses.append(em_of(sparse_coding, e_step=step, guide=MeanField(sparse_coding, name=f"g{number}")).step(v))
    assert losses[0] == losses[1] == losses[2]


# ---------------------------------------------------------------- refusals


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Expected damping in \[0, 1\), but got 1.0. Use 0 for undamped sweeps."):
        Parallel(1.0)
    with pytest.raises(ValueError, match="Expected max_sweeps of at least 1, but got 0. One sweep may be enough."):
        FixedPoint(max_sweeps=0)
    for name, value in (("schedule", "parallel"), ("criterion", 1e-3), ("start", Cold)):
        with pytest.raises(TypeError, match=f"Expected {name} to be .*Pass an object, not its name or class."):
            FixedPoint(**{name: value})


def test_guides_without_a_table_are_refused() -> None:
    class Network(nn.Module):
        model = staticmethod(sparse_coding)
        is_table = False

        def make_blocks(self) -> None: ...

    with pytest.raises(
        TypeError, match="Expected a guide with a table .* for FixedPoint, but got Network. Use `Gradient"
    ):
        em_of(sparse_coding, e_step=FixedPoint(), guide=Network())


def test_damped_points_are_refused_by_name() -> None:
    v, _ = problem()
    em = em_of(sparse_coding, e_step=FixedPoint(Parallel()), guide=Dirac(sparse_coding))
    with pytest.raises(
        TypeError, match=r"Expected the Sequential\(\) schedule for the point masses 'h', but got Parallel"
    ):
        em.step(v)
    assert not em.guide.is_set_up


def test_programs_that_nothing_exact_serves_are_refused() -> None:
    def link(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=h), obs=v)

    em = em_of(link, e_step=FixedPoint())
    with pytest.raises(NoEvaluatorError, match="Expected log p.* to be quadratic in 'h' on their support"):
        em.step(torch.ones(3))


def test_continuous_points_of_a_gaussian_are_its_mean() -> None:
    w = torch.randn(4, 3)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h @ w.mT, 1.0).to_event(1), obs=v)

    v = torch.randn(5, 4)
    em = em_of(model, e_step=FixedPoint(criterion=MeanChange(1e-12), max_sweeps=5000), guide=Dirac(model))
    em.step(v)
    torch.testing.assert_close(em.guide.posterior(v)["h"].mean, v @ w @ torch.linalg.inv(torch.eye(3) + w.mT @ w))
    assert em.loss_label == "-log p(h, v)"


def test_a_cold_start_is_the_prior_of_the_present_theta() -> None:
    def model(v: Tensor) -> None:
        b = pyro.param("b", torch.tensor(-1.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=b).expand([len(v), 2]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(max_sweeps=1), m_step=None)
    call = em.call(torch.zeros(3))
    with torch.no_grad():
        pyro.get_param_store()["b"].unconstrained().fill_(2.0)
    call.program.refresh()
    cold = cold_parameters(call.program, call.blocks)["h"]
    torch.testing.assert_close(cold, torch.full_like(cold, 2.0))


def test_sweeps_that_swing_do_not_end_below_where_they_have_been() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(5.0 * h.sum(-1), 1.0), obs=v)

    # Either unit explains v: undamped, both switch on, then both off, for ever, and both ends lie below the start.
    v = torch.full((3,), 5.0)
    for max_sweeps in (7, 8):
        em = EM(model, MeanField(model), e_step=FixedPoint(Parallel(0.0), max_sweeps=max_sweeps), m_step=None)
        call = em.call(v)
        start = call.evaluator().bound(cold_parameters(call.program, call.blocks))
        swung = call.evaluator().bound(call.evaluator().jump(cold_parameters(call.program, call.blocks)))
        assert bool((swung < start - 1).all())
        assert bool((em.e_half(call).bound >= start).all())


# ---------------------------------------------------------------- every family, every evaluator


def interplay(v: Tensor) -> None:
    """Binary units and one-hot choices, each pair of which interacts: quadratic, multilinear and enumerable."""
    energies = torch.linspace(-2.0, 2.5, 9).reshape(3, 3)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.8])).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.5, 0.1, 0.4])))
        pyro.factor("units", v * h[..., 0] * h[..., 1] - 2 * h[..., 1] * h[..., 2] + 1.5 * h[..., 0] * h[..., 2])
        pyro.factor("choices", ((y @ energies) * (h + 2 * z)).sum(-1) + ((z @ energies.mT) * h).sum(-1))
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)


def gaussian(v: Tensor) -> None:
    """Two real sites that share what they explain, and a binary unit that shifts one of them."""
    w = torch.tensor([[1.0, -2.0], [0.5, 1.5], [2.0, 0.3]])
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Bernoulli(0.4))
        x = pyro.sample("x", dist.Normal(0.0, 1.5))
        y = pyro.sample("y", dist.Normal(2 * a - x, 0.8))
        pyro.sample("v", dist.Normal(torch.stack([x, y], -1) @ w.mT + a[..., None], 0.7).to_event(1), obs=v)


def make_evaluator(kind: str, program: Program, blocks: Any) -> Evaluator:
    if kind == "quadratic":
        return Quadratic(quadratic_form(program), blocks)
    if kind == "multilinear":
        return Multilinear(program, blocks)
    return Enumerated(enumerate_log_joint(program), Layout(program.rows, program.latents), blocks)


DISCRETE = {
    "Bernoulli and one-hot": MeanField,
    "joint": lambda m: Structured(m, blocks=[["y", ("h", [0])], [("h", [1, 2])]]),
    "point": Dirac,
}
REAL = {"Normal": MeanField, "multivariate normal": lambda m: Structured(m, blocks=[["x", "y"]]), "point": Dirac}
FAMILIES = [(interplay, family, kind) for family in DISCRETE for kind in ("quadratic", "enumerated", "multilinear")]
FAMILIES += [(gaussian, family, "quadratic") for family in REAL]
NAMES = [f"{model.__name__}, {family}, {kind}" for model, family, kind in FAMILIES]


def start_of(blocks: Any, rows: int) -> Parameters:
    return {b.name: b.factor.initial(torch.rand(rows, 1, b.factor.size), 0.6) for b in blocks}


def problem_of(model: Any, family: str, kind: str) -> tuple[Evaluator, Parameters]:
    v = torch.randn(6) if model is interplay else torch.randn(6, 3)
    program = Program(model, (v,), {})
    blocks = (DISCRETE if model is interplay else REAL)[family](model).make_blocks(program)
    return make_evaluator(kind, program, blocks), start_of(blocks, 6)


def with_columns(params: Parameters, name: str, columns: Any, value: Tensor) -> Parameters:
    moved = dict(params)
    moved[name] = params[name].clone()
    moved[name][..., columns] = value
    return moved


@pytest.mark.parametrize(("model", "family", "kind"), FAMILIES, ids=NAMES)
def test_the_update_of_a_group_is_where_no_small_move_raises_the_bound(model: Any, family: str, kind: str) -> None:
    evaluator, params = problem_of(model, family, kind)
    for block in evaluator.blocks:
        for group in block.factor.groups:
            columns = block.factor.columns(group)
            new = evaluator.jump(params)[block.name][..., columns]
            best = evaluator.bound(with_columns(params, block.name, columns, new))
            assert bool((best >= evaluator.bound(params) - 1e-12).all())
            if block.factor.is_point and getattr(block.factor, "discrete", False):
                for state in enumerate_states(group_units(block, group)):
                    moved = with_columns(params, block.name, columns, state)
                    assert bool((evaluator.bound(moved) <= best + 1e-12).all())
                continue
            for size in (1e-1, 1e-2, 1e-3):
                for _ in range(10):
                    moved = with_columns(params, block.name, columns, new + size * torch.randn_like(new))
                    assert bool((evaluator.bound(moved) <= best + 1e-12).all())
            for i in range(len(columns)):
                step = 1e-4 * torch.eye(len(columns))[i]
                ends = [evaluator.bound(with_columns(params, block.name, columns, new + s * step)) for s in (1, -1)]
                assert ((ends[0] - ends[1]) / 2e-4).abs().max() < 1e-6


@pytest.mark.parametrize(("model", "family", "kind"), FAMILIES, ids=NAMES)
def test_a_sweep_is_the_updates_one_after_another_and_never_lowers_the_bound(
    model: Any, family: str, kind: str
) -> None:
    evaluator, params = problem_of(model, family, kind)
    bound = evaluator.bound(params)
    expected = params
    # What is enumerated comes last where the others are at their means.
    for block in sorted(evaluator.blocks, key=lambda b: kind == "multilinear" and b.factor.is_joint):
        for group in block.factor.groups:
            columns = block.factor.columns(group)
            new = evaluator.jump(expected)[block.name][..., columns]
            expected = with_columns(expected, block.name, columns, new)
    swept = evaluator.sweep(params)
    for name in params:
        torch.testing.assert_close(swept[name], expected[name], atol=1e-9, rtol=1e-9)
    for sweep in (evaluator.sweep, evaluator.coloured_sweep):
        there, before = params, bound
        for _ in range(20):
            there = sweep(there)
            after = evaluator.bound(there)
            assert bool((after >= before - 1e-11).all())
            before = after
        assert bool((before > bound).all())


# ---------------------------------------------------------------- a program of the user's own


def measured(v: Tensor) -> None:
    """A switch a row, an inner plate of switches and readings: three sites, two plates; v is (N, M)."""
    with pyro.plate("rows", v.shape[0], dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", v.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.6))
            x = pyro.sample("x", dist.Normal(a - c, 1.2))
            pyro.sample("v", dist.Normal(a + 2 * c - x, 0.8), obs=v)


def test_a_users_nested_program_gets_the_fixed_point_derived_by_hand() -> None:
    """The means of (19.56), from the squares of log p written out."""
    v = 2 * torch.randn(7, 3)
    em = EM(measured, MeanField(measured), e_step=FixedPoint(criterion=MeanChange(1e-12), max_sweeps=5000), m_step=None)
    found = em.infer(v)
    prior, noise = 1 / 1.2**2, 1 / 0.8**2
    precision = torch.tensor(prior + noise)
    a, c, x = found["a"].mean.reshape(7, 1), found["c"].mean, found["x"].mean
    new_x = (prior * (a - c) + noise * (a + 2 * c - v)) / precision
    cost_of_c = 0.5 * prior * (2 * (x - a) + 1) + 0.5 * noise * (4 - 4 * (v - a + x))
    new_c = torch.sigmoid(torch.logit(torch.tensor(0.6)) - cost_of_c)
    cost_of_a = 0.5 * prior * (1 - 2 * (x + c)) + 0.5 * noise * (1 - 2 * (v - 2 * c + x))
    new_a = torch.sigmoid(torch.logit(torch.tensor(0.3)) - cost_of_a.sum(-1, keepdim=True))
    torch.testing.assert_close(x, new_x, atol=1e-10, rtol=0)
    torch.testing.assert_close(c, new_c, atol=1e-10, rtol=0)
    torch.testing.assert_close(a, new_a, atol=1e-10, rtol=0)
    _, scale = NormalFactor(1).moments(found.conditioner(next(b for b in found.blocks if b.name == "x"), {}))
    torch.testing.assert_close(scale, precision.rsqrt().expand(7, 3, 1), atol=1e-12, rtol=0)


def test_weights_that_leave_zero_are_noticed_at_the_next_e_step() -> None:
    """Without weights a sigmoid network is quadratic; with them it is not, and what it was before does not count."""
    sigmoid_network_parameters(4)
    with torch.no_grad():
        pyro.param("W1").zero_()
        pyro.param("W2").zero_()
    v = torch.bernoulli(torch.full((8, 4), 0.7))
    guide = MeanField(sigmoid_network)
    em = EM(sigmoid_network, guide, e_step=FixedPoint(max_sweeps=200), m_step=Gradient(pyro.optim.Adam({"lr": 0.5})))
    call = em.call(v)
    assert isinstance(call.evaluator(), Quadratic)
    em.m_half(call, em.e_half(call))
    assert pyro.param("W1").abs().min() > 0.1
    result = em.e_half(call)
    assert isinstance(call.evaluator(), Enumerated)
    program = call.program
    enumerated = Enumerated(enumerate_log_joint(program), Layout(program.rows, program.latents), call.blocks)
    params = call.parameters(result)
    torch.testing.assert_close(result.bound, enumerated.bound(params), atol=1e-10, rtol=0)
    torch.testing.assert_close(enumerated.means(enumerated.sweep(params)), enumerated.means(params), atol=1e-3, rtol=0)
    assert isinstance(em.call(v).evaluator(), Enumerated)
