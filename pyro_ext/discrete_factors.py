"""Factors over discrete features: independent units, one-hot groups, and joint tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import Tabulated
from pyro_ext.factors import Factor, bilinear
from pyro_ext.states import enumerate_states, num_states


class BernoulliFactor(Factor):
    """Independent binary features; the parameters are their logits.

    Logits are limited to where the probability still differs from 0 and 1 in the working precision,
    so that neither it nor its gradient is ever lost to rounding.
    """

    def __init__(self, size: int) -> None:
        self.size = self.num_params = size
        self.groups = tuple((i,) for i in range(size))

    @staticmethod
    def logits(params: Tensor) -> Tensor:
        """The logits in use, limited to the open interval that the precision can tell from 0 and 1."""
        limit = -math.log(torch.finfo(params.dtype).eps)
        return params.clamp(-limit, limit)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return self.logits(torch.logit(mean))

    def mean(self, params: Tensor) -> Tensor:
        return self.logits(params).sigmoid()

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean = self.mean(params)
        diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
        return bilinear(mean, quadratic) + (diagonal * mean * (1 - mean)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        size = self.logits(params).abs()
        return (torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)).sum(-1)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        return self.logits(linear + 0.5 * quadratic.diagonal(dim1=-2, dim2=-1))

    def from_scores(self, scores: Tensor) -> Tensor:
        return self.logits(scores[..., 1:] - scores[..., :1])

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return dist.Bernoulli(logits=self.logits(params[..., start:stop])).to_event(1)

    def part(self, group: Sequence[int]) -> BernoulliFactor:
        return BernoulliFactor(len(group))


class OneHotFactor(Factor):
    """Independent one-hot groups of K features; the parameters are their logits."""

    def __init__(self, num_groups: int, num_classes: int) -> None:
        self.num_groups, self.num_classes = num_groups, num_classes
        self.size = self.num_params = num_groups * num_classes
        self.groups = tuple(tuple(range(g * num_classes, (g + 1) * num_classes)) for g in range(num_groups))

    def _split(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape[:-1] + (-1, self.num_classes))

    def log_probs(self, params: Tensor) -> Tensor:
        """Log-probabilities ``(..., num_groups, K)``."""
        return functional.log_softmax(self._split(params), -1)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def mean(self, params: Tensor) -> Tensor:
        return self.log_probs(params).exp().reshape(params.shape)

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean = self.mean(params)
        within = torch.zeros(self.size, self.size, dtype=mean.dtype, device=mean.device)
        for group in self.groups:
            within[group[0] : group[-1] + 1, group[0] : group[-1] + 1] = 1
        # h_i h_j = 0 within a group, and h_i^2 = h_i.
        diagonal = (quadratic.diagonal(dim1=-2, dim2=-1) * mean).sum(-1)
        return bilinear(mean, quadratic * (1 - within)) + diagonal

    def entropy(self, params: Tensor) -> Tensor:
        log_probs = self.log_probs(params)
        return -(log_probs.exp() * log_probs).sum((-1, -2))

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        logits = linear + 0.5 * quadratic.diagonal(dim1=-2, dim2=-1)
        return functional.log_softmax(self._split(logits), -1).reshape(logits.shape)

    def from_scores(self, scores: Tensor) -> Tensor:
        return functional.log_softmax(scores, -1)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        if start % self.num_classes or stop % self.num_classes:
            raise ValueError(
                f"Expected a part of whole groups, but got features {start} to {stop}. Split between groups."
            )
        units = [self.num_classes] * ((stop - start) // self.num_classes)
        return Tabulated.one_hot_groups(self._split(params[..., start:stop]), units)

    def part(self, group: Sequence[int]) -> OneHotFactor:
        return OneHotFactor(len(group) // self.num_classes, self.num_classes)


class JointFactor(Factor):
    """All joint states of some discrete units; the parameters are one logit per state.

    Args:
        units: feature size of each unit, 1 for binary, K for one-hot.
    """

    is_joint = True

    def __init__(self, units: Sequence[int]) -> None:
        self.units = tuple(units)
        self.size = sum(units)
        self.num_params = num_states(units)
        self.groups = (tuple(range(self.size)),)

    def states(self, like: Tensor) -> Tensor:
        """The states' features ``(num_params, size)``."""
        return enumerate_states(self.units, device=like.device).to(like.dtype)

    def probs(self, params: Tensor) -> Tensor:
        """Probability of each state ``(..., num_params)``.

        Not exp of the log-probabilities: where these underflow, exp is ten times slower than softmax.
        """
        return params.softmax(-1)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        tiny = torch.finfo(mean.dtype).tiny
        states = self.states(mean)
        binary = torch.tensor([size == 1 for size in self.units for _ in range(size)], device=mean.device)
        off = torch.where(binary, (1 - mean).clamp_min(tiny).log(), torch.zeros_like(mean))
        return mean.clamp_min(tiny).log() @ states.mT + off @ (1 - states).mT

    def mean(self, params: Tensor) -> Tensor:
        return self.probs(params) @ self.states(params)

    def _energies(self, states: Tensor, quadratic: Tensor) -> Tensor:
        """s'Qs of every state, ``(S,)`` or ``(..., S)``."""
        if quadratic.dim() == 2:
            return ((states @ quadratic) * states).sum(-1)
        return bilinear(states, quadratic[..., None, :, :])

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        energies = self._energies(self.states(params), quadratic)
        return self.probs(params) @ energies if energies.dim() == 1 else (self.probs(params) * energies).sum(-1)

    def moment_sum(self, params: Tensor, weights: Tensor | None = None) -> Tensor:
        probs, states = self.probs(params), self.states(params)
        total = probs.sum(0) if weights is None else weights @ probs
        return states.mT @ (total[:, None] * states)

    def objective(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        states = self.states(params)
        scores = linear @ states.mT + 0.5 * self._energies(states, quadratic)
        log_probs = functional.log_softmax(params, -1)
        return (self.probs(params) * (scores - log_probs)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        log_probs = functional.log_softmax(params, -1)
        return -(self.probs(params) * log_probs).sum(-1)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        return self.solve(linear, quadratic)[0]

    def solve(self, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states(linear)
        scores = linear @ states.mT + 0.5 * self._energies(states, quadratic)
        log_probs = functional.log_softmax(scores, -1)
        # At the optimum the objective is the logarithm of the normaliser; exp would underflow slowly in float32.
        return log_probs, scores.amax(-1) - log_probs.amax(-1)

    def from_scores(self, scores: Tensor) -> Tensor:
        return functional.log_softmax(scores, -1)

    def _cut(self, params: Tensor, start: int, stop: int) -> tuple[Tensor, list[list[int]]]:
        parts: list[list[int]] = [[], [], []]
        position = 0
        for size in self.units:
            parts[0 if position < start else 1 if position < stop else 2].append(size)
            position += size
        shape = tuple(num_states(p) for p in parts)
        return params.reshape(params.shape[:-1] + shape), parts

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        table, (before, now, _) = self._cut(params, start, stop)
        table = table.logsumexp(-1)
        if before:
            index = Tabulated.index_of(earlier, before)
            shape = torch.broadcast_shapes(index.shape, table.shape[:-2])
            table = table.expand(shape + table.shape[-2:])
            index = index.expand(shape)[..., None, None].expand(shape + (1, table.shape[-1]))
            table = table.gather(-2, index)
        return Tabulated(table.squeeze(-2), now)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        table, (_, now, _) = self._cut(params, start, stop)
        return Tabulated(table.logsumexp((-3, -1)), now)

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def part(self, group: Sequence[int]) -> JointFactor:
        return self
