"""Unpenalised coordinates of a lasso, eliminated in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import SolverError


@dataclass(frozen=True)
class Eliminated:
    r"""The minimum over the unpenalised coordinates z, as a lasso in the others.

    .. math:: z = G_{zz}^{-1} (b_z - G_{zp} x_p)

    Attributes:
        problem: the lasso in the penalised coordinates; with none of them where all were eliminated.
        offset: P of the whole is P of `problem` plus this, shape ``(R,)``, nats.
    """

    problem: PenalizedQuadratic
    offset: Tensor
    _whole: PenalizedQuadratic
    _free: Tensor
    _held: Tensor
    _root: Tensor

    @classmethod
    def of(cls, whole: PenalizedQuadratic) -> Eliminated | None:
        """None where every coordinate is penalised or bounded.

        Raises:
            SolverError: no unique minimum: G_zz is not positive definite.
        """
        free = whole.rate == 0 if whole.rate.dim() == 1 else (whole.rate == 0).all(0)
        if whole.nonnegative is not None:
            free = free & ~whole.nonnegative
        if not bool(free.any()):
            return None
        z, p = free.nonzero().squeeze(-1), (~free).nonzero().squeeze(-1)
        G, b = whole.quadratic, whole.linear
        own = G[..., z[:, None], z]
        root, info = torch.linalg.cholesky_ex(own)
        # The share of each z's curvature that the z before it leave: latents may differ in scale.
        share = root.diagonal(dim1=-2, dim2=-1).square() / own.diagonal(dim1=-2, dim2=-1)
        flat = ~(share > len(z) * torch.finfo(G.dtype).eps)
        if bool((info != 0).any()) or bool(flat.any()):
            raise SolverError(
                "Expected log p(v, h) with one maximum in the latents without a sparse prior, but got one that is "
                "flat or rises without bound. Give every latent a proper prior."
            )
        solved_b = _solve(root, b[:, z])
        cross = G[..., z[:, None], p]
        solved_cross = torch.cholesky_solve(cross, root)
        quadratic = G[..., p[:, None], p] - cross.mT @ solved_cross
        along = solved_b @ cross if cross.dim() == 2 else (cross.mT @ solved_b.unsqueeze(-1)).squeeze(-1)
        problem = PenalizedQuadratic(
            0.5 * (quadratic + quadratic.mT),
            b[:, p] - along,
            whole.rate[..., p],
            None if whole.nonnegative is None else whole.nonnegative[p],
        )
        return cls(problem, -0.5 * (b[:, z] * solved_b).sum(-1), whole, z, p, root)

    def reduce(self, x: Tensor) -> Tensor:
        """The penalised coordinates of x ``(R, F)``."""
        return x[:, self._held]

    def complete(self, x: Tensor) -> Tensor:
        """All coordinates ``(R, F)``, the eliminated ones at their optimum given x."""
        cross = self._whole.quadratic[..., self._free[:, None], self._held]
        along = x @ cross.mT if cross.dim() == 2 else (cross @ x.unsqueeze(-1)).squeeze(-1)
        free = _solve(self._root, self._whole.linear[:, self._free] - along)
        result = x.new_zeros(len(x), self._whole.linear.shape[1])
        result[:, self._held] = x
        result[:, self._free] = free
        return result


def _solve(root: Tensor, linear: Tensor) -> Tensor:
    """G^-1 l for rows l ``(R, k)``."""
    if root.dim() == 2:
        return torch.cholesky_solve(linear.mT, root).mT
    return torch.cholesky_solve(linear.unsqueeze(-1), root).squeeze(-1)
