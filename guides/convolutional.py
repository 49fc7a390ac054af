"""A convolutional encoder for images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pyro_ext.checks import check_count
from pyro_ext.guides.encoders import Activation, EncoderDesign, Network, dense, make_activation, widths


@dataclass(frozen=True)
class Convolutional(EncoderDesign):
    r"""Convolutions that halve the image, then dense layers: an encoder of images.

    .. math:: parameters(x) = A z + B g(z) + e

    z is x less its mean over the rows at set-up, divided by one scale for all pixels; g is a convolution of step 2 and
    an activation for each of `channels`, all flattened, then a dense layer for each of `hidden`. A = B = 0 at the
    start, so that q starts at the prior's parameters e for every datum. The guide reads images of any layout flat,
    in the order of their axes, ``(R, C * H * W)``.

    Args:
        image_shape: channels, height and width of one row.
        channels: of each convolution.
        kernel_size: side of the kernels; padding is half of it.
        hidden: widths of the dense layers after the convolutions.
        activation: as in `MLP`.
        linear_path: whether there is an A, from every pixel to every parameter.

    Raises:
        TypeError: a size that is no int; an activation that is and makes no nn.Module.
        ValueError: a size below 1; an image_shape that is not of three sizes; no channels. At set-up: images of another
            size.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import Amortized
        >>> def model(images):
        ...     with pyro.plate("data", len(images)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         mean = h.sum(-1)[:, None, None, None].expand(-1, 1, 8, 8)
        ...         pyro.sample("v", dist.Normal(mean, 1.0).to_event(3), obs=images)
        >>> guide = Amortized(model, encoder=Convolutional(image_shape=(1, 8, 8), channels=(4, 8)))
        >>> guide.posterior(torch.randn(10, 1, 8, 8))["h"].mean.shape
        torch.Size([10, 2])
    """

    image_shape: Sequence[int]
    channels: Sequence[int] = (16, 32)
    kernel_size: int = 3
    hidden: Sequence[int] = ()
    activation: Activation = nn.ReLU
    linear_path: bool = True

    def __post_init__(self) -> None:
        for name in ("image_shape", "channels", "hidden"):
            object.__setattr__(self, name, widths(getattr(self, name), name))
        if len(self.image_shape) != 3:
            raise ValueError(
                f"Expected image_shape of channels, height and width, but got {self.image_shape}. Pass (1, 28, 28) "
                "for grey images."
            )
        if not self.channels:
            raise ValueError("Expected at least one convolution, but got channels=(). Use MLP without convolutions.")
        check_count(self.kernel_size, "kernel_size")
        make_activation(self.activation)

    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> nn.Module:
        """See `EncoderDesign.sized`.

        Raises:
            ValueError: the features are no images of `image_shape`.
        """
        count = math.prod(self.image_shape)
        if x.shape[-1] != count:
            raise ValueError(
                f"Expected images of shape {self.image_shape}, {count} numbers, for the encoder of {site!r}, but got "
                f"{x.shape[-1]} features a row. Pass their own image_shape, or MLP for what is no image."
            )
        layers: list[nn.Module] = [nn.Unflatten(-1, cast(torch.Size, self.image_shape))]
        before, *size = self.image_shape
        for after in self.channels:
            layers += [
                nn.Conv2d(before, after, self.kernel_size, stride=2, padding=self.kernel_size // 2),
                make_activation(self.activation),
            ]
            size = [(side + 2 * (self.kernel_size // 2) - self.kernel_size) // 2 + 1 for side in size]
            before = after
        sizes = (before * math.prod(size), *self.hidden)
        layers += [nn.Flatten(-3), *dense(sizes, self.activation)]
        return Network(nn.Sequential(*layers), sizes[-1], num_outputs, start, x, linear_path=self.linear_path).to(start)
