"""Least squares from sums over the data, where these may leave some directions open."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(gram: Tensor, cross: Tensor, old: Tensor) -> Tensor:
    """Solve gram X = cross for X (..., H, D); in the null space of gram (..., H, H), X equals `old`.

    Rows and columns are scaled to a unit diagonal first: a unit that is on once in a million rows is as well
    determined as any other, and must not be taken for one that is never on.

    Example:
        >>> gram, cross = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[6.0], [0.0]])
        >>> least_squares(gram, cross, old=torch.tensor([[1.0], [1.0]])).flatten()
        tensor([3., 1.])
    """
    dtype, precision = gram.dtype, torch.finfo(gram.dtype).eps
    used = gram.diagonal(dim1=-2, dim2=-1) > torch.finfo(dtype).tiny
    # The sums carry the rounding of their dtype: directions below it are noise, and the solution there would be huge.
    gram, cross, old = gram.double(), cross.double(), old.double()
    scale = torch.where(used, gram.diagonal(dim1=-2, dim2=-1), 1).rsqrt().unsqueeze(-1)
    values, vectors = torch.linalg.eigh(scale * gram * scale.mT)
    values = values.unsqueeze(-1)
    determined = values > 64 * values.shape[-2] * precision * values[..., -1:, :].clamp(min=0)
    inverse = torch.where(determined, 1 / torch.where(determined, values, 1), 0)
    solution = vectors @ (inverse * (vectors.mT @ (scale * cross)))
    kept = vectors @ (~determined * (vectors.mT @ (old / scale)))
    return (scale * (solution + kept)).to(dtype)
