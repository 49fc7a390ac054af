"""When the sweeps of a fixed-point E-step have converged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Criterion(ABC):
    """When the sweeps have converged (19.4.1 names two ways).

    Attributes:
        reads_bound: it looks at L, which costs a pass over all rows after every sweep.
        reads_means: it looks at the means.
    """

    reads_bound: ClassVar[bool] = True
    reads_means: ClassVar[bool] = True

    @abstractmethod
    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Whether one more sweep changed little: (before, after) of L ``(R,)`` and of the means ``(R, F)``."""


@dataclass(frozen=True)
class BoundChange(Criterion):
    """A full sweep improves L by no more than a tolerance.

    Args:
        tolerance: nats per row, mean over the rows.
    """

    tolerance: float = 1e-6
    reads_means: ClassVar[bool] = False

    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Compare L before and after the sweep."""
        return bool((bound[1] - bound[0]).abs().mean() <= self.tolerance)


@dataclass(frozen=True)
class MeanChange(Criterion):
    """A full sweep changes no mean by more than a tolerance.

    Args:
        tolerance: largest change of any entry of E_q[h] (a probability for discrete latents).
    """

    tolerance: float = 1e-4
    reads_bound: ClassVar[bool] = False

    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Compare the means before and after the sweep."""
        return bool(torch.linalg.vector_norm(means[1] - means[0], float("inf")) <= self.tolerance)
