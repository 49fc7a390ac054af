"""Factors over discrete features: independent units, one-hot groups, and joint tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import Tabulated
from pyro_ext.factors import CHUNK_ELEMENTS, Factor, bilinear
from pyro_ext.memo import Memo
from pyro_ext.products import row_chunks
from pyro_ext.states import enumerate_states, num_states
from pyro_ext.tracing import holds


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

    def moment_sum(self, params: Tensor, weights: Tensor | None = None) -> Tensor:
        mean = self.mean(params)
        weighted = mean if weights is None else mean * weights[:, None]
        result = weighted.mT @ mean
        result.diagonal().copy_(weighted.sum(0))
        return result

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

    def mode(self, params: Tensor) -> Tensor:
        return (params > 0).to(params.dtype)

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        """See `Factor.divergence`; ``params`` are not limited, so that a gradient leads back from beyond the limit."""
        target = self.logits(target)
        on = functional.logsigmoid(target) - functional.logsigmoid(params)
        off = functional.logsigmoid(-target) - functional.logsigmoid(-params)
        return (target.sigmoid() * on + (-target).sigmoid() * off).sum(-1)

    def part(self, group: Sequence[int]) -> BernoulliFactor:
        return BernoulliFactor(len(group))


class Sums(NamedTuple):
    """What an exact solution knows about a table of states row by row: E-step, M-step and ledger share it.

    Attributes:
        probs: probability of each state ``(R, S)``.
        mean: expected features ``(R, k)``.
        entropy: ``(R,)``, nats.
    """

    probs: Tensor
    mean: Tensor
    entropy: Tensor


_SUMS: Memo[Sums] = Memo()


class ClassSums(NamedTuple):
    """What an exact solution knows about one one-hot group row by row, beside its scores.

    Attributes:
        probs: probability of each class ``(R, K)``.
        log_normalizer: log sum_k exp(score_k), ``(R,)``, nats.
    """

    probs: Tensor
    log_normalizer: Tensor


_CLASS_SUMS: Memo[ClassSums] = Memo()


def solve_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities proportional to exp(score), ``(..., S)``, and the logarithm of the normaliser, ``(...)``.

    Probabilities that would underflow stay at the least that does not: exp is ten times slower on those, and even
    softmax, which is not, takes twice the time of these passes.
    """
    if torch.is_grad_enabled() and scores.requires_grad:
        return scores.softmax(-1), scores.logsumexp(-1)
    least = math.log(torch.finfo(scores.dtype).tiny) + 8
    flat = scores.reshape(-1, scores.shape[-1])
    probs, log_normalizer = torch.empty_like(flat), flat.new_empty(len(flat))
    for rows in row_chunks(flat):
        part, some = flat[rows], probs[rows]
        top = part.amax(-1, keepdim=True)
        torch.sub(part, top, out=some).clamp_(min=least).exp_()
        total = some.sum(-1, keepdim=True)
        some /= total
        torch.add(top, total.log_(), out=log_normalizer[rows].unsqueeze(-1))
    return probs.reshape(scores.shape), log_normalizer.reshape(scores.shape[:-1])


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
        known = _CLASS_SUMS.get(params, (self.num_groups, self.num_classes))
        if known is not None:
            return known.probs.reshape(params.shape)
        # Not exp of the log-probabilities: where these underflow, exp is ten times slower than softmax.
        return self._split(params).softmax(-1).reshape(params.shape)

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean = self.mean(params)
        if self.num_groups == 1:
            return (quadratic.diagonal(dim1=-2, dim2=-1) * mean).sum(-1)
        within = torch.zeros(self.size, self.size, dtype=mean.dtype, device=mean.device)
        for group in self.groups:
            within[group[0] : group[-1] + 1, group[0] : group[-1] + 1] = 1
        # h_i h_j = 0 within a group, and h_i^2 = h_i.
        diagonal = (quadratic.diagonal(dim1=-2, dim2=-1) * mean).sum(-1)
        return bilinear(mean, quadratic * (1 - within)) + diagonal

    def objective(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        if self.num_groups > 1:
            return super().objective(params, linear, quadratic)
        diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
        scores = linear + 0.5 * diagonal if holds(diagonal.any()) else linear
        known = _CLASS_SUMS.get(params, (self.num_groups, self.num_classes))
        if known is not None:
            gain = _expected(known.probs.reshape(params.shape), scores, params)
            return gain + known.log_normalizer.reshape(params.shape[:-1])
        log_probs = functional.log_softmax(params, -1)
        return (params.softmax(-1) * (scores - log_probs)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        known = _CLASS_SUMS.get(params, (self.num_groups, self.num_classes))
        if known is not None:
            expected = _expected(known.probs.reshape(params.shape), params)
            return known.log_normalizer.reshape(params.shape[:-1]) - expected
        return -(self._split(params).softmax(-1) * self.log_probs(params)).sum((-1, -2))

    def sums(self, params: Tensor) -> tuple[Tensor, ...]:
        known = _CLASS_SUMS.get(params, (self.num_groups, self.num_classes))
        return known or ClassSums(self.mean(params), params.logsumexp(-1))

    def remember(self, params: Tensor, sums: tuple[Tensor, ...]) -> None:
        if sums:
            _CLASS_SUMS.set(params, ClassSums(*sums), (self.num_groups, self.num_classes))

    def solve(self, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_groups > 1:
            return super().solve(linear, quadratic)
        diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
        # A mixture has no Q: one pass over all scores less.
        scores = linear + 0.5 * diagonal if holds(diagonal.any()) else linear
        probs, log_normalizer = solve_scores(scores)
        _CLASS_SUMS.set(scores, ClassSums(probs, log_normalizer), (self.num_groups, self.num_classes))
        # At the optimum the objective is the logarithm of the normaliser.
        return scores, log_normalizer

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

    def mode(self, params: Tensor) -> Tensor:
        best = functional.one_hot(self._split(params).argmax(-1), self.num_classes)
        return best.reshape(params.shape).to(params.dtype)

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        log_target = self.log_probs(target)
        return (log_target.exp() * (log_target - self.log_probs(params))).sum((-1, -2))

    def part(self, group: Sequence[int]) -> OneHotFactor:
        return OneHotFactor(len(group) // self.num_classes, self.num_classes)


def _expected(probs: Tensor, scores: Tensor, less: Tensor | None = None) -> Tensor:
    """sum_s p_s score_s, with other scores taken away first; no tensor of all terms is written."""
    if torch.is_grad_enabled() and (scores.requires_grad or probs.requires_grad):
        return (probs * (scores if less is None else scores - less)).sum(-1)
    shape = torch.broadcast_shapes(probs.shape, scores.shape)
    p, s = probs.expand(shape).reshape(-1, shape[-1]), scores.expand(shape).reshape(-1, shape[-1])
    minus = None if less is None else less.expand(shape).reshape(-1, shape[-1])
    found = p.new_empty(len(p))
    for rows in row_chunks(p):
        term = s[rows] if minus is None else s[rows] - minus[rows]
        torch.sum(p[rows] * term, -1, out=found[rows])
    return found.reshape(shape[:-1])


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
        known = _SUMS.get(params, self.units)
        return params.softmax(-1) if known is None else known.probs.reshape(params.shape)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        tiny = torch.finfo(mean.dtype).tiny
        states = self.states(mean)
        binary = torch.tensor([size == 1 for size in self.units for _ in range(size)], device=mean.device)
        off = torch.where(binary, (1 - mean).clamp_min(tiny).log(), torch.zeros_like(mean))
        return mean.clamp_min(tiny).log() @ states.mT + off @ (1 - states).mT

    def mean(self, params: Tensor) -> Tensor:
        known = _SUMS.get(params, self.units)
        if known is not None:
            return known.mean.reshape(params.shape[:-1] + (self.size,))
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

    def moment_sums(self, params: Tensor, weights: Tensor) -> Tensor:
        totals, states = weights.mT @ self.probs(params), self.states(params)
        result = params.new_zeros(weights.shape[1], self.size**2)
        chunk = max(1, CHUNK_ELEMENTS // self.size**2)
        for total, state in zip(totals.split(chunk, -1), states.split(chunk), strict=True):
            result.addmm_(total, (state[:, :, None] * state[:, None, :]).flatten(1))
        return result.unflatten(1, (self.size, self.size))

    def objective(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        if _SUMS.get(params, self.units) is not None:
            return super().objective(params, linear, quadratic)
        states = self.states(params)
        scores = linear @ states.mT + 0.5 * self._energies(states, quadratic)
        log_probs = functional.log_softmax(params, -1)
        return (self.probs(params) * (scores - log_probs)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        known = _SUMS.get(params, self.units)
        if known is not None:
            return known.entropy.reshape(params.shape[:-1])
        log_probs = functional.log_softmax(params, -1)
        return -(self.probs(params) * log_probs).sum(-1)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        return self.solve(linear, quadratic)[0]

    def sums(self, params: Tensor) -> tuple[Tensor, ...]:
        return _SUMS.get(params, self.units) or Sums(self.probs(params), self.mean(params), self.entropy(params))

    def remember(self, params: Tensor, sums: tuple[Tensor, ...]) -> None:
        if sums:
            _SUMS.set(params, Sums(*sums), self.units)

    def solve(self, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states(linear)
        energies = 0.5 * self._energies(states, quadratic)
        if energies.dim() > 1:
            scores = linear @ states.mT + energies
            probs, log_normalizer = solve_scores(scores)
            mean, energy = probs @ states, _expected(probs, energies)
        else:
            scores = torch.addmm(energies, linear.reshape(-1, self.size), states.mT).reshape(
                linear.shape[:-1] + energies.shape
            )
            probs, log_normalizer = solve_scores(scores)
            mean, energy = (probs @ torch.cat([states, energies[:, None]], -1)).split([self.size, 1], -1)
            energy = energy.squeeze(-1)
        entropy = log_normalizer - (linear * mean).sum(-1) - energy
        _SUMS.set(scores, Sums(probs, mean, entropy), self.units)
        # At the optimum the objective is the logarithm of the normaliser.
        return scores, log_normalizer

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

    def mode(self, params: Tensor) -> Tensor:
        return self.states(params)[params.argmax(-1)]

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        log_target = functional.log_softmax(target, -1)
        return (log_target.exp() * (log_target - functional.log_softmax(params, -1))).sum(-1)

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def part(self, group: Sequence[int]) -> JointFactor:
        return self
