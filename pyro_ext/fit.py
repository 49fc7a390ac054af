"""One training loop for every driver: Pyro's SVI, EM, CompiledSVI."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from tqdm import tqdm

from pyro_ext.batches import RowCounter, batches
from pyro_ext.checkpoint import Checkpoint, Keeper, set_up
from pyro_ext.drivers import Driver, epoch_of, loss_label_of, number, parts_of, sleep_loss_of
from pyro_ext.early_stopping import EarlyStopping
from pyro_ext.fit_checks import check_fit, fit_settings, read_fit
from pyro_ext.guard import Guard
from pyro_ext.history import History, Status
from pyro_ext.ownership import noting_parameters
from pyro_ext.random_state import random_state, random_state_from
from pyro_ext.restoring import KeptState
from pyro_ext.snapshot import Part, Snapshot, rng_state, set_rng_state, unchanged

_REFRESH_SECONDS = 0.1


class StopFit(Exception):
    """Raised by a callback to end the fit; its text becomes part of `History.message`."""


@dataclass(frozen=True)
class EpochEnd:
    """What a callback is given after each epoch, the held-out evaluation included.

    Attributes:
        svi: the driver.
        epoch: number of finished epochs.
        step: number of steps taken.
        history: the record so far; the callback may read it at any time.
    """

    svi: Any
    epoch: int
    step: int
    history: History

    @property
    def loss(self) -> float:
        """Mean over the epoch's steps of the training loss, nats per row."""
        start = self.history.epoch_ends[self.epoch - 2] if self.epoch > 1 else 0
        losses = self.history.loss[start : self.step]
        return sum(losses) / len(losses)

    @property
    def held_out(self) -> float | None:
        """Held-out loss after this epoch, nats per row; None without held-out data."""
        return self.history.held_out[self.epoch - 1] if self.history.held_out else None


