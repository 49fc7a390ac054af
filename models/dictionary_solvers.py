"""Least squares in a dictionary W whose columns are no longer than a radius: the exact dual, and descent atom by atom.

The problem, for sums over rows A_d (H, H), symmetric and positive semidefinite, and C (D, H):

    minimise f(W) = sum_d (w_d' A_d w_d / 2 - c_d' w_d)   subject to   sum_d W_dk^2 <= radius^2 for every column k.

It is convex; the columns are coupled by A, the rows by the norms. Complete data have one A for all d.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext.checks import check_count

from .column_ball import into_ball


def negative_gradient(W: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """-df/dW = C - W A, shape (D, H)."""
    return cross - (W @ gram if gram.dim() == 2 else (gram @ W.unsqueeze(-1)).squeeze(-1))


def curvatures(gram: Tensor) -> Tensor:
    """The largest second derivative of f within each column, shape (H,); 0 for an atom that no row uses."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return diagonal if gram.dim() == 2 else diagonal.amax(0)


def distance_to_optimum(W: Tensor, gram: Tensor, cross: Tensor, radius: float | Tensor) -> Tensor:
    """How far a projected gradient step moves each column, per radius, shape (H,): 0 at a minimum, and only there.

    That is the Kuhn-Tucker conditions in one number: inside the ball the gradient vanishes, on its surface it points
    straight outwards. Columns that no row uses have 0.
    """
    curvature = curvatures(gram)
    step = torch.where(curvature > 0, 1 / curvature, 0)
    moved = into_ball(W + negative_gradient(W, gram, cross) * step, radius)
    return (moved - W).square().sum(0).sqrt() / radius


class DictionarySolver(ABC):
    """A way to solve the problem of this module, started at the old dictionary."""

    @abstractmethod
    def solve(self, gram: Tensor, cross: Tensor, old: Tensor, radius: float) -> Tensor:
        """The new dictionary (D, H), of `cross`'s dtype. Columns that no row uses stay.

        Args:
            gram: A, shape (H, H), or (D, H, H) where every row of W has its own.
            cross: C, shape (D, H).
            old: the old dictionary, shape (D, H), inside the ball.
            radius: positive.
        """


@dataclass(frozen=True)
class BlockCoordinateDescent(DictionarySolver):
    r"""Each atom in turn to its best value given the others (Mairal et al., 2009, algorithm 2), from the old ones.

    .. math:: w_k \leftarrow P(w_k + (c_k - W a_k) / A_{kk}), \qquad P: \text{ the nearest point of the ball}

    With a gram matrix a row, the step is divided by the largest of their A_kk: a projected gradient step.

    No atom raises f, so one sweep is an ascent of the M-step's objective, enough for minibatches, but not its
    maximum. Sweeps converge to the maximum, linearly: slowly where atoms are much alike.

    Args:
        num_sweeps: most sweeps over the atoms.
        tolerance: the sweep is the last in which no atom moves further than this many radii.
        block_size: atoms whose gradients one matrix product gives. It changes no result.

    Raises:
        TypeError, ValueError: num_sweeps or block_size is no positive int; a negative tolerance.

    Example:
        >>> gram, cross = torch.eye(2), torch.tensor([[3.0, 0.1], [4.0, 0.2]])
        >>> BlockCoordinateDescent(num_sweeps=1).solve(gram, cross, torch.zeros(2, 2), radius=1.0)
        tensor([[0.6000, 0.1000],
                [0.8000, 0.2000]])
    """

    num_sweeps: int = 10
    tolerance: float = 1e-6
    block_size: int = 24

    def __post_init__(self) -> None:
        check_count(self.num_sweeps, "num_sweeps")
        check_count(self.block_size, "block_size")
        if not self.tolerance >= 0:
            raise ValueError(f"Expected tolerance >= 0, but got {self.tolerance}. It is in radii; pass 1e-6, say.")

    def solve(self, gram: Tensor, cross: Tensor, old: Tensor, radius: float) -> Tensor:
        """See `DictionarySolver.solve`."""
        A, C = gram.double(), cross.double()
        curvature = curvatures(A)
        steps = torch.where(curvature > 0, 1 / curvature, 0).tolist()
        # Atoms are the rows here, so that each of them is one piece of memory.
        W, C = old.double().mT.clone(memory_format=torch.contiguous_format), C.mT
        if A.dim() == 3:
            # (H, H, D): what one atom does to another is again one piece.
            A = A.movedim(0, -1).contiguous()
        for _ in range(self.num_sweeps):
            furthest = 0.0
            for start in range(0, len(W), self.block_size):
                stop = min(start + self.block_size, len(W))
                furthest = max(furthest, _improve_block(W, A, C, steps, radius, start, stop))
            if furthest <= self.tolerance * radius:
                break
        return W.mT.contiguous().to(cross.dtype)


