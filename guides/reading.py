"""What the encoders of a guide read: rows of the data, and features of the sites that depend on a latent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.rows import Rows, is_visible, sample_sites
from pyro_ext.sites import Kind, Plate, Site
from pyro_ext.visible_data import hidden_entries


@dataclass(frozen=True)
class Structure:
    """What a guide needs to know of one signature of the arguments.

    Attributes:
        rows: the rows of the data: global latents do not take their row away.
        latents: the latent sites by name.
        visible: the visible sites that depend on a latent.
        hidden: where a mask hides their values, None where nothing is hidden.
        program: the program that this was read from.
    """

    rows: Rows
    latents: dict[str, Site]
    visible: dict[str, Site]
    hidden: dict[str, Tensor | None]
    program: Program
    _layouts: dict[str, Layout] = field(default_factory=dict, repr=False)

    @property
    def lasts(self) -> bool:
        """Whether it holds for all calls of the signature: given subsamples and masks may change."""
        return not self.program.explicit_plates and all(mask is None for mask in self.hidden.values())

    @cached_property
    def is_plain(self) -> bool:
        """Whether the rows are the only plate: values ``leading + (R,) + event`` are rows as they are."""
        return self.rows.nesting == 1 and len(self.rows.dims) == 1

    @cached_property
    def frames(self) -> tuple[Plate, ...]:
        """The plates of the latents, each once."""
        found: dict[str, Plate] = {}
        for site in self.latents.values():
            for frame in site.frames:
                found.setdefault(frame.name, frame)
        return tuple(found.values())

    @cached_property
    def explicit(self) -> dict[str, Tensor]:
        """Indices of the plates that the model was given by ``subsample=``."""
        return {name: i for name, i in self.program.indices.items() if name in self.program.explicit_plates}

    @cached_property
    def full_sizes(self) -> dict[str, int]:
        """Number of all elements of each plate of the visible sites."""
        return {f.name: f.full_size for site in self.visible.values() for f in site.frames}

    def layout(self, site: Site) -> Layout:
        """The layout of one site in the rows."""
        found = self._layouts.get(site.name)
        if found is None:
            found = self._layouts[site.name] = Layout(self.rows, [site])
        return found

    def to_rows(self, site: Site, features: Tensor) -> Tensor:
        """Features ``leading + batch + (X,)`` of a site as rows ``leading + (R, M * X)``."""
        if self.is_plain and features.dim() > 1 and features.shape[-2] == self.rows.count:
            return features
        batch = len(site.batch_shape)
        leading = features.shape[: features.dim() - 1 - batch]
        ones = (1,) * (self.rows.nesting - batch)
        features = features.reshape(leading + ones + features.shape[len(leading) :])
        piece = self.layout(site).to_rows(features, site)
        return piece.reshape(piece.shape[:-2] + (-1,))

    def from_rows(self, site: Site, output: Tensor) -> Tensor:
        """Rows ``leading + (R, M * P)`` as parameters of a site, ``leading + batch + (P,)``."""
        if self.is_plain and len(site.batch_shape) == 1:
            return output
        output = output.reshape(output.shape[:-1] + (self.layout(site).copies(site), -1))
        params = self.layout(site).from_rows(output, site)
        if output.dim() > 3 and self.rows.nesting > len(site.batch_shape):
            params = params.reshape(output.shape[:-3] + tuple(site.batch_shape) + params.shape[-1:])
        return params


@dataclass(frozen=True)
class Reading:
    """One call of a guide.

    Attributes:
        structure: what its signature tells.
        features: the features of each visible site that is read, ``batch + (X,)``.
        context: further arguments that every encoder reads, ``(R, C)``.
    """

    structure: Structure
    features: dict[str, Tensor]
    context: Tensor | None = None

    def encoder_input(self, sources: Sequence[str], values: Mapping[str, Tensor], points: Collection[str]) -> Tensor:
        """Features that an encoder reads, ``leading + (R, num_inputs)``.

        Args:
            sources: the sites that it reads, in order; context follows them.
            values: draws of those that are latent.
            points: names of the latents whose factors are points.
        """
        pieces: list[Tensor] = []
        for source in sources:
            if source in self.features:
                site, features = self.structure.visible[source], self.features[source]
            else:
                site = self.structure.latents[source]
                # The features of a sparse code hold the logarithm of 0.
                value, is_point = values[source], source in points
                features = visible_features(site, value, None) if is_point else site.to_features(value)
            pieces.append(self.structure.to_rows(site, features))
        if self.context is not None:
            pieces.append(self.context)
        if len(pieces) == 1:
            return pieces[0]
        leading = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(leading + piece.shape[-1:]) for piece in pieces], -1)


def structure_of(program: Program, data: tuple[str, ...]) -> Structure:
    """Rows of the data and the latents of a traced program.

    Args:
        program: the program.
        data: names of its visible sites that depend on a latent, see `data_sites`.
    """
    nodes = dict(sample_sites(program.trace))
    visible = {name: Site.from_message(name, nodes[name]) for name in data if name in program.visible}
    latents = {site.name: site for site in program.latents}
    stacks = [{f.name: f for f in site.frames} for site in visible.values()]
    common = [frame for name, frame in stacks[0].items() if all(name in stack for stack in stacks)]
    # A latent of the columns, not the rows, of a data matrix is global: the data plate is subsampled or outermost.
    common.sort(key=lambda f: f.name not in program.indices)
    holding = ([s for s in program.latents if any(f.name == frame.name for f in s.frames)] for frame in common)
    local = next((sites for sites in holding if sites), [])
    frames = [frame for frame in common if all(frame.name in {f.name for f in site.frames} for site in local)]
    frames.sort(key=lambda f: f.dim)
    rows = Rows(
        tuple(f.name for f in frames),
        tuple(f.dim for f in frames),
        torch.Size(f.size for f in frames),
        1.0,
        program.rows.nesting,
    )
    hidden = {name: hidden_entries(nodes[name]) for name in visible}
    return Structure(rows, latents, visible, hidden, program)


def data_sites(program: Program) -> tuple[str, ...]:
    """The visible sites that depend on a latent: what else is observed (held priors, say) tells nothing of one.

    Raises:
        ValueError: nothing but factors is observed.
    """
    nodes = dict(sample_sites(program.trace))
    visible = [name for name in program.visible if is_visible(nodes[name])]
    if not visible:
        raise ValueError(
            f"Expected visible data for an encoder to read, but got only the factors {list(program.visible)}. "
            "Use MeanField, whose tables read nothing."
        )
    latents = {site.name for site in program.latents}
    return tuple(name for name in visible if program.dependencies.get(name, set()) & latents) or tuple(visible)


def local_sites(program: Program, structure: Structure) -> set[str]:
    """The latents inside the data's plates, which get an encoder each."""
    rows = set(structure.rows.names)
    return {site.name for site in program.latents if rows <= {frame.name for frame in site.frames}}


def readers(name: str, program: Program, structure: Structure, local: set[str]) -> tuple[str, ...]:
    """The sites that a latent's encoder reads: those that depend on it and can be read, else all visible ones."""
    children = [child for child, parents in program.dependencies.items() if name in parents]
    return tuple(c for c in children if c in structure.visible or c in local) or tuple(structure.visible)


def visible_features(site: Site, value: Tensor, hidden: Tensor | None) -> Tensor:
    """A visible value as numbers for a network, ``batch + (X,)``: classes as indicators, what a mask hides as 0."""
    if hidden is not None:
        hidden = hidden.expand(value.shape)
        value = value.masked_fill(hidden, 0)
    if site.kind is not Kind.CATEGORICAL:
        batch = value.shape[: value.dim() - len(site.event_shape)]
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        return value if len(site.event_shape) == 1 else value.reshape(batch + (-1,))
    features = site.to_features(value)
    if hidden is None:
        return features
    off = hidden.reshape(features.shape[:-1] + (-1,)).repeat_interleave(site.unit_size, -1)
    return features.masked_fill(off, 0)
