"""Gaussian factors over real features, independent or joint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.factors import Factor, bilinear, check_concave
from pyro_ext.tracing import holds


class NormalFactor(Factor):
    """Independent real features; the parameters are k means, then k logarithms of standard deviations."""

    def __init__(self, size: int) -> None:
        self.size, self.num_params = size, 2 * size
        self.groups = tuple((i,) for i in range(size))

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``(..., k)``."""
        return params[..., : self.size], params[..., self.size :].exp()

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return torch.cat([mean, torch.full_like(mean, math.log(spread))], -1)

    def mean(self, params: Tensor) -> Tensor:
        return params[..., : self.size]

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean, scale = self.moments(params)
        return bilinear(mean, quadratic) + (quadratic.diagonal(dim1=-2, dim2=-1) * scale**2).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        return (params[..., self.size :] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        precision = (-quadratic.diagonal(dim1=-2, dim2=-1)).expand_as(linear)
        check_concave(precision)
        return torch.cat([linear / precision, -0.5 * precision.log()], -1)

    def interpolate(self, old: Tensor, new: Tensor, damping: float | Tensor) -> Tensor:
        (loc, scale), (new_loc, new_scale) = self.moments(old), self.moments(new)
        keep = damping[..., None] if isinstance(damping, Tensor) else damping
        kept, taken = keep * scale.pow(-2), (1 - keep) * new_scale.pow(-2)
        precision = kept + taken
        return torch.cat([(kept * loc + taken * new_loc) / precision, -0.5 * precision.log()], -1)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        mean, scale = self.moments(params)
        return dist.Normal(mean[..., start:stop], scale[..., start:stop]).to_event(1)

    def columns(self, group: Sequence[int]) -> list[int]:
        return [*group, *(self.size + i for i in group)]

    def mode(self, params: Tensor) -> Tensor:
        return self.mean(params)

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        mean, scale = self.moments(params)
        log_ratio = target[..., self.size :] - params[..., self.size :]
        # expm1: of two scales that are almost equal a difference of squares would be rounding.
        spread = 0.5 * torch.expm1(2 * log_ratio) - log_ratio
        return (spread + 0.5 * ((target[..., : self.size] - mean) / scale).square()).sum(-1)

    def part(self, group: Sequence[int]) -> NormalFactor:
        return NormalFactor(len(group))


class MultivariateNormalFactor(Factor):
    """One Gaussian over k real features: k means, then the lower triangle of the Cholesky factor.

    The triangle is stored row by row, with the logarithm of its diagonal.
    """

    is_joint = True

    def __init__(self, size: int) -> None:
        self.size, self.num_params = size, size + size * (size + 1) // 2
        self.groups = (tuple(range(size)),)

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(..., k)`` and Cholesky factor of the covariance ``(..., k, k)``."""
        rows, columns = torch.tril_indices(self.size, self.size, device=params.device)
        tril = torch.zeros(params.shape[:-1] + (self.size, self.size), dtype=params.dtype, device=params.device)
        entries = params[..., self.size :]
        diagonal = rows == columns
        # The gradient must not see the exponential of an entry off the diagonal: it may overflow.
        tril[..., rows, columns] = torch.where(diagonal, torch.where(diagonal, entries, 0).exp(), entries)
        return params[..., : self.size], tril

    def pack(self, mean: Tensor, tril: Tensor) -> Tensor:
        """The parameters of a mean and a Cholesky factor."""
        rows, columns = torch.tril_indices(self.size, self.size, device=mean.device)
        entries = tril[..., rows, columns]
        entries = torch.where(rows == columns, entries.abs().log(), entries)
        return torch.cat([mean, entries.expand(mean.shape[:-1] + entries.shape[-1:])], -1)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        return self.pack(mean, spread * torch.eye(self.size, dtype=mean.dtype, device=mean.device))

    def mean(self, params: Tensor) -> Tensor:
        return params[..., : self.size]

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        mean, tril = self.moments(params)
        return bilinear(mean, quadratic) + (tril * (quadratic @ tril)).sum((-1, -2))

    def entropy(self, params: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(self.size, self.size, device=params.device)
        log_diagonal = params[..., self.size :][..., rows == columns]
        return log_diagonal.sum(-1) + 0.5 * self.size * math.log(2 * math.pi * math.e)

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        precision = -0.5 * (quadratic + quadratic.mT)
        # Flipping twice turns the Cholesky factor of the precision into that of the covariance.
        flipped, info = torch.linalg.cholesky_ex(precision.flip(-1, -2))
        if not holds((info == 0).all()):
            check_concave(torch.linalg.eigvalsh(precision))
        root = flipped.flip(-1, -2)
        eye = torch.eye(self.size, dtype=linear.dtype, device=linear.device)
        tril = torch.linalg.solve_triangular(root, eye, upper=True).mT
        tril = tril if tril.dim() == 2 else tril.expand(linear.shape[:-1] + tril.shape[-2:])
        mean = (tril @ (tril.mT @ linear[..., None])).squeeze(-1)
        return self.pack(mean, tril)

    def interpolate(self, old: Tensor, new: Tensor, damping: float | Tensor) -> Tensor:
        (loc, tril), (new_loc, new_tril) = self.moments(old), self.moments(new)
        keep = damping[..., None, None] if isinstance(damping, Tensor) else damping
        kept, taken = keep * torch.cholesky_inverse(tril), (1 - keep) * torch.cholesky_inverse(new_tril)
        linear = (kept @ loc[..., None] + taken @ new_loc[..., None]).squeeze(-1)
        return self.optimum(linear, -(kept + taken))

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        mean, tril = self.moments(params)
        loc = mean[..., start:stop]
        if start:
            difference = (earlier - mean[..., :start])[..., None]
            noise = torch.linalg.solve_triangular(tril[..., :start, :start], difference, upper=False)
            loc = loc + (tril[..., start:stop, :start] @ noise).squeeze(-1)
        return dist.MultivariateNormal(loc, scale_tril=tril[..., start:stop, start:stop])

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        mean, tril = self.moments(params)
        rows = tril[..., start:stop, :]
        return dist.MultivariateNormal(mean[..., start:stop], covariance_matrix=rows @ rows.mT)

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def mode(self, params: Tensor) -> Tensor:
        return self.mean(params)

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        (target_mean, target_tril), (mean, tril) = self.moments(target), self.moments(params)
        whitened = torch.linalg.solve_triangular(tril, target_tril, upper=False)
        difference = torch.linalg.solve_triangular(tril, (target_mean - mean)[..., None], upper=False)
        # The two entropies differ by the logarithm of the ratio of volumes.
        log_volume = self.entropy(params) - self.entropy(target)
        return 0.5 * (whitened.square().sum((-1, -2)) + difference.square().sum((-1, -2)) - self.size) + log_volume

    def part(self, group: Sequence[int]) -> MultivariateNormalFactor:
        return self
