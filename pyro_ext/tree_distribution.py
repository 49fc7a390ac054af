"""The distribution of some units of a forest, as one vector of features."""
# pyright: reportIncompatibleMethodOverride=false
# torch declares `expand` and `support` otherwise than its own distributions define them.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.forest import Forest, indicators
from pyro_ext.states import enumerate_states, num_states

MAX_MARGINAL_STATES = 2**16


class TreeDistribution(TorchDistribution):
    """Some units of a forest, the others summed out, as one vector of features.

    Args:
        forest: the units and who depends on whom.
        params: logits of its tables, ``batch + (P,)``.
        units: the units that are kept, in rising order.

    Example:
        >>> from pyro_ext.forest import parents_of
        >>> forest = Forest([1, 1, 1], parents_of(3, [(0, 1), (1, 2)]))
        >>> TreeDistribution(forest, torch.zeros(10), [0, 2]).log_prob(torch.ones(2)).exp()
        tensor(0.2500)
    """

    arg_constraints: dict[str, Any] = {"params": constraints.independent(constraints.real, 1)}

    def __init__(
        self, forest: Forest, params: Tensor, units: Sequence[int], *, validate_args: bool | None = None
    ) -> None:
        self.forest, self.params, self.units = forest, params, tuple(units)
        self.sizes = [forest.units[unit] for unit in units]
        super().__init__(params.shape[:-1], torch.Size([sum(self.sizes)]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TreeDistribution:
        """Expand the batch."""
        params = self.params.expand(torch.Size(batch_shape) + self.params.shape[-1:])
        return TreeDistribution(self.forest, params, self.units, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw states, parents before their children, shape ``sample_shape + batch + (features,)``."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            drawn: dict[int, Tensor] = {}
            tables = self.forest.tables(self.params)
            for unit in self.forest.order:
                table = tables[unit].expand(shape + tables[unit].shape[-2:])
                above = drawn.get(self.forest.parents[unit], torch.zeros(shape, dtype=torch.long, device=table.device))
                index = above[..., None, None].expand(shape + (1, table.shape[-1]))
                logits = table.gather(-2, index).squeeze(-2)
                drawn[unit] = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
            states = [self._states([size]) for size in self.sizes]
            return torch.cat([table[drawn[unit]] for table, unit in zip(states, self.units, strict=True)], -1)

    def _states(self, sizes: Sequence[int]) -> Tensor:
        return enumerate_states(sizes, device=self.params.device).to(self.params.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of states, nats."""
        states = indicators(value.to(self.params.dtype), self.sizes)
        log_prob = self.forest.condition(self.params, dict(zip(self.units, states, strict=True)))[2]
        return log_prob.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def entropy(self) -> Tensor:
        """Entropy in nats, over the states of the kept units.

        Raises:
            ValueError: more than 65,536 states.
        """
        if len(self.units) > 64 or num_states(self.sizes) > MAX_MARGINAL_STATES:
            raise ValueError(
                f"Expected at most {MAX_MARGINAL_STATES} states of a part of a tree for its entropy, but got "
                f"{len(self.units)} units. Draw samples and use `log_prob`."
            )
        states = self._states(self.sizes)
        log_probs = self.log_prob(states.reshape(states.shape[:1] + (1,) * len(self.batch_shape) + states.shape[1:]))
        return -(log_probs.exp() * log_probs).sum(0)

    @property
    def mean(self) -> Tensor:
        """Expected features."""
        log_marginals = self.forest.log_marginals(self.forest.tables(self.params))
        return self.forest.features([x.exp() for x in log_marginals], self.units)
