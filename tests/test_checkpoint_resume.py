"""Fits and runs that were killed go on from their file, and end where those that were never stopped end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import (
    EM,
    ClosedForm,
    EarlyStopping,
    FixedPoint,
    Gradient,
    History,
    Maximize,
    QuasiNewton,
    Refine,
    Status,
    StopFit,
    Warm,
    fit,
    naming,
)
from pyro_ext.checkpoint import Checkpoint, load
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.guides import Amortized, Dirac, MeanField
from pyro_ext.models import BinarySparseCoding, GaussianMixture, SigmoidBeliefNetwork, SparseCoding
from pyro_ext.random_state import random_state
from pyro_ext.run import Run

V = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(24.0).remainder(3)[:, None]
BITS = (torch.rand(24, 6, generator=torch.Generator().manual_seed(2)) < 0.4).float()


class Killed(BaseException):
    """What no code of a fit catches, as a signal would be."""


def die_after(number: int | None) -> list[Callable[[Any], None]]:
    """A callback that kills the run before the file of this epoch or step is written."""

    def die(event: Any) -> None:
        if event.epoch == number:
            raise Killed

    return [] if number is None else [die]


def new_process(seed: int = 0) -> None:
    """Forget what a new process would not know: parameters, the names of modules, random numbers."""
    pyro.clear_param_store()
    # Modules of one name may live on in cycles, and collecting them takes longer than a run.
    naming._holders.clear()
    pyro.set_rng_seed(seed)


def outcome(driver: Any, history: History, *optims: Any) -> dict[str, Any]:
    """All numbers that a run leaves behind, read without the help of the code that is tested."""
    store = pyro.get_param_store()
    parts = {id(p): p for p in (driver.model, driver.guide) if isinstance(p, nn.Module)}.values()
    states: dict[str, Any] = {}
    for i, optim in enumerate(optims):
        for tensor, made in optim.optim_objs.items():
            inner = getattr(made, "optimizer", made)
            schedule = made.state_dict() if inner is not made else None
            groups = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
            states[f"{i} {store.param_name(tensor)}"] = (dict(inner.state[tensor]), groups, schedule)
    record = vars(history) | {"seconds": len(history.seconds)}
    return {
        "store": {name: value.detach().clone() for name, value in store.named_parameters()},
        "modules": [{n: t.clone() for n, t in part.state_dict().items()} for part in parts],
        "optimizers": states,
        "history": {k: list(v) if isinstance(v, list) else v for k, v in record.items()},
        "random": random_state(),
        "draws": [torch.rand(3), float(np.random.rand())],  # noqa: NPY002
    }


def assert_same(one: Any, other: Any, where: str = "outcome") -> None:
    """Equality to the last bit."""
    assert type(one) is type(other) or isinstance(one, Tensor), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), where
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}[{i}]")
    else:
        assert one == other or one != one, where


# ---------------------------------------------------------------- fits


class Decoder(PyroModule):
    """Linear layers, running means, a constrained and a plain parameter, and one that few steps use."""

    def __init__(self) -> None:
        super().__init__("decoder")
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scale = PyroParam(torch.ones(3), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, v: Tensor) -> None:
        rare = pyro.param("rare", torch.zeros(3))
        with pyro.plate("data", 24, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.norm(self.linear(h)) + self.shift
            loc = loc + rare if bool(v.mean() > 1) else loc
            pyro.sample("v", dist.Normal(loc, self.scale).to_event(1), obs=v)


def guide_of_decoder(v: Tensor) -> None:
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(3, 2))
    scale = pyro.param("spread", torch.full((2,), 0.5), constraint=constraints.softplus_positive)
    with pyro.plate("data", 24, subsample_size=len(v)):
        pyro.sample("h", dist.Normal(v @ weight, scale).to_event(1))


def simple(v: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.interval(0.1, 5.0))
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(loc, scale).to_event(1), obs=v)


def hierarchical(v: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 24, subsample_size=len(v)):
        pyro.sample("v", dist.Normal(mu, 1.0).to_event(1), obs=v)


def no_latents(v: Tensor) -> None:
    pass


def loader(own_generator: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    return DataLoader(TensorDataset(V), batch_size=10, shuffle=True, generator=generator)


def decoder_fit(path: Path | None, num_epochs: int, die: int | None = None) -> dict[str, Any]:
    """Batch norm, early stopping on held-out data, a schedule that a callback moves."""
    new_process(4)
    optim = pyro.optim.StepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "step_size": 2, "gamma": 0.5})
    svi = SVI(Decoder(), guide_of_decoder, optim, Trace_ELBO())
    history = fit(
        svi,
        loader(),
        num_epochs,
        held_out=[V[:8]],
        early_stopping=EarlyStopping(patience=3),
        callbacks=[lambda _: optim.step(), *die_after(die)],
        progress=False,
        checkpoint=None if path is None else Checkpoint(path, seconds=0.0),
    )
    return outcome(svi, history, optim)


def clipped_fit(path: Path | None, num_epochs: int, die: int | None = None) -> dict[str, Any]:
    """Plain functions, a loader with its own generator, a seed."""
    new_process()
    pyro.param("bystander", torch.ones(2))
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    svi, own = SVI(simple, no_latents, optim, Trace_ELBO()), loader(own_generator=True)
    kept = None if path is None else Checkpoint(path, seconds=0.0)
    history = fit(svi, own, num_epochs, seed=5, callbacks=die_after(die), progress=False, checkpoint=kept)
    found = outcome(svi, history, optim)
    return found | {"loader": own.generator.get_state(), "next": [x[0] for x in own]}


def autoguide_fit(path: Path | None, num_epochs: int, die: int | None = None) -> dict[str, Any]:
    """A guide that draws random numbers when it sets itself up, and one optimizer's settings per parameter."""
    new_process(6)
    optim = pyro.optim.AdagradRMSProp({"eta": 0.1}) if num_epochs % 2 else pyro.optim.RMSprop({"lr": 0.01})
    svi = SVI(hierarchical, AutoNormal(hierarchical), optim, Trace_ELBO(num_particles=2))
    kept = None if path is None else Checkpoint(path, seconds=0.0)
    history = fit(svi, loader(), num_epochs, callbacks=die_after(die), progress=False, checkpoint=kept)
    return outcome(svi, history, optim)


