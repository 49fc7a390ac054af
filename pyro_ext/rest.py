"""What is left of log p(v, h) once the priors are peeled off: its value and gradient at h = 0."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.selected import Selected
from pyro_ext.sites import Site
from pyro_ext.visible_data import filled


@dataclass(frozen=True)
class Rest:
    """The rest of a program at h = 0.

    Attributes:
        constant: its value ``(R,)``, nats.
        linear: its gradient ``(R, F)``, with the graph to the origin where it has one.
        differentiated: the part of the gradient that depends on h, for Hessian-vector products; None when the rest is
            linear by construction: every site of it is `Selected` by a latent's own value.
        fns: the distribution that each site had in the run.
    """

    constant: Tensor
    linear: Tensor
    differentiated: Tensor | None
    fns: dict[str, Any]


class _Reader:
    """Takes sites of which log p is linear in h by construction, so that nothing need be differentiated."""

    def __init__(self, program: Program, layout: Layout, origin: Tensor, create_graph: bool) -> None:
        self.program, self.layout, self.create_graph = program, layout, create_graph
        self.values = layout.values(origin)
        self.linear: list[tuple[Site, Tensor]] = []

    def __call__(self, message: Any) -> bool:
        """Read a site's coefficients; False when it is none of these."""
        fn, mask = message["fn"], None
        if message["mask"] is not None or not message["is_observed"]:
            return False
        while isinstance(fn, dist.MaskedDistribution | torch.distributions.Independent):
            if isinstance(fn, dist.MaskedDistribution):
                if mask is not None or not isinstance(fn._mask, Tensor) or not isinstance(fn.base_dist, Selected):
                    return False
                mask = fn._mask
            fn = fn.base_dist
        if not isinstance(fn, Selected):
            return False
        site = next((s for s in self.layout.sites if self.values[s.name] is fn.h), None)
        if site is None:
            return False
        # The components may themselves depend on another latent, where there is one.
        if len(self.program.latents) > 1 and self.program.latent_parents(message["name"]) != {site.name}:
            return False
        value = message["value"]
        if mask is not None:
            value = _with_visible(value, mask, len(fn.event_shape))
        with torch.set_grad_enabled(self.create_graph):
            found = fn.coefficients(filled(value, message))
        if mask is not None:
            found = torch.where(mask[..., None], found, 0)
        scale = message["scale"] / self.program.rows.scale
        if isinstance(scale, Tensor):
            found = found * scale[..., None]
        elif scale != 1:
            found = found * scale
        self.linear.append((site, found.reshape(tuple(site.batch_shape) + (site.num_features,))))
        return True


def _with_visible(value: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """The values with hidden ones replaced by the first that counts: hidden ones may be NaN, or outside the support."""
    batch = value.shape[: value.dim() - event_dim]
    mask = mask.expand(batch)
    first = value.reshape((-1,) + value.shape[len(batch) :])[mask.reshape(-1).to(torch.uint8).argmax()]
    return torch.where(mask.reshape(batch + (1,) * event_dim), value, first)


def read_rest(
    program: Program, layout: Layout, origin: Tensor, peeled: Collection[str], *, create_graph: bool = False
) -> Rest:
    """The rest of a program at the origin ``(R, F)``, whose sites in `peeled` are left out."""
    reader = _Reader(program, layout, origin, create_graph)
    total, fns = program.evaluate_unread(reader.values, skip=peeled, read=reader)
    count = program.rows.count
    pieces: list[Tensor | None] = [None] * len(layout.sites)
    for site, found in reader.linear:
        number = layout.sites.index(site)
        rows = layout.to_rows(found, site).reshape(count, -1)
        known = pieces[number]
        pieces[number] = rows if known is None else known + rows
    differentiated: Tensor | None = None
    if total is None:
        constant = torch.zeros(count, dtype=origin.dtype, device=origin.device)
    else:
        constant = total.reshape(count)
        differentiated = gradient_of(constant.sum(), origin)
    if not reader.linear:
        linear = torch.zeros_like(origin) if differentiated is None else differentiated
        return Rest(constant, linear, differentiated, fns)
    sizes = [layout.copies(site) * site.num_features for site in layout.sites]
    filled_in = [
        origin.new_zeros(count, size) if piece is None else piece for piece, size in zip(pieces, sizes, strict=True)
    ]
    linear = filled_in[0] if len(filled_in) == 1 else torch.cat(filled_in, -1)
    return Rest(constant, linear if differentiated is None else linear + differentiated, differentiated, fns)


def gradient_of(total: Tensor, origin: Tensor) -> Tensor:
    """The gradient at the origin, with its graph; zeros where nothing depends on it."""
    if not total.requires_grad:
        return torch.zeros_like(origin)
    return _or_zeros(torch.autograd.grad(total, origin, create_graph=True, allow_unused=True), origin)


def gradient_at(total: Tensor, x: Tensor) -> Tensor:
    """The gradient at x without its graph; zeros where nothing depends on it."""
    if not total.requires_grad:
        return torch.zeros_like(x)
    return _or_zeros(torch.autograd.grad(total, x, allow_unused=True), x)


def hessian_product(linear: Tensor | None, origin: Tensor, directions: Tensor, *, create_graph: bool = True) -> Tensor:
    """The Hessian of every row times a direction of that row, from the gradient; zeros where there is none."""
    if linear is None or not linear.requires_grad:
        return torch.zeros_like(origin)
    found = torch.autograd.grad(
        linear, origin, directions, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return _or_zeros(found, origin)


def _or_zeros(found: tuple[Tensor | None, ...], origin: Tensor) -> Tensor:
    return torch.zeros_like(origin) if found[0] is None else found[0]
