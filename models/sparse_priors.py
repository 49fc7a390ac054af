"""Priors of sparse latents: densities with a peak at zero and heavy tails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparsePrior(ABC):
    """The density of independent latents h_i, with one hyperparameter for all of them or one each.

    Hyperparameters are not learned. Jointly with points h, log p(h, v) has no maximum in them: as h shrinks to 0
    (and W grows), the density of h at its peak rises without bound. Choose them by what they do to held-out data.

    Raises:
        ValueError: a hyperparameter that is not positive and finite.
    """

    nonnegative: ClassVar[bool] = False
    """Whether h >= 0. Factors of q then work on log h, not on h."""

    def __post_init__(self) -> None:
        for name, value in self.hyperparameters().items():
            if not ((value > 0) & value.isfinite()).all():
                raise ValueError(
                    f"Expected a positive and finite {name}, but got {getattr(self, name)}. It is a scale of the "
                    "prior: pass 1.0, say."
                )

    def hyperparameters(self) -> dict[str, Tensor]:
        """The hyperparameters by name, copies in the default dtype, shape () or (H,)."""
        return {
            field.name: torch.as_tensor(getattr(self, field.name), dtype=torch.get_default_dtype()).detach().clone()
            for field in fields(self)
        }

    @abstractmethod
    def unit(self, values: Mapping[str, Tensor]) -> TorchDistribution:
        """The density of one latent, with the given hyperparameters; batch () or (H,)."""

    def distribution(self, values: Mapping[str, Tensor], num_latents: int) -> TorchDistribution:
        """p(h) of a whole row, event shape (H,), with the given hyperparameters."""
        return self.unit(values).expand([num_latents]).to_event(1)


@dataclass(frozen=True, eq=False)
class LaplacePrior(SparsePrior):
    """p(h_i) = (rate_i / 2) exp(-rate_i |h_i|), the prior of (19.14).

    Args:
        rate: lambda > 0, shape () or (H,): nats that a unit of |h_i| costs.

    Example:
        >>> prior = LaplacePrior(2.0)
        >>> prior.distribution(prior.hyperparameters(), num_latents=3).log_prob(torch.tensor([0.0, 1.0, -1.0]))
        tensor(-4.)
    """

    rate: float | Tensor = 1.0

    def unit(self, values: Mapping[str, Tensor]) -> TorchDistribution:
        """See `SparsePrior.unit`."""
        rate = values["rate"]
        return dist.Laplace(torch.zeros_like(rate), 1 / rate)


@dataclass(frozen=True, eq=False)
class ExponentialPrior(SparsePrior):
    """p(h_i) = rate_i exp(-rate_i h_i) for h_i >= 0: components are added, never subtracted (Hoyer, 2002).

    Args:
        rate: positive, shape () or (H,): nats that a unit of h_i costs.

    Example:
        >>> prior = ExponentialPrior(2.0)
        >>> bool((prior.distribution(prior.hyperparameters(), num_latents=3).sample() >= 0).all())
        True
    """

    nonnegative: ClassVar[bool] = True

    rate: float | Tensor = 1.0

    def unit(self, values: Mapping[str, Tensor]) -> TorchDistribution:
        """See `SparsePrior.unit`."""
        return dist.Exponential(values["rate"])


@dataclass(frozen=True, eq=False)
class StudentTPrior(SparsePrior):
    r"""Student's t, whose penalty grows as a logarithm (Olshausen & Field, 1996, up to the scale).

    .. math:: -\log p(h_i) = \tfrac{df + 1}{2} \log(1 + (h_i / scale)^2 / df) + const

    Args:
        df: degrees of freedom, positive, shape () or (H,); the tails are heavier the fewer there are.
        scale: positive, shape () or (H,).

    Example:
        >>> prior = StudentTPrior(df=3.0, scale=0.5)
        >>> prior.distribution(prior.hyperparameters(), num_latents=3).event_shape
        torch.Size([3])
    """

    df: float | Tensor = 3.0
    scale: float | Tensor = 1.0

    def unit(self, values: Mapping[str, Tensor]) -> TorchDistribution:
        """See `SparsePrior.unit`."""
        df, scale = torch.broadcast_tensors(values["df"], values["scale"])
        return dist.StudentT(df, torch.zeros_like(scale), scale)


@dataclass(frozen=True, eq=False)
class CauchyPrior(SparsePrior):
    """p(h_i) = 1 / (pi scale_i (1 + (h_i / scale_i)^2)), the t distribution of one degree of freedom.

    Args:
        scale: positive, shape () or (H,).

    Example:
        >>> prior = CauchyPrior(0.5)
        >>> prior.distribution(prior.hyperparameters(), num_latents=3).event_shape
        torch.Size([3])
    """

    scale: float | Tensor = 1.0

    def unit(self, values: Mapping[str, Tensor]) -> TorchDistribution:
        """See `SparsePrior.unit`."""
        scale = values["scale"]
        return dist.Cauchy(torch.zeros_like(scale), scale)
