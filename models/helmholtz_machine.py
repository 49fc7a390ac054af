"""Helmholtz machine with Gaussian latent variables and a neural generative network."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ext.checks import check_count

from .base import Model
from .sigmoid_belief_network import smoothed_logit


class HelmholtzMachine(Model):
    r"""Binary data from Gaussian latent variables through a network f.

    .. math:: p(h) = N(h; 0, I), \qquad p(v | h) = \prod_i \mathrm{Bernoulli}(\sigma(f(h)_i))

    The recognition network is the guide's part (`Amortized`); learn both by wake-sleep (Dayan et al., 1995; section
    19.5.1) or by gradient.

    Sites: ``"h"``, shape (N, H); ``"v"``, 0 or 1, shape (N, D).

    Args:
        num_visible: number D of visible variables.
        num_latents: number H of latent variables.
        decoder: network f from (..., H) to logits (..., D); by default one hidden layer of tanh units.
        hidden: number of hidden units of the default decoder, 64 unless told; not with a `decoder` of your own.
        name: see `Model`.

    Raises:
        ValueError, TypeError: D, H or `hidden` is no positive int, `decoder` is no module, or both are given.

    Example:
        >>> model = HelmholtzMachine(num_visible=64, num_latents=8)
        >>> model.dream(3).shape
        torch.Size([3, 64])
    """

    visible_support = constraints.boolean

    def __init__(
        self,
        num_visible: int,
        num_latents: int,
        decoder: nn.Module | None = None,
        *,
        hidden: int | None = None,
        name: str | None = None,
    ) -> None:
        check_count(num_latents, "num_latents")
        if decoder is None:
            check_count(num_visible, "num_visible")
            width = 64 if hidden is None else hidden
            check_count(width, "hidden")
            decoder = nn.Sequential(nn.Linear(num_latents, width), nn.Tanh(), nn.Linear(width, num_visible))
        elif not isinstance(decoder, nn.Module):
            raise TypeError(
                f"Expected decoder to be a torch.nn.Module, but got {type(decoder).__name__}. Wrap it in one."
            )
        elif hidden is not None:
            raise ValueError(f"Expected hidden only without a decoder, but got hidden={hidden}. Pass one of the two.")
        super().__init__(num_visible, name=name)
        self.num_latents = num_latents
        self.decoder = decoder
        # A buffer, so that dreams follow the decoder's dtype and device.
        self.register_buffer("prior_loc", next(decoder.parameters(), torch.zeros(())).new_zeros(num_latents))

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Raises:
            ValueError: the decoder's output is not D wide; or see `data_plate`.
        """
        decoder = self.decoder
        with self.data_plate(v, size):
            h = pyro.sample("h", dist.Normal(self.prior_loc, 1).to_event(1))
            logits = decoder(h)
            if logits.shape[-1] != self.num_visible:
                raise ValueError(
                    f"Expected the decoder to return {self.num_visible} logits a row, but got shape "
                    f"{tuple(logits.shape)}. End it with that many outputs."
                )
            return pyro.sample("v", dist.Bernoulli(logits=logits).to_event(1), obs=v)

    @torch.no_grad()
    def initialize(self, v: Tensor) -> None:
        """Redraw the decoder by the `reset_parameters` of its parts, and set its last bias to the data's log odds.

        The bias is set where the decoder's last part is an `nn.Linear` with one; the log odds are those of
        (sum_n v_n + 1/2) / (N + 1).

        Raises:
            TypeError, ValueError: see `check_data`.
            RuntimeError: a part of the decoder has parameters but no `reset_parameters`; nothing has been changed then.
        """
        self.check_data(v)
        for reset in _resets(self.decoder):
            reset()
        last = list(self.decoder.modules())[-1]
        bias = getattr(last, "bias", None)
        if isinstance(last, nn.Linear) and isinstance(bias, Tensor) and last.out_features == self.num_visible:
            bias.copy_(smoothed_logit(v))


def _resets(module: nn.Module) -> list[Callable[[], object]]:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        return [reset]
    if any(True for _ in module.parameters(recurse=False)):
        raise RuntimeError(
            f"Expected every part of the decoder to know how to start anew, but got {type(module).__name__} without "
            "reset_parameters. Give it that method. Nothing was changed."
        )
    return [reset for child in module.children() for reset in _resets(child)]
