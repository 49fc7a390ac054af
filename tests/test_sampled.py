"""Sampled fixed points: unbiased optima, within standard errors of the enumerated answer, and labelled as sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import EM, Adaptive, Better, FixedPoint, Gradient, Parallel, Sampled, Sequential
from pyro_ext.choose import choose_evaluator
from pyro_ext.evaluators import Enumerated, NoEvaluatorError, Parameters
from pyro_ext.guides import Dirac, MeanField, Structured
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.sampled import SampledEvaluator

pytestmark = pytest.mark.usefixtures("float64")


def noisy_or(v: Tensor) -> None:
    """Six causes of eight effects, each of which may fail to act: not quadratic, 64 states."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        strength = -torch.log1p(-0.9 * torch.rand(6, 8))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([6]).to_event(1))
        pyro.sample("v", dist.Bernoulli(1 - 0.95 * torch.exp(-h @ strength)).to_event(1), obs=v)


def choices(v: Tensor) -> None:
    """A class, a one-hot choice and two units that decide the logits of one observation by a bent function."""
    with pyro.plate("data", len(v)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.6, 0.3, 0.1])))
        h = pyro.sample("h", dist.Bernoulli(0.4).expand([2]).to_event(1))
        x = k.to(v) - z @ torch.tensor([0.0, 1.0, 3.0]) + h.sum(-1)
        pyro.sample("v", dist.Normal(x.tanh() + h[..., 0], 0.7), obs=v)


def in_plates(v: Tensor) -> None:
    """One cause over a part of an inner plate of others; v is (3, N)."""
    with pyro.plate("rows", v.shape[1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", 6, dim=-2, subsample=torch.tensor([5, 0, 3])):
            c = pyro.sample("c", dist.Bernoulli(0.6).expand([2]).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=(2 * a + c.sum(-1) - 1.5) ** 2 - 1), obs=v)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], Tensor], Callable[[Any], Any]]] = {
    "noisy or": (noisy_or, lambda: torch.bernoulli(torch.full((6, 8), 0.5)), MeanField),
    "blocks": (
        noisy_or,
        lambda: torch.bernoulli(torch.full((4, 8), 0.5)),
        lambda m: Structured(m, blocks=[[("h", [0, 4])], [("h", [1, 2])]]),
    ),
    "choices": (choices, lambda: torch.randn(5), MeanField),
    "plates": (in_plates, lambda: torch.bernoulli(torch.full((3, 4), 0.5)), MeanField),
}


def both(name: str, settings: Sampled) -> tuple[SampledEvaluator, Enumerated]:
    model, data, guide = CASES[name]
    program = Program(model, (data(),), {})
    blocks = guide(model).make_blocks(program)
    enumerated = choose_evaluator(program, blocks)
    assert isinstance(enumerated, Enumerated)
    return settings.build(program, blocks), enumerated


def random_parameters(evaluator: Enumerated) -> Parameters:
    rows = evaluator.layout.rows.count
    return {b.name: torch.randn(rows, evaluator.layout.copies(b.site), b.factor.num_params) for b in evaluator.blocks}


def centred(evaluator: Enumerated, params: Parameters) -> Tensor:
    """Natural parameters up to what does not matter: a constant for every table."""
    found = []
    for block in evaluator.blocks:
        table = params[block.name]
        for group in block.factor.groups:
            mine = table[..., block.factor.columns(group)]
            found.append((mine if mine.shape[-1] == 1 else mine - mine.mean(-1, keepdim=True)).flatten(1))
    return torch.cat(found, -1)


@pytest.mark.parametrize("name", CASES)
def test_optima_are_unbiased(name: str) -> None:
    """Means of 40 estimates lie within five standard errors of the enumerated optima."""
    sampled, enumerated = both(name, Sampled(num_samples=50, decay=0.0))
    params = random_parameters(enumerated)
    expected = centred(enumerated, enumerated.jump(params))
    found = torch.stack([centred(enumerated, sampled.jump(params)) for _ in range(40)])
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= 5 * error + 1e-10).all())
    assert error.max() < 0.2


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_unbiased_and_its_error_is_honest(name: str) -> None:
    """Of 100 estimates the mean lies within five standard errors, and the stated errors are their spread."""
    sampled, enumerated = both(name, Sampled(num_bound_samples=100))
    params = random_parameters(enumerated)
    found, errors = (torch.stack(x) for x in zip(*(sampled.estimate_bound(params) for _ in range(100)), strict=True))
    assert bool(((found.mean(0) - enumerated.bound(params)).abs() <= 5 * found.std(0) / 10).all())
    ratio = found.std(0) / errors.mean(0)
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all())


