"""What keeps a dictionary from growing while its latents shrink, and the M-step of W that belongs to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from .column_ball import ColumnBall, into_ball
from .dictionary_solvers import DictionarySolver, LagrangeDual
from .least_squares import least_squares


class Dictionary(ABC):
    """A rule for the matrix W (D, H) of atoms w_k, its columns.

    Under point masses, log p(h, v) rises without end as W grows and h shrinks: c W and h / c explain the data as well
    and h / c costs less (the text after 19.16). A norm constraint or weight decay on W takes that way out.
    """

    bounded: ClassVar[bool] = True
    """Whether log p(h, v) has a maximum in W and the points h."""

    @property
    def constraint(self) -> constraints.Constraint:
        """Where W lives."""
        return constraints.real

    def log_penalty(self, W: Tensor) -> Tensor | None:
        """What the rule adds to log p(h, v) of every row, nats, shape (); None for nothing."""
        return None

    def start(self, atoms: Tensor) -> Tensor:
        """A first W from atoms (D, H) of any length."""
        return atoms

    @abstractmethod
    def maximize(self, gram: Tensor, cross: Tensor, old: Tensor, *, count: Tensor, beta: Tensor) -> Tensor:
        """The W that maximises -beta sum_d (w_d' A_d w_d / 2 - c_d' w_d) + count * log_penalty(W) under the constraint.

        Args:
            gram: A, shape (H, H), or (D, H, H) where every row of W has its own.
            cross: C, shape (D, H).
            old: the old W, shape (D, H), kept where the objective is flat.
            count: number of rows that the sums are over, shape ().
            beta: precision of the noise, shape ().

        Returns:
            Tensor of shape (D, H).
        """


@dataclass(frozen=True)
class ColumnNorm(Dictionary):
    """|w_k| <= radius for every atom (Lee et al., 2007; Mairal et al., 2009).

    The M-step is a least-squares problem in a product of balls, solved as the solver says. Gradient steps keep the
    norms as well: see `ColumnBall`.

    Args:
        radius: positive; with another radius r, h is r times smaller, as if the prior's rate were r times smaller.
        solver: `LagrangeDual` for the maximum, or `BlockCoordinateDescent` for a few sweeps from the old W.

    Raises:
        ValueError, TypeError: a radius that is not positive and finite; a solver that is none.

    Example:
        >>> from pyro_ext.models import BlockCoordinateDescent, SparseCoding
        >>> streaming = ColumnNorm(solver=BlockCoordinateDescent(num_sweeps=1))
        >>> model = SparseCoding(num_visible=8, num_latents=12, dictionary=streaming)
        >>> bool((model.W.norm(dim=0) <= 1.001).all())
        True
    """

    radius: float = 1.0
    solver: DictionarySolver = field(default_factory=LagrangeDual)

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"Expected a positive and finite radius, but got {self.radius}. Pass 1.0, say.")
        if not isinstance(self.solver, DictionarySolver):
            raise TypeError(
                f"Expected solver to be a DictionarySolver, but got {self.solver!r}. "
                "Pass LagrangeDual() or BlockCoordinateDescent()."
            )

    @property
    def constraint(self) -> constraints.Constraint:
        """The balls."""
        return ColumnBall(self.radius)

    def start(self, atoms: Tensor) -> Tensor:
        """Atoms of full length: all are used at their full length sooner or later."""
        norms = atoms.square().sum(0).sqrt()
        return into_ball(atoms * torch.where(norms > 0, self.radius / norms, 0), self.radius)

    def maximize(self, gram: Tensor, cross: Tensor, old: Tensor, *, count: Tensor, beta: Tensor) -> Tensor:
        """See `Dictionary.maximize`. Atoms that no row uses stay; under `BlockCoordinateDescent` an ascent."""
        return self.solver.solve(gram, cross, old, self.radius)


@dataclass(frozen=True)
class WeightDecay(Dictionary):
    """The program holds the factor ``"weight_decay"``, -rate / 2 |W|^2 for *every row*; its M-step is ridge regression.

    Per row, so that full batches, minibatches and averages over them have one objective. A penalty of P / 2 |W|^2 on
    all of N rows is rate = P / N. L and log p(v) of the program include it.

    Args:
        rate: positive, nats per row and squared unit of W.

    Raises:
        ValueError: a rate that is not positive and finite.

    Example:
        >>> from pyro_ext.models import SparseCoding
        >>> SparseCoding(num_visible=8, num_latents=12, dictionary=WeightDecay(rate=0.01)).dream(3).shape
        torch.Size([3, 8])
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(
                f"Expected a positive and finite rate of weight decay, but got {self.rate}. "
                "Pass 0.01, say; Unconstrained() is without."
            )

    def log_penalty(self, W: Tensor) -> Tensor | None:
        """-rate / 2 |W|^2."""
        return -0.5 * self.rate * W.square().sum()

    def maximize(self, gram: Tensor, cross: Tensor, old: Tensor, *, count: Tensor, beta: Tensor) -> Tensor:
        """See `Dictionary.maximize`: W (A + count rate / beta I) = C. Atoms that no row uses become 0."""
        decay = (count * self.rate / beta).double() * torch.eye(gram.shape[-1], dtype=torch.double, device=gram.device)
        return _regression(gram.double() + decay, cross.double(), old.double()).to(cross.dtype)


@dataclass(frozen=True)
class Unconstrained(Dictionary):
    """Any W, for posteriors with a spread: shrinking h leaves its variance behind, so that L has a maximum in W.

    Point masses are refused: see `Dictionary`.

    Example:
        >>> from pyro_ext.models import SparseCoding
        >>> model = SparseCoding(num_visible=8, num_latents=4, dictionary=Unconstrained())
    """

    bounded: ClassVar[bool] = False

    def maximize(self, gram: Tensor, cross: Tensor, old: Tensor, *, count: Tensor, beta: Tensor) -> Tensor:
        """See `Dictionary.maximize`: W A = C."""
        return _regression(gram, cross, old)


def _regression(gram: Tensor, cross: Tensor, old: Tensor) -> Tensor:
    """W (D, H) with W A = C, row by row where A is (D, H, H)."""
    if gram.dim() == 2:
        return least_squares(gram, cross.mT, old.mT).mT
    return least_squares(gram, cross.unsqueeze(-1), old.unsqueeze(-1)).squeeze(-1)
