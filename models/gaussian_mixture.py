"""Mixture of Gaussians, the model of EM (section 19.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_statistics

from .base import Model, assign_parameters
from .covariance import Covariance, Diagonal


class GaussianMixture(Model):
    r"""Mixture of Gaussians with a one-hot latent variable.

    .. math:: p(h_k = 1) = \pi_k, \qquad p(v | h_k = 1) = N(v; \mu_k, \Sigma_k)

    Sites: ``"h"``, one-hot of shape (N, K); ``"v"``, shape (N, D).

    Args:
        num_components: number K of components.
        num_visible: number D of visible variables.
        covariance: `Diagonal()` or `Full()`.
        covariance_floor: least variance in any direction that `maximize` and `initialize` give a component, in
            squared units of v; 0 sets no limit. Gradient steps are not held by it.
        name: see `Model`.

    Attributes:
        weights: probabilities pi, shape (K,).
        locs: means mu, shape (K, D).
        scale: standard deviations, shape (K, D), of a `Diagonal` covariance.
        scale_tril: Cholesky factors, shape (K, D, D), of a `Full` covariance.
        shift: buffer, shape (D,); `statistics` takes moments around it, which saves digits when the data lie far
            from 0. `initialize` sets it to the data mean. Do not add statistics from before and after that.

    Raises:
        ValueError, TypeError: K or D is no positive int, the floor is negative, or the covariance is no `Covariance`.

    Example:
        >>> model = GaussianMixture(num_components=3, num_visible=2)
        >>> model.dream(5).shape
        torch.Size([5, 2])
    """

    weights: Tensor
    locs: Tensor
    shift: Tensor

    def __init__(
        self,
        num_components: int,
        num_visible: int,
        covariance: Covariance = Diagonal(),  # noqa: B008 (frozen, without state)
        covariance_floor: float = 1e-6,
        *,
        name: str | None = None,
    ) -> None:
        check_count(num_components, "num_components")
        if not isinstance(covariance, Covariance):
            raise TypeError(f"Expected a covariance structure, but got {covariance!r}. Pass Diagonal() or Full().")
        if not covariance_floor >= 0:
            raise ValueError(f"Expected covariance_floor >= 0, but got {covariance_floor}. Pass 0 for no floor.")
        super().__init__(num_visible, name=name)
        self.num_components = num_components
        self.covariance = covariance
        self.covariance_floor = float(covariance_floor)
        ones = torch.ones(num_components, num_visible)
        self.register_buffer("shift", torch.zeros(num_visible))
        self.declare("weights", torch.full((num_components,), 1 / num_components), constraints.simplex)
        self.declare("locs", torch.randn(num_components, num_visible))
        self.declare(covariance.parameter, covariance.from_variances(ones), covariance.constraint)

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v."""
        weights, locs, root = self.weights, self.locs, getattr(self, self.covariance.parameter)
        with self.data_plate(v, size):
            # From logits, because torch clamps probabilities at the machine epsilon.
            h = pyro.sample("h", dist.OneHotCategorical(logits=weights.log()))
            return pyro.sample("v", self.covariance.emission(h, locs, root), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics with responsibilities r_nk = q(h_nk = 1), summed over rows.

        Returns:
            ``count`` (), the number of rows; ``responsibility`` (K,), sum_n r_nk; ``sum`` (K, D), sum_n r_nk x_n with
            x = v - shift; ``second`` (K, D) or (K, D, D), sum_n r_nk x_n x_n^T or its diagonal.
        """
        v, r = data["v"], posterior["h"].mean
        x = v - self.shift
        return {
            "count": v.new_tensor(v.shape[0]),
            "responsibility": r.sum(0),
            "sum": r.T @ x,
            "second": self.covariance.second_moment(r, x),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set pi_k = r_k / N, mu_k and Sigma_k to the weighted moments, with variances of at least the floor.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: a component is responsible for no row, or has collapsed to zero variance while
                `covariance_floor` is 0; nothing has been changed then.
        """
        check_statistics(statistics, "responsibility", "sum", "second")
        r = statistics["responsibility"]
        empty = r <= torch.finfo(r.dtype).tiny
        if empty.any():
            raise RuntimeError(
                f"Expected every component to be responsible for some data, but got none for component "
                f"{int(empty.nonzero()[0])}, whose weight would be 0. "
                "Use fewer components, or start anew with initialize(v). Nothing was changed."
            )
        mean = statistics["sum"] / r.unsqueeze(-1)
        second = statistics["second"] / r.view(-1, *[1] * (statistics["second"].dim() - 1))
        root = self.covariance.maximize(second, mean, self.covariance_floor)
        values = {"weights": r / r.sum(), "locs": self.shift + mean, self.covariance.parameter: root}
        assign_parameters(self, values)

    @torch.no_grad()
    def initialize(self, v: Tensor) -> None:
        """Start from means drawn by k-means++, pooled variances around them and equal weights.

        A row is drawn as the next mean with probability proportional to its squared distance from the nearest mean so
        far (Arthur and Vassilvitskii, 2007).

        Raises:
            TypeError, ValueError: see `check_data`; or v has fewer distinct rows than components; or a column does not
                vary around the means while `covariance_floor` is 0.
        """
        self.check_data(v)
        locs, nearest = _plus_plus(v, self.num_components)
        variances = (v - locs[nearest]).square().mean(0).clamp(min=self.covariance_floor)
        if not (variances > 0).all():
            raise ValueError(
                f"Expected every column to vary around the means, but got no variance in column "
                f"{int((variances <= 0).nonzero()[0])}. Leave it out, or pass covariance_floor > 0."
            )
        shape = (self.num_components, self.num_visible)
        values = {
            "weights": torch.full_like(locs[:, 0], 1 / self.num_components),
            "locs": locs,
            self.covariance.parameter: self.covariance.from_variances(variances.expand(shape)),
        }
        assign_parameters(self, values)
        self.shift.copy_(v.mean(0))


def _plus_plus(v: Tensor, num_centers: int) -> tuple[Tensor, Tensor]:
    """Centers (K, D), distinct rows of v, and the index (N,) of the nearest center of each row."""
    chosen = [int(torch.randint(len(v), ()))]
    distance = (v - v[chosen[0]]).square().sum(-1)
    nearest = torch.zeros(len(v), dtype=torch.long, device=v.device)
    for number in range(1, num_centers):
        total = distance.cumsum(0)
        if not total[-1] > 0:
            raise ValueError(
                f"Expected at least {num_centers} distinct rows, one per component, but got {number}. "
                "Use fewer components."
            )
        # The first index whose cumulated distance exceeds the draw: rows at distance 0 are never taken.
        draw = torch.rand((), dtype=v.dtype, device=v.device) * total[-1]
        row = min(int(torch.searchsorted(total, draw, right=True)), int(distance.nonzero()[-1]))
        chosen.append(row)
        to_new = (v - v[row]).square().sum(-1)
        nearest = torch.where(to_new < distance, number, nearest)
        distance = torch.minimum(distance, to_new)
    return v[chosen], nearest
