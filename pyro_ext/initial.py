"""Cold starts: parameters of q before any inference, from the prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site, base_of

CLASSES = torch.distributions.Bernoulli, torch.distributions.OneHotCategorical, torch.distributions.Categorical

INITIAL_SPREAD = 0.1
"""Standard deviation of continuous factors at a cold start, on the real line (Pyro's autoguides use the same)."""


def prior_features(site: Site) -> Tensor:
    """Prior mean of a discrete site's features, prior median of a continuous one's, ``site.batch_shape + (F,)``."""
    fn = site.fn
    base = base_of(fn)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if site.is_chain:
            features = base.mean.expand(fn.batch_shape + site.real_shape).reshape(fn.batch_shape + (-1,))
        elif isinstance(base, CLASSES):
            features = base.probs.expand(fn.batch_shape + site.real_shape).reshape(fn.batch_shape + (-1,))
        elif site.kind.is_discrete:
            features = site.to_features(fn.sample((256,))).mean(0)
        else:
            features = site.to_features(fn.sample((15,))).median(0).values
            features = torch.where(features.isfinite(), features, torch.zeros_like(features))
    shape = site.batch_shape
    differing = [i - len(shape) - 1 for i in range(len(shape)) if shape[i] != features.shape[i]]
    if differing:
        features = features.mean(differing, keepdim=True)
    return features.expand(shape + features.shape[-1:]).clone()


def initial_parameters(block: Block, spread: float = INITIAL_SPREAD) -> Tensor:
    """Cold parameters of a block, ``batch + (P,)``; `spread` is the standard deviation of continuous factors."""
    pieces = [prior_features(site)[..., list(components)] for site, components in block.parts]
    return block.factor.initial(torch.cat(pieces, -1), spread)


def prior_spread(site: Site) -> float:
    """Standard deviation of a real latent's prior, pooled over its features; `INITIAL_SPREAD` where it has none."""
    if site.kind is not Kind.REAL:
        return INITIAL_SPREAD
    try:
        variance = float(site.fn.stddev.square().mean())
    except (NotImplementedError, AttributeError):
        return INITIAL_SPREAD
    return variance**0.5 if 0 < variance < float("inf") else INITIAL_SPREAD


def cold_parameters(program: Program, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Cold parameters of all blocks row by row, ``(R, M, P)``."""
    layout = Layout(program.rows, program.latents)
    return {block.name: layout.to_rows(initial_parameters(block), block.site) for block in blocks}