@pytest.mark.parametrize("schedule", [Sequential(), Parallel(0.3)])
@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_within_standard_errors_of_the_enumerated_optimum(name: str, schedule: Any) -> None:
    """L is within four of its standard errors of the optimum in every row, and the exact L of the answer near it."""
    model, data, guide = CASES[name]
    v = data()
    exact = EM(model, guide(model), e_step=FixedPoint(max_sweeps=500), m_step=None)
    optimum = exact.e_half(exact.call(v)).bound
    step = FixedPoint(schedule, evaluator=Sampled(num_samples=100, num_bound_samples=1000), max_sweeps=40)
    em = EM(model, guide(model), e_step=step, m_step=None)
    result = em.e_half(em.call(v))
    assert not result.exact
    assert not result.monotone
    assert not step.converged
    assert step.last_sweeps == 40
    assert result.error is not None
    assert bool(((result.bound - optimum).abs() <= 4 * result.error).all())
    call = em.call(v)
    assert bool((call.evaluator().bound(call.parameters(result)) >= optimum - 0.06).all())


def test_ledger_and_history_say_that_it_is_sampled() -> None:
    v = torch.bernoulli(torch.full((6, 8), 0.5))
    em = EM(noisy_or, MeanField(noisy_or), e_step=FixedPoint(evaluator=Sampled(16), max_sweeps=5), m_step=None)
    history = em.run(v, max_steps=3, progress=False)
    assert [entry.exact for entry in history.ledger] == [False] * 3
    assert history.status.value == "max_steps"


def wide(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.1).expand([40]).to_event(1))
        pyro.sample("v", dist.Bernoulli(1 - 0.9 * 0.5 ** h.sum(-1)), obs=v)


def test_nothing_is_sampled_without_being_asked_for() -> None:
    v = torch.ones(2)
    em = EM(wide, MeanField(wide), e_step=FixedPoint(), m_step=None)
    with pytest.raises(NoEvaluatorError, match=r"2\^40 states.*Use .*FixedPoint\(evaluator=Sampled\(\)\)"):
        em.step(v)
    asked = FixedPoint(evaluator=Sampled(num_samples=32), max_sweeps=15, start=Better())
    em = EM(wide, MeanField(wide), e_step=asked, m_step=Gradient(pyro.optim.Adam({"lr": 0.01})))
    em.step(v)
    mean = em.guide.posterior(v)["h"].mean
    # By symmetry all units are alike: the fixed point of one equation, solved by summing over how many others are on.
    on = torch.arange(40.0)
    q = torch.tensor(0.1)
    for _ in range(200):
        others = dist.Binomial(39, q).log_prob(on).exp()
        gain = torch.log((1 - 0.9 * 0.5 ** (on + 1)) / (1 - 0.9 * 0.5**on))
        q = torch.sigmoid(torch.logit(torch.tensor(0.1)) + (others * gain).sum())
    torch.testing.assert_close(mean.mean(), q, atol=0.005, rtol=0)


