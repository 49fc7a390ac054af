"""A whole EM run: the loop, its ledger, how it ends, and restarts."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from pyro_ext.evaluators import Parameters
from pyro_ext.fit import EpochEnd, StopFit
from pyro_ext.history import History, LedgerEntry, Status
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.restarts import draw_new_start
from pyro_ext.restoring import KeptState
from pyro_ext.run_keeper import RunKeeper, Starts
from pyro_ext.snapshot import Snapshot, modules_of, num_non_finite
from pyro_ext.steps import Call, EResult

if TYPE_CHECKING:
    from pyro_ext.checkpoint import Checkpoint
    from pyro_ext.em import EM

WINDOW = 20
"""Steps of each of the two windows whose means are compared where L may fall by chance."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative fall of L that is rounding, not descent."""


class Run:
    """The state of one call of `EM.run`.

    Args:
        em: the driver.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        max_steps: most EM steps of one start.
        tolerance: nats per row.
        progress: show a progress bar.
        callbacks: called after each step with an `EpochEnd`.
    """

    def __init__(
        self,
        em: EM,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        max_steps: int,
        tolerance: float,
        progress: bool,
        callbacks: Sequence[Callable[[EpochEnd], Any]],
    ) -> None:
        self.em = em
        self.args, self.kwargs = args, kwargs
        self.max_steps, self.tolerance = max_steps, tolerance
        self.progress = progress
        self.callbacks = tuple(callbacks)
        self.call: Call = em.call(*args, **kwargs)
        self.parts = (*modules_of(em.model, em.guide), *em.parts)
        self.is_under_way = False
        self.keeper: RunKeeper | None = None

    def best_of(self, num_restarts: int, checkpoint: Checkpoint | None = None, seed: int | None = None) -> History:
        """Run from every start, and leave the state of the best one in force.

        Args:
            num_restarts: number of starts.
            checkpoint: where to keep the run, and to go on from.
            seed: what the generators were seeded with, which a checkpoint compares.
        """
        begins = True
        if checkpoint is not None:
            self.keeper = RunKeeper(self, checkpoint, num_restarts, seed)
            ended, begins = self.keeper.resume()
            if ended is not None:
                return ended
        first: Snapshot | KeptState = Snapshot.take(*self.parts)
        answered = getattr(self.em.guide, "holds_answer", False)
        if self.keeper is not None and num_restarts > 1:
            first, answered = self.keeper.first(answered)
        try:
            if begins and getattr(self.em.model, "is_untouched", False):
                draw_new_start(self.em.model, self.em.guide, self.args, self.kwargs)
            history = self.once("") if num_restarts == 1 else self._best_of(num_restarts, first, answered)
            if self.keeper is not None and history.status is not Status.INTERRUPTED:
                self.keeper.write(history)
            return history
        except Exception:
            if num_restarts > 1 or not self.is_under_way:
                self._go_back(first, answered)
            raise

    def _go_back(self, first: Snapshot | KeptState, answered: bool) -> None:
        first.restore()
        if self.em.guide.is_table:
            self.em.guide.holds_answer = answered

    def _best_of(self, num_restarts: int, first: Snapshot | KeptState, answered: bool) -> History:
        starts = Starts() if self.keeper is None else self.keeper.starts
        for number in range(len(starts.bounds), num_restarts):
            if number and not (self.keeper is not None and self.keeper.is_within):
                self._go_back(first, answered)
                draw_new_start(self.em.model, self.em.guide, self.args, self.kwargs)
            history = self.once(f"start {number + 1}/{num_restarts} ")
            bound = history.ledger[-1].bound_per_row if history.ledger else -math.inf
            starts.bounds.append(bound)
            if starts.best is None or bound > starts.best[0]:
                kept = Snapshot.take(*self.parts) if self.keeper is None else KeptState(self.em)
                starts.best = (bound, history, kept)
            if history.status in (Status.STOPPED, Status.INTERRUPTED):
                break
        if starts.best is None:
            raise RuntimeError("Expected at least one start, but none was run. Ask for num_restarts of at least 1.")
        bound, history, state = starts.best
        state.restore()
        self.call.theta_changed()
        history.restarts = starts.bounds
        history.message += f" Best of {len(starts.bounds)} starts, the one numbered {starts.bounds.index(bound) + 1}."
        return history

    def once(self, title: str) -> History:
        """Run from the present state, or go on within a start that a checkpoint was written in."""
        unit = "nats per row" if self.call.program.rows.names else "nats in total"
        self.history = History(loss_label=f"{self.em.loss_label}, {unit}")
        self.started = time.perf_counter()
        self.done = 0
        self.call.theta_changed()
        if self.keeper is not None and self.keeper.is_within:
            self.keeper.enter()
        elif self.em.m_step is not None:
            self.em.m_step.reset()
        guide = self.em.guide
        self.call.defers = bool(guide.is_table and not self.callbacks and not self.call.program.draws_rows)
        tables = [guide.table(block) for block in guide.blocks] if self.call.defers else []
        self.before = Snapshot.take(*self.parts, settled=tables)
        self.kept: Parameters | None = None
        with tqdm(
            total=self.max_steps, initial=self.done, disable=not self.progress, unit="step", desc=f"EM {title}".strip()
        ) as bar:
            try:
                status, message = self._steps(bar)
            except KeyboardInterrupt:
                self._restore()
                status, message = Status.INTERRUPTED, f"Interrupted; the state after step {self.done} is kept."
            except Exception:
                self._restore()
                raise
            finally:
                self.call.flush()
                self.call.defers = False
        self.history.status, self.history.message = status, message
        return self.history

    def _steps(self, bar: tqdm[Any]) -> tuple[Status, str]:
        history = self.history
        for step in range(self.done + 1, self.max_steps + 1):
            if step > 1 and self.call.program.draws_rows:
                self.call = self.em.call(*self.args, **self.kwargs)
            result = self.em.e_half(self.call)
            total = float(result.bound.sum())
            if not math.isfinite(total):
                return self._non_finite(f"L was {total} after the E half of step {step}")
            fell = self._fell(total, result)
            self._note(step, "E", total, result)
            history.loss.append(-total / result.bound.numel())
            history.seconds.append(time.perf_counter() - self.started)
            history.epoch_ends.append(step)
            bar.update()
            bar.set_postfix({"L per row": f"{-history.loss[-1]:.6g}"})
            if fell is not None:
                return Status.DECREASED, fell
            settled = self._settled(result, step)
            if settled is not None:
                return Status.CONVERGED, settled
            problem = self._m_half(step, result)
            if problem is not None:
                return problem
            self.done, self.is_under_way = step, True
            self.before.retake()
            self.kept = self.call.pending
            event = EpochEnd(self.em, step, step, history)
            for callback in self.callbacks:
                try:
                    callback(event)
                except StopFit as stop:
                    return Status.STOPPED, f"Stopped by a callback after step {step}: {stop}".rstrip(": ") + "."
            if self.keeper is not None:
                self.keeper.step_ended()
        return Status.MAX_STEPS, f"All {self.max_steps} steps were run; L may still be rising."

    def _m_half(self, step: int, result: EResult) -> tuple[Status, str] | None:
        """Take the M half-step and note L after it, where that costs no more than the next E half-step needs."""
        if self.em.m_step is None:
            return None
        try:
            self.em.m_half(self.call, result)
            params = self.call.parameters(result) if self.em.guide.is_static else None
            bound, exact = self.call.bound(result.posterior, params, num_particles=1)
        except ValueError as error:
            if not isinstance(error, NotFiniteError) and num_non_finite() <= self.before.num_non_finite:
                raise
            return self._non_finite(f"The M half of step {step} went too far ({error})")
        total = float(bound.sum())
        if not math.isfinite(total):
            return self._non_finite(f"L was {total} after the M half of step {step}")
        after = EResult(bound, exact, result.start, result.posterior, monotone=self.em.m_step.monotone and result.exact)
        fell = self._fell(total, after)
        self._note(step, "M", total, after)
        return None if fell is None else (Status.DECREASED, fell)

    def _restore(self) -> None:
        """Go back to the state after the last whole step."""
        self.before.restore()
        self.call.pending = self.kept
        self.call.theta_changed()

    def _non_finite(self, what: str) -> tuple[Status, str]:
        self._restore()
        return Status.NON_FINITE, f"{what}; the state after step {self.done} is restored."

    def _note(self, step: int, half: Literal["E", "M"], total: float, result: EResult) -> None:
        theta = step - 1 if half == "E" else step
        start: Any = result.start
        self.history.ledger.append(
            LedgerEntry(
                step=step,
                half=half,
                bound=total,
                parameters=f"theta {theta}, q {step}",
                start=start,
                batch="full" if self.call.scale == 1 else "batch",
                exact=result.exact,
                rows=result.bound.numel(),
            )
        )

    def _promised(self, result: EResult) -> bool:
        return result.monotone and result.exact and self.call.scale == 1

    def _fell(self, total: float, result: EResult) -> str | None:
        """Say how L fell, where the half-step promises that it does not."""
        ledger = self.history.ledger
        if not ledger or not ledger[-1].exact or not self._promised(result):
            return None
        before = ledger[-1].bound
        fall = before - total
        if fall <= ROUNDING.get(result.bound.dtype, 1e-5) * max(1.0, abs(before)):
            return None
        half = "E" if ledger[-1].half == "M" else "M"
        return (
            f"L fell by {fall / result.bound.numel():.3g} nats per row in the {half} half after step "
            f"{ledger[-1].step}{ledger[-1].half}, though that half-step promises not to lower it."
        )

    def _settled(self, result: EResult, step: int) -> str | None:
        """Say how L settled, or None."""
        losses = self.history.loss
        if self.em.m_step is None and result.exact and step > 1 and losses[-1] == losses[-2]:
            return f"L does not change any more after {step} steps."
        if self._promised(result) and (self.em.m_step is None or self.em.m_step.monotone):
            if step > 1 and abs(losses[-2] - losses[-1]) <= self.tolerance:
                return f"L settled within {self.tolerance:g} nats per row after {step} steps."
            return None
        if step < 2 * WINDOW or self.tolerance == 0:
            return None
        # Noise or unpromised falls: compare the means of two windows against their standard error. The noise is read
        # off successive differences, for a trend would count as noise in the windows' own variance.
        recent = losses[-2 * WINDOW :]
        gain = statistics.fmean(recent[:WINDOW]) - statistics.fmean(recent[WINDOW:])
        noise = statistics.fmean((b - a) ** 2 for a, b in itertools.pairwise(recent)) / 2
        error = math.sqrt(2 * noise / WINDOW)
        # Both per step. Noise that could hide a rise above the tolerance is no convergence.
        gain, error = gain / WINDOW, error / WINDOW
        if abs(gain) + 2 * error > self.tolerance:
            return None
        return (
            f"L settled after {step} steps: over the last {2 * WINDOW} it rose by {gain:+.2g} +- {error:.2g} nats "
            f"per row and step (two standard errors within the tolerance of {self.tolerance:g})."
        )
