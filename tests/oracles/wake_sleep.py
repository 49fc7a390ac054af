"""Wake-sleep by hand: a sigmoid belief network in plain torch, and expectations over all tuples of particles.

Letters: K particles, N rows, H latent units, D visible units, S = 2^H states of h, T = S^K tuples of states.
Nothing here uses Pyro.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.enumeration import bernoulli_log_prob, binary_states

THETA, PHI = ("c", "W", "b"), ("R", "r")


@dataclass
class Network:
    """h ~ B(sigma(c)), v ~ B(sigma(W h + b)); q(h|v) = B(sigma(R v + r)).

    Attributes:
        c: shape (H,).
        W: shape (D, H).
        b: shape (D,).
        R: shape (H, D).
        r: shape (H,).
    """

    c: Tensor
    W: Tensor
    b: Tensor
    R: Tensor
    r: Tensor

    @classmethod
    def random(cls, num_visible: int, num_latents: int) -> Network:
        shapes = (
            (num_latents,),
            (num_visible, num_latents),
            (num_visible,),
            (num_latents, num_visible),
            (num_latents,),
        )
        return cls(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))

    def parameters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*THETA, *PHI)}

    def log_p(self, v: Tensor, h: Tensor) -> Tensor:
        """log p(v, h), nats, for v (..., D) and h (..., H)."""
        return bernoulli_log_prob(h, self.c.expand_as(h)) + bernoulli_log_prob(v, h @ self.W.T + self.b)

    def log_q(self, v: Tensor, h: Tensor) -> Tensor:
        """log q(h|v), nats."""
        return bernoulli_log_prob(h, v @ self.R.T + self.r)

    def theta_gradient(self, v: Tensor, h: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """sum_kn w_kn grad log p(v_n, h_kn), derived on paper; v (N, D), h (K, N, H), weights (K, N)."""
        error = v - torch.sigmoid(h @ self.W.T + self.b)
        return {
            "c": torch.einsum("kn,knh->h", weights, h - torch.sigmoid(self.c)),
            "W": torch.einsum("kn,knd,knh->dh", weights, error, h),
            "b": torch.einsum("kn,knd->d", weights, error),
        }

    def phi_gradient(self, v: Tensor, h: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """sum_kn w_kn grad log q(h_kn|v_n), derived on paper."""
        error = h - torch.sigmoid(v @ self.R.T + self.r)
        return {
            "R": torch.einsum("kn,knh,nd->hd", weights, error, v),
            "r": torch.einsum("kn,knh->h", weights, error),
        }

    def tables(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """log p(v_n, s) and log q(s|v_n) for all states, each (S, N)."""
        states = binary_states(len(self.c), v.dtype).unsqueeze(1).expand(-1, len(v), -1)
        return self.log_p(v, states), self.log_q(v, states)


def particle_tuples(num_states: int, num_particles: int) -> Tensor:
    """All tuples of K states, shape (T, K)."""
    return torch.tensor(list(itertools.product(range(num_states), repeat=num_particles)))


def expected_bound(log_p: Tensor, log_q: Tensor, num_particles: int, self_normalized: bool) -> Tensor:
    """E[log 1/K sum_k w_k], or E[1/K sum_k log w_k], shape (N,), over K draws from q.

    Differentiable in theta only, through the bound itself: an importance-weighted bound whose draws
    are held fixed has as its gradient what the wake phase follows.
    """
    tuples = particle_tuples(len(log_p), num_particles)
    probability = log_q.detach()[tuples].sum(1).exp()
    log_w = (log_p - log_q.detach())[tuples]
    bound = log_w.logsumexp(1) - math.log(num_particles) if self_normalized else log_w.mean(1)
    return (probability * bound).sum(0)


def expected_wake_phi(log_p: Tensor, log_q: Tensor, num_particles: int) -> Tensor:
    """-E[sum_k W_k log q(h_k|v)] with draws and weights W held fixed, shape (N,)."""
    tuples = particle_tuples(len(log_p), num_particles)
    probability = log_q.detach()[tuples].sum(1).exp()
    weights = (log_p - log_q).detach()[tuples].softmax(1)
    return -(probability.unsqueeze(1) * weights * log_q[tuples]).sum((0, 1))


def expected_sleep(network: Network) -> Tensor:
    """-E_p(v,h)[log q(h|v)] for one dream, shape ()."""
    log_p, log_q = network.tables(binary_states(len(network.b), network.b.dtype))
    return -(log_p.detach().exp() * log_q).sum()
