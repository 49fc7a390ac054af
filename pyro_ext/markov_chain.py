"""Distributions over whole paths: a Markov chain as one site, and what inference turns it into."""
# pyright: reportIncompatibleMethodOverride=false
# torch declares `expand` and `support` otherwise than its own distributions define them.

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from pyro_ext.forward_backward import HARD, Smoothed, draw_paths, smooth, times


class MarkovChain(TorchDistribution):
    r"""The path of a Markov chain, T one-hot states, as one value.

    .. math:: p(h) = \pi_{h_1} \prod_{t = 2}^{T} A_{h_{t-1} h_t}

    No loop over time stands in a model that uses it. The log-density is bilinear in the one-hot path, on the support
    and off it.

    Args:
        initial_logits: log pi up to a constant, shape ``batch + (K,)``.
        transition_logits: log A up to a constant a row, previous state first: ``batch + (K, K)`` for a homogeneous
            chain, or ``batch + (T - 1, K, K)``. Its batch dimensions are as many as those of `initial_logits`, of size
            1 or the same.
        num_steps: T.

    Raises:
        ValueError: shapes that do not go together, or T below one.

    Example:
        >>> chain = MarkovChain(torch.zeros(2), torch.tensor([[9.0, 0.0], [0.0, 9.0]]), num_steps=5)
        >>> chain.event_shape
        torch.Size([5, 2])
        >>> chain.sample().sum(-1)
        tensor([1., 1., 1., 1., 1.])
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, initial_logits: Tensor, transition_logits: Tensor, num_steps: int, *, validate_args: bool | None = None
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"Expected num_steps of at least 1, but got {num_steps!r}. A path has one state or more.")
        if not initial_logits.dim() or not initial_logits.shape[-1]:
            raise ValueError(
                f"Expected initial_logits of shape batch + (K,), but got {tuple(initial_logits.shape)}. Give a number "
                "a state."
            )
        size, extra = initial_logits.shape[-1], transition_logits.dim() - initial_logits.dim()
        fits = extra in (1, 2) and transition_logits.shape[-2:] == (size, size)
        batches = zip(
            initial_logits.shape[:-1], transition_logits.shape[: max(0, initial_logits.dim() - 1)], strict=False
        )
        fits = fits and all(len({*pair} - {1}) < 2 for pair in batches)
        if not fits or (extra == 2 and transition_logits.shape[-3] != num_steps - 1):
            raise ValueError(
                f"Expected transition_logits of shape batch + ({size}, {size}) or batch + ({num_steps - 1}, {size}, "
                f"{size}), but got {tuple(transition_logits.shape)} beside initial_logits of shape "
                f"{tuple(initial_logits.shape)}. Give one matrix, or one a step."
            )
        self.initial_logits = functional.log_softmax(initial_logits, -1)
        self.transition_logits = functional.log_softmax(transition_logits, -1)
        self.is_homogeneous = extra == 1
        self.num_steps = num_steps
        batch = torch.broadcast_shapes(initial_logits.shape[:-1], transition_logits.shape[: -1 - extra])
        super().__init__(batch, torch.Size([num_steps, size]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Any:
        """Paths of one-hot states."""
        return constraints.independent(constraints.one_hot, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        """Expand the batch."""
        new: Any = self._get_checked_instance(MarkovChain, _instance)
        shape = torch.Size(batch_shape)
        for name in ("transition_logits", "is_homogeneous", "num_steps"):
            setattr(new, name, getattr(self, name))
        new.initial_logits = self.initial_logits.expand(shape + self.initial_logits.shape[-1:])
        # As many batch dimensions as the initial logits, of size 1: an expanded table would be copied by every product.
        missing = new.initial_logits.dim() - self.initial_logits.dim()
        new.transition_logits = self.transition_logits.reshape((1,) * missing + self.transition_logits.shape)
        super(MarkovChain, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def pairwise(self) -> Tensor:
        """log A with a dimension for the steps, ``batch + (1 or T - 1, K, K)``."""
        return self.transition_logits[..., None, :, :] if self.is_homogeneous else self.transition_logits

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(h), nats, batch-shaped; bilinear in a relaxed path, which validation refuses.

        Raises:
            ValueError: with validation on, a value that is no path of one-hot states.
        """
        if self._validate_args:
            self._validate_sample(value)
        # A hard zero of p silences only the paths that take it: 0 times minus infinity is no number.
        initial, pairwise = (x.clamp_min(-HARD) for x in (self.initial_logits, self.pairwise))
        first = (value[..., 0, :] * initial).sum(-1)
        if self.num_steps == 1:
            return first
        total = first + (_onward(value[..., :-1, :], pairwise) * value[..., 1:, :]).sum((-1, -2))
        return torch.where(total < -HARD / 2, -math.inf, total)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, shape ``sample_shape + batch + (T, K)``."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            paths = draw_paths(self._chain, shape.numel())
            values = functional.one_hot(paths, self.event_shape[-1]).to(self.initial_logits)
        return values.reshape(shape + self.batch_shape + self.event_shape)

    @cached_property
    def _chain(self) -> Smoothed:
        unary = self.initial_logits.new_zeros(self.batch_shape + self.event_shape)
        unary[..., 0, :] = self.initial_logits
        return smooth(unary.flatten(0, -3) if self.batch_shape else unary[None], self._flat_pairwise)

    @property
    def _flat_pairwise(self) -> Tensor:
        pairwise = self.pairwise
        batch = pairwise.shape[:-3]
        if math.prod(batch) > 1:
            pairwise = pairwise.expand(self.batch_shape + pairwise.shape[-3:])
        return _one_batch(pairwise)

    @property
    def mean(self) -> Tensor:
        """p(h_t), ``batch + (T, K)``."""
        with torch.no_grad():
            return self._chain.marginals.reshape(self.batch_shape + self.event_shape)

    def entropy(self) -> Tensor:
        """Entropy of the path, nats, batch-shaped."""
        return self._chain.entropy.reshape(self.batch_shape)


