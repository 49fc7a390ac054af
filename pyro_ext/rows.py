"""Rows: the index of the plates that every visible and latent site of a program shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor


def sample_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Yield the visible and latent sites of a trace, without plates' indices and ``pyro.deterministic`` values."""
    for name, site in trace.nodes.items():
        # A deterministic value has no probability, and often stands outside the plates of what it is made from.
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample) and not _is_deterministic(site):
            yield name, site


def is_factor(site: Any) -> bool:
    """Whether a sample site is a ``pyro.factor`` statement: a term of log p that holds no value."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def is_visible(site: Any) -> bool:
    """Whether a sample site holds an observed value: neither a factor nor a ``pyro.deterministic`` value."""
    return bool(site["is_observed"]) and not is_factor(site) and not _is_deterministic(site)


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic"))


@dataclass(frozen=True)
class Rows:
    """The rows of a program: one index per element of the plates common to all its sites.

    Attributes:
        names: names of the common plates, from the leftmost batch dimension to the rightmost.
        dims: their (negative) batch dimensions, increasing; empty when the program has one row.
        shape: their sizes in this call (the batch, when subsampled).
        scale: product of full size / size over the common plates, N/B of a subsampled program.
        nesting: number of batch dimensions that the program's plates take.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     with pyro.plate("data", 5, dim=-2), pyro.plate("pixel", 3, dim=-1):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=torch.zeros(5, 3))
        >>> rows = Rows.from_trace(pyro.poutine.trace(model).get_trace())
        >>> rows.names, rows.dims, tuple(rows.shape)
        (('data', 'pixel'), (-2, -1), (5, 3))
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]
    shape: torch.Size
    scale: float
    nesting: int

    @classmethod
    def from_trace(
        cls, trace: Trace, *others: Trace, ignore: Iterable[str] = (), without: Collection[str] = ()
    ) -> Rows:
        """Find the rows of a traced program.

        Args:
            trace: trace of the model, observed sites included.
            others: traces of a guide, whose sites must stand in the rows' plates too.
            ignore: names of plates that are no data, such as a plate over particles.
            without: names of sites whose plates do not count.
        """
        ignored = set(ignore)
        found = {
            (number, name): {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name not in ignored}
            for number, t in enumerate((trace, *others))
            for name, site in sample_sites(t)
        }
        nesting = max((-f.dim for stack in found.values() for f in stack.values()), default=0)
        stacks = [stack for (_, name), stack in found.items() if name not in without]
        common = set.intersection(*(set(stack) for stack in stacks)) if stacks else set()
        frames = sorted((stacks[0][name] for name in common), key=lambda f: f.dim)
        scale = math.prod((f.full_size or f.size) / f.size for f in frames)
        return cls(
            names=tuple(f.name for f in frames),
            dims=tuple(f.dim for f in frames),
            shape=torch.Size(f.size for f in frames),
            scale=float(scale),
            nesting=nesting,
        )

    def at_full_size(self, sizes: Mapping[str, int]) -> Rows:
        """The rows of the whole data set, given the full size of each plate."""
        return replace(self, shape=torch.Size(sizes[name] for name in self.names), scale=1.0)

    @property
    def count(self) -> int:
        """Number of rows in this call."""
        return self.shape.numel()

    def sum_to_rows(self, value: Tensor) -> Tensor:
        """Sum a batch-shaped tensor over the plates inside a row.

        Args:
            value: shape ``leading + batch``, where ``batch`` spans at most ``nesting`` dimensions and
                ``leading`` (particles, enumerated states) is whatever stands left of them.

        Returns:
            Tensor of shape ``leading + rows.shape``.
        """
        if value.dim() < len(self.dims) or any(-d > value.dim() for d in self.dims):
            value = value.expand(torch.broadcast_shapes(value.shape, self._least_shape()))
        inner = [d for d in range(-min(self.nesting, value.dim()), 0) if d not in self.dims]
        summed = value.sum(inner) if inner else value
        leading = summed.shape[: summed.dim() - len(self.dims)]
        return summed.expand(leading + self.shape)

    def _least_shape(self) -> torch.Size:
        shape = [1] * (-min(self.dims))
        for dim, size in zip(self.dims, self.shape, strict=True):
            shape[dim] = size
        return torch.Size(shape)

    def log_prob(self, trace: Trace, *, observed: bool | None = None) -> Tensor:
        """Row-wise log-probability of a trace on which ``compute_log_prob`` was called.

        Masks are kept and the scale N/B of the row plates is divided out.

        Args:
            trace: a trace of model or guide with ``log_prob`` at every site.
            observed: only the visible sites (True), only the latent ones (False), or all (None).

        Returns:
            Tensor of shape ``leading + rows.shape``, nats.
        """
        total = torch.zeros(self.shape)
        started = False
        for _, site in sample_sites(trace):
            if observed is not None and bool(site["is_observed"]) != observed:
                continue
            term = self.sum_to_rows(site["log_prob"]) / self.scale
            total = term if not started else total + term
            started = True
        return total
