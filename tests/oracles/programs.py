"""Small plain Pyro programs, with functions of `pyro.param`, that many tests share."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def sparse_coding(v: Tensor) -> None:
    """Binary sparse coding (19.19)-(19.20) on parameters "b", "W", "beta" that must exist."""
    b, W = pyro.param("b"), pyro.param("W")
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(logits=b).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T, pyro.param("beta").rsqrt()).to_event(1), obs=v)


def sparse_coding_parameters(num_visible: int, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Create random parameters b (H,), W (D, H), beta (D,) in the store and give detached copies."""
    b = pyro.param("b", torch.randn(num_latents))
    W = pyro.param("W", torch.randn(num_visible, num_latents))
    beta = pyro.param("beta", torch.rand(num_visible) + 0.5, constraint=constraints.positive)
    return b.detach().clone(), W.detach().clone(), beta.detach().clone()


def sigmoid_network(v: Tensor) -> None:
    """Two binary layers, 2 -> 3 -> D, on parameters that must exist: not quadratic in its latents."""
    with pyro.plate("data", len(v)):
        h2 = pyro.sample("h2", dist.Bernoulli(logits=pyro.param("b2")).to_event(1))
        h1 = pyro.sample("h1", dist.Bernoulli(logits=h2 @ pyro.param("W2").T + pyro.param("b1")).to_event(1))
        pyro.sample("v", dist.Bernoulli(logits=h1 @ pyro.param("W1").T + pyro.param("b0")).to_event(1), obs=v)


def sigmoid_network_parameters(num_visible: int) -> dict[str, Tensor]:
    """Create random parameters of `sigmoid_network` and give detached copies."""
    shapes = {"b2": (2,), "W2": (3, 2), "b1": (3,), "W1": (num_visible, 3), "b0": (num_visible,)}
    return {name: pyro.param(name, 1.5 * torch.randn(shape)).detach().clone() for name, shape in shapes.items()}


def class_means(v: Tensor) -> None:
    """A mixture with integer latents, `mu[z]`, on parameters "logits" (K,) and "mu" (K, D)."""
    mu = pyro.param("mu")
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(logits=pyro.param("logits")))
        pyro.sample("v", dist.Normal(mu[z], 0.8).to_event(1), obs=v)
