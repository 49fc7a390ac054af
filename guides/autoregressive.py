"""An autoregressive q of binary units: each depends on those before it and on the data (Gregor et al., 2014)."""
# pyright: reportIncompatibleMethodOverride=false
# torch declares `expand` and `support` otherwise than its own distributions define them.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from pyro_ext.checks import check_count
from pyro_ext.discrete_factors import BernoulliFactor
from pyro_ext.guides.density_encoders import DensityDesign, DensityEncoder, check_base
from pyro_ext.guides.encoders import MLP, EncoderDesign, widths


class AutoregressiveUnits(TorchDistribution):
    r"""Binary units in a row, :math:`q(h) = \prod_i Bernoulli(h_i; \sigma(a_i(h_{<i}, c) + b_i))`.

    Args:
        network: a masked network (Germain et al., 2015), from units ``(..., H)`` and ``context=(..., C)`` to a
            ``(..., H)``.
        context: c, shape ``batch + (C,)``.
        logits: b, shape ``batch + (H,)``.
        order: positions of the units, first to last.
    """

    arg_constraints: dict[str, Any] = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(
        self,
        network: Any,
        context: Tensor,
        logits: Tensor,
        order: Sequence[int],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.context, self.logits, self.order = network, context, logits, tuple(order)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveUnits:
        """Expand the batch."""
        shape = torch.Size(batch_shape)
        context, logits = (t.expand(shape + t.shape[-1:]) for t in (self.context, self.logits))
        return AutoregressiveUnits(self.network, context, logits, self.order, validate_args=False)

    def conditional_logits(self, value: Tensor) -> Tensor:
        """Logit of each unit given those before it, ``(..., H)``, limited as those of `BernoulliFactor` are."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        context = self.context.expand(shape + self.context.shape[-1:])
        found = self.network(value.expand(shape + value.shape[-1:]), context=context)
        return BernoulliFactor.logits(found + self.logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw units one after the other: one pass of the network for each of them."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        with torch.no_grad():
            units = list(self.logits.new_zeros(shape).unbind(-1))
            for unit in self.order:
                logits = self.conditional_logits(torch.stack(units, -1))
                units[unit] = torch.bernoulli(logits[..., unit].sigmoid())
            return torch.stack(units, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(h) in one pass, ``(...)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        logits = self.conditional_logits(value)
        return (value * logits - functional.softplus(logits)).sum(-1)


@dataclass(frozen=True)
class AutoregressiveBernoulli(DensityDesign):
    r"""q(h | v) of a binary latent in which every unit depends on those before it.

    .. math:: q(h \mid v) = \prod_i Bernoulli(h_i;\, \sigma(a_i(h_{<i}, c(x)) + b_i(x)))

    It holds any dependence between the units of a site, explaining away for example, which a factorised q cannot. b and
    c are put out by one network of x, built by `base`; a is a masked network, 0 at the start, so that q starts at the
    factorised one of the other encoders. A draw takes H passes of a, log q one. There is no ``rsample``: Pyro's ELBOs
    estimate score-function gradients, `WakeSleep` needs none.

    Args:
        hidden: widths of the hidden layers of a; None for one of max(32, 2 H).
        num_context: width of c.
        base: the design of the network of x.

    Raises:
        TypeError: a size that is no int; a base that is no design of parameters.
        ValueError: a size below 1; at set-up, a latent that is not binary or has a single unit, or a hidden layer of
            fewer units than the latent.

    Example:
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import BinarySparseCoding
        >>> model = BinarySparseCoding(num_visible=5, num_latents=3)
        >>> guide = Amortized(model, encoder=AutoregressiveBernoulli())
        >>> guide.posterior(torch.randn(2, 5))["h"].log_prob(torch.ones(2, 3)).shape
        torch.Size([2])
    """

    hidden: Sequence[int] | None = None
    num_context: int = 16
    base: EncoderDesign = field(default_factory=MLP)

    def __post_init__(self) -> None:
        check_count(self.num_context, "num_context")
        if self.hidden is not None:
            object.__setattr__(self, "hidden", widths(self.hidden, "hidden"))
        check_base(self.base)

    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> DensityEncoder:
        """See `DensityDesign.sized`."""
        if len(start) != num_outputs or num_outputs < 2:
            raise ValueError(
                f"Expected a latent of at least 2 binary units for AutoregressiveBernoulli, but got {site!r} with "
                f"{num_outputs} features. Leave its encoder out: a single unit needs no other q."
            )
        hidden = (max(32, 2 * num_outputs),) if self.hidden is None else tuple(self.hidden)
        if not hidden or min(hidden) < num_outputs:
            raise ValueError(
                f"Expected hidden layers of at least {num_outputs} units, one a unit of {site!r}, but got {hidden}. "
                "Pass wider ones."
            )
        order = cast("torch.LongTensor", torch.arange(num_outputs))
        network = ConditionalAutoRegressiveNN(
            num_outputs,
            self.num_context,
            list(hidden),
            [1],
            permutation=order,
            skip_connections=True,
            nonlinearity=nn.Tanh(),
        )
        last: Any = network.layers[-1]
        skip: Any = network.skip_layer
        with torch.no_grad():
            for tensor in (last.weight, last.bias, skip.weight):
                tensor.zero_()
        wanted = torch.cat([start, start.new_zeros(self.num_context)])
        base = self.base.sized(x, len(wanted), wanted, site)
        return AutoregressiveEncoder(base, network, num_outputs).to(start)


class AutoregressiveEncoder(DensityEncoder):
    """The network of an `AutoregressiveBernoulli`.

    Args:
        base: from features ``(R, num_inputs)`` to logits ``(R, H)`` and context side by side.
        network: the masked network over H units.
        num_features: H.
    """

    def __init__(self, base: nn.Module, network: ConditionalAutoRegressiveNN, num_features: int) -> None:
        super().__init__()
        self.base, self.network, self.num_features = base, network, num_features
        self._order: list[int] = network.permutation.tolist()

    def forward(self, x: Tensor) -> TorchDistributionMixin:
        """See `DensityEncoder.forward`."""
        output = self.base(x)
        logits, context = output[..., : self.num_features], output[..., self.num_features :]
        return AutoregressiveUnits(self.network, context, logits, self._order)
