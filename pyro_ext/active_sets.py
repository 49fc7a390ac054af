"""Steps of a lasso within its active coordinates: the rows' own systems, and exact searches along the way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from pyro_ext.problems import PenalizedQuadratic

CELLS = 1 << 19
"""Numbers that the gathered systems of one pass may hold."""
WIDTHS = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Sizes that systems are padded to; multiples of the last beyond it."""


class ActiveSteps:
    """Steps of the rows of a `PenalizedQuadratic`, each to the minimum over its own active coordinates.

    Args:
        problem: the rows; calls name some of them.
    """

    def __init__(self, problem: PenalizedQuadratic) -> None:
        self._rate = problem.rate
        self._nonnegative = problem.nonnegative
        self._shares = problem.shares
        # A further row and column of zeros is what padded places refer to.
        padded = torch.nn.functional.pad(problem.quadratic, (0, 1, 0, 1))
        self._stride = padded.shape[-1]
        self._entries = padded.reshape(-1)

    def __call__(self, rows: Tensor, x: Tensor, gradient: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Move n rows towards the minimum of P over their active coordinates; the others stay at 0.

        .. math:: d_a = -G_{aa}^{-1} (g_a + rate_a sign_a)

        The step along d is to the exact minimum of P, changes of sign included. It gives way to x + d with all
        coordinates that would change their sign set to 0, where P is lower there. P never rises.

        Args:
            rows: numbers of the rows, shape ``(n,)``.
            x: shape ``(n, F)``.
            gradient: that of the smooth part, shape ``(n, F)``.
            sign: the signs of active coordinates, 0 elsewhere, shape ``(n, F)``; those of x where x is not 0.

        Returns:
            x after the step ``(n, F)``; by how many nats P fell ``(n,)``; the rows that took the whole step ``(n,)``.
        """
        n, size = x.shape
        rates = self._rate if self._rate.dim() == 1 else self._rate[rows]
        residual = torch.addcmul(gradient, rates, sign).reshape(-1)
        index, sizes = _columns(sign != 0)
        moved = torch.nn.functional.pad(x, (0, 1)).reshape(-1)
        fall, whole = x.new_zeros(n), torch.ones(n, dtype=torch.bool, device=x.device)
        flat_x, flat_sign = x.reshape(-1), sign.reshape(-1)
        for part, width in _passes(sizes):
            spot = index[part, :width]
            held = spot < size
            column = spot.clamp(max=size - 1)
            place = column + part[:, None] * size
            to, fall[part], whole[part] = _step(
                self._systems(rows[part], spot),
                flat_x[place] * held,
                residual[place] * held,
                flat_sign[place] * held,
                rates[column] if rates.dim() == 1 else rates.reshape(-1)[place],
                None if self._nonnegative is None else self._nonnegative[column],
                held,
            )
            moved[spot + part[:, None] * (size + 1)] = to
        return moved.view(n, size + 1)[:, :size], fall, whole

    def _systems(self, rows: Tensor, spot: Tensor) -> Tensor:
        """G_aa of each row, shape ``(n, k, k)``; 0 at padded places."""
        place = spot[:, :, None] * self._stride + spot[:, None, :]
        if not self._shares:
            place += rows[:, None, None] * self._stride**2
        return self._entries.index_select(0, place.view(-1)).view(place.shape)


def _columns(active: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of each row's active coordinates, padded with F to ``(n, k)``, and how many they are ``(n,)``."""
    sizes = active.sum(-1)
    row, column = active.nonzero(as_tuple=True)
    starts = sizes.cumsum(0) - sizes
    index = torch.full((len(active), int(sizes.max())), active.shape[1], dtype=torch.long, device=active.device)
    index[row, torch.arange(len(row), device=active.device) - starts[row]] = column
    return index, sizes


def _passes(sizes: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows whose systems have about the same size, and that size; rows without active coordinates are left out."""
    order = sizes.argsort()
    bounds = [*WIDTHS, *range(2 * WIDTHS[-1], int(sizes.max()) + WIDTHS[-1], WIDTHS[-1])]
    ends = torch.searchsorted(sizes[order], torch.tensor([0, *bounds], device=sizes.device), right=True).tolist()
    for first, last in pairwise(ends):
        if last > first:
            width = int(sizes[order[last - 1]])
            for part in order[first:last].split(max(1, CELLS // width**2)):
                yield part, width


def _step(
    system: Tensor, x: Tensor, residual: Tensor, sign: Tensor, rate: Tensor, barrier: Tensor | None, held: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of rows that have systems of one size; see `ActiveSteps`."""
    direction = _solve(system, residual, held).neg_()
    # A coordinate that comes in the wrong way stays at 0.
    wrong = (x == 0) & (direction * sign < 0)
    direction.masked_fill_(wrong, 0)
    slope = (residual * direction).sum(-1)
    bend = _bend(system, direction)
    length = torch.where(slope < 0, -slope / bend, 0)

    falling = direction * sign < 0
    kink = torch.where(falling, (x / direction).abs(), torch.inf)
    crossing = (kink < length[:, None]).any(-1)
    moved = torch.addcmul(x, direction, torch.where(length.isfinite(), length, 0)[:, None])
    fall = torch.where(length.isfinite(), -0.5 * slope * length, 0)
    whole = ~crossing & ~wrong.any(-1)
    if bool(crossing.any()):
        at = crossing.nonzero().squeeze(1)
        jump = 2 * rate[at] * direction[at].abs()
        if barrier is not None:
            jump = torch.where(barrier[at], torch.inf, jump)
        jump = torch.where(falling[at], jump, 0)
        along, gain = _search(x[at], direction[at], slope[at], bend[at], kink[at], jump)
        # The other candidate: all the way, with every coordinate that changes its sign held at 0.
        held_back = torch.where(kink[at] < 1, -x[at], direction[at])
        other = -(residual[at] * held_back).sum(-1) - 0.5 * _bend(system[at], held_back)
        better = (other > gain)[:, None]
        moved[at] = torch.where(better, torch.where(kink[at] < 1, 0, x[at] + direction[at]), along)
        fall[at] = torch.maximum(other, gain)
    return moved, fall, whole


def _solve(system: Tensor, residual: Tensor, held: Tensor) -> Tensor:
    """G_aa^{-1} residual, shape ``(n, k)``; where G_aa is singular, of G_aa with the least ridge that serves."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    size = system.shape[-1]
    ridge = 4 * size * torch.finfo(system.dtype).eps
    padding = (~held).to(system)
    while True:
        ridged = system.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(ridge * diagonal + padding)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()):
            half = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False)
            return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
        ridge *= 10


def _bend(system: Tensor, direction: Tensor) -> Tensor:
    """d'Gd, shape ``(n,)``."""
    return ((system @ direction.unsqueeze(-1)).squeeze(-1) * direction).sum(-1).clamp(min=0)


def _search(
    x: Tensor, direction: Tensor, slope: Tensor, bend: Tensor, kink: Tensor, jump: Tensor
) -> tuple[Tensor, Tensor]:
    """The exact minimum of P along d, where P is a parabola between the lengths at which coordinates change sign.

    Args:
        x: where the way starts, shape ``(n, k)``.
        direction: d, shape ``(n, k)``.
        slope: first derivative of P along the way at its start, shape ``(n,)``.
        bend: second derivative of P along the way, d'Gd, shape ``(n,)``.
        kink: lengths at which coordinates change their signs, shape ``(n, k)``, infinite for never.
        jump: what the first derivative gains there, shape ``(n, k)``, infinite where x may not fall below 0.

    Returns:
        x at the minimum, with exact zeros ``(n, k)``; by how many nats P fell ``(n,)``.
    """
    never = torch.full_like(slope, torch.inf)[:, None]
    length, order = torch.cat((kink, never), 1).sort(-1)
    after = torch.cat((jump, torch.zeros_like(never)), 1).gather(1, order).cumsum(-1)
    before = torch.cat((torch.zeros_like(never), after[:, :-1]), 1)
    climb = torch.where(length.isinf(), torch.inf, slope[:, None] + bend[:, None] * length)
    first = (climb + after >= 0).to(torch.uint8).argmax(-1, keepdim=True)
    inside = (climb + before).gather(1, first) > 0
    vertex = -(slope[:, None] + before.gather(1, first)) / bend[:, None]
    best = torch.where(inside, vertex, length.gather(1, first))
    best = torch.where(best.isfinite(), best, 0)
    moved = torch.addcmul(x, direction, best).masked_fill_(kink == best, 0)
    bends = torch.where(kink < best, jump * (best - kink), 0).sum(-1)
    best = best.squeeze(1)
    return moved, -(slope * best + 0.5 * bend * best.square() + bends)
