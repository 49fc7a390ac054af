"""The record of a run: losses, held-out losses, the ledger of half-steps, and how it ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class HealthEntry:
    """How well q served the model at one look; see `Health`.

    Attributes:
        step: number of steps taken by then.
        num_samples: S, samples of q per row.
        effective_sample_size: median over the rows, from 1 to S.
        share_below_two: share of the rows whose effective sample size is below 2.
        log_q_on_data: mean of log q(h | v) under the posterior of the data, by weights, nats per row.
        log_q_on_dreams: mean of log q(h' | v') of dreams, nats per dream; None where q cannot read dreams.
        entropy: of q, nats per row.
        units: number of units of each latent.
        dead_units: how many of them v hardly moves.
    """

    step: int
    num_samples: int
    effective_sample_size: float
    share_below_two: float
    log_q_on_data: float
    log_q_on_dreams: float | None
    entropy: float
    units: dict[str, int]
    dead_units: dict[str, int]

    @property
    def hints(self) -> list[str]:
        """What looks wrong, in words, and what may help; empty if nothing does."""
        hints: list[str] = []
        if self.share_below_two > 0.5:
            hints.append(
                f"{self.share_below_two:.0%} of the rows rest on fewer than 2 of {self.num_samples} samples: q is far "
                "from the posterior. Use more particles, a richer guide, or a wake phase for it (insomnia above 0)."
            )
        gap = None if self.log_q_on_dreams is None else self.log_q_on_dreams - self.log_q_on_data
        if gap is not None and gap > max(1.0, 0.1 * abs(self.log_q_on_data)):
            hints.append(
                f"log q is {gap:.3g} nats higher on dreams than on data: the dreams do not resemble the data. Raise "
                "insomnia, learn the model longer before sleeping, or give it more capacity."
            )
        for name, count in self.units.items():
            dead = self.dead_units[name]
            if dead > 0.1 * count:
                hints.append(
                    f"{dead} of the {count} units of {name!r} hardly vary with v. Use fewer units or another start, or "
                    "give the KL term, where there is one, a small weight at first."
                )
        if all(math.isfinite(x) for x in (self.entropy, self.log_q_on_data)):
            return hints
        return [*hints, "log q is not finite: q leaves out what the model allows. Look at the guide's parameters."]


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
        health: what `Health` noted, in its order.

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
    health: list[HealthEntry] = field(default_factory=list)

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
    def hints(self) -> list[str]:
        """What looked wrong at the last look of `Health`, in words; empty if nothing did, or nobody looked."""
        return self.health[-1].hints if self.health else []

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

    def plot_health(self, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
        """Draw what `Health` noted: effective sample size, log q on data and dreams, entropy, dead units.

        Args:
            axes: four axes to draw on; None for a new figure.
        """
        from pyro_ext import health_plot

        return health_plot.plot_health(self.health, axes)

    def summary(self) -> str:
        """The run in one line, then its message and what `Health` has to say."""
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
        return "\n".join(["; ".join(parts), *([self.message] if self.message else []), *self.hints])

    def __repr__(self) -> str:
        return f"History({self.summary().splitlines()[0]})"
