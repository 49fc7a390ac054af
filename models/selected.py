"""The distribution of a row whose component is chosen by a one-hot latent."""

# torch's stubs declare `support` and `arg_constraints` as properties; every distribution sets them as attributes.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

# Rows of one chunk: its (rows, K) and (rows, D) intermediates stay in the cache.
_CHUNK_ROWS = 8192


class Components(ABC):
    """K densities over R^D, evaluated all at once."""

    @abstractmethod
    def log_prob(self, v: Tensor) -> Tensor:
        """log N(v; k) for v of shape (N, D), as (N, K), nats."""

    @abstractmethod
    def draw(self, h: Tensor) -> Tensor:
        """One draw from the component that each one-hot h of shape (..., K) chooses, (..., D)."""


class DiagonalComponents(Components):
    """Gaussians with diagonal covariances, by one matrix product on [x^2, x].

    Args:
        locs: means (K, D).
        scale: standard deviations (K, D).
    """

    def __init__(self, locs: Tensor, scale: Tensor) -> None:
        self.locs, self.scale = locs, scale

    def log_prob(self, v: Tensor) -> Tensor:
        # Around the means' mean, for the squares of data far from 0 would cancel.
        shift = self.locs.detach().mean(0)
        locs, precision = self.locs - shift, self.scale.pow(-2)
        weights = torch.cat([-0.5 * precision, precision * locs], -1).mT
        constant = -(0.5 * precision * locs.square() + self.scale.log()).sum(-1)
        constant = constant - 0.5 * locs.shape[-1] * math.log(2 * math.pi)
        parts = []
        for part in v.split(_CHUNK_ROWS):
            x = part - shift
            parts.append(torch.addmm(constant, torch.cat([x.square(), x], -1), weights))
        return torch.cat(parts)

    def draw(self, h: Tensor) -> Tensor:
        return torch.normal(h @ self.locs, h @ self.scale)


class FullComponents(Components):
    """Gaussians with full covariances.

    Args:
        locs: means (K, D).
        scale_tril: Cholesky factors of the covariances (K, D, D).
    """

    def __init__(self, locs: Tensor, scale_tril: Tensor) -> None:
        self.locs, self.scale_tril = locs, scale_tril

    def log_prob(self, v: Tensor) -> Tensor:
        num, width = self.locs.shape
        eye = torch.eye(width, dtype=v.dtype, device=v.device)
        whiten = torch.linalg.solve_triangular(self.scale_tril, eye.expand(num, width, width), upper=False).mT
        shift = self.locs.detach().mean(0)
        offset = ((self.locs - shift)[:, None, :] @ whiten).reshape(-1)
        flat = whiten.permute(1, 0, 2).reshape(width, -1)
        constant = -self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * width * math.log(2 * math.pi)
        parts = []
        for part in v.split(max(1, _CHUNK_ROWS // max(1, num // 4))):
            white = torch.addmm(-offset, part - shift, flat)
            parts.append(constant - 0.5 * white.square().reshape(len(part), num, width).sum(-1))
        return torch.cat(parts)

    def draw(self, h: Tensor) -> Tensor:
        noise = torch.randn_like(h @ self.locs)
        chosen = torch.einsum("...k,kde->...de", h, self.scale_tril)
        return h @ self.locs + (chosen @ noise[..., None]).squeeze(-1)


class Selected(TorchDistribution):
    """p(v | h) = prod_k p_k(v)^h_k for one-hot h: log p is linear in h, on the support and off it.

    Inference can then read every component's log-density as a coefficient of h, from one evaluation.

    Args:
        h: one-hot choice, shape batch + (K,).
        components: the K densities.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, h: Tensor, components: Components, *, num_visible: int) -> None:
        self.h, self.components = h, components
        super().__init__(h.shape[:-1], torch.Size([num_visible]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Selected:
        """Expand the batch."""
        h = self.h.expand(torch.Size(batch_shape) + self.h.shape[-1:])
        return Selected(h, self.components, num_visible=self.event_shape[0])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the chosen components, shape sample_shape + batch + (D,)."""
        with torch.no_grad():
            return self.components.draw(self.h.expand(torch.Size(sample_shape) + self.h.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(v | h), nats, shape batch."""
        found = self.components.log_prob(value.reshape(-1, value.shape[-1])).reshape(value.shape[:-1] + (-1,))
        if self.h.dim() > 2 and found.dim() == 2 and self.h.stride(-2) == 0:
            # The same choices for every row, as when states are enumerated: one product in place of many.
            return self.h[..., 0, :] @ found.mT
        return (self.h * found).sum(-1)
