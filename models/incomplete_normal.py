"""A multivariate normal of which some entries are observed, row by row, and what the hidden ones are expected to be."""

# torch's stubs declare `support` and `arg_constraints` as properties; every distribution sets them as attributes.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .patterns import Patterns


class IncompleteNormal(TorchDistribution):
    r"""N(v; loc, L L') of the observed entries of v: the hidden ones are integrated out, and never read.

    .. math:: \log p(v) = \log N(v_o; \mathrm{loc}_o, (L L^\top)_{oo})

    Args:
        loc: mean, shape (..., N, D).
        scale_tril: Cholesky factor L, shape (D, D).
        observed: which entries of v are observed, boolean (N, D).

    Example:
        >>> fn = IncompleteNormal(torch.zeros(1, 2), torch.eye(2), torch.tensor([[True, False]]))
        >>> fn.log_prob(torch.tensor([[0.0, torch.nan]]))
        tensor([-0.9189])
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale_tril: Tensor, observed: Tensor) -> None:
        self.loc, self.scale_tril, self.observed = loc, scale_tril, observed
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> IncompleteNormal:
        """Expand the batch, whose last dimension are the rows."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return IncompleteNormal(loc, self.scale_tril, self.observed)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw whole rows, shape sample_shape + (..., N, D)."""
        with torch.no_grad():
            noise = torch.randn(torch.Size(sample_shape) + self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
            return self.loc + noise @ self.scale_tril.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the observed entries, nats, shape (..., N)."""
        sigma, patterns = self.scale_tril @ self.scale_tril.mT, Patterns.of(self.observed)
        difference = torch.where(self.observed, value - self.loc, 0)
        eye = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
        found: list[Tensor] = []
        for observed, rows in patterns.batches:
            root = _observed_root(sigma, observed)
            # The inverse, for inference differentiates in loc many times: products then take the place of solutions.
            whiten = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
            white = difference[..., rows, :] @ whiten.mT
            # Hidden entries are 0 with variance 1.
            constant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * math.log(2 * math.pi) * observed.sum(-1)
            found.append((-0.5 * white.square().sum(-1) - constant.unsqueeze(-1)).flatten(-2))
        return torch.cat(found, -1)[..., patterns.places]


def completed_moments(
    x: Tensor, observed: Tensor, means: Tensor, seconds: Tensor, W: Tensor, bias: Tensor, scale_tril: Tensor
) -> dict[str, Tensor]:
    r"""The sums that a linear-Gaussian M-step needs, with hidden entries integrated out given h and the observed ones.

    .. math:: E[v_m | v_o, h] = \mu_m(h) + \Sigma_{mo} \Sigma_{oo}^{-1} (v_o - \mu_o(h)), \qquad \mu(h) = W h + b

    Args:
        x: data, shape (N, D), with 0 where hidden.
        observed: boolean (N, D).
        means: E[h_n], shape (N, K).
        seconds: E[h_n h_n^T], shape (N, K, K).
        W: shape (D, K).
        bias: b, shape (D,).
        scale_tril: Cholesky factor of Sigma, shape (D, D).

    Returns:
        ``cross`` (K, D), sum_n E[h_n x_n^T]; ``total`` (D,), sum_n E[x_n]; ``scatter`` (D, D), sum_n E[x_n x_n^T].
    """
    sigma = scale_tril @ scale_tril.mT
    eye = torch.eye(len(bias), dtype=x.dtype, device=x.device)
    cross, total, scatter = torch.zeros_like(W.mT), torch.zeros_like(bias), torch.zeros_like(sigma)
    for seen, rows in Patterns.of(observed).batches:
        keep = seen.to(x.dtype)
        columns = keep.unsqueeze(-1) * sigma
        # x -> E[x | observed entries] at h = 0 and b = 0: the observed entries themselves, and their regressions.
        fill = torch.cholesky_solve(columns, _observed_root(sigma, seen)).mT * keep.unsqueeze(-2)
        fill = torch.where(seen.unsqueeze(-1), keep.unsqueeze(-1) * eye, fill)
        rest = (eye - fill) @ sigma @ (eye - fill).mT
        constant = x[rows] @ fill.mT + ((eye - fill) @ bias).unsqueeze(-2)
        slope = (eye - fill) @ W
        mean = means[rows]
        product = mean.mT @ constant
        gram = seconds[rows].sum(1)
        total += constant.sum((0, 1)) + (slope @ mean.sum(1).unsqueeze(-1)).sum(0).squeeze(-1)
        cross += (product + gram @ slope.mT).sum(0)
        mixed = slope @ product
        pieces = constant.mT @ constant + mixed + mixed.mT + slope @ gram @ slope.mT + rows.shape[1] * rest
        scatter += pieces.sum(0)
    return {"cross": cross, "total": total, "scatter": scatter}


def _observed_root(sigma: Tensor, observed: Tensor) -> Tensor:
    """Cholesky factors (G, D, D) of the observed blocks of sigma (D, D), with ones where hidden."""
    keep = observed.to(sigma.dtype)
    block = keep.unsqueeze(-1) * keep.unsqueeze(-2) * sigma
    return torch.linalg.cholesky(block + (1 - keep).diag_embed())
