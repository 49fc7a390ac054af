"""The EM driver: SVI's contract, the ledger, every way a run ends, and what refused calls leave behind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_ext import EM, Better, ClosedForm, Cold, FixedPoint, Gradient
from pyro_ext.evaluators import NoEvaluatorError
from pyro_ext.fit import EpochEnd, StopFit
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.structured import Structured
from pyro_ext.history import History, Status
from pyro_ext.models import BinarySparseCoding, GaussianMixture, SigmoidBeliefNetwork
from pyro_ext.run import Run
from pyro_ext.steps import Call, EResult, EStep, MStep
from tests.oracles.enumeration import binary_sparse_coding_log_joint, binary_states, factorial_posterior
from tests.oracles.programs import sparse_coding, sparse_coding_parameters

pytestmark = pytest.mark.usefixtures("float64")


def coding_em(guide: Callable[[Any], Any] = MeanField, **e_step: Any) -> tuple[EM, Tensor]:
    model = BinarySparseCoding(num_visible=6, num_latents=3)
    v = model.dream(40)
    return EM(model, guide(model), e_step=FixedPoint(**e_step), m_step=ClosedForm()), v


def plain_em(m_step: MStep | None, guide: Callable[[Any], Any] = MeanField) -> tuple[EM, Tensor]:
    sparse_coding_parameters(5, 3)
    return EM(sparse_coding, guide(sparse_coding), e_step=FixedPoint(), m_step=m_step), torch.randn(7, 5)


def state(em: EM) -> dict[str, Tensor]:
    """Everything that a call may change: the store, theta and tables included."""
    found = {name: tensor.detach().clone() for name, tensor in pyro.get_param_store().named_parameters()}
    for module in (em.model, em.guide):
        if isinstance(module, torch.nn.Module):
            found.update({f"module {n}": p.detach().clone() for n, p in module.named_parameters()})
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Spoil(MStep):
    """Claims monotony and changes theta by a given function."""

    monotone = True

    def __init__(self, change: Callable[[Tensor], Any], after: int = 1) -> None:
        self.change, self.after, self.calls = change, after, 0

    def check(self, model: Callable[..., Any], guide: Any) -> None: ...

    def improve(self, call: Call, result: EResult) -> None:
        self.calls += 1
        if self.calls >= self.after:
            with torch.no_grad():
                self.change(pyro.param("W"))


# ---------------------------------------------------------------- SVI's contract


def train(svi: Any, data: Tensor, epochs: int) -> tuple[list[float], list[float]]:
    """The loop of Pyro's tutorials."""
    train_elbo, test_elbo = [], []
    for epoch in range(epochs):
        loss = svi.step(data)
        train_elbo.append(-loss / len(data))
        if epoch % 5 == 0:
            test_elbo.append(-svi.evaluate_loss(data) / len(data))
    return train_elbo, test_elbo


def test_a_tutorials_loop_takes_em_for_svi() -> None:
    em, v = coding_em()
    svi = SVI(em.model, AutoNormal(lambda: None), Adam({"lr": 0.01}), Trace_ELBO())
    for name in ("step", "evaluate_loss"):
        assert callable(getattr(svi, name))
    losses, evaluations = train(em, v, 20)
    assert isinstance(em.step(v), float)
    assert isinstance(em.evaluate_loss(v), float)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] > losses[0]
    assert evaluations[0] >= losses[0]


def test_losses_are_minus_the_bound_in_nats_summed_over_the_batch() -> None:
    em, v = plain_em(None)
    loss = em.step(v)
    b, W, beta = (pyro.param(name).detach() for name in ("b", "W", "beta"))
    q = factorial_posterior(em.guide.posterior(v)["h"].mean)
    bound = (q * (binary_sparse_coding_log_joint(v, binary_states(3), W, b, beta) - q.log())).sum()
    assert loss == pytest.approx(-bound.item(), rel=1e-10)
    assert em.evaluate_loss(v) == pytest.approx(loss, rel=1e-12)
    assert em.num_rows(v) == 7


def test_step_reports_the_bound_before_its_m_half() -> None:
    em, v = coding_em(Structured)
    log_joint = binary_sparse_coding_log_joint(v, binary_states(3), em.model.W, em.model.b, em.model.beta)
    assert em.step(v) == pytest.approx(-log_joint.logsumexp(0).sum().item(), rel=1e-10)
    assert em.evaluate_loss(v) < -log_joint.logsumexp(0).sum().item()


