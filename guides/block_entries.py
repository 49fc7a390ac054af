"""The grammar of blocks: which units of which sites stand together, joined fully or along a tree."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from pyro_ext.forest import parents_of
from pyro_ext.program import Program
from pyro_ext.sites import Site

Entry = str | tuple[str, Sequence[int]]
"""A site, or a site and the positions of some of its units."""

Parts = tuple[tuple[Site, tuple[int, ...]], ...]
"""The features of each site in a block, in the order of the program."""

Edges = tuple[tuple[int, int], ...]


class Tree:
    """A block of discrete units whose dependence under q is a tree (or several): `TreeFactor`.

    Args:
        entries: the units, as in a plain block: site names, or ``(site name, unit positions)``.
        edges: pairs of units that depend on each other directly, numbered from 0 in the order in which they are
            listed. None finds the forest of the strongest couplings: the program must be quadratic in its latents.

    Raises:
        ValueError: entries that name no units, or edges that are no pairs of numbers or close a cycle.

    Example:
        >>> Tree([("h", [0, 1, 2, 3])], edges=[(0, 1), (1, 2), (1, 3)])
        Tree([('h', [0, 1, 2, 3])], edges=[(0, 1), (1, 2), (1, 3)])
    """

    def __init__(self, entries: Sequence[Entry], edges: Sequence[tuple[int, int]] | None = None) -> None:
        self.entries = _read_list(entries)
        self.edges = None if edges is None else _read_edges(edges)

    @classmethod
    def chain(cls, entries: Sequence[Entry]) -> Chain:
        """Units that depend on each other one after the other, in the order in which they are listed.

        Example:
            >>> Tree.chain(["a", "c"])
            Tree.chain(['a', 'c'])
        """
        return Chain(entries)

    @property
    def finds_edges(self) -> bool:
        """Whether the edges are left to the couplings of the program."""
        return self.edges is None

    def edges_of(self, num_units: int) -> Edges:
        """The edges between the listed units, once their number is known."""
        return () if self.edges is None else self.edges

    def __repr__(self) -> str:
        edges = "" if self.edges is None else f", edges={list(self.edges)}"
        return f"Tree({_shown(self.entries)}{edges})"


class Chain(Tree):
    """A tree whose edges join each listed unit with the next; see `Tree.chain`."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)

    @property
    def finds_edges(self) -> bool:
        """False: the order of the units gives the edges."""
        return False

    def edges_of(self, num_units: int) -> Edges:
        """Each unit and the next."""
        return tuple((unit, unit + 1) for unit in range(num_units - 1))

    def __repr__(self) -> str:
        return f"Tree.chain({_shown(self.entries)})"


Read = list[tuple[str, tuple[int, ...] | None]]
"""The entries of one block as (site, units); None stands for all units of a site."""


def read_blocks(blocks: Any) -> list[Read | Tree]:
    """The blocks as the user gave them, checked as far as that is possible without the program.

    Raises:
        ValueError: blocks that are not lists of entries.
    """
    if not _is_list(blocks):
        raise ValueError(
            f'Expected blocks to be a list of blocks, but got {blocks!r}. Write [["a", "c"], [("h", [0])]].'
        )
    return [block if isinstance(block, Tree) else _read_list(block) for block in blocks]


def _read_list(block: Any) -> Read:
    if not _is_list(block) or not len(block):
        raise ValueError(
            f'Expected a block to be a list of sites, but got {block!r}. Write ["a", "c"] or [("h", [0])].'
        )
    return [_read_entry(entry) for entry in block]


def _read_entry(entry: Any) -> tuple[str, tuple[int, ...] | None]:
    if isinstance(entry, str):
        return entry, None
    try:
        name, units = entry
        positions = tuple(operator.index(unit) for unit in units if not isinstance(unit, bool))
    except (TypeError, ValueError):
        name, units, positions = None, (), ()
    if not isinstance(name, str) or not positions or len(positions) != len(units):
        raise ValueError(
            f"Expected a site name or (site name, unit positions) in a block, but got {entry!r}. "
            'Write "a", or ("h", [0, 3]).'
        )
    return name, positions


def _read_edges(edges: Any) -> Edges:
    try:
        found = tuple((operator.index(first), operator.index(second)) for first, second in edges)
    except (TypeError, ValueError):
        found = ((-1, -1),)
    if any(unit < 0 for edge in found for unit in edge):
        raise ValueError(
            f"Expected edges to be pairs of units counted from 0, but got {edges!r}. Write [(0, 1), (1, 2)]."
        )
    parents_of(1 + max((unit for edge in found for unit in edge), default=0), found)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(entries: Read) -> list[Any]:
    return [name if units is None else (name, list(units)) for name, units in entries]


def resolve_block(entries: Read, program: Program, taken: dict[str, set[int]]) -> tuple[Parts, list[int]]:
    """Check one block against the program, and note its features in ``taken``.

    Returns:
        The features of each site, in the order of the program, and the place in that order of each listed unit.

    Raises:
        ValueError: an unknown site or unit, units that are taken, or sites that cannot share a block.
    """
    listed: list[tuple[str, int]] = []
    chosen: dict[str, list[int]] = {}
    for name, units in entries:
        if name not in taken:
            known = ", ".join(repr(site.name) for site in program.latents)
            raise ValueError(f"Expected blocks over the latent sites {known}, but got {name!r}. Name a latent site.")
        site = program.site(name)
        num_units = site.num_features // site.unit_size
        for unit in range(num_units) if units is None else units:
            if not 0 <= unit < num_units:
                raise ValueError(
                    f"Expected units of {name!r} from 0 to {num_units - 1}, but got {unit}. "
                    "Count the units along the site's event."
                )
            listed.append((name, unit))
            for feature in range(unit * site.unit_size, (unit + 1) * site.unit_size):
                if feature in taken[name]:
                    raise ValueError(
                        f"Expected blocks that do not overlap, but got unit {unit} of {name!r} twice. Keep it in one."
                    )
                taken[name].add(feature)
                chosen.setdefault(name, []).append(feature)
    parts = tuple((site, tuple(sorted(chosen[site.name]))) for site in program.latents if site.name in chosen)
    _check_alike([site for site, _ in parts])
    places = {unit: place for place, unit in enumerate(units_of(parts))}
    return parts, [places[unit] for unit in listed]


def units_of(parts: Parts) -> list[tuple[str, int]]:
    """The units of a block in its own order, as (site, position)."""
    return [(s.name, c // s.unit_size) for s, components in parts for c in components[:: s.unit_size]]


def _check_alike(sites: list[Site]) -> None:
    if len({site.kind.is_discrete for site in sites}) > 1:
        names = ", ".join(f"{site.name!r} ({site.kind.value})" for site in sites)
        raise ValueError(f"Expected a block of discrete or of continuous sites, but got {names}. Split the block.")
    if len({tuple((f.name, f.dim) for f in site.frames) for site in sites}) > 1:
        names = ", ".join(f"{site.name!r} in {[f.name for f in site.frames]}" for site in sites)
        raise ValueError(f"Expected the sites of a block in the same plates, but got {names}. Split the block.")
