"""What MAP inference minimises, row by row: a smooth part, and the absolute values of sparse priors (19.13-19.16)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from pyro_ext.products import row_chunks


class Problem(ABC):
    r"""-log p(v, h) of every row, up to a constant, as a function of a row's vector x.

    .. math:: P(x) = f(x) + \sum_i rate_i |x_i|, \qquad x_i \ge 0 \text{ where nonnegative}

    with f smooth. Rows are independent problems of one size.

    Attributes:
        num_rows: number of rows R.
        rate: shape ``(F,)`` or ``(R, F)``, at least 0, nats per unit of x.
        nonnegative: which x_i may not fall below 0, boolean ``(F,)``; None for none.
        curvature: an upper bound on the eigenvalues of f's second derivative, ``(R, 1)``; None where none is known.
        has_gap: whether `gap` is known.
    """

    num_rows: int
    rate: Tensor
    nonnegative: Tensor | None
    curvature: Tensor | None = None
    has_gap: bool = False

    @abstractmethod
    def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f ``(R,)`` in nats and its gradient ``(R, F)`` at x ``(R, F)``."""

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of f, ``(R, F)``."""
        return self.smooth(x)[1]

    @abstractmethod
    def rows(self, index: Tensor) -> Problem:
        """The problems of some rows, given their numbers."""

    @property
    def can_select(self) -> bool:
        """Whether the problems of some rows cost less than those of all."""
        return True

    @property
    def is_smooth(self) -> bool:
        """Whether there are neither absolute values nor bounds."""
        return self.nonnegative is None and not bool((self.rate != 0).any())

    @cached_property
    def _least_shape(self) -> Tensor:
        """The rate as one number where all x_i have the same: sums and thresholds cost less then."""
        same = self.rate.dim() == 1 and bool((self.rate == self.rate[:1]).all())
        return self.rate[:1] if same else self.rate

    def penalty(self, x: Tensor) -> Tensor:
        """sum_i rate_i |x_i|, shape ``(R,)``, nats."""
        rate = self._least_shape
        return rate * x.abs().sum(-1) if len(rate) == 1 and rate.dim() == 1 else (rate * x.abs()).sum(-1)

    def objective(self, x: Tensor) -> Tensor:
        """P(x), shape ``(R,)``, nats."""
        return self.smooth(x)[0] + self.penalty(x)

    def shrink_(self, x: Tensor, step: Tensor, work: Tensor) -> Tensor:
        """As `shrink`, in the memory of x, with other memory of the same shape to work in."""
        threshold = step * self._least_shape
        torch.minimum(torch.maximum(x, -threshold, out=work), threshold, out=work)
        x.sub_(work)
        return x if self.nonnegative is None else torch.where(self.nonnegative, x.clamp(min=0), x, out=x)

    def shrink(self, x: Tensor, step: Tensor | float) -> Tensor:
        """The proximal map: argmin_u |u - x|^2 / 2 + step * sum_i rate_i |u_i| over feasible u, exact zeros included.

        Args:
            x: shape ``(R, F)``.
            step: a number, or ``(R, 1)``.
        """
        threshold = step * self._least_shape
        shrunk = x - x.clamp(min=-threshold, max=threshold)
        return shrunk if self.nonnegative is None else torch.where(self.nonnegative, shrunk.clamp(min=0), shrunk)

    def subgradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The least subgradient of P at feasible x, ``(R, F)``: 0 at a stationary point.

        Args:
            x: shape ``(R, F)``.
            gradient: that of f, shape ``(R, F)``.
        """
        at_zero = gradient - gradient.clamp(min=-self.rate, max=self.rate)
        if self.nonnegative is not None:
            at_zero = torch.where(self.nonnegative, at_zero.clamp(max=0), at_zero)
        return torch.where(x == 0, at_zero, gradient + self.rate * x.sign())

    def slope(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Largest entry of the least subgradient in size, ``(R,)``, nats per unit of x."""
        return self.subgradient(x, gradient).abs().amax(-1)

    def unit(self, x: Tensor) -> Tensor:
        """Nats ``(R,)`` that the solvers' tolerances are relative to, given the start x."""
        return torch.ones_like(x[:, 0])

    def gap(self, x: Tensor, gradient: Tensor) -> Tensor:
        """An upper bound on P(x) - min P, shape ``(R,)``, nats; NaN where none is known."""
        return torch.full_like(x[:, 0], torch.nan)


class PenalizedQuadratic(Problem):
    r"""The Laplace + quadratic case, a lasso for every row.

    .. math:: P(x) = \tfrac12 x^\top G x - b^\top x + \sum_i rate_i |x_i|

    The duality gap is that of the lasso with G = A'A and b = A'y (Kim et al., 2007): with r = b - G x and the
    largest s in [0, 1] for which s r stays within the rates,

    .. math:: gap(x) = \sum_i rate_i |x_i| - s\, r^\top x + \tfrac12 (1 - s)^2 |y - A x|^2

    A and y are not needed: |y|^2 = b'G^+b is the least that serves. Where b lies outside the range of G it is
    infinite, and so is the gap unless s = 1. Where G has full rank, with least eigenvalue mu, the gap is also at most
    |g|^2 / (2 mu) for the least subgradient g, and the smaller of the two is taken. Of bounded x_i without a rate any
    slope would end at s = 0: the gap is that with rates in the size of these slopes, and a bound on what they change.

    Args:
        quadratic: G, symmetric and positive semidefinite, shape ``(F, F)``; ``(R, F, F)`` where rows do not share it.
        linear: b, shape ``(R, F)``.
        rate: shape ``(F,)`` or ``(R, F)``, at least 0.
        nonnegative: boolean ``(F,)``, or None.
        energy: |y|^2, shape ``(R,)``, where it is known; found from G and b otherwise.

    Example:
        >>> problem = PenalizedQuadratic(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.tensor([1.0, 1.0]))
        >>> x = torch.tensor([[2.0, 0.0]])
        >>> problem.objective(x), problem.gap(x, problem.smooth(x)[1])
        (tensor([-2.]), tensor([0.]))
    """

    def __init__(
        self,
        quadratic: Tensor,
        linear: Tensor,
        rate: Tensor,
        nonnegative: Tensor | None = None,
        energy: Tensor | None = None,
    ) -> None:
        self.has_gap = True
        self.quadratic = quadratic
        self.linear = linear
        self.rate = rate
        self.nonnegative = nonnegative
        self.num_rows = len(linear)
        self._energy = energy

    @property
    def shares(self) -> bool:
        """Whether all rows have the same G."""
        return self.quadratic.dim() == 2

    def times(self, x: Tensor) -> Tensor:
        """G x row by row, shape ``(R, F)``."""
        return x @ self.quadratic if self.shares else (self.quadratic @ x.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def _negative(self) -> Tensor:
        # Adding it takes less time than subtracting b.
        return -self.linear

    def gradient(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """G x - b, shape ``(R, F)``."""
        if self.shares:
            return torch.addmm(self._negative, x, self.quadratic, out=out)
        return torch.sub(self.times(x), self.linear, out=out)

    def value(self, x: Tensor, gradient: Tensor) -> Tensor:
        """f from its gradient, shape ``(R,)``, nats."""
        return 0.5 * ((gradient - self.linear) * x).sum(-1)

    def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.gradient(x)
        return self.value(x, gradient), gradient

    def objective(self, x: Tensor) -> Tensor:
        if not self.shares or self.rate.dim() == 2 or not len(x):
            return super().objective(x)
        # G x = (G x - 2 b) + 2 b: by chunks of rows, for every term is as large as x.
        values = [
            0.5 * ((x[rows] @ self.quadratic).sub_(self.linear[rows], alpha=2) * x[rows]).sum(-1)
            for rows in row_chunks(x)
        ]
        return torch.cat(values) + self.penalty(x)

    def rows(self, index: Tensor) -> PenalizedQuadratic:
        part = PenalizedQuadratic(
            self.quadratic if self.shares else self.quadratic[index],
            self.linear[index],
            self.rate if self.rate.dim() == 1 else self.rate[index],
            self.nonnegative,
            self.energy[index],
        )
        values, vectors = self._spectrum
        part._spectrum = (values, vectors) if self.shares else (values[index], vectors[index])
        return part

    def columns(self, index: Tensor) -> PenalizedQuadratic:
        """The problem in some of the x_i, given their numbers, the others held at 0."""
        return PenalizedQuadratic(
            self.quadratic[..., index[:, None], index],
            self.linear[:, index],
            self.rate[..., index],
            None if self.nonnegative is None else self.nonnegative[index],
            # Of the same y: the gap speaks of the same minimum where the others are 0 there.
            self.energy,
        )

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.quadratic.double())

    @cached_property
    def curvature(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Largest eigenvalue of G, shape ``(1, 1)`` or ``(R, 1)``."""
        largest = self._spectrum[0][..., -1:].to(self.linear)
        return largest.reshape(-1, 1)

    @property
    def spread(self) -> tuple[Tensor, Tensor]:
        """The least eigenvalue of G, and the largest one in size, both ``()`` or ``(R,)``."""
        values = self._spectrum[0].to(self.linear)
        return values[..., 0], values.abs().amax(-1)

    @property
    def energy(self) -> Tensor:
        """|y|^2 = b'G^+b, shape ``(R,)``: twice what f can fall by at most; infinite where f has no minimum."""
        if self._energy is None:
            values, vectors = self._spectrum
            largest = values[..., -1:].clamp(min=0)
            held = values > values.shape[-1] * torch.finfo(self.linear.dtype).eps * largest
            inverse = torch.where(held, 1 / torch.where(held, values, 1), 0).to(self.linear)
            weights = torch.stack([inverse, torch.ones_like(inverse), (~held).to(inverse)], -1)
            sums = self._spectral_sums(vectors.to(self.linear), weights)
            energy, size, left = sums.unbind(-1)
            outside = left > 1e4 * torch.finfo(size.dtype).eps * size
            self._energy = torch.where(outside, torch.inf, energy)
        return self._energy

    def _spectral_sums(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """sum_i (u_i'b)^2 w_ij over the eigenvectors u_i, shape ``(R, 3)``."""
        if not self.shares:
            square = (vectors.mT @ self.linear.unsqueeze(-1)).squeeze(-1).square()
            return (square.unsqueeze(-2) @ weights).squeeze(-2)
        return torch.cat([(self.linear[rows] @ vectors).square_() @ weights for rows in row_chunks(self.linear)])

    def scale(self, gradient: Tensor) -> Tensor:
        """The largest s in [0, 1] for which -s times the gradient is feasible in the dual, shape ``(R,)``.

        Bounded x_i without a rate are left out where they have curvature: `gap` pays for them otherwise.
        """
        size = gradient.abs()
        if self.nonnegative is not None:
            size = torch.where(self.nonnegative, (-gradient).clamp(min=0), size)
            size = torch.where(self._eased[0], 0, size)
        return (self.rate / size).nan_to_num(nan=1.0, posinf=1.0).amin(-1).clamp(max=1)

    @cached_property
    def _eased(self) -> tuple[Tensor, Tensor]:
        """Which bounded x_i have no rate but curvature, boolean, and (G^+)_ii there, ``(F,)`` or ``(R, F)``."""
        bounded = torch.zeros_like(self.rate, dtype=torch.bool) if self.nonnegative is None else self.nonnegative
        bounded = bounded & (self.rate == 0)
        if not bool(bounded.any()):
            return bounded, torch.zeros_like(self.rate)
        values, vectors = self._spectrum
        held = (values > values.shape[-1] * torch.finfo(self.linear.dtype).eps * values[..., -1:]).unsqueeze(-2)
        squares = torch.where(held, vectors.square(), 0)
        # What has no curvature leaves the range of G.
        inside = 1 - squares.sum(-1) < 1e-6
        inverse = (squares / torch.where(held, values.unsqueeze(-2), 1)).sum(-1)
        eased = bounded & inside
        return eased, torch.where(eased, inverse, 0).to(self.linear)

    @cached_property
    def _convexity(self) -> Tensor | None:
        """The least eigenvalue of G ``(1,)`` or ``(R,)`` where all are clearly above 0."""
        values = self._spectrum[0]
        clear = values[..., 0] > 1e3 * values.shape[-1] * torch.finfo(self.linear.dtype).eps * values[..., -1]
        return values[..., :1].reshape(-1).to(self.linear) if bool(clear.all()) else None

    def unit(self, x: Tensor) -> Tensor:
        """|y|^2 / 2, the most that f can fall; where that is infinite, 1 + P in size at x."""
        if bool(self.energy.isinf().any()):
            return torch.where(self.energy.isinf(), 1 + self.objective(x).abs(), 0.5 * self.energy)
        return 0.5 * self.energy

    def may_be_active(self, gap: Tensor, gradient: Tensor) -> Tensor:
        """Which x_i are not proven to be 0 at the minimum x*, boolean ``(R, F)`` (Ndiaye et al., 2017).

        P(x) - P(x*) is at least (x - x*)'G(x - x*) / 2, so that the gradient at x* differs from that at x by at most
        sqrt(2 G_ii gap) in its entry i, whatever the bound on P(x) - P(x*) was found by.

        Args:
            gap: an upper bound ``(R,)`` on P(x) - P(x*) at the x at which the gradient was taken.
            gradient: that of f, ``(R, F)``.
        """
        width = self.quadratic.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * (2 * gap.unsqueeze(-1)).sqrt()
        size = gradient.abs() if self.nonnegative is None else torch.where(self.nonnegative, -gradient, gradient.abs())
        # NaN proves nothing: 0 times an infinite gap.
        return ~(size + width < self.rate)

    def gap(self, x: Tensor, gradient: Tensor) -> Tensor:
        s = self.scale(gradient)
        along = -(gradient * x).sum(-1)
        # |y - A x|^2 = |y|^2 - 2 b'x + x'Gx, and x'Gx = x'(gradient + b).
        inner = (self.linear * x).sum(-1)
        rest = (self.energy - inner - along).clamp(min=0)
        shortfall = torch.where(s == 1, 0, 0.5 * (1 - s).square() * rest)
        gap = (self.penalty(x) - s * along + shortfall).clamp(min=0)
        if self.nonnegative is not None and bool(self._eased[0].any()):
            eased, inverse = self._eased
            # With rates of `excess` the gap would be the one so far. S = P(x) - min P is at most that and
            # excess'(x* - x), where |x*_i - x_i| is at most sqrt(2 S (G^+)_ii).
            excess = torch.where(eased, (-gradient).clamp(min=0), 0)
            gap = gap + (excess * x).sum(-1)
            pull = (excess * (2 * inverse).sqrt()).sum(-1)
            gap = 0.25 * (pull + (pull.square() + 4 * gap).sqrt()).square()
        if self._convexity is None:
            return gap
        return torch.minimum(gap, self.subgradient(x, gradient).square().sum(-1) / (2 * self._convexity))
