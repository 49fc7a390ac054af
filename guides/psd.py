"""Predictive sparse decomposition: a shallow encoder of sparse codes (19.5.2)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_ext.checks import check_count
from pyro_ext.guides.encoders import PointEncoder
from pyro_ext.guides.ista import Ista, is_nonnegative, rows_of, shrink


class PSD(PointEncoder):
    r"""One layer of shrinkage and a gain per unit (Kavukcuoglu, Ranzato & LeCun, 2008; 14.8 and 19.5.2).

    .. math:: f(v) = gain \cdot shrink(A v + c, \theta)

    Being shallow, it has no competition between units; `LISTA` has. The paper's first encoder bends by tanh; with
    shrinkage the codes have exact zeros. `from_dictionary` and `from_model` start it as the first iteration of ISTA.

    Args:
        num_visible: number D of inputs.
        num_latents: number F of latents.
        nonnegative: codes are at least 0: the shrinkage is max(x - theta, 0), and the gain is taken by its size.

    Attributes:
        A: shape ``(F, D)``.
        c: shape ``(F,)``.
        log_theta: logarithms of the thresholds, shape ``(F,)``.
        gain: shape ``(F,)``.

    Raises:
        TypeError: a size that is no int.
        ValueError: a size below 1.

    Example:
        >>> PSD.from_dictionary(torch.eye(2), rate=0.5)(torch.tensor([[2.0, -0.1]])).detach()
        tensor([[1.5000, 0.0000]])
    """

    def __init__(self, num_visible: int, num_latents: int, *, nonnegative: bool = False) -> None:
        check_count(num_visible, "num_visible")
        check_count(num_latents, "num_latents")
        super().__init__()
        self._build(Ista.random(num_visible, num_latents), nonnegative=nonnegative)

    def _build(self, ista: Ista, *, nonnegative: bool) -> None:
        A, _, theta = ista.weights()
        self.num_visible, self.num_latents = ista.W.shape
        self.nonnegative = bool(nonnegative)
        self.A = nn.Parameter(A)
        self.c = nn.Parameter(-A @ ista.bias)
        self.log_theta = nn.Parameter(theta.log())
        self.gain = nn.Parameter(torch.ones_like(theta))

    @classmethod
    def from_dictionary(
        cls,
        W: Tensor,
        rate: float | Tensor,
        beta: float | Tensor = 1.0,
        bias: Tensor | None = None,
        *,
        nonnegative: bool = False,
    ) -> Self:
        """A = W' beta / L, c = -A bias, theta = rate / L and gain = 1; see `LISTA.from_dictionary`.

        Raises:
            TypeError: W is no floating tensor.
            ValueError: W is no finite matrix or is 0; rate or beta is not positive; bias is not finite; shapes do not
                fit.
        """
        return cls._start(Ista.of(W, rate, beta, bias), nonnegative=nonnegative)

    @classmethod
    def from_model(cls, model: Any, *, nonnegative: bool | None = None) -> Self:
        """As `from_dictionary`, for the present W, rate, beta and bias of a model with these attributes.

        Args:
            model: `SparseCoding` with a `LaplacePrior` or an `ExponentialPrior`, or any other with the attributes.
            nonnegative: see the class; None for ``model.prior.nonnegative`` where there is one, else False.

        Raises:
            TypeError: an attribute is missing.
            ValueError: see `from_dictionary`.
        """
        return cls._start(Ista.from_model(model), nonnegative=is_nonnegative(model, nonnegative))

    @classmethod
    def _start(cls, ista: Ista, *, nonnegative: bool) -> Self:
        D, F = ista.W.shape
        with torch.random.fork_rng(devices=[]):
            network = cls(D, F, nonnegative=nonnegative)
        network._build(ista, nonnegative=nonnegative)
        return network

    @property
    def theta(self) -> Tensor:
        """The thresholds, above 0, shape ``(F,)``."""
        return self.log_theta.exp()

    def forward(self, v: Tensor) -> Tensor:
        """Codes ``(..., F)`` of inputs ``(..., D)``.

        Raises:
            ValueError: inputs of another width.
        """
        rows = rows_of(v, self.num_visible)
        codes = shrink(torch.addmm(self.c, rows, self.A.mT), self.theta, nonnegative=self.nonnegative)
        gain = self.gain.abs() if self.nonnegative else self.gain
        return (gain * codes).reshape(v.shape[:-1] + (self.num_latents,))