def test_evaluating_changes_nothing() -> None:
    em, v = coding_em()
    em.step(v)
    before = state(em)
    rng = torch.get_rng_state()
    em.evaluate_loss(v)
    em.evaluate_loss(em.model.dream(5).detach())
    em.infer(v[:3] + 1)
    em.guide.posterior(v[:3] + 2)
    assert_same(state(em), before)
    em.evaluate_loss(v)
    torch.set_rng_state(rng)


def test_inference_of_new_data_is_a_cold_e_step() -> None:
    em, v = coding_em(start=Cold())
    em.run(v, max_steps=5, progress=False)
    rows = em.infer(v[:4])["h"].mean
    torch.testing.assert_close(rows, em.infer(v)["h"].mean[:4])
    torch.testing.assert_close(em.guide.posterior(v[:4])["h"].mean, rows)
    em.step(v)
    loss = em.evaluate_loss(v[:4])
    assert loss == pytest.approx(-em.e_step.improve(em.call(v[:4]), keep=False).bound.sum().item())


def test_inference_before_training_binds_no_table() -> None:
    em, v = coding_em()
    posterior = em.infer(v[:4])
    assert posterior["h"].mean.shape == (4, 3)
    assert not em.guide.is_set_up
    em.step(v)
    assert em.guide.owns((v,), {})


def test_batches_of_other_data_leave_the_table_alone() -> None:
    em, v = coding_em()
    em.step(v)
    table = em.guide.table(em.guide.blocks[0]).detach().clone()
    W = em.model.W.detach().clone()
    em.step(v[:10] + 0.1)
    assert torch.equal(em.guide.table(em.guide.blocks[0]), table)
    assert not torch.equal(em.model.W, W)
    history = em.run(v[:10] + 0.1, max_steps=30, progress=False)
    assert history.status is not Status.DECREASED


def subsampled(v: Tensor) -> None:
    with pyro.plate("data", len(v), subsample_size=4) as index:
        h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("b")).to_event(1))
        pyro.sample("v", dist.Normal(h @ pyro.param("W").T, pyro.param("beta").rsqrt()).to_event(1), obs=v[index])


@pytest.mark.parametrize("whole_run", [False, True])
def test_a_subsampled_program_takes_other_rows_at_every_step(whole_run: bool) -> None:
    sparse_coding_parameters(5, 3)
    v = torch.randn(40, 5)
    em = EM(subsampled, MeanField(subsampled), e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1e-4})))
    em.guide.setup(v)
    cold = em.guide.table(em.guide.blocks[0]).detach().clone()
    if whole_run:
        history = em.run(v, max_steps=10, progress=False)
        assert all((e.batch, e.rows) == ("batch", 4) for e in history.ledger)
    else:
        for _ in range(10):
            em.step(v)
    touched = (em.guide.table(em.guide.blocks[0]) != cold).any(-1)
    # Ten draws of 4 out of 40 leave (1 - 0.1)^10 = 35 % of the rows alone.
    assert 15 <= int(touched.sum()) <= 36


# ---------------------------------------------------------------- the ledger


def test_the_ledger_names_what_each_bound_belongs_to() -> None:
    em, v = coding_em()
    seen: list[tuple[int, float]] = []

    def look(event: EpochEnd) -> None:
        seen.append((event.step, em.evaluate_loss(v)))

    history = em.run(v, max_steps=6, tolerance=0.0, progress=False, callbacks=[look])
    assert [(e.step, e.half) for e in history.ledger] == [(s, h) for s in range(1, 7) for h in "EM"]
    assert [e.parameters for e in history.ledger[:4]] == [
        "theta 0, q 1",
        "theta 1, q 1",
        "theta 1, q 2",
        "theta 2, q 2",
    ]
    assert {(e.start, e.batch, e.exact, e.rows) for e in history.ledger} == {("cold", "full", True, 40)}
    for (step, loss), entry in zip(seen, history.ledger[1::2], strict=True):
        assert entry.step == step
        assert entry.bound == pytest.approx(-loss, rel=1e-12)
    assert history.loss == pytest.approx([-e.bound_per_row for e in history.ledger[::2]])
    assert len(history.seconds) == history.steps == 6
    assert history.loss_label == "-L, nats per row"


@pytest.mark.parametrize("guide", [MeanField, Structured, Dirac])
def test_exact_steps_never_lower_the_bound(guide: Callable[[Any], Any]) -> None:
    em, v = coding_em(guide, start=Better())
    history = em.run(v, max_steps=40, tolerance=0.0, progress=False)
    bounds = torch.tensor([e.bound for e in history.ledger])
    assert bool((bounds.diff() >= -1e-9 * bounds[:-1].abs()).all())
    assert bounds[-1] > bounds[0] + 1
    assert history.status in (Status.MAX_STEPS, Status.CONVERGED)


