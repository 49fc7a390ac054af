"""Complete data condensed to D + 1 rows with the same count, sum and scatter: all that a Gaussian likelihood reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ext.checks import check_finite, check_rows

_CHUNK_ROWS = 2**13


@torch.no_grad()
def condense(v: Tensor) -> tuple[Tensor, float]:
    r"""Few rows v' and a weight w that stand for v in every function of its count, sum and scatter.

    .. math::
        w \sum_{m=1}^{D+1} \binom{1}{v'_m} \binom{1}{v'_m}^\top = \sum_{n=1}^{N} \binom{1}{v_n} \binom{1}{v_n}^\top,
        \qquad w = \frac{N}{D + 1}

    The log-likelihood of a Gaussian model is such a function, and so is each of its exact EM steps: the steps on v'
    are those on v. With Y the square root of the centred scatter, the rows of H [sqrt(N) e_1, Y] / sqrt(w) have a
    constant first entry when the reflection H (Householder, 1958) takes e_1 to the diagonal of the cube.

    Args:
        v: complete data, shape (N, D), of a floating dtype. Sums are taken in float64.

    Returns:
        v', shape (D + 1, D), of v's dtype, and w; v itself and 1 where N <= D + 1.

    Raises:
        TypeError, ValueError: v is no matrix of finite numbers with at least one row.

    Example:
        >>> v = torch.randn(1000, 3)
        >>> few, weight = condense(v)
        >>> few.shape, weight
        (torch.Size([4, 3]), 250.0)
        >>> torch.allclose(few.mean(0), v.mean(0), atol=1e-6)
        True
    """
    check_rows(v, v.shape[-1] if isinstance(v, Tensor) and v.dim() else 1)
    count, width = v.shape
    size = width + 1
    if count <= size:
        check_finite(v)
        return v, 1.0
    mean, root = _mean_and_root(v)
    rows = root.new_zeros(size, size)
    rows[0, 0] = math.sqrt(count)
    rows[1:, 1:] = root
    normal = root.new_full((size,), -1 / math.sqrt(size))
    normal[0] += 1
    rows = rows - (2 / normal.square().sum()) * torch.outer(normal, normal @ rows)
    weight = count / size
    return (rows[:, 1:] / math.sqrt(weight) + mean).to(v.dtype), weight


def _mean_and_root(v: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,), and Y (D, D) with Y'Y = sum_n (v_n - mean)(v_n - mean)', in float64; any rank will do."""
    first, width = v[0].double(), v.shape[1]
    total = torch.zeros_like(first)
    for part in v.split(_CHUNK_ROWS):
        total += (part.double() - first).sum(0)
    mean = first + total / len(v)
    if not mean.isfinite().all():
        check_finite(v)
    scatter = mean.new_zeros(width, width)
    for part in v.split(_CHUNK_ROWS):
        x = part.double() - mean
        scatter.addmm_(x.mT, x)
    # Columns of very different scale keep their digits: the rounding of each is relative to its own scale.
    scale = scatter.diagonal().sqrt()
    divisor = torch.where(scale > 0, scale, 1)
    values, vectors = torch.linalg.eigh(scatter / divisor / divisor.unsqueeze(-1))
    return mean, values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT * divisor
