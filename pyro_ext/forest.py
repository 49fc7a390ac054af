"""Forests of discrete units: conditional tables, sum-product, and what is left when some states are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyro_ext.states import enumerate_states

VIRTUAL = -1
"""Stands for the parent of all roots, which has one state: a forest is one tree below it."""


def parents_of(num_units: int, edges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Root every tree of a forest at its first unit: the parent of each unit, -1 for roots.

    Args:
        num_units: number of units.
        edges: pairs of different units.

    Raises:
        ValueError: an edge to a unit that does not exist, or edges that close a cycle.

    Example:
        >>> parents_of(4, [(1, 0), (1, 2)])
        (-1, 0, 1, -1)
    """
    neighbours: list[list[int]] = [[] for _ in range(num_units)]
    leader = list(range(num_units))
    for first, second in edges:
        if not (0 <= first < num_units and 0 <= second < num_units):
            raise ValueError(
                f"Expected edges between units 0 to {num_units - 1} of the tree, but got {(first, second)}. "
                "Count the tree's units in the order in which they are listed."
            )
        if leader[first] == leader[second]:
            raise ValueError(
                f"Expected edges that make a tree, but got {(first, second)}, which closes a cycle. "
                "Leave one edge of the cycle out, or join its units in a plain block."
            )
        leader = [leader[first] if name == leader[second] else name for name in leader]
        neighbours[first].append(second)
        neighbours[second].append(first)
    parents: dict[int, int] = {}
    for root in range(num_units):
        if root in parents:
            continue
        parents[root] = VIRTUAL
        waiting = [root]
        for unit in waiting:
            new = [other for other in neighbours[unit] if other not in parents]
            parents.update(dict.fromkeys(new, unit))
            waiting += new
    return tuple(parents[unit] for unit in range(num_units))


