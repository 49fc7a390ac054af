"""Sites of a traced program: what kind of values they take, and how those become plain features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform
from torch.nn import functional

from pyro_ext.markov_chain import MarkovChain


class Kind(Enum):
    """The values that a site can take, as far as factors tell them apart."""

    BINARY = "binary"
    ONE_HOT = "one-hot"
    CATEGORICAL = "categorical"
    REAL = "real"
    CONSTRAINED = "constrained continuous"
    OTHER_DISCRETE = "other discrete"

    @property
    def is_discrete(self) -> bool:
        """Whether the site takes countably many values."""
        return self in (Kind.BINARY, Kind.ONE_HOT, Kind.CATEGORICAL, Kind.OTHER_DISCRETE)


def kind_of(fn: TorchDistributionMixin) -> Kind:
    """Tell the kind of a site from the support of its distribution.

    Example:
        >>> kind_of(dist.Bernoulli(0.5).expand([3]).to_event(1)), kind_of(dist.Gamma(1.0, 1.0))
        (<Kind.BINARY: 'binary'>, <Kind.CONSTRAINED: 'constrained continuous'>)
    """
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.boolean)):
        return Kind.BINARY
    if isinstance(support, type(constraints.one_hot)):
        return Kind.ONE_HOT
    if isinstance(support, constraints.integer_interval):
        countable = base_of(fn).has_enumerate_support and _starts_at_zero(support)
        return Kind.CATEGORICAL if countable else Kind.OTHER_DISCRETE
    if support.is_discrete:
        return Kind.OTHER_DISCRETE
    if isinstance(support, type(constraints.real)):
        return Kind.REAL
    return Kind.CONSTRAINED


def base_of(fn: Any) -> Any:
    """The distribution of one unit, without the event dimensions and masks that are wrapped around it."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _starts_at_zero(support: Any) -> bool:
    return bool((torch.as_tensor(support.lower_bound) == 0).all())


@dataclass(frozen=True)
class Plate:
    """A vectorised plate that a site stands in.

    Attributes:
        name: its name.
        dim: its (negative) batch dimension.
        size: number of its elements in this call.
        full_size: number of all its elements; larger than `size` when it is subsampled.
    """

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """A latent site and its *features*: the real numbers that factors work on.

    Binary and one-hot values are their own features; a categorical value of K classes becomes K
    indicators; a real value is its own feature; a constrained value is mapped to the real line by
    Pyro's bijection for its support.

    Attributes:
        name: name of the site.
        kind: what values it takes.
        fn: its distribution in the trace (the shapes and the support are read from it).
        frames: the plates it stands in.
        batch_shape: shape of the plates, as traced or at their full size.
    """

    name: str
    kind: Kind
    fn: TorchDistributionMixin
    frames: tuple[Plate, ...]
    batch_shape: torch.Size

    @classmethod
    def from_message(cls, name: str, message: Any) -> Site:
        """Read a site from a node of a trace."""
        fn = message["fn"]
        frames = tuple(
            Plate(f.name, f.dim, f.size, f.full_size or f.size) for f in message["cond_indep_stack"] if f.vectorized
        )
        return cls(name, kind_of(fn), fn, frames, fn.batch_shape)

    def at_full_size(self) -> Site:
        """The same site with all elements of its plates."""
        return replace(self, batch_shape=self.full_batch_shape)

    @property
    def full_batch_shape(self) -> torch.Size:
        """Shape of the plates with the full size of those that are subsampled."""
        shape = list(self.batch_shape)
        for frame in self.frames:
            shape[frame.dim] = frame.full_size
        return torch.Size(shape)

    @property
    def is_chain(self) -> bool:
        """Whether the value is the path of one Markov chain."""
        return isinstance(base_of(self.fn), MarkovChain) and len(self.event_shape) == 2

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one value."""
        return self.fn.event_shape

    @cached_property
    def transform(self) -> Transform:
        """The bijection from the real line to the support (continuous sites)."""
        return biject_to(self.fn.support)

    @cached_property
    def num_classes(self) -> int:
        """Number of states of one unit: 2 for binary, K for one-hot and categorical."""
        if self.kind is Kind.BINARY:
            return 2
        if self.kind is Kind.ONE_HOT:
            return self.event_shape[-1]
        return int(base_of(self.fn).enumerate_support(expand=False).shape[0])

    @cached_property
    def unit_size(self) -> int:
        """Number of features of one unit that changes at once: K for one-hot and categorical, else 1."""
        return self.num_classes if self.kind in (Kind.ONE_HOT, Kind.CATEGORICAL) else 1

    @cached_property
    def real_shape(self) -> torch.Size:
        """Event shape of the features before they are flattened."""
        if self.kind is Kind.CATEGORICAL:
            return self.event_shape + (self.num_classes,)
        if self.kind is Kind.CONSTRAINED:
            return torch.Size(self.transform.inverse_shape(self.event_shape))
        return self.event_shape

    @cached_property
    def num_features(self) -> int:
        """Number of features of one value."""
        return math.prod(self.real_shape)

    def to_features(self, value: Tensor) -> Tensor:
        """Map values ``batch + event_shape`` to features ``batch + (num_features,)``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if self.kind is Kind.CATEGORICAL:
            value = functional.one_hot(value.long(), self.num_classes).to(torch.get_default_dtype())
        elif self.kind is Kind.CONSTRAINED:
            value = cast("Tensor", self.transform.inv(value))
        return value.reshape(batch + (self.num_features,))

    def from_real(self, value: Tensor) -> Tensor:
        """Map the real line to the support, ``batch + real_shape`` to ``batch + event_shape`` (constrained sites)."""
        return cast("Tensor", self.transform(value)) if self.kind is Kind.CONSTRAINED else value

    def from_features(self, features: Tensor) -> Tensor:
        """Map features ``batch + (num_features,)`` to values ``batch + event_shape``."""
        value = features.reshape(features.shape[:-1] + self.real_shape)
        return value.argmax(-1) if self.kind is Kind.CATEGORICAL else self.from_real(value)
