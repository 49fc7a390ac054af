"""Missing entries of real data: sums of their own for every visible column, over the rows where it is observed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def observed_entries(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with 0 for the entries that the mask hides, whatever stands there."""
    return x if mask is None else torch.where(mask, x, 0)


def column_moments(h: Any, like: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The moments of h that the regression of a visible column on h needs.

    Args:
        h: the marginal of h, K features (`pyro_ext.Marginal`).
        like: the data, shape (N, D).
        mask: boolean (N, D); None when all entries are observed.

    Returns:
        ``observed``, the number of entries; ``sum``, sum_n E[h_n]; ``gram``, sum_n E[h_n h_n^T]. With a mask they have
        a leading dimension D, one sum a column; without one all columns share them: (), (K,) and (K, K).
    """
    if mask is None:
        return {"observed": like.new_tensor(like.shape[0]), "sum": h.sum(), "gram": h.gram()}
    weights = mask.to(like.dtype)
    return {"observed": weights.sum(0), "sum": h.cross(weights).mT, "gram": h.grams(weights)}


def column_mean_and_variance(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), variance (D,) and number, (D,) or (), of the observed entries of each column.

    Raises:
        ValueError: a column that no row observes.
    """
    if mask is None:
        mean = v.mean(0)
        return mean, (v - mean).square().mean(0), v.new_tensor(v.shape[0])
    observed = mask.to(v.dtype).sum(0)
    if not (observed > 0).all():
        raise ValueError(
            "Expected every column of v to be observed in some row, but got none in column "
            f"{int((observed == 0).nonzero()[0])}. Leave the column out."
        )
    mean = observed_entries(v, mask).sum(0) / observed
    return mean, observed_entries(v - mean, mask).square().sum(0) / observed, observed
