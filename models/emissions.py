"""What the states of a hidden Markov model emit: one object for each family p(v_t | h_t)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_binary, check_count, check_finite, check_rows
from pyro_ext.selected import Components, Selected

from .base import Model, read_parameter
from .covariance import Covariance, Diagonal
from .discrete_components import BernoulliComponents, CategoricalComponents, PoissonComponents
from .plus_plus import plus_plus
from .sequences import check_floor, floored

AXES = ("N", "T")


class Emission(ABC):
    """The family of p(v_t | h_t), K densities over one step; the parameters belong to the model that declares them.

    Sums over steps take the steps in one dimension: v of shape (M,) + event, responsibilities of shape (M, K).

    Attributes:
        sums: names of the statistics.
    """

    sums: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def width(self) -> int | None:
        """Number D of columns of a step; None when a step is a single number."""

    @abstractmethod
    def declare(self, model: Model, num_states: int) -> None:
        """Make the parameters, of K states, on the model."""

    @abstractmethod
    def components(self, model: Model) -> Components:
        """The K densities at the model's parameters."""

    def distribution(self, h: Tensor, components: Components) -> Selected:
        """p(v_t | h_t) for one-hot h of shape (..., T, K): batch (..., T), log p linear in h."""
        return Selected(h, components, num_visible=self.width)

    @abstractmethod
    def check(self, v: Any, like: Tensor, seen: Tensor | None) -> None:
        """Refuse sequences, (N, T) + event, of another shape or dtype, or with values outside the support.

        Args:
            v: the data.
            like: a parameter, whose dtype and device the data must fit.
            seen: which steps are observed, (N, T); the others are not looked at. None when all are.
        """

    @abstractmethod
    def statistics(self, model: Model, v: Tensor, responsibilities: Tensor) -> dict[str, Tensor]:
        """Expected sufficient statistics, named as in `sums`, summed over the steps."""

    @abstractmethod
    def maximize(self, model: Model, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that maximize E_q[log p(v | h)], by name.

        Args:
            model: owner of the parameters.
            statistics: those of `statistics`, and ``responsibility`` (K,), positive.

        Raises:
            RuntimeError: there is no maximum.
        """

    @abstractmethod
    def initialize(self, model: Model, v: Tensor, num_states: int) -> dict[str, Tensor]:
        """A random start suited to the steps v, by names of parameters and buffers.

        Raises:
            ValueError: data from which no start can be made.
        """


def check_steps_shape(v: Any, num_visible: int, like: Tensor) -> None:
    """Refuse what is not a tensor of sequences (N, T, D) with at least one step.

    Raises:
        TypeError, ValueError: see `pyro_ext.checks.check_rows`; or sequences without steps.
    """
    if isinstance(v, Tensor) and v.dim() == 3 and v.shape[-2] == 0:
        raise ValueError(f"Expected sequences of at least one step, but got shape {tuple(v.shape)}. Leave them out.")
    check_rows(v, num_visible, like=like, axes=AXES)


def observed(v: Tensor, seen: Tensor | None) -> Tensor:
    """v with zeros, which lie in every support, at steps that are not observed."""
    if seen is None:
        return v
    return torch.where(seen.reshape(seen.shape + (1,) * (v.dim() - seen.dim())), v, 0)


@dataclass(frozen=True)
class GaussianEmission(Emission):
    r"""p(v_t | h_tk = 1) = N(v_t; mu_k, Sigma_k), for v of shape (N, T, D).

    Parameters: ``locs`` (K, D), and that of the covariance structure. Buffer: ``shift`` (D,), around which statistics
    take moments; `initialize` sets it to the data mean. Do not add statistics from before and after that.

    Args:
        num_visible: D.
        covariance: structure of the covariances, such as `Diagonal()` or `Full()`.
        covariance_floor: least variance in any direction, in squared units of v; 0 sets no limit.

    Raises:
        TypeError, ValueError: D is no positive int, no covariance structure, or a negative floor.

    Example:
        >>> from pyro_ext.models import HiddenMarkovModel
        >>> HiddenMarkovModel(3, GaussianEmission(2)).dream(4, num_steps=5).shape
        torch.Size([4, 5, 2])
    """

    num_visible: int
    covariance: Covariance = field(default_factory=Diagonal)
    covariance_floor: float = 1e-6
    sums: ClassVar[tuple[str, ...]] = ("sum", "second")

    def __post_init__(self) -> None:
        check_count(self.num_visible, "num_visible")
        if not isinstance(self.covariance, Covariance):
            raise TypeError(f"Expected a covariance structure, but got {self.covariance!r}. Pass Diagonal() or Full().")
        if not self.covariance_floor >= 0:
            raise ValueError(f"Expected covariance_floor >= 0, but got {self.covariance_floor}. Pass 0 for no floor.")

    @property
    def width(self) -> int:
        return self.num_visible

    def declare(self, model: Model, num_states: int) -> None:
        ones = torch.ones(num_states, self.num_visible)
        model.register_buffer("shift", torch.zeros(self.num_visible))
        model.declare("locs", torch.randn(num_states, self.num_visible))
        model.declare(self.covariance.parameter, self.covariance.from_variances(ones), self.covariance.constraint)

    def components(self, model: Model) -> Components:
        return self.covariance.components(model.locs, getattr(model, self.covariance.parameter))

    def check(self, v: Any, like: Tensor, seen: Tensor | None) -> None:
        check_steps_shape(v, self.num_visible, like)
        check_finite(observed(v, seen))

    def statistics(self, model: Model, v: Tensor, responsibilities: Tensor) -> dict[str, Tensor]:
        """``sum`` (K, D), sum_t r_tk x_t with x = v - shift; ``second``, second moments of the structure."""
        total, second = self.covariance.moments(responsibilities, v, model.shift)
        return {"sum": total, "second": second}

    def maximize(self, model: Model, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r = statistics["responsibility"]
        mean = statistics["sum"] / r.unsqueeze(-1)
        second = statistics["second"] / r.view(-1, *[1] * (statistics["second"].dim() - 1))
        root = self.covariance.maximize(second, mean, r, self.covariance_floor)
        return {"locs": model.shift + mean, self.covariance.parameter: root}

    def initialize(self, model: Model, v: Tensor, num_states: int) -> dict[str, Tensor]:
        """Means by k-means++ (Arthur and Vassilvitskii, 2007), pooled variances around them."""
        locs, nearest = plus_plus(v, num_states, center="state")
        variances = (v - locs[nearest]).square().mean(0).clamp(min=self.covariance_floor)
        root = self.covariance.start(variances, num_states)
        return {"locs": locs, self.covariance.parameter: root, "shift": v.mean(0)}


@dataclass(frozen=True)
class CategoricalEmission(Emission):
    """p(v_t = c | h_tk = 1) = probs_kc, for v of integers 0..C-1 of shape (N, T).

    Parameter: ``probs`` (K, C).

    Args:
        num_categories: C, at least 2.
        probability_floor: least probability that `maximize` and `initialize` give.

    Raises:
        TypeError, ValueError: C is no int of at least 2, or the floor is not in (0, 1/C).

    Example:
        >>> from pyro_ext.models import HiddenMarkovModel
        >>> HiddenMarkovModel(3, CategoricalEmission(6)).dream(4, num_steps=5).shape
        torch.Size([4, 5])
    """

    num_categories: int
    probability_floor: float = 1e-10
    sums: ClassVar[tuple[str, ...]] = ("categories",)

    def __post_init__(self) -> None:
        check_count(self.num_categories, "num_categories")
        if self.num_categories < 2:
            raise ValueError(
                "Expected num_categories >= 2, but got 1. A single category tells nothing about the state."
            )
        check_floor(self.probability_floor, self.num_categories)

    @property
    def width(self) -> int | None:
        return None

    def declare(self, model: Model, num_states: int) -> None:
        model.declare("probs", torch.randn(num_states, self.num_categories).softmax(-1), constraints.simplex)

    def components(self, model: Model) -> Components:
        return CategoricalComponents(model.probs.log())

    def check(self, v: Any, like: Tensor, seen: Tensor | None) -> None:
        if not isinstance(v, Tensor):
            raise TypeError(f"Expected v to be a torch.Tensor, but got {type(v).__name__}. Convert it.")
        if v.is_floating_point() or v.dtype == torch.bool:
            raise TypeError(f"Expected v of an integer dtype, but got {v.dtype}. Convert the categories, `v.long()`.")
        if v.dim() != 2 or not v.numel():
            raise ValueError(
                f"Expected v of shape (N, T) with at least one step, but got {tuple(v.shape)}. "
                "A single sequence is `v.unsqueeze(0)`."
            )
        if v.device != like.device:
            raise ValueError(
                f"Expected v on device {like.device}, that of the parameters, but got {v.device}. Move the data."
            )
        read = observed(v, seen)
        bad = (read < 0) | (read >= self.num_categories)
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"Expected categories in 0..{self.num_categories - 1}, but got {int(v[place])} at {place} "
                f"({int(bad.sum())} such values). Number them from 0, or raise num_categories."
            )

    def statistics(self, model: Model, v: Tensor, responsibilities: Tensor) -> dict[str, Tensor]:
        """``categories`` (K, C), how often each state is expected to emit each category."""
        counts = responsibilities.new_zeros(self.num_categories, responsibilities.shape[-1])
        return {"categories": counts.index_add(0, v.long(), responsibilities).mT}

    def maximize(self, model: Model, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        old = read_parameter(model, "probs")
        return {"probs": floored(statistics["categories"], self.probability_floor, old)}

    def initialize(self, model: Model, v: Tensor, num_states: int) -> dict[str, Tensor]:
        """The categories' frequencies, each times exp(N(0, 1/4)) and normalized."""
        like = read_parameter(model, "probs")
        counts = torch.bincount(v.long(), minlength=self.num_categories).to(like)
        noise = (0.5 * torch.randn_like(like)).exp()
        return {"probs": floored((counts + 1) * noise, self.probability_floor, like)}


@dataclass(frozen=True)
class BernoulliEmission(Emission):
    """p(v_td = 1 | h_tk = 1) = sigma(logits_kd), independently, for v of zeros and ones of shape (N, T, D).

    Parameter: ``logits`` (K, D).

    Args:
        num_visible: D.
        probability_floor: `maximize` and `initialize` keep probabilities in [floor, 1 - floor].

    Raises:
        TypeError, ValueError: D is no positive int, or the floor is not in (0, 1/2).

    Example:
        >>> from pyro_ext.models import HiddenMarkovModel
        >>> HiddenMarkovModel(3, BernoulliEmission(2)).dream(4, num_steps=5).shape
        torch.Size([4, 5, 2])
    """

    num_visible: int
    probability_floor: float = 1e-10
    sums: ClassVar[tuple[str, ...]] = ("sum",)

    def __post_init__(self) -> None:
        check_count(self.num_visible, "num_visible")
        check_floor(self.probability_floor, 2)

    @property
    def width(self) -> int:
        return self.num_visible

    def declare(self, model: Model, num_states: int) -> None:
        model.declare("logits", torch.randn(num_states, self.num_visible))

    def components(self, model: Model) -> Components:
        return BernoulliComponents(model.logits)

    def check(self, v: Any, like: Tensor, seen: Tensor | None) -> None:
        check_steps_shape(v, self.num_visible, like)
        check_binary(observed(v, seen))

    def statistics(self, model: Model, v: Tensor, responsibilities: Tensor) -> dict[str, Tensor]:
        """``sum`` (K, D), sum_t r_tk v_t."""
        return {"sum": responsibilities.T @ v}

    def maximize(self, model: Model, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self._logits(statistics["sum"], statistics["responsibility"].unsqueeze(-1))}

    def _logits(self, on: Tensor, total: Tensor) -> Tensor:
        # The log-odds, and not the probability, are held: in single precision 1 - 1e-10 is 1.
        bound = -torch.logit(torch.tensor(self.probability_floor, dtype=torch.float64)).item()
        return (on.clamp(min=0).log() - (total - on).clamp(min=0).log()).clamp(-bound, bound)

    def initialize(self, model: Model, v: Tensor, num_states: int) -> dict[str, Tensor]:
        """The logits of the columns' means (one more row of each value counted), plus N(0, 1/4)."""
        mean = self._logits(v.sum(0) + 1, v.new_tensor(len(v) + 2))
        return {"logits": mean + 0.5 * torch.randn(num_states, self.num_visible, dtype=v.dtype, device=v.device)}


@dataclass(frozen=True)
class PoissonEmission(Emission):
    """p(v_td | h_tk = 1) = Poisson(v_td; rates_kd), independently, for v of counts of shape (N, T, D).

    Parameter: ``rates`` (K, D), counts a step.

    Args:
        num_visible: D.
        rate_floor: least rate that `maximize` and `initialize` give.

    Raises:
        TypeError, ValueError: D is no positive int, or the floor is not positive.

    Example:
        >>> from pyro_ext.models import HiddenMarkovModel
        >>> HiddenMarkovModel(3, PoissonEmission(2)).dream(4, num_steps=5).shape
        torch.Size([4, 5, 2])
    """

    num_visible: int
    rate_floor: float = 1e-10
    sums: ClassVar[tuple[str, ...]] = ("sum",)

    def __post_init__(self) -> None:
        check_count(self.num_visible, "num_visible")
        if not self.rate_floor > 0:
            raise ValueError(f"Expected rate_floor > 0, but got {self.rate_floor}. Pass 1e-10, say.")

    @property
    def width(self) -> int:
        return self.num_visible

    def declare(self, model: Model, num_states: int) -> None:
        model.declare("rates", torch.randn(num_states, self.num_visible).exp(), constraints.positive)

    def components(self, model: Model) -> Components:
        return PoissonComponents(model.rates)

    def check(self, v: Any, like: Tensor, seen: Tensor | None) -> None:
        check_steps_shape(v, self.num_visible, like)
        read = observed(v, seen)
        check_finite(read)
        bad = (read < 0) | (read != read.floor())
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"Expected counts 0, 1, 2, ... in v, but got {v[place].item():g} at {place} "
                f"({int(bad.sum())} such values). Use GaussianEmission for data that are no counts."
            )

    def statistics(self, model: Model, v: Tensor, responsibilities: Tensor) -> dict[str, Tensor]:
        """``sum`` (K, D), sum_t r_tk v_t."""
        return {"sum": responsibilities.T @ v}

    def maximize(self, model: Model, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"rates": (statistics["sum"] / statistics["responsibility"].unsqueeze(-1)).clamp(min=self.rate_floor)}

    def initialize(self, model: Model, v: Tensor, num_states: int) -> dict[str, Tensor]:
        """The columns' means, each times exp(N(0, 1/4))."""
        noise = (0.5 * torch.randn(num_states, self.num_visible, dtype=v.dtype, device=v.device)).exp()
        return {"rates": (v.mean(0) * noise).clamp(min=self.rate_floor)}
