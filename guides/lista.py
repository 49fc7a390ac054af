"""Learned ISTA: sparse codes from a few layers of shrinkage (19.5.2)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_ext.checks import check_count
from pyro_ext.guides.encoders import PointEncoder
from pyro_ext.guides.ista import Ista, is_nonnegative, rows_of, shrink


class LISTA(PointEncoder):
    r"""Unrolled ISTA with learned matrices (Gregor & LeCun, 2010), a deep encoder of sparse codes (19.5.2).

    .. math::
        h^1 = shrink(A (v - bias), \theta), \qquad h^{k+1} = shrink(A (v - bias) + S h^k, \theta)

    Unlike a shallow encoder, it lets units compete: S h takes away what others explain. `from_dictionary` and
    `from_model` start it where ``num_layers`` layers are exactly as many iterations of ISTA from h = 0, with the step
    1 / L. Trained, a few layers come as near to the solution as many iterations.

    Built from sizes it starts as ISTA for random atoms.

    Args:
        num_visible: number D of inputs.
        num_latents: number F of latents.
        num_layers: number K of shrinkages.
        tied: all layers share A, S and theta; else each has its own.
        nonnegative: codes are at least 0; the shrinkage is max(x - theta, 0).

    Attributes:
        A: shape ``(1, F, D)`` when tied, else ``(K, F, D)``.
        S: shape ``(1, F, F)`` when tied, else ``(K - 1, F, F)``; None for a single layer.
        log_theta: logarithms of the thresholds, shape ``(1, F)`` or ``(K, F)``.
        bias: shape ``(D,)``.

    Raises:
        TypeError: a size that is no int.
        ValueError: a size below 1.

    Example:
        >>> LISTA.from_dictionary(torch.eye(2), rate=0.5, num_layers=2)(torch.tensor([[2.0, -0.1]])).detach()
        tensor([[1.5000, 0.0000]])
    """

    S: nn.Parameter | None

    def __init__(
        self,
        num_visible: int,
        num_latents: int,
        num_layers: int = 3,
        *,
        tied: bool = True,
        nonnegative: bool = False,
    ) -> None:
        check_count(num_visible, "num_visible")
        check_count(num_latents, "num_latents")
        check_count(num_layers, "num_layers")
        super().__init__()
        self._build(Ista.random(num_visible, num_latents), num_layers, tied=tied, nonnegative=nonnegative)

    def _build(self, ista: Ista, num_layers: int, *, tied: bool, nonnegative: bool) -> None:
        A, S, theta = ista.weights()
        self.num_visible, self.num_latents = ista.W.shape
        self.num_layers, self.tied, self.nonnegative = num_layers, bool(tied), bool(nonnegative)
        copies, couplings = (1, min(1, num_layers - 1)) if tied else (num_layers, num_layers - 1)
        self.A = nn.Parameter(A.repeat(copies, 1, 1))
        self.register_parameter("S", nn.Parameter(S.repeat(couplings, 1, 1)) if couplings else None)
        self.log_theta = nn.Parameter(theta.log().repeat(copies, 1))
        self.bias = nn.Parameter(ista.bias)

    @classmethod
    def from_dictionary(
        cls,
        W: Tensor,
        rate: float | Tensor,
        beta: float | Tensor = 1.0,
        bias: Tensor | None = None,
        *,
        num_layers: int = 3,
        tied: bool = True,
        nonnegative: bool = False,
    ) -> Self:
        r"""The network that does ISTA on :math:`\sum_i beta_i (v_i - bias_i - (W h)_i)^2 / 2 + \sum_j rate_j |h_j|`.

        Args:
            W: atoms in the columns, shape ``(D, F)``; its dtype and device are the network's.
            rate: positive, shape () or ``(F,)``: nats that a unit of |h_j| costs.
            beta: positive, shape () or ``(D,)``: precisions of the noise.
            bias: shape ``(D,)``; None for 0.
            num_layers: number K of iterations.
            tied: see the class.
            nonnegative: see the class.

        Raises:
            TypeError: W is no floating tensor, or num_layers no int.
            ValueError: W is no finite matrix or is 0; rate or beta is not positive; bias is not finite; shapes do not
                fit; num_layers is below 1.
        """
        return cls._start(Ista.of(W, rate, beta, bias), num_layers, tied=tied, nonnegative=nonnegative)

    @classmethod
    def from_model(cls, model: Any, *, num_layers: int = 3, tied: bool = True, nonnegative: bool | None = None) -> Self:
        """As `from_dictionary`, for the present W, rate, beta and bias of a model with these attributes.

        Args:
            model: `SparseCoding` with a `LaplacePrior` or an `ExponentialPrior`, or any other with the attributes.
            num_layers: number K of iterations.
            tied: see the class.
            nonnegative: see the class; None for ``model.prior.nonnegative`` where there is one, else False.

        Raises:
            TypeError: an attribute is missing.
            ValueError: see `from_dictionary`.
        """
        nonnegative = is_nonnegative(model, nonnegative)
        return cls._start(Ista.from_model(model), num_layers, tied=tied, nonnegative=nonnegative)

    @classmethod
    def _start(cls, ista: Ista, num_layers: int, *, tied: bool, nonnegative: bool) -> Self:
        D, F = ista.W.shape
        with torch.random.fork_rng(devices=[]):
            network = cls(D, F, num_layers, tied=tied, nonnegative=nonnegative)
        network._build(ista, num_layers, tied=tied, nonnegative=nonnegative)
        return network

    @property
    def theta(self) -> Tensor:
        """The thresholds, above 0: shape ``(1, F)`` when tied, else ``(K, F)``."""
        return self.log_theta.exp()

    def forward(self, v: Tensor) -> Tensor:
        """Codes ``(..., F)`` of inputs ``(..., D)``.

        Raises:
            ValueError: inputs of another width.
        """
        rows = rows_of(v, self.num_visible)
        # One product for all layers: the drive does not depend on the codes.
        drives = functional.linear(rows - self.bias, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2]).unbind(1)
        thresholds = self.theta.unbind()
        couplings = () if self.S is None else self.S.unbind()
        h = shrink(drives[0], thresholds[0], nonnegative=self.nonnegative)
        for layer in range(1, self.num_layers):
            own = 0 if self.tied else layer
            inputs = torch.addmm(drives[own], h, couplings[0 if self.tied else layer - 1].mT)
            h = shrink(inputs, thresholds[own], nonnegative=self.nonnegative)
        return h.reshape(v.shape[:-1] + (self.num_latents,))