def _improve_block(W: Tensor, A: Tensor, C: Tensor, steps: list[float], radius: float, start: int, stop: int) -> float:
    """Move the atoms W[start:stop] in turn, in place; returns how far the one moved that moved furthest."""
    rows, shared = A[start:stop], A.dim() == 2
    gradient = C[start:stop] - (rows @ W if shared else (rows * W).sum(1))
    inner, before, moves = rows[:, start:stop], W[start:stop].clone(), torch.zeros_like(gradient)
    for j, (atom, old, move) in enumerate(zip(W[start:stop], before, moves, strict=True)):
        # What the atoms of the block before it have changed is not in the gradient yet.
        if shared:
            change = torch.addmv(gradient[j], moves[:j].mT, inner[j, :j], alpha=-1)
        else:
            change = gradient[j] - (inner[j, :j] * moves[:j]).sum(0)
        atom.add_(change, alpha=steps[start + j])
        norm = float(torch.linalg.vector_norm(atom))
        if norm > radius:
            atom.mul_(radius / norm)
        torch.sub(atom, old, out=move)
    return float(moves.square().sum(-1).max().sqrt())


@dataclass(frozen=True)
class LagrangeDual(DictionarySolver):
    r"""The exact minimum, by Newton's method on one multiplier an atom (Lee et al., 2007).

    .. math::
        W(\mu) = C (A + \mathrm{diag}(\mu))^{-1}, \qquad
        \max_{\mu \ge 0} \; -\tfrac12 \mathrm{tr}\, C (A + \mathrm{diag}(\mu))^{-1} C^\top
        - \tfrac12 r^2 \sum_k \mu_k

    The dual is concave with gradient (|w_k|^2 - r^2) / 2, and second derivatives -(W'W)_kl (A + diag(mu))^{-1}_kl.
    Where A leaves directions open (atoms always used together, fewer rows than atoms), A + diag(mu) has no inverse:
    each Newton run therefore solves the proximal problem f(W) + e |W - W'|^2 / 2 around the last W', which is regular,
    and a few of them lead to a minimum of f itself (Rockafellar, 1976), close to the old dictionary in the open
    directions.

    A step costs some O(H^3), or O(D H^3) with a gram matrix a row.

    Args:
        tolerance: the most that a projected gradient step may still move an atom at the end, in radii.
        max_steps: most proximal problems. Two are the rule; what these reach is returned.

    Raises:
        TypeError, ValueError: max_steps is no positive int; a tolerance that is not positive.

    Example:
        >>> gram, cross = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        >>> W = LagrangeDual().solve(gram, cross, torch.zeros(2, 2), radius=1.0)
        >>> W
        tensor([[ 0.6000, -0.3000],
                [ 0.8000, -0.4000]])
    """

    tolerance: float = 1e-10
    max_steps: int = 20

    def __post_init__(self) -> None:
        check_count(self.max_steps, "max_steps")
        if not self.tolerance > 0:
            raise ValueError(f"Expected tolerance > 0, but got {self.tolerance}. It is in radii; pass 1e-10, say.")

    def solve(self, gram: Tensor, cross: Tensor, old: Tensor, radius: float) -> Tensor:
        """See `DictionarySolver.solve`."""
        W = old.double().clone()
        curvature = curvatures(gram.double())
        used = curvature > 0
        if not used.any():
            return W.to(cross.dtype)
        # Atoms in units in which their curvature is 1: rare ones are as well determined as any others.
        scale = curvature[used].rsqrt()
        A = scale.unsqueeze(-1) * gram.double()[..., used, :][..., used] * scale
        C = cross.double()[:, used] * scale
        radii = radius / scale
        Y = W[:, used] / scale
        least = weight = _weight(A)
        mu = _lone_multipliers(A, C, Y, radii)
        # Gradients are known to the rounding of what they are differences of.
        known = self.tolerance + 64 * torch.finfo(C.dtype).eps * C.square().sum(0).sqrt() / radii
        for _ in range(self.max_steps):
            found = _proximal(A, C, Y, radii, mu, weight)
            if found is None:
                least, weight, mu = 10 * least, 100 * weight, _lone_multipliers(A, C, Y, radii)
                continue
            Y, mu = found
            weight = max(0.1 * weight, least)
            if (distance_to_optimum(Y, A, C, radii) <= known).all():
                break
        W[:, used] = Y * scale
        return into_ball(W, radius).to(cross.dtype)


