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

from .base import Model, assign_parameters, read_parameter
from .covariance import Covariance, Diagonal
from .missing import column_mean_and_variance, observed_entries
from .plus_plus import plus_plus


class GaussianMixture(Model):
    r"""Mixture of Gaussians with a one-hot latent variable.

    .. math:: p(h_k = 1) = \pi_k, \qquad p(v | h_k = 1) = N(v; \mu_k, \Sigma_k)

    Sites: ``"h"``, one-hot of shape (N, K); ``"v"``, shape (N, D). Entries of v may be missing: p(v | h) is then
    that of the observed ones, and EM stays exact.

    Args:
        num_components: number K of components.
        num_visible: number D of visible variables.
        covariance: `Spherical()`, `Diagonal()`, `Tied()` or `Full()`.
        covariance_floor: least variance in any direction (in every column for the first two structures, every
            eigenvalue for the others, which is the same) that `maximize` and `initialize` give a component, in squared
            units of v; 0 sets no limit. Gradient steps are not held by it.
        name: see `Model`.

    Attributes:
        weights: probabilities pi, shape (K,).
        locs: means mu, shape (K, D).
        scale: standard deviations, shape (K,) of a `Spherical` covariance, (K, D) of a `Diagonal` one.
        scale_tril: Cholesky factors, shape (D, D) of a `Tied` covariance, (K, D, D) of a `Full` one.
        shift: buffer, shape (D,); `statistics` takes moments around it, which saves digits when the data lie far
            from 0. `initialize` sets it to the data mean. Do not add statistics from before and after that.

    Raises:
        ValueError, TypeError: K or D is no positive int, the floor is negative, or the covariance is no `Covariance`.

    Example:
        >>> model = GaussianMixture(num_components=3, num_visible=2)
        >>> model.dream(5).shape
        torch.Size([5, 2])

        Missing entries:

        >>> from pyro_ext import EM, ClosedForm, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> v = torch.tensor([[0.0, torch.nan], [0.1, 1.0], [5.0, 6.0], [torch.nan, 6.2], [5.3, 5.9]])
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> history = em.run(v, mask=~v.isnan(), progress=False, seed=0)
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
            raise TypeError(f"Expected a covariance structure, but got {covariance!r}. Pass Diagonal(), for example.")
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

    def forward(self, v: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Args:
            v: data, shape (N, D).
            mask: which entries of v are observed, boolean (N, D); the others are not read. None for all.
            size: number of rows to dream.
        """
        if mask is not None:
            self._check_call(v, mask)
        weights, locs, root = self.weights, self.locs, getattr(self, self.covariance.parameter)
        with self.data_plate(v, size):
            # From logits, because torch clamps probabilities at the machine epsilon.
            h = pyro.sample("h", dist.OneHotCategorical(logits=weights.log()))
            return pyro.sample("v", self.covariance.emission(h, locs, root, mask), obs=v)

    def _check_call(self, v: Tensor | None, mask: Tensor) -> None:
        if v is None:
            raise ValueError("Expected a mask only with v, but got one without. Dream whole rows.")
        self.check_mask(v, mask)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics with responsibilities r_nk = q(h_nk = 1), summed over rows.

        Missing entries enter by their first two moments given the observed ones and the component, at the present
        parameters (Ghahramani & Jordan, 1994).

        Returns:
            ``count`` (), the number of rows; ``responsibility`` (K,), sum_n r_nk; ``sum`` (K, D), sum_n r_nk x_n with
            x = v - shift; ``second``, sum_n r_nk x_n x_n^T as far as the covariance structure needs it: (K,), (K, D)
            or (K, D, D).
        """
        v, r, mask = data["v"], posterior["h"].mean, data.get("mask")
        if mask is None:
            total, second = self.covariance.moments(r, v, self.shift)
        else:
            x = observed_entries(v - self.shift, mask)
            locs = read_parameter(self, "locs") - self.shift
            root = read_parameter(self, self.covariance.parameter)
            total, second = self.covariance.observed_moments(r, x, mask, locs, root)
        return {"count": v.new_tensor(v.shape[0]), "responsibility": r.sum(0), "sum": total, "second": second}

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
        # E-steps keep probabilities off underflow (`solve_scores`): the least share of every row is none.
        empty = r <= 1e4 * torch.finfo(r.dtype).tiny * statistics["count"]
        if empty.any():
            raise RuntimeError(
                f"Expected every component to be responsible for some data, but got none for component "
                f"{int(empty.nonzero()[0])}, whose weight would be 0. "
                "Use fewer components, or start anew with initialize(v). Nothing was changed."
            )
        mean = statistics["sum"] / r.unsqueeze(-1)
        second = statistics["second"] / r.view(-1, *[1] * (statistics["second"].dim() - 1))
        root = self.covariance.maximize(second, mean, r, self.covariance_floor)
        values = {"weights": r / r.sum(), "locs": self.shift + mean, self.covariance.parameter: root}
        assign_parameters(self, values)

    @torch.no_grad()
    def initialize(self, v: Tensor, *, mask: Tensor | None = None) -> None:
        """Start from means drawn by k-means++, pooled variances around them and equal weights.

        A row is drawn as the next mean with probability proportional to its squared distance from the nearest mean so
        far (Arthur & Vassilvitskii, 2007). Missing entries are taken at the column's mean, for this start only, and
        left out of the variances.

        Raises:
            TypeError, ValueError: see `check_data`; or v has fewer distinct rows than components; or a column is never
                observed; or a column does not vary around the means while `covariance_floor` is 0.
        """
        self.check_data(v, mask=mask)
        center, _, observed = column_mean_and_variance(v, mask)
        filled = v if mask is None else torch.where(mask, v, center)
        locs, nearest = plus_plus(filled, self.num_components)
        squares = observed_entries((filled - locs[nearest]).square(), mask)
        variances = (squares.sum(0) / observed).clamp(min=self.covariance_floor)
        root = self.covariance.start(variances, self.num_components)
        weights = torch.full_like(locs[:, 0], 1 / self.num_components)
        assign_parameters(self, {"weights": weights, "locs": locs, self.covariance.parameter: root})
        self.shift.copy_(center)
