"""Binary sparse coding, the worked example of variational inference (section 19.4.1)."""

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

from .base import Model, assign_parameters, read_parameter
from .least_squares import least_squares
from .missing import column_mean_and_variance, column_moments, observed_entries


class BinarySparseCoding(Model):
    r"""Gaussian data as the sum of components that are each present or absent.

    .. math::
        p(h_i = 1) = \sigma(b_i) \quad (19.19), \qquad
        p(v | h) = N(v; W h, \mathrm{diag}(\beta)^{-1}) \quad (19.20)

    Sites: ``"h"``, 0 or 1, shape (N, H); ``"v"``, shape (N, D).

    Args:
        num_visible: number D of visible variables.
        num_latents: number H of latent variables.
        shared_precision: one precision for all visible variables (Henniges et al., 2010) instead of one for each.
        variance_floor: least noise variance 1 / beta that `maximize` and `initialize` give, in squared units of v; 0
            sets no limit.
        probability_floor: `maximize` keeps every sigma(b_i) in [floor, 1 - floor], in (0, 1/2).
        name: see `Model`.

    Attributes:
        b: prior logits, shape (H,).
        W: components in the columns, shape (D, H).
        beta: precisions of the noise, shape (D,), or () when shared.

    Raises:
        ValueError, TypeError: D or H is no positive int, or a floor is out of its range.

    Example:
        >>> model = BinarySparseCoding(num_visible=25, num_latents=10)
        >>> model.dream(4).shape
        torch.Size([4, 25])
    """

    b: Tensor
    W: Tensor
    beta: Tensor

    def __init__(
        self,
        num_visible: int,
        num_latents: int,
        *,
        shared_precision: bool = False,
        variance_floor: float = 1e-6,
        probability_floor: float = 1e-6,
        name: str | None = None,
    ) -> None:
        check_count(num_latents, "num_latents")
        if not variance_floor >= 0:
            raise ValueError(f"Expected variance_floor >= 0, but got {variance_floor}. Pass 0 for no floor.")
        if not 0 < probability_floor < 0.5:
            raise ValueError(f"Expected 0 < probability_floor < 0.5, but got {probability_floor}. Pass 1e-6, say.")
        super().__init__(num_visible, name=name)
        self.num_latents = num_latents
        self.shared_precision = bool(shared_precision)
        self.variance_floor = float(variance_floor)
        self.probability_floor = float(probability_floor)
        self.declare("b", torch.full((num_latents,), _sparse_logit(num_latents)))
        self.declare("W", torch.randn(num_visible, num_latents) / math.sqrt(num_latents))
        self.declare("beta", torch.ones(() if shared_precision else (num_visible,)), constraints.positive)

    def _noise(self, square: Tensor, observed: Tensor) -> Tensor:
        """The best variance from summed squared residuals (D,) and their number, (D,) or ()."""
        return square.sum() / observed.expand(square.shape).sum() if self.shared_precision else square / observed

    def forward(self, v: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Entries of v where the mask, boolean of v's shape, is False count nothing and are never read.
        """
        b, W, scale = self.b, self.W, self.beta.rsqrt()
        with self.data_plate(v, size):
            h = pyro.sample("h", dist.Bernoulli(logits=b).to_event(1))
            return pyro.sample("v", self.hide(dist.Normal(h @ W.T, scale), v, mask).to_event(1), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q, summed over rows.

        Under a mask each visible column has its own ``observed`` and ``gram``, over the rows where it is observed. They
        broadcast against the shared ones: statistics of masked and of complete batches add up.

        Returns:
            ``count`` (), the number of rows; ``observed`` () or (D,), that of observed entries of a column; ``sum``
            (H,), sum_n E[h_n]; ``gram`` (H, H) or (D, H, H), sum_n E[h_n h_n^T]; ``cross`` (H, D), sum_n E[h_n] v_n^T;
            ``square`` (D,), sum_n v_n^2.
        """
        mask, h = data.get("mask"), posterior["h"]
        v = observed_entries(data["v"], mask)
        return {
            "count": v.new_tensor(v.shape[0]),
            **column_moments(h, v, mask),
            # The prior is that of all rows, whatever is observed in them.
            "sum": h.sum(),
            "cross": h.cross(v),
            "square": v.square().sum(0),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set b to the logit of the mean activity, W by least squares, and then beta with the new W.

        Where the objective is flat in W (units that are never on, or always on together) W keeps its old value in
        those directions; columns that no row observes keep W and beta. The floors bound b and beta.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: the noise variance vanishes while `variance_floor` is 0; nothing has been changed then.
        """
        check_statistics(statistics, "observed", "sum", "gram", "cross", "square")
        cross, gram = statistics["cross"], statistics["gram"]
        observed = statistics["observed"].to(cross)
        probability = statistics["sum"] / statistics["count"]
        probability = probability.clamp(self.probability_floor, 1 - self.probability_floor)
        old = read_parameter(self, "W")
        if gram.dim() == 2:
            W = least_squares(gram, cross, old.T).T
            energy = ((W @ gram) * W).sum(-1)
        else:
            W = least_squares(gram, cross.T.unsqueeze(-1), old.unsqueeze(-1)).squeeze(-1)
            energy = ((gram @ W.unsqueeze(-1)).squeeze(-1) * W).sum(-1)
        residual = statistics["square"] - 2 * (W * cross.T).sum(-1) + energy
        variance = self._noise(residual, observed)
        # 0 / 0: a column that no row observes.
        variance = torch.where(variance.isnan(), 1 / read_parameter(self, "beta"), variance)
        variance = variance.clamp(min=self.variance_floor)
        check_noise(variance)
        assign_parameters(self, {"b": probability.logit(), "W": W, "beta": 1 / variance})

    @torch.no_grad()
    def initialize(self, v: Tensor, *, mask: Tensor | None = None) -> None:
        """Start from W = data mean + N(0, (s/4)^2), noise of the data's standard deviation s, and sigma(b) = 1/H.

        s is per visible variable, or pooled when the precision is shared. A single unit starts at sigma(b) = 1/2.

        Raises:
            TypeError, ValueError: see `check_data`; or a column that the mask hides in every row; or a column is
                constant while `variance_floor` is 0.
        """
        self.check_data(v, mask=mask)
        mean, variance, observed = column_mean_and_variance(v, mask)
        variance = self._noise(variance * observed, observed).clamp(min=self.variance_floor)
        check_varies(variance)
        noise = torch.randn(self.num_visible, self.num_latents, dtype=v.dtype, device=v.device)
        values = {
            "b": v.new_full((self.num_latents,), _sparse_logit(self.num_latents)),
            "W": mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) / 4 * noise,
            "beta": 1 / variance,
        }
        assign_parameters(self, values)


def _sparse_logit(num_latents: int) -> float:
    """logit(1/H); 0 for a single unit."""
    return -math.log(max(num_latents - 1, 1))
