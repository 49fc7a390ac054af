"""Point masses as factors: MAP inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import PointMass
from pyro_ext.factors import Factor, bilinear, check_concave
from pyro_ext.sites import Kind, Site
from pyro_ext.tracing import holds

LOG_OF_ZERO = -1000.0
"""The feature of a point at the end of a half-line: its exponential is exactly 0 in float32 and float64."""


class DeltaFactor(Factor):
    """A point mass; the parameters are the features themselves.

    Args:
        size: number of features.
        unit_size: 1, or K for one-hot groups of K features.
        discrete: the features are zeros and ones, and the optimum is taken over those (coordinate-wise MAP).
    """

    is_point = True

    def __init__(self, size: int, unit_size: int = 1, *, discrete: bool) -> None:
        self.size = self.num_params = size
        self.unit_size, self.discrete = unit_size, discrete
        self.groups = tuple(tuple(range(g, g + unit_size)) for g in range(0, size, unit_size))

    def _split(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape[:-1] + (-1, self.unit_size))

    def _mode(self, score: Tensor) -> Tensor:
        if self.unit_size == 1:
            return (score > 0).to(score.dtype)
        best = functional.one_hot(self._split(score).argmax(-1), self.unit_size)
        return best.reshape(score.shape).to(score.dtype)

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        if not self.discrete:
            return mean.clone()
        return self._mode(mean - 0.5 if self.unit_size == 1 else mean)

    def mean(self, params: Tensor) -> Tensor:
        return params

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        return bilinear(params, quadratic)

    def entropy(self, params: Tensor) -> Tensor:
        return params.new_zeros(params.shape[:-1])

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        diagonal = quadratic.diagonal(dim1=-2, dim2=-1)
        if self.discrete:
            return self._mode(linear + 0.5 * diagonal)
        precision = (-diagonal).expand_as(linear)
        check_concave(precision)
        return linear / precision

    def from_scores(self, scores: Tensor) -> Tensor:
        if self.unit_size == 1:
            return (scores[..., 1:] > scores[..., :1]).to(scores.dtype)
        return functional.one_hot(scores.argmax(-1), self.unit_size).to(scores.dtype)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        return self.marginal(params, start, stop)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return PointMass(params[..., start:stop], discrete=self.discrete)

    def mode(self, params: Tensor) -> Tensor:
        return params

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        """|target - params|^2 / 2, shape ``(...)``, for continuous points; two points have no KL.

        It is -log N(target; params, I) up to a constant. The distance is one of features: `LOG_OF_ZERO`, the feature of
        a value 0, would outweigh all others. Sites that can be 0 are compared by their values instead.

        Raises:
            TypeError: discrete points, which have no gradient.
        """
        if self.discrete:
            raise TypeError(
                "Expected continuous points for a squared distance, but got discrete ones. Train probabilities, "
                "as a BernoulliFactor or a OneHotFactor has them."
            )
        return 0.5 * (target - params).square().sum(-1)

    def part(self, group: Sequence[int]) -> DeltaFactor:
        return DeltaFactor(len(group), self.unit_size, discrete=self.discrete)


def point_features(site: Site, value: Tensor) -> Tensor:
    """The features of a point, ``batch + (num_features,)``: themselves for a real site, log h for a positive one.

    As `Site.to_features`, save that a value may stand at the end of its half-line, as the zeros of a sparse code h >= 0
    do. Its feature is `LOG_OF_ZERO`, not minus infinity: `Site.from_features` gives exactly 0 back, and no gradient
    flows there.

    Args:
        site: a latent site.
        value: values of it, ``batch + event_shape``.

    Raises:
        ValueError: a value outside the support of the site, NaN among them.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.program import Program
        >>> def model(v):
        ...     h = pyro.sample("h", dist.Exponential(1.0).expand([2]).to_event(1))
        ...     pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)
        >>> site = Program(model, (torch.zeros(()),), {}).site("h")
        >>> features = point_features(site, torch.tensor([1.0, 0.0]))
        >>> features, site.from_features(features)
        (tensor([    0., -1000.]), tensor([1., 0.]))
    """
    if site.kind is not Kind.CONSTRAINED:
        return site.to_features(value)
    if not holds(site.fn.support.check(value).all()):
        raise ValueError(
            f"Expected values of {site.name!r} in its support, {site.fn.support}, but got values from "
            f"{value.min().item():.3g} to {value.max().item():.3g}. Map them onto the support; an encoder may have the "
            "argument nonnegative=True."
        )
    if site.real_shape != site.event_shape:
        return site.to_features(value)
    with torch.no_grad():
        at_end = site.to_features(value).isneginf()
        inside = site.from_features(torch.zeros_like(at_end, dtype=value.dtype))
    # Both branches of the outer choice are differentiated: the one not taken must not hold the logarithm of 0.
    features = site.to_features(torch.where(at_end.reshape(value.shape), inside, value))
    return torch.where(at_end, torch.full_like(features, LOG_OF_ZERO), features)
