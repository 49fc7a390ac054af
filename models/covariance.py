"""Structures of a Gaussian emission's covariance, one matrix per component."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .selected import Components, DiagonalComponents, FullComponents, Selected

# Elements of one chunk's (rows, K * D) intermediate: a few MB, so that it stays in the cache.
_CHUNK_ELEMENTS = 2**19


class Covariance(ABC):
    """How the covariance of each of K components of dimension D is parametrised, and maximized."""

    parameter: ClassVar[str]
    """Name of the parameter, a square root of the covariance."""

    constraint: ClassVar[constraints.Constraint]

    @abstractmethod
    def from_variances(self, variances: Tensor) -> Tensor:
        """The parameter that has the given variances, shape (K, D), and no correlation."""

    @abstractmethod
    def components(self, locs: Tensor, root: Tensor) -> Components:
        """The K densities with means locs (K, D) and this parameter."""

    def emission(self, h: Tensor, locs: Tensor, root: Tensor) -> TorchDistribution:
        """p(v | h) for one-hot h of shape (..., K), with locs (K, D); event shape (D,)."""
        return Selected(h, self.components(locs, root), num_visible=locs.shape[-1])

    @abstractmethod
    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_n x_n^T for weights (N, K) and x (N, D), as far as the structure needs it."""

    @abstractmethod
    def maximize(self, second: Tensor, mean: Tensor, floor: float) -> Tensor:
        """The parameter maximizing sum_k E[log N(x; mean_k, Sigma_k)] over Sigma_k >= floor * I.

        Args:
            second: second moments E_k[x x^T] of the components, as `second_moment` lays them out, divided by the
                components' weights.
            mean: shape (K, D), E_k[x].
            floor: least variance in any direction; 0 sets no limit.

        Raises:
            RuntimeError: a component has no variance in some direction and the floor is 0.
        """


@dataclass(frozen=True)
class Diagonal(Covariance):
    """Sigma_k = diag(scale_k^2), with the parameter `scale` of shape (K, D), positive."""

    parameter: ClassVar[str] = "scale"
    constraint: ClassVar[constraints.Constraint] = constraints.positive

    def from_variances(self, variances: Tensor) -> Tensor:
        """Standard deviations, shape (K, D)."""
        return variances.sqrt()

    def components(self, locs: Tensor, root: Tensor) -> Components:
        """Independent normals; see `Covariance.components`."""
        return DiagonalComponents(locs, root)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_nd^2, shape (K, D)."""
        return weights.T @ x.square()

    def maximize(self, second: Tensor, mean: Tensor, floor: float) -> Tensor:
        """Standard deviations, shape (K, D); see `Covariance.maximize`."""
        variances = (second - mean.square()).clamp(min=floor)
        positive = variances > 0
        if not positive.all():
            component, column = (~positive).nonzero()[0].tolist()
            raise RuntimeError(_collapsed(f"component {component}, column {column}"))
        return variances.sqrt()


@dataclass(frozen=True)
class Full(Covariance):
    """Sigma_k = L_k L_k^T, with the parameter `scale_tril` of shape (K, D, D), lower triangular."""

    parameter: ClassVar[str] = "scale_tril"
    constraint: ClassVar[constraints.Constraint] = constraints.lower_cholesky

    def from_variances(self, variances: Tensor) -> Tensor:
        """Diagonal matrices of standard deviations, shape (K, D, D)."""
        return variances.sqrt().diag_embed()

    def components(self, locs: Tensor, root: Tensor) -> Components:
        """Multivariate normals; see `Covariance.components`."""
        return FullComponents(locs, root)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_n x_n^T, shape (K, D, D), in chunks of rows: no tensor holds N K D numbers."""
        components, columns = weights.shape[1], x.shape[1]
        total = x.new_zeros(components * columns, columns)
        rows = max(1, _CHUNK_ELEMENTS // (components * columns))
        for w, y in zip(weights.split(rows), x.split(rows), strict=True):
            total += (w.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1).T @ y
        return total.view(components, columns, columns)

    def maximize(self, second: Tensor, mean: Tensor, floor: float) -> Tensor:
        """Cholesky factors, shape (K, D, D); eigenvalues below the floor are raised to it.

        Raising eigenvalues is the maximizer of -log|Sigma| - tr(Sigma^-1 S) over Sigma >= floor * I.
        """
        covariance = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        covariance = (covariance + covariance.mT) / 2
        if floor > 0:
            identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
            below = torch.linalg.cholesky_ex(covariance - floor * identity).info != 0
            if below.any():
                values, vectors = torch.linalg.eigh(covariance)
                raised = (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT
                covariance = torch.where(below[:, None, None], raised, covariance)
        root, info = torch.linalg.cholesky_ex(covariance)
        if (info != 0).any():
            raise RuntimeError(_collapsed(f"component {int(info.nonzero()[0])}"))
        return root


def _collapsed(where: str) -> str:
    return (
        f"Expected a positive variance in every direction, but got none in {where}: the likelihood has no maximum. "
        "Pass a larger covariance_floor, fewer components, or start anew with initialize(v). Nothing was changed."
    )
