"""Sums over rows and steps of what two states of Markov chains do together, as M-steps need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.forward_backward import Smoothed
from pyro_ext.layout import Layout
from pyro_ext.markov_chain import joint_states
from pyro_ext.sites import Site

if TYPE_CHECKING:
    from pyro_ext.posterior import Posterior


def chain_block(posterior: Posterior, site: Site) -> tuple[Block, MarkovChainFactor]:
    """The block that holds a site of whole paths.

    Raises:
        ValueError: the site is no Markov chain under q.
    """
    for block in posterior.blocks:
        if block.span(site.name) is not None and isinstance(block.factor, MarkovChainFactor):
            return block, block.factor
    raise ValueError(
        f"Expected a site with a Markov-chain factor, but got {site.name!r} without one. Draw it from `MarkovChain` in "
        "the model, and use MeanField or Structured."
    )


def smoothed(posterior: Posterior, block: Block, factor: MarkovChainFactor) -> Smoothed:
    """The sums over paths of one block, row by row.

    Raises:
        ValueError: a row holds several paths of the block.
    """
    params = Layout(posterior.rows, posterior.sites).to_rows(posterior.conditioner(block, {}), block.site)
    if params.shape[1] != 1:
        raise ValueError(
            f"Expected one path of {block.site.name!r} in a row, but got {params.shape[1]}, in the plates "
            f"{[frame.name for frame in block.site.frames]}. Put the data in the same plates, or use `gram`."
        )
    return factor.smooth(params[:, 0])


def pair_sum(posterior: Posterior, site: Site, weights: Tensor | None = None) -> Tensor:
    """sum_n sum_t w_nt E[h_{n,t-1} h_nt'], shape ``(K, K)``, for weights ``(R, T - 1)``."""
    block, factor = chain_block(posterior, site)
    sums = smoothed(posterior, block, factor).pair_sum(weights)
    if len(factor.units) == 1:
        return sums
    number = [part.name for part, _ in block.parts].index(site.name)
    states = joint_states(factor.units, sums).split(factor.units, -1)[number]
    return states.mT @ sums @ states


def time_gram(posterior: Posterior, names: Sequence[str], weights: Tensor | None = None) -> Tensor:
    """sum_n sum_t w_nt E[g_nt g_nt'], shape ``(G, G)``: g joins the named chains' states at one step."""
    sites = [posterior[name].site for name in names]
    blocks = [chain_block(posterior, site) for site in sites]
    units = [site.event_shape[1] for site in sites]
    edges = {name: sum(units[:i]) for i, name in enumerate(names)}
    means: Tensor | None = None
    within: list[tuple[Tensor, Tensor]] = []
    for block, factor in {id(block): (block, factor) for block, factor in blocks}.values():
        chain = smoothed(posterior, block, factor)
        states = joint_states(factor.units, chain.marginals).split(factor.units, -1)
        wanted = [(edges[s.name], part) for (s, _), part in zip(block.parts, states, strict=True) if s.name in edges]
        features = torch.cat([part for _, part in wanted], -1)
        index = torch.cat([start + torch.arange(part.shape[-1]) for start, part in wanted])
        if means is not None and means.shape[1] != chain.marginals.shape[1]:
            raise ValueError(
                f"Expected chains of the same number of steps, but got {means.shape[1]} and {chain.marginals.shape[1]} "
                f"in {', '.join(map(repr, names))}. Ask for those of each length apart."
            )
        if means is None:
            means = chain.marginals.new_zeros(chain.marginals.shape[:2] + (sum(units),))
        means[..., index] = chain.marginals @ features
        weighted = chain.marginals if weights is None else chain.marginals * weights[..., None]
        within.append((index, features.mT @ (weighted.sum((0, 1))[:, None] * features)))
    if means is None:
        raise ValueError("Expected the name of at least one chain, but got none. Name the sites of whole paths.")
    weighted = means if weights is None else means * weights[..., None]
    result = weighted.flatten(0, 1).mT @ means.flatten(0, 1)
    for index, moments in within:
        # States of one block at the same step do not multiply: a chain is in one state at a time.
        result[index[:, None], index] = moments
    return result