def test_steps_shrink_as_stated() -> None:
    """Where units are independent the estimates are exact: what is left of the start is the product of 1 - rho_t."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h, 0.5).to_event(1), obs=v)

    program = Program(model, (torch.randn(4, 3),), {})
    blocks = MeanField(model).make_blocks(program)
    optimum = choose_evaluator(program, blocks).jump({"h": torch.zeros(4, 1, 3)})["h"]
    for update in ("sweep", "jump"):
        evaluator = Sampled(num_samples=2, step_size=0.8, decay=0.6).build(program, blocks)
        params, left = {"h": torch.randn(4, 1, 3)}, 1.0
        start = params["h"] - optimum
        for t in range(5):
            params = getattr(evaluator, update)(params)
            left *= 1 - 0.8 * (1 + t) ** -0.6
            torch.testing.assert_close(params["h"] - optimum, left * start, atol=1e-10, rtol=0)


def test_sequential_sweeps_see_the_newest_samples() -> None:
    """The first unit switches on for sure, and decides which way the second one goes."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.tensor([30.0, -2.5])).to_event(1))
            pyro.factor("follow", 5 * h[..., 0] * h[..., 1])
            pyro.sample("v", dist.Normal(torch.zeros(()), 1.0).expand(h.shape[:-1]), obs=v)

    program = Program(model, (torch.zeros(1),), {})
    blocks = MeanField(model).make_blocks(program)
    off = {"h": torch.tensor([[[-30.0, 0.0]]])}
    settings = Sampled(num_samples=3)
    torch.testing.assert_close(settings.build(program, blocks).sweep(off)["h"][0, 0, 1], torch.tensor(2.5))
    torch.testing.assert_close(settings.build(program, blocks).jump(off)["h"][0, 0, 1], torch.tensor(-2.5))


def test_every_start_takes_all_steps() -> None:
    """`Better` begins the shrinking steps anew at its second start."""
    built: list[SampledEvaluator] = []

    class Noting(Sampled):
        def build(self, program: Any, blocks: Any) -> SampledEvaluator:
            built.append(super().build(program, blocks))
            return built[-1]

    step = FixedPoint(evaluator=Noting(num_samples=2), max_sweeps=4, start=Better())
    em = EM(wide, MeanField(wide), e_step=step, m_step=None)
    for _ in range(2):
        em.step(torch.ones(2))
    assert max(e._sweeps for e in built) == 4


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (2**22, 2**8):
        pyro.set_rng_seed(1)
        monkeypatch.setattr("pyro_ext.sampled.CHUNK_ELEMENTS", size)
        sampled, enumerated = both("noisy or", Sampled(num_samples=20))
        found.append(sampled.jump(random_parameters(enumerated))["h"])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "Expected num_samples of at least 1, but got 0"),
        ({"num_samples": 2.5}, "Expected num_samples of at least 1, but got 2.5"),
        ({"num_bound_samples": 1}, "Expected num_bound_samples of at least 2, but got 1"),
        ({"step_size": 0.0}, r"Expected step_size in \(0, 1\], but got 0.0"),
        ({"decay": 1.5}, r"Expected decay in \[0, 1\], but got 1.5"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampled(**settings)


def test_other_evaluators_and_the_controller_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected evaluator to be Sampled\(\) or None, but got 'sampled'"):
        FixedPoint(evaluator="sampled")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Expected Sequential\(\) or Parallel\(\) with Sampled\(\), but got Adaptive"):
        FixedPoint(Adaptive(), evaluator=Sampled())


def test_continuous_latents_and_points_are_refused_by_name() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=x), obs=v)

    step = FixedPoint(evaluator=Sampled())
    em = EM(model, MeanField(model), e_step=step, m_step=None)
    with pytest.raises(NoEvaluatorError, match=r"binary, one-hot or categorical latents for Sampled\(\), but got 'x'"):
        em.step(torch.ones(3))
    em = EM(wide, Dirac(wide), e_step=step, m_step=None)
    with pytest.raises(NoEvaluatorError, match=r"with a spread for Sampled\(\), but got the point masses 'h'"):
        em.step(torch.ones(3))
    assert not em.guide.is_set_up


def test_a_hard_zero_is_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([40]).to_event(1))
            pyro.factor("never", torch.where(h[..., 0] * v > 0.5, -torch.inf, 0.0))
            pyro.sample("v", dist.Bernoulli(1 - 0.9 * 0.5 ** h.sum(-1)), obs=v)

    em = EM(model, MeanField(model), e_step=FixedPoint(evaluator=Sampled(8)), m_step=None)
    with pytest.raises(NotFiniteError, match="Expected p.* above 0 and finite on every state .*19.56.* log p = -inf"):
        em.step(torch.tensor([0.0, 1.0]))


def test_samples_solve_nothing_exactly() -> None:
    sampled, _ = both("noisy or", Sampled(2))
    with pytest.raises(
        NoEvaluatorError, match="Expected an exact evaluator to solve for the posterior, but got samples. Sweep"
    ):
        sampled.solve()
