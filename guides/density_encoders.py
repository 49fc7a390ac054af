"""Encoders that put out densities: q(h | v) that no factor in closed form can hold."""
# pyright: reportIncompatibleMethodOverride=false
# torch declares `expand` and `support` otherwise than its own distributions define them.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ext.distributions import SiteDistribution
from pyro_ext.factors import Factor
from pyro_ext.guides.encoders import EncoderDesign
from pyro_ext.sites import Kind, Site

Network = Callable[[Tensor], TorchDistributionMixin]
"""From rows ``(R, num_inputs)`` to a distribution with batch shape ``(R,)`` over features ``(num_features,)``."""


class DensityEncoder(nn.Module, ABC):
    """A network whose output is a distribution, for a q(h | v) that no product of simple factors comes near.

    `Amortized` uses it as the whole q of its latent. The distribution is one of Pyro's (or a `TorchDistribution`), over
    the *features* of the latent: zeros and ones for binary and one-hot units, K indicators for a class, and real
    numbers for a continuous latent, which the guide maps to its support with the Jacobian of the map.

    There are no moments in closed form: such a guide works with Pyro's ELBOs, `WakeSleep`, `EM` with `Gradient`,
    `elbo_terms` and `log_evidence`, whose numbers are then sampled. Without ``rsample`` gradients are score functions.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)
        >>> class HeavyTailed(DensityEncoder):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(1, 2)
        ...     def forward(self, x):
        ...         return dist.StudentT(3.0, self.linear(x), 1.0).to_event(1)
        >>> guide = Amortized(model, encoder=HeavyTailed())
        >>> guide.posterior(torch.ones(3, 1))["h"].sample(10).shape
        torch.Size([10, 3, 2])
    """

    @abstractmethod
    def forward(self, x: Tensor) -> TorchDistributionMixin:
        """The density for features of the rows.

        Args:
            x: ``(R, num_inputs)``.

        Returns:
            A distribution with batch shape ``(R,)`` and event shape ``(num_features,)``.
        """


class DensityDesign(EncoderDesign):
    """An `EncoderDesign` whose networks are `DensityEncoder`: `sized` gets the number of features as ``num_outputs``.

    ``start`` is that of the factorised family: prior logits ``(num_features,)`` of discrete latents, else means and
    logarithms of standard deviations ``(2 * num_features,)``.
    """

    @abstractmethod
    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> DensityEncoder:
        """A new network for ``num_outputs`` features; see `EncoderDesign.sized`."""


def is_density(given: Any) -> bool:
    """Whether an encoder, or what its design makes, puts out densities."""
    return isinstance(given, DensityEncoder | DensityDesign)


def check_base(base: Any) -> None:
    """Refuse what is no design of a network that puts out parameters.

    Raises:
        TypeError: as above.
    """
    if not isinstance(base, EncoderDesign) or isinstance(base, DensityDesign):
        raise TypeError(
            f"Expected base to be a design of parameters, MLP() or Convolutional(...), but got {base!r}. "
            "Networks of your own go into a subclass of DensityEncoder."
        )


class DensityFactor(Factor):
    """The distribution that a network puts out, as a factor: its "parameters" are what the network reads.

    Whatever needs moments, an entropy or an optimum is refused.

    Args:
        site: the latent.
        num_params: number of features that the network reads.
        network: gives the density of rows.
    """

    in_closed_form = False
    is_joint = True

    def __init__(self, site: Site, num_params: int, network: Network) -> None:
        self.site, self.network = site, network
        self.size, self.num_params = site.num_features, num_params
        self.groups = (tuple(range(self.size)),)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        """The density, ``params.shape[:-1]`` as its batch."""
        fn = self.network(params.reshape(-1, params.shape[-1]))
        if fn.batch_shape != params.shape[:-1]:
            fn = Folded(fn, params.shape[:-1])
        if fn.has_rsample or self.site.kind is not Kind.REAL:
            return fn
        # Under a name for which `TraceMeanField_ELBO` is refused: without rsample its gradient would be wrong.
        return SiteDistribution(self.site, [(range(self.size), fn)])

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return self.conditional(params, start, stop, params)

    def _refuse(self) -> NoReturn:
        raise ValueError(no_closed_form("a family with moments in closed form", [self.site.name]))

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        self._refuse()

    def mean(self, params: Tensor) -> Tensor:
        self._refuse()

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        self._refuse()

    def entropy(self, params: Tensor) -> Tensor:
        self._refuse()

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        self._refuse()

    def part(self, group: Sequence[int]) -> Factor:
        return self


