"""Factor analysis and probabilistic PCA: Gaussian data around a low-dimensional plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_noise, check_statistics, check_varies

from .base import Model, assign_parameters


class FactorAnalysis(Model):
    r"""Gaussian data with covariance W W' + diag(variance).

    .. math::
        p(h) = N(h; 0, I), \qquad p(v | h) = N(v; W h + \mathrm{mean}, \mathrm{diag}(\mathrm{variance}))

    The posterior is one Gaussian a row, the same covariance for all rows: `Structured(model)` holds it exactly,
    and `MeanField(model)` does where the columns of W are orthogonal under the noise (figure 19.1).

    Sites: ``"h"``, real, shape (N, K); ``"v"``, shape (N, D).

    Args:
        num_visible: number D of visible variables.
        num_factors: number K of factors.
        variance_floor: least noise variance that `maximize` and `initialize` give, in squared units of v; 0 sets no
            limit (Heywood cases then end in an error).
        name: see `Model`.

    Attributes:
        mean: shape (D,).
        W: loadings, shape (D, K); identified up to a rotation of the factors.
        variance: noise variances, shape (D,).

    Raises:
        ValueError, TypeError: D or K is no positive int, or the floor is negative.

    Example:
        >>> from pyro_ext import EM, ClosedForm, FixedPoint
        >>> from pyro_ext.guides import Structured
        >>> model = FactorAnalysis(num_visible=5, num_factors=2)
        >>> em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> em.run(torch.randn(100, 5), max_steps=3, progress=False).steps
        3
    """

    mean: Tensor
    W: Tensor
    variance: Tensor
    shift: Tensor

    def __init__(
        self, num_visible: int, num_factors: int, *, variance_floor: float = 1e-6, name: str | None = None
    ) -> None:
        check_count(num_factors, "num_factors")
        if not variance_floor >= 0:
            raise ValueError(f"Expected variance_floor >= 0, but got {variance_floor}. Pass 0 for no floor.")
        super().__init__(num_visible, name=name)
        self.num_factors = num_factors
        self.variance_floor = float(variance_floor)
        self.register_buffer("shift", torch.zeros(num_visible))
        self.declare("mean", torch.zeros(num_visible))
        self.declare("W", torch.randn(num_visible, num_factors) / math.sqrt(num_factors))
        self.declare("variance", self._tied(torch.ones(num_visible)), constraints.positive)

    def _tied(self, variances: Tensor) -> Tensor:
        """The parameter from the best variance of each visible variable."""
        return variances

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v."""
        mean, W, scale = self.mean, self.W, self.variance.sqrt()
        with self.data_plate(v, size):
            h = pyro.sample("h", dist.Normal(mean.new_zeros(self.num_factors), 1.0).to_event(1))
            return pyro.sample("v", dist.Normal(h @ W.T + mean, scale).to_event(1), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q with x = v - shift, summed over rows.

        Returns:
            ``count`` (), the number of rows; ``sum`` (K,), sum_n E[h_n]; ``cross`` (K, D), sum_n E[h_n] x_n^T;
            ``gram`` (K, K), sum_n E[h_n h_n^T]; ``total`` (D,), sum_n x_n; ``square`` (D,), sum_n x_n^2.
        """
        x, h = data["v"] - self.shift, posterior["h"]
        return {
            "count": x.new_tensor(x.shape[0]),
            "sum": h.sum(),
            "cross": h.cross(x),
            "gram": h.gram(),
            "total": x.sum(0),
            "square": x.square().sum(0),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set W and the mean by one regression on (h, 1), and then the variances with the new W and mean.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: a noise variance vanishes while `variance_floor` is 0; nothing has been changed then.
        """
        check_statistics(statistics, "sum", "cross", "gram", "total", "square")
        count, total = statistics["count"], statistics["total"]
        first = torch.cat([statistics["gram"], statistics["sum"].unsqueeze(-1)], -1)
        second = torch.cat([statistics["sum"], count.reshape(1).to(total)]).unsqueeze(0)
        moments = torch.cat([first, second])
        targets = torch.cat([statistics["cross"], total.unsqueeze(0)])
        weights = torch.linalg.solve(moments, targets)
        variance = self._tied((statistics["square"] - (weights * targets).sum(0)) / count)
        variance = variance.clamp(min=self.variance_floor)
        check_noise(variance)
        assign_parameters(self, {"W": weights[:-1].T, "mean": weights[-1] + self.shift, "variance": variance})

    @torch.no_grad()
    def initialize(self, v: Tensor) -> None:
        """Start from the data's mean, random loadings that explain half of each variance, and noise for the rest.

        Raises:
            TypeError, ValueError: see `check_data`; or a column is constant while `variance_floor` is 0.
        """
        self.check_data(v)
        mean = v.mean(0)
        variance = (v - mean).square().mean(0).clamp(min=self.variance_floor)
        check_varies(variance)
        loadings = torch.randn(self.num_visible, self.num_factors, dtype=v.dtype, device=v.device)
        loadings = loadings * (0.5 * variance / self.num_factors).sqrt().unsqueeze(-1)
        assign_parameters(self, {"mean": mean, "W": loadings, "variance": self._tied(0.5 * variance)})
        self.shift.copy_(mean)


class ProbabilisticPCA(FactorAnalysis):
    r"""Factor analysis with one noise variance for all visible variables (Tipping and Bishop, 1999).

    Its maximum likelihood solution spans the leading eigenvectors of the data's covariance S, with

    .. math::
        W W^\top + \sigma^2 I = U_K (\Lambda_K - \sigma^2 I) U_K^\top + \sigma^2 I, \qquad
        \sigma^2 = \frac{1}{D - K} \sum_{j > K} \lambda_j

    Args:
        num_visible: number D of visible variables.
        num_factors: number K of factors, below D.
        variance_floor: see `FactorAnalysis`.
        name: see `Model`.

    Attributes:
        variance: the noise variance, shape ().

    Example:
        >>> ProbabilisticPCA(num_visible=5, num_factors=2).dream(3).shape
        torch.Size([3, 5])
    """

    def _tied(self, variances: Tensor) -> Tensor:
        return variances.mean()
