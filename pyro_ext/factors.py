"""Factors: the families that the blocks of q are drawn from, as functions of a parameter tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import PointMass, Tabulated
from pyro_ext.states import enumerate_states, num_states


class Factor(ABC):
    """The family of one block of q: a distribution over ``size`` features.

    A factor holds no parameters: every method takes them as a tensor ``(..., num_params)``, so that a
    table and an encoder network serve alike. A *group* is a set of features that change at once; the
    groups of a factor are independent under q.

    Attributes:
        size: number of features k.
        num_params: number of parameters P.
        groups: the features of each group.
        is_joint: one group holds all features and its states are coupled.
    """

    size: int
    num_params: int
    groups: tuple[tuple[int, ...], ...]
    is_joint: bool = False
    is_point: bool = False

    @abstractmethod
    def initial(self, mean: Tensor, spread: float) -> Tensor:
        """Parameters ``(..., P)`` of a broad start with the given feature means ``(..., k)``."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """E_q[h], shape ``(..., k)``: probabilities for discrete features."""

    @abstractmethod
    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        """E_q[h' Q h], shape ``(...)``, for Q of shape ``(k, k)`` or ``(..., k, k)``."""

    def moment_sum(self, params: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_n w_n E_q[h_n h_n'], shape ``(k, k)``, for parameters ``(R, P)`` and weights ``(R,)``.

        It is the derivative of the second moment in Q.
        """
        with torch.enable_grad():
            quadratic = params.new_zeros(self.size, self.size).requires_grad_()
            second = self.second_moment(params.detach(), quadratic)
            (result,) = torch.autograd.grad((second if weights is None else weights * second).sum(), quadratic)
        return result

    def objective(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """E_q[l'h + h'Qh / 2] + H(q), shape ``(...)``, nats."""
        expected = (linear * self.mean(params)).sum(-1) + 0.5 * self.second_moment(params, quadratic)
        return expected + self.entropy(params)

    @abstractmethod
    def entropy(self, params: Tensor) -> Tensor:
        """H(q) in nats, shape ``(...)``; 0 for a point mass."""

    @abstractmethod
    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        """Parameters of the q that maximises E_q[l'h + h'Qh / 2] + H(q), each group on its own (19.56).

        Args:
            linear: l, shape ``(..., k)``.
            quadratic: Q, shape ``(k, k)`` or ``(..., k, k)``; only its blocks within a group are read.

        Raises:
            ValueError: no maximum exists (a continuous factor whose Q is not negative definite).
        """

    def solve(self, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        """The `optimum` of a factor of one group, and the value of its `objective` there."""
        params = self.optimum(linear, quadratic)
        return params, self.objective(params, linear, quadratic)

    def from_scores(self, scores: Tensor) -> Tensor:
        """Parameters of the q over one group that maximises E_q[score] + H(q).

        Args:
            scores: ``(..., num_states)``, one per state of the group in the order of `enumerate_states`.

        Raises:
            TypeError: the factor is continuous.
        """
        raise TypeError(f"Expected a discrete factor, but got {type(self).__name__}. Its states cannot be enumerated.")

    @abstractmethod
    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        """q(h[start:stop] | h[:start] = earlier), a distribution over features (event dimension 1)."""

    @abstractmethod
    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        """q(h[start:stop]), a distribution over features (event dimension 1)."""

    def columns(self, group: Sequence[int]) -> list[int]:
        """The parameter columns of one group."""
        return list(group)

    @abstractmethod
    def part(self, group: Sequence[int]) -> Factor:
        """The same family over one group alone."""


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
        return _bilinear(mean, quadratic) + (diagonal * mean * (1 - mean)).sum(-1)

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
        return _bilinear(mean, quadratic * (1 - within)) + diagonal

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
        return _bilinear(states, quadratic[..., None, :, :])

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


class NormalFactor(Factor):
    """Independent real features; the parameters are k means, then k logarithms of standard deviations."""

    def __init__(self, size: int) -> None:
        self.size, self.num_params = size, 2 * size
        self.groups = tuple((i,) for i in range(size))

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``(..., k)``."""
        return params[..., : self.size], params[..., self.size :].exp()

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return torch.cat([mean, torch.full_like(mean, math.log(spread))], -1)

    def mean(self, params: Tensor) -> Tensor:
        return params[..., : self.size]

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean, scale = self.moments(params)
        return _bilinear(mean, quadratic) + (quadratic.diagonal(dim1=-2, dim2=-1) * scale**2).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        return (params[..., self.size :] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        precision = (-quadratic.diagonal(dim1=-2, dim2=-1)).expand_as(linear)
        _check_concave(precision)
        return torch.cat([linear / precision, -0.5 * precision.log()], -1)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        mean, scale = self.moments(params)
        return dist.Normal(mean[..., start:stop], scale[..., start:stop]).to_event(1)

    def columns(self, group: Sequence[int]) -> list[int]:
        return [*group, *(self.size + i for i in group)]

    def part(self, group: Sequence[int]) -> NormalFactor:
        return NormalFactor(len(group))


class MultivariateNormalFactor(Factor):
    """One Gaussian over k real features: k means, then the lower triangle of the Cholesky factor.

    The triangle is stored row by row, with the logarithm of its diagonal.
    """

    is_joint = True

    def __init__(self, size: int) -> None:
        self.size, self.num_params = size, size + size * (size + 1) // 2
        self.groups = (tuple(range(size)),)

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(..., k)`` and Cholesky factor of the covariance ``(..., k, k)``."""
        rows, columns = torch.tril_indices(self.size, self.size, device=params.device)
        tril = torch.zeros(params.shape[:-1] + (self.size, self.size), dtype=params.dtype, device=params.device)
        entries = params[..., self.size :]
        diagonal = rows == columns
        # The gradient must not see the exponential of an entry off the diagonal: it may overflow.
        tril[..., rows, columns] = torch.where(diagonal, torch.where(diagonal, entries, 0).exp(), entries)
        return params[..., : self.size], tril

    def pack(self, mean: Tensor, tril: Tensor) -> Tensor:
        """The parameters of a mean and a Cholesky factor."""
        rows, columns = torch.tril_indices(self.size, self.size, device=mean.device)
        entries = tril[..., rows, columns]
        entries = torch.where(rows == columns, entries.abs().log(), entries)
        return torch.cat([mean, entries.expand(mean.shape[:-1] + entries.shape[-1:])], -1)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return self.pack(mean, spread * torch.eye(self.size, dtype=mean.dtype, device=mean.device))

    def mean(self, params: Tensor) -> Tensor:
        return params[..., : self.size]

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean, tril = self.moments(params)
        return _bilinear(mean, quadratic) + (tril * (quadratic @ tril)).sum((-1, -2))

    def entropy(self, params: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(self.size, self.size, device=params.device)
        log_diagonal = params[..., self.size :][..., rows == columns]
        return log_diagonal.sum(-1) + 0.5 * self.size * math.log(2 * math.pi * math.e)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        precision = -0.5 * (quadratic + quadratic.mT)
        # Flipping twice turns the Cholesky factor of the precision into that of the covariance.
        flipped, info = torch.linalg.cholesky_ex(precision.flip(-1, -2))
        if bool((info != 0).any()):
            _check_concave(torch.linalg.eigvalsh(precision))
        root = flipped.flip(-1, -2)
        eye = torch.eye(self.size, dtype=linear.dtype, device=linear.device)
        tril = torch.linalg.solve_triangular(root, eye, upper=True).mT
        tril = tril if tril.dim() == 2 else tril.expand(linear.shape[:-1] + tril.shape[-2:])
        mean = (tril @ (tril.mT @ linear[..., None])).squeeze(-1)
        return self.pack(mean, tril)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        mean, tril = self.moments(params)
        loc = mean[..., start:stop]
        if start:
            difference = (earlier - mean[..., :start])[..., None]
            noise = torch.linalg.solve_triangular(tril[..., :start, :start], difference, upper=False)
            loc = loc + (tril[..., start:stop, :start] @ noise).squeeze(-1)
        return dist.MultivariateNormal(loc, scale_tril=tril[..., start:stop, start:stop])

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        mean, tril = self.moments(params)
        rows = tril[..., start:stop, :]
        return dist.MultivariateNormal(mean[..., start:stop], covariance_matrix=rows @ rows.mT)

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def part(self, group: Sequence[int]) -> MultivariateNormalFactor:
        return self


class DeltaFactor(Factor):
    """A point mass; the parameters are the features themselves.

    Args:
        size: number of features.
        unit_size: 1, or K for one-hot groups of K features.
        discrete: the features are zeros and ones, and the optimum is taken over those (coordinate-wise MAP).
    """

    is_point = True

    def __init__(self, size: int, unit_size: int = 1, *, discrete: bool) -> None:
        self.size = self.num_params = size
        self.unit_size, self.discrete = unit_size, discrete
        self.groups = tuple(tuple(range(g, g + unit_size)) for g in range(0, size, unit_size))

    def _split(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape[:-1] + (-1, self.unit_size))

    def _mode(self, score: Tensor) -> Tensor:
        if self.unit_size == 1:
            return (score > 0).to(score.dtype)
        best = functional.one_hot(self._split(score).argmax(-1), self.unit_size)
        return best.reshape(score.shape).to(score.dtype)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        if not self.discrete:
            return mean.clone()
        return self._mode(mean - 0.5 if self.unit_size == 1 else mean)

    def mean(self, params: Tensor) -> Tensor:
        return params

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        return _bilinear(params, quadratic)

    def entropy(self, params: Tensor) -> Tensor:
        return params.new_zeros(params.shape[:-1])

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
        if self.discrete:
            return self._mode(linear + 0.5 * diagonal)
        precision = (-diagonal).expand_as(linear)
        _check_concave(precision)
        return linear / precision

    def from_scores(self, scores: Tensor) -> Tensor:
        if self.unit_size == 1:
            return (scores[..., 1:] > scores[..., :1]).to(scores.dtype)
        return functional.one_hot(scores.argmax(-1), self.unit_size).to(scores.dtype)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return PointMass(params[..., start:stop], discrete=self.discrete)

    def part(self, group: Sequence[int]) -> DeltaFactor:
        return DeltaFactor(len(group), self.unit_size, discrete=self.discrete)


def _bilinear(value: Tensor, quadratic: Tensor) -> Tensor:
    return (value * (value[..., None, :] @ quadratic.mT).squeeze(-2)).sum(-1)


def _check_concave(precision: Tensor) -> None:
    if not bool((precision > 0).all()):
        raise ValueError(
            "Expected log p(v, h) to fall away from its maximum in every continuous latent, but got a precision of "
            f"{float(precision.min()):.3g}. Give the latent a proper prior."
        )
