"""Base of the models of sequences: dreams, checks at the door, and the observed steps of padded data."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ext.checks import check_count

from .base import Model
from .sequences import check_no_hiding, check_steps, extent, seen_steps


class SequenceModel(Model):
    """A program over sequences: a row of the plate ``"data"`` is a whole sequence, time is part of a site's value.

    A subclass writes `forward` and `check_values`.
    """

    event_dim: int = 1
    """Number of dimensions of one step's value."""

    def forward(
        self,
        v: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        size: int | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Run the program on v, or dream `size` sequences of `num_steps` steps; returns v.

        Args:
            v: sequences, shape (N, T) + event, padded to T steps.
            lengths: number of steps of each sequence, shape (N,); T when None.
            mask: which steps are observed, boolean of shape (N, T); all when None.
            size: N of a dream.
            num_steps: T of a dream.

        Raises:
            ValueError: not exactly one of v and (size, num_steps).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def check_values(self, v: Any, seen: Tensor | None) -> None:
        """Refuse sequences of another shape or dtype, or with values outside the support.

        Args:
            v: the data.
            seen: which steps are observed, (N, T); the others are not looked at. None when all are.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define check_values")

    def dream(self, n: int, num_steps: int | None = None) -> Tensor:
        """Sample from the model, v ~ p(v), whatever handlers surround the call.

        Args:
            n: number of sequences.
            num_steps: number T of steps; it must be given.

        Returns:
            Tensor of shape (n, T) + event, without gradient.

        Raises:
            TypeError, ValueError: n or num_steps is no positive int.
        """
        check_count(n, "n")
        with torch.no_grad(), pyro.poutine.block():
            return self(size=n, num_steps=num_steps)

    def check_data(
        self,
        v: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        size: int | None = None,
        num_steps: int | None = None,
    ) -> None:
        """Refuse bad data; drivers call this once at the door, with the arguments of `forward`.

        Raises:
            TypeError: v, lengths or mask is no tensor, or of a dtype that does not fit.
            ValueError: not exactly one of v and (size, num_steps); v of another shape, without steps, or with values
                outside the support at observed steps; lengths or a mask that do not fit v; a sequence of which no step
                is observed.
        """
        if isinstance(v, list | tuple):
            raise TypeError(
                f"Expected v to be a tensor of sequences padded to the same number of steps, but got a "
                f"{type(v).__name__}. Write v = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), and "
                "lengths=torch.tensor([len(x) for x in sequences])."
            )
        if v is None or size is not None or num_steps is not None:
            extent(v, size, num_steps, self.event_dim)
            check_no_hiding(lengths, mask)
            return
        if not isinstance(v, Tensor) or v.dim() != 2 + self.event_dim or not v.numel():
            self.check_values(v, None)
            return
        check_steps(v.shape[0], v.shape[1], lengths, mask)
        self.check_values(v, seen_steps(v.shape[1], lengths, mask))

    def _start_steps(self, v: Tensor, lengths: Tensor | None, mask: Tensor | None, num_states: int) -> Tensor:
        """The observed steps (M,) + event that a start is made from, after all checks."""
        self.check_data(v, lengths=lengths, mask=mask)
        steps = observed_steps(v, seen_steps(v.shape[1], lengths, mask))
        if len(steps) < num_states:
            raise ValueError(
                f"Expected at least {num_states} observed steps, one per state, but got {len(steps)}. Use fewer states."
            )
        return steps


def observed_steps(x: Tensor, seen: Tensor | None) -> Tensor:
    """The observed steps of all sequences in one dimension: (N, T, ...) to (M, ...)."""
    return x.flatten(0, 1) if seen is None else x[seen]
