"""Exact sums over all paths of a chain: forward-backward, the best path and draws, vectorised over rows.

A chain of T steps with S states has unary log-potentials u of shape ``(R, T, S)`` and pairwise ones P of shape
``(1 or R, 1 or T - 1, S, S)``, previous state first, shared by the rows or the steps where the size is 1. The weight of
a path is exp(sum_t u_t(s_t) + sum_t P_t(s_{t-1}, s_t)). (Rabiner, 1989.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RESCALE_EVERY = {torch.float64: 8, torch.float32: 2}
"""Steps between two rescalings of the messages: as many as the exponent of the dtype bears."""

HARD = 1e30
"""What stands for infinity in sums that must not meet 0 times infinity, nor infinity minus infinity."""

CHUNK_ELEMENTS = 2**22
"""Numbers in one chunk of steps of pair probabilities."""


@dataclass(frozen=True)
class Smoothed(ABC):
    """A chain summed over its paths.

    Attributes:
        unary: u, shape ``(R, T, S)``, nats.
        pairwise: P, shape ``(1 or R, 1 or T - 1, S, S)``, nats.
        log_normalizer: log of the sum of all paths' weights, shape ``(R,)``, nats.
    """

    unary: Tensor
    pairwise: Tensor
    log_normalizer: Tensor

    @cached_property
    @abstractmethod
    def marginals(self) -> Tensor:
        """p(s_t), shape ``(R, T, S)``."""

    @cached_property
    @abstractmethod
    def pairs(self) -> Tensor:
        """p(s_{t-1}, s_t) for t = 2 .. T, shape ``(R, T - 1, S, S)``."""

    @abstractmethod
    def pair_sum(self, weights: Tensor | None = None) -> Tensor:
        """sum_n sum_t w_nt p(s_{n,t-1}, s_nt), shape ``(S, S)``, for weights ``(R, T - 1)``."""

    @abstractmethod
    def pair_expectation(self, scores: Tensor) -> Tensor:
        """sum_t E[score_t(s_{t-1}, s_t)] per row ``(R,)``, for scores shaped as `pairwise`."""

    @abstractmethod
    def onward(self, step: int, state: Tensor) -> Tensor:
        """p(s_t | s_{t-1}) up to a factor, ``(N, R, S)``, at a step t > 0 for states ``(N, R)`` of the step before."""

    def objective(self, unary: Tensor, pairwise: Tensor) -> Tensor:
        """E[score of other potentials] + entropy per row ``(R,)``, nats, for potentials shaped as the chain's own."""
        gain = (self.marginals * _where_possible(self.marginals, unary - self.unary)).sum((-1, -2))
        return self.log_normalizer + gain + self.pair_expectation(pairwise - self.pairwise)

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of the path, shape ``(R,)``, nats."""
        linear = (self.marginals * _where_possible(self.marginals, self.unary)).sum((-1, -2))
        return self.log_normalizer - linear - self.pair_expectation(self.pairwise)


def smooth(unary: Tensor, pairwise: Tensor) -> Smoothed:
    """Sum over all paths.

    With scaled probabilities where these neither overflow nor underflow and no gradient is asked for, else in
    logarithms, which autograd follows.

    Example:
        >>> chain = smooth(torch.zeros(1, 3, 2), torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]))
        >>> chain.marginals[0, 0]
        tensor([0.5000, 0.5000])
    """
    if torch.is_grad_enabled() and (unary.requires_grad or pairwise.requires_grad):
        return _smooth_logs(unary, pairwise)
    with torch.no_grad():
        return _smooth_scaled(unary, pairwise) or _smooth_logs(unary, pairwise)


@dataclass(frozen=True)
class _Scaled(Smoothed):
    """Sums over paths whose messages are probabilities up to a factor a row and step.

    Attributes:
        left: forward messages, shape ``(R, T, S)``, as views of tensors whose first dimension is time.
        right: backward messages times the weight of their own step, likewise.
        joint: exp(P) up to a factor a matrix.
        overlap: sum_j left_t(j) times what lies ahead of j, shape ``(R, T, 1)``.
        probs: p(s_t).
    """

    left: Tensor
    right: Tensor
    joint: Tensor
    overlap: Tensor
    probs: Tensor

    @cached_property
    def marginals(self) -> Tensor:
        return self.probs

    @cached_property
    def _scaled_right(self) -> Tensor:
        """`right` from t = 2 on, such that left_{t-1}(j) joint(j, k) scaled_right_t(k) sums to one."""
        return self.right[:, 1:] / self.overlap[:, :-1]

    @cached_property
    def pairs(self) -> Tensor:
        return self.left[:, :-1, :, None] * self._scaled_right[:, :, None, :] * self.joint

    @cached_property
    def _row_sums(self) -> Tensor:
        """Sums of the pair probabilities over the steps, ``(R, S, S)``, where the steps share their matrix."""
        return (self.left[:, :-1].mT @ self._scaled_right) * self.joint[:, 0]

    def pair_sum(self, weights: Tensor | None = None) -> Tensor:
        if weights is None and self.joint.shape[1] == 1:
            return self._row_sums.sum(0)
        if self.joint.shape[0] > 1:
            return (self.pairs if weights is None else self.pairs * weights[..., None, None]).sum((0, 1))
        right = self._scaled_right if weights is None else self._scaled_right * weights[..., None]
        left, right = self.left[:, :-1].transpose(0, 1), right.transpose(0, 1)
        if self.joint.shape[1] == 1:
            return (left.flatten(0, 1).mT @ right.flatten(0, 1)) * self.joint[0, 0]
        return ((left.mT @ right) * self.joint[0]).sum(0)

    def pair_expectation(self, scores: Tensor) -> Tensor:
        if self.joint.shape[1] == 1 == scores.shape[1]:
            return (self._row_sums * _where_possible(self._row_sums, scores[:, 0])).sum((-1, -2))
        weighted = self.joint * _where_possible(self.joint, scores)
        return (self.left[:, :-1] * times(self._scaled_right, weighted.mT)).sum((-1, -2))

    def onward(self, step: int, state: Tensor) -> Tensor:
        return _rows_at(self.joint, step, state) * self.right[:, step]


def _where_possible(probs: Tensor, scores: Tensor) -> Tensor:
    """The scores, or 0 where the probability is 0 if some are infinite: it silences a score of minus infinity."""
    return scores if bool(scores.sum().isfinite()) else torch.where(probs > 0, scores, 0)


def _matrix_at(pairwise: Tensor, step: int) -> Tensor:
    """The matrix between step - 1 and step, ``(1 or R, S, S)``."""
    return pairwise[:, 0 if pairwise.shape[1] == 1 else step - 1]


def _rows_at(pairwise: Tensor, step: int, state: Tensor) -> Tensor:
    """The matrices' lines of some states ``(N, R)``, ``(N, R, S)``."""
    matrix = _matrix_at(pairwise, step)
    return matrix[0, state] if len(matrix) == 1 else matrix[torch.arange(len(matrix), device=state.device), state]


