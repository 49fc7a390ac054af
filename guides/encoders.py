"""Encoder networks: from what a factor reads to the factor's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def default_hidden(num_inputs: int, num_outputs: int) -> int:
    """Width of a default encoder's hidden layer: between input and output, from 32 to 512.

    Example:
        >>> default_hidden(64, 20), default_hidden(4, 2), default_hidden(5000, 100)
        (84, 32, 512)
    """
    return max(32, min(512, num_inputs + num_outputs))


class DefaultEncoder(nn.Module):
    """One hidden tanh layer beside a linear path, sized from the trace.

    parameters(x) = A x + B tanh(C x + d) + e, with A = B = 0 at the start, so that q starts at e for every datum.

    Args:
        num_inputs: number of features read.
        num_outputs: number of parameters of the factor.
        start: the parameters' start ``(num_outputs,)`` (from the prior), used as the initial bias e.
        data: features ``(R, num_inputs)`` that tell the inputs' mean and scale; inputs are standardised by them.

    Example:
        >>> DefaultEncoder(4, 2, torch.zeros(2))(torch.randn(7, 4)).shape
        torch.Size([7, 2])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int, num_outputs: int, start: Tensor, data: Tensor | None = None) -> None:
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
        hidden = default_hidden(num_inputs, num_outputs)
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.hidden = nn.Linear(num_inputs, hidden)
        self.output = nn.Linear(hidden, num_outputs, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(start)
            self.output.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Parameters ``(..., num_outputs)`` from features ``(..., num_inputs)``."""
        x = (x - self.mean) / self.scale
        return self.linear(x) + self.output(torch.tanh(self.hidden(x)))


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
