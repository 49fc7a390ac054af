"""Rows grouped by which of their entries are observed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Rows, or columns of matrices, of one batch: K D numbers each stay within a few MB.
_BATCH = 2048
_BITS = 62

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Patterns:
    """The rows of a mask in batches of equally many rows a pattern, so that a batch is one tensor.

    There are at most sqrt(2 N) different numbers of rows, and as many batches, but for those cut to bound the memory.

    Attributes:
        batches: pairs of patterns (G, D), boolean, and the rows (G, n) that have them.
        places: place (N,) of every row in the batches' rows, one after the other.

    Example:
        >>> patterns = Patterns.of(torch.tensor([[True, False], [True, True], [True, False]]))
        >>> [(p.tolist(), r.tolist()) for p, r in patterns.batches]
        [([[True, True]], [[1]]), ([[True, False]], [[0, 2]])]
    """

    batches: tuple[tuple[Tensor, Tensor], ...]
    places: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Patterns:
        """The patterns of a boolean mask (N, D), found once for as long as the mask lives unchanged."""
        known: tuple[int, Patterns] | None = _known.get(mask)
        if known is None or known[0] != mask._version:
            known = mask._version, cls._find(mask)
            _known[mask] = known
        return known[1]

    @classmethod
    def _find(cls, mask: Tensor) -> Patterns:
        _, inverse, counts = torch.unique(_words(mask), dim=0, return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        batches: list[tuple[Tensor, Tensor]] = []
        for count in counts.unique().tolist():
            rows = order[starts[counts == count].unsqueeze(1) + torch.arange(count, device=mask.device)]
            for some in rows.split(_BATCH, 1):
                for part in some.split(max(1, _BATCH // max(some.shape[1], mask.shape[1]))):
                    batches.append((mask[part[:, 0]], part))
        places = torch.empty_like(order)
        places[torch.cat([rows.flatten() for _, rows in batches])] = torch.arange(len(mask), device=mask.device)
        return cls(tuple(batches), places)


def _words(mask: Tensor) -> Tensor:
    """The bits of each row as whole numbers, (N,) or (N, words): they sort faster than booleans."""
    words = []
    for part in mask.split(_BITS, 1):
        words.append((part.long() << torch.arange(part.shape[1], device=mask.device)).sum(1))
    return words[0] if len(words) == 1 else torch.stack(words, 1)
