"""Early stopping: when the held-out loss has stopped falling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStopping:
    """Stop a fit when its held-out loss has not fallen for some epochs, and go back to the best state.

    The state restored is that after the epoch with the lowest held-out loss. An epoch counts as progress
    when its held-out loss lies more than ``min_delta`` below that of the last epoch that did.

    Args:
        patience: number of epochs in a row without progress after which the fit stops, at least 1.
        min_delta: least fall that counts as progress, nats per row (in total, for a program of one row).

    Raises:
        ValueError: patience below 1, or min_delta negative or not finite.

    Example:
        >>> watch = EarlyStopping(patience=2).start()
        >>> [(watch.update(loss), watch.exhausted) for loss in (3.0, 2.0, 2.5, 2.1)]
        [(True, False), (True, False), (False, False), (False, True)]
    """

    patience: int = 5
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(
                f"Expected patience to be a whole number of epochs, at least 1, but got {self.patience!r}. "
                "Pass patience=1 to stop at the first epoch without progress."
            )
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(
                f"Expected min_delta >= 0, in nats per row, but got {self.min_delta!r}. "
                "Pass min_delta=0.0 to count every fall as progress."
            )

    def start(self) -> HeldOutWatch:
        """A fresh watch over one fit."""
        return HeldOutWatch(self)


class HeldOutWatch:
    """Watches the held-out losses of one fit.

    Attributes:
        epochs_without_progress: number of epochs since the last that counted as progress.
    """

    def __init__(self, rule: EarlyStopping) -> None:
        self.rule = rule
        self.epochs_without_progress = 0
        self._lowest = math.inf
        self._reference = math.inf

    def update(self, held_out: float) -> bool:
        """Take in the held-out loss of an epoch; True when it is the lowest so far (NaN never is)."""
        if held_out < self._reference - self.rule.min_delta:
            self._reference = held_out
            self.epochs_without_progress = 0
        else:
            self.epochs_without_progress += 1
        is_lowest = held_out < self._lowest
        if is_lowest:
            self._lowest = held_out
        return is_lowest

    @property
    def exhausted(self) -> bool:
        """Whether the patience is used up."""
        return self.epochs_without_progress >= self.rule.patience

    @property
    def state(self) -> dict[str, float]:
        """What has been seen so far, for a checkpoint."""
        return {"waited": self.epochs_without_progress, "lowest": self._lowest, "reference": self._reference}

    def resume(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.epochs_without_progress = int(state["waited"])
        self._lowest, self._reference = state["lowest"], state["reference"]
