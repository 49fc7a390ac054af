"""The linear-Gaussian model of section 19.4.3: Gaussian latents, seen through a linear map with correlated noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_statistics, check_varies

from .base import Model, assign_parameters, read_parameter
from .incomplete_normal import IncompleteNormal, completed_moments
from .missing import column_mean_and_variance, observed_entries


class LinearGaussian(Model):
    r"""Gaussian latents, a linear map, and Gaussian noise with any covariance.

    .. math::
        p(h) = N(h; \mu, L_h L_h^\top), \qquad p(v | h) = N(v; W h + b, L_v L_v^\top)

    With the defaults p(h) = N(h; 0, I), b = 0 and unit noise; for one visible variable and two latents that is
    the example of (19.57), p(v | h) = N(v; w' h, 1). Its posterior does not factorise (19.61): `Structured(model)`
    holds it exactly. `MeanField(model)` finds the Gaussian of (19.67), whose means are exact and whose precisions are
    the diagonal of the posterior's: its variances are too small.

    Sites: ``"h"``, real, shape (N, K); ``"v"``, shape (N, D). Entries of v may be missing: p(v | h) is then that of
    the observed ones.

    Args:
        num_visible: number D of visible variables.
        num_latents: number K of latent variables.
        learn_prior: whether mean and covariance of the prior are parameters. A linear map of h undoes any change of
            them, so the likelihood has no need for it; they stay N(0, I) otherwise.
        variance_floor: least noise variance in any direction that `maximize` and `initialize` give, in squared units
            of v; 0 sets no limit.
        name: see `Model`.

    Attributes:
        prior_mean: shape (K,); a parameter with `learn_prior`, else a buffer.
        prior_tril: Cholesky factor L_h of the prior's covariance, shape (K, K); likewise.
        W: shape (D, K).
        bias: b, shape (D,).
        noise_tril: Cholesky factor L_v of the noise covariance, shape (D, D).
        shift: buffer, shape (D,); `statistics` takes moments around it, which saves digits when the data lie far
            from 0. `initialize` sets it to the data mean. Do not add statistics from before and after that.

    Raises:
        ValueError, TypeError: D or K is no positive int, or the floor is negative.

    Example:
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> model = LinearGaussian(num_visible=1, num_latents=2)
        >>> assign_parameters(model, {"W": torch.tensor([[1.0, 2.0]])})
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
        >>> q = em.infer(torch.tensor([[3.0]]))["h"]
        >>> q.distribution.stddev.pow(-2)  # 1 + w_i^2
        tensor([[2., 5.]])
    """

    prior_mean: Tensor
    prior_tril: Tensor
    W: Tensor
    bias: Tensor
    noise_tril: Tensor
    shift: Tensor

    def __init__(
        self,
        num_visible: int,
        num_latents: int,
        *,
        learn_prior: bool = False,
        variance_floor: float = 1e-6,
        name: str | None = None,
    ) -> None:
        check_count(num_latents, "num_latents")
        if not variance_floor >= 0:
            raise ValueError(f"Expected variance_floor >= 0, but got {variance_floor}. Pass 0 for no floor.")
        super().__init__(num_visible, name=name)
        self.num_latents = num_latents
        self.learn_prior = bool(learn_prior)
        self.variance_floor = float(variance_floor)
        self.register_buffer("shift", torch.zeros(num_visible))
        if self.learn_prior:
            self.declare("prior_mean", torch.zeros(num_latents))
            self.declare("prior_tril", torch.eye(num_latents), constraints.lower_cholesky)
        else:
            self.register_buffer("prior_mean", torch.zeros(num_latents))
            self.register_buffer("prior_tril", torch.eye(num_latents))
        self.declare("W", torch.randn(num_visible, num_latents) / math.sqrt(num_latents))
        self.declare("bias", torch.zeros(num_visible))
        self.declare("noise_tril", torch.eye(num_visible), constraints.lower_cholesky)

    def forward(self, v: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Entries of v where the mask, boolean of v's shape, is False are integrated out and never read.
        """
        prior = dist.MultivariateNormal(self.prior_mean, scale_tril=self.prior_tril)
        W, bias, noise_tril = self.W, self.bias, self.noise_tril
        with self.data_plate(v, size):
            h = pyro.sample("h", prior)
            loc = h @ W.T + bias
            if mask is None:
                return pyro.sample("v", dist.MultivariateNormal(loc, scale_tril=noise_tril), obs=v)
            self.check_mask_shape(v, mask)
            return pyro.sample("v", IncompleteNormal(loc, noise_tril, mask), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q with x = v - shift, summed over rows.

        Missing entries enter by their moments given h and the observed ones, at the present parameters: the M-step
        then maximises a bound on E_q[log p(v, h)] that touches it there, and never lowers it (Ghahramani & Jordan,
        1994).

        Returns:
            ``count`` (), the number of rows; ``sum`` (K,), sum_n E[h_n]; ``gram`` (K, K), sum_n E[h_n h_n^T];
            ``cross`` (K, D), sum_n E[h_n x_n^T]; ``total`` (D,), sum_n E[x_n]; ``scatter`` (D, D), sum_n E[x_n x_n^T].
        """
        mask, h = data.get("mask"), posterior["h"]
        x = observed_entries(data["v"] - self.shift, mask)
        moments = {"count": x.new_tensor(x.shape[0]), "sum": h.sum(), "gram": h.gram()}
        if mask is None:
            return {**moments, "cross": h.cross(x), "total": x.sum(0), "scatter": x.T @ x}
        W, bias, noise_tril = (read_parameter(self, name) for name in ("W", "bias", "noise_tril"))
        sums = completed_moments(x, mask, h.mean, h.second_moments(), W, bias - self.shift, noise_tril)
        return {**moments, **sums}

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set W and b by one regression on (h, 1), the noise to what it leaves, a learned prior to the moments of h.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: the noise has no variance in some direction while `variance_floor` is 0, or h has none under
                q (point masses); nothing has been changed then.
        """
        check_statistics(statistics, "sum", "gram", "cross", "total", "scatter")
        count, gram = statistics["count"], statistics["gram"]
        mean, second = statistics["sum"] / count, gram / count
        remedy = "Use a guide that is no point mass"
        prior_tril = _root(second - torch.outer(mean, mean), second.diagonal(), "latents", remedy)
        first = torch.cat([gram, statistics["sum"].unsqueeze(-1)], -1)
        last = torch.cat([statistics["sum"], count.reshape(1).to(gram)]).unsqueeze(0)
        targets = torch.cat([statistics["cross"], statistics["total"].unsqueeze(0)])
        weights = torch.linalg.solve(torch.cat([first, last]), targets)
        # By the normal equations the targets tell what the regression leaves.
        scatter = statistics["scatter"] / count
        noise = scatter - weights.T @ targets / count
        remedy = "Pass a larger variance_floor"
        noise_tril = _root(noise, scatter.diagonal(), "noise", remedy, self.variance_floor)
        values = {"W": weights[:-1].T, "bias": weights[-1] + self.shift, "noise_tril": noise_tril}
        if self.learn_prior:
            values |= {"prior_mean": mean, "prior_tril": prior_tril}
        assign_parameters(self, values)

    @torch.no_grad()
    def initialize(self, v: Tensor, *, mask: Tensor | None = None) -> None:
        """Start from the data's mean, a random map that explains half of each variance, noise for the rest, N(0, I).

        Raises:
            TypeError, ValueError: see `check_data`; or a column that the mask hides in every row; or a column is
                constant while `variance_floor` is 0.
        """
        self.check_data(v, mask=mask)
        mean, variance, _ = column_mean_and_variance(v, mask)
        variance = variance.clamp(min=self.variance_floor)
        check_varies(variance)
        W = torch.randn(self.num_visible, self.num_latents, dtype=v.dtype, device=v.device)
        values = {
            "W": W * (0.5 * variance / self.num_latents).sqrt().unsqueeze(-1),
            "bias": mean,
            "noise_tril": (0.5 * variance).clamp(min=self.variance_floor).sqrt().diag_embed(),
        }
        if self.learn_prior:
            values["prior_mean"] = v.new_zeros(self.num_latents)
            values["prior_tril"] = torch.eye(self.num_latents, dtype=v.dtype, device=v.device)
        assign_parameters(self, values)
        self.shift.copy_(mean)


def _root(covariance: Tensor, reference: Tensor, what: str, remedy: str, floor: float = 0.0) -> Tensor:
    """Cholesky factor of the best covariance with eigenvalues of at least the floor: lower ones are raised to it.

    The reference holds the second moments (D,) that the covariance was computed from, and whose rounding it bears.
    """
    covariance = (covariance + covariance.mT) / 2
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < floor:
        covariance = (vectors * values.clamp(min=floor)) @ vectors.mT
    scale = reference.clamp(min=torch.finfo(reference.dtype).tiny).rsqrt()
    least = torch.linalg.eigvalsh(scale.unsqueeze(-1) * covariance * scale)[0]
    if not least > 4 * len(values) * torch.finfo(values.dtype).eps:
        raise RuntimeError(
            f"Expected a positive variance of the {what} in every direction, but got {values[0].item():g}. {remedy}. "
            "Nothing was changed."
        )
    return torch.linalg.cholesky(covariance)