def _weight(A: Tensor) -> float:
    """The weight e of the proximal term, small beside the unit diagonal of A, and above A's own rounding."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    weight = 1e-7
    while weight < 1 and bool((torch.linalg.cholesky_ex(A + 0.1 * weight * identity).info > 0).any()):
        weight *= 10
    return weight


@dataclass(frozen=True)
class _Point:
    """The dual of one proximal problem at mu.

    Attributes:
        mu: multipliers (H,).
        Y: the minimiser (D, H) of the Lagrangian.
        factor: Cholesky factor(s) of A + diag(e + mu).
        value: the dual's value, from f at the centre.
        gradient: shape (H,).
    """

    mu: Tensor
    Y: Tensor
    factor: Tensor
    value: float
    gradient: Tensor


def _evaluate(A: Tensor, start: Tensor, centre: Tensor, radii: Tensor, mu: Tensor, weight: float) -> _Point:
    """The dual at mu; `start` is the negative gradient of f at the centre."""
    factor = torch.linalg.cholesky(A + torch.diag_embed(mu + weight))
    # In terms of the way from the centre: that keeps the digits which an ill-conditioned A costs the whole.
    pull = start - centre * mu
    if A.dim() == 2:
        move = torch.cholesky_solve(pull.mT, factor).mT
    else:
        move = torch.cholesky_solve(pull.unsqueeze(-1), factor).squeeze(-1)
    Y = centre + move
    value = 0.5 * (mu * (centre.square().sum(0) - radii.square())).sum() - 0.5 * (pull * move).sum()
    return _Point(mu, Y, factor, float(value), 0.5 * (Y.square().sum(0) - radii.square()))


def _lone_multipliers(A: Tensor, C: Tensor, Y: Tensor, radii: Tensor) -> Tensor:
    """Each multiplier as if the other atoms stood still at Y: the right ones where Y is optimal."""
    return ((Y + negative_gradient(Y, A, C)).square().sum(0).sqrt() / radii - 1).clamp(min=0)


def _proximal(
    A: Tensor, C: Tensor, centre: Tensor, radii: Tensor, mu: Tensor, weight: float
) -> tuple[Tensor, Tensor] | None:
    """Minimiser and multipliers of f(Y) + weight |Y - centre|^2 / 2 in the ball, by projected Newton steps on mu.

    The minimiser is in the ball up to rounding. None where the steps come to a halt before: the problem is too
    ill-conditioned at this weight.
    """
    start = negative_gradient(centre, A, C)
    point: _Point | None = _evaluate(A, start, centre, radii, mu, weight)
    last = math.inf
    for _ in range(60):
        inverse = torch.cholesky_inverse(point.factor)
        Y = point.Y
        curvature = (Y.mT @ Y) * inverse if A.dim() == 2 else (Y.unsqueeze(-1) * inverse * Y.unsqueeze(-2)).sum(0)
        error = _dual_error(point, curvature, radii)
        # Rounding leaves the error where it is from some point on.
        if error <= 1e-14 or (error < 1e-9 and error >= 0.5 * last):
            return Y, point.mu
        last = error
        point = _line_search(A, start, centre, radii, weight, point, curvature)
        if point is None:
            return None
    return None


def _dual_error(point: _Point, curvature: Tensor, radii: Tensor) -> float:
    """How far the multipliers are from their Kuhn-Tucker conditions, as a share of the squared norms."""
    diagonal = curvature.diagonal()
    error = torch.where(point.gradient > 0, point.gradient, torch.minimum(-point.gradient, point.mu * diagonal))
    return float((error / radii.square()).max())


def _line_search(
    A: Tensor, start: Tensor, centre: Tensor, radii: Tensor, weight: float, point: _Point, curvature: Tensor
) -> _Point | None:
    """The next multipliers: a projected Newton step, shortened until the dual rises (Bertsekas, 1982)."""
    gradient, mu = point.gradient, point.mu
    norms = point.Y.square().sum(0).sqrt()
    free = (mu > 0) | (gradient > 0)
    # 1 / |w_k| is nearly linear in mu, |w_k|^2 is not: far from the sphere Newton's step on it is the better one.
    reciprocal = norms.square() * (norms - radii) / radii
    for target in (reciprocal, gradient):
        direction = _newton_direction(curvature, target, free)
        length = 1.0
        for _ in range(30):
            proposal = (mu + length * direction).clamp(min=0)
            rise = float((gradient * (proposal - mu)).sum())
            if rise <= 0 and target is not gradient:
                break
            found = _evaluate(A, start, centre, radii, proposal, weight)
            # Below the rounding of the value the model is all there is to go by.
            if abs(rise) <= 1e-13 * (abs(point.value) + abs(rise)) or (
                rise > 0 and found.value >= point.value + 1e-4 * rise
            ):
                return found
            length *= 0.5
    return None


def _newton_direction(curvature: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """curvature^{-1} target among the free multipliers, 0 for the others."""
    scale = torch.where(free, curvature.diagonal().clamp(min=torch.finfo(target.dtype).tiny), 1).rsqrt()
    matrix = scale.unsqueeze(-1) * torch.where(free & free.unsqueeze(-1), curvature, 0) * scale
    identity = torch.eye(len(target), dtype=target.dtype, device=target.device)
    matrix = matrix + torch.diag_embed((~free).to(target))
    ridge = 1e-13
    while ridge < 1 and int(torch.linalg.cholesky_ex(matrix + ridge * identity).info) > 0:
        ridge *= 100
    factor = torch.linalg.cholesky(matrix + ridge * identity)
    right = torch.where(free, scale * target, 0).unsqueeze(-1)
    return scale * torch.cholesky_solve(right, factor).squeeze(-1)
