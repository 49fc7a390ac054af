"""Hidden values that are not even read."""

# pyright: reportIncompatibleMethodOverride=false
# torch declares `log_prob` otherwise than its own distributions define it.

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor


class Unread(MaskedDistribution):
    """A distribution with log p = 0 where a mask is False, whatever stands there: NaN, or a value outside the support.

    Pyro's own mask drops a hidden log-density after it was computed, and its gradient is NaN where that was.

    Args:
        base_dist: a distribution that has 0 in its support.
        mask: boolean, broadcastable to the batch.

    Example:
        >>> import pyro.distributions as dist
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> fn = Unread(dist.Normal(loc, 1.0), torch.tensor([True, False]))
        >>> fn.log_prob(torch.tensor([2.0, torch.nan])).sum().backward()
        >>> loc.grad
        tensor([2., 0.])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) where the mask is True, nats, shape batch."""
        seen = torch.as_tensor(self._mask, device=value.device)
        return super().log_prob(torch.where(seen.reshape(seen.shape + (1,) * self.event_dim), value, 0))
