"""The posterior of a guide with density encoders: draws and log q, no moments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.blocks import site_distribution
from pyro_ext.guides.density_encoders import DensityFactor, no_closed_form
from pyro_ext.posterior import Marginal, Posterior


@dataclass(frozen=True)
class DensityPosterior(Posterior):
    """A posterior some of whose factors are densities: what has no closed form is refused, not estimated silently.

    Attributes:
        conditional: names of the sites whose encoders read other latents.
    """

    conditional: frozenset[str] = frozenset()

    @property
    def densities(self) -> list[str]:
        """Names of the sites whose factors are densities."""
        return [b.site.name for b in self.blocks if isinstance(b.factor, DensityFactor)]

    def _require_static(self, what: str) -> None:
        raise ValueError(no_closed_form(f"factors for {what}", self.densities))

    def __getitem__(self, name: str) -> Marginal:
        found = super().__getitem__(name)
        if name in self.densities:
            return DensityMarginal(self, found.site)
        if name in self.conditional:
            return found
        return Marginal(Posterior(self.rows, self.sites, self.blocks, self.conditioner), found.site)


@dataclass(frozen=True)
class DensityMarginal(Marginal):
    """q of one site whose factor is a density: draws and log q, no moments."""

    @cached_property
    def distribution(self) -> TorchDistributionMixin:
        posterior = self.posterior
        if isinstance(posterior, DensityPosterior) and self.site.name in posterior.conditional:
            raise ValueError(
                f"Expected a site whose encoder reads visible data alone, but {self.site.name!r} has one that reads "
                "other latents: its marginal has no density in closed form. Use `posterior.log_prob(values)`."
            )
        (block,) = posterior._holding(self.site)
        fn = site_distribution(self.site, [block], {block.name: posterior.conditioner(block, {})}, {})
        return fn.expand(torch.broadcast_shapes(fn.batch_shape, self.site.batch_shape))

    @cached_property
    def features(self) -> Tensor:
        raise ValueError(no_closed_form("a mean in closed form", [self.site.name]))

    @cached_property
    def mean(self) -> Tensor:
        return self.features
