"""Distributions that guides need and Pyro lacks: tables of joint states, point masses, sites made of parts."""
# pyright: reportIncompatibleMethodOverride=false
# torch declares `expand` and `support` otherwise than its own distributions define them.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from pyro_ext.sites import Site
from pyro_ext.states import enumerate_states, state_weights


class Tabulated(TorchDistribution):
    """A probability for every joint state of some discrete units.

    Args:
        logits: shape ``batch + (num_states,)``, need not be normalised.
        units: feature size of each unit: 1 for binary, K for one-hot.

    Example:
        >>> pair = Tabulated(torch.tensor([0.0, 1.0, 1.0, 0.0]), [1, 1])
        >>> pair.log_prob(torch.tensor([0.0, 1.0])).exp()
        tensor(0.3655)
    """

    arg_constraints: dict[str, Any] = {"logits": constraints.independent(constraints.real, 1)}
    has_enumerate_support = True

    def __init__(self, logits: Tensor, units: Sequence[int], *, validate_args: bool | None = None) -> None:
        self.logits = functional.log_softmax(logits, -1)
        self.units = tuple(units)
        super().__init__(logits.shape[:-1], torch.Size([sum(units)]), validate_args=validate_args)

    @classmethod
    def one_hot_groups(cls, logits: Tensor, units: Sequence[int]) -> TorchDistributionMixin:
        """Independent one-hot groups, logits ``batch + (num_groups, K)``, as one vector of features."""
        return OneHotGroups(logits, units)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    @staticmethod
    def index_of(value: Tensor, units: Sequence[int]) -> Tensor:
        """Index of a state ``(..., sum(units))`` in the table."""
        return (value.to(torch.float64) @ state_weights(units, device=value.device)).round().long()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Tabulated:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        return Tabulated(self.logits.expand(shape + self.logits.shape[-1:]), self.units, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw states, shape ``sample_shape + batch + (sum(units),)``."""
        shape = torch.Size(sample_shape)
        index = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(shape)
        states = enumerate_states(self.units, device=self.logits.device)
        return states.to(self.logits.dtype)[index]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of states, nats."""
        index = self.index_of(value, self.units)
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        return logits.gather(-1, index.expand(shape)[..., None]).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All states, leading dimension ``num_states``."""
        states = enumerate_states(self.units, device=self.logits.device).to(self.logits.dtype)
        states = states.reshape(states.shape[:1] + (1,) * len(self.batch_shape) + states.shape[1:])
        return states.expand(states.shape[:1] + self.batch_shape + self.event_shape) if expand else states

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return -(self.logits.exp() * self.logits).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Expected features."""
        return self.logits.exp() @ enumerate_states(self.units, device=self.logits.device).to(self.logits.dtype)


class OneHotGroups(TorchDistribution):
    """Independent one-hot groups as one vector of features.

    Args:
        logits: shape ``batch + (num_groups, K)``.
        units: K, once a group.
    """

    arg_constraints: dict[str, Any] = {"logits": constraints.independent(constraints.real, 2)}

    def __init__(self, logits: Tensor, units: Sequence[int], *, validate_args: bool | None = None) -> None:
        self.logits = functional.log_softmax(logits, -1)
        self.units = tuple(units)
        super().__init__(logits.shape[:-2], torch.Size([sum(units)]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHotGroups:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        return OneHotGroups(self.logits.expand(shape + self.logits.shape[-2:]), self.units, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw one-hot groups side by side."""
        draws = torch.distributions.OneHotCategorical(logits=self.logits, validate_args=False).sample(
            torch.Size(sample_shape)
        )
        return draws.flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats."""
        return (value.reshape(value.shape[:-1] + self.logits.shape[-2:]) * self.logits).sum((-1, -2))

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return -(self.logits.exp() * self.logits).sum((-1, -2))

    @property
    def mean(self) -> Tensor:
        """Expected features: probabilities."""
        return self.logits.exp().flatten(-2)


class PointMass(TorchDistribution):
    """All mass on one vector of features.

    On continuous features it is Pyro's Delta (log-density 0 at the point). On discrete features its
    gradient-based use is refused: no gradient can move it.

    Args:
        value: shape ``batch + (k,)``.
        discrete: the features are zeros and ones.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, value: Tensor, *, discrete: bool, validate_args: bool | None = None) -> None:
        self.value = value
        self.discrete = discrete
        super().__init__(value.shape[:-1], value.shape[-1:], validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Continuous points can be differentiated through."""
        return not self.discrete

    @constraints.dependent_property(event_dim=1)
    def support(self) -> Any:
        """Zeros and ones, or the real line."""
        return constraints.independent(constraints.boolean if self.discrete else constraints.real, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PointMass:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        return PointMass(self.value.expand(shape + self.value.shape[-1:]), discrete=self.discrete, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The point."""
        return self.value.expand(torch.Size(sample_shape) + self.value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The point."""
        return self.rsample(sample_shape).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        """0 at the point, minus infinity elsewhere."""
        here = (value == self.value).all(-1)
        return torch.where(here, 0.0, -torch.inf).to(self.value.dtype)

    def entropy(self) -> Tensor:
        """0: the entropy of a discrete point mass; a continuous one has none."""
        return self.value.new_zeros(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.value


class SiteDistribution(TorchDistribution):
    """The distribution of one site from independent parts over its features.

    Args:
        site: the site, which maps features to values.
        parts: for each part its features' positions and a distribution over them (event dimension 1).
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        site: Site,
        parts: Sequence[tuple[Sequence[int], TorchDistributionMixin]],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.site = site
        batch = torch.broadcast_shapes(*(fn.batch_shape for _, fn in parts))
        # A part that no earlier draw leads must still be drawn once for each of them.
        self.parts = tuple((tuple(index), fn.expand(batch)) for index, fn in parts)
        self._order = torch.tensor([i for index, _ in self.parts for i in index]).argsort()
        super().__init__(batch, site.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether every part can be differentiated through."""
        return all(fn.has_rsample for _, fn in self.parts)

    @constraints.dependent_property
    def support(self) -> Any:
        """The support of the site."""
        return self.site.fn.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> SiteDistribution:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        return SiteDistribution(self.site, [(i, fn.expand(shape)) for i, fn in self.parts], validate_args=False)

    def _draw(self, draws: list[Tensor]) -> Tensor:
        leading = torch.broadcast_shapes(*(d.shape[:-1] for d in draws))
        features = torch.cat([d.expand(leading + d.shape[-1:]) for d in draws], -1)
        return self.site.from_features(features[..., self._order.to(features.device)])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw a value, differentiable in the parameters where `has_rsample`."""
        return self._draw([fn.rsample(torch.Size(sample_shape)) for _, fn in self.parts])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw a value."""
        with torch.no_grad():
            return self._draw([fn.sample(torch.Size(sample_shape)) for _, fn in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values in nats, the change of variables included."""
        features = self.site.to_features(value)
        terms = [fn.log_prob(features[..., list(index)]) for index, fn in self.parts]
        total = sum(terms[1:], terms[0])
        if self.site.fn.support.is_discrete or all(isinstance(fn, PointMass) for _, fn in self.parts):
            return total
        real = features.reshape(features.shape[:-1] + self.site.real_shape)
        jacobian = self.site.transform.log_abs_det_jacobian(real, value)
        extra = jacobian.dim() - (features.dim() - 1)
        return total - (jacobian.sum(tuple(range(-extra, 0))) if extra else jacobian)

    def score_parts(self, value: Tensor) -> Any:
        """Refuse gradient estimators on a discrete point mass, which no gradient can move."""
        if any(isinstance(fn, PointMass) and fn.discrete for _, fn in self.parts):
            raise ValueError(
                f"Expected a factor with a gradient at the discrete site {self.site.name!r}, but got a point mass. "
                "Use EM with FixedPoint (coordinate-wise MAP), or MeanField in place of Dirac."
            )
        return super().score_parts(value)
