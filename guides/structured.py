"""Guides with blocks of latents that keep their dependence (19.4, Saul & Jordan 1996)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
from pyro import poutine

from pyro_ext.blocks import Block
from pyro_ext.checks import check_count
from pyro_ext.continuous_factors import MultivariateNormalFactor
from pyro_ext.discrete_factors import JointFactor
from pyro_ext.evaluators import MAX_STATES
from pyro_ext.factors import Factor
from pyro_ext.forest import VIRTUAL, parents_of
from pyro_ext.guides.base import refuse_unknown_kinds
from pyro_ext.guides.block_entries import Entry, Parts, Read, Tree, read_blocks, resolve_block, units_of
from pyro_ext.guides.found_blocks import couplings_or_refuse, strongest_blocks, strongest_forest
from pyro_ext.guides.mean_field import chain_factor, mean_field_factor
from pyro_ext.guides.tables import TableGuide
from pyro_ext.program import Program
from pyro_ext.states import num_states
from pyro_ext.tree_factor import TreeFactor


class Structured(TableGuide):
    """q as a product of joint factors, one a block; latents outside every block stay on their own.

    Discrete blocks hold a table over all joint states, or, as a `Tree`, tables along its edges; continuous ones hold
    one Gaussian on the real line; whole Markov chains of the same length are one chain on their joint states. Blocks
    may cross sites and may cut through a site's units; each site is still one Pyro site with a true density, drawn
    given the block's earlier sites.

    With ``max_block_size`` the guide finds its blocks at its first call, from the couplings of the program at the theta
    of that call (`find_couplings`), and keeps them; so it does with the edges of a `Tree` without edges. The
    tables belong to these blocks. When theta has moved far, ``find_blocks`` tells which blocks it would find
    now, for a new guide. Two latents that explain each other away are coupled most of all.

    Args:
        model: any Pyro model.
        blocks: blocks, each a `Tree` or a list of entries: a site name or ``(site name, unit positions)``, such as
            ``[["a", "c"], [("h", [0, 3])]]``. None joins all discrete latents of the same plates in one
            block, and all continuous ones in another.
        max_block_size: in place of ``blocks``: most units of a block that the guide finds itself; 1 is mean field. The
            program must be quadratic in its latents.
        max_states: most joint states of one block.
        name: name of the guide's parameters.

    Raises:
        TypeError, ValueError: for blocks that are not lists of entries, ``max_block_size`` or ``max_states`` that is no
            positive int, or ``max_block_size`` with ``blocks``; at the first call, for blocks that overlap, name an
            unknown site or unit, mix discrete with continuous sites or sites of different plates, or have too many
            states, for edges to unknown units, and for couplings asked of a program that is not quadratic.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.2).expand([3]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h[..., 0] + h[..., 2], 0.1), obs=v)
        >>> guide = Structured(model, blocks=[[("h", [0, 1])]])
        >>> guide.posterior(torch.ones(5)).blocks[0].factor.num_params
        4
        >>> guide = Structured(model, max_block_size=2)
        >>> guide.setup(torch.ones(5))
        >>> guide.block_entries
        [[('h', [0, 2])]]
    """

    def __init__(
        self,
        model: Callable[..., Any],
        blocks: Sequence[Sequence[Entry] | Tree] | None = None,
        *,
        max_block_size: int | None = None,
        max_states: int = MAX_STATES,
        name: str | None = None,
    ) -> None:
        if max_block_size is not None:
            check_count(max_block_size, "max_block_size")
            if blocks is not None:
                raise ValueError(
                    f"Expected blocks or max_block_size, but got both ({blocks!r} and {max_block_size}). "
                    "Leave out max_block_size to choose the blocks yourself."
                )
        check_count(max_states, "max_states")
        wanted = None if blocks is None else read_blocks(blocks)
        super().__init__(model, name=name)
        self._wanted = wanted
        self.max_block_size = max_block_size
        self.max_states = max_states

    @property
    def block_entries(self) -> list[Any] | None:
        """The blocks of more than one unit's own table, given or found, as the argument ``blocks`` writes them.

        None before the first call where they are not given.
        """
        if self.is_set_up:
            return [_entries_of(block) for block in self.blocks if block.factor.is_joint]
        if self._wanted is None:
            return None
        return [w if isinstance(w, Tree) else [n if u is None else (n, list(u)) for n, u in w] for w in self._wanted]

    def extra_repr(self) -> str:
        """The blocks, for ``repr``."""
        size = "" if self.max_block_size is None else f"max_block_size={self.max_block_size}, "
        return f"{size}blocks={self.block_entries}"

    def find_blocks(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The blocks that the couplings at the present theta ask for; the guide keeps its own.

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.

        Returns:
            Blocks as the argument ``blocks`` takes them: ``Structured(model, blocks=guide.find_blocks(v))``.

        Raises:
            ValueError: the guide has no ``max_block_size``; bad data; the program is not quadratic in its latents.
        """
        if self.max_block_size is None:
            raise ValueError(
                "Expected a guide with max_block_size, but got one whose blocks are given. "
                "Write Structured(model, max_block_size=2)."
            )
        with _no_parameters_left_behind():
            self.check_data(args, kwargs)
            program = Program(self.model, args, kwargs)
            refuse_unknown_kinds(program)
            return [[(name, list(units or ())) for name, units in entries] for entries in self._found(program)]

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """The blocks given or found, then every remaining unit on its own."""
        if self.is_set_up and self._finds:
            sites = {site.name: site for site in program.latents}
            return tuple(replace(b, parts=tuple((sites[s.name], c) for s, c in b.parts)) for b in self.blocks)
        if self.max_block_size is not None:
            wanted: Sequence[Read | Tree] = self._found(program)
        else:
            wanted = _whole_blocks(program) if self._wanted is None else self._wanted
        taken: dict[str, set[int]] = {site.name: set() for site in program.latents}
        blocks = []
        for number, block in enumerate(wanted):
            tree = block if isinstance(block, Tree) else None
            parts, places = resolve_block(block.entries if isinstance(block, Tree) else block, program, taken)
            sites = [site for site, _ in parts]
            name = sites[0].name if len(sites) == 1 and len(parts[0][1]) == sites[0].num_features else f"block_{number}"
            factor = self._joint_factor(parts) if tree is None else _tree_factor(tree, parts, places, program)
            blocks.append(Block(name, parts, factor))
        for site in program.latents:
            rest = tuple(i for i in range(site.num_features) if i not in taken[site.name])
            if rest:
                name = site.name if len(rest) == site.num_features else f"{site.name}_rest"
                blocks.append(Block(name, ((site, rest),), mean_field_factor(site, len(rest))))
        return tuple(blocks)

    @property
    def _finds(self) -> bool:
        """Whether blocks or edges come from the couplings, which move with theta; the tables' shape must not."""
        trees = [block for block in self._wanted or [] if isinstance(block, Tree)]
        return self.max_block_size is not None or any(tree.finds_edges for tree in trees)

    def _found(self, program: Program) -> list[Read]:
        with poutine.block():
            couplings = couplings_or_refuse(program, "give `blocks=` in place of `max_block_size`.")
        found: list[Read] = []
        for units in strongest_blocks(couplings, self.max_block_size or 1, self.max_states):
            names = dict.fromkeys(name for name, _ in units)
            found.append([(name, tuple(unit for other, unit in units if other == name)) for name in names])
        return found

    def _joint_factor(self, parts: Parts) -> Factor:
        sites = [site for site, _ in parts]
        whole = all(len(components) == site.num_features for site, components in parts)
        if whole and all(site.is_chain for site in sites) and len({site.event_shape[0] for site in sites}) == 1:
            joint = math.prod(site.event_shape[1] for site in sites)
            if joint**2 > self.max_states:
                raise ValueError(
                    f"Expected at most {self.max_states} pairs of joint states in a block of chains, but got {joint}^2 "
                    f"of {', '.join(repr(site.name) for site in sites)}. Use smaller blocks, or raise `max_states`."
                )
            return chain_factor(sites)
        if not parts[0][0].kind.is_discrete:
            return MultivariateNormalFactor(sum(len(components) for _, components in parts))
        units = _unit_sizes(parts)
        if len(units) > 64 or num_states(units) > self.max_states:
            raise ValueError(
                f"Expected at most {self.max_states} joint states in a block, but got {len(units)} units of "
                f"{', '.join(repr(site.name) for site, _ in parts)}. Use smaller blocks, or raise `max_states`."
            )
        return JointFactor(units)


