r"""Gaussians of which some entries are observed: their marginal density, and moments with the hidden entries filled in.

With o the observed and m the missing entries of a row, and a component's mean mu and covariance Sigma,

.. math::
    p(v_o) = N(v_o; \mu_o, \Sigma_{oo}), \qquad
    E[v_m | v_o] = \mu_m + \Sigma_{mo} \Sigma_{oo}^{-1} (v_o - \mu_o), \qquad
    Cov[v_m | v_o] = \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om}

(Ghahramani & Jordan, 1994). A row's pattern of observed entries stands in for the blocks: Sigma_oo is filled up to
(D, D) with ones on the diagonal, so that many patterns are one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ext.products import tall_product

from .patterns import Patterns


def diagonal_log_prob_observed(v: Tensor, locs: Tensor, scale: Tensor, observed: Tensor) -> Tensor:
    """Sum over the observed entries of log N(v_d; mu_kd, sigma_kd^2), (N, K), for v and observed of shape (N, D)."""
    shift = locs.detach().mean(0)
    centred, precision = locs - shift, scale.pow(-2)
    x = torch.where(observed, v - shift, 0)
    constant = -0.5 * precision * centred.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    found = x @ (precision * centred).mT + x.square() @ (-0.5 * precision).mT
    return found + observed.to(v.dtype) @ constant.mT


def log_prob_observed(v: Tensor, locs: Tensor, scale_tril: Tensor, patterns: Patterns) -> Tensor:
    """log N(v_o; mu_k, Sigma_k) of the observed entries, nats.

    Args:
        v: shape (N, D); hidden entries are not read.
        locs: shape (K, D).
        scale_tril: Cholesky factors (K, D, D), or (1, D, D) when the components share it.
        patterns: those of the mask.

    Returns:
        Tensor of shape (N, K).
    """
    sigma = scale_tril @ scale_tril.mT
    shift = locs.detach().mean(0)
    centred = locs - shift
    found: list[Tensor] = []
    for observed, rows in patterns.batches:
        keep = observed.to(v.dtype)
        root = _root(sigma, keep)
        eye = torch.eye(locs.shape[1], dtype=v.dtype, device=v.device)
        whiten = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
        x = torch.where(observed.unsqueeze(1), v[rows] - shift, 0)
        means = whiten @ (keep.unsqueeze(1) * centred).unsqueeze(-1)
        white = x.unsqueeze(1) @ whiten.mT - means.mT
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = log_det + 0.5 * math.log(2 * math.pi) * keep.sum(-1, keepdim=True)
        log_prob = -0.5 * white.square().sum(-1) - constant.unsqueeze(-1)
        found.append(log_prob.mT.reshape(-1, len(locs)))
    return torch.cat(found)[patterns.places]


def diagonal_moments(
    weights: Tensor, x: Tensor, observed: Tensor, locs: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_n w_nk E[x_n] and sum_n w_nk E[x_n^2], both (K, D), with entries that are 0 in x where hidden."""
    hidden = tall_product(weights, (~observed).to(x.dtype))
    total = tall_product(weights, x) + hidden * locs
    return total, tall_product(weights, x.square()) + hidden * (locs.square() + scale.square())


def moments(weights: Tensor, x: Tensor, patterns: Patterns, locs: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Expected first and second moments of whole rows, given their observed entries and the component.

    Args:
        weights: w_nk, shape (N, K).
        x: shape (N, D), with 0 where hidden.
        patterns: those of the mask.
        locs: shape (K, D).
        scale_tril: shape (K, D, D), or (1, D, D) when the components share it.

    Returns:
        sum_n w_nk E[x_n], shape (K, D), and sum_n w_nk E[x_n x_n^T], shape (K, D, D).
    """
    sigma = scale_tril @ scale_tril.mT
    num, width = locs.shape
    total, second = x.new_zeros(num, width), x.new_zeros(num, width, width)
    for observed, rows in patterns.batches:
        keep = observed.to(x.dtype)
        root = _root(sigma, keep)
        half = torch.linalg.solve_triangular(root, keep[:, None, :, None] * sigma, upper=False)
        regression = torch.linalg.solve_triangular(root.mT, half, upper=True)
        hidden = 1 - keep
        rest = (sigma - half.mT @ half) * (hidden[:, None, :, None] * hidden[:, None, None, :])
        row = x[rows].unsqueeze(1)
        centred = row - (keep.unsqueeze(1) * locs).unsqueeze(2)
        filled = torch.where(observed[:, None, None, :], row, locs.unsqueeze(1) + centred @ regression)
        weight = weights[rows].mT
        weighted = weight.unsqueeze(-1) * filled
        total += weighted.sum((0, 2))
        second += (weighted.mT @ filled + weight.sum(-1)[..., None, None] * rest).sum(0)
    return total, second


def _root(sigma: Tensor, keep: Tensor) -> Tensor:
    """Cholesky factors (G, C, D, D) of the observed blocks of sigma (C, D, D), with ones where hidden."""
    block = keep[:, None, :, None] * keep[:, None, None, :] * sigma
    return torch.linalg.cholesky(block + (1 - keep).diag_embed().unsqueeze(1))
