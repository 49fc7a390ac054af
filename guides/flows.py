"""Normalising flows as encoders: densities of continuous latents that bend (Rezende & Mohamed, 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import ConditionalAutoRegressiveNN, DenseNN
from torch import Tensor, nn

from pyro_ext.checks import check_count
from pyro_ext.guides.density_encoders import DensityDesign, DensityEncoder, check_base
from pyro_ext.guides.encoders import MLP, EncoderDesign, widths

Layer = Callable[[Tensor, int, Sequence[int]], ConditionalTransformModule]
"""Makes one transform from the order of the features ``(F,)``, the width of its context and those of its hidden layers.

The transform of the i-th feature in this order may depend on those before it.
"""


def affine_layer(order: Tensor, num_context: int, hidden: Sequence[int]) -> ConditionalTransformModule:
    """y_i = m_i(x_<i, c) + s_i(x_<i, c) x_i, an inverse autoregressive flow (Kingma et al., 2016).

    It starts as the identity. A draw and its density take one pass of the masked network; the density of any other
    value, as the sleep phase asks for it, takes a pass for each feature.

    Raises:
        ValueError: one feature only, which this would merely shift and scale.
    """
    if len(order) == 1:
        raise ValueError(
            "Expected at least 2 features for affine_layer, which bends each by those before it, but got 1. "
            "Use spline_layer."
        )
    return _AffineLayer(_masked(order, num_context, hidden, [1, 1]))


def spline_layer(order: Tensor, num_context: int, hidden: Sequence[int]) -> ConditionalTransformModule:
    """y_i = g(x_i), a monotone rational spline on [-3, 3] that depends on x_<i and c (Durkan et al., 2019).

    Costs are those of `affine_layer`, of a heavier network: eight bins, with widths, heights and slopes of their own.
    """
    bins, size = 8, len(order)
    if size == 1:
        network = _still(DenseNN(num_context, list(hidden), [bins, bins, bins - 1, bins], nn.Tanh()))
        return transforms.ConditionalSpline(network, 1, bins)
    network = _masked(order, num_context, hidden, [bins, bins, bins - 1, bins])
    return transforms.ConditionalSplineAutoregressive(size, network, count_bins=bins)


@dataclass(frozen=True)
class ConditionalFlow(DensityDesign):
    r"""Normalising flows that depend on the data, as q of a continuous latent.

    .. math:: u = m(x) + s(x)\, T_L(\ldots T_1(e; c(x)) \ldots; c(x)), \qquad e \sim Normal(0, I)

    u are the unconstrained features of the latent. m, log s and c are put out by one network of x, built by `base`; q
    starts at the factorised Normal of the other encoders. Transforms are those of `pyro.distributions.transforms`;
    every second one takes the features in the opposite order. Draws can be differentiated (``rsample``).

    Args:
        num_flows: number L of transforms.
        layer: `affine_layer`, `spline_layer`, or another function that makes a transform.
        hidden: widths of the hidden layers inside each transform; None for one of max(32, 2 F).
        num_context: width of c.
        base: the design of the network of x.

    Raises:
        TypeError: a size that is no int; a layer that cannot be called; a base that is no design of parameters.
        ValueError: a size below 1; at set-up, a hidden layer of fewer units than features, or one feature for
            `affine_layer`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h[..., :1] * h[..., 1:], 0.3).to_event(1), obs=v)
        >>> guide = Amortized(model, encoder=ConditionalFlow(num_flows=4))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> _ = svi.step(torch.randn(10, 1))
        >>> guide.posterior(torch.ones(3, 1))["h"].sample(5).shape
        torch.Size([5, 3, 2])
    """

    num_flows: int = 2
    layer: Layer = affine_layer
    hidden: Sequence[int] | None = None
    num_context: int = 16
    base: EncoderDesign = field(default_factory=MLP)

    def __post_init__(self) -> None:
        check_count(self.num_flows, "num_flows")
        check_count(self.num_context, "num_context")
        if self.hidden is not None:
            object.__setattr__(self, "hidden", widths(self.hidden, "hidden"))
        if not callable(self.layer):
            raise TypeError(f"Expected a layer that can be called, but got {self.layer!r}. Pass affine_layer.")
        check_base(self.base)

    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> DensityEncoder:
        """See `DensityDesign.sized`."""
        if len(start) != 2 * num_outputs:
            raise ValueError(
                f"Expected a continuous latent for ConditionalFlow, but got {site!r} with discrete features. "
                "Use AutoregressiveBernoulli for binary units."
            )
        hidden = (max(32, 2 * num_outputs),) if self.hidden is None else tuple(self.hidden)
        if not hidden or min(hidden) < num_outputs:
            raise ValueError(
                f"Expected hidden layers of at least {num_outputs} units, one a feature of {site!r}, but got "
                f"{hidden}. Pass wider ones."
            )
        order = torch.arange(num_outputs)
        layers = [
            self.layer(order if number % 2 == 0 else order.flip(0), self.num_context, hidden)
            for number in range(self.num_flows)
        ]
        wanted = 2 * num_outputs + self.num_context
        base = self.base.sized(x, wanted, torch.cat([start, start.new_zeros(self.num_context)]), site)
        return FlowEncoder(base, layers, num_outputs).to(start)


class FlowEncoder(DensityEncoder):
    """The network of a `ConditionalFlow`, or of your own base and transforms.

    Args:
        base: from features ``(R, num_inputs)`` to means ``(R, F)``, log-scales ``(R, F)`` and context side by side.
        layers: conditional transforms of Pyro over F features, in the order in which draws pass them.
        num_features: F.
    """

    def __init__(self, base: nn.Module, layers: Sequence[ConditionalTransformModule], num_features: int) -> None:
        super().__init__()
        self.base, self.num_features = base, num_features
        self.layers = nn.ModuleList(cast("list[nn.Module]", list(layers)))

    def forward(self, x: Tensor) -> TorchDistributionMixin:
        """See `DensityEncoder.forward`."""
        size = self.num_features
        output = self.base(x)
        mean, scale, context = output[..., :size], output[..., size : 2 * size].exp(), output[..., 2 * size :]
        layers: Any = self.layers
        bends = [layer.condition(context) for layer in layers]
        # With a cache the density of a draw goes back to the very tensor that the last bend remembers.
        place = transforms.AffineTransform(mean, scale, event_dim=1, cache_size=1)
        noise = dist.Normal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(1)
        return dist.TransformedDistribution(noise, [*bends, place])


class _AffineLayer(transforms.ConditionalAffineAutoregressive):
    """Pyro's, with an inverse that keeps the dtype and looks at no tensor's value."""

    def __init__(self, network: ConditionalAutoRegressiveNN) -> None:
        super().__init__(network)
        self.order: list[int] = network.permutation.tolist()

    def condition(self, context: Tensor) -> Any:
        network: Any = partial(self.nn, context=context)
        return _Affine(network, self.order)


class _Affine(transforms.AffineAutoregressive):
    def __init__(self, network: Any, order: list[int]) -> None:
        super().__init__(network)
        self.order = order

    def _inverse(self, y: Tensor) -> Tensor:
        x = list(torch.zeros_like(y).unbind(-1))
        log_scale = y
        for feature in self.order:
            mean, log_scale = self.arn(torch.stack(x, -1))
            log_scale = self._limited(log_scale)
            x[feature] = (y[..., feature] - mean[..., feature]) * (-log_scale[..., feature]).exp()
        self._cached_log_scale = log_scale
        return torch.stack(x, -1)

    def _limited(self, log_scale: Tensor) -> Tensor:
        limited = log_scale.clamp(self.log_scale_min_clip, self.log_scale_max_clip)
        return log_scale + (limited - log_scale).detach()


def _masked(order: Tensor, num_context: int, hidden: Sequence[int], sizes: list[int]) -> ConditionalAutoRegressiveNN:
    """A masked network (Germain et al., 2015) whose outputs are 0 at the start."""
    return _still(
        ConditionalAutoRegressiveNN(
            len(order),
            num_context,
            list(hidden),
            sizes,
            permutation=cast("torch.LongTensor", order),
            nonlinearity=nn.Tanh(),
        )
    )


def _still(network: Any) -> Any:
    """The network with outputs of 0."""
    with torch.no_grad():
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.zero_()
    return network