def test_mixtures_climb_log_p() -> None:
    v = torch.cat([torch.randn(30, 2), torch.randn(30, 2) + 4])
    model = GaussianMixture(num_components=2, num_visible=2)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    history = em.run(v, max_steps=200, tolerance=1e-8, progress=False)
    assert history.status is Status.CONVERGED
    bounds = torch.tensor([e.bound for e in history.ledger])
    assert bool((bounds.diff() >= -1e-9 * bounds[:-1].abs()).all())


def test_points_on_continuous_latents_are_labelled() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(pyro.param("w", torch.tensor(2.0)) * h, 1.0), obs=v)

    v = torch.randn(5)
    em = EM(model, Dirac(model), e_step=FixedPoint(), m_step=None)
    history = em.run(v, max_steps=3, progress=False)
    assert history.loss_label == "-log p(h, v), nats per row"
    h = 2 * v / 5
    log_joint = dist.Normal(0.0, 1.0).log_prob(h) + dist.Normal(2 * h, 1.0).log_prob(v)
    assert history.loss[-1] == pytest.approx(-log_joint.mean().item(), rel=1e-9)


# ---------------------------------------------------------------- how a run ends


def test_converged() -> None:
    em, v = coding_em()
    history = em.run(v, max_steps=500, tolerance=1e-6, progress=False)
    assert history.status is Status.CONVERGED
    assert abs(history.loss[-1] - history.loss[-2]) <= 1e-6
    assert history.steps < 500
    assert f"after {history.steps} steps" in history.message


def test_max_steps() -> None:
    em, v = coding_em()
    history = em.run(v, max_steps=3, tolerance=0.0, progress=False)
    assert (history.status, history.steps) == (Status.MAX_STEPS, 3)
    assert history.message == "All 3 steps were run; L may still be rising."


def test_a_broken_promise_is_called_decreased() -> None:
    em, v = plain_em(Spoil(lambda W: W.add_(1), after=3))
    history = em.run(v, max_steps=20, tolerance=-0.0, progress=False)
    assert history.status is Status.DECREASED
    assert "in the M half after step 3E, though that half-step promises" in history.message
    assert history.ledger[-1].bound < history.ledger[-2].bound


def test_a_fall_that_nobody_promised_to_avoid_is_no_broken_promise() -> None:
    class Honest(Spoil):
        monotone = False

    em, v = plain_em(Honest(lambda W: W.mul_(1.2)))
    history = em.run(v, max_steps=5, progress=False)
    assert history.status is Status.MAX_STEPS
    assert history.loss[-1] > history.loss[0]


def test_without_a_promise_convergence_is_a_plateau_of_two_windows() -> None:
    em, v = plain_em(Gradient(SGD({"lr": 1e-9})))
    history = em.run(v, max_steps=100, tolerance=1e-4, progress=False)
    assert (history.status, history.steps) == (Status.CONVERGED, 40)
    assert "standard error" in history.message
    em, v = plain_em(Gradient(SGD({"lr": 1e-9})))
    assert em.run(v, max_steps=50, tolerance=0.0, progress=False).status is Status.MAX_STEPS
    em, v = plain_em(Gradient(SGD({"lr": 1e-4})))
    assert em.run(v, max_steps=50, tolerance=1e-5, progress=False).status is Status.MAX_STEPS, "a trend is no noise"


@pytest.mark.parametrize("slope", [0.3, -0.3])
def test_a_trend_in_noise_is_no_plateau_either_way(slope: float) -> None:
    em, v = plain_em(Gradient(SGD({"lr": 1e-9})))
    run = Run(em, (v,), {}, 100, 0.1, False, ())
    call = em.call(v)
    result = dataclasses.replace(em.e_half(call), monotone=False)
    noise = torch.randn(100)
    run.history = History(loss=(slope * torch.arange(100) + noise).tolist())
    assert run._settled(result, 100) is None
    run.history = History(loss=noise.tolist())
    assert run._settled(result, 100) is not None
    run.tolerance = 0.01
    assert run._settled(result, 100) is None, "the noise could hide a rise above the tolerance"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("guide", [MeanField, Structured])
