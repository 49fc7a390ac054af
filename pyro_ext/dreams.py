"""Dreams: rows (h', v') drawn from the model, and handed to the guide as if they were data (19.5.1)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_ext.arguments import VisibleArguments, find_visible
from pyro_ext.call_arguments import (
    Args,
    Kwargs,
    argument_names,
    is_same_program,
    leaves_of,
    root_of,
    unwrapped,
    with_leaves,
)
from pyro_ext.particles import log_prob
from pyro_ext.provenance import Path
from pyro_ext.rows import Rows, is_visible
from pyro_ext.sandbox import plate_indices
from pyro_ext.tracing import is_tracing


def draw_dream(model: Callable[..., Any], args: Args, kwargs: Kwargs) -> Trace:
    """Run a model unconditioned: one dream for each row of its arguments, without gradients.

    Covariates stay as they are; visible values are drawn anew. Buffers of the model, such as the running means of
    batch normalisation, are put back.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Delta(1 + h), obs=v)
        >>> dream = draw_dream(model, (torch.zeros(3),), {})
        >>> bool((visible_values(dream)["v"] == 1 + dream.nodes["h"]["value"]).all())
        True
    """
    with torch.no_grad(), poutine.block(), _buffers_kept(model):
        return poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)


def visible_values(dream: Trace) -> dict[str, Tensor]:
    """The dreamt value of each site that the model observes."""
    nodes: dict[str, Any] = dict(dream.nodes)
    return {
        name: site["value"]
        for name, site in nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed") and is_visible({**site, "is_observed": True})
    }


class HandOver:
    """How dreams reach a guide: through the very arguments that carry the data.

    A guide with the keyword ``observations={site: value}`` gets them there instead, if its model has none. The
    arguments are found at the first dream, and again when model or guide are others.

    Args:
        visible: the argument of a visible site where it cannot be found, ``{"site": "argument"}``.

    Raises:
        ValueError: at a dream, when no argument or more than one carries a visible site.
    """

    def __init__(self, visible: Mapping[str, str | int] | None = None) -> None:
        self.visible = visible
        self._found: tuple[Any, Any, VisibleArguments | None] | None = None

    def arguments(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> VisibleArguments | None:
        """The arguments that carry the visible sites; None where the guide takes ``observations``.

        Raises:
            ValueError: as above.
        """
        if not (self._found and is_same_program(self._found[0], model) and is_same_program(self._found[1], guide)):
            by_keyword = "observations" in argument_names(guide) and "observations" not in argument_names(model)
            self._found = (model, guide, None if by_keyword else find_visible(model, args, kwargs, self.visible))
        return self._found[2]  # pyright: ignore[reportOptionalSubscript]

    def to_guide(
        self, dream: Trace, model: Callable[..., Any], guide: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The guide's arguments with a dream of the same rows in place of the data, which are not touched."""
        found = self.arguments(model, guide, args, kwargs)
        if found is None:
            return args, {**kwargs, "observations": visible_values(dream)}
        return found.write(visible_values(dream), args, kwargs, plate_indices(dream))

    def resizable(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> tuple[str, Path] | None:
        """The visible site, and the way to its argument, of a model of this project that dreams any number of rows.

        That is a model with `dream` and ``forward(v, *, size=...)`` whose call holds its data and nothing else
        (a mask, say, speaks of the rows at hand). None for all other calls.
        """
        inner = unwrapped(model)
        if not callable(getattr(inner, "dream", None)) or "size" not in argument_names(inner):
            return None
        given = [path for path, leaf in leaves_of(args, kwargs).items() if leaf is not None]
        found = self.arguments(model, guide, args, kwargs)
        if found is None or len(given) != 1 or len(found.sites) != 1:
            return None
        (site,) = found.sites
        (path,) = given
        name = found.arguments[site]
        if name not in inspect.signature(inner.forward).parameters:
            return None
        return (site, path) if path == root_of(name, args, kwargs, argument_names(model, args, kwargs)) else None


def log_q_of_dreams(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    rows: Rows,
    hand_over: HandOver,
    num_dreams: int | None = None,
) -> Tensor:
    """log q(h' | v') of dreams (h', v') ~ p: a gradient to the guide's parameters, none to the model's.

    Dreams beyond the number of rows are further passes over the same arguments; of the last pass a random part is
    taken, for rows may differ in their covariates. A model of this project draws them all in one pass instead.

    Args:
        model: any Pyro model that can be sampled.
        guide: a guide that gives any dream a density.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        rows: rows of the model at these arguments.
        hand_over: how the guide gets to see the dreams.
        num_dreams: how many; None for one a row.

    Returns:
        Tensor of shape (num_dreams,), nats.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 0.01), obs=v)
        >>> def guide(v):
        ...     with pyro.plate("data", len(v)):
        ...         pyro.sample("h", dist.Bernoulli(v.round().clamp(0.25, 0.75)))
        >>> v = torch.zeros(2)
        >>> rows = Rows.from_trace(poutine.trace(model).get_trace(v), poutine.trace(guide).get_trace(v))
        >>> log_q_of_dreams(model, guide, (v,), {}, rows, HandOver(), 3)
        tensor([-0.2877, -0.2877, -0.2877])
    """
    count = rows.count if num_dreams is None else num_dreams
    if count != rows.count:
        carried = hand_over.resizable(model, guide, args, kwargs)
        if carried is not None:
            return _resized(model, guide, args, kwargs, carried, count)
    passes: list[Tensor] = []
    for begin in range(0, count, rows.count):
        dream = draw_dream(model, args, kwargs)
        trace = _guide_at(dream, guide, *hand_over.to_guide(dream, model, guide, args, kwargs))
        log_q = log_prob(trace, rows).reshape(-1)
        if count - begin < rows.count:
            log_q = log_q[torch.randperm(rows.count, device=log_q.device)[: count - begin]]
        passes.append(log_q)
    return torch.cat(passes)


def _resized(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    carried: tuple[str, Path],
    count: int,
) -> Tensor:
    site, path = carried
    with torch.no_grad(), poutine.block(), _buffers_kept(model):
        dream = poutine.trace(model).get_trace(size=count)
    given: Tensor = leaves_of(args, kwargs)[path]
    nodes: dict[str, Any] = dict(dream.nodes)
    trace = _guide_at(dream, guide, *with_leaves(args, kwargs, {path: nodes[site]["value"].to(given)}))
    return log_prob(trace, Rows.from_trace(dream, trace)).reshape(-1)


def _guide_at(dream: Trace, guide: Callable[..., Any], args: Args, kwargs: Kwargs) -> Trace:
    return poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*args, **kwargs)


@contextmanager
def _buffers_kept(model: Callable[..., Any]) -> Generator[None, None, None]:
    """Put a module's buffers back where running it has written to them."""
    inner = unwrapped(model)
    # Running means are written without a count of versions.
    before = [(b, b.clone()) for b in inner.buffers()] if isinstance(inner, nn.Module) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if is_tracing() or not torch.equal(buffer, value):
                    buffer.copy_(value)
