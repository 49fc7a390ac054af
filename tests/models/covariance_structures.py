"""The four covariance structures written out as K full matrices, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_ext.models import Covariance, Diagonal, Full, GaussianMixture, Spherical, Tied, read_parameter

structures = pytest.mark.parametrize("covariance", [Spherical(), Diagonal(), Tied(), Full()], ids=repr)


def whole(covariance: Covariance, root: Tensor, locs: Tensor) -> Tensor:
    """The covariances (K, D, D) that a parameter stands for, with means (K, D)."""
    num, width = locs.shape
    if isinstance(covariance, Spherical):
        return root.square()[:, None, None] * torch.eye(width)
    if isinstance(covariance, Diagonal):
        return root.square().diag_embed()
    return (root @ root.mT).expand(num, width, width)


def covariances_of(model: GaussianMixture) -> Tensor:
    """The covariances (K, D, D) of a mixture."""
    return whole(model.covariance, read_parameter(model, model.covariance.parameter), model.locs.detach())


def project(covariance: Covariance, matrices: Tensor, weights: Tensor) -> Tensor:
    """The maximizer among the structure's covariances, (K, D, D), for scatters (K, D, D) of K components."""
    if isinstance(covariance, Spherical):
        means = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
        return means[:, None, None] * torch.eye(matrices.shape[-1])
    if isinstance(covariance, Diagonal):
        return matrices.diagonal(dim1=-2, dim2=-1).diag_embed()
    if isinstance(covariance, Tied):
        return torch.einsum("k,kde->de", weights / weights.sum(), matrices).expand_as(matrices)
    return matrices


def root_of(covariance: Covariance, matrices: Tensor) -> Tensor:
    """The parameter that stands for covariances (K, D, D) of the structure."""
    if isinstance(covariance, Spherical):
        return matrices[:, 0, 0].sqrt()
    if isinstance(covariance, Diagonal):
        return matrices.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.linalg.cholesky(matrices[0] if isinstance(covariance, Tied) else matrices)


def random_root(covariance: Covariance, num: int, width: int) -> Tensor:
    """A parameter of well-conditioned random covariances."""
    noise = 0.5 * torch.randn(num, width, width)
    matrices = 0.3 * torch.eye(width) + noise @ noise.mT
    return root_of(covariance, project(covariance, matrices, torch.ones(num)))


PEER_TYPES = {Spherical(): "spherical", Diagonal(): "diag", Tied(): "tied", Full(): "full"}


def peer_precisions(covariance: Covariance, covariances: Tensor) -> Tensor:
    """What scikit-learn's `precisions_init` takes for covariances (K, D, D)."""
    precisions = torch.linalg.inv(covariances)
    if isinstance(covariance, Spherical):
        return precisions[:, 0, 0]
    if isinstance(covariance, Diagonal):
        return precisions.diagonal(dim1=-2, dim2=-1)
    return precisions[0] if isinstance(covariance, Tied) else precisions
