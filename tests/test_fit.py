"""The training loop against the loop of Pyro's tutorials, and every way in which it ends."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext.early_stopping import EarlyStopping
from pyro_ext.fit import EpochEnd, StopFit, fit
from pyro_ext.history import History, Status
from pyro_ext.wake_sleep import WakeSleep


class VAE(nn.Module):
    """The variational autoencoder of Pyro's tutorial, small, with batch norm and dropout on request."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        inner = [nn.BatchNorm1d(5), nn.Dropout(0.5)] if norm else []
        self.encoder = nn.Sequential(nn.Linear(6, 5), *inner, nn.Softplus(), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 6))

    def model(self, v: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", v.shape[0]):
            h = pyro.sample("h", dist.Normal(v.new_zeros(v.shape[0], 2), 1.0).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=v)

    def guide(self, v: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", v.shape[0]):
            loc, log_scale = self.encoder(v).chunk(2, -1)
            pyro.sample("h", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae_svi(norm: bool = False) -> SVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    vae = VAE(norm)
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())


def images(rows: int = 20) -> Tensor:
    return torch.bernoulli(torch.full((rows, 6), 0.4), generator=torch.Generator().manual_seed(3))


def loader(rows: int = 20) -> DataLoader:
    return DataLoader(TensorDataset(images(rows)), batch_size=8, shuffle=True)


class Scripted:
    """A driver whose losses are written down: step moves a parameter by one; held-out losses follow a list."""

    def __init__(self, losses: list[Any] | None = None, held_out: list[float] | None = None) -> None:
        self.losses = itertools.cycle(losses or [1.0])
        self.held_out = iter(held_out or [])
        self.optim = pyro.optim.SGD({"lr": 1.0})

    @property
    def w(self) -> Tensor:
        return pyro.param("w", torch.zeros(()))

    def num_rows(self, *args: Any) -> int:
        return 2

    def step(self, *args: Any) -> Any:
        with torch.no_grad():
            self.w.unconstrained().add_(1.0)
        loss = next(self.losses)
        if isinstance(loss, BaseException):
            raise loss
        return loss

    def evaluate_loss(self, *args: Any) -> float:
        return next(self.held_out)


def quiet(svi: Any, loader: Any, num_epochs: int = 1, **options: Any) -> History:
    return fit(svi, loader, num_epochs, progress=False, **options)


# The same losses as by hand


def test_equals_the_tutorials_loop_bit_by_bit():
    svi = vae_svi()
    by_hand = [svi.step(v) / len(v) for _ in range(3) for (v,) in loader()]
    parameters = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    history = quiet(vae_svi(), loader(), 3)
    assert history.loss == by_hand
    assert all(torch.equal(pyro.param(name), value) for name, value in parameters.items())
    assert history.steps == 9
    assert history.epoch_ends == [3, 6, 9]
    assert history.epochs == 3
    assert history.status == "max_steps"
    assert history.message == "All 3 epochs (9 steps) were run."
    assert history.loss_label == "-L, nats per row"
    assert history.seconds == sorted(history.seconds)
    assert len(history.seconds) == 9


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDelta])
def test_an_autoguide_that_sets_itself_up_in_the_first_step(make_guide):
    batch = (torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]))

    def make() -> SVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        return SVI(eight_schools, make_guide(eight_schools), pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())

    svi = make()
    by_hand = [svi.step(*batch) for _ in range(6)]
    history = quiet(make(), [batch], 6)
    assert history.loss == by_hand
    # One global latent makes it a program of one row.
    assert history.loss_label == "-L, nats in total"


def test_parameters_made_in_the_model_draw_the_same_random_numbers():
    def model(v: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(3))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(loc.sum(), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.rand(len(v)) + 0.5, constraint=constraints.positive)
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(0.0, scale))

    v = torch.tensor([0.5, -1.0, 2.0])

    def make() -> SVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        return SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=2))

    svi = make()
    by_hand = [svi.step(v) / 3 for _ in range(5)]
    assert quiet(make(), [v], 5).loss == by_hand


