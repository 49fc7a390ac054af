"""Encoder networks: from what a factor reads to the factor's parameters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_ext.checks import check_count

Activation = nn.Module | Callable[[], nn.Module]
"""A module, of which every layer gets a copy, or what makes one when called, such as the class."""


def default_hidden(num_inputs: int, num_outputs: int) -> int:
    """Width of a default encoder's hidden layer: between input and output, from 32 to 512.

    Example:
        >>> default_hidden(64, 20), default_hidden(4, 2), default_hidden(5000, 100)
        (84, 32, 512)
    """
    return max(32, min(512, num_inputs + num_outputs))


class Standardised(nn.Module):
    """What encoders share: the input's mean and scale, z = (x - mean) / scale.

    Args:
        num_inputs: number of features read.
        data: features ``(..., num_inputs)`` that tell mean and scale; None for 0 and 1.

    Attributes:
        mean: of each input, ``(num_inputs,)``.
        scale: root of the mean variance, the same for all inputs, ``(num_inputs,)``; 1 where the data do not vary.

    Example:
        >>> Standardised(2, torch.tensor([[1.0, 5.0], [3.0, 5.0]])).standardise(torch.tensor([[3.0, 5.0]]))
        tensor([[1.4142, 0.0000]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int, data: Tensor | None = None) -> None:
        super().__init__()
        mean, scale = torch.zeros(num_inputs), torch.ones(num_inputs)
        if data is not None and data.numel():
            flat = data.detach().reshape(-1, num_inputs)
            mean = flat.mean(0)
            # One scale for all inputs: a pixel that hardly varies must not be blown up.
            spread = (flat - mean).square().mean().sqrt()
            # Data that do not vary (a single row, say) tell no scale: later inputs must not be blown up either.
            varies = spread > 1e-6 * flat.abs().max()
            scale = torch.where(varies, spread, torch.ones_like(spread)).expand(num_inputs).clone()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def standardise(self, x: Tensor) -> Tensor:
        """z ``(..., num_inputs)`` of features ``(..., num_inputs)``."""
        return (x - self.mean) / self.scale


class DefaultEncoder(Standardised):
    """One hidden tanh layer beside a linear path, sized from the trace.

    parameters(x) = A z + B tanh(C z + d) + e, z = (x - mean) / scale, with A = B = 0 at the start, so that q starts
    at e for every datum.

    Args:
        num_inputs: number of features read.
        num_outputs: number of parameters of the factor.
        start: the parameters' start ``(num_outputs,)`` (from the prior), used as the initial bias e.
        data: features ``(R, num_inputs)`` that tell the inputs' mean and scale; inputs are standardised by them.

    Example:
        >>> DefaultEncoder(4, 2, torch.zeros(2))(torch.randn(7, 4)).shape
        torch.Size([7, 2])
    """

    def __init__(self, num_inputs: int, num_outputs: int, start: Tensor, data: Tensor | None = None) -> None:
        super().__init__(num_inputs, data)
        hidden = default_hidden(num_inputs, num_outputs)
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.hidden = nn.Linear(num_inputs, hidden)
        self.output = nn.Linear(hidden, num_outputs, bias=False)
        start_at(self.output, start=None)
        start_at(self.linear, start)

    def forward(self, x: Tensor) -> Tensor:
        """Parameters ``(..., num_outputs)`` from features ``(..., num_inputs)``."""
        z = self.standardise(x)
        return self.linear(z) + self.output(torch.tanh(self.hidden(z)))


def start_at(layer: nn.Linear, start: Tensor | None) -> None:
    """Give a layer weights of 0 and, unless None, the bias ``start`` ``(num_outputs,)``."""
    with torch.no_grad():
        layer.weight.zero_()
        if start is not None:
            layer.bias.copy_(start)


class Network(Standardised):
    """Layers of any kind, read linearly, beside a linear path: what a design makes.

    parameters(x) = A z + B g(z) + e, z = (x - mean) / scale, with A = B = 0 at the start, so that q starts at e.

    Args:
        layers: g, from z ``(R, num_inputs)`` to ``(R, width)``; None for A z + e alone.
        width: number of outputs of the layers.
        num_outputs: number of parameters of the factor.
        start: e ``(num_outputs,)``.
        data: features ``(R, num_inputs)`` that tell mean and scale.
        linear_path: whether there is an A.
    """

    def __init__(
        self,
        layers: nn.Module | None,
        width: int,
        num_outputs: int,
        start: Tensor,
        data: Tensor,
        *,
        linear_path: bool,
    ) -> None:
        super().__init__(data.shape[-1], data)
        self.layers = layers
        self.linear = nn.Linear(data.shape[-1], num_outputs) if linear_path or layers is None else None
        self.output = None if layers is None else nn.Linear(width, num_outputs, bias=self.linear is None)
        if self.linear is not None:
            start_at(self.linear, start)
        if self.output is not None:
            start_at(self.output, start if self.linear is None else None)

    def forward(self, x: Tensor) -> Tensor:
        """Parameters ``(R, num_outputs)`` from features ``(R, num_inputs)``."""
        z = self.standardise(x)
        terms: list[Tensor] = []
        if self.linear is not None:
            terms.append(self.linear(z))
        if self.layers is not None and self.output is not None:
            terms.append(self.output(self.layers(z)))
        return sum(terms[1:], terms[0])


class EncoderDesign(ABC):
    """How an encoder is built, once the sizes are known.

    `Amortized` calls `sized` when it is set up, once for each latent that it serves, so that nobody has to count a
    factor's parameters. A design holds no parameters and may serve several guides.

    Example:
        >>> class Linear(EncoderDesign):
        ...     def sized(self, x, num_outputs, start, site):
        ...         return nn.Linear(x.shape[-1], num_outputs)
        >>> Linear().sized(torch.randn(5, 3), 2, torch.zeros(2), "h")
        Linear(in_features=3, out_features=2, bias=True)
    """

    @abstractmethod
    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> nn.Module:
        """A new network from features ``(R, num_inputs)`` to parameters ``(R, num_outputs)``.

        Args:
            x: features of the rows at set-up ``(R, num_inputs)``.
            num_outputs: number of parameters of the factor.
            start: the parameters' start ``(num_outputs,)``, from the prior; its dtype and device are the network's.
            site: name of the latent, for errors.

        Raises:
            ValueError: the design does not fit the features.
        """


@dataclass(frozen=True)
class MLP(EncoderDesign):
    r"""A multilayer perceptron as an encoder.

    .. math:: parameters(x) = A z + B g_L(\ldots g_1(z)) + e, \quad g_l(u) = activation(C_l u + d_l)

    z is x less its mean over the rows at set-up, divided by one scale for all inputs. A = B = 0 at the start, so
    that q starts at the prior's parameters e for every datum.

    Args:
        hidden: widths of the hidden layers; none for A z + e alone.
        activation: a module class such as ``nn.Softplus``, anything that makes a module when called without
            arguments, or a module, of which each layer gets a copy.
        linear_path: whether there is an A.

    Raises:
        TypeError: a width that is no int; an activation that is and makes no nn.Module.
        ValueError: a width below 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)
        >>> guide = Amortized(model, encoder=MLP(hidden=(16, 16), activation=nn.Softplus))
        >>> guide.posterior(torch.randn(10, 1))["h"].mean.shape
        torch.Size([10, 2])
    """

    hidden: Sequence[int] = (64,)
    activation: Activation = nn.Tanh
    linear_path: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", widths(self.hidden, "hidden"))
        make_activation(self.activation)

    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> nn.Module:
        """See `EncoderDesign.sized`."""
        layers = dense((x.shape[-1], *self.hidden), self.activation)
        body = nn.Sequential(*layers) if layers else None
        width = self.hidden[-1] if self.hidden else 0
        return Network(body, width, num_outputs, start, x, linear_path=self.linear_path).to(start)


def dense(sizes: Sequence[int], activation: Activation) -> list[nn.Module]:
    """Linear layers between widths, each with its activation."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), make_activation(activation)]
    return layers


def widths(given: Sequence[int], name: str) -> tuple[int, ...]:
    """A sequence of layer sizes, checked.

    Raises:
        TypeError: no sequence, or a size that is no int.
        ValueError: a size below 1.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(
            f"Expected {name} to be a sequence of ints, but got {given!r} of type {type(given).__name__}. Pass (64,)."
        )
    for number, size in enumerate(given):
        check_count(size, f"{name}[{number}]")
    return tuple(int(size) for size in given)


def make_activation(activation: Activation) -> nn.Module:
    """A new activation for one layer.

    Raises:
        TypeError: what is given neither is nor makes an nn.Module.
    """
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    try:
        made = activation()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"Expected an activation that is or makes an nn.Module, but got {activation!r}. Pass a class such as "
            "nn.Tanh, not a function of torch."
        )
    return made


class PointEncoder(nn.Module):
    """An encoder whose outputs are values of the latent, not parameters of a distribution (19.5.2).

    `Amortized` makes the factor of its latent a point, q(h | v) = delta(h - f(v)): a network that predicts the MAP
    point which `Dirac` finds by optimisation (19.3). Subclass it, and write ``forward`` from features
    ``(R, num_inputs)`` to values ``(R, M * E)``: M elements of the inner plates, E numbers of one value of the site.
    Values keep to the support of the site: for a positive one they are at least 0, and 0 itself is kept.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([1]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)
        >>> class Half(PointEncoder):
        ...     def forward(self, v):
        ...         return v / 2
        >>> Amortized(model, encoder=Half()).posterior(torch.tensor([[3.0]]))["h"].mean
        tensor([[1.5000]])
    """