class Folded(TorchDistribution):
    """A distribution over rows with its batch in another shape of as many elements.

    Args:
        rows: batch shape ``(R,)``.
        batch_shape: a shape of R elements.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, rows: TorchDistributionMixin, batch_shape: torch.Size) -> None:
        self.rows = rows
        super().__init__(torch.Size(batch_shape), rows.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the rows' distribution can be differentiated through."""
        return self.rows.has_rsample

    @constraints.dependent_property
    def support(self) -> Any:
        """That of the rows' distribution."""
        return self.rows.support

    def _fold(self, value: Tensor, sample_shape: Any) -> Tensor:
        return value.reshape(torch.Size(sample_shape) + self.batch_shape + self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``sample_shape + batch + event``."""
        return self._fold(self.rows.sample(torch.Size(sample_shape)), sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that can be differentiated, where `has_rsample`."""
        return self._fold(self.rows.rsample(torch.Size(sample_shape)), sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``leading + batch``, nats."""
        events, batch = len(self.event_shape), len(self.batch_shape)
        leading = torch.broadcast_shapes(value.shape[: value.dim() - events], self.batch_shape)
        value = value.expand(leading + value.shape[value.dim() - events :])
        # Dimensions that were expanded to the left of, or within, the batch become leading ones.
        grown = [d for d in range(batch) if leading[len(leading) - batch + d] != self.batch_shape[d]]
        if grown:
            return self._grown(value, leading, grown)
        flat = value.reshape(leading[: len(leading) - batch] + self.rows.batch_shape + self.event_shape)
        return self.rows.log_prob(flat).reshape(leading)

    def _grown(self, value: Tensor, leading: torch.Size, grown: list[int]) -> Tensor:
        first = len(leading) - len(self.batch_shape)
        moved = value.movedim([first + d for d in grown], list(range(len(grown))))
        for d in grown:
            moved = moved.unsqueeze(len(grown) + first + d)
        found = self.log_prob(moved)
        for d in reversed(grown):
            found = found.squeeze(len(grown) + first + d)
        return found.movedim(list(range(len(grown))), [first + d for d in grown])


def check_density(fn: Any, site: Site) -> None:
    """Refuse what a density encoder gave for two rows, where it is no density of the latent.

    Raises:
        TypeError: no distribution of Pyro.
        ValueError: of another shape or support, or whose draws have no finite density.
    """
    if not isinstance(fn, torch.distributions.Distribution) or not isinstance(fn, TorchDistributionMixin):
        raise TypeError(
            f"Expected a distribution of pyro.distributions from the density encoder of {site.name!r}, but got "
            f"{type(fn).__name__}. Return dist.Normal(mean, scale).to_event(1), for example."
        )
    if fn.batch_shape != (2,) or fn.event_shape != (site.num_features,):
        raise ValueError(
            f"Expected a density of {site.name!r} with batch shape (R,) and event shape ({site.num_features},), but "
            f"got {tuple(fn.batch_shape)} and {tuple(fn.event_shape)} for 2 rows. Build the encoder with "
            f"{site.num_features} features, and end with `.to_event(1)` where units are independent."
        )
    with torch.random.fork_rng(devices=[]):
        draws = fn.sample(torch.Size([16]))
    if not _fits(fn, draws, site):
        wanted = "zeros and ones" if site.kind is Kind.BINARY else "one-hot units"
        wanted = wanted if site.kind.is_discrete else "real numbers, which the guide maps to the support"
        raise ValueError(
            f"Expected a density of the {site.kind.value} site {site.name!r} over {wanted}, but got "
            f"{type(fn).__name__} over {fn.support}. Choose a family over the features of the site."
        )
    log_prob = fn.log_prob(draws)
    if log_prob.shape != (16, 2) or not bool(log_prob.isfinite().all()):
        raise ValueError(
            f"Expected finite log-densities of shape (S, R) for draws of {site.name!r}, but got shape "
            f"{tuple(log_prob.shape)}, {int((~log_prob.isfinite()).sum())} of them not finite. Keep scales and "
            "probabilities away from 0."
        )


def _fits(fn: TorchDistributionMixin, draws: Tensor, site: Site) -> bool:
    support: Any = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not site.kind.is_discrete:
        return isinstance(support, type(constraints.real))
    units = draws.reshape(draws.shape[:-1] + (-1, site.unit_size))
    binary = bool(((draws == 0) | (draws == 1)).all())
    return binary and (site.unit_size == 1 or bool((units.sum(-1) == 1).all()))


def no_closed_form(what: str, names: Sequence[str]) -> str:
    """The refusal of what only closed forms can give."""
    sites = ", ".join(map(repr, names))
    return (
        f"Expected {what}, but got the density encoder of {sites}. Average over draws, "
        "`posterior.sample_with_log_prob(1000)`, whose error is their standard deviation / sqrt(1000)."
    )
