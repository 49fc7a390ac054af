"""Matrix products over very many rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_ext.tracing import is_tracing

CHUNK_BYTES = 2**20
"""Memory of one chunk of rows, which is to stay in the cache with one or two like it."""

# Long enough for the library's fast kernels, short enough that sums within it lose no digits.
_ROWS = 1024


def row_chunks(value: Tensor) -> Iterator[slice]:
    """Slices of rows small enough for the cache: passes over whole tables wait for memory, and fault in new pages.

    One slice while tracing, for compiled loops are fused.

    Example:
        >>> import torch
        >>> len(list(row_chunks(torch.empty(100_000, 16))))
        7
    """
    rows = value.shape[0]
    width = max(1, value[:1].numel() * value.element_size())
    step = rows if is_tracing() else max(1, CHUNK_BYTES // width)
    return (slice(start, start + step) for start in range(0, rows, max(1, step)))


def weighted_moments(weights: Tensor, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n w_nk x_n and sum_n w_nk x_n^2 with x = v - shift, each (K, D), in one pass over the rows.

    Args:
        weights: shape (N, K).
        v: shape (N, D).
        shift: shape (D,).
    """
    first = weights.new_zeros(weights.shape[1], v.shape[1])
    second = first.clone()
    for rows in row_chunks(v):
        x, w = v[rows] - shift, weights[rows]
        first += tall_product(w, x)
        # In the same memory, unless a gradient will ask for x.
        second += tall_product(w, x.square() if torch.is_grad_enabled() else x.square_())
    return first, second


def tall_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a of shape (N, K) and b of shape (N, D) with N far above K and D, as (K, D).

    Rows are multiplied in groups and the groups added up: matrix libraries treat a long inner dimension as a sequential
    one, in double precision several times slower, and add it up with less accuracy.

    Example:
        >>> import torch
        >>> tall_product(torch.ones(5000, 1), torch.ones(5000, 2))
        tensor([[5000., 5000.]])
    """
    whole = len(a) // _ROWS * _ROWS
    if not whole:
        return a.mT @ b
    groups = whole // _ROWS
    total = (a[:whole].view(groups, _ROWS, -1).mT @ b[:whole].view(groups, _ROWS, -1)).sum(0)
    return total if whole == len(a) else total + a[whole:].mT @ b[whole:]