class ChainPaths(TorchDistribution):
    """Paths under unary and pairwise potentials: what a Markov chain becomes once data are seen.

    One value holds the paths of one or several chains that are coupled in q, each as T * K features. Given are the
    paths of the chains before it; those after it are summed out.

    Args:
        unary: log-potentials of the joint states, ``batch + (T, S)``.
        pairwise: ``batch + (1 or T - 1, S, S)``.
        units: number of states of every chain; S is their product, the first changing slowest.
        start: the first chain of the value.
        stop: one past its last chain.
        earlier: paths of the chains before `start`, ``batch + (features,)``; None where there are none, and for the
            marginal.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        unary: Tensor,
        pairwise: Tensor,
        units: Sequence[int],
        start: int,
        stop: int,
        earlier: Tensor | None = None,
    ) -> None:
        self.units, self.start, self.stop = tuple(units), start, stop
        self.num_steps = unary.shape[-2]
        if earlier is not None:
            unary = unary + self._clamp(earlier, range(start), unary)
        self.unary, self.pairwise = unary, pairwise
        size = self.num_steps * sum(self.units[start:stop])
        super().__init__(unary.shape[:-2], torch.Size([size]), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Features that are zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ChainPaths:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        unary = self.unary.expand(shape + self.unary.shape[-2:])
        pairwise = self.pairwise
        if pairwise.dim() > 3:
            pairwise = pairwise.expand(shape + pairwise.shape[-3:])
        return ChainPaths(unary, pairwise, self.units, self.start, self.stop)

    def _agreeing(self, features: Tensor, chains: range, like: Tensor) -> Tensor:
        """1 for the joint states that agree with the paths of some chains, 0 for the others, ``(..., T, S)``."""
        states = joint_states(self.units, like)
        agree = like.new_ones(())
        position = 0
        for chain in chains:
            size = self.units[chain]
            offset = sum(self.units[:chain])
            path = features[..., position : position + self.num_steps * size]
            path = path.reshape(path.shape[:-1] + (self.num_steps, size))
            here = path @ states[:, offset : offset + size].mT
            agree = agree * here
            position += self.num_steps * size
        return agree

    def _clamp(self, features: Tensor, chains: range, like: Tensor) -> Tensor:
        """0 for the joint states that agree with the paths of some chains, minus infinity for the others."""
        return torch.where(self._agreeing(features, chains, like) > 0.5, 0.0, -math.inf).to(like)

    def _smoothed(self, unary: Tensor) -> Smoothed:
        batch = unary.shape[:-2]
        pairwise = self.pairwise
        if pairwise.dim() > 3:
            pairwise = pairwise.expand(batch + pairwise.shape[-3:])
        return smooth(unary.reshape((-1,) + unary.shape[-2:]), _one_batch(pairwise))

    @cached_property
    def _chain(self) -> Smoothed:
        return self._smoothed(self.unary)

    @property
    def _is_whole(self) -> bool:
        return self.start == 0 and self.stop == len(self.units)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of paths, nats; that of some of several coupled chains is a ratio of two sums over paths."""
        total = self._chain.log_normalizer.reshape(self.batch_shape)
        if self._is_whole:
            path = self._agreeing(value, range(self.stop), self.unary)
            # A hard zero silences only the paths that take it: 0 times minus infinity is no number.
            unary, pairwise = self.unary.clamp_min(-HARD), self.pairwise.clamp_min(-HARD)
            steps = _onward(path[..., :-1, :], pairwise) * path[..., 1:, :]
            score = (path * unary).sum((-1, -2)) + steps.sum((-1, -2))
            return torch.where(score < -HARD / 2, -math.inf, score) - total
        unary = self.unary + self._clamp(value, range(self.start, self.stop), self.unary)
        return self._smoothed(unary).log_normalizer.reshape(unary.shape[:-2]) - total

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, shape ``sample_shape + batch + (features,)``."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            paths = draw_paths(self._chain, shape.numel())
        states = joint_states(self.units, self.unary)[paths]
        states = states.reshape(shape + self.batch_shape + states.shape[-2:])
        return paths_to_features(states, self.units, self.start, self.stop)

    @property
    def mean(self) -> Tensor:
        """Expected features, batch + (features,)."""
        states = joint_states(self.units, self.unary)
        mean = (self._chain.marginals @ states).reshape(self.batch_shape + (self.num_steps, -1))
        return paths_to_features(mean, self.units, self.start, self.stop)

    def entropy(self) -> Tensor:
        """Entropy in nats, of a value that holds all chains.

        Raises:
            NotImplementedError: the marginal of some chains is no chain itself.
        """
        if not self._is_whole:
            raise NotImplementedError("The marginal of one of several coupled chains has no entropy in closed form.")
        return self._chain.entropy.reshape(self.batch_shape)