def stepwise_fit(path: Path | None, num_epochs: int, die: int | None = None) -> dict[str, Any]:
    """Stepwise EM: the running average and its counter are no tensors of any module."""
    new_process(7)
    model = GaussianMixture(num_components=3, num_visible=3, name="mixture")
    model.initialize(V)
    step = ClosedForm(step_size=lambda t: (t + 2) ** -0.7)
    em = EM(model, MeanField(model, name="q"), e_step=FixedPoint(), m_step=step)
    kept = None if path is None else Checkpoint(path, seconds=0.0)
    batches = [V[:4], V[4:14], V[14:]]  # the smallest first, which weighs by the largest before
    history = fit(em, batches, num_epochs, callbacks=die_after(die), progress=False, checkpoint=kept)
    return outcome(em, history) | {"calls": step.num_calls, "average": dict(step._average)}


def gathering_fit(path: Path | None, num_epochs: int, die: int | None = None) -> dict[str, Any]:
    """EM on statistics that are gathered over an epoch."""
    new_process(8)
    model = GaussianMixture(num_components=3, num_visible=3, name="mixture")
    model.initialize(V)
    em = EM(model, MeanField(model, name="q"), e_step=FixedPoint(), m_step=ClosedForm())
    kept = None if path is None else Checkpoint(path, seconds=0.0)
    history = fit(em, loader(), num_epochs, callbacks=die_after(die), progress=False, checkpoint=kept)
    return outcome(em, history)


FITS = [decoder_fit, clipped_fit, autoguide_fit, stepwise_fit, gathering_fit]


@pytest.mark.parametrize("job", FITS)
def test_a_killed_fit_ends_as_if_it_had_never_stopped(job: Any, tmp_path: Path) -> None:
    whole = job(None, 6)
    assert len(whole["history"]["epoch_ends"]) >= 4
    for die in (1, 3):
        path = tmp_path / f"{die}.checkpoint"
        with pytest.raises(Killed):
            job(path, 6, die)
        assert path.exists() == (die > 1)
        assert_same(job(path, 6), whole)
        # A fit that has ended is returned at once, in the state and with the numbers that it had.
        assert_same(job(path, 6, die), whole)


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = decoder_fit(None, 6)
    path = tmp_path / "fit.checkpoint"
    for die in range(1, len(whole["history"]["epoch_ends"]) + 1):
        with pytest.raises(Killed):
            decoder_fit(path, 6, die)
    assert_same(decoder_fit(path, 6), whole)


