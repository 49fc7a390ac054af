"""Evaluators: E_q[log p(v, h)] + H(q) for a product of factors, and its maximum in one group (19.7, 19.56)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.colours import Batch, batches_of, colour_groups, coupled_features, groups_of, write
from pyro_ext.discrete_factors import BernoulliFactor
from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError, QuadraticForm
from pyro_ext.sites import Kind
from pyro_ext.states import draw_states, enumerate_states, num_states, state_weights
from pyro_ext.unit_sweeps import UnitSweeps

MAX_STATES = 2**16
CHUNK_ELEMENTS = 2**22

Parameters = dict[str, Tensor]
"""For each block its parameters row by row: ``(R, M, P)``, M the elements of the inner plates."""


class NoEvaluatorError(ValueError):
    """No exact evaluator serves a program and its factors."""


class Evaluator(ABC):
    """L as a function of the factors' parameters, at fixed theta and data.

    Attributes:
        layout: where each latent feature stands.
        blocks: the factors.
        exact_posterior: one sweep sets q to the exact posterior, whatever it started from.
        exact: L and the optima are exact, not estimated from samples.
    """

    exact: bool = True

    layout: Layout
    blocks: Sequence[Block]

    @abstractmethod
    def bound(self, params: Parameters) -> Tensor:
        """L per row, shape ``(R,)``, nats (log p(h, v) where q is a point mass)."""

    @abstractmethod
    def sweep(self, params: Parameters) -> Parameters:
        """Set every group in turn to its optimum, given the newest value of the others."""

    def coloured_sweep(self, params: Parameters) -> Parameters:
        """As `sweep`, with groups that do not interact updated at once where the evaluator knows which."""
        return self.sweep(params)

    @abstractmethod
    def jump(self, params: Parameters) -> Parameters:
        """The optimum of every group at once, given the old value of the others."""

    @abstractmethod
    def solve(self) -> tuple[Parameters, Tensor]:
        """The exact posterior and L per row there, where `exact_posterior`."""

    @property
    def exact_posterior(self) -> bool:
        """Whether one group covers all latents of a row."""
        if len(self.blocks) != 1 or len(self.blocks[0].factor.groups) != 1 or not self._is_one_element:
            return False
        return self.blocks[0].factor.is_exact_for(self._own_coupling())

    def _own_coupling(self) -> Tensor | None:
        """Q of the one block, where there is one."""
        return None

    @property
    def _is_one_element(self) -> bool:
        """Whether one element of one block covers all latents of a row."""
        return len(self.blocks) == 1 and self._copies(0) == 1 and self.weight(self.blocks[0]) == 1

    def weight(self, block: Block) -> float:
        """How often each element of a block counts: full size / size of the inner plates that are subsampled."""
        return math.prod(f.full_size / f.size for f in block.site.frames if f.name not in self.layout.rows.names)

    def _copies(self, index: int) -> int:
        return self.layout.copies(self.blocks[index].site)

    def indices(self, block: Block) -> Tensor:
        """Positions of a block's features in a row's vector, shape ``(M, k)``."""
        parts = [self.layout.indices(site, components) for site, components in block.parts]
        return torch.cat(parts, -1)

    def entropy(self, params: Parameters) -> Tensor:
        """H(q) per row, shape ``(R,)``, nats; elements of subsampled inner plates stand for the others too."""
        terms = (self.weight(b) * b.factor.entropy(params[b.name]).sum(-1) for b in self.blocks)
        return sum(terms, torch.zeros(()))

    def means(self, params: Parameters) -> Tensor:
        """E_q[h] per row, shape ``(R, F)``."""
        first = params[self.blocks[0].name]
        result = first.new_zeros(self.layout.rows.count, self.layout.num_features)
        for block in self.blocks:
            index = self.indices(block).reshape(-1).to(first.device)
            mean = block.factor.mean(params[block.name])
            result = result.index_copy(-1, index, mean.reshape(mean.shape[0], -1))
        return result


class Quadratic(Evaluator):
    """L and its coordinate maxima from a program's quadratic form: matrix code without the program.

    Args:
        form: c, b and J of the program.
        blocks: the factors of q.
    """

    def __init__(self, form: QuadraticForm, blocks: Sequence[Block]) -> None:
        self.form = form
        self.layout = form.layout
        self.blocks = tuple(blocks)
        self._index = [self.indices(b).to(form.linear.device) for b in self.blocks]
        self._swept: tuple[Tensor, Tensor] | None = None

    def _coupling(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.form.coupling[..., rows[:, None], columns[None, :]]

    def _own_coupling(self) -> Tensor:
        return self._coupling(self._index[0][0], self._index[0][0])

    @cached_property
    def _only_linear(self) -> Tensor:
        """b in the order of the features of the one element that covers a row."""
        parts = [(site.name, components) for site, components in self.blocks[0].parts]
        in_order = parts == [(site.name, tuple(range(site.num_features))) for site in self.layout.sites]
        # No copy where there is nothing to reorder.
        return self.form.linear if in_order else self.form.linear[:, self._index[0][0]]

    def bound(self, params: Parameters) -> Tensor:
        form = self.form
        if self._units is not None:
            logits = BernoulliFactor.logits(params[self.blocks[0].name][:, 0])
            return form.constant + self._units.bound(logits)
        if self._is_one_element:
            block, positions = self.blocks[0], self._index[0][0]
            within = self._coupling(positions, positions)
            return form.constant + block.factor.objective(params[block.name][:, 0], self._only_linear, within)
        means = self.means(params)
        total = form.constant + (form.linear * means).sum(-1) + 0.5 * (_times(means, form.coupling) * means).sum(-1)
        for block, index in zip(self.blocks, self._index, strict=True):
            for copy, positions in enumerate(index):
                within = self._coupling(positions, positions)
                mean = means[:, positions]
                total = total + 0.5 * block.factor.second_moment(params[block.name][:, copy], within)
                total = total - 0.5 * (_times(mean, within) * mean).sum(-1)
        return total + self.entropy(params)

    def solve(self) -> tuple[Parameters, Tensor]:
        block, positions = self.blocks[0], self._index[0][0]
        new, value = block.factor.solve(self._only_linear, self._coupling(positions, positions))
        return {block.name: new[:, None]}, self.form.constant + value

    @cached_property
    def _units(self) -> UnitSweeps | None:
        """The same form laid out for sweeps, where all latents of a row are binary units of one block."""
        factor = self.blocks[0].factor
        plain = len(self.blocks) == 1 and self._copies(0) == 1 and self.weight(self.blocks[0]) == 1
        if not plain or not isinstance(factor, BernoulliFactor) or self.form.coupling.dim() != 2:
            return None
        if self.form.linear.requires_grad or self.form.coupling.requires_grad:
            return None
        return UnitSweeps.of(self._only_linear, self._own_coupling())

    def sweep(self, params: Parameters) -> Parameters:
        if self._units is not None:
            name = self.blocks[0].name
            logits, means = self._units.sweep(params[name][:, 0])
            new = {name: logits[:, None]}
            if self._only_linear is self.form.linear:
                self._swept = (new[name], means)
            return new
        return self._sweep_groups(params)

    def means(self, params: Parameters) -> Tensor:
        if self._swept is not None and params[self.blocks[0].name] is self._swept[0]:
            return self._swept[1]
        return super().means(params)

    def _sweep_groups(self, params: Parameters) -> Parameters:
        form = self.form
        params = {name: value.clone() for name, value in params.items()}
        # Feature by feature in memory: a sweep reads and writes the means one group at a time.
        means = self.means(params).mT.contiguous().mT
        for block, index in zip(self.blocks, self._index, strict=True):
            table, weight = params[block.name], self.weight(block)
            for copy, positions in enumerate(index):
                for group in block.factor.groups:
                    mine = positions[list(group)]
                    factor = block.factor if len(block.factor.groups) == 1 else block.factor.part(group)
                    within = self._coupling(mine, mine)
                    field = form.linear[:, mine] + _times(means, form.coupling[..., mine])
                    field = field - _times(means[:, mine], within)
                    if weight != 1:
                        field, within = field / weight, within / weight
                    if factor.in_closed_form:
                        new = factor.optimum(field, within)
                    else:
                        new = factor.improve(table[:, copy, block.factor.columns(group)], field, within)
                    table[:, copy, block.factor.columns(group)] = new
                    means[:, mine] = factor.mean(new)
        return params

    @cached_property
    def _colours(self) -> list[Batch]:
        groups = groups_of(self.blocks, self._index)
        colours = colour_groups(groups, coupled_features(self.form.coupling))
        return [batch for colour in colours for batch in batches_of([groups[g] for g in colour])]

    def coloured_sweep(self, params: Parameters) -> Parameters:
        form = self.form
        params = {name: value.clone() for name, value in params.items()}
        means = self.means(params)
        for batch in self._colours:
            positions, weight = batch.positions, self.weight(batch.block)
            within = form.coupling[..., positions[:, :, None], positions[:, None, :]]
            flat = positions.reshape(-1)
            field = form.linear[:, flat] + _times(means, form.coupling[..., flat])
            field = field.unflatten(-1, positions.shape)
            field = field - (means[:, positions][..., None, :] @ within).squeeze(-2)
            factor = batch.block.factor.part(batch.features)
            if factor.in_closed_form:
                new = factor.optimum(field / weight, within / weight)
            else:
                present = params[batch.block.name][:, batch.copies[:, None], batch.columns[None, :]]
                new = factor.improve(present, field / weight, within / weight)
            write(params, batch, new)
            means[:, positions] = factor.mean(new)
        return params

    def jump(self, params: Parameters) -> Parameters:
        form = self.form
        means = self.means(params)
        field = form.linear + _times(means, form.coupling)
        result = {}
        for block, index in zip(self.blocks, self._index, strict=True):
            size, weight = block.factor.size, self.weight(block)
            same = torch.zeros(size, size, dtype=means.dtype, device=means.device)
            for group in block.factor.groups:
                same[group[0] : group[-1] + 1, group[0] : group[-1] + 1] = 1
            copies = []
            for copy, positions in enumerate(index):
                within = self._coupling(positions, positions)
                mean = means[:, positions]
                own = _times(mean, within * same)
                present, own_field = params[block.name][:, copy], field[:, positions] - own
                copies.append(block.factor.improve(present, own_field / weight, within / weight))
            result[block.name] = torch.stack(copies, 1)
        return result


class Enumerated(Evaluator):
    """L and its coordinate maxima by enumeration of all states of a row.

    Args:
        log_joint: log p(v, h) at every state, shape ``(R, S)``, nats.
        layout: where each feature stands.
        blocks: the factors of q.

    Raises:
        NotFiniteError: p(v, h) is 0 at some state (the proviso of 19.56).
    """

    def __init__(self, log_joint: Tensor, layout: Layout, blocks: Sequence[Block]) -> None:
        if not bool(torch.isfinite(log_joint).all()):
            row, state = (~torch.isfinite(log_joint)).nonzero()[0].tolist()
            raise NotFiniteError(
                "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got log p = "
                f"{log_joint[row, state].item():g} at state {state} of row {row}. Keep probabilities inside (0, 1)."
            )
        self.log_joint = log_joint
        self.layout = layout
        self.blocks = tuple(blocks)
        self.states = enumerate_states(latent_units(layout), device=log_joint.device).to(log_joint.dtype)
        self._index = [self.indices(b).to(log_joint.device) for b in self.blocks]

    def _log_q(self, block: Block, params: Tensor, features: Tensor) -> Tensor:
        """log q of one element of a block at each state's features: params ``(R, P)`` -> ``(R, S)``."""
        return block.factor.marginal(params[:, None, :], 0, block.factor.size).log_prob(features)

    def _log_weights(self, params: Parameters) -> list[list[Tensor]]:
        return [
            [self._log_q(b, params[b.name][:, copy], self.states[:, positions]) for copy, positions in enumerate(index)]
            for b, index in zip(self.blocks, self._index, strict=True)
        ]

    def bound(self, params: Parameters) -> Tensor:
        if self.exact_posterior and not self.blocks[0].factor.is_point:
            log_q = self._log_weights(params)[0][0]
            return (log_q.exp() * (self.log_joint - log_q)).sum(-1)
        log_q = sum((w for per_block in self._log_weights(params) for w in per_block), torch.zeros(()))
        return (log_q.exp() * self.log_joint).sum(-1) + self.entropy(params)

    def _scores(self, block: Block, positions: Tensor, group: tuple[int, ...], log_others: Tensor) -> Tensor:
        """E of log p(v, h) under the other factors, for each state of a group: ``(R, U)``."""
        units = group_units(block, group)
        features = self.states[:, positions[list(group)]]
        index = (features.double() @ state_weights(units, device=features.device)).round().long()
        weighted = log_others.exp() * self.log_joint
        scores = weighted.new_zeros(weighted.shape[0], num_states(units))
        return scores.index_add(-1, index, weighted)

    def sweep(self, params: Parameters) -> Parameters:
        return self._update(params, sequential=True)

    def jump(self, params: Parameters) -> Parameters:
        return self._update(params, sequential=False)

    def solve(self) -> tuple[Parameters, Tensor]:
        block = self.blocks[0]
        params = {block.name: block.factor.from_scores(self.log_joint)[:, None, :]}
        return params, self.bound(params)

    def _update(self, params: Parameters, *, sequential: bool) -> Parameters:
        if self.exact_posterior:
            return self.solve()[0]
        params = {name: value.clone() for name, value in params.items()}
        old = {name: value.clone() for name, value in params.items()}
        for block, index in zip(self.blocks, self._index, strict=True):
            for copy, positions in enumerate(index):
                for group in block.factor.groups:
                    log_others = self._log_others(params if sequential else old, block, copy, group)
                    scores = self._scores(block, positions, group, log_others) / self.weight(block)
                    columns = block.factor.columns(group)
                    new = block.factor.part(group).improve_scores(old[block.name][:, copy, columns], scores)
                    params[block.name][:, copy, columns] = new
        return params

    def _log_others(self, params: Parameters, block: Block, copy: int, group: tuple[int, ...]) -> Tensor:
        """log of the product of all factors but one group, at every state ``(R, S)``."""
        total = self.log_joint.new_zeros(self.log_joint.shape)
        for other, index in zip(self.blocks, self._index, strict=True):
            for other_copy, positions in enumerate(index):
                for other_group in other.factor.groups:
                    if other is block and other_copy == copy and other_group == group:
                        continue
                    factor = other.factor.part(other_group)
                    columns = params[other.name][:, other_copy, other.factor.columns(other_group)]
                    features = self.states[:, positions[list(other_group)]]
                    total = total + factor.marginal(columns[:, None, :], 0, factor.size).log_prob(features)
        return total


