"""Sequential sweeps over binary units that all rows couple alike: (19.44) for all rows at once, unit by unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitSweeps:
    """c + b'h + h'Jh / 2 over H binary units, laid out with the units as rows of memory.

    Attributes:
        field: b + diag(J) / 2, shape ``(H, R)``.
        coupling: J with a diagonal of zeros, shape ``(H, H)``.
    """

    field: Tensor
    coupling: Tensor

    @classmethod
    def of(cls, linear: Tensor, coupling: Tensor) -> UnitSweeps:
        """From b ``(R, H)`` and a symmetric J ``(H, H)``."""
        diagonal = coupling.diagonal()
        field = torch.add(linear.mT, 0.5 * diagonal[:, None]).contiguous()
        return cls(field, coupling - diagonal.diag())

    def sweep(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Set every unit's logit in turn to its field, given the newest means of the others (19.44).

        Args:
            logits: shape ``(R, H)``, in any order in memory.

        Returns:
            New logits and means ``(R, H)``, with the units as rows of memory: the next sweep need not reorder them.
        """
        limit = -math.log(torch.finfo(logits.dtype).eps)
        new = torch.empty_like(self.field).copy_(logits.mT)
        means = new.clamp(-limit, limit).sigmoid_()
        for unit, (row, mean, weights) in enumerate(zip(new.unbind(), means.unbind(), self.coupling, strict=True)):
            torch.addmv(self.field[unit], means.mT, weights, out=row)
            torch.sigmoid(row.clamp_(-limit, limit), out=mean)
        return new.mT, means.mT

    def bound(self, logits: Tensor) -> Tensor:
        """b'm + m'Jm / 2 + diag(J)'(m - m^2) / 2 + H(q) per row, shape ``(R,)``: L without c.

        Args:
            logits: shape ``(R, H)``, limited as `sweep` leaves them.
        """
        flat = logits.mT
        means = flat.sigmoid()
        size = flat.abs()
        entropy = torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)
        return (means * (self.field + 0.5 * (self.coupling @ means)) + entropy).sum(0)