def test_early_stopping_is_resumed_with_its_best_state(tmp_path: Path) -> None:
    whole = decoder_fit(None, 40)
    assert whole["history"]["status"] is Status.STOPPED_EARLY
    ends = len(whole["history"]["epoch_ends"])
    path = tmp_path / "fit.checkpoint"
    # The best state is behind already, and only the file knows it.
    with pytest.raises(Killed):
        decoder_fit(path, 40, ends)
    assert_same(decoder_fit(path, 40), whole)
    assert_same(decoder_fit(path, 50), decoder_fit(None, 50))


def test_more_epochs_go_on_from_the_last_state_not_the_best(tmp_path: Path) -> None:
    path = tmp_path / "fit.checkpoint"
    first = decoder_fit(path, 4)
    assert first["history"]["message"].endswith("the best on the held-out data.")
    assert_same(decoder_fit(path, 6), decoder_fit(None, 6))


def test_loading_an_ended_fit_gives_the_state_in_force(tmp_path: Path) -> None:
    path = tmp_path / "fit.checkpoint"
    whole = decoder_fit(path, 40)
    assert whole["history"]["status"] is Status.STOPPED_EARLY
    new_process()
    optim = pyro.optim.StepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "step_size": 2, "gamma": 0.5})
    svi = SVI(Decoder(), guide_of_decoder, optim, Trace_ELBO())
    history = load(path, svi)
    assert history is not None
    assert_same({n: t.detach() for n, t in pyro.get_param_store().named_parameters()}, whole["store"])
    assert history.held_out == whole["history"]["held_out"]


