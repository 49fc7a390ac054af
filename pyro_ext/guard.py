"""Going back from a step that ended in NaN."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from pyro_ext.snapshot import Part, Snapshot, num_non_finite


class Guard:
    """Keeps the states before the last two steps, to go back to when a loss or a parameter is not finite.

    Two, because a NaN gradient shows only in the loss of the *next* step: the parameters before that
    step are NaN already. The price is one copy of the parameters and of the optimizers' state a step.

    Args:
        parts: the modules and optimizers that steps change (as in `Snapshot.take`).

    Example:
        >>> import pyro, torch
        >>> pyro.clear_param_store()
        >>> w, guard = pyro.param("w", torch.tensor(1.0)), Guard(())
        >>> with guard.step(), torch.no_grad():
        ...     _ = w.fill_(torch.nan)
        >>> guard.undo()
        'the state before that step was restored'
        >>> pyro.param("w").item()
        1.0
    """

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._parts = parts
        self._before: Snapshot | None = None
        self._earlier: Snapshot | None = None

    @contextmanager
    def step(self) -> Generator[None, None, None]:
        """Record the state, then let the block take its step; undo that step when anything is raised in it."""
        self._advance()
        before, is_first = self._recorded, self._earlier is None
        try:
            if is_first:
                # Parameters come into being in the first step and are moved by it.
                with before.watching():
                    yield
            else:
                yield
        except KeyboardInterrupt:
            before.restore()
            raise
        except BaseException:
            before.restore(keep_created=False)
            raise

    @property
    def is_spoilt(self) -> bool:
        """Whether the last step made a parameter NaN or infinite."""
        return num_non_finite() > self._recorded.num_non_finite

    @property
    def was_spoilt(self) -> bool:
        """Whether the step before the last made a parameter NaN or infinite."""
        return self._earlier is not None and self._recorded.num_non_finite > self._earlier.num_non_finite

    def undo(self) -> str:
        """Go back to the state before the last step, or before the one that spoilt it; say which."""
        if self._earlier is None or not self.was_spoilt:
            self._recorded.restore()
            return "the state before that step was restored"
        self._earlier.restore()
        return "its parameters were not finite, and the state before the previous step was restored"

    @property
    def _recorded(self) -> Snapshot:
        if self._before is None:
            raise RuntimeError("Expected a step to undo, but got none taken yet. Take it inside `step()`.")
        return self._before

    def _advance(self) -> None:
        # An interrupt in here must leave `_before` whole: it is replaced only by a finished record.
        spare = self._earlier
        if spare is None:
            spare = Snapshot.take(*self._parts)
        else:
            spare.retake()
        self._earlier, self._before = self._before, spare