def test_a_subsampled_program_is_per_row_of_the_full_data():
    def model(v: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(v), subsample_size=5) as index:
            pyro.sample("v", dist.Normal(loc, 1.0), obs=v[index])

    svi = SVI(model, lambda v: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    history = quiet(svi, [torch.ones(100)], 3)
    assert history.loss == pytest.approx([0.5 + 0.5 * math.log(2 * math.pi)] * 3, abs=1e-5)


def gaussian(v: Tensor, scale: Tensor | float = 1.0) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(loc, scale), obs=v)


def gaussian_svi(model: Callable[..., None] = gaussian, lr: float = 0.1, **kwargs: Any) -> SVI:
    return SVI(model, lambda *_, **__: None, pyro.optim.Adam({"lr": lr, **kwargs}), Trace_ELBO())


class Rows(torch.utils.data.Dataset):
    """Rows as dictionaries of v and scale."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"v": torch.tensor(float(i)), "scale": torch.tensor(2.0)}


V6, SCALE6 = torch.arange(6.0), torch.full((6,), 2.0)


@pytest.mark.parametrize(
    ("batches", "calls"),
    [
        (DataLoader(V6, batch_size=4), [(V6[:4],), (V6[4:],)]),
        (DataLoader(TensorDataset(V6, SCALE6), batch_size=4), [(V6[:4], SCALE6[:4]), (V6[4:], SCALE6[4:])]),
        (DataLoader(Rows(), batch_size=4), [(V6[:4], SCALE6[:4]), (V6[4:], SCALE6[4:])]),
        ([(V6, SCALE6), V6, {"v": V6}], [(V6, SCALE6), (V6,), (V6,)]),
        (iter([V6]), [(V6,)]),
    ],
    ids=["tensor", "tuple", "dict", "list", "iterator"],
)
def test_kinds_of_batches(batches, calls):
    svi = gaussian_svi()
    by_hand = [svi.step(*call) / len(call[0]) for call in calls]
    pyro.clear_param_store()
    assert quiet(gaussian_svi(), batches).loss == pytest.approx(by_hand, abs=1e-7)


def test_a_program_without_arguments():
    svi = gaussian_svi(lambda: gaussian(V6))
    assert quiet(svi, [()], 300).loss[-1] == pytest.approx(
        -dist.Normal(2.5, 1.0).log_prob(V6).sum().item() / 6, abs=1e-3
    )


@pytest.mark.parametrize("make_elbo", [RenyiELBO, ReweightedWakeSleep])
def test_other_objectives_and_tuples(make_elbo):
    def make() -> SVI:
        svi = vae_svi()
        return SVI(svi.model, lambda v, observations=None: svi.guide(v), svi.optim, make_elbo(num_particles=2))

    svi, v = make(), images()
    by_hand = [svi.step(v) for _ in range(3)]
    first = [loss[0] if isinstance(loss, tuple) else loss for loss in by_hand]
    history = quiet(make(), [v], 3)
    assert history.loss == [loss / 20 for loss in first]
    assert history.loss_label == "loss, nats per row"


def draws() -> list[float]:
    # The global generator of NumPy is the one that Pyro seeds.
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]  # noqa: NPY002


def test_seed():
    state = draws()
    pyro.set_rng_seed(0)
    quiet(Scripted(), [()])
    assert draws() == state
    losses = []
    for noise in (1, 2):
        svi = vae_svi()
        torch.manual_seed(noise)
        losses.append(quiet(svi, loader(), seed=7).loss)
    assert losses[0] == losses[1]


def test_sleep_loss_per_row_is_taken_from_the_objective():
    driver = Scripted(losses=[2.0, math.nan, 2.0])
    driver.last_sleep_loss = torch.tensor(3.0)
    assert quiet(driver, [()] * 3, skip_non_finite=1).sleep_loss == pytest.approx([1.5, math.nan, 1.5], nan_ok=True)
    assert quiet(Scripted(), [()]).sleep_loss == []


def test_sleep_loss_of_wake_sleep():
    svi = vae_svi()
    elbo = WakeSleep(num_particles=2)
    svi = SVI(svi.model, svi.guide, svi.optim, elbo)
    history = quiet(svi, [images()], 2)
    assert len(history.sleep_loss) == 2
    assert history.sleep_loss[-1] == pytest.approx(elbo.last_sleep_loss.item() / 20, abs=1e-6)


# Held-out data


def test_held_out_loss_per_row_and_training_undisturbed():
    without = quiet(vae_svi(), loader(), 4).loss
    held_out, svi = DataLoader(TensorDataset(images(10)), batch_size=4), vae_svi()
    start = torch.get_rng_state()
    history = quiet(svi, loader(), 4, held_out=held_out)
    assert history.loss == without
    # By hand at the last state, with the random numbers of the start of the fit.
    torch.set_rng_state(start)
    by_hand = sum(svi.evaluate_loss(v) for (v,) in held_out) / 10
    assert len(history.held_out) == 4
    assert history.held_out[-1] == history.records[-1]["held_out"] == by_hand


def test_the_same_random_numbers_at_every_epoch():
    svi = vae_svi()
    svi.optim = pyro.optim.SGD({"lr": 0.0})
    shuffled = DataLoader(TensorDataset(images(10)), batch_size=4, shuffle=True)
    history = quiet(svi, loader(), 3, held_out=shuffled)
    assert len(set(history.held_out)) == 1
    assert len(set(history.loss)) > 1


def test_evaluation_mode_and_buffers():
    svi = vae_svi(norm=True)
    vae, seen = svi.model.__self__, []
    vae.decoder.eval()

    def evaluate_loss(v: Tensor) -> float:
        seen.append((vae.encoder.training, vae.encoder[2].training, vae.decoder.training))
        vae.encoder[1].running_mean += 100.0
        return SVI.evaluate_loss(svi, v)

    svi.evaluate_loss = evaluate_loss
    quiet(svi, loader(), 1, held_out=[images(10)])
    assert seen == [(False, False, False)]
    assert vae.encoder.training
    assert vae.encoder[2].training
    assert not vae.decoder.training
    assert vae.encoder[1].running_mean.abs().max() < 10.0
    assert vae.encoder[1].num_batches_tracked == 3


def test_momentum_of_parameters_without_gradient_is_as_by_hand():
    # Between steps of SVI gradients are zero tensors, so Adam moves on: evaluation must keep them.
    def model(v: Tensor, use_a: bool) -> None:
        with pyro.plate("data", len(v)):
            loc = pyro.param("a", torch.tensor(0.0)) if use_a else pyro.param("a", torch.tensor(0.0)).detach()
            pyro.sample("v", dist.Normal(loc, 1.0), obs=v)

    calls = [(V6, True), (V6, False)]

    def after(run: Callable[[SVI], Any]) -> float:
        pyro.clear_param_store()
        run(gaussian_svi(model))
        return pyro.param("a").item()

    def by_hand(svi: SVI) -> None:
        for call in calls * 3:
            svi.step(*call)

    assert after(by_hand) == after(lambda svi: quiet(svi, calls, 3, held_out=[calls[0]]))


# Early stopping


def test_early_stopping_goes_back_to_the_best_state():
    driver = Scripted(held_out=[3.0, 2.0, 2.5, 2.2, 2.1, 0.0])
    history = quiet(driver, [()] * 2, 6, held_out=[()], early_stopping=EarlyStopping(patience=3))
    assert history.status == "stopped_early"
    assert history.message == (
        "Stopped after epoch 5: no progress on the held-out data for 3 epochs. "
        "In force is the state after epoch 2, the best on the held-out data."
    )
    assert (history.best_epoch, history.best_held_out, history.epochs) == (2, 1.0, 5)
    assert driver.w == 4.0  # two steps an epoch, each adds one


def test_the_best_state_is_restored_without_stopping_too():
    driver = Scripted(held_out=[3.0, 2.0, 2.5])
    history = quiet(driver, [()], 3, held_out=[()], early_stopping=EarlyStopping())
    assert history.status == "max_steps"
    assert driver.w == 2.0
    assert "In force is the state after epoch 2" in history.message


def test_without_early_stopping_the_last_state_stays():
    driver = Scripted(held_out=[3.0, 2.0, 2.5])
    history = quiet(driver, [()], 3, held_out=[()])
    assert driver.w == 3.0
    assert history.best_epoch == 2
    assert "In force" not in history.message


def test_early_stopping_of_an_overfitting_fit_ends_with_its_lowest_held_out_loss():
    svi = gaussian_svi(lr=0.3)
    history = quiet(
        svi, [torch.full((4,), 5.0)], 200, held_out=[torch.full((4,), 2.0)], early_stopping=EarlyStopping(3)
    )
    assert history.status == "stopped_early"
    assert history.epochs < 40
    assert svi.evaluate_loss(torch.full((4,), 2.0)) / 4 == pytest.approx(min(history.held_out), abs=1e-6)
    # The held-out loss sees noise of no kind, so it falls until the location passes 2.
    assert pyro.param("loc").item() == pytest.approx(2.0, abs=0.3)


def test_a_held_out_loss_that_is_never_finite_restores_nothing():
    driver = Scripted(held_out=[math.nan, math.nan])
    history = quiet(driver, [()], 5, held_out=[()], early_stopping=EarlyStopping(patience=2))
    assert history.status == "stopped_early"
    assert driver.w == 2.0
    assert "In force" not in history.message


# Callbacks


def test_callbacks_see_each_epoch():
    events: list[EpochEnd] = []
    driver = Scripted(losses=[2.0, 4.0, 6.0, 8.0], held_out=[10.0, 20.0])
    history = quiet(driver, [()] * 2, 2, held_out=[()], callbacks=[events.append, lambda event: True])
    assert [(e.epoch, e.step, e.loss, e.held_out) for e in events] == [(1, 2, 1.5, 5.0), (2, 4, 3.5, 10.0)]
    assert all(e.svi is driver and e.history is history for e in events)


def test_callbacks_see_a_running_history():
    seen = []
    quiet(Scripted(), [()], callbacks=[lambda event: seen.append((event.history.status, event.held_out))])
    assert seen == [(Status.RUNNING, None)]


@pytest.mark.parametrize(("reason", "text"), [("good enough", "epoch 2: good enough."), ("", "epoch 2.")])
def test_a_callback_stops_the_fit(reason, text):
    def stop(event: EpochEnd) -> None:
        if event.epoch == 2:
            raise StopFit(reason)

    history = quiet(Scripted(), [()] * 3, 9, callbacks=[stop])
    assert (history.status, history.steps, history.epochs) == ("stopped", 6, 2)
    assert history.message == f"Stopped by a callback after {text}"


def test_a_callback_moves_a_schedule():
    scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
    svi = SVI(gaussian, lambda v: None, scheduler, Trace_ELBO())
    quiet(svi, [V6], 3, callbacks=[lambda _: scheduler.step()])
    (optimizer,) = scheduler.optim_objs.values()
    assert optimizer.get_last_lr() == [0.125]


def test_an_error_in_a_callback_passes():
    def fail(event: EpochEnd) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        quiet(Scripted(), [()], callbacks=[fail])


# The progress bar


def test_progress_bar_on_stderr(capsys):
    fit(Scripted(held_out=[6.0, 4.0]), [()] * 2, 2, held_out=[()])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "epoch=2/2, loss=0.5, held_out=2, status=max_steps" in captured.err


def test_progress_bar_without_a_length(capsys):
    history = fit(Scripted(), (() for _ in range(3)))
    assert history.steps == 3
    assert "3step" in capsys.readouterr().err


def test_no_progress_bar(capsys):
    quiet(Scripted(), [()] * 2, 2)
    assert capsys.readouterr() == ("", "")


# Non-finite losses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_ends_the_fit_at_the_state_before(bad):
    driver = Scripted(losses=[2.0, 2.0, 2.0, bad])
    history = quiet(driver, [()] * 3, 5)
    assert history.status == "non_finite"
    assert history.message == f"The loss of step 4 (epoch 2) was {bad}; the state before that step was restored."
    assert history.loss[:3] == [1.0] * 3
    assert history.loss[3:] == pytest.approx([bad], nan_ok=True)
    assert driver.w == 3.0
    assert history.epochs == 1


def test_a_non_finite_first_loss_leaves_the_first_values():
    driver = Scripted(losses=[math.nan])
    assert quiet(driver, [()]).status == "non_finite"
    assert "w" in pyro.get_param_store()
    assert driver.w == 0.0


def root_of_zero(v: Tensor, bad: bool = False) -> None:
    loc = pyro.param("loc", torch.tensor(1.0))
    # A finite value whose gradient is 0 * inf: the loss does not show it yet.
    loc = loc + (0.0 * (loc.detach() - loc).abs().sqrt() if bad else 0.0)
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(loc, 1.0), obs=v)


GOOD, BAD = {"v": V6, "bad": False}, {"v": V6, "bad": True}


def spoilt_run(
    batches: list[Any], num_epochs: int, validate: bool, num_rows: Any = None, **options: Any
) -> tuple[History, list[float], SVI]:
    """The fit, and the values that loc takes over the good batches alone."""
    svi = gaussian_svi(root_of_zero)
    values = [1.0]
    for _ in range(6):
        svi.step(**GOOD)
        values.append(pyro.param("loc").item())
    pyro.clear_param_store()
    svi = gaussian_svi(root_of_zero)
    if num_rows is not None:
        svi.num_rows = num_rows
    with pyro.validation_enabled(validate):
        history = quiet(svi, batches, num_epochs, **options)
    return history, values, svi


def test_a_nan_gradient_in_a_new_shape_is_noticed_at_once():
    history, values, _ = spoilt_run([GOOD, GOOD, BAD, GOOD], 1, True)
    assert history.status == "non_finite"
    assert history.message == (
        "A parameter was not finite after step 3 (epoch 1); the state before that step was restored."
    )
    assert pyro.param("loc").item() == values[2]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_nan_gradient_is_undone_when_the_next_loss_shows_it(validate):
    history, values, _ = spoilt_run([GOOD, GOOD, BAD, GOOD], 1, validate, num_rows=lambda v, bad: len(v))
    what = "could not be computed (ValueError)" if validate else "was nan"
    assert history.status == "non_finite"
    assert history.message == (
        f"The loss of step 4 (epoch 1) {what}; its parameters were not finite, "
        "and the state before the previous step was restored."
    )
    assert pyro.param("loc").item() == values[2]
    assert [math.isnan(loss) for loss in history.loss] == [False, False, False, True]


@pytest.mark.parametrize("batches", [[GOOD, BAD], [BAD]])
def test_a_nan_gradient_in_the_last_step_is_undone(batches):
    history, values, svi = spoilt_run(batches, 1, True)
    assert history.status == "non_finite"
    assert pyro.param("loc").item() == values[len(batches) - 1]
    # The optimizer went back too: a new fit goes on as if the bad batch had not been.
    assert quiet(svi, [GOOD]).status == "max_steps"
    assert pyro.param("loc").item() == pytest.approx(values[len(batches)], abs=1e-7)


def test_an_epoch_that_ends_in_nan_is_not_evaluated():
    svi = gaussian_svi(root_of_zero)
    svi.num_rows = lambda v, bad: len(v)
    history = quiet(svi, [GOOD, BAD], 2, held_out=[GOOD])
    assert history.message.startswith("A parameter was not finite after step 2 (epoch 1); the state before that step")
    assert history.held_out == []
    assert math.isfinite(pyro.param("loc").item())


def test_bad_steps_can_be_skipped():
    history, values, _ = spoilt_run([GOOD, BAD], 3, True, skip_non_finite=3)
    assert history.status == "max_steps"
    assert history.message.endswith("3 steps were undone and skipped, for their loss was not finite.")
    assert pyro.param("loc").item() == pytest.approx(values[3], abs=1e-7)


def test_no_more_than_allowed_are_skipped():
    driver = Scripted(losses=[2.0, math.nan])
    history = quiet(driver, [()] * 9, skip_non_finite=2)
    assert history.status == "non_finite"
    assert history.steps == 6
    assert driver.w == 3.0
    assert history.message.startswith("The loss of step 6 (epoch 1) was nan; the state before that step was restored.")


def test_the_best_state_wins_over_the_state_before_a_non_finite_loss():
    driver = Scripted(losses=[2.0, 2.0, 2.0, math.nan], held_out=[1.0, 2.0, 3.0])
    history = quiet(driver, [()], 5, held_out=[()], early_stopping=EarlyStopping())
    assert history.status == "non_finite"
    assert driver.w == 1.0
    assert history.message.endswith("In force is the state after epoch 1, the best on the held-out data.")


def test_a_driver_that_guards_itself_is_trusted():
    driver = Scripted(losses=[2.0, math.nan])
    driver.guards_non_finite = True
    history = quiet(driver, [()] * 3)
    assert history.message == "The loss of step 2 (epoch 1) was nan; the driver restored the state before."
    assert driver.w == 2.0


def test_without_a_guard_nothing_is_undone_and_that_is_said():
    driver = Scripted(losses=[2.0, math.nan])
    history = quiet(driver, [()] * 3, guard=False)
    assert history.message == "The loss of step 2 (epoch 1) was nan; nothing was undone (guard=False)."
    assert driver.w == 2.0


# Interrupts and errors


def test_an_interrupt_ends_the_fit_with_its_history():
    driver = Scripted(losses=[2.0, 2.0, 2.0, KeyboardInterrupt()])
    history = quiet(driver, [()] * 2, 5)
    assert (history.status, history.steps, history.epochs) == ("interrupted", 3, 1)
    assert history.message == "Interrupted in epoch 2, after 3 steps."
    assert driver.w == 3.0


def test_an_interrupt_with_early_stopping_leaves_the_best():
    driver = Scripted(losses=[2.0, 2.0, 2.0, KeyboardInterrupt()], held_out=[1.0, 2.0, 3.0])
    history = quiet(driver, [()], 5, held_out=[()], early_stopping=EarlyStopping())
    assert history.status == "interrupted"
    assert driver.w == 1.0


@pytest.mark.parametrize(("steps", "left"), [(0, None), (2, 2.0)])
def test_an_error_in_a_step_undoes_it_and_says_where(steps, left):
    driver = Scripted(losses=[2.0] * steps + [ValueError("bad data")])
    with pytest.raises(ValueError, match="bad data") as caught:
        quiet(driver, [()] * 5)
    assert caught.value.__notes__ == [
        f"Raised in fit at step {steps + 1} (epoch 1); the state before that step was restored."
    ]
    store = pyro.get_param_store()
    assert (store["w"].item() if "w" in store else None) == left


def test_an_error_without_a_guard():
    with pytest.raises(ValueError, match="bad data") as caught:
        quiet(Scripted(losses=[ValueError("bad data")]), [()], guard=False)
    assert caught.value.__notes__ == ["Raised in fit at step 1 (epoch 1)."]


def test_refuses_drivers_without_their_methods():
    with pytest.raises(
        TypeError, match=r"Expected a driver with a method `step`, but got Linear\. Pass pyro.infer.SVI"
    ):
        quiet(nn.Linear(1, 1), [()])
    with pytest.raises(TypeError, match=r"a method `evaluate_loss` for held-out data, but got SimpleNamespace\. Leave"):
        quiet(SimpleNamespace(step=lambda: 0.0), [()], held_out=[()])


@pytest.mark.parametrize("num_epochs", [0, -1, 1.5, True])
def test_refuses_a_wrong_number_of_epochs(num_epochs):
    with pytest.raises(
        ValueError, match=r"Expected num_epochs to be a whole number, at least 1, but got .*Pass the number"
    ):
        quiet(Scripted(), [()], num_epochs)


def test_refuses_wrong_loaders_before_anything_runs():
    with pytest.raises(
        TypeError, match=r"Expected loader to be an iterable of batches, .* got one Tensor\. .*`\[batch\]`"
    ):
        quiet(Scripted(), V6)
    with pytest.raises(ValueError, match=r"Expected loader .* read 2 times, but got a generator"):
        quiet(Scripted(), (() for _ in range(3)), 2)
    with pytest.raises(ValueError, match=r"Expected held_out .* read 2 times, but got a list_iterator"):
        quiet(Scripted(), [()], 2, held_out=iter([()]))
    with pytest.raises(ValueError, match=r"Expected loader to yield at least one batch, but got none in this pass"):
        quiet(Scripted(), iter([]))
    assert len(pyro.get_param_store()) == 0


def test_a_loader_that_runs_dry_after_the_first_epoch_is_named():
    class Once:
        def __init__(self) -> None:
            self.items = [(), ()]

        def __iter__(self) -> Any:
            while self.items:
                yield self.items.pop()

    with pytest.raises(ValueError, match=r"Expected loader to yield at least one batch, .* read once per epoch"):
        quiet(Scripted(), Once(), 2)


def test_refuses_early_stopping_without_held_out_data():
    with pytest.raises(ValueError, match=r"Expected held-out data with early stopping, but got held_out=None\. Pass"):
        quiet(Scripted(), [()], early_stopping=EarlyStopping())
    with pytest.raises(
        TypeError, match=r"Expected early_stopping to be an EarlyStopping, but got int\. Pass EarlyStopping"
    ):
        quiet(Scripted(), [()], held_out=[()], early_stopping=5)


def test_refuses_other_wrong_options():
    with pytest.raises(
        TypeError, match=r"Expected callbacks to be functions of an EpochEnd, but got str\. Pass a list"
    ):
        quiet(Scripted(), [()], callbacks=["stop"])
    with pytest.raises(ValueError, match=r"Expected skip_non_finite to be a whole number .* but got -1\. Pass 0"):
        quiet(Scripted(), [()], skip_non_finite=-1)
    with pytest.raises(
        ValueError, match=r"Expected guard=True with skip_non_finite=1, but got guard=False\. Only a guarded"
    ):
        quiet(Scripted(), [()], skip_non_finite=1, guard=False)
    with pytest.raises(TypeError, match=r"Expected seed to be a whole number or None, but got 'x'\. Pass an int"):
        quiet(Scripted(), [()], seed="x")


def test_refuses_a_loss_that_is_no_number_and_undoes_the_step():
    driver = Scripted(losses=[None])
    with pytest.raises(TypeError, match=r"Expected `step` to return the loss, a number .*but got NoneType\. Return -L"):
        quiet(driver, [()])
    assert len(pyro.get_param_store()) == 0


def test_refuses_a_batch_of_an_unknown_kind():
    with pytest.raises(TypeError, match=r"Expected each batch to be a tensor, .* but got ndarray\. Yield"):
        quiet(Scripted(), [np.zeros(3)])
