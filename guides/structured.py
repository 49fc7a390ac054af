"""Guides with blocks of latents that keep their dependence (19.4, Saul & Jordan 1996)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from pyro_ext.blocks import Block
from pyro_ext.continuous_factors import MultivariateNormalFactor
from pyro_ext.discrete_factors import JointFactor
from pyro_ext.evaluators import MAX_STATES
from pyro_ext.factors import Factor
from pyro_ext.guides.mean_field import mean_field_factor
from pyro_ext.guides.tables import TableGuide
from pyro_ext.program import Program
from pyro_ext.sites import Site
from pyro_ext.states import num_states

Entry = str | tuple[str, Sequence[int]]
"""A site, or a site and the positions of some of its units."""


class Structured(TableGuide):
    """q as a product of joint factors, one a block; latents outside every block stay on their own.

    Discrete blocks hold a table over all joint states, continuous ones one Gaussian on the real line. Blocks
    may cross sites and may cut through a site's units; each site is still one Pyro site with a true
    density, drawn given the block's earlier sites.

    Args:
        model: any Pyro model.
        blocks: lists of entries, each a site name or ``(site name, unit positions)``, such as
            ``[["a", "c"], [("h", [0, 3])]]``. None joins all discrete latents of the same plates in one
            block, and all continuous ones in another.
        max_states: most joint states of one block.
        name: name of the guide's parameters.

    Raises:
        ValueError: for blocks that are not lists of entries; at the first call, for blocks that overlap, name an
            unknown site or unit, mix discrete with continuous sites or sites of different plates, or have too
            many states.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.2).expand([3]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1), 0.1), obs=v)
        >>> guide = Structured(model, blocks=[[("h", [0, 1])]])
        >>> guide.posterior(torch.ones(5)).blocks[0].factor.num_params
        4
    """

    def __init__(
        self,
        model: Callable[..., Any],
        blocks: Sequence[Sequence[Entry]] | None = None,
        *,
        max_states: int = MAX_STATES,
        name: str | None = None,
    ) -> None:
        super().__init__(model, name=name)
        self.block_entries = None if blocks is None else _read_entries(blocks)
        self.max_states = max_states

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """The user's blocks, then every remaining unit on its own."""
        entries = _whole_blocks(program) if self.block_entries is None else self.block_entries
        taken: dict[str, set[int]] = {site.name: set() for site in program.latents}
        found = []
        for number, block in enumerate(entries):
            parts = _read_block(block, program, taken)
            sites = [site for site, _ in parts]
            name = sites[0].name if len(sites) == 1 and len(parts[0][1]) == sites[0].num_features else f"block_{number}"
            found.append(Block(name, parts, self._factor(parts)))
        for site in program.latents:
            rest = tuple(i for i in range(site.num_features) if i not in taken[site.name])
            if rest:
                name = site.name if len(rest) == site.num_features else f"{site.name}_rest"
                found.append(Block(name, ((site, rest),), mean_field_factor(site, len(rest))))
        return tuple(found)

    def _factor(self, parts: tuple[tuple[Site, tuple[int, ...]], ...]) -> Factor:
        if not parts[0][0].kind.is_discrete:
            return MultivariateNormalFactor(sum(len(components) for _, components in parts))
        units = [site.unit_size for site, components in parts for _ in range(len(components) // site.unit_size)]
        if len(units) > 64 or num_states(units) > self.max_states:
            raise ValueError(
                f"Expected at most {self.max_states} joint states in a block, but got {len(units)} units of "
                f"{', '.join(repr(site.name) for site, _ in parts)}. Use smaller blocks, or raise `max_states`."
            )
        return JointFactor(units)


def _read_entries(blocks: Any) -> list[list[tuple[str, tuple[int, ...] | None]]]:
    """The blocks as lists of (site, units); None stands for all units of a site."""
    if not _is_list(blocks):
        raise ValueError(
            f'Expected blocks to be a list of blocks, but got {blocks!r}. Write [["a", "c"], [("h", [0])]].'
        )
    found: list[list[tuple[str, tuple[int, ...] | None]]] = []
    for block in blocks:
        if not _is_list(block) or not len(block):
            raise ValueError(
                f'Expected a block to be a list of sites, but got {block!r}. Write ["a", "c"] or [("h", [0])].'
            )
        found.append([_read_entry(entry) for entry in block])
    return found


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


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _whole_blocks(program: Program) -> list[list[tuple[str, tuple[int, ...] | None]]]:
    groups: dict[tuple[bool, tuple[str, ...]], list[tuple[str, tuple[int, ...] | None]]] = {}
    for site in program.latents:
        key = (site.kind.is_discrete, tuple(frame.name for frame in site.frames))
        groups.setdefault(key, []).append((site.name, None))
    return list(groups.values())


def _read_block(
    entries: Sequence[tuple[str, tuple[int, ...] | None]], program: Program, taken: dict[str, set[int]]
) -> tuple[tuple[Site, tuple[int, ...]], ...]:
    """Check one block and give the features of each of its sites, in the order of the program."""
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
            for feature in range(unit * site.unit_size, (unit + 1) * site.unit_size):
                if feature in taken[name]:
                    raise ValueError(
                        f"Expected blocks that do not overlap, but got unit {unit} of {name!r} twice. Keep it in one."
                    )
                taken[name].add(feature)
                chosen.setdefault(name, []).append(feature)
    parts = tuple((site, tuple(sorted(chosen[site.name]))) for site in program.latents if site.name in chosen)
    sites = [site for site, _ in parts]
    if len({site.kind.is_discrete for site in sites}) > 1:
        names = ", ".join(f"{site.name!r} ({site.kind.value})" for site in sites)
        raise ValueError(f"Expected a block of discrete or of continuous sites, but got {names}. Split the block.")
    if len({tuple((f.name, f.dim) for f in site.frames) for site in sites}) > 1:
        names = ", ".join(f"{site.name!r} in {[f.name for f in site.frames]}" for site in sites)
        raise ValueError(f"Expected the sites of a block in the same plates, but got {names}. Split the block.")
    return parts
