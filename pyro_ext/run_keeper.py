"""The checkpoint of a whole EM run: its steps, its starts, and the way back into them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_ext.checkpoint import Checkpoint, Keeper, data_mark, driver_settings
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.history import History, Status
from pyro_ext.plain_data import from_plain, to_plain
from pyro_ext.restoring import KeptState
from pyro_ext.snapshot import Snapshot

if TYPE_CHECKING:
    from pyro_ext.run import Run


@dataclass
class Starts:
    """What came of the starts that have ended.

    Attributes:
        bounds: the last L of each, nats per row.
        best: the highest of these, its history and its state.
    """

    bounds: list[float] = field(default_factory=list)
    best: tuple[float, History, Snapshot | KeptState] | None = None


class RunKeeper:
    """Keeps an `EM.run` in a file.

    Args:
        run: the run, whose call exists already.
        checkpoint: where and how often.
        num_restarts: number of starts.
        seed: what the generators were seeded with.

    Attributes:
        starts: the starts that have ended.
        is_within: whether the next start is one that the file was written in.
    """

    def __init__(self, run: Run, checkpoint: Checkpoint, num_restarts: int, seed: int | None) -> None:
        self.run = run
        settings = {
            "loop": "EM.run",
            **driver_settings(run.em),
            "data": data_mark(run.args, run.kwargs),
            "tolerance": run.tolerance,
            "num_restarts": num_restarts,
            "seed": seed,
            # A start that ended for want of steps would have gone on.
            "max_steps": run.max_steps if num_restarts > 1 else None,
        }
        self.keeper = Keeper(checkpoint, run.em, settings, ())
        self.starts = Starts()
        self.is_within = False
        self._first: KeptState | None = None
        self._answered = False
        self._kept: dict[str, Any] = {}

    def resume(self) -> tuple[History | None, bool]:
        """Go back to where the file was written.

        Returns:
            The history of a run that had ended, else None; and whether the run begins, for there is no file.

        Raises:
            CheckpointError: the file does not fit, or has more steps than are asked for.
        """
        run, kept = self.run, self.keeper.read()
        if kept is None:
            return None, True
        history: History = kept["history"]
        if history.steps > run.max_steps:
            raise CheckpointError(
                f"Expected max_steps of at least {history.steps}, the steps in {self.keeper.where}, but got "
                f"{run.max_steps}. Take another path to start anew."
            )
        self.keeper.put_back()
        run.is_under_way = True
        goes_on = history.status is Status.RUNNING
        if history.status is Status.MAX_STEPS and history.steps < run.max_steps:
            goes_on, history.status, history.message = True, Status.RUNNING, ""
        if not goes_on:
            return history, False
        self._kept, self.is_within = kept, True
        if kept["best"] is not None:
            best = kept["best"]
            self.starts.best = best["bound"], from_plain(best["history"]), KeptState(run.em, best["state"])
        self.starts.bounds = list(kept["bounds"])
        if kept["first"] is not None:
            self._first, self._answered = KeptState(run.em, kept["first"]), kept["answered"]
        return None, False

    def first(self, answered: bool) -> tuple[KeptState, bool]:
        """The state that every start goes back to, and whether the table held an answer in it."""
        if self._first is None:
            self._first, self._answered = KeptState(self.run.em), answered
        return self._first, self._answered

    def enter(self) -> None:
        """Go on within the start that the file was written in."""
        run, kept = self.run, self._kept
        run.history, run.done = kept["history"], kept["done"]
        run.started = time.perf_counter() - kept["elapsed"]
        self.is_within, self._kept = False, {}

    def step_ended(self) -> None:
        """Write the file if it is due."""
        run = self.run
        if run.done < run.max_steps and self.keeper.is_due(run.done):
            run.call.flush()
            self.write(run.history)

    def write(self, history: History) -> None:
        """Write the present state, and the record of the present or the best start."""
        run, best = self.run, self.starts.best
        running = history.status is Status.RUNNING
        progress = {
            "done": run.done,
            "elapsed": time.perf_counter() - run.started,
            "bounds": list(self.starts.bounds),
            "first": self._first.state if running and self._first is not None else None,
            "answered": self._answered,
            "best": None,
        }
        if running and best is not None and isinstance(best[2], KeptState):
            progress["best"] = {
                "bound": best[0],
                "history": to_plain(best[1], "the history"),
                "state": best[2].state,
            }
        self.keeper.write(history, progress)