def _one_batch(pairwise: Tensor) -> Tensor:
    """Matrices ``(R, 1 or T - 1, S, S)`` of all batch dimensions; a single step has none."""
    batch = pairwise.shape[:-3]
    return pairwise.reshape((math.prod(batch),) + pairwise.shape[-3:])


def _onward(path: Tensor, pairwise: Tensor) -> Tensor:
    """States ``(..., T - 1, S)`` times the matrices to the next step, ``(..., 1 or T - 1, S, S)``."""
    if math.prod(pairwise.shape[:-3]) == 1:
        flat = path.reshape((math.prod(path.shape[:-2]),) + path.shape[-2:])
        return times(flat, pairwise.reshape((1,) + pairwise.shape[-3:])).reshape(path.shape)
    if pairwise.shape[-3] == 1:
        return path @ pairwise[..., 0, :, :]
    return (path[..., None, :] @ pairwise).squeeze(-2)


def joint_states(units: Sequence[int], like: Tensor) -> Tensor:
    """One-hot features of all joint states of chains, ``(S, sum(units))``, the first chain changing slowest.

    Example:
        >>> joint_states([2, 2], torch.zeros(()))[1]
        tensor([1., 0., 0., 1.])
    """
    grids = torch.meshgrid(*(torch.arange(size, device=like.device) for size in units), indexing="ij")
    parts = [functional.one_hot(g.flatten(), size) for g, size in zip(grids, units, strict=True)]
    return torch.cat(parts, -1).to(like.dtype)


def paths_to_features(values: Tensor, units: Sequence[int], start: int = 0, stop: int | None = None) -> Tensor:
    """Time-major values ``(..., T, sum(units))`` as features chain by chain, ``(..., T * sum(units[start:stop]))``."""
    stop = len(units) if stop is None else stop
    parts = list(values.split(list(units), -1))[start:stop]
    return torch.cat([part.flatten(-2) for part in parts], -1) if len(parts) > 1 else parts[0].flatten(-2)


def features_to_paths(features: Tensor, units: Sequence[int], num_steps: int) -> Tensor:
    """Features chain by chain ``(..., T * sum(units))`` as time-major values ``(..., T, sum(units))``."""
    if len(units) == 1:
        return features.unflatten(-1, (num_steps, units[0]))
    parts = features.split([num_steps * size for size in units], -1)
    steps = [part.reshape(part.shape[:-1] + (num_steps, -1)) for part in parts]
    return torch.cat(steps, -1) if len(steps) > 1 else steps[0]
