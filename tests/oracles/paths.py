"""Brute force over whole paths of Markov chains: log-joints written out step by step, and what follows from them.

Letters as in `tests.oracles.enumeration`; T steps, K states, S = K^T paths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def all_paths(num_states: int, num_steps: int) -> Tensor:
    """All paths as integers, shape (K^T, T); the last step changes fastest."""
    return torch.tensor(list(itertools.product(range(num_states), repeat=num_steps)))


def one_hot_paths(num_states: int, num_steps: int) -> Tensor:
    """All paths as one-hot states, shape (K^T, T, K)."""
    return torch.eye(num_states)[all_paths(num_states, num_steps)]


def chain_log_prob(initial: Tensor, transition: Tensor, num_steps: int, length: int) -> Tensor:
    """log p of every path, shape (K^T,): a chain up to the length, uniform draws beyond it."""
    num_states = len(initial)
    found = []
    for path in all_paths(num_states, num_steps).tolist():
        total = initial[path[0]].log()
        for t in range(1, num_steps):
            total = total + (transition[path[t - 1], path[t]].log() if t < length else -math.log(num_states))
        found.append(total)
    return torch.stack(found)


def hmm_log_joint(initial: Tensor, transition: Tensor, steps: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    """log p(v_n, path), shape (S, N).

    Args:
        initial: (K,).
        transition: (K, K).
        steps: log p(v_nt | h_ntk = 1), shape (N, T, K); what stands at steps that are not seen is not read.
        seen: boolean (N, T).
        lengths: (N,).
    """
    num_rows, num_steps, num_states = steps.shape
    columns = []
    for n in range(num_rows):
        total = chain_log_prob(initial, transition, num_steps, int(lengths[n]))
        for t in range(num_steps):
            if seen[n, t]:
                total = total + steps[n, t][all_paths(num_states, num_steps)[:, t]]
        columns.append(total)
    return torch.stack(columns, -1)


class PathsMarginal:
    """The reductions of a chain's marginal, from a table over one-hot states: a stand-in and an oracle.

    Args:
        states: shape (S, T, K).
        probs: table q(s | n), shape (S, N).
    """

    def __init__(self, states: Tensor, probs: Tensor) -> None:
        self.states, self.probs = states, probs

    @property
    def mean(self) -> Tensor:
        return torch.einsum("sn,stk->ntk", self.probs, self.states)

    def pairwise(self, weights: Tensor | None = None) -> Tensor:
        pairs = torch.einsum("sn,stj,stk->ntjk", self.probs, self.states[:, :-1], self.states[:, 1:])
        return (pairs if weights is None else pairs * weights[..., None, None]).sum((0, 1))

    def mode(self) -> Tensor:
        return self.states[self.probs.argmax(0)]


class PathsPosterior(Mapping[str, PathsMarginal]):
    """q over the joint paths of several chains, as a table.

    Args:
        states: the paths of each chain at every joint state, shapes (S, T, K_m), by site.
        probs: shape (S, N).
    """

    def __init__(self, states: Mapping[str, Tensor], probs: Tensor) -> None:
        self.states, self.probs = dict(states), probs

    def __getitem__(self, name: str) -> PathsMarginal:
        return PathsMarginal(self.states[name], self.probs)

    def __iter__(self):
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def time_gram(self, names: Sequence[str], weights: Tensor | None = None) -> Tensor:
        g = torch.cat([self.states[name] for name in names], -1)
        grams = torch.einsum("sn,sti,stj->ntij", self.probs, g, g)
        return (grams if weights is None else grams * weights[..., None, None]).sum((0, 1))


def joint_paths(num_states: Sequence[int], num_steps: int) -> dict[str, Tensor]:
    """All joint paths of chains h1, h2, ..., each of shape (S, T, K_m)."""
    single = [one_hot_paths(k, num_steps) for k in num_states]
    picks = list(itertools.product(*(range(len(s)) for s in single)))
    index = torch.tensor(picks)
    return {f"h{m + 1}": s[index[:, m]] for m, s in enumerate(single)}


def smooth_by_loops(initial: Tensor, transition: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward-backward of one sequence, step by step in logs (Rabiner, 1989): log p(v), marginals, pairs.

    Args:
        initial: (K,).
        transition: (K, K).
        steps: log p(v_t | k), shape (T, K); 0 at steps that are not observed.

    Returns:
        log p(v) (), p(h_t | v) (T, K) and p(h_{t-1}, h_t | v) (T - 1, K, K).
    """
    num_steps = len(steps)
    forward = [initial.log() + steps[0]]
    for t in range(1, num_steps):
        forward.append((forward[-1][:, None] + transition.log()).logsumexp(0) + steps[t])
    backward = [torch.zeros_like(initial)]
    for t in range(num_steps - 1, 0, -1):
        backward.insert(0, (transition.log() + steps[t] + backward[0]).logsumexp(1))
    total = forward[-1].logsumexp(0)
    marginals = (torch.stack(forward) + torch.stack(backward) - total).exp()
    pairs = [
        (forward[t - 1][:, None] + transition.log() + steps[t] + backward[t] - total).exp() for t in range(1, num_steps)
    ]
    return total, marginals, torch.stack(pairs) if pairs else transition.new_zeros(0, *transition.shape)
