"""Gaussian densities of all components at once, by a few matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ext.selected import Components
from pyro_ext.tracing import holds, is_tracing

from .observed_gaussians import diagonal_log_prob_observed, log_prob_observed
from .patterns import Patterns

# Bytes of the intermediates of one chunk of rows, which are to stay in the cache.
_NARROW, _WIDE = 2**20, 2**22


class DiagonalComponents(Components):
    """Gaussians with diagonal covariances, by two matrix products, on x and on x^2.

    Args:
        locs: means (K, D).
        scale: standard deviations (K, D).
        observed: which entries of v are observed, boolean (N, D); None for all.
    """

    def __init__(self, locs: Tensor, scale: Tensor, observed: Tensor | None = None) -> None:
        self.locs, self.scale, self.observed = locs, scale, observed

    def log_prob(self, v: Tensor) -> Tensor:
        observed = _for_rows(v, self.observed)
        if observed is None:
            return _recomputed(_diagonal_log_prob, v, self.locs, self.scale)
        return _recomputed(
            lambda v, locs, scale: diagonal_log_prob_observed(v, locs, scale, observed), v, self.locs, self.scale
        )

    def draw(self, h: Tensor) -> Tensor:
        return torch.normal(h @ self.locs, h @ self.scale)


class FullComponents(Components):
    """Gaussians with full covariances, whitened by one matrix product for all components.

    Args:
        locs: means (K, D).
        scale_tril: Cholesky factors of the covariances (K, D, D).
        observed: as in `DiagonalComponents`.
    """

    def __init__(self, locs: Tensor, scale_tril: Tensor, observed: Tensor | None = None) -> None:
        self.locs, self.scale_tril, self.observed = locs, scale_tril, observed

    def log_prob(self, v: Tensor) -> Tensor:
        observed = _for_rows(v, self.observed)
        if observed is None:
            return _recomputed(_full_log_prob, v, self.locs, self.scale_tril)
        patterns = Patterns.of(observed)
        return _recomputed(
            lambda v, locs, root: log_prob_observed(v, locs, root, patterns), v, self.locs, self.scale_tril
        )

    def draw(self, h: Tensor) -> Tensor:
        mean = h @ self.locs
        noise = torch.randn_like(mean)
        # Component by component: a matrix a row would take D times the memory of the rows.
        for choice, scale_tril in zip(h.unsqueeze(-1).unbind(-2), self.scale_tril, strict=True):
            mean = mean + choice * (noise @ scale_tril.mT)
        return mean


class TiedComponents(Components):
    """Gaussians that share a full covariance: rows are whitened once, and their components are then spherical.

    Args:
        locs: means (K, D).
        scale_tril: Cholesky factor of the covariance (D, D).
        observed: as in `DiagonalComponents`.
    """

    def __init__(self, locs: Tensor, scale_tril: Tensor, observed: Tensor | None = None) -> None:
        self.locs, self.scale_tril, self.observed = locs, scale_tril, observed

    def log_prob(self, v: Tensor) -> Tensor:
        observed = _for_rows(v, self.observed)
        if observed is None:
            return _recomputed(_tied_log_prob, v, self.locs, self.scale_tril)
        patterns = Patterns.of(observed)
        scale_tril = self.scale_tril.unsqueeze(0)
        return _recomputed(lambda v, locs, root: log_prob_observed(v, locs, root, patterns), v, self.locs, scale_tril)

    def draw(self, h: Tensor) -> Tensor:
        mean = h @ self.locs
        return mean + torch.randn_like(mean) @ self.scale_tril.mT


def _diagonal_log_prob(v: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    # Around the means' mean, for the squares of data far from 0 would cancel.
    shift = locs.detach().mean(0)
    centred, precision = locs - shift, scale.pow(-2)
    if _cancels(centred / scale):
        return _differences(v, locs, scale, -scale.log().sum(-1) - _half_log_2pi(locs))
    square, linear = (-0.5 * precision).mT, (precision * centred).mT
    constant = -(0.5 * precision * centred.square() + scale.log()).sum(-1) - _half_log_2pi(locs)

    def part(rows: Tensor, out: Tensor | None) -> Tensor:
        x = rows - shift
        return torch.addmm(constant, x, linear, out=out).addmm_(x.square(), square)

    return _by_chunks(part, v, len(locs), max(locs.shape), _NARROW)


def _full_log_prob(v: Tensor, locs: Tensor, scale_tril: Tensor) -> Tensor:
    num, width = locs.shape
    shift = locs.detach().mean(0)
    # The 1/2 of the exponent stands in the whitening.
    whiten = math.sqrt(0.5) * _inverse(scale_tril).mT
    offset = ((locs - shift)[:, None, :] @ whiten).reshape(-1)
    flat = whiten.permute(1, 0, 2).reshape(width, -1)
    constant = -scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - _half_log_2pi(locs)

    def part(rows: Tensor, out: Tensor | None) -> Tensor:
        white = torch.addmm(-offset, rows - shift, flat).square_()
        total = torch.sum(white.view(len(rows), num, width), -1, out=out)
        return torch.sub(constant, total, out=out)

    return _by_chunks(part, v, num, num * width, _WIDE)


def _tied_log_prob(v: Tensor, locs: Tensor, scale_tril: Tensor) -> Tensor:
    shift = locs.detach().mean(0)
    whiten = _inverse(scale_tril).mT
    means = (locs - shift) @ whiten
    if _cancels(means):
        log_det = scale_tril.diagonal().log().sum().expand(len(locs))
        white = (v - shift) @ whiten
        return _differences(white, means, means.new_ones(()), -log_det - _half_log_2pi(locs))
    constant = -0.5 * means.square().sum(-1) - scale_tril.diagonal().log().sum() - _half_log_2pi(locs)
    halves = torch.full_like(means.mT, -0.5)

    def part(rows: Tensor, out: Tensor | None) -> Tensor:
        white = (rows - shift) @ whiten
        return torch.addmm(constant, white, means.mT, out=out).addmm_(white.square(), halves)

    return _by_chunks(part, v, len(locs), max(locs.shape), _NARROW)


def _cancels(means: Tensor) -> bool:
    """Whether means, in standard deviations, lie so far apart that the squares of the matrix products lose digits."""
    return not holds(means.detach().square().amax() * torch.finfo(means.dtype).eps <= 1e-4)


def _differences(v: Tensor, centers: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
    """Independent normals from the differences v - mu_k themselves: as accurate as those, and several times slower."""

    def part(rows: Tensor, out: Tensor | None) -> Tensor:
        white = ((rows.unsqueeze(-2) - centers) / scale).square_()
        total = torch.sum(white, -1)
        return torch.sub(constant, total, alpha=0.5, out=out)

    return _by_chunks(part, v, len(centers), centers.numel(), _WIDE)


def _for_rows(v: Tensor, observed: Tensor | None) -> Tensor | None:
    """The mask, repeated where rows come several times, one dimension of samples after the other."""
    if observed is None or len(v) == len(observed):
        return observed
    return observed.repeat(len(v) // len(observed), 1)


def _inverse(scale_tril: Tensor) -> Tensor:
    eye = torch.eye(scale_tril.shape[-1], dtype=scale_tril.dtype, device=scale_tril.device)
    return torch.linalg.solve_triangular(scale_tril, eye.expand_as(scale_tril), upper=False)


def _half_log_2pi(locs: Tensor) -> float:
    return 0.5 * locs.shape[-1] * math.log(2 * math.pi)


def _by_chunks(
    part: Callable[[Tensor, Tensor | None], Tensor], v: Tensor, columns: int, width: int, budget: int
) -> Tensor:
    """Fill (N, columns) chunk by chunk; `width` numbers a row are in between."""
    rows = max(1, budget // (width * v.element_size()))
    if is_tracing():
        # Compiled loops over all rows are fused already.
        return part(v, None)
    if torch.is_grad_enabled():
        return torch.cat([part(chunk, None) for chunk in v.split(rows)])
    found = v.new_empty(len(v), columns)
    for chunk, out in zip(v.split(rows), found.split(rows), strict=True):
        part(chunk, out)
    return found


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps none of its intermediates for the backward pass, but computes them again.

    E-steps differentiate log p in h alone, and would keep an (N, K, D) tensor for theta that nobody asks for.
    """

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[1:]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Through aliases: what one tensor owes to another is no derivative of this function.
            tensors = [t.view_as(t) for t in ctx.saved_tensors]
            value = ctx.function(*tensors)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, grad, create_graph=create_graph))
        return (None, *(next(found) if need else None for need in needed))


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        with torch.no_grad():
            return function(*tensors)
    return _Recomputed.apply(function, *tensors)  # pyright: ignore[reportReturnType]
