"""Factorial hidden Markov model: several chains at once explain what is seen (Ghahramani and Jordan, 1997)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_finite, check_statistics, check_varies

from .base import assign_parameters, read_parameter
from .covariance import Covariance, Diagonal, Full
from .emissions import check_steps_shape, observed
from .least_squares import least_squares
from .sequence_model import SequenceModel, observed_steps
from .sequences import chain_prior, chain_statistics, check_floor, extent, floored, seen_steps
from .unread import Unread


class FactorialHMM(SequenceModel):
    r"""M independent chains of hidden states whose contributions add up to the mean of what is seen.

    .. math::
        p(v, h) = \prod_{m=1}^{M} p(h^{(m)}) \prod_{t=1}^{T} N\Big(v_t; \sum_m W^{(m)} h^{(m)}_t, C\Big)

    Sites, in the plate ``"data"`` over sequences: ``"h1"``, ..., ``"hM"``, the paths of the chains as one-hot states,
    shapes (N, T, K_m); ``"v"``, shape (N, T, D). A row is a sequence; losses are nats per sequence. Lengths, masks and
    the most probable paths (of a posterior, ``mode()``) are those of `HiddenMarkovModel`.

    `Structured(model)` with all chains in one block is exact, at a cost that grows with the product of the K_m.
    `MeanField(model)` has one chain factor for each site: the structured approximation of the paper.

    Args:
        num_visible: number D of visible variables of a step.
        num_states: numbers K_1, ..., K_M of states of the chains.
        covariance: structure of the noise C: `Diagonal()` or `Full()`.
        covariance_floor: least noise variance in any direction that `maximize` and `initialize` give, in squared units
            of v; 0 sets no limit.
        probability_floor: least first-state and transition probability that `maximize` gives.
        name: see `Model`.

    Attributes:
        initial1, ..., initialM: probabilities of the first states, shapes (K_m,).
        transition1, ..., transitionM: transition probabilities, shapes (K_m, K_m), from the row's state to the
            column's.
        W: contributions in the columns, chain by chain, shape (D, G) with G = K_1 + ... + K_M.
        scale: standard deviations of the noise, shape (D,), of a `Diagonal` covariance.
        scale_tril: Cholesky factor of C, shape (D, D), of a `Full` covariance.
        shift: buffer, shape (D,); `statistics` takes moments around it. `initialize` sets it to the data mean. Do not
            add statistics from before and after that.

    Raises:
        TypeError, ValueError: D or a K_m is no positive int, no chain, another covariance, or a floor out of its range.

    Example:
        >>> model = FactorialHMM(num_visible=2, num_states=[2, 3])
        >>> model.dream(5, num_steps=20).shape
        torch.Size([5, 20, 2])
    """

    W: Tensor
    shift: Tensor

    def __init__(
        self,
        num_visible: int,
        num_states: Sequence[int],
        covariance: Covariance = Diagonal(),  # noqa: B008 (frozen, without state)
        covariance_floor: float = 1e-6,
        *,
        probability_floor: float = 1e-10,
        name: str | None = None,
    ) -> None:
        if isinstance(num_states, int) or not len(num_states):
            raise TypeError(f"Expected num_states with one number a chain, but got {num_states!r}. Pass [2, 3], say.")
        for number in num_states:
            check_count(number, "every entry of num_states")
        if type(covariance) not in (Diagonal, Full):
            raise TypeError(f"Expected the covariance Diagonal() or Full(), but got {covariance!r}. Pass one of them.")
        if not covariance_floor >= 0:
            raise ValueError(f"Expected covariance_floor >= 0, but got {covariance_floor}. Pass 0 for no floor.")
        check_floor(probability_floor, max(2, *num_states))
        super().__init__(num_visible, name=name)
        self.num_states = tuple(num_states)
        self.covariance = covariance
        self.covariance_floor = float(covariance_floor)
        self.probability_floor = float(probability_floor)
        self.register_buffer("shift", torch.zeros(num_visible))
        for chain, number in self._chains():
            self.declare(f"initial{chain}", torch.full((number,), 1 / number), constraints.simplex)
            self.declare(f"transition{chain}", torch.full((number, number), 1 / number), constraints.simplex)
        self.declare("W", torch.randn(num_visible, sum(self.num_states)))
        root = covariance.from_variances(torch.ones(1, num_visible))[0]
        self.declare(covariance.parameter, root, covariance.constraint)

    def _chains(self) -> list[tuple[int, int]]:
        """Number of each chain, from 1, and of its states."""
        return list(enumerate(self.num_states, start=1))

    @property
    def sites(self) -> list[str]:
        """Names of the chains' sites."""
        return [f"h{chain}" for chain, _ in self._chains()]

    @property
    def _offset(self) -> Tensor:
        """What every column of W bears of the shift, (D, 1): an equal share of each chain."""
        return (self.shift / len(self.num_states)).unsqueeze(-1)

    def forward(
        self,
        v: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        size: int | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Run the program; see `SequenceModel.forward`."""
        num_rows, num_steps = extent(v, size, num_steps, self.event_dim)
        seen = seen_steps(num_steps, lengths, mask)
        priors = [(getattr(self, f"initial{m}"), getattr(self, f"transition{m}")) for m, _ in self._chains()]
        # States sum to 1: W without the shift, added once, is the same mean. Inference expands log p around h = 0, and
        # there the squares of data far from 0 would cancel.
        parts = (self.W - self._offset).split(self.num_states, -1)
        root = getattr(self, self.covariance.parameter)
        with pyro.plate("data", num_rows, dim=-1):
            mean = self.shift
            for name, (initial, transition), W in zip(self.sites, priors, parts, strict=True):
                h = pyro.sample(name, chain_prior(initial, transition, num_steps, lengths))
                mean = mean + h @ W.T
            steps = self._noise(mean, root)
            return pyro.sample("v", (steps if seen is None else Unread(steps, seen)).to_event(1), obs=v)

    def _noise(self, mean: Tensor, root: Tensor) -> TorchDistributionMixin:
        if isinstance(self.covariance, Full):
            return dist.MultivariateNormal(mean, scale_tril=root)
        return dist.Normal(mean, root).to_event(1)

    def check_values(self, v: Any, seen: Tensor | None) -> None:
        """Refuse sequences of another shape or dtype, or that are not finite at observed steps."""
        check_steps_shape(v, self.num_visible, next(self.parameters()))
        check_finite(observed(v, seen))

    def statistics(self, data: Mapping[str, Any], posterior: Any) -> dict[str, Tensor]:
        """Expected sufficient statistics under q, summed over sequences; steps that are not observed are left out.

        Returns:
            ``count`` (), the number of sequences; ``initial1``, ``transition1``, ..., expected first states (K_m,) and
            transitions (K_m, K_m) inside the sequences; ``steps`` (), the number of observed steps, and over them, with
            x = v - shift and g the chains' states side by side, ``gram`` (G, G), sum_t E[g_t g_t^T], ``cross`` (G, D),
            sum_t E[g_t] x_t^T, and ``square``, sum_t x_t x_t^T, (D, D), or its diagonal (D,).
        """
        v, lengths = data["v"], data.get("lengths")
        num_steps = v.shape[1]
        seen = seen_steps(num_steps, lengths, data.get("mask"))
        found: dict[str, Tensor] = {"count": v.new_tensor(len(v))}
        for (chain, _), name in zip(self._chains(), self.sites, strict=True):
            initial, transition = chain_statistics(posterior[name], num_steps, lengths)
            found[f"initial{chain}"], found[f"transition{chain}"] = initial, transition
        mean = torch.cat([posterior[name].mean for name in self.sites], -1)
        x, g = observed_steps(v, seen) - self.shift, observed_steps(mean, seen)
        weights = None if seen is None else seen.expand(v.shape[:2]).to(v.dtype)
        return {
            **found,
            "steps": v.new_tensor(len(x)),
            "gram": posterior.time_gram(self.sites, weights),
            "cross": g.T @ x,
            "square": x.T @ x if isinstance(self.covariance, Full) else x.square().sum(0),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the chains' probabilities, W by least squares, and then C with the new W, within the floors.

        The states of a chain sum to 1, so that what one chain adds to all its states another can take away: where the
        objective is flat in W, W keeps its old value. A row of transitions whose state is never left keeps its value.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: the noise vanishes in some direction while `covariance_floor` is 0; nothing has been changed
                then.
        """
        chains = [f"{what}{chain}" for chain, _ in self._chains() for what in ("initial", "transition")]
        check_statistics(statistics, *chains, "steps", "gram", "cross", "square")
        values = {
            name: floored(statistics[name], self.probability_floor, read_parameter(self, name)) for name in chains
        }
        W = least_squares(statistics["gram"], statistics["cross"], (read_parameter(self, "W") - self._offset).T).T
        second = self._residual(statistics, W) / statistics["steps"]
        root = self.covariance.maximize(
            second[None], second.new_zeros(1, self.num_visible), statistics["steps"][None], self.covariance_floor
        )
        assign_parameters(self, {**values, "W": W + self._offset, self.covariance.parameter: root[0]})

    def _residual(self, statistics: Mapping[str, Tensor], W: Tensor) -> Tensor:
        """sum_t E[(x_t - W g_t)(x_t - W g_t)^T], or its diagonal."""
        gram, cross, square = statistics["gram"], statistics["cross"], statistics["square"]
        if isinstance(self.covariance, Full):
            explained = W @ cross
            return square - explained - explained.mT + W @ gram @ W.mT
        return square - 2 * (W * cross.mT).sum(-1) + ((W @ gram) * W).sum(-1)

    @torch.no_grad()
    def initialize(self, v: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Start from W = (data mean + N(0, M s^2)) / M in every column, noise of variance s^2, uniform probabilities.

        s is the standard deviation of each visible variable over the observed steps: the chains together vary as the
        data do.

        Raises:
            TypeError, ValueError: see `check_data`; fewer observed steps than states of all chains; or a column is
                constant while `covariance_floor` is 0.
        """
        steps, number = self._start_steps(v, lengths, mask, sum(self.num_states)), len(self.num_states)
        mean = steps.mean(0)
        variance = (steps - mean).square().mean(0).clamp(min=self.covariance_floor)
        check_varies(variance, floor="covariance_floor")
        noise = torch.randn(self.num_visible, sum(self.num_states), dtype=v.dtype, device=v.device)
        values = {"W": mean.unsqueeze(-1) / number + (variance / number).sqrt().unsqueeze(-1) * noise}
        for chain, size in self._chains():
            values[f"initial{chain}"] = v.new_full((size,), 1 / size)
            values[f"transition{chain}"] = v.new_full((size, size), 1 / size)
        assign_parameters(
            self, {**values, self.covariance.parameter: self.covariance.from_variances(variance[None])[0]}
        )
        self.shift.copy_(mean)
