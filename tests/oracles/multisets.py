"""Expectations over K particles by multisets: how often each state was drawn, with the multinomial probability of it.

Letters: K particles, S states of a row, P patterns (rows that differ), M multisets of K of S states.
Nothing here uses Pyro. Tables have shape (S, P); expectations (P,), differentiable where it is said.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def multisets(num_states: int, num_particles: int) -> tuple[Tensor, Tensor]:
    """Counts of each state, shape (M, S), and the logarithm of the number of tuples that have them, shape (M,)."""
    counts = []
    for chosen in itertools.combinations_with_replacement(range(num_states), num_particles):
        counts.append([chosen.count(state) for state in range(num_states)])
    counts = torch.tensor(counts, dtype=torch.float64)
    return counts, math.lgamma(num_particles + 1) - torch.lgamma(counts + 1).sum(1)


def _tables(log_proposal: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """Counts, shape (M, S, 1), and probabilities of the multisets, shape (M, P)."""
    counts, log_number = multisets(len(log_proposal), num_particles)
    # xlogy-like: a state that was not drawn counts nothing even where it is impossible.
    terms = torch.where(counts[:, :, None] > 0, counts[:, :, None] * log_proposal.detach(), 0.0)
    return counts[:, :, None], (log_number[:, None] + terms.sum(1)).exp()


def expected_bound(log_p: Tensor, log_proposal: Tensor, num_particles: int, *, self_normalized: bool) -> Tensor:
    """E[log 1/K sum_k w_k] or E[1/K sum_k log w_k]; differentiable in log_p, draws and log_proposal held fixed."""
    counts, probability = _tables(log_proposal, num_particles)
    log_w = log_p - log_proposal.detach()
    if self_normalized:
        bound = (counts.log() + log_w).logsumexp(1) - math.log(num_particles)
    else:
        bound = (counts * log_w).sum(1) / num_particles
    return (probability * bound).sum(0)


def expected_wake_phi(log_p: Tensor, log_q: Tensor, log_proposal: Tensor, num_particles: int) -> Tensor:
    """-E[sum_k W_k log q(h_k | v)], differentiable in log_q alone."""
    counts, probability = _tables(log_proposal, num_particles)
    weights = (counts.log() + (log_p - log_proposal).detach()).softmax(1)
    return -(probability[:, None] * weights * log_q).sum((0, 1))
