"""Variational bounds and fixed points written out by hand, as the book's chapter 19 gives them.

Letters: N rows, D visible variables, H binary latent units, S states. Everything is in nats per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def sparse_coding_bound(v: Tensor, means: Tensor, W: Tensor, b: Tensor, beta: Tensor) -> Tensor:
    """L of binary sparse coding, term by term as in (19.35)-(19.36): v (N, D), means (N, H); shape (N,)."""
    N, H = means.shape
    result = torch.zeros(N, dtype=v.dtype)
    for n in range(N):
        h = means[n]
        total = torch.zeros((), dtype=v.dtype)
        for i in range(H):
            total = total + h[i] * (torch.sigmoid(b[i]).log() - h[i].log())
            total = total + (1 - h[i]) * (torch.sigmoid(-b[i]).log() - (1 - h[i]).log())
        for i in range(v.shape[1]):
            inner = v[n, i] ** 2 - 2 * v[n, i] * (W[i] * h).sum()
            for j in range(H):
                inner = inner + W[i, j] ** 2 * h[j]
                for k in range(H):
                    if k != j:
                        inner = inner + W[i, j] * W[i, k] * h[j] * h[k]
            total = total + 0.5 * (torch.log(beta[i] / (2 * math.pi)) - beta[i] * inner)
        result[n] = total
    return result


def update_19_44(v: Tensor, means: Tensor, W: Tensor, b: Tensor, beta: Tensor, i: int) -> Tensor:
    """The new h-hat_i of every row by (19.44), shape (N,)."""
    w = W[:, i]
    others = sum(((W[:, j] * beta * w).sum() * means[:, j] for j in range(W.shape[1]) if j != i), torch.zeros(()))
    return torch.sigmoid(b[i] + (v * beta) @ w - 0.5 * (w * beta * w).sum() - others)


def update_19_45(v: Tensor, means: Tensor, W: Tensor, b: Tensor, beta: Tensor, i: int) -> Tensor:
    """The same by (19.45): unit i explains the residual that the others leave."""
    w = W[:, i]
    residual = v - sum((means[:, j, None] * W[:, j] for j in range(W.shape[1]) if j != i), torch.zeros(()))
    return torch.sigmoid(b[i] + (residual * beta) @ w - 0.5 * (w * beta * w).sum())


def log_joint_of_bits(log_joint: Callable[[Tensor], Tensor], num_units: int) -> tuple[Tensor, Tensor]:
    """All states (2^H, H) of binary units and log p(v_n, s), shape (2^H, N), from a function of one state (H,)."""
    states = torch.tensor([[(s >> (num_units - 1 - i)) & 1 for i in range(num_units)] for s in range(2**num_units)])
    states = states.to(torch.get_default_dtype())
    return states, torch.stack([log_joint(state) for state in states])


def product_table(tables: list[Tensor], choices: Tensor) -> Tensor:
    """q of every state (S, N) of a product of tables (N, K_i); choices (S, units) are the states' class indices."""
    columns = [table.mT[choices[:, i]] for i, table in enumerate(tables)]
    return torch.stack(columns).prod(0)


def coordinate_sweep(log_joint: Tensor, choices: Tensor, tables: list[Tensor], *, sequential: bool) -> list[Tensor]:
    """One sweep of (19.56) by brute force: q_i proportional to exp E_{q_-i}[log p(v, h)].

    Args:
        log_joint: (S, N).
        choices: the class index of every unit in every state, (S, units).
        tables: q of every unit, (N, K_i).
        sequential: whether a unit sees the new q of those before it.
    """
    old = list(tables)
    new = list(tables)
    for i, table in enumerate(tables):
        seen = new if sequential else old
        ones = [torch.ones_like(t) if j == i else t for j, t in enumerate(seen)]
        weights = product_table(ones, choices) * log_joint
        scores = torch.stack([weights[choices[:, i] == k].sum(0) for k in range(table.shape[1])], -1)
        new[i] = scores.softmax(-1)
    return new


def table_bound(log_joint: Tensor, choices: Tensor, tables: list[Tensor]) -> Tensor:
    """L per row (N,) of a product of tables, by enumeration."""
    q = product_table(tables, choices)
    return (q * log_joint - torch.xlogy(q, q)).sum(0)
