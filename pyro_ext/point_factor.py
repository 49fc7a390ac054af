"""Point masses as factors: MAP inference."""

from __future__ import annotations

from collections.abc import Sequence

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_ext.distributions import PointMass
from pyro_ext.factors import Factor, bilinear, check_concave


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

    def part(self, group: Sequence[int]) -> DeltaFactor:
        return DeltaFactor(len(group), self.unit_size, discrete=self.discrete)