class Forest:
    """Discrete units, each with a table of its states given its parent's: p(h) = prod_u p(h_u | h_parent(u)).

    Args:
        units: feature size of each unit, 1 for binary, K for one-hot.
        parents: the parent of each unit, -1 for roots; see `parents_of`.

    Attributes:
        counts: number of states of each unit.
        children: the units below each unit, and the roots below `VIRTUAL`.
        order: all units, parents before their children.
        shapes: shape of each unit's table, (states of the parent, states of the unit).
        size: number of features.
        num_params: number of entries of all tables.
    """

    def __init__(self, units: Sequence[int], parents: Sequence[int]) -> None:
        self.units, self.parents = tuple(units), tuple(parents)
        self.size = sum(units)
        self.counts = tuple(2 if size == 1 else size for size in units)
        self.children: dict[int, list[int]] = {unit: [] for unit in range(VIRTUAL, len(units))}
        for unit, parent in enumerate(self.parents):
            self.children[parent].append(unit)
        found = list(self.children[VIRTUAL])
        for unit in found:
            found += self.children[unit]
        self.order = tuple(found)
        self.shapes = [
            (1 if parent == VIRTUAL else self.counts[parent], count)
            for parent, count in zip(self.parents, self.counts, strict=True)
        ]
        self.num_params = sum(rows * columns for rows, columns in self.shapes)

    # ------------------------------------------------------------------ tables and states

    def tables(self, params: Tensor) -> list[Tensor]:
        """log p(h_u | h_parent(u)) of every unit, ``(..., states of the parent, states of the unit)``."""
        pieces = params.split([rows * columns for rows, columns in self.shapes], -1)
        return [
            functional.log_softmax(piece.reshape(piece.shape[:-1] + shape), -1)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def pack(self, tables: Sequence[Tensor]) -> Tensor:
        """The parameters ``(..., P)`` of some tables."""
        batch = torch.broadcast_shapes(*(table.shape[:-2] for table in tables))
        return torch.cat([table.expand(batch + table.shape[-2:]).flatten(-2) for table in tables], -1)

    def placed(self, like: Tensor) -> dict[int, Tensor]:
        """The states of each unit in the features of all, ``(states, size)``; zeros for the virtual root."""
        found = {VIRTUAL: like.new_zeros(1, self.size)}
        start = 0
        for unit, size in enumerate(self.units):
            placed = like.new_zeros(self.counts[unit], self.size)
            placed[:, start : start + size] = enumerate_states([size], device=like.device).to(like.dtype)
            found[unit] = placed
            start += size
        return found

    def log_marginals(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Log-probability of the states of every unit, ``(..., states)``."""
        found: dict[int, Tensor] = {VIRTUAL: tables[0].new_zeros(1)}
        for unit in self.order:
            found[unit] = (found[self.parents[unit]][..., :, None] + tables[unit]).logsumexp(-2)
        return [found[unit] for unit in range(len(self.units))]

    def features(self, probs: Sequence[Tensor], units: Sequence[int]) -> Tensor:
        """Expected features of some units from the probabilities of all units' states."""
        return torch.cat([probs[u][..., 1:] if self.units[u] == 1 else probs[u] for u in units], -1)

    # ------------------------------------------------------------------ sum-product

    def normalise(self, unary: Sequence[Tensor], pairs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Parameters of the p that is proportional to exp(sum of scores), and the log of the normaliser ``(...)``.

        Args:
            unary: a score for each state of each unit, ``(..., states)``.
            pairs: a score for each state of its parent and its own, ``(..., states of the parent, states)``.
        """
        messages: dict[int, Tensor] = {}
        tables: dict[int, Tensor] = {}
        for unit in reversed(self.order):
            score = unary[unit]
            for child in self.children[unit]:
                score = score + messages[child]
            score = score[..., None, :] + pairs[unit]
            messages[unit] = score.logsumexp(-1)
            tables[unit] = functional.log_softmax(score, -1)
        first, *others = (messages[root].squeeze(-1) for root in self.children[VIRTUAL])
        return self.pack([tables[unit] for unit in range(len(self.units))]), sum(others, first)

    def condition(self, params: Tensor, held: Mapping[int, Tensor]) -> tuple[Forest | None, Tensor, Tensor]:
        """p of the other units given some units' states, and the log-probability of these.

        A given unit cuts its forest: it adds a row of its table to its parent's scores, and makes its children roots.

        Args:
            params: ``(..., P)``.
            held: for each given unit which state it is in, ``(..., states)`` of zeros and ones.

        Returns:
            The forest of the other units in their order (None when all are given), its parameters ``(..., P')``, and
            log p(given) of shape ``(...)``, nats.
        """
        tables = self.tables(params)
        free = [unit for unit in range(len(self.units)) if unit not in held]
        unary: dict[int, Tensor] = {unit: params.new_zeros(self.counts[unit]) for unit in free}
        constant = params.new_zeros(params.shape[:-1])
        pairs: list[Tensor] = []
        parents: list[int] = []
        for unit, parent in enumerate(self.parents):
            above = params.new_ones(1) if parent == VIRTUAL else held.get(parent)
            if unit in held and above is not None:
                constant = constant + entry(tables[unit], above, held[unit])
            elif unit in held:
                unary[parent] = unary[parent] + (tables[unit] @ held[unit][..., None]).squeeze(-1)
            elif above is not None:
                unary[unit] = unary[unit] + (above[..., None, :] @ tables[unit]).squeeze(-2)
                pairs.append(params.new_zeros(1, self.counts[unit]))
                parents.append(VIRTUAL)
            else:
                pairs.append(tables[unit])
                parents.append(free.index(parent))
        if not free:
            return None, params, constant
        rest = Forest([self.units[unit] for unit in free], parents)
        found, log_total = rest.normalise([unary[unit] for unit in free], pairs)
        return rest, found, constant + log_total


def indicators(features: Tensor, units: Sequence[int]) -> list[Tensor]:
    """Which state each unit is in, ``(..., states)``, from features ``(..., sum(units))``."""
    return [torch.cat([1 - x, x], -1) if x.shape[-1] == 1 else x for x in features.split(list(units), -1)]


def entry(table: Tensor, parent: Tensor, state: Tensor) -> Tensor:
    """The entry of a table ``(..., J, I)`` at indicators of the state above ``(..., J)`` and of the own."""
    return (table * (parent[..., :, None] * state[..., None, :])).sum((-1, -2))
