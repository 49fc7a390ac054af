"""The record of a run: losses, held-out losses, the ledger of half-steps, and how it ended."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Status(StrEnum):
    """How a run ended. Members equal their values: ``history.status == "converged"``."""

    RUNNING = "running"
    """It has not ended yet (seen by callbacks)."""
    CONVERGED = "converged"
    """L settled within the tolerance, where the step promises that this means something."""
    MAX_STEPS = "max_steps"
    """All the steps or epochs that were asked for were run; nothing is claimed about convergence."""
    NON_FINITE = "non_finite"
    """A loss or parameter was NaN or infinite; the state before was restored."""
    DECREASED = "decreased"
    """L fell where the step promises that it does not."""
    STOPPED_EARLY = "stopped_early"
    """The held-out loss had stopped falling."""
    STOPPED = "stopped"
    """A callback raised `StopFit`."""
    INTERRUPTED = "interrupted"
    """The user interrupted it (KeyboardInterrupt)."""


@dataclass(frozen=True)
class LedgerEntry:
    """L after one half-step of an EM run, and what that number is.

    Attributes:
        step: number of the EM step, from 1.
        half: the half that was just taken: ``"E"`` (q changed) or ``"M"`` (theta changed).
        bound: L in nats, summed over the rows.
        parameters: the theta and q that the bound belongs to, such as ``"theta 3, q 4"``.
        start: where the E half-step started: ``"cold"``, ``"warm"`` or ``"better"`` (of both, per row).
        batch: whether the rows are the full data or one batch of them.
        exact: whether the bound is exact, not a Monte-Carlo estimate.
        rows: number of rows that the bound is summed over.
    """

    step: int
    half: Literal["E", "M"]
    bound: float
    parameters: str
    start: Literal["cold", "warm", "better"]
    batch: Literal["full", "batch"]
    exact: bool
    rows: int

    @property
    def bound_per_row(self) -> float:
        """L in nats per row."""
        return self.bound / self.rows


@dataclass(repr=False)
class History:
    """Record of a run of `fit` or `EM.run`.

    Attributes:
        loss: one number per step, nats per row (see ``loss_label``), as the driver's ``step`` returns it;
            that of `pyro.infer.SVI` belongs to the parameters *before* the step's update. A step that
            was undone keeps its (NaN or infinite) entry.
        held_out: mean held-out loss after each epoch, nats per row; empty without held-out data.
        sleep_loss: one number per step of an objective with a sleep phase (`WakeSleep`): the mean of
            -log q over the step's dreams, nats per row, NaN where there were none; else empty.
        seconds: time from the start of the run to the end of each step.
        epoch_ends: number of steps taken by the end of each finished epoch.
        ledger: L after each half-step (EM runs only).
        status: how the run ended.
        message: one sentence on that: what happened, at which step, and which state is in force now.
        loss_label: what ``loss`` and ``held_out`` are, with their unit.
        restarts: L at the end of every start of a run with restarts, nats per row.

    Example:
        >>> history = History(loss=[3.0, 2.0, 1.5, 1.2], held_out=[2.1, 2.4], epoch_ends=[2, 4], seconds=[1, 2, 3, 4])
        >>> history.best_epoch, history.best_held_out, history.epochs
        (1, 2.1, 2)
        >>> history
        History(running: 4 steps, 2 epochs, 4.0 s; -L, nats per row: 3 -> 1.2; held-out: best 2.1 after epoch 1)
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    sleep_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)
    status: Status = Status.RUNNING
    message: str = ""
    loss_label: str = "-L, nats per row"
    restarts: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.loss)

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return len(self.epoch_ends)

    @property
    def bound_label(self) -> str:
        """What the ledger's bounds are: the loss label without its minus sign."""
        return self.loss_label.removeprefix("-")

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) with the lowest finite held-out loss, the first of equals; None without one."""
        finite = [(value, epoch) for epoch, value in enumerate(self.held_out, 1) if math.isfinite(value)]
        return min(finite)[1] if finite else None

    @property
    def best_held_out(self) -> float | None:
        """The lowest finite held-out loss, nats per row; None without one."""
        return None if self.best_epoch is None else self.held_out[self.best_epoch - 1]

    @property
    def records(self) -> list[dict[str, Any]]:
        """One dictionary per step, for ``pandas.DataFrame(history.records)``.

        Keys: ``step`` and ``epoch`` (from 1), ``seconds``, ``loss``, ``sleep_loss``, and ``held_out``, which is
        None except at the last step of an epoch. What was not recorded is None.
        """
        held_out = dict(zip(self.epoch_ends, self.held_out, strict=False))
        ends = set(self.epoch_ends)
        rows: list[dict[str, Any]] = []
        epoch = 1
        for step, loss in enumerate(self.loss, 1):
            rows.append(
                {
                    "step": step,
                    "epoch": epoch,
                    "seconds": self.seconds[step - 1] if step <= len(self.seconds) else None,
                    "loss": loss,
                    "sleep_loss": self.sleep_loss[step - 1] if step <= len(self.sleep_loss) else None,
                    "held_out": held_out.get(step),
                }
            )
            epoch += step in ends
        return rows

    @property
    def ledger_records(self) -> list[dict[str, Any]]:
        """One dictionary per half-step: the fields of `LedgerEntry` and ``bound_per_row``."""
        return [dataclasses.asdict(e) | {"bound_per_row": e.bound_per_row} for e in self.ledger]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the run: L after each half-step when there is a ledger, else loss and held-out loss by step.

        Args:
            ax: axes to draw on; None for a new figure.
        """
        # Drawing is optional: importing the package must not import Matplotlib.
        from pyro_ext import plots

        if self.ledger:
            return plots.plot_ledger(self.ledger, ax=ax, label=self.bound_label)
        return plots.plot_history(self, ax=ax)

    def summary(self) -> str:
        """The run in one line, then its message."""
        counts = [f"{self.steps} steps"]
        if self.epochs:
            counts.append(f"{self.epochs} epochs")
        if self.seconds:
            counts.append(f"{self.seconds[-1]:.1f} s")
        parts = [f"{self.status}: " + ", ".join(counts)]
        if self.loss:
            parts.append(f"{self.loss_label}: {self.loss[0]:.6g} -> {self.loss[-1]:.6g}")
        if self.ledger:
            first, last = self.ledger[0].bound_per_row, self.ledger[-1].bound_per_row
            parts.append(f"ledger of {len(self.ledger)} half-steps: {first:.6g} -> {last:.6g}")
        if self.best_epoch is not None:
            parts.append(f"held-out: best {self.best_held_out:.6g} after epoch {self.best_epoch}")
        line = "; ".join(parts)
        return f"{line}\n{self.message}" if self.message else line

    def __repr__(self) -> str:
        return f"History({self.summary().splitlines()[0]})"