def times(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors ``(R, T, S)`` times the matrix of their row and step, ``(1 or R, 1 or T, S, K)``."""
    if matrix.shape[:2] == (1, 1):
        return vectors @ matrix[0, 0]
    # Matrices that are shared must not be copied for every row or step.
    if matrix.shape[1] == 1:
        return vectors @ matrix[:, 0]
    if matrix.shape[0] == 1:
        return (vectors.transpose(0, 1) @ matrix[0]).transpose(0, 1)
    return (vectors[..., None, :] @ matrix).squeeze(-2)


def _smooth_scaled(unary: Tensor, pairwise: Tensor) -> Smoothed | None:
    """Both recursions at once on probabilities; None where they leave the range of the dtype."""
    rows, steps, states = unary.shape
    top = unary.amax(-1, keepdim=True)
    peak = pairwise.amax((-1, -2), keepdim=True)
    joint = (pairwise - peak).exp()
    # Forward through the steps and backward through them are one batch of two; messages take the place of weights.
    messages = unary.new_empty(steps, 2, rows, states)
    left, back = messages[:, 0], messages[:, 1]
    torch.sub(unary.transpose(0, 1), top.transpose(0, 1), out=left).exp_()
    back.copy_(left.flip(0))
    shape = (2, rows, states) if joint.shape[0] == 1 else (2 * rows, 1, states)
    matrices = torch.cat([joint, joint.flip(1).mT]).transpose(0, 1).contiguous().unbind()
    kept = messages.view(steps, *shape).unbind()
    every = RESCALE_EVERY.get(unary.dtype, 1)
    current, ahead = kept[0], torch.empty_like(kept[0])
    for step in range(1, steps):
        torch.bmm(current, matrices[(step - 1) % len(matrices)], out=ahead)
        current = kept[step].mul_(ahead)
        if step % every == 0:
            current = current / current.sum(-1, keepdim=True)
    right = back.flip(0)
    probs = back.copy_(left)
    probs[:-1] *= times(right[1:], joint.mT.transpose(0, 1))
    overlap = probs.sum(-1, keepdim=True)
    # What was rounded in a message that no longer has all its digits is lost in a sum this large.
    if not bool((overlap > torch.finfo(unary.dtype).tiny / torch.finfo(unary.dtype).eps).all()):
        return None
    probs /= overlap
    scaled = [*range(every, steps - 1, every), steps - 1]
    normalizer = left[scaled].sum(-1).log().sum(0) + top.sum((-1, -2))
    normalizer = normalizer + peak.expand(-1, steps - 1, -1, -1).sum((-1, -2, -3))
    left, right, overlap, probs = (x.transpose(0, 1) for x in (left, right, overlap, probs))
    return _Scaled(unary, pairwise, normalizer, left, right, joint, overlap, probs)


def _smooth_logs(unary: Tensor, pairwise: Tensor) -> Smoothed:
    """The forward recursion on logarithms."""
    # Infinities have no gradient; the largest potentials are taken out, or float32 would drown in their sum.
    top = unary.detach().amax(-1, keepdim=True).clamp_min(-HARD)
    peak = pairwise.detach().amax((-1, -2), keepdim=True).clamp_min(-HARD)
    low_unary, low_pairwise = (unary - top).clamp_min(-HARD), (pairwise - peak).clamp_min(-HARD)
    forward = [low_unary[:, 0]]
    for step in range(1, unary.shape[1]):
        forward.append(_log_times(forward[-1], _matrix_at(low_pairwise, step)) + low_unary[:, step])
    normalizer = forward[-1].logsumexp(-1) + top.sum((-1, -2))
    normalizer = normalizer + peak.expand(-1, unary.shape[1] - 1, -1, -1).sum((-1, -2, -3))
    normalizer = torch.where(normalizer < -HARD / 2, -math.inf, normalizer)
    return _Logs(unary, pairwise, normalizer, low_unary, low_pairwise, torch.stack(forward, 1))


def _log_times(messages: Tensor, matrix: Tensor) -> Tensor:
    """log of row vectors ``(R, S)`` times matrices ``(1 or R, S, S)``, all in logarithms."""
    return (messages[:, :, None] + matrix).logsumexp(1)


@dataclass(frozen=True)
class _Logs(Smoothed):
    """Sums over paths whose messages are logarithms.

    Attributes:
        low_unary: u without infinities, at most 0.
        low_pairwise: P likewise.
        left: forward messages, shape ``(R, T, S)``.
    """

    low_unary: Tensor
    low_pairwise: Tensor
    left: Tensor

    @cached_property
    def _ahead(self) -> Tensor:
        """Backward messages, shape ``(R, T, S)``."""
        backward = [torch.zeros_like(self.left[:, -1])]
        for step in range(self.left.shape[1] - 1, 0, -1):
            right = backward[-1] + self.low_unary[:, step]
            backward.append(_log_times(right, _matrix_at(self.low_pairwise, step).mT))
        return torch.stack(backward[::-1], 1)

    @cached_property
    def _right(self) -> Tensor:
        """Backward messages times the weight of their own step, shape ``(R, T, S)``."""
        return self._ahead + self.low_unary

    @cached_property
    def marginals(self) -> Tensor:
        return (self.left + self._ahead).softmax(-1)

    @cached_property
    def pairs(self) -> Tensor:
        return torch.cat([part for _, part in self._pair_chunks()], 1)

    def _pair_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Pair probabilities of some steps after the other, for all of them together may not fit the memory."""
        rows, steps, states = self.left.shape
        size = max(1, CHUNK_ELEMENTS // (rows * states**2))
        # At least one chunk, empty where there is one step.
        for start in range(0, max(1, steps - 1), size):
            here = slice(start, min(start + size, steps - 1))
            pairwise = self.low_pairwise if self.low_pairwise.shape[1] == 1 else self.low_pairwise[:, here]
            scores = self.left[:, :-1][:, here, :, None] + self._right[:, 1:][:, here, None, :] + pairwise
            yield here, scores.flatten(-2).softmax(-1).reshape(scores.shape)

    def pair_sum(self, weights: Tensor | None = None) -> Tensor:
        parts = (p if weights is None else p * weights[:, here, None, None] for here, p in self._pair_chunks())
        return torch.stack([part.sum((0, 1)) for part in parts]).sum(0)

    def pair_expectation(self, scores: Tensor) -> Tensor:
        found = []
        for here, part in self._pair_chunks():
            score = scores if scores.shape[1] == 1 else scores[:, here]
            found.append((part * _where_possible(part, score)).sum((-1, -2, -3)))
        return torch.stack(found).sum(0)

    def onward(self, step: int, state: Tensor) -> Tensor:
        return (_rows_at(self.low_pairwise, step, state) + self._right[:, step]).softmax(-1)


def best_path(unary: Tensor, pairwise: Tensor) -> Tensor:
    """States of the path with the largest weight, shape ``(R, T)`` (Viterbi, 1967).

    Example:
        >>> best_path(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[[0.0, 0.0], [3.0, 0.0]]]]))
        tensor([[1, 0]])
    """
    score, choices = unary[:, 0], []
    for step in range(1, unary.shape[1]):
        best = (score[:, :, None] + _matrix_at(pairwise, step)).max(1)
        choices.append(best.indices)
        score = best.values + unary[:, step]
    path = [score.argmax(-1)]
    for choice in reversed(choices):
        path.append(choice.gather(-1, path[-1][:, None]).squeeze(-1))
    return torch.stack(path[::-1], 1)


def draw_paths(chain: Smoothed, num_samples: int) -> Tensor:
    """Draws of the path, shape ``(num_samples, R, T)``, from torch's global generator."""
    rows, steps, states = chain.unary.shape
    path = [_draw(chain.marginals[:, 0].expand(num_samples, rows, states))]
    for step in range(1, steps):
        path.append(_draw(chain.onward(step, path[-1])))
    return torch.stack(path, -1)


def _draw(weights: Tensor) -> Tensor:
    """One index a row of weights ``(..., S)`` that need not be normalised; a weight of 0 is never drawn."""
    total = weights.cumsum(-1)
    level = (1 - torch.rand(weights.shape[:-1] + (1,), dtype=weights.dtype, device=weights.device)) * total[..., -1:]
    return torch.searchsorted(total, level).squeeze(-1).clamp(max=weights.shape[-1] - 1)