def test_non_finite_parameters_restore_the_state_before(value: float, guide: Callable[[Any], Any]) -> None:
    em, v = plain_em(Spoil(lambda W: W.fill_(value) if em.m_step.calls == 3 else W.add_(0.0)), guide)
    em.m_step.monotone = False
    states: list[dict[str, Tensor]] = []
    history = em.run(v, max_steps=10, tolerance=0.0, progress=False, callbacks=[lambda _: states.append(state(em))])
    assert history.status is Status.NON_FINITE
    assert history.message.endswith("the state after step 2 is restored.")
    assert_same(state(em), states[-1])
    assert em.evaluate_loss(v) == pytest.approx(-history.ledger[3].bound)


def test_exploding_gradient_steps_are_non_finite() -> None:
    em, v = plain_em(Gradient(SGD({"lr": 1e200}), num_steps=2))
    before = state(em)
    history = em.run(v, max_steps=10, progress=False)
    assert history.status is Status.NON_FINITE
    assert history.message.endswith("the state after step 0 is restored.")
    after = state(em)
    assert all(torch.equal(after[name], value) for name, value in before.items())


class NotANumber(EStep):
    def check(self, model: Callable[..., Any], guide: Any) -> None: ...

    def improve(self, call: Call, *, keep: bool) -> EResult:
        result = FixedPoint().improve(call, keep=keep)
        return EResult(result.bound * torch.nan, True, "cold", result.posterior, monotone=True)


def test_a_bound_that_is_not_finite_restores_the_state_before() -> None:
    sparse_coding_parameters(5, 3)
    em = EM(sparse_coding, MeanField(sparse_coding), e_step=NotANumber(), m_step=None)
    v = torch.randn(7, 5)
    em.guide.setup(v)
    before = state(em)
    history = em.run(v, progress=False)
    assert history.status is Status.NON_FINITE
    assert "L was nan after the E half of step 1" in history.message
    assert_same(state(em), before)


def test_stopped() -> None:
    em, v = coding_em()

    def stop(event: EpochEnd) -> None:
        if event.epoch == 4:
            raise StopFit("enough")

    history = em.run(v, max_steps=20, tolerance=0.0, progress=False, callbacks=[stop])
    assert (history.status, history.steps) == (Status.STOPPED, 4)
    assert history.message == "Stopped by a callback after step 4: enough."


def test_interrupted_by_a_callback_keeps_the_finished_step() -> None:
    em, v = coding_em()
    states = []

    def interrupt(event: EpochEnd) -> None:
        states.append(state(em))
        if event.epoch == 4:
            raise KeyboardInterrupt

    history = em.run(v, max_steps=20, tolerance=0.0, progress=False, callbacks=[interrupt])
    assert (history.status, history.message) == (Status.INTERRUPTED, "Interrupted; the state after step 4 is kept.")
    assert_same(state(em), states[-1])


def test_interrupted_in_a_half_step_goes_back_to_the_step_before() -> None:
    def interrupt(W: Tensor) -> None:
        W.add_(1)
        raise KeyboardInterrupt

    em, v = plain_em(Spoil(interrupt, after=3))
    states = []
    history = em.run(v, max_steps=20, tolerance=0.0, progress=False, callbacks=[lambda _: states.append(state(em))])
    assert (history.status, history.message) == (Status.INTERRUPTED, "Interrupted; the state after step 2 is kept.")
    assert_same(state(em), states[-1])


def test_errors_of_a_step_pass_and_leave_the_step_before() -> None:
    def fail(W: Tensor) -> None:
        W.add_(1)
        raise RuntimeError("no maximum")

    em, v = plain_em(Spoil(fail, after=3))
    states = []
    with pytest.raises(RuntimeError, match="no maximum"):
        em.run(v, max_steps=20, tolerance=0.0, progress=False, callbacks=[lambda _: states.append(state(em))])
    assert_same(state(em), states[-1])
    with pytest.raises(RuntimeError, match="no maximum"):
        em.step(v)
    assert_same(state(em), states[-1])


def test_a_seed_makes_runs_equal() -> None:
    losses = []
    for _ in range(2):
        pyro.clear_param_store()
        sparse_coding_parameters(5, 3)
        with torch.no_grad():
            for name in ("b", "W"):
                pyro.param(name).copy_(torch.linspace(-1, 1, pyro.param(name).numel()).reshape(pyro.param(name).shape))
            pyro.param("beta").unconstrained().zero_()
        guide = MeanField(subsampled)
        em = EM(subsampled, guide, e_step=FixedPoint(), m_step=Gradient(SGD({"lr": 1e-3})))
        v = torch.linspace(-1, 1, 100).reshape(20, 5)
        losses.append(em.run(v, max_steps=6, seed=5, progress=False).loss)
        torch.randn(3)
    assert losses[0] == losses[1]


