"""Sparse priors of a program, peeled off and read from their distributions (19.14)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.quadratic import collapsed
from pyro_ext.sites import Kind, Site, base_of

SPARSE = dist.Laplace, dist.Exponential, dist.HalfNormal
"""Priors whose logarithm is a multiple of |h - loc|, or falls from a bound at 0."""


def sparse_sites(program: Program) -> frozenset[str]:
    """Latents whose prior is one of `SPARSE` and depends on no other latent, by name."""
    return frozenset(
        site.name
        for site in program.latents
        if isinstance(base_of(site.fn), SPARSE)
        and program.trace.nodes[site.name]["mask"] is None
        and not _is_masked(site.fn)
        and not program.latent_parents(site.name)
    )


def is_laplace(site: Site) -> bool:
    """Whether the prior of a site has a kink."""
    return isinstance(base_of(site.fn), dist.Laplace)


def laplace_sites(program: Program) -> frozenset[str]:
    """Latents with a Laplace prior that depends on no other latent, by name."""
    return frozenset(name for name in sparse_sites(program) if is_laplace(program.site(name)))


def penalty_layout(program: Program, names: frozenset[str]) -> Layout:
    """The latents of a row in one vector, where positive ones among `names` are read as they are, not as logarithms."""
    sites = [
        replace(site, kind=Kind.REAL) if site.name in names and site.kind is Kind.CONSTRAINED else site
        for site in program.latents
    ]
    return Layout(program.rows, sites)


@dataclass(frozen=True)
class Penalties:
    r"""The sparse priors of a program at its present theta.

    .. math:: \log p(h) = constant - \sum_i rate_i |h_i - shift_i| - \tfrac12 \sum_i curvature_i h_i^2

    Attributes:
        names: the sites.
        layout: where each latent stands in a row's vector; positive ones are read as they are.
        constant: shape ``(R,)``, nats.
        rate: shape ``(F,)`` where all rows share it, else ``(R, F)``, nats per unit; 0 for the other latents.
        shift: shape ``(F,)`` or ``(R, F)``.
        curvature: shape ``(F,)`` or ``(R, F)``: that of half-normal priors.
        nonnegative: boolean ``(F,)``; None where no latent is bounded.
    """

    names: frozenset[str]
    layout: Layout
    constant: Tensor
    rate: Tensor
    shift: Tensor
    curvature: Tensor
    nonnegative: Tensor | None

    @classmethod
    def read(cls, program: Program, names: frozenset[str], layout: Layout, fns: Mapping[str, Any]) -> Penalties:
        """Read the priors of some sites from the distributions that they had in a run."""
        number = program.number
        constant = number.new_zeros(program.rows.count)
        parts: dict[str, list[Tensor]] = {"rate": [], "shift": [], "curvature": []}
        bounded: list[Tensor] = []
        for site in layout.sites:
            size = layout.copies(site) * site.num_features
            base = base_of(fns[site.name]) if site.name in names else None
            bounded.append(torch.full((size,), isinstance(base, dist.Exponential | dist.HalfNormal)))
            if base is None:
                for pieces in parts.values():
                    pieces.append(number.new_zeros(size))
                continue
            scale = _over_events(program.trace.nodes[site.name]["scale"] / program.rows.scale, fns[site.name])
            found, at_mode = _coefficients(base)
            for name, pieces in parts.items():
                weight = 1 if name == "shift" else scale
                pieces.append(_to_vector(found[name] * weight, site, fns[site.name], layout))
            whole = _expanded(at_mode * scale, site, fns[site.name])
            constant = constant + layout.to_rows(whole, site).sum((-1, -2))
        nonnegative = torch.cat(bounded).to(number.device)
        joined = {name: _joined(pieces, program.rows.count) for name, pieces in parts.items()}
        return cls(names, layout, constant, **joined, nonnegative=nonnegative if bool(nonnegative.any()) else None)


def _over_events(scale: Tensor | float, fn: Any) -> Tensor | float:
    """The scale of a site, which has a batch shape where it has one, so that it broadcasts against single entries."""
    return scale.reshape(scale.shape + (1,) * len(fn.event_shape)) if isinstance(scale, Tensor) else scale


def _is_masked(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def _coefficients(base: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Rate, shift and curvature of a prior, and its log-density at the mode."""
    # Expanded numbers stay few.
    scale = collapsed((base.rate if isinstance(base, dist.Exponential) else base.scale).detach())
    zero = torch.zeros_like(scale)
    if isinstance(base, dist.Laplace):
        return {"rate": 1 / scale, "shift": collapsed(base.loc.detach()), "curvature": zero}, -(2 * scale).log()
    if isinstance(base, dist.Exponential):
        return {"rate": scale, "shift": zero, "curvature": zero}, scale.log()
    return {"rate": zero, "shift": zero, "curvature": scale.pow(-2)}, 0.5 * math.log(2 / math.pi) - scale.log()


def _expanded(value: Tensor | float, site: Site, fn: Any) -> Tensor:
    """A quantity of each entry of a site, ``batch + (num_features,)``; the fn of a run may lack plates of size 1."""
    shape = fn.batch_shape + fn.event_shape
    value = torch.as_tensor(value).expand(shape).reshape(fn.batch_shape + (-1,))
    return value.expand(site.batch_shape + value.shape[-1:])


def _to_vector(value: Tensor, site: Site, fn: Any, layout: Layout) -> Tensor:
    """A quantity of each entry in a row's vector: ``(M * F,)`` where all rows share it, else ``(R, M * F)``."""
    rows = layout.to_rows(_expanded(value, site, fn), site).flatten(1).detach()
    same = rows.stride(0) == 0 or len(rows) == 1 or bool((rows == rows[:1]).all())
    return rows[0].contiguous() if same else rows


def _joined(pieces: list[Tensor], count: int) -> Tensor:
    if all(piece.dim() == 1 for piece in pieces):
        return torch.cat(pieces)
    return torch.cat([p if p.dim() == 2 else p.expand(count, -1) for p in pieces], -1)