def fit(
    svi: Driver,
    loader: Iterable[Any],
    num_epochs: int = 1,
    *,
    held_out: Iterable[Any] | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Callable[[EpochEnd], Any]] = (),
    progress: bool = True,
    seed: int | None = None,
    skip_non_finite: int = 0,
    guard: bool = True,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train: one ``svi.step`` per batch, ``num_epochs`` times over the loader.

    The steps are those of the loop in Pyro's tutorials, with the same random numbers and the same losses::

        for _ in range(num_epochs):
            for v in loader:
                svi.step(v)

    With `EM` and ``ClosedForm()`` each pass is one EM step on all the data that the loader yields: batches add up
    their statistics, and theta moves once, at the end of the epoch, before the held-out evaluation. The epoch's losses
    then belong to one theta, that before the M-step, and their mean weighted by rows is -L per row of all the data.

    A batch that is a tensor is passed as one argument, a tuple or list as positional arguments, a dict as
    keyword arguments. For full-batch steps pass ``[v]``; for a program without arguments ``[()]``.

    *Held-out data* are evaluated after each epoch by ``svi.evaluate_loss``, with the modules in evaluation
    mode, with the same random numbers at every epoch, and with nothing changed: parameters, buffers and
    the random numbers of training are put back.

    *A non-finite loss* ends the fit: the state before that step, optimizers included, is restored, or, when a
    parameter was already NaN by then, the state before the step that made it so; ``history.message`` says
    which. The first ``skip_non_finite`` such steps are undone and passed over instead.

    *Interrupting* (Ctrl-C) undoes the unfinished step and returns the history. An error in ``svi.step`` undoes it
    and passes. With early stopping, the state of the best epoch is in force at the end, however the fit ended.

    *With a checkpoint* the fit is written to a file after its epochs. Where that file exists, the fit goes on from it,
    with the same numbers as if it had never stopped, wherever it was killed: parameters, optimizers, schedules, random
    generators, losses, early stopping and the best state are those of the last epoch that was written. A fit that had
    ended is returned at once, or goes on when it had run all epochs and `num_epochs` is larger now. Model, guide,
    driver and loaders are to be built as they were, by the same script; callbacks are called again for epochs that
    were not written. What callbacks, data sets and workers of loaders remember themselves is not in the file.

    Args:
        svi: a driver: `pyro.infer.SVI`, `EM`, or anything with their ``step`` and ``evaluate_loss`` (`Driver`).
        loader: a DataLoader, a list of batches, or any iterable that can be read once per epoch.
        num_epochs: number of passes over the loader, at least 1.
        held_out: batches to evaluate after each epoch.
        early_stopping: when to stop on the held-out loss; at the end the best state is restored.
        callbacks: called in turn with an `EpochEnd` after each epoch; what they return is ignored. To end the
            fit, raise `StopFit("reason")`. A learning-rate schedule is ``lambda _: scheduler.step()``.
        progress: whether to show a progress bar on stderr.
        seed: set all random generators first; None leaves them as they are.
        skip_non_finite: how many steps with a non-finite loss are passed over before the fit gives up.
        guard: whether to keep what undoing a step needs: two copies of the parameters and of the optimizers' state,
            renewed at each step (about 0.1 ms for thirty tensors: less than a tenth of a small model's step, a third
            of a compiled one). Without it a step that ended in NaN, an error or an interrupt leaves its traces.
        checkpoint: the file to keep the fit in, and to go on from.

    Returns:
        The history: losses in nats per row, how the run ended and which state is in force.

    Raises:
        TypeError: the driver has no ``step`` (or no ``evaluate_loss``, with held-out data), the loader is a single
            batch or a data set, a batch is of an unknown kind, a callback is not callable, or a loss is no number.
        ValueError: ``num_epochs`` below 1, early stopping without held-out data, an empty loader, or an iterator
            that would be read more than once, or read with a checkpoint.
        CheckpointError: (a ValueError) the checkpoint is damaged, or was written with other settings, another model,
            other data or other versions of the packages. Nothing has changed then.
        OSError: the checkpoint could not be written; the last one is still there.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> pyro.clear_param_store()
        >>> def model(v):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(v)):
        ...         pyro.sample("v", dist.Normal(loc, 1.0), obs=v)
        >>> svi = SVI(model, lambda v: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> history = fit(svi, [torch.full((8,), 2.0)], num_epochs=200, progress=False)
        >>> round(history.loss[-1], 3), round(pyro.param("loc").item(), 2), history.status.value
        (0.919, 2.0, 'max_steps')
    """
    check_fit(svi, loader, num_epochs, held_out, early_stopping, callbacks, seed, skip_non_finite, guard)
    keeper = None
    if checkpoint is not None:
        settings = fit_settings(svi, loader, held_out, early_stopping, seed, skip_non_finite)
        keeper = Keeper(checkpoint, svi, settings, (loader, held_out))
    kept = None if keeper is None else read_fit(keeper, num_epochs)
    generators = rng_state()
    if seed is not None:
        pyro.set_rng_seed(seed)
    run = _Run(svi, loader, num_epochs, held_out, early_stopping, tuple(callbacks), skip_non_finite, guard, keeper)
    if kept is not None:
        try:
            run.resume(kept)
        except BaseException:
            set_rng_state(generators)
            raise
    run.go(progress)
    return run.history


class _Stop(Exception):
    """Ends a run from within, with its status and message."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        svi: Driver,
        loader: Iterable[Any],
        num_epochs: int,
        held_out: Iterable[Any] | None,
        early_stopping: EarlyStopping | None,
        callbacks: tuple[Callable[[EpochEnd], Any], ...],
        max_skipped: int,
        guard: bool,
        keeper: Keeper | None,
    ) -> None:
        self.svi = svi
        self.keeper = keeper
        self.loader = loader
        self.num_epochs = num_epochs
        self.held_out = held_out
        self.callbacks = callbacks
        self.max_skipped = max_skipped
        self.skipped = 0
        self.parts = parts_of(svi)
        self.rows = RowCounter(svi, self.parts)
        self.guards_itself = bool(getattr(svi, "guards_non_finite", False))
        self.guard = Guard(self.parts) if guard and not self.guards_itself else None
        self.watch = None if early_stopping is None else early_stopping.start()
        self.best: Snapshot | KeptState | None = None
        self.evaluation_rng = rng_state()
        self.loss_name = loss_label_of(svi)
        self.history = History(loss_label=f"{self.loss_name}, nats per row")
        self.started = self.shown = time.perf_counter()

    @property
    def where(self) -> str:
        """The step that is being taken."""
        return f"step {self.history.steps + 1} (epoch {self.history.epochs + 1})"

    def resume(self, kept: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        keeper = self.keeper
        if keeper is None:
            raise RuntimeError("Expected a checkpoint to go on from, but got none. Pass `checkpoint=`.")
        if keeper.needs_set_up:
            args, kwargs = next(batches(self.loader, "loader"))
            set_up(self.svi, args, kwargs)
        keeper.put_back()
        self.history = kept["history"]
        self.skipped, self.rows.in_total = kept["skipped"], kept["in_total"]
        self.evaluation_rng = random_state_from(kept["evaluation"])
        self.started = time.perf_counter() - kept["elapsed"]
        if self.watch is not None:
            self.watch.resume(kept["watch"])
        if kept["best"] is not None:
            self.best = KeptState(self.svi, kept["best"])
        if self.history.status is Status.MAX_STEPS and self.history.epochs < self.num_epochs:
            self.history.status, self.history.message = Status.RUNNING, ""

    def keep(self) -> None:
        """Write the checkpoint."""
        if self.keeper is None:
            return
        has_ended = self.history.status is not Status.RUNNING
        best = None if self.best is None else cast("KeptState", self.best).state
        progress = {
            "epochs": self.history.epochs,
            "status": self.history.status.value,
            "skipped": self.skipped,
            "in_total": self.rows.in_total,
            "evaluation": random_state(self.evaluation_rng),
            "elapsed": time.perf_counter() - self.started,
            "watch": None if self.watch is None else self.watch.state,
            "best": best,
        }
        self.keeper.write(self.history, progress, in_force=best if has_ended else None)

    def go(self, progress: bool) -> None:
        """Run all epochs, or until something ends the run."""
        history = self.history
        if history.status is not Status.RUNNING:
            if self.best is not None:
                self.best.restore()
            return
        total = operator.length_hint(self.loader) * self.num_epochs
        with tqdm(total=total or None, initial=history.steps, disable=not progress, unit="step") as bar:
            try:
                for epoch in range(history.epochs + 1, self.num_epochs + 1):
                    with nullcontext() if self.keeper is None else noting_parameters(self.svi):
                        self.epoch(bar)
                    if self.keeper is not None and epoch < self.num_epochs and self.keeper.is_due(epoch):
                        self.keep()
                status = Status.MAX_STEPS
                message = f"All {self.num_epochs} epochs ({history.steps} steps) were run."
            except _Stop as stop:
                status, message = stop.status, str(stop)
            except KeyboardInterrupt:
                status = Status.INTERRUPTED
                message = f"Interrupted in epoch {history.epochs + 1}, after {history.steps} steps."
            if self.skipped:
                message += f" {self.skipped} steps were undone and skipped, for their loss was not finite."
            if self.best is not None:
                message += f" In force is the state after epoch {history.best_epoch}, the best on the held-out data."
            history.status, history.message = status, message
            try:
                # An interrupted fit goes on from the last whole epoch.
                if status is not Status.INTERRUPTED:
                    self.keep()
            finally:
                if self.best is not None:
                    self.best.restore()
            self.show(bar)

    def epoch(self, bar: tqdm[Any]) -> None:
        """One pass over the loader, the held-out loss, and what follows from it."""
        history = self.history
        read = False
        try:
            with epoch_of(self.svi):
                for args, kwargs in batches(self.loader, "loader"):
                    self.step(args, kwargs)
                    bar.update()
                    if time.perf_counter() - self.shown > _REFRESH_SECONDS:
                        self.show(bar)
                read = True
        except Exception as error:
            if read:
                error.add_note(f"Raised in fit at the end of epoch {history.epochs + 1}.")
            raise
        if self.is_spoilt:
            # Else a NaN gradient in the last step of all would pass unseen.
            self.undo(f"A parameter was not finite after step {history.steps} (epoch {history.epochs + 1})")
        history.epoch_ends.append(history.steps)
        if self.held_out is not None:
            history.held_out.append(self.evaluate(self.held_out))
            if self.watch is not None and self.watch.update(history.held_out[-1]):
                self.best = Snapshot.take(*self.parts) if self.keeper is None else KeptState(self.svi)
        event = EpochEnd(self.svi, history.epochs, history.steps, history)
        for callback in self.callbacks:
            try:
                callback(event)
            except StopFit as stop:
                reason = f": {stop}" if str(stop) else ""
                raise _Stop(Status.STOPPED, f"Stopped by a callback after epoch {history.epochs}{reason}.") from stop
        if self.watch is not None and self.watch.exhausted:
            raise _Stop(
                Status.STOPPED_EARLY,
                f"Stopped after epoch {history.epochs}: no progress on the held-out data for "
                f"{self.watch.epochs_without_progress} epochs.",
            )

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take one step and record it; undo it when its loss or a parameter is not finite."""
        history, where = self.history, self.where
        try:
            with nullcontext() if self.guard is None else self.guard.step():
                loss = number(self.svi.step(*args, **kwargs), "step")
                problem = None if math.isfinite(loss) else f"The loss of {where} was {loss}"
                if problem is None and not self.rows.is_cached(args, kwargs) and self.is_spoilt:
                    # Noticed here, not a step later, for the model refuses to be run for its rows.
                    problem, loss = f"A parameter was not finite after {where}", math.nan
                rows = self.rows.count(args, kwargs) if problem is None else 1
        except Exception as error:
            if self.guard is None or not self.guard.was_spoilt:
                undone = "" if self.guard is None else "; the state before that step was restored"
                error.add_note(f"Raised in fit at {where}{undone}.")
                raise
            # Pyro's validation refuses NaN parameters before they give a NaN loss.
            reason = type(error).__name__
            problem, loss, rows = f"The loss of {where} could not be computed ({reason})", math.nan, 1
        # A guide knows its factors only now: under a point the loss is no -L.
        self.loss_name = loss_label_of(self.svi)
        history.loss_label = f"{self.loss_name}, nats {'in total' if self.rows.in_total else 'per row'}"
        history.loss.append(loss / rows)
        history.seconds.append(time.perf_counter() - self.started)
        sleep_loss = sleep_loss_of(self.svi)
        if sleep_loss is not None:
            history.sleep_loss.append(sleep_loss / rows if problem is None else math.nan)
        if problem is not None:
            self.undo(problem)

    @property
    def is_spoilt(self) -> bool:
        """Whether the last step made a parameter NaN or infinite, as far as we watch."""
        return self.guard is not None and self.guard.is_spoilt

    def undo(self, problem: str) -> None:
        """Undo the last step, and end the run if no more steps may be skipped."""
        if self.guard is not None:
            undone = self.guard.undo()
        else:
            restored = "the driver restored the state before"
            undone = restored if self.guards_itself else "nothing was undone (guard=False)"
        if self.skipped == self.max_skipped:
            raise _Stop(Status.NON_FINITE, f"{problem}; {undone}.")
        self.skipped += 1

    def evaluate(self, loader: Iterable[Any]) -> float:
        """Mean loss per row of the held-out batches, with nothing changed."""
        loss, rows = 0.0, 0
        with unchanged(*self.parts), _evaluation_mode(self.parts):
            set_rng_state(self.evaluation_rng)
            for args, kwargs in batches(loader, "held_out"):
                loss += number(self.svi.evaluate_loss(*args, **kwargs), "evaluate_loss")  # type: ignore[attr-defined]
                rows += self.rows.count(args, kwargs)
        return loss / rows

    def show(self, bar: tqdm[Any]) -> None:
        """Write the state of the run beside the progress bar."""
        if bar.disable:
            return
        history = self.history
        self.shown = time.perf_counter()
        fields = {"epoch": f"{min(history.epochs + 1, self.num_epochs)}/{self.num_epochs}"}
        if history.loss:
            fields["loss"] = f"{history.loss[-1]:.5g}"
        if history.held_out:
            fields["held_out"] = f"{history.held_out[-1]:.5g}"
        if history.status is not Status.RUNNING:
            fields["status"] = history.status.value
        bar.set_postfix(fields)


@contextmanager
def _evaluation_mode(parts: tuple[Part, ...]) -> Generator[None, None, None]:
    modules = [child for part in parts if isinstance(part, torch.nn.Module) for child in part.modules()]
    was_training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, was_training, strict=True):
            module.training = mode
