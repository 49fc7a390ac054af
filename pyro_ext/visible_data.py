"""The values of visible sites: refused where they cannot be, filled in where a mask hides them."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.rows import is_visible, sample_sites


def hidden_entries(site: Any) -> Tensor | None:
    """Where a mask hides the values of a visible site, broadcastable to them; None where nothing is hidden."""
    fn = site["fn"]
    masks = [(site["mask"], len(fn.event_shape))]
    while isinstance(fn, dist.MaskedDistribution | torch.distributions.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    # A distribution may itself leave entries of its event out.
    masks.append((getattr(fn, "observed", None), 0))
    hidden: Tensor | None = None
    for mask, events in masks:
        if mask is None or mask is True:
            continue
        off = ~torch.as_tensor(mask)
        # A mask has the shape of the batch where it stands: an event is hidden as a whole.
        off = off.reshape(off.shape + (1,) * events)
        hidden = off if hidden is None else hidden | off
    return hidden


def check_visible(trace: Trace) -> None:
    """Refuse visible values that are not finite, or outside the support of their distribution.

    Entries that a mask hides are not looked at.

    Raises:
        ValueError: naming the site, how many entries are bad, and the first of them.
    """
    for name, site in sample_sites(trace):
        value = site["value"]
        if not is_visible(site) or not isinstance(value, Tensor):
            continue
        hidden = hidden_entries(site)
        bad = ~torch.isfinite(value) if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
        if hidden is not None:
            bad = bad & ~hidden
        if bool(bad.any()):
            raise ValueError(
                f"Expected finite values at the visible site {name!r}, but got {_first(value, bad)}. "
                "Remove them, or hide them with `poutine.mask` or `obs_mask`."
            )
        if value.numel() == 0:
            raise ValueError(
                f"Expected data at the visible site {name!r}, but got an empty tensor of shape {tuple(value.shape)}. "
                "Pass at least one row."
            )
        _check_support(name, site["fn"], value, hidden)


def _check_support(name: str, fn: Any, value: Tensor, hidden: Tensor | None) -> None:
    if hidden is not None:
        # An event may be hidden in part: a draw stands in for what is.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value = torch.where(hidden, fn.sample().to(value.dtype), value)
    try:
        inside = fn.support.check(value)
    except (NotImplementedError, AttributeError):
        return
    if bool(inside.all()):
        return
    base = fn
    while isinstance(base, dist.MaskedDistribution | torch.distributions.Independent):
        base = base.base_dist
    outside = ~inside
    outside = outside.reshape(outside.shape + (1,) * (value.dim() - outside.dim())).expand(value.shape)
    pointwise = getattr(base.support, "check", None)
    if pointwise is not None and base.support.event_dim == 0:
        outside = outside & ~base.support.check(value)
    raise ValueError(
        f"Expected values of the visible site {name!r} in the support of {type(base).__name__} ({base.support}), "
        f"but got {_first(value, outside)}. Correct the data, or the likelihood."
    )


def _first(value: Tensor, bad: Tensor) -> str:
    position = tuple(int(i) for i in bad.nonzero()[0])
    where = f" at {position}" if position else ""
    return f"{float(value[position]):g}{where} ({int(bad.sum())} of {value.numel()} entries)"


def filled(value: Any, site: Any) -> Any:
    """The value with hidden non-finite entries replaced by a draw, so that they reach no gradient."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    hidden = hidden_entries(site)
    if hidden is None or getattr(site["fn"], "observed", None) is not None or bool(torch.isfinite(value).all()):
        return value
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        safe = site["fn"].sample()
    # Values have no dimension of particles; one draw serves them all.
    safe = safe[(0,) * (safe.dim() - value.dim())]
    return torch.where(hidden & ~torch.isfinite(value), safe.to(value), value)
