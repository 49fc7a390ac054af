"""A factor over discrete units whose dependence is a tree (section 19.4; Saul & Jordan, 1996)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import Tabulated
from pyro_ext.factors import Factor
from pyro_ext.forest import VIRTUAL, Forest, entry, indicators
from pyro_ext.states import enumerate_states
from pyro_ext.tree_distribution import TreeDistribution

MAX_SWEEPS = 500


class TreeFactor(Factor):
    r"""Discrete units, each of which depends on its parent: q(h) = prod_u q(h_u | h_parent(u)) (Saul & Jordan, 1996).

    The parameters are the logits of these tables, unit by unit, each ``(states of the parent, states of the unit)``
    (a root has one row): their number grows with the units, not with the joint states. Chains and forests
    are trees too. Moments and entropies are exact and cost one pass over the units.

    Where Q couples units on edges only, `optimum` is the exact maximum (sum-product). Elsewhere the maximum has no
    closed form, and the tables are set in turn, each to its optimum given the others,
    q(h_u | h_p) proportional to exp(E[score + entropies below u | h_u, h_p]), so that no sweep lowers the objective.

    Args:
        units: feature size of each unit, 1 for binary, K for one-hot.
        parents: the parent of each unit, -1 for roots; `parents_of` finds them from edges.

    Example:
        >>> from pyro_ext.forest import parents_of
        >>> factor = TreeFactor([1, 1, 1], parents_of(3, [(0, 1), (1, 2)]))
        >>> factor.num_params, factor.mean(torch.zeros(10))
        (10, tensor([0.5000, 0.5000, 0.5000]))
    """

    is_joint = True
    in_closed_form = False

    def __init__(self, units: Sequence[int], parents: Sequence[int]) -> None:
        self.forest = Forest(units, parents)
        self.size, self.num_params = self.forest.size, self.forest.num_params
        self.groups = (tuple(range(self.size)),)

    # ------------------------------------------------------------------ moments

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        tiny = torch.finfo(mean.dtype).tiny
        logs = [x.clamp_min(tiny).log() for x in indicators(mean, self.forest.units)]
        tables = zip(logs, self.forest.shapes, strict=True)
        return self.forest.pack([x[..., None, :].expand(x.shape[:-1] + shape) for x, shape in tables])

    def mean(self, params: Tensor) -> Tensor:
        log_marginals = self.forest.log_marginals(self.forest.tables(params))
        return self.forest.features([x.exp() for x in log_marginals], range(len(self.forest.units)))

    def entropy(self, params: Tensor) -> Tensor:
        tables = self.forest.tables(params)
        marginals = self.forest.log_marginals(tables)
        total = params.new_zeros(params.shape[:-1])
        for table, parent in zip(tables, self.forest.parents, strict=True):
            entropies = -(table.exp() * table).sum(-1)
            total = total + (entropies if parent == VIRTUAL else marginals[parent].exp() * entropies).sum(-1)
        return total

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        # Given the state of a unit its branches are independent: what they hold together is the product of
        # means, what each holds in itself was summed before.
        placed, tables = self.forest.placed(params), self.forest.tables(params)
        means: dict[int, Tensor] = {}
        within: dict[int, Tensor] = {}
        for unit in (*reversed(self.forest.order), VIRTUAL):
            mean, total = placed[unit], params.new_zeros(len(placed[unit]))
            for child in self.forest.children[unit]:
                probs = tables[child].exp()
                below = probs @ means[child]
                mean = mean + below
                total = total + (probs @ within[child][..., None]).squeeze(-1) - _energy(below, quadratic)
            means[unit], within[unit] = mean, total + _energy(mean, quadratic)
        return within[VIRTUAL].squeeze(-1)

    # ------------------------------------------------------------------ optima

    def is_exact_for(self, quadratic: Tensor | None) -> bool:
        """Whether Q couples units on edges only; for any scores (None), whether the tree is one unit or one edge."""
        if quadratic is None:
            return len(self.forest.units) <= 2 and self.forest.children[VIRTUAL] == [0]
        largest = quadratic.abs().amax()
        tolerance = 16 * self.size * torch.finfo(quadratic.dtype).eps
        return bool(((quadratic.abs() <= tolerance * largest) | self._on_tree(quadratic.device)).all())

    def _on_tree(self, device: torch.device) -> Tensor:
        """Which features stand in one unit, or in two with an edge, boolean ``(size, size)``."""
        near = torch.eye(len(self.forest.units), device=device) > 0
        for unit, parent in enumerate(self.forest.parents):
            if parent != VIRTUAL:
                near[unit, parent] = near[parent, unit] = True
        owner = torch.tensor([u for u, size in enumerate(self.forest.units) for _ in range(size)], device=device)
        return near[owner][:, owner]

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        params = self._sum_product(linear, quadratic)
        if self.is_exact_for(quadratic):
            return params
        return self._settle(params, lambda tables: self._sweep(tables, linear, quadratic))

    def improve(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The optimum where Q couples units on edges only, else one sweep over the tables from the given ones."""
        if self.is_exact_for(quadratic):
            return self._sum_product(linear, quadratic)
        return self.forest.pack(self._sweep(self.forest.tables(params), linear, quadratic))

    def interpolate(self, old: Tensor, new: Tensor, damping: float | Tensor) -> Tensor:
        share = damping[..., None, None] if isinstance(damping, Tensor) else damping
        both = zip(self.forest.tables(old), self.forest.tables(new), strict=True)
        pairs = [share * before + (1 - share) * after for before, after in both]
        return self.forest.normalise([pair.new_zeros(pair.shape[-1]) for pair in pairs], pairs)[0]

    def _settle(self, params: Tensor, sweep: Callable[[Sequence[Tensor]], list[Tensor]]) -> Tensor:
        tables = self.forest.tables(params)
        for _ in range(MAX_SWEEPS):
            new = sweep(tables)
            change = max(float((a.exp() - b.exp()).abs().amax()) for a, b in zip(new, tables, strict=True))
            tables = new
            if change <= 1e3 * torch.finfo(params.dtype).eps:
                break
        return self.forest.pack(tables)

    def _sum_product(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The exact optimum for the couplings on edges alone."""
        placed, parents = self.forest.placed(linear), self.forest.parents
        quadratic = 0.5 * (quadratic + quadratic.mT)
        unary = [linear @ placed[u].mT + 0.5 * _energy(placed[u], quadratic) for u in range(len(parents))]
        pairs = [placed[parent] @ quadratic @ placed[u].mT for u, parent in enumerate(parents)]
        return self.forest.normalise(unary, pairs)[0]

    def _sweep(self, tables: Sequence[Tensor], linear: Tensor, quadratic: Tensor) -> list[Tensor]:
        """Set each table to its optimum given the others, children before parents."""
        placed, children = self.forest.placed(linear), self.forest.children
        quadratic = 0.5 * (quadratic + quadratic.mT)
        tables = list(tables)
        marginals = {VIRTUAL: linear.new_zeros(1), **dict(enumerate(self.forest.log_marginals(tables)))}
        # E[h below u | state of its parent], without the features elsewhere.
        below: dict[int, Tensor] = {}
        for unit in reversed(self.forest.order):
            below[unit] = tables[unit].exp() @ sum((below[child] for child in children[unit]), placed[unit])
        # E[h not below u | state of its parent], and the same given the state of u, less u itself.
        outside: dict[int, Tensor] = {}
        elsewhere: dict[int, Tensor] = {VIRTUAL: placed[VIRTUAL]}
        # E[score and entropies below u | state of u].
        values: dict[int, Tensor] = {}
        for unit, is_entered in self._walk():
            parent = self.forest.parents[unit]
            if is_entered:
                siblings = (below[other] for other in children[parent] if other != unit)
                outside[unit] = sum(siblings, placed[parent] + elsewhere[parent])
                backward = (marginals[parent][..., :, None] + tables[unit]).softmax(-2).mT
                elsewhere[unit] = backward @ outside[unit]
                continue
            mean = sum((below[child] for child in children[unit]), placed[unit])
            value = linear @ placed[unit].mT + 0.5 * _energy(mean, quadratic)
            for child in children[unit]:
                gain = (tables[child].exp() * (values[child][..., None, :] - tables[child])).sum(-1)
                value = value + gain - 0.5 * _energy(below[child], quadratic)
            values[unit] = value
            scores = value[..., None, :] + outside[unit] @ quadratic @ mean.mT
            tables[unit] = functional.log_softmax(scores, -1)
            below[unit] = tables[unit].exp() @ mean
        return tables

    def _walk(self) -> list[tuple[int, bool]]:
        """Every unit twice: entered (True) before all that is below it, left (False) after."""
        found: list[tuple[int, bool]] = []
        waiting = [(root, True) for root in reversed(self.forest.children[VIRTUAL])]
        while waiting:
            unit, is_entered = waiting.pop()
            found.append((unit, is_entered))
            if is_entered:
                waiting.append((unit, False))
                waiting += [(child, True) for child in reversed(self.forest.children[unit])]
        return found

    def from_scores(self, scores: Tensor) -> Tensor:
        start = scores.new_zeros(scores.shape[:-1] + (self.num_params,))
        return self._settle(start, lambda tables: self._sweep_scores(tables, scores))

    def improve_scores(self, params: Tensor, scores: Tensor) -> Tensor:
        """One sweep over the tables from the given ones, which does not lower E[score] + H(q)."""
        return self.forest.pack(self._sweep_scores(self.forest.tables(params), scores))

    def _sweep_scores(self, tables: Sequence[Tensor], scores: Tensor) -> list[Tensor]:
        """As `_sweep`, with a score for every joint state."""
        units = self.forest.units
        states = dict(enumerate(indicators(enumerate_states(units, device=scores.device).to(scores.dtype), units)))
        states[VIRTUAL] = torch.ones_like(states[0][..., :1])
        tables, parents = list(tables), self.forest.parents
        terms = [entry(table[..., None, :, :], states[parents[u]], states[u]) for u, table in enumerate(tables)]
        for unit in (unit for unit, is_entered in self._walk() if not is_entered):
            others = sum((term for other, term in enumerate(terms) if other != unit), torch.zeros_like(scores))
            chosen = (states[parents[unit]][:, :, None] * states[unit][:, None, :] > 0).permute(1, 2, 0)
            log_weights = torch.where(chosen, others[..., None, None, :], -torch.inf)
            value = (log_weights.softmax(-1) * (scores - others)[..., None, None, :]).sum(-1)
            tables[unit] = functional.log_softmax(value, -1)
            terms[unit] = entry(tables[unit][..., None, :, :], states[parents[unit]], states[unit])
        return tables

    # ------------------------------------------------------------------ distributions

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        if not start:
            return self.marginal(params, start, stop)
        units = self._units(0, start)
        states = indicators(earlier.to(params.dtype), [self.forest.units[unit] for unit in units])
        rest, left, _ = self.forest.condition(params, dict(zip(units, states, strict=True)))
        if rest is None:
            raise ValueError(f"Expected features after {start} in a tree of {self.size}, but got none. Ask for fewer.")
        return _part(rest, left, [unit - len(units) for unit in self._units(start, stop)])

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return _part(self.forest, params, self._units(start, stop))

    def _units(self, start: int, stop: int) -> list[int]:
        """The units that features ``start`` to ``stop`` make up."""
        sizes = self.forest.units
        edges = [sum(sizes[:unit]) for unit in range(len(sizes) + 1)]
        if start not in edges or stop not in edges:
            raise ValueError(f"Expected a part of whole units, but got features {start} to {stop}. Split between them.")
        return list(range(edges.index(start), edges.index(stop)))

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def part(self, group: Sequence[int]) -> TreeFactor:
        return self


def _part(forest: Forest, params: Tensor, units: Sequence[int]) -> TorchDistributionMixin:
    if len(units) == 1:
        return Tabulated(forest.log_marginals(forest.tables(params))[units[0]], [forest.units[units[0]]])
    return TreeDistribution(forest, params, units)


def _energy(value: Tensor, quadratic: Tensor) -> Tensor:
    """x'Qx of vectors ``(..., S, F)`` for Q of shape ``(F, F)`` or ``(..., F, F)``."""
    return ((value @ quadratic) * value).sum(-1)
