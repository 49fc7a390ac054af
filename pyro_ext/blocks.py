"""Blocks: the groups of latent features that one factor of q stands over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.continuous_factors import MultivariateNormalFactor, NormalFactor
from pyro_ext.discrete_factors import BernoulliFactor, OneHotFactor
from pyro_ext.distributions import PointMass, SiteDistribution
from pyro_ext.factors import Factor
from pyro_ext.point_factor import DeltaFactor
from pyro_ext.sites import Kind, Site


@dataclass(frozen=True)
class Block:
    """One factor of q and the features it stands over.

    Attributes:
        name: name of the block, under which its parameters are stored.
        parts: for each site, in the order in which the guide samples them, the features in this block.
        factor: the family.
    """

    name: str
    parts: tuple[tuple[Site, tuple[int, ...]], ...]
    factor: Factor

    @property
    def site(self) -> Site:
        """The first site: all sites of a block stand in the same plates."""
        return self.parts[0][0]

    def span(self, name: str) -> tuple[int, int] | None:
        """Where a site's features start and stop in this block, or None."""
        position = 0
        for site, components in self.parts:
            if site.name == name:
                return position, position + len(components)
            position += len(components)
        return None

    def earlier(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Features, at the given values, of the sites that come before a site in this block."""
        found = []
        for site, components in self.parts:
            if site.name == name:
                break
            found.append(site.to_features(values[site.name])[..., list(components)])
        return torch.cat(found, -1) if found else torch.empty(0)

    def components(self, name: str) -> tuple[int, ...]:
        """The features of a site that stand in this block."""
        return next(components for site, components in self.parts if site.name == name)


def site_distribution(
    site: Site,
    blocks: Sequence[Block],
    params: Mapping[str, Tensor],
    values: Mapping[str, Tensor] | None,
) -> TorchDistributionMixin:
    """q of one site, given the values of the sites before it, or its marginal.

    Args:
        site: the site.
        blocks: all blocks of q.
        params: parameters ``batch + (P,)`` for the blocks that hold the site.
        values: values of the earlier sites; None for the marginal.
    """
    holding = [(block, block.span(site.name)) for block in blocks]
    held = [(block, span) for block, span in holding if span is not None]
    if len(held) == 1 and len(held[0][0].parts) == 1:
        native = _native(site, held[0][0].factor, params[held[0][0].name], held[0][0].parts[0][1])
        if native is not None:
            return native
    parts = []
    for block, (start, stop) in held:
        if values is None:
            fn = block.factor.marginal(params[block.name], start, stop)
        else:
            fn = block.factor.conditional(params[block.name], start, stop, block.earlier(site.name, values))
        parts.append((block.components(site.name), fn))
    if len(parts) == 1 and site.kind is Kind.REAL and site.real_shape == (site.num_features,):
        return parts[0][1]
    return SiteDistribution(site, parts)


class GuideBernoulli(dist.Bernoulli):
    """Pyro's Bernoulli, under a name for which `TraceMeanField_ELBO` can be refused."""


class GuideOneHot(dist.OneHotCategorical):
    """Pyro's OneHotCategorical, under a name for which `TraceMeanField_ELBO` can be refused."""


class GuideCategorical(dist.Categorical):
    """Pyro's Categorical, under a name for which `TraceMeanField_ELBO` can be refused."""


def _refuse_kl(q: TorchDistributionMixin, p: TorchDistributionMixin) -> Tensor:
    raise ValueError(
        f"Expected reparametrised factors under TraceMeanField_ELBO, but got a discrete one, {type(q).__name__}, "
        "whose gradient it would get wrong. Use Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO or EM."
    )


def _refuse_discrete_parts(q: SiteDistribution, p: TorchDistributionMixin) -> Tensor:
    if not q.has_rsample:
        return _refuse_kl(q, p)
    raise NotImplementedError  # the sampled entropy that Pyro then takes is right here


for _q, _p in (
    (GuideBernoulli, torch.distributions.Bernoulli),
    (GuideOneHot, torch.distributions.OneHotCategorical),
    (GuideCategorical, torch.distributions.Categorical),
):
    torch.distributions.register_kl(_q, _p)(_refuse_kl)
    torch.distributions.register_kl(_q, torch.distributions.Distribution)(_refuse_kl)
torch.distributions.register_kl(SiteDistribution, torch.distributions.Distribution)(_refuse_discrete_parts)


def _native(site: Site, factor: Factor, params: Tensor, components: tuple[int, ...]) -> TorchDistributionMixin | None:
    """Pyro's own distribution for a factor that covers a whole site, where there is one."""
    if components != tuple(range(site.num_features)):
        return None
    ndim = len(site.event_shape)
    batch = params.shape[:-1]
    if isinstance(factor, BernoulliFactor):
        return GuideBernoulli(logits=factor.logits(params).reshape(batch + site.event_shape)).to_event(ndim)
    if isinstance(factor, OneHotFactor):
        logits = params.reshape(batch + site.real_shape)
        if site.kind is Kind.CATEGORICAL:
            return GuideCategorical(logits=logits).to_event(ndim)
        return GuideOneHot(logits=logits).to_event(ndim - 1)
    if isinstance(factor, NormalFactor):
        mean, scale = (x.reshape(batch + site.real_shape) for x in factor.moments(params))
        base = dist.Normal(mean, scale).to_event(len(site.real_shape))
        return base if site.kind is Kind.REAL else dist.TransformedDistribution(base, [site.transform])
    if isinstance(factor, MultivariateNormalFactor) and site.kind is Kind.CONSTRAINED and len(site.real_shape) == 1:
        mean, tril = factor.moments(params)
        return dist.TransformedDistribution(dist.MultivariateNormal(mean, scale_tril=tril), [site.transform])
    if isinstance(factor, DeltaFactor) and not factor.discrete:
        return dist.Delta(site.from_features(params), event_dim=ndim)
    if isinstance(factor, DeltaFactor):
        return SiteDistribution(site, [(components, PointMass(params, discrete=True))])
    return None