def test_the_bar_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    em, v = coding_em()
    em.run(v, max_steps=2, progress=True)
    assert "EM" in capsys.readouterr().err
    em.run(v, max_steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_with_theta_held_a_run_settles_at_once() -> None:
    em, v = plain_em(None)
    before = {name: pyro.param(name).detach().clone() for name in ("b", "W", "beta")}
    history = em.run(v, progress=False)
    assert isinstance(history, History)
    assert history.status is Status.CONVERGED
    assert all(torch.equal(pyro.param(name), value) for name, value in before.items())


# ---------------------------------------------------------------- refusals


def refused_first(em: EM, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    """A refused first call leaves no parameter and no set-up guide behind."""
    before = state(em)
    with pytest.raises(error, match=match):
        call()
    assert_same(state(em), before)
    assert not em.guide.is_set_up


def link(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Bernoulli(logits=pyro.param("w", torch.tensor(1.0)) * h), obs=v)


@pytest.mark.parametrize("method", ["step", "evaluate_loss", "infer", "run"])
def test_bad_data_change_nothing(method: str) -> None:
    em, v = coding_em()
    call = getattr(em, method)
    bad = v.clone()
    bad[3, 2] = torch.nan
    refused_first(em, lambda: call(bad), ValueError, "Expected finite values in v")
    refused_first(em, lambda: call(v[:, :4]), ValueError, "Expected v of shape")
    em.step(v)
    before = state(em)
    with pytest.raises(ValueError, match="Expected finite values in v"):
        call(bad)
    assert_same(state(em), before)


@pytest.mark.parametrize("method", ["step", "infer", "run"])
def test_programs_without_an_evaluator_change_nothing(method: str) -> None:
    em = EM(link, MeanField(link), e_step=FixedPoint(), m_step=None)
    refused_first(em, lambda: getattr(em, method)(torch.ones(3)), NoEvaluatorError, "Expected log p.* to be quadratic")
    em = EM(link, em.guide, e_step=Gradient(Adam({"lr": 0.1})), m_step=None)
    em.step(torch.ones(3))
    assert em.guide.is_set_up


def test_parts_that_do_not_go_together_are_refused() -> None:
    model = BinarySparseCoding(num_visible=4, num_latents=2)
    guide = MeanField(model)
    step: Any = FixedPoint()
    with pytest.raises(TypeError, match="Expected a Pyro model, but got int. Pass a callable."):
        EM(3, guide, e_step=step, m_step=None)
    with pytest.raises(TypeError, match="Expected a guide of pyro_ext.guides for EM, but got AutoNormal"):
        EM(model, AutoNormal(model), e_step=step, m_step=None)
    other = BinarySparseCoding(num_visible=4, num_latents=2)
    with pytest.raises(
        TypeError, match="Expected a guide that was built from this model, but got one built from another"
    ):
        EM(other, guide, e_step=step, m_step=None)
    with pytest.raises(TypeError, match="Expected an E-step object, but got <class .*FixedPoint'>. Write FixedPoint"):
        EM(model, guide, e_step=FixedPoint, m_step=None)
    with pytest.raises(TypeError, match="Expected an M-step object or None, but got 'closed form'. Write ClosedForm"):
        EM(model, guide, e_step=step, m_step="closed form")
    network = SigmoidBeliefNetwork([2, 3])
    with pytest.raises(
        TypeError, match="`statistics` and `maximize` for ClosedForm, but got SigmoidBeliefNetwork without"
    ):
        EM(network, MeanField(network), e_step=step, m_step=ClosedForm())


def test_settings_of_a_run_are_checked() -> None:
    em, v = coding_em()
    for settings, match in (
        ({"max_steps": 0}, "Expected max_steps of at least 1, but got 0. Use evaluate_loss for none."),
        ({"max_steps": 2.5}, "Expected max_steps of at least 1, but got 2.5"),
        ({"num_restarts": 0}, "Expected num_restarts of at least 1, but got 0. 1 is a single start."),
        ({"tolerance": -1.0}, "Expected a tolerance of at least 0, but got -1.0. It is in nats per row."),
        ({"tolerance": float("nan")}, "Expected a tolerance of at least 0, but got nan"),
    ):
        refused_first(em, lambda settings=settings: em.run(v, **settings), ValueError, match)
