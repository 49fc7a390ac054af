"""Sigmoid belief network: layers of binary units, each generating the one below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count

from .base import Model, assign_parameters


class SigmoidBeliefNetwork(Model):
    r"""Directed network of binary layers h_L -> ... -> h_1 -> h_0 = v.

    .. math::
        p(h_L) = \prod_i \mathrm{Bernoulli}(\sigma(b_{L,i})), \qquad
        p(h_{l-1} | h_l) = \prod_i \mathrm{Bernoulli}(\sigma(W_l h_l + b_{l-1})_i)

    The model has no closed-form M-step: learn it by gradient (Neal, 1992; wake-sleep, section 19.5.1).

    Sites: ``"v"``, shape (N, sizes[-1]), 0 or 1; ``"h1"`` next to v up to ``"h{L}"`` at the top, 0 or 1, shapes
    (N, sizes[-2]) to (N, sizes[0]).

    Args:
        sizes: widths of the L + 1 layers from the top to the visible one.
        name: see `Model`.

    Attributes:
        b0, b1, ...: biases (logits) of v, h1, ..., shapes (sizes[-1],), (sizes[-2],), ...
        W1, W2, ...: weights from h1, h2, ... to the layer below, shapes (width below, width).

    Raises:
        ValueError, TypeError: fewer than two layers, or a width that is no positive int.

    Example:
        >>> model = SigmoidBeliefNetwork([16, 32, 64])
        >>> model.dream(3).shape, model.W1.shape, model.W2.shape
        (torch.Size([3, 64]), torch.Size([64, 32]), torch.Size([32, 16]))
    """

    visible_support = constraints.boolean

    def __init__(self, sizes: Sequence[int], *, name: str | None = None) -> None:
        if len(sizes) < 2:
            raise ValueError(
                f"Expected at least two layers, but got sizes={list(sizes)}. "
                "List the widths from the top to the visible layer, such as [16, 32, 64]."
            )
        for size in sizes:
            check_count(size, "every layer's size")
        super().__init__(sizes[-1], name=name)
        self.sizes = tuple(sizes)
        for level, width in enumerate(reversed(sizes)):
            self.declare(f"b{level}", torch.zeros(width))
        for level in range(1, self.num_layers + 1):
            self.declare(f"W{level}", self._draw_weights(level))

    @property
    def num_layers(self) -> int:
        """Number L of latent layers."""
        return len(self.sizes) - 1

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v."""
        weights = [getattr(self, f"W{level}") for level in range(1, self.num_layers + 1)]
        biases = [getattr(self, f"b{level}") for level in range(self.num_layers + 1)]
        with self.data_plate(v, size):
            h = pyro.sample(f"h{self.num_layers}", dist.Bernoulli(logits=biases[-1]).to_event(1))
            for level in range(self.num_layers - 1, 0, -1):
                logits = h @ weights[level].T + biases[level]
                h = pyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))
            return pyro.sample("v", dist.Bernoulli(logits=h @ weights[0].T + biases[0]).to_event(1), obs=v)

    @torch.no_grad()
    def initialize(self, v: Tensor) -> None:
        """Start from W_l ~ U(-1, 1) / sqrt(width of h_l), latent biases 0, visible biases at the data's log odds.

        The log odds are those of (sum_n v_n + 1/2) / (N + 1), finite also for a variable that never varies.

        Raises:
            TypeError, ValueError: see `check_data`.
        """
        self.check_data(v)
        values = {f"b{level}": v.new_zeros(self.sizes[-1 - level]) for level in range(1, self.num_layers + 1)}
        values["b0"] = smoothed_logit(v)
        for level in range(1, self.num_layers + 1):
            values[f"W{level}"] = self._draw_weights(level).to(v)
        assign_parameters(self, values)

    def _draw_weights(self, level: int) -> Tensor:
        below, width = self.sizes[-level], self.sizes[-1 - level]
        return torch.empty(below, width).uniform_(-1, 1) / math.sqrt(width)


def smoothed_logit(v: Tensor) -> Tensor:
    """Log odds of the column means of binary v, shape (N, D), each with half a one and half a zero added."""
    return ((v.sum(0) + 0.5) / (len(v) + 1)).logit()
