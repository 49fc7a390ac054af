"""Programs that are multilinear in their latents: E_q[log p] is log p at the means (19.56, design section 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pyro_ext.affine import NotMultilinearError, groups_that_bend
from pyro_ext.blocks import Block
from pyro_ext.colours import Batch, Group, batches_of, colour_groups, coupled_features, groups_of, write
from pyro_ext.discrete_factors import BernoulliFactor, JointFactor, OneHotFactor
from pyro_ext.evaluators import (
    CHUNK_ELEMENTS,
    Evaluator,
    Parameters,
    check_rows_apart,
    group_units,
)
from pyro_ext.layout import Layout
from pyro_ext.point_factor import DeltaFactor
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError, add_priors
from pyro_ext.rest import gradient_of, hessian_product
from pyro_ext.sites import Kind
from pyro_ext.states import enumerate_states, num_states, state_weights

MAX_TABLE_STATES = 2**12
"""Most joint states of the groups that are enumerated: every update runs the program at each."""


class Multilinear(Evaluator):
    """L and its coordinate maxima by running the program at the means of q: no matrix of couplings, no list of states.

    Where log p(v, h) is affine in the features of each group given the others (the rest, that is: priors that depend
    on no other latent are peeled off and read from their distribution),

        E_q[log p(v, h)] = prior'E[h] + rest(E[h]),    lambda_i = prior_i + d rest / d E[h_i]    (19.56),

    one backward pass for all groups that do not interact. Groups in which it is not affine, and joint factors, are
    enumerated, with the others at their means: a sum over the joint states of these groups alone.

    Args:
        program: the program.
        blocks: the factors of q.
        create_graph: keep the graph to theta, for a gradient M-step.

    Raises:
        NotMultilinearError: latents that are not discrete, factors without states, or too many states to enumerate.
        NotFiniteError: p(v, h) is 0 or NaN at some state (the proviso of 19.56).
    """

    def __init__(self, program: Program, blocks: Sequence[Block], *, create_graph: bool = False) -> None:
        self.program, self.blocks, self.create_graph = program, tuple(blocks), create_graph
        self.layout = Layout(program.rows, program.latents)
        _refuse_unsuitable(program, self.blocks)
        check_rows_apart(program, self.layout)
        self._index = [self.indices(b).to(program.number.device) for b in self.blocks]
        groups = groups_of(self.blocks, self._index)
        joint = [number for number, group in enumerate(groups) if len(_units(group)) > 1]
        _check_states(groups, joint)
        bent = groups_that_bend(program, self.layout, groups, [_units(g) for g in groups], joint)
        _check_states(groups, bent)
        self.tables = [groups[number] for number in bent]
        self.linear_groups = [group for number, group in enumerate(groups) if number not in set(bent)]
        with torch.set_grad_enabled(create_graph):
            self._constant, self._natural = self._priors()
        units = [size for group in self.tables for size in _units(group)]
        self._states = enumerate_states(units, device=program.number.device).to(program.number) if units else None
        self._state_index = [self._index_within(group) for group in self.tables]
        self._positions = torch.cat([g.positions for g in self.tables]) if units else torch.empty(0, dtype=torch.long)
        widest = max(program.trace.nodes[name]["fn"].event_shape.numel() for name in program.visible)
        self._chunk = max(1, CHUNK_ELEMENTS // (program.rows.count * max(widest, self.layout.num_features)))

    # ------------------------------------------------------------------ the program

    def _log_joint(self, flat: Tensor) -> Tensor:
        """The rest at ``(S, R, F)``, shape ``(S, R)``."""
        skip = self.program.peelable
        if len(flat) == 1:
            return self.program.log_joint(self.layout.values(flat[0]), skip=skip).reshape(1, -1)
        log_joint = self.program.log_joint(self.layout.values(flat), skip=skip, num_particles=len(flat))
        return log_joint.reshape(len(flat), -1)

    def _priors(self) -> tuple[Tensor, Tensor]:
        """Constant ``(R,)`` and natural parameters ``(R, F)`` of the peeled priors."""
        program, count = self.program, self.program.rows.count
        zeros = program.number.new_zeros(count, self.layout.num_features)
        peeled = program.peelable
        _, fns = program.evaluate(self.layout.values(zeros), skip=peeled)
        scales = {name: torch.as_tensor(program.trace.nodes[name]["scale"] / program.rows.scale) for name in peeled}
        return add_priors(zeros.new_zeros(count), zeros, self.layout, fns, scales)

    # ------------------------------------------------------------------ sums over the enumerated groups

    def _index_within(self, group: Group) -> Tensor:
        """Which state of a group each joint state of the enumerated groups holds, ``(S,)``."""
        if self._states is None:
            raise NotMultilinearError("Expected groups to enumerate, but there are none. Use their means.")
        start = 0
        for other in self.tables:
            if other is group:
                break
            start += len(other.features)
        features = self._states[:, start : start + len(group.features)].double()
        return (features @ state_weights(_units(group), device=features.device)).round().long()

    def _log_table(self, params: Parameters, group: Group) -> Tensor:
        """log q of every state of one enumerated group, ``(R, U)``."""
        factor = group.block.factor.part(group.features)
        columns = params[group.block.name][:, group.copy, group.block.factor.columns(group.features)]
        states = enumerate_states(_units(group), device=columns.device).to(columns)
        return factor.marginal(columns[:, None, :], 0, factor.size).log_prob(states)

    def _weights(self, params: Parameters, without: Group | None = None) -> Tensor:
        """The probability of each joint state under the enumerated groups, but one perhaps, ``(S, R)``."""
        if self._states is None:
            return self.program.number.new_ones(1, self.program.rows.count)
        total = self._states.new_zeros(self.program.rows.count, len(self._states))
        for group, index in zip(self.tables, self._state_index, strict=True):
            if group is not without:
                total = total + self._log_table(params, group)[:, index]
        return total.exp().mT

    def _chunks(self, means: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """States of the enumerated groups beside the means of the others, with their weights."""
        if self._states is None:
            yield means[None], weights
            return
        for states, part in zip(self._states.split(self._chunk), weights.split(self._chunk), strict=True):
            shape = (len(states), *means.shape)
            there = states[:, None, :].expand(len(states), means.shape[0], -1)
            yield means.expand(shape).index_copy(-1, self._positions, there.to(means)), part

    def _expected_rest(self, means: Tensor, weights: Tensor) -> Tensor:
        """E_q[rest] per row ``(R,)``."""
        parts = [(weight * self._log_joint(flat)).sum(0) for flat, weight in self._chunks(means, weights)]
        return torch.stack(parts).sum(0)

    def _differentiate(self, means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """d E_q[rest] in the means ``(R, F)`` and in the weights ``(S, R)``, without a graph to theta."""
        slopes, values = torch.zeros_like(means), []
        with torch.enable_grad():
            origin = means.detach().requires_grad_()
            for flat, weight in self._chunks(origin, weights.detach()):
                rest = self._log_joint(flat)
                slopes += gradient_of((weight * rest).sum(), origin).detach()
                values.append(rest.detach())
        return slopes, torch.cat(values)

    def _slopes(self, params: Parameters, means: Tensor) -> Tensor:
        """lambda of every group at the means: prior + d E_q[rest] / d means, ``(R, F)``."""
        return self._natural.detach() + self._differentiate(means, self._weights(params))[0]

    def _scores(self, params: Parameters, means: Tensor, group: Group) -> Tensor:
        """E of log p(v, h) under the other groups, for each state of an enumerated one, ``(R, U)``."""
        weights = self._weights(params, without=group)
        with torch.no_grad():
            rest = torch.cat([self._log_joint(flat) for flat, _ in self._chunks(means, weights)])
        states = enumerate_states(_units(group), device=means.device).to(means)
        scores = self._natural.detach()[:, group.positions] @ states.mT
        return scores.index_add(-1, self._state_index[self.tables.index(group)], (weights * rest).mT)

    # ------------------------------------------------------------------ the evaluator

    def bound(self, params: Parameters) -> Tensor:
        means, weights = self.means(params), self._weights(params)
        if self.create_graph:
            rest = self._expected_rest(means, weights)
        elif any(p.requires_grad for p in params.values()):
            # The value with its gradient in q alone: an E-step must leave no gradient in theta.
            slopes, values = self._differentiate(means, weights)
            rest = (weights * values).sum(0) + ((means - means.detach()) * slopes).sum(-1)
        else:
            with torch.no_grad():
                rest = self._expected_rest(means, weights)
        total = self._constant + (self._natural * means).sum(-1) + rest + self.entropy(params)
        if not bool(torch.isfinite(total).all()):
            row = int((~torch.isfinite(total)).nonzero()[0])
            raise NotFiniteError(
                "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got L = "
                f"{float(total[row]):g} in row {row}. Keep probabilities inside (0, 1)."
            )
        return total

    @cached_property
    def _colours(self) -> list[list[Batch]]:
        """Groups that do not interact, found by differentiating twice at random means."""
        generator = torch.Generator().manual_seed(20190422)
        like, count, width = self.program.number, self.program.rows.count, self.layout.num_features
        num_states = 1 if self._states is None else len(self._states)
        weights = torch.rand(num_states, count, generator=generator).to(like) / num_states
        direction = torch.randn(width, generator=generator).to(like)
        with torch.enable_grad():
            origin = torch.rand(count, width, generator=generator).to(like).requires_grad_()
            slopes = gradient_of(self._expected_rest(origin, weights).sum(), origin)
        products = [hessian_product(slopes, origin, d).detach() for d in _one_a_row(origin)]
        pairs = torch.cat(products)[:width]
        colours = colour_groups(self.linear_groups, coupled_features(pairs))
        if any(self._interact(colour, slopes, origin, direction) for colour in colours):
            # Rows differ in which groups interact: each of them is asked for every pair.
            eye = torch.eye(width).to(like)
            full = [hessian_product(slopes, origin, d.expand_as(origin)).detach().abs().amax(0) for d in eye]
            colours = colour_groups(self.linear_groups, coupled_features(torch.stack(full)))
        return [batches_of([self.linear_groups[g] for g in colour]) for colour in colours]

    def _interact(self, colour: list[int], slopes: Tensor, origin: Tensor, direction: Tensor) -> bool:
        """Whether groups of one colour interact in some row."""
        positions = torch.cat([self.linear_groups[g].positions for g in colour])
        among = torch.zeros_like(direction).index_copy(0, positions, direction[positions])
        product = hessian_product(slopes, origin, among.expand_as(origin)).detach().abs()
        return bool((product[:, positions] > 1e3 * torch.finfo(product.dtype).eps * product.amax()).any())

    def sweep(self, params: Parameters) -> Parameters:
        params = {name: value.clone() for name, value in params.items()}
        means = self.means(params)
        for colour in self._colours:
            slopes = self._slopes(params, means)
            for batch in colour:
                self._set(params, means, batch, slopes)
        for group in self.tables:
            self._tabulate(params, means, group, self._scores(params, means, group))
        return params

    def jump(self, params: Parameters) -> Parameters:
        new = {name: value.clone() for name, value in params.items()}
        means = self.means(params)
        slopes, unused = self._slopes(params, means), means.clone()
        for batch in batches_of(self.linear_groups):
            self._set(new, unused, batch, slopes)
        for group in self.tables:
            self._tabulate(new, unused, group, self._scores(params, means, group))
        return new

    def solve(self) -> tuple[Parameters, Tensor]:
        block, group = self.blocks[0], self.tables[0]
        zeros = self._natural.new_zeros(self.program.rows.count, 1, block.factor.num_params)
        params: Parameters = {block.name: zeros}
        means = self._natural.new_zeros(self._natural.shape)
        self._tabulate(params, means, group, self._scores(params, means, group))
        return params, self.bound(params)

    @property
    def exact_posterior(self) -> bool:
        """Whether one enumerated group covers all latents of a row."""
        return super().exact_posterior and bool(self.tables)

    def _set(self, params: Parameters, means: Tensor, batch: Batch, slopes: Tensor) -> None:
        factor = batch.block.factor.part(batch.features)
        field = slopes[:, batch.positions] / self.weight(batch.block)
        new = factor.optimum(field, field.new_zeros(factor.size, factor.size))
        write(params, batch, new)
        means[:, batch.positions] = factor.mean(new)

    def _tabulate(self, params: Parameters, means: Tensor, group: Group, scores: Tensor) -> None:
        factor = group.block.factor.part(group.features)
        new = factor.from_scores(scores / self.weight(group.block))
        params[group.block.name][:, group.copy, group.block.factor.columns(group.features)] = new
        means[:, group.positions] = factor.mean(new)


def _one_a_row(origin: Tensor) -> Iterator[Tensor]:
    """Directions in which every row probes another feature, until all features are probed."""
    count, width = origin.shape
    for start in range(0, width, count):
        rows = torch.arange(min(count, width - start))
        directions = torch.zeros_like(origin)
        directions[rows, start + rows] = 1
        yield directions


def _units(group: Group) -> list[int]:
    return group_units(group.block, group.features)


def _refuse_unsuitable(program: Program, blocks: Sequence[Block]) -> None:
    for site in program.latents:
        if site.kind not in (Kind.BINARY, Kind.ONE_HOT, Kind.CATEGORICAL):
            raise NotMultilinearError(
                f"Expected binary, one-hot or categorical latents, but got the {site.kind.value} site {site.name!r}. "
                "Use `Gradient`, or pyro.infer.SVI."
            )
    for block in blocks:
        if not isinstance(block.factor, BernoulliFactor | OneHotFactor | JointFactor | DeltaFactor):
            raise NotMultilinearError(
                f"Expected factors whose states can be listed, but got {type(block.factor).__name__} in block "
                f"{block.name!r}. Use MeanField, or blocks with a table of states."
            )


def _check_states(groups: Sequence[Group], enumerated: Sequence[int]) -> None:
    total = math.prod(num_states(_units(groups[number])) for number in enumerated)
    if total > MAX_TABLE_STATES:
        names = sorted({groups[number].block.name for number in enumerated})
        raise NotMultilinearError(
            f"Expected at most {MAX_TABLE_STATES} joint states of joint factors and of units in which log p(v, h) is "
            f"not affine, but got 2^{math.log2(total):.0f} in the blocks {', '.join(map(repr, names))}. Use smaller "
            "blocks, or `FixedPoint(evaluator=Sampled())`."
        )
