"""The mean-field fixed point of binary sparse coding as a network with learned weights (19.5)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_ext.checks import check_count
from pyro_ext.discrete_factors import BernoulliFactor
from pyro_ext.guides.ista import check_matrix, positive, read_attributes, rows_of, vector
from pyro_ext.schedules import Parallel


class MeanFieldNetwork(nn.Module):
    r"""Unrolled parallel updates of the fixed point (19.44), with learned weights.

    .. math::
        x^0 = start, \qquad x^{t+1} = d\, x^t + (1 - d) (A v + c + S \sigma(x^t))

    The outputs x are logits, the parameters of the Bernoulli factors of binary latents: an encoder of `Amortized`.
    Every layer knows what the others found, so that units compete, as in the fixed point itself (Salakhutdinov &
    Larochelle, 2010, on networks for mean field). `from_model` starts it where the layers are exactly as many sweeps of
    ``FixedPoint(Parallel(damping))`` from a cold start.

    Logits are limited as `BernoulliFactor` limits them; the gradient passes the limit.

    Args:
        num_visible: number D of inputs.
        num_latents: number F of binary latents.
        num_layers: number K of updates.
        damping: d in [0, 1), the share of the old logits that an update keeps.
        tied: all layers share A, c and S; else each has its own.

    Attributes:
        A: shape ``(1, F, D)`` when tied, else ``(K, F, D)``.
        c: shape ``(1, F)`` or ``(K, F)``.
        S: shape ``(1, F, F)`` or ``(K, F, F)``.
        start: logits before the first update, shape ``(F,)``.

    Raises:
        TypeError: a size that is no int.
        ValueError: a size below 1, or damping outside [0, 1).

    Example:
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import BinarySparseCoding
        >>> model = BinarySparseCoding(num_visible=5, num_latents=3)
        >>> guide = Amortized(model, encoder=MeanFieldNetwork.from_model(model, num_layers=4))
        >>> guide.posterior(torch.randn(2, 5))["h"].mean.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, num_visible: int, num_latents: int, num_layers: int = 3, *, damping: float = 0.5, tied: bool = True
    ) -> None:
        check_count(num_visible, "num_visible")
        check_count(num_latents, "num_latents")
        check_count(num_layers, "num_layers")
        super().__init__()
        self.num_visible, self.num_latents, self.num_layers = num_visible, num_latents, num_layers
        self.damping, self.tied = Parallel(damping).damping, bool(tied)
        W = torch.randn(num_visible, num_latents) / math.sqrt(num_latents)
        self._build(torch.zeros(num_latents), W, torch.ones(num_visible))

    def _build(self, b: Tensor, W: Tensor, beta: Tensor) -> None:
        weighted = W.mT * beta
        gram = weighted @ W
        diagonal = gram.diagonal()
        copies = 1 if self.tied else self.num_layers
        self.A = nn.Parameter(weighted.repeat(copies, 1, 1))
        self.c = nn.Parameter((b - 0.5 * diagonal).repeat(copies, 1))
        self.S = nn.Parameter((diagonal.diag() - gram).repeat(copies, 1, 1))
        self.start = nn.Parameter(BernoulliFactor.logits(b))

    @classmethod
    def from_model(cls, model: Any, *, num_layers: int = 3, damping: float = 0.5, tied: bool = True) -> Self:
        """A = W' beta, c = b - diag(W' beta W) / 2, S = -W' beta W off its diagonal and 0 on it, and start = b.

        Args:
            model: with the attributes of `BinarySparseCoding`: prior logits b ``(F,)``, W ``(D, F)``, and precisions
                beta, () or ``(D,)``.
            num_layers: number K of updates.
            damping: see the class.
            tied: see the class.

        Raises:
            TypeError: an attribute is missing, W is no floating tensor, or num_layers no int.
            ValueError: W is no finite matrix or is 0; b is not finite; beta is not positive; shapes do not fit;
                num_layers is below 1; damping is outside [0, 1).
        """
        found = read_attributes(model, "b", "W", "beta")
        W = found["W"]
        check_matrix(W)
        D, F = W.shape
        b, beta = vector(found["b"], F, W, "b"), positive(found["beta"], D, W, "beta")
        with torch.random.fork_rng(devices=[]):
            network = cls(D, F, num_layers, damping=damping, tied=tied)
        network._build(b, W, beta)
        return network

    def forward(self, v: Tensor) -> Tensor:
        """Logits ``(..., F)`` of inputs ``(..., D)``.

        Raises:
            ValueError: inputs of another width.
        """
        rows = rows_of(v, self.num_visible)
        # One product for all layers: the drive does not depend on the means.
        drives = functional.linear(rows, self.A.flatten(0, 1), self.c.flatten())
        drives, couplings = drives.unflatten(-1, self.c.shape).unbind(1), self.S.unbind()
        logits = self.start.expand(len(rows), -1)
        for layer in range(self.num_layers):
            own = 0 if self.tied else layer
            field = torch.addmm(drives[own], logits.sigmoid(), couplings[own].mT)
            logits = torch.lerp(_limited(field), logits, self.damping)
        return logits.reshape(v.shape[:-1] + (self.num_latents,))


def _limited(logits: Tensor) -> Tensor:
    """Logits as `BernoulliFactor` limits them, with the gradient of the logits: a saturated unit must not be stuck."""
    return logits + (BernoulliFactor.logits(logits) - logits).detach()