def _times(value: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors ``(R, F)`` times one matrix for all rows ``(F, G)``, or one a row ``(R, F, G)``."""
    return value @ matrix if matrix.dim() == 2 else (value[:, None, :] @ matrix).squeeze(-2)


def group_units(block: Block, group: Sequence[int]) -> list[int]:
    """Feature sizes of the units that a group consists of."""
    units = [site.unit_size for site, components in block.parts for _ in range(len(components) // site.unit_size)]
    if len(group) == block.factor.size:
        return units
    position, found = 0, []
    for size in units:
        if position in group:
            found.append(size)
        position += size
    return found


def latent_units(layout: Layout) -> list[int]:
    """Feature sizes of all units of a row, in the order of its vector."""
    return [s.unit_size for s in layout.sites for _ in range(layout.copies(s) * s.num_features // s.unit_size)]


def can_enumerate(program: Program, max_states: int = MAX_STATES) -> bool:
    """Whether all latents of a row are discrete, with at most ``max_states`` joint states."""
    if any(s.kind not in (Kind.BINARY, Kind.ONE_HOT, Kind.CATEGORICAL) for s in program.latents):
        return False
    return log2_states(program) <= math.log2(max_states)


def log2_states(program: Program) -> float:
    """Logarithm to base 2 of the number of joint states of a row."""
    layout = Layout(program.rows, program.latents)
    return sum(1.0 if size == 1 else math.log2(size) for size in latent_units(layout))


def enumerate_log_joint(program: Program) -> Tensor:
    """log p(v, h) at every state of every row, in chunks that bound the memory.

    Returns:
        Tensor ``(R, S)`` in nats, states in the order of `enumerate_states`.
    """
    layout = Layout(program.rows, program.latents)
    states = enumerate_states(latent_units(layout), device=program.number.device).to(program.number.dtype)
    widest = max(program.trace.nodes[name]["fn"].event_shape.numel() for name in program.visible)
    chunk = max(1, CHUNK_ELEMENTS // max(1, program.rows.count * max(widest, layout.num_features)))
    found = []
    for part in states.split(chunk):
        flat = part[:, None, :].expand(len(part), program.rows.count, layout.num_features)
        log_joint = program.log_joint(layout.values(flat), num_particles=len(part))
        found.append(log_joint.reshape(len(part), program.rows.count).mT)
    check_rows_apart(program, layout)
    return torch.cat(found, -1)


def check_rows_apart(program: Program, layout: Layout) -> None:
    """Refuse programs in which a row's log p changes with another row's latents, for states are enumerated row by row.

    Raises:
        ValueError: naming the plates.
    """
    count = program.rows.count
    if count < 2:
        return
    generator = torch.Generator().manual_seed(20190421)
    one, other = draw_states(latent_units(layout), (2, count), generator).to(program.number)
    every_second = (torch.arange(count) % 2 == 0).to(one.device)
    with torch.no_grad():
        first = program.log_joint(layout.values(one)).reshape(count)
        second = program.log_joint(layout.values(torch.where(every_second[:, None], one, other))).reshape(count)
    # Hard zeros and NaN are named elsewhere.
    same = ~(first.isfinite() & second.isfinite()) | ((first - second).abs() <= 1e-5 * (1 + first.abs()))
    if not bool(same[every_second].all()):
        raise ValueError(
            f"Expected rows that do not depend on each other in the plates {list(program.rows.names)}, but got a row "
            "whose log p changes with another row's latents. Take what couples them out of the plate."
        )
