"""Fully factorised q: every unit of every latent on its own (19.28)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pyro_ext.blocks import Block
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.continuous_factors import NormalFactor
from pyro_ext.discrete_factors import BernoulliFactor, OneHotFactor
from pyro_ext.factors import Factor
from pyro_ext.guides.tables import TableGuide
from pyro_ext.markov_chain import MarkovChain
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site, base_of


def mean_field_factor(site: Site, num_features: int | None = None) -> Factor:
    """The fully factorised family for (some features of) a site."""
    size = site.num_features if num_features is None else num_features
    if site.is_chain and size == site.num_features:
        return chain_factor([site])
    if site.kind is Kind.BINARY:
        return BernoulliFactor(size)
    if site.kind in (Kind.ONE_HOT, Kind.CATEGORICAL):
        return OneHotFactor(size // site.num_classes, site.num_classes)
    return NormalFactor(size)


def chain_factor(sites: Sequence[Site]) -> MarkovChainFactor:
    """The factor over the paths of one chain, or of several of the same length that are coupled."""
    homogeneous = all(cast("MarkovChain", base_of(site.fn)).is_homogeneous for site in sites)
    num_steps, _ = sites[0].event_shape
    return MarkovChainFactor([site.event_shape[1] for site in sites], num_steps, homogeneous=homogeneous)


class MeanField(TableGuide):
    """q(h | v) = prod_i q(h_i | v), with a row of parameters per datum (19.28).

    Binary units get a Bernoulli factor, categorical and one-hot units a table over their classes, real
    and constrained ones a Normal on the real line (mapped to the support by Pyro's bijection). A Markov chain is one
    unit: its factor is a chain too.

    Args:
        model: any Pyro model.
        name: name of the guide's parameters.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.2).expand([3]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)
        >>> guide = MeanField(model)
        >>> guide.posterior(torch.zeros(5))["h"].mean.shape
        torch.Size([5, 3])
    """

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """One block per site."""
        return tuple(
            Block(site.name, ((site, tuple(range(site.num_features))),), mean_field_factor(site))
            for site in program.latents
        )