def test_random_numbers_of_evaluation_are_those_of_the_first_process(tmp_path: Path) -> None:
    path = tmp_path / "fit.checkpoint"

    def run(path: Path | None, seed: int, die: int | None = None) -> list[float]:
        new_process(seed)
        svi = SVI(hierarchical, AutoNormal(hierarchical), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        kept = None if path is None else Checkpoint(path, seconds=0.0)
        callbacks = die_after(die)
        return fit(svi, [V], 5, held_out=[V], callbacks=callbacks, progress=False, checkpoint=kept).held_out

    whole = run(None, 1)
    with pytest.raises(Killed):
        run(path, 1, 3)
    assert run(path, 2) == whole


def test_every_other_epoch_and_a_least_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyro_ext.checkpoint_file as files

    written: list[int] = []
    write = files.write

    def count(path: Any, content: Any) -> None:
        written.append(content["run"]["progress"]["epochs"])
        write(path, content)

    monkeypatch.setattr(files, "write", count)
    for every, seconds, expected in ((2, 0.0, [2, 4, 5]), (1, 1000.0, [5]), (1, 0.0, [1, 2, 3, 4, 5])):
        written.clear()
        new_process()
        svi = SVI(simple, no_latents, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        checkpoint = Checkpoint(tmp_path / f"{every} {seconds}", every=every, seconds=seconds)
        fit(svi, [V], 5, progress=False, checkpoint=checkpoint)
        assert written == expected


def test_a_callback_that_stops_ends_the_fit_for_good(tmp_path: Path) -> None:
    def run() -> History:
        new_process()
        svi = SVI(simple, no_latents, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

        def stop(event: Any) -> None:
            if event.epoch == 2:
                raise StopFit("enough")

        return fit(svi, [V], 5, callbacks=[stop], progress=False, checkpoint=Checkpoint(tmp_path / "c", seconds=0.0))

    first = run()
    left_behind = tmp_path / "c.unfinished"
    left_behind.write_bytes(b"of a write that was killed")
    second = run()
    assert not left_behind.exists()
    assert first.status is second.status is Status.STOPPED
    assert second.message == "Stopped by a callback after epoch 2: enough."
    assert first == second


def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    def run(interrupts: bool) -> dict[str, Any]:
        new_process(1)
        svi = SVI(simple, no_latents, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

        def interrupt(event: Any) -> None:
            if interrupts and event.epoch == 3:
                raise KeyboardInterrupt

        kept = Checkpoint(tmp_path / "c", seconds=0.0)
        history = fit(svi, loader(), 5, callbacks=[interrupt], progress=False, checkpoint=kept)
        return outcome(svi, history, svi.optim)

    whole = run(False)
    assert whole["history"]["status"] is Status.MAX_STEPS
    (tmp_path / "c").unlink()
    assert run(True)["history"]["status"] is Status.INTERRUPTED
    assert_same(run(False), whole)


def test_a_non_finite_end_is_final(tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        new_process()
        svi = SVI(simple, no_latents, pyro.optim.SGD({"lr": 1e30}), Trace_ELBO())
        history = fit(svi, [V], 5, progress=False, checkpoint=Checkpoint(tmp_path / "c", seconds=0.0))
        return outcome(svi, history)

    first = run()
    assert first["history"]["status"] is Status.NON_FINITE
    assert_same(run(), first)


class Scripted:
    """A driver without model, guide or optimizer: a random walk that now and then is not finite."""

    def __init__(self) -> None:
        self.bad = 0

    def step(self, v: Tensor) -> float:
        place = pyro.param("place", torch.zeros(2))
        with torch.no_grad():
            place += torch.randn(2)
        return math.nan if float(torch.rand(())) < 0.15 else float(place.detach().sum())


def test_skipped_steps_are_counted_on_and_any_driver_will_do(tmp_path: Path) -> None:
    def run(path: Path | None, die: int | None = None) -> Any:
        new_process(3)
        kept = None if path is None else Checkpoint(path, seconds=0.0)
        callbacks = die_after(die)
        history = fit(Scripted(), [V] * 4, 8, callbacks=callbacks, skip_non_finite=4, progress=False, checkpoint=kept)
        return repr(vars(history) | {"seconds": 0}), pyro.param("place").tolist(), torch.rand(2).tolist()

    whole = run(None)
    assert "non_finite" in whole[0]
    assert whole[0].count("nan") > 4
    path = tmp_path / "c"
    with pytest.raises(Killed):
        run(path, 4)
    assert run(path) == whole


def test_resuming_shows_the_steps_that_were_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c"
    clipped_fit(path, 2)
    new_process()
    svi = SVI(simple, no_latents, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO())
    fit(svi, loader(own_generator=True), 3, seed=5, checkpoint=Checkpoint(path))
    assert "9/9" in capsys.readouterr().err


# ---------------------------------------------------------------- runs


def mixture() -> EM:
    model = GaussianMixture(num_components=3, num_visible=3, name="mixture")
    return EM(model, MeanField(model, name="q"), e_step=FixedPoint(), m_step=ClosedForm())


def sparse() -> EM:
    model = BinarySparseCoding(num_visible=3, num_latents=4, name="sparse")
    return EM(model, MeanField(model, name="q"), e_step=FixedPoint(start=Warm(), max_sweeps=3), m_step=ClosedForm())


def dictionary() -> EM:
    model = SparseCoding(num_visible=3, num_latents=4, name="dictionary")
    return EM(model, Dirac(model, name="q"), e_step=Maximize(), m_step=ClosedForm())


def two_groups(v: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.randn(2, 3))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.OneHotCategorical(torch.ones(2) / 2))
        pyro.sample("v", dist.Normal(h @ loc, scale).to_event(1), obs=v)


def gradient() -> EM:
    return EM(
        two_groups,
        MeanField(two_groups, name="q"),
        e_step=Gradient(pyro.optim.Adam({"lr": 0.05}), num_steps=2),
        m_step=Gradient(pyro.optim.DCTAdam({"lr": 0.02})),
    )


def climbing() -> EM:
    return EM(two_groups, MeanField(two_groups, name="q"), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=1))


def subsampled(v: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", len(v), subsample_size=7) as rows:
        h = pyro.sample("h", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(loc + h, 0.5).to_event(1), obs=v[rows])


def drawing() -> EM:
    return EM(
        subsampled,
        MeanField(subsampled, name="q"),
        e_step=FixedPoint(),
        m_step=Gradient(pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})),
    )


def refined() -> EM:
    model = SigmoidBeliefNetwork([4, 6], name="network")
    return EM(
        model,
        Amortized(model, name="q"),
        e_step=Refine(FixedPoint(max_sweeps=1), pyro.optim.Adam({"lr": 0.02})),
        m_step=Gradient(pyro.optim.Adam({"lr": 0.02})),
    )


def run_em(
    make: Callable[[], EM], path: Path | None, max_steps: int, die: int | None = None, **settings: Any
) -> dict[str, Any]:
    new_process(9)
    em = make()
    kept = None if path is None else Checkpoint(path, seconds=0.0)
    v = BITS if make is refined else V
    calls: list[int] = []

    def die_at(event: Any) -> None:
        calls.append(event.step)
        if len(calls) == die:
            raise Killed

    callbacks = [] if die is None else [die_at]
    settings = {"progress": False, "tolerance": 1e-6, "callbacks": callbacks} | settings
    history = em.run(v, max_steps=max_steps, checkpoint=kept, **settings)
    found = outcome(em, history, *em.parts)
    # Nothing that matters is anywhere else: the driver goes on alike.
    return found | {"table": em.guide.state_dict(), "next": [em.step(v) for _ in range(2)]}


MAKERS = [mixture, sparse, dictionary, gradient, climbing, drawing, refined]


@pytest.mark.parametrize("make", MAKERS)
def test_a_killed_run_ends_as_if_it_had_never_stopped(make: Callable[[], EM], tmp_path: Path) -> None:
    whole = run_em(make, None, 8)
    assert len(whole["history"]["ledger"]) > 10
    for die in (1, 5):
        path = tmp_path / f"{die}.checkpoint"
        with pytest.raises(Killed):
            run_em(make, path, 8, die)
        assert path.exists() == (die > 1)
        assert_same(run_em(make, path, 8), whole)
        assert_same(run_em(make, path, 8), whole)


def test_a_run_that_converges_is_final(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    whole = run_em(mixture, None, 200)
    assert whole["history"]["status"] is Status.CONVERGED
    with pytest.raises(Killed):
        run_em(mixture, path, 200, 4)
    assert_same(run_em(mixture, path, 200), whole)
    assert_same(run_em(mixture, path, 300), whole)


def test_more_steps_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    run_em(mixture, path, 3)
    assert_same(run_em(mixture, path, 7), run_em(mixture, None, 7))


@pytest.mark.parametrize(("make", "die"), [(mixture, 3), (mixture, 8), (mixture, 13), (gradient, 8)])
def test_restarts_are_resumed_in_any_start(make: Callable[[], EM], die: int, tmp_path: Path) -> None:
    def run(path: Path | None, die: int | None = None) -> dict[str, Any]:
        return run_em(make, path, 5, die, num_restarts=3, tolerance=0.0, seed=11)

    whole = run(None)
    path = tmp_path / "run.checkpoint"
    with pytest.raises(Killed):
        run(path, die)
    assert_same(run(path), whole)
    assert len(whole["history"]["restarts"]) == 3
    assert_same(run(path), whole)


@pytest.mark.parametrize("make", [sparse, dictionary, drawing, refined])
def test_where_the_process_stood_before_does_not_matter(make: Callable[[], EM], tmp_path: Path) -> None:
    """Other random numbers and other parameters in force before the resumed run."""
    path = tmp_path / "run.checkpoint"
    whole = run_em(make, None, 6)
    with pytest.raises(Killed):
        run_em(make, path, 6, 3)
    new_process(99)
    torch.rand(1234)
    em, v = make(), BITS if make is refined else V
    if make is not refined:
        em.step(2 * v)
        em.guide.undo_setup()
    history = em.run(v, max_steps=6, tolerance=1e-6, progress=False, checkpoint=Checkpoint(path))
    found = outcome(em, history, *em.parts)
    found |= {"table": em.guide.state_dict(), "next": [em.step(v) for _ in range(2)]}
    assert_same(found, whole)


def test_a_run_is_written_within_a_deferred_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without callbacks q stays out of the table between steps; the file has it all the same."""
    path = tmp_path / "run.checkpoint"
    pyro.set_rng_seed(9)
    em = mixture()
    step, count = Run._m_half, [0]

    def die(self: Run, number: int, result: Any) -> Any:
        count[0] = number
        if number == 4:
            raise Killed
        return step(self, number, result)

    monkeypatch.setattr(Run, "_m_half", die)
    with pytest.raises(Killed):
        em.run(V, max_steps=8, tolerance=1e-6, progress=False, checkpoint=Checkpoint(path, seconds=0.0))
    monkeypatch.undo()
    new_process()
    em = mixture()
    history = load(path, em, batch=V)
    assert history is not None
    assert (history.ledger[-1].step, history.ledger[-1].half) == (3, "M")
    assert em.evaluate_loss(V) == pytest.approx(-history.ledger[-1].bound, rel=1e-6)
    assert_same(run_em(mixture, path, 8), run_em(mixture, None, 8))


# ---------------------------------------------------------------- refusals


def kept_clipped(path: Path, **changes: Any) -> History:
    """`clipped_fit` with something else than before."""
    pyro.clear_param_store()
    model = changes.pop("model", simple)
    optim = changes.pop("optim", pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}))
    settings = {"num_epochs": 5, "seed": 5, "loader": loader(own_generator=True)} | changes
    svi = SVI(model, no_latents, optim, Trace_ELBO())
    return fit(svi, progress=False, checkpoint=Checkpoint(path), **settings)


def other_shape(v: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(4))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.interval(0.1, 5.0))
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(loc[:3], scale).to_event(1), obs=v)


other_shape.__name__ = "simple"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 6}, r"Expected seed = 5, with which '.*' was written, but got 6\. Call with the settings"),
        ({"num_epochs": 2}, r"Expected num_epochs of at least 3, the epochs in '.*', but got 2"),
        ({"skip_non_finite": 1}, "Expected skip_non_finite = 0"),
        ({"held_out": [V]}, "Expected held_out = None"),
        ({"loader": [V[:10]]}, "Expected loader.length = 3, .* but got 1"),
        ({"loader": DataLoader(TensorDataset(V + 1), batch_size=10, shuffle=True)}, "Expected loader.data = "),
        ({"loader": DataLoader(TensorDataset(V), batch_size=11, shuffle=True)}, "Expected loader.batch_size = 10"),
        ({"loader": loader()}, "Expected loaders with 1 generators of their own"),
        ({"optim": pyro.optim.ClippedAdam({"lr": 0.06, "lrd": 0.99})}, "Expected optimizer.arguments.lr = 0.05"),
        ({"optim": pyro.optim.Adam({"lr": 0.05})}, "Expected optimizer.class = 'ClippedAdam'"),
        ({"model": other_shape}, r"Expected 'loc' of shape \(3,\) as in '.*', but got \(4,\)"),
        ({"model": hierarchical}, "Expected model = 'simple', .* but got 'hierarchical'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.checkpoint"
    clipped_fit(path, 3)
    before, written = random_state(), path.read_bytes()
    with pytest.raises(CheckpointError, match=match):
        kept_clipped(path, **changes)
    assert_same(random_state(), before)
    assert path.read_bytes() == written


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.checkpoint"
    clipped_fit(path, 3)
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.raises(CheckpointError, match=r"Expected torch \d.* to go on from '.*', but got 99\.0\. Other"):
        kept_clipped(path)


def test_other_data_steps_and_tolerances_of_a_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    run_em(mixture, path, 5)
    new_process()
    em = mixture()
    for args, settings, match in (
        (V + 1, {}, "Expected data = "),
        (V, {"tolerance": 1e-3}, "Expected tolerance = 1e-06, .* but got 0.001"),
        (V, {"num_restarts": 2}, "Expected num_restarts = 1"),
        (V, {"max_steps": 3}, "Expected max_steps of at least 5, the steps in .*, but got 3"),
    ):
        generators = random_state()
        with pytest.raises(CheckpointError, match=match):
            em.run(
                args, **({"max_steps": 5, "tolerance": 1e-6} | settings), checkpoint=Checkpoint(path), progress=False
            )
        assert not em.guide.is_set_up
        assert not list(pyro.get_param_store())
        assert em.model.is_untouched
        assert_same(random_state(), generators)


def test_iterators_and_wrong_objects_are_refused(tmp_path: Path) -> None:
    svi = SVI(simple, no_latents, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="Expected loader to be read anew with a checkpoint, but got a generator"):
        fit(svi, (v for v in [V]), checkpoint=Checkpoint(tmp_path / "c"), progress=False)
    with pytest.raises(TypeError, match=r"Expected checkpoint to be a Checkpoint, but got str\. Write Checkpoint"):
        fit(svi, [V], checkpoint="c", progress=False)
    for settings, match in (
        ({"every": 0}, "Expected every to be a whole number of epochs or steps, at least 1, but got 0"),
        ({"every": True}, "but got True"),
        ({"seconds": -1.0}, r"Expected seconds of at least 0, but got -1\.0"),
        ({"path": tmp_path}, "Expected the path of a file, but got the folder"),
        ({"path": tmp_path / "none" / "c"}, "Expected a path in a folder that exists"),
    ):
        with pytest.raises(ValueError, match=match):
            Checkpoint(**({"path": tmp_path / "c"} | settings))
    assert not list(pyro.get_param_store())
