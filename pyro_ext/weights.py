"""How the particles of a row are weighted, and which bound those weights belong to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Weights(ABC):
    """A rule that turns log w_k = log p(v, h_k) - log q(h_k | v) of K particles into weights and a bound."""

    @abstractmethod
    def normalise(self, log_w: Tensor) -> Tensor:
        """Weights of the particles.

        Args:
            log_w: log-weights in nats, shape (K, *rows).

        Returns:
            Tensor of shape (K, *rows), not negative, that sums to 1 over the particles.
        """

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """A lower bound on log p(v), in expectation over the particles.

        Args:
            log_w: log-weights in nats, shape (K, *rows).

        Returns:
            Tensor of the rows' shape, nats.
        """


@dataclass(frozen=True)
class SelfNormalized(Weights):
    """Importance weights, normalised within a row (Bornschein and Bengio, Reweighted Wake-Sleep, 2015).

        w_k / sum_j w_j,    log 1/K sum_k w_k

    A row whose particles are all impossible under the model (log w = -inf) gets equal weights; its bound is -inf.

    Example:
        >>> log_w = torch.tensor([1.0, 3.0]).log()
        >>> SelfNormalized().normalise(log_w), SelfNormalized().bound(log_w)
        (tensor([0.2500, 0.7500]), tensor(0.6931))
    """

    def normalise(self, log_w: Tensor) -> Tensor:
        """Weights w_k / sum_j w_j, shape (K, *rows)."""
        impossible = torch.isneginf(log_w).all(0)
        return torch.where(impossible, torch.zeros_like(log_w), log_w).softmax(0)

    def bound(self, log_w: Tensor) -> Tensor:
        """The importance-weighted bound log 1/K sum_k w_k, shape rows, nats."""
        return log_w.logsumexp(0) - math.log(log_w.shape[0])


@dataclass(frozen=True)
class Uniform(Weights):
    """Equal weights: the plain mean over samples of q, the wake phase of Hinton et al. (1995).

        1/K,    1/K sum_k log w_k

    Example:
        >>> log_w = torch.tensor([1.0, 3.0])
        >>> Uniform().normalise(log_w), Uniform().bound(log_w)
        (tensor([0.5000, 0.5000]), tensor(2.))
    """

    def normalise(self, log_w: Tensor) -> Tensor:
        """Weights 1/K, shape (K, *rows)."""
        return torch.full_like(log_w, 1 / log_w.shape[0])

    def bound(self, log_w: Tensor) -> Tensor:
        """The evidence lower bound 1/K sum_k log w_k, shape rows, nats."""
        return log_w.mean(0)
