"""Structures of the covariances of K Gaussian components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.products import tall_product, weighted_moments
from pyro_ext.selected import Components, Selected

from .gaussian_components import DiagonalComponents, FullComponents, TiedComponents
from .observed_gaussians import diagonal_moments, moments
from .patterns import Patterns

# Bytes of the features of one chunk of rows, which are to stay in the cache.
_CHUNK_BYTES = 2**22


class Covariance(ABC):
    """How the covariances of K components of dimension D are parametrised, and maximized.

    Second moments are laid out as the structure needs them, with the components in the first dimension: divided by the
    components' weights they are expectations.
    """

    parameter: ClassVar[str]
    """Name of the parameter, a square root of the covariance."""

    constraint: ClassVar[constraints.Constraint]

    @abstractmethod
    def from_variances(self, variances: Tensor) -> Tensor:
        """The parameter with the given variances, shape (K, D), and no correlation; averaged where they are shared."""

    def start(self, variances: Tensor, num_components: int) -> Tensor:
        """The parameter of K components with the same variances (D,), those of the data around the first means.

        Raises:
            ValueError: the variances leave no density.
        """
        root = self.from_variances(variances.expand(num_components, -1))
        if not self.constraint.check(root).all():
            raise ValueError(
                f"Expected every column to vary around the means, but got no variance in column "
                f"{int((variances <= 0).nonzero()[0])}. Leave it out, or pass covariance_floor > 0."
            )
        return root

    @abstractmethod
    def components(self, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> Components:
        """The K densities with means locs (K, D) and this parameter.

        Args:
            locs: shape (K, D).
            root: the parameter.
            observed: which entries of v are observed, boolean (N, D): the densities are then those of the observed
                entries of each row, and the others are not read. None for all.
        """

    def emission(self, h: Tensor, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> TorchDistribution:
        """p(v | h) for one-hot h of shape (..., K), with locs (K, D); event shape (D,)."""
        return Selected(h, self.components(locs, root, observed), num_visible=locs.shape[-1])

    @abstractmethod
    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_n x_n^T for weights (N, K) and x (N, D), as far as the structure needs it."""

    def moments(self, weights: Tensor, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """sum_n w_nk x_n, shape (K, D), and `second_moment`, for x = v - shift with v of shape (N, D)."""
        x = v - shift
        return tall_product(weights, x), self.second_moment(weights, x)

    @abstractmethod
    def observed_moments(
        self, weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum_n w_nk E[x_n] and sum_n w_nk E[x_n x_n^T], given the observed entries of x_n and its component.

        Args:
            weights: w_nk, shape (N, K).
            x: shape (N, D), with 0 where hidden.
            observed: boolean (N, D).
            locs: means (K, D) of the same x, at which hidden entries are expected.
            root: the parameter, likewise.

        Returns:
            Tensor of shape (K, D), and second moments in the layout of `second_moment`.
        """

    @abstractmethod
    def maximize(self, second: Tensor, mean: Tensor, weights: Tensor, floor: float) -> Tensor:
        """The parameter maximizing sum_k w_k E_k[log N(x; mean_k, Sigma_k)] over Sigma_k >= floor * I.

        Args:
            second: second moments E_k[x x^T] of the components, as `second_moment` lays them out, divided by the
                components' weights.
            mean: shape (K, D), E_k[x].
            weights: w_k, shape (K,), positive.
            floor: least variance in any direction; 0 sets no limit.

        Raises:
            RuntimeError: a component has no variance in some direction and the floor is 0.
        """


@dataclass(frozen=True)
class Spherical(Covariance):
    """Sigma_k = scale_k^2 I, with the parameter `scale` of shape (K,), positive; second moments of shape (K,).

    The floor bounds scale_k^2.
    """

    parameter: ClassVar[str] = "scale"
    constraint: ClassVar[constraints.Constraint] = constraints.positive

    def from_variances(self, variances: Tensor) -> Tensor:
        """Root mean variances, shape (K,)."""
        return variances.mean(-1).sqrt()

    def components(self, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> Components:
        """Independent normals; see `Covariance.components`."""
        return DiagonalComponents(locs, root.unsqueeze(-1).expand_as(locs), observed)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk |x_n|^2, shape (K,)."""
        return tall_product(weights, x.square()).sum(-1)

    def moments(self, weights: Tensor, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """See `Covariance.moments`."""
        total, second = weighted_moments(weights, v, shift)
        return total, second.sum(-1)

    def observed_moments(
        self, weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Covariance.observed_moments`."""
        total, second = diagonal_moments(weights, x, observed, locs, root.unsqueeze(-1))
        return total, second.sum(-1)

    def maximize(self, second: Tensor, mean: Tensor, weights: Tensor, floor: float) -> Tensor:
        """Standard deviations, shape (K,); see `Covariance.maximize`."""
        variances = ((second - mean.square().sum(-1)) / mean.shape[-1]).clamp(min=floor)
        positive = variances > 0
        if not positive.all():
            raise RuntimeError(_collapsed(f"component {int((~positive).nonzero()[0])}"))
        return variances.sqrt()


@dataclass(frozen=True)
class Diagonal(Covariance):
    """Sigma_k = diag(scale_k^2), with the parameter `scale` of shape (K, D), positive; second moments of shape (K, D).

    The floor bounds every scale_kd^2.
    """

    parameter: ClassVar[str] = "scale"
    constraint: ClassVar[constraints.Constraint] = constraints.positive

    def from_variances(self, variances: Tensor) -> Tensor:
        """Standard deviations, shape (K, D)."""
        return variances.sqrt()

    def components(self, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> Components:
        """Independent normals; see `Covariance.components`."""
        return DiagonalComponents(locs, root, observed)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_nd^2, shape (K, D)."""
        return tall_product(weights, x.square())

    def moments(self, weights: Tensor, v: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """See `Covariance.moments`."""
        return weighted_moments(weights, v, shift)

    def observed_moments(
        self, weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Covariance.observed_moments`."""
        return diagonal_moments(weights, x, observed, locs, root)

    def maximize(self, second: Tensor, mean: Tensor, weights: Tensor, floor: float) -> Tensor:
        """Standard deviations, shape (K, D); see `Covariance.maximize`."""
        variances = (second - mean.square()).clamp(min=floor)
        positive = variances > 0
        if not positive.all():
            component, column = (~positive).nonzero()[0].tolist()
            raise RuntimeError(_collapsed(f"component {component}, column {column}"))
        return variances.sqrt()


@dataclass(frozen=True)
class Full(Covariance):
    """Sigma_k = L_k L_k^T, with the parameter `scale_tril` of shape (K, D, D), lower triangular.

    Second moments have shape (K, D, D). The floor bounds every eigenvalue of every Sigma_k.
    """

    parameter: ClassVar[str] = "scale_tril"
    constraint: ClassVar[constraints.Constraint] = constraints.lower_cholesky

    def from_variances(self, variances: Tensor) -> Tensor:
        """Diagonal matrices of standard deviations, shape (K, D, D)."""
        return variances.sqrt().diag_embed()

    def components(self, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> Components:
        """Multivariate normals; see `Covariance.components`."""
        return FullComponents(locs, root, observed)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_n w_nk x_n x_n^T, shape (K, D, D), in chunks of rows: no tensor holds N K D numbers."""
        num, width = weights.shape[1], x.shape[1]
        # The products x_i x_j, or w_k x_i, whichever are fewer, meet the rest in one matrix product.
        by_pairs = width < num
        total = x.new_zeros((num, width * width) if by_pairs else (width, num * width))
        rows = max(1, _CHUNK_BYTES // (total.shape[1] * x.element_size()))
        for w, y in zip(weights.split(rows), x.split(rows), strict=True):
            features = ((y if by_pairs else w).unsqueeze(-1) * y.unsqueeze(-2)).flatten(1)
            total.addmm_((w if by_pairs else y).mT, features)
        if by_pairs:
            return total.view(num, width, width)
        return total.view(width, num, width).transpose(0, 1).contiguous()

    def observed_moments(
        self, weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Covariance.observed_moments`."""
        return moments(weights, x, Patterns.of(observed), locs, root)

    def maximize(self, second: Tensor, mean: Tensor, weights: Tensor, floor: float) -> Tensor:
        """Cholesky factors, shape (K, D, D); see `Covariance.maximize`."""
        root, failed = _floored_root(second - mean.unsqueeze(-1) * mean.unsqueeze(-2), floor)
        if failed.any():
            raise RuntimeError(_collapsed(f"component {int(failed.nonzero()[0])}"))
        return root


@dataclass(frozen=True)
class Tied(Covariance):
    """Sigma_k = L L^T for all k, with the parameter `scale_tril` of shape (D, D), lower triangular.

    Second moments have shape (K, D, D), of which only the sum over the components counts: each holds an equal share.
    The floor bounds every eigenvalue of the one Sigma.
    """

    parameter: ClassVar[str] = "scale_tril"
    constraint: ClassVar[constraints.Constraint] = constraints.lower_cholesky

    def from_variances(self, variances: Tensor) -> Tensor:
        """Diagonal matrix of root mean variances, shape (D, D)."""
        return variances.mean(0).sqrt().diag()

    def components(self, locs: Tensor, root: Tensor, observed: Tensor | None = None) -> Components:
        """Multivariate normals; see `Covariance.components`."""
        return TiedComponents(locs, root, observed)

    def second_moment(self, weights: Tensor, x: Tensor) -> Tensor:
        """sum_nk w_nk x_n x_n^T / K for each component, shape (K, D, D)."""
        return _shared(tall_product(weights.sum(-1, keepdim=True) * x, x), weights.shape[1])

    def observed_moments(
        self, weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Covariance.observed_moments`."""
        total, second = moments(weights, x, Patterns.of(observed), locs, root.unsqueeze(0))
        return total, _shared(second.sum(0), weights.shape[1])

    def maximize(self, second: Tensor, mean: Tensor, weights: Tensor, floor: float) -> Tensor:
        """Cholesky factor, shape (D, D), of the pooled covariance; see `Covariance.maximize`."""
        share = (weights / weights.sum()).view(-1, 1, 1)
        pooled = (share * (second - mean.unsqueeze(-1) * mean.unsqueeze(-2))).sum(0)
        root, failed = _floored_root(pooled, floor)
        if failed:
            raise RuntimeError(_collapsed("the covariance that the components share"))
        return root


def _shared(total: Tensor, num: int) -> Tensor:
    return (total / num).expand(num, *total.shape).contiguous()


def _floored_root(covariance: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Cholesky factors (..., D, D) with eigenvalues of at least the floor, and where there is none.

    Raising eigenvalues is the maximizer of -log|Sigma| - tr(Sigma^-1 S) over Sigma >= floor * I.
    """
    covariance = (covariance + covariance.mT) / 2
    if floor > 0:
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        below = torch.linalg.cholesky_ex(covariance - floor * identity).info != 0
        if below.any():
            values, vectors = torch.linalg.eigh(covariance)
            raised = (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT
            covariance = torch.where(below[..., None, None], raised, covariance)
    root, info = torch.linalg.cholesky_ex(covariance)
    return root, info != 0


def _collapsed(where: str) -> str:
    return (
        f"Expected a positive variance in every direction, but got none in {where}: the likelihood has no maximum. "
        "Pass a larger covariance_floor, fewer components, or start anew with initialize(v). Nothing was changed."
    )
