"""Brute force: all states of small latent variables, log-joints written out by hand, and what follows from them.

Letters: S states, N rows, H latent units, D visible variables, K components. A table of log-joints or of
probabilities has shape (S, N): states down, rows across.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ext.rows import Rows

LOG_2PI = math.log(2 * math.pi)


def binary_states(num_units: int, dtype: torch.dtype | None = None) -> Tensor:
    """All states of 0/1 units, shape (2^n, n); the last unit changes fastest."""
    states = list(itertools.product((0, 1), repeat=num_units))
    return torch.tensor(states, dtype=dtype or torch.get_default_dtype()).view(len(states), num_units)


def one_hot_states(num_components: int, dtype: torch.dtype | None = None) -> Tensor:
    """All one-hot states, shape (K, K)."""
    return torch.eye(num_components, dtype=dtype or torch.get_default_dtype())


def log_evidence(log_joint: Tensor) -> Tensor:
    """log p(v_n) = log sum_s p(v_n, s), shape (N,)."""
    return log_joint.logsumexp(0)


def exact_posterior(log_joint: Tensor) -> Tensor:
    """p(s | v_n), shape (S, N)."""
    return (log_joint - log_evidence(log_joint)).exp()


def expected_log_joint(log_joint: Tensor, probs: Tensor) -> Tensor:
    """sum_n E_q[log p(v_n, s)] for a table q of shape (S, N); a scalar."""
    return (probs * log_joint.masked_fill(probs == 0, 0)).sum()


def elbo(log_joint: Tensor, probs: Tensor) -> Tensor:
    """E_q[log p(v_n, s)] + H(q), shape (N,)."""
    return (probs * log_joint.masked_fill(probs == 0, 0) - torch.xlogy(probs, probs)).sum(0)


def random_posterior(num_states: int, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """An arbitrary table q of positive probabilities, shape (S, N)."""
    return torch.randn(num_states, num_rows, dtype=dtype or torch.get_default_dtype()).mul(2).softmax(0)


def factorial_posterior(means: Tensor) -> Tensor:
    """The table, shape (2^H, N), of a product of Bernoullis with means (N, H)."""
    states = binary_states(means.shape[1], means.dtype).unsqueeze(1)
    return (states * means + (1 - states) * (1 - means)).prod(-1)


def program_log_joint(model: Callable[..., Any], latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """log p(v_n, s) of a Pyro program at given latent values.

    Args:
        model: the program.
        latents: value of each latent site, shape (S, N, ...) or (S, 1, ...): states, then rows.
        args: arguments of the program.
        kwargs: likewise.

    Returns:
        Tensor of shape (S, N), differentiable in the parameters and in real-valued latents.
    """
    trace = pyro.poutine.trace(pyro.poutine.condition(model, data=dict(latents))).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return Rows.from_trace(trace).log_prob(trace)


def gaussian_mixture_log_joint(v: Tensor, weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """log pi_k + log N(v_n; mu_k, Sigma_k) for covariances (K, D, D); shape (K, N)."""
    rows = []
    for weight, loc, covariance in zip(weights, locs, covariances, strict=True):
        difference = v - loc
        squared = ((difference @ torch.linalg.inv(covariance)) * difference).sum(-1)
        log_normalizer = 0.5 * (v.shape[1] * LOG_2PI + torch.linalg.slogdet(covariance).logabsdet)
        rows.append(weight.log() - 0.5 * squared - log_normalizer)
    return torch.stack(rows)


def binary_sparse_coding_log_joint(v: Tensor, h: Tensor, W: Tensor, b: Tensor, beta: Tensor) -> Tensor:
    """Equations 19.19 and 19.20 for v (N, D) and states h (S, H); beta (D,) or (). Shape (S, N)."""
    prior = (h * torch.sigmoid(b).log() + (1 - h) * torch.sigmoid(-b).log()).sum(-1)
    difference = v - (h @ W.T).unsqueeze(1)
    emission = 0.5 * (beta.log() - LOG_2PI - beta * difference**2).sum(-1)
    return prior.unsqueeze(-1) + emission


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """Sum over the last dimension of x log sigma(l) + (1 - x) log sigma(-l)."""
    return (x * torch.sigmoid(logits).log() + (1 - x) * torch.sigmoid(-logits).log()).sum(-1)


def sigmoid_belief_network_log_joint(
    v: Tensor, layers: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """log p(v, h1, ..., hL).

    Args:
        v: shape (N, D).
        layers: h1, ..., hL from the bottom, shapes (S, 1, H_l) or (S, N, H_l).
        weights: W1, ..., WL from the bottom, shapes (width below, width).
        biases: b0, ..., bL from the bottom.

    Returns:
        Tensor of shape (S, N).
    """
    total = bernoulli_log_prob(layers[-1], biases[-1])
    for below, above, weight, bias in zip((v, *layers[:-1]), layers, weights, biases[:-1], strict=True):
        total = total + bernoulli_log_prob(below, above @ weight.T + bias)
    return total


class StatesMarginal:
    """The reductions of a posterior marginal, computed from a table over states: a stand-in and an oracle.

    Args:
        states: shape (S, H).
        probs: table q(s | n), shape (S, N).
    """

    def __init__(self, states: Tensor, probs: Tensor) -> None:
        self.states, self.probs = states, probs

    @property
    def mean(self) -> Tensor:
        return self.probs.T @ self.states

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return self._weigh(weights).sum(1) @ self.states

    def cross(self, x: Tensor) -> Tensor:
        return self.states.T @ self.probs @ x

    def gram(self, weights: Tensor | None = None) -> Tensor:
        return self.states.T @ (self._weigh(weights).sum(1).unsqueeze(-1) * self.states)

    def _weigh(self, weights: Tensor | None) -> Tensor:
        return self.probs if weights is None else self.probs * weights
