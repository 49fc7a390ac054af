"""Where the sweeps of a fixed-point E-step start, and which end is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_ext.evaluators import Parameters


class Start(ABC):
    """Where the sweeps of an E-step start."""

    label: str
    monotone: bool

    @abstractmethod
    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The starts to try; the better end is kept, row by row."""


class Cold(Start):
    """From the prior, every time; L may fall from one E-step to the next."""

    label, monotone = "cold", False

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The cold start."""
        return [cold]


class Warm(Start):
    """From the last answer, where there is one."""

    label, monotone = "warm", True

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The warm start."""
        return [cold if warm is None else warm]


class Better(Start):
    """From both the prior and the last answer; each row keeps the end with the higher L."""

    label, monotone = "better", True

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """Both starts."""
        return [cold] if warm is None else [warm, cold]


def better(params: Parameters, bound: Tensor, other: Parameters, other_bound: Tensor) -> tuple[Parameters, Tensor]:
    """Of two sets of parameters, row by row the one with the higher L."""
    higher = other_bound > bound
    chosen = {name: torch.where(higher[:, None, None], other[name], params[name]) for name in params}
    return chosen, torch.where(higher, other_bound, bound)
