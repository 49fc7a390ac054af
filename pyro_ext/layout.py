"""Layout: where each latent feature of a row stands in one flat vector per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_ext.rows import Rows
from pyro_ext.sites import Site


class Layout:
    """Maps between batch-shaped tensors of sites and one matrix with a row per datum.

    A site stands in the row plates and perhaps in inner plates; its M inner elements of F features
    each take M * F entries of the row's vector, ordered site by site.

    Args:
        rows: the rows of the program.
        sites: the latent sites in order.

    Attributes:
        num_features: length of a row's vector.
    """

    def __init__(self, rows: Rows, sites: Sequence[Site]) -> None:
        self.rows = rows
        self.sites = tuple(sites)
        self.offsets: dict[str, int] = {}
        self.num_features = 0
        for site in self.sites:
            self.offsets[site.name] = self.num_features
            self.num_features += self.copies(site) * site.num_features

    def _inner_dims(self) -> list[int]:
        return [d for d in range(-self.rows.nesting, 0) if d not in self.rows.dims]

    def _padded(self, site: Site) -> torch.Size:
        return torch.Size((1,) * (self.rows.nesting - len(site.batch_shape)) + tuple(site.batch_shape))

    def copies(self, site: Site) -> int:
        """Number of elements of the site's inner plates, M."""
        padded = self._padded(site)
        return math.prod(padded[d] for d in self._inner_dims())

    def to_rows(self, value: Tensor, site: Site) -> Tensor:
        """Reshape ``leading + batch + (X,)`` to ``leading + (R, M, X)``."""
        nesting = self.rows.nesting
        depth = min(value.dim() - 1, nesting)
        leading = value.shape[: value.dim() - 1 - depth]
        batch = value.shape[len(leading) : -1]
        value = value.reshape(leading + (1,) * (nesting - depth) + batch + value.shape[-1:])
        value = value.expand(leading + self._padded(site) + value.shape[-1:])
        first = len(leading)
        order = [first + nesting + d for d in self.rows.dims] + [first + nesting + d for d in self._inner_dims()]
        value = value.permute(*range(first), *order, value.dim() - 1)
        return value.reshape(leading + (self.rows.count, self.copies(site), value.shape[-1]))

    def from_rows(self, value: Tensor, site: Site) -> Tensor:
        """Reshape ``leading + (R, M, X)`` to ``leading + batch + (X,)``, the inverse of `to_rows`.

        With leading dimensions the batch is padded to the program's nesting, so that they stand
        left of all its plates.
        """
        nesting = self.rows.nesting
        leading = value.shape[:-3]
        padded = self._padded(site)
        inner = self._inner_dims()
        sizes = [padded[d] for d in self.rows.dims] + [padded[d] for d in inner]
        value = value.reshape(leading + tuple(sizes) + value.shape[-1:])
        first = len(leading)
        order = [nesting + d for d in self.rows.dims] + [nesting + d for d in inner]
        inverse = [first + order.index(d) for d in range(nesting)]
        value = value.permute(*range(first), *inverse, value.dim() - 1)
        if not leading:
            value = value.reshape(tuple(site.batch_shape) + value.shape[-1:])
        return value

    def indices(self, site: Site, components: Sequence[int]) -> Tensor:
        """Positions in a row's vector of some features of a site, shape ``(M, len(components))``."""
        copies = torch.arange(self.copies(site))[:, None] * site.num_features
        return self.offsets[site.name] + copies + torch.as_tensor(components, dtype=torch.long)[None, :]

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """Split vectors ``leading + (R, num_features)`` into a value for every site."""
        result = {}
        for site in self.sites:
            start = self.offsets[site.name]
            size = self.copies(site) * site.num_features
            part = flat[..., start : start + size]
            part = part.reshape(part.shape[:-1] + (self.copies(site), site.num_features))
            result[site.name] = site.from_features(self.from_rows(part, site))
        return result

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join a value of every site into vectors ``leading + (R, num_features)``."""
        parts = []
        for site in self.sites:
            part = self.to_rows(site.to_features(values[site.name]), site)
            parts.append(part.reshape(part.shape[:-2] + (-1,)))
        return torch.cat(parts, -1)
