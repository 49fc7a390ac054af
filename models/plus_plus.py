"""k-means++: rows of the data that lie apart, as means to start from (Arthur and Vassilvitskii, 2007)."""

from __future__ import annotations

import torch
from torch import Tensor


def plus_plus(v: Tensor, num_centers: int, center: str = "component") -> tuple[Tensor, Tensor]:
    """Centers (K, D), distinct rows of v (N, D), and the index (N,) of the nearest center of each row.

    A row is drawn with probability proportional to its squared distance from the nearest center so far.

    Args:
        v: data, shape (N, D).
        num_centers: K.
        center: what a center stands for, in the words of the error.

    Raises:
        ValueError: fewer distinct rows than centers.

    Example:
        >>> centers, nearest = plus_plus(torch.tensor([[0.0], [0.0], [5.0]]), 2)
        >>> sorted(centers.flatten().tolist())
        [0.0, 5.0]
    """
    chosen = [int(torch.randint(len(v), ()))]
    distance = (v - v[chosen[0]]).square().sum(-1)
    nearest = torch.zeros(len(v), dtype=torch.long, device=v.device)
    for number in range(1, num_centers):
        total = distance.cumsum(0)
        if not total[-1] > 0:
            raise ValueError(
                f"Expected at least {num_centers} distinct rows, one per {center}, but got {number}. "
                f"Use fewer {center}s."
            )
        # The first index whose cumulated distance exceeds the draw: rows at distance 0 are never taken.
        draw = torch.rand((), dtype=v.dtype, device=v.device) * total[-1]
        row = min(int(torch.searchsorted(total, draw, right=True)), int(distance.nonzero()[-1]))
        chosen.append(row)
        to_new = (v - v[row]).square().sum(-1)
        nearest = torch.where(to_new < distance, number, nearest)
        distance = torch.minimum(distance, to_new)
    return v[chosen], nearest
