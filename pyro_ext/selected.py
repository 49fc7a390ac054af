"""The distribution of a row whose component is chosen by a one-hot latent."""

# torch's stubs declare `support` and `arg_constraints` as properties; every distribution sets them as attributes.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Components(ABC):
    """K densities over R^D, or over the values of another support, evaluated all at once.

    Example:
        >>> import pyro.distributions as dist
        >>> class Normals(Components):
        ...     support = torch.distributions.constraints.real
        ...     def log_prob(self, v):
        ...         return dist.Normal(torch.tensor([0.0, 3.0]), 1.0).log_prob(v[:, None])
        ...     def draw(self, h):
        ...         return h @ torch.tensor([0.0, 3.0]) + torch.randn(h.shape[:-1])
        >>> Selected(torch.eye(2), Normals(), num_visible=None).log_prob(torch.zeros(2))
        tensor([-0.9189, -5.4189])
    """

    support: constraints.Constraint = constraints.real_vector

    observed: Tensor | None = None
    """Which entries of the values count, boolean, of their shape; the others are not read. None when all count."""

    @abstractmethod
    def log_prob(self, v: Tensor) -> Tensor:
        """log p_k(v) for v of shape (N,) + event, nats, as a new tensor (N, K): the caller may write over it."""

    @abstractmethod
    def draw(self, h: Tensor) -> Tensor:
        """One draw from the component that each one-hot h of shape (..., K) chooses, (...,) + event."""


class Selected(TorchDistribution):
    """p(v | h) = prod_k p_k(v)^h_k for one-hot h: log p is linear in h, on the support and off it.

    Inference can then read every component's log-density as a coefficient of h, from one evaluation.

    Args:
        h: one-hot choice, shape batch + (K,).
        components: the K densities.
        num_visible: width D of one value; None for values that are single numbers.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, h: Tensor, components: Components, *, num_visible: int | None) -> None:
        self.h, self.components, self.num_visible = h, components, num_visible
        event_shape = () if num_visible is None else (num_visible,)
        super().__init__(h.shape[:-1], torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the components."""
        return self.components.support

    @property
    def observed(self) -> Tensor | None:
        """Which entries of the value count, of its shape; None when all do."""
        return self.components.observed

    def expand(self, batch_shape: Any, _instance: Any = None) -> Selected:
        """Expand the batch."""
        shape = torch.Size(batch_shape) + self.h.shape[-1:]
        # Pyro's plates expand always; h must stay the latent's own value where nothing changes.
        h = self.h if self.h.shape == shape else self.h.expand(shape)
        return Selected(h, self.components, num_visible=self.num_visible)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the chosen components, shape sample_shape + batch + event."""
        with torch.no_grad():
            return self.components.draw(self.h.expand(torch.Size(sample_shape) + self.h.shape))

    def coefficients(self, value: Tensor) -> Tensor:
        """log p_k(v) of every component, batch + (K,), nats: the coefficients of h in log p(v | h)."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return self.components.log_prob(value.reshape((-1,) + self.event_shape)).reshape(batch + (-1,))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(v | h), nats, shape batch."""
        found = self.coefficients(value)
        if self.h.dim() > 2 and found.dim() == 2 and self.h.stride(-2) == 0:
            # The same choices for every row, as when states are enumerated: one product in place of many.
            return self.h[..., 0, :] @ found.mT
        return (self.h * found).sum(-1)