def _tree_factor(tree: Tree, parts: Parts, places: Sequence[int], program: Program) -> TreeFactor:
    if not parts[0][0].kind.is_discrete:
        raise ValueError(
            f"Expected discrete units in a Tree, but got the {parts[0][0].kind.value} site {parts[0][0].name!r}. "
            "Put continuous latents in a plain block."
        )
    units = _unit_sizes(parts)
    if tree.finds_edges:
        with poutine.block():
            couplings = couplings_or_refuse(program, "give the tree its `edges`.")
        return TreeFactor(units, parents_of(len(units), strongest_forest(couplings, units_of(parts))))
    listed = tree.edges_of(len(units))
    parents_of(len(units), listed)
    return TreeFactor(units, parents_of(len(units), [(places[first], places[second]) for first, second in listed]))


def _unit_sizes(parts: Parts) -> list[int]:
    return [site.unit_size for site, components in parts for _ in range(len(components) // site.unit_size)]


def _entries_of(block: Block) -> Any:
    entries = [(s.name, [c // s.unit_size for c in components[:: s.unit_size]]) for s, components in block.parts]
    if not isinstance(block.factor, TreeFactor):
        return entries
    parents = enumerate(block.factor.forest.parents)
    return Tree(entries, sorted((min(pair), max(pair)) for pair in parents if pair[1] != VIRTUAL))


def _whole_blocks(program: Program) -> list[Read]:
    groups: dict[tuple[bool, tuple[str, ...]], Read] = {}
    for site in program.latents:
        key = (site.kind.is_discrete, tuple(frame.name for frame in site.frames))
        groups.setdefault(key, []).append((site.name, None))
    return list(groups.values())


@contextmanager
def _no_parameters_left_behind() -> Generator[None, None, None]:
    """Take parameters that a refused call created out of the store."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except Exception:
        for name in set(store.keys()) - before:
            del store[name]
        raise
