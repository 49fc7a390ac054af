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
from torch.nn import functional

from pyro_ext.checks import check_count, check_noise, check_rows, check_statistics, check_varies

from .base import Model, assign_parameters, read_parameter
from .condensed import condense
from .missing import column_mean_and_variance, column_moments, observed_entries


class FactorAnalysis(Model):
    r"""Gaussian data with covariance W W' + diag(variance).

    .. math::
        p(h) = N(h; 0, I), \qquad p(v | h) = N(v; W h + \mathrm{mean}, \mathrm{diag}(\mathrm{variance}))

    The posterior is one Gaussian a row, the same covariance for all rows: `Structured(model)` holds it exactly,
    and `MeanField(model)` does where the columns of W are orthogonal under the noise (figure 19.1). With missing
    entries the covariance differs by row.

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
        shift: buffer, shape (D,); `statistics` takes moments around it, which saves digits when the data lie far
            from 0. `initialize` sets it to the data mean. Do not add statistics from before and after that.

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
        self.declare("variance", self._noise(torch.ones(num_visible), torch.ones(())), constraints.positive)

    def _noise(self, square: Tensor, observed: Tensor) -> Tensor:
        """The best variance from summed squared residuals (D,) and their number, (D,) or ()."""
        return square / observed

    def forward(self, v: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Entries of v where the mask, boolean of v's shape, is False count nothing and are never read.
        """
        mean, W, scale = self.mean, self.W, self.variance.sqrt()
        with self.data_plate(v, size):
            h = pyro.sample("h", dist.Normal(mean.new_zeros(self.num_factors), 1.0).to_event(1))
            return pyro.sample("v", self.hide(dist.Normal(h @ W.T + mean, scale), v, mask).to_event(1), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q with x = v - shift, summed over rows.

        Under a mask each visible column has sums of its own, over the rows where it is observed. They broadcast
        against the shared ones: statistics of masked and of complete batches add up.

        Returns:
            ``count`` (), the number of rows; ``observed`` () or (D,), that of observed entries of a column; ``sum``
            (K,) or (D, K), sum_n E[h_n]; ``gram`` (K, K) or (D, K, K), sum_n E[h_n h_n^T]; ``cross`` (K, D),
            sum_n E[h_n] x_n^T; ``total`` (D,), sum_n x_n; ``square`` (D,), sum_n x_n^2.
        """
        mask, h = data.get("mask"), posterior["h"]
        x = observed_entries(data["v"] - self.shift, mask)
        return {
            "count": x.new_tensor(x.shape[0]),
            **column_moments(h, x, mask),
            "cross": h.cross(x),
            "total": x.sum(0),
            "square": x.square().sum(0),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set W and the mean by one regression on (h, 1), and then the variances with the new W and mean.

        Columns that no row observes keep their old values.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: a noise variance vanishes while `variance_floor` is 0; nothing has been changed then.
        """
        check_statistics(statistics, "observed", "sum", "gram", "cross", "total", "square")
        observed = statistics["observed"].to(statistics["total"])
        targets = torch.cat([statistics["cross"], statistics["total"].unsqueeze(0)]).T
        weights = self._regression(statistics, observed, targets)
        # By the normal equations the targets tell what the regression leaves.
        square = statistics["square"] - (weights * targets).sum(-1)
        variance = self._noise(square, observed)
        # 0 / 0: a column that no row observes.
        variance = torch.where(variance.isnan(), read_parameter(self, "variance"), variance)
        variance = variance.clamp(min=self.variance_floor)
        check_noise(variance)
        assign_parameters(self, {"W": weights[:, :-1], "mean": weights[:, -1] + self.shift, "variance": variance})

    def _regression(self, statistics: Mapping[str, Tensor], observed: Tensor, targets: Tensor) -> Tensor:
        """Coefficients (D, K + 1) of the regression of x on (h, 1); the old ones where nothing is observed."""
        gram, total = statistics["gram"], statistics["sum"].unsqueeze(-1)
        corner = observed.unsqueeze(-1).unsqueeze(-1)
        moments = torch.cat([torch.cat([gram, total], -1), torch.cat([total.mT, corner], -1)], -2)
        if moments.dim() == 2:
            return torch.linalg.solve(moments, targets.T).T
        old = torch.cat([read_parameter(self, "W"), (read_parameter(self, "mean") - self.shift).unsqueeze(-1)], -1)
        hidden = observed == 0
        identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
        moments = torch.where(hidden[:, None, None], identity, moments)
        targets = torch.where(hidden.unsqueeze(-1), old, targets)
        return torch.linalg.solve(moments, targets.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def initialize(self, v: Tensor, *, mask: Tensor | None = None) -> None:
        """Start from the data's mean, random loadings that explain half of each variance, and noise for the rest.

        Raises:
            TypeError, ValueError: see `check_data`; or a column that the mask hides in every row; or a column is
                constant while `variance_floor` is 0.
        """
        self.check_data(v, mask=mask)
        mean, variance, observed = column_mean_and_variance(v, mask)
        variance = variance.clamp(min=self.variance_floor)
        check_varies(variance)
        loadings = torch.randn(self.num_visible, self.num_factors, dtype=v.dtype, device=v.device)
        loadings = loadings * (0.5 * variance / self.num_factors).sqrt().unsqueeze(-1)
        noise = self._noise(0.5 * variance * observed, observed)
        assign_parameters(self, {"mean": mean, "W": loadings, "variance": noise})
        self.shift.copy_(mean)

    @torch.no_grad()
    def maximize_evidence(self, v: Tensor, *, max_steps: int = 1000, tolerance: float = 1e-9) -> float:
        r"""Climb log p(v) of complete data itself, from the present noise: the shortest way to the maximum.

        Given the noise Psi, the best loadings are known: with the eigenvalues and eigenvectors of the scaled covariance
        Psi^{-1/2} S Psi^{-1/2},

        .. math:: W = \Psi^{1/2} U_K (\Lambda_K - I)_+^{1/2}

        (Joreskog, 1967). Given W, the noise takes its EM step, diag(S - W W'). Neither half lowers log p(v): this is
        ECME (Liu & Rubin, 1994), which needs far fewer steps than EM where the noise is small. `EM.run` then starts
        at the maximum, and stops there.

        Args:
            v: complete data (N, D), or what `condense` made of them.
            max_steps: most steps.
            tolerance: nats per row; a step that gains less is the last.

        Returns:
            log p(v) at the end, nats per row.

        Raises:
            TypeError, ValueError: see `check_data`; or a column is constant while `variance_floor` is 0.
            RuntimeError: a noise variance vanishes while `variance_floor` is 0; nothing has been changed then.

        Example:
            >>> v = torch.randn(200, 2) @ torch.randn(2, 6) + torch.randn(200, 6)
            >>> model = FactorAnalysis(num_visible=6, num_factors=2)
            >>> model.initialize(v)
            >>> before = model.maximize_evidence(v, max_steps=1)
            >>> model.maximize_evidence(v) > before
            True
        """
        self.check_data(v)
        check_count(max_steps, "max_steps")
        if not tolerance >= 0:
            raise ValueError(f"Expected a tolerance of at least 0, but got {tolerance!r}. It is in nats per row.")
        data = v.double()
        mean = data.mean(0)
        centred = data - mean
        S = centred.mT @ centred / len(v)
        check_varies(S.diagonal().clamp(min=self.variance_floor))
        noise = read_parameter(self, "variance").double().expand(self.num_visible)
        rounding = 64 * torch.finfo(S.dtype).eps * S.diagonal()
        bound = -math.inf
        for _ in range(max_steps):
            loadings, new_bound = self._best_loadings(S, noise)
            if new_bound - bound <= tolerance:
                break
            bound = new_bound
            left = S.diagonal() - loadings.square().sum(-1)
            # What is left of a vanishing variance is the rounding of the difference.
            left = torch.where(left > rounding, left, 0)
            noise = self._noise(left, torch.ones_like(left)).clamp(min=self.variance_floor).expand(self.num_visible)
            check_noise(noise)
        # The loadings that belong to the last noise.
        loadings, bound = self._best_loadings(S, noise)
        last = self._noise(noise, torch.ones_like(noise))
        values = {"mean": mean, "W": loadings, "variance": last}
        assign_parameters(self, {name: value.to(v.dtype) for name, value in values.items()})
        return bound

    def _best_loadings(self, S: Tensor, noise: Tensor) -> tuple[Tensor, float]:
        """The loadings (D, K) that maximise log p(v) given the noise (D,), and log p(v) there, nats per row."""
        root = noise.sqrt()
        values, vectors = torch.linalg.eigh(S / root / root.unsqueeze(-1))
        kept = values[-self.num_factors :].clamp(min=1)
        loadings = root.unsqueeze(-1) * vectors[:, -self.num_factors :] * (kept - 1).sqrt()
        # More factors than columns: the others stay unused.
        loadings = functional.pad(loadings, (0, self.num_factors - loadings.shape[1]))
        # tr(C^{-1} S) and log |C|: the kept directions have the data's own variance, the others that of the noise.
        explained = (values[-self.num_factors :] / kept).sum() + values[: -self.num_factors].sum()
        log_det = noise.log().sum() + kept.log().sum()
        return loadings, -0.5 * float(self.num_visible * math.log(2 * math.pi) + log_det + explained)

    def condense(self, v: Tensor) -> tuple[Tensor, float]:
        """D + 1 rows v' whose log-likelihood, times the weight w, is that of complete data v, at any parameters.

        Exact EM steps on v' are those on v; see `condense`.

        Returns:
            v', shape (D + 1, D), and w = N / (D + 1); v itself and 1 where N <= D + 1.

        Raises:
            TypeError, ValueError: v is no matrix of D columns of finite numbers, of the parameters' dtype.
        """
        check_rows(v, self.num_visible, like=self.shift)
        return condense(v)


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

    def _noise(self, square: Tensor, observed: Tensor) -> Tensor:
        return square.sum() / observed.expand(square.shape).sum()
