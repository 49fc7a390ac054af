"""Joint factors for encoders: full covariances, tables of states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pyro_ext.continuous_factors import MultivariateNormalFactor
from pyro_ext.discrete_factors import JointFactor
from pyro_ext.factors import Factor
from pyro_ext.guides.density_encoders import DensityDesign, DensityEncoder
from pyro_ext.guides.encoders import DefaultEncoder, EncoderDesign, PointEncoder
from pyro_ext.guides.mean_field import mean_field_factor
from pyro_ext.sites import Site
from pyro_ext.states import num_states

MAX_STATES = 2**12
"""Most outputs of a network for a table of states."""


@dataclass(frozen=True)
class Joint(EncoderDesign):
    """An encoder whose factor couples all features of its latent: nothing in q is independent within the site.

    A continuous latent of F features gets a Gaussian with full covariance: the network puts out F means, then the
    lower triangle of the Cholesky factor row by row, with the logarithm of its diagonal, F + F (F + 1) / 2 numbers. A
    discrete one gets a logit for each of its joint states. Moments, entropy and divergence stay in closed form, so that
    L is exact wherever an evaluator serves the program.

    Args:
        network: a network of your own, the design of one, or None for `DefaultEncoder`.

    Raises:
        TypeError: a network that puts out something else than parameters.
        ValueError: at set-up, a discrete latent of more than 4,096 joint states.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)
        >>> guide = Amortized(model, encoder=Joint())
        >>> guide.posterior(torch.ones(3, 1))["h"].gram().shape
        torch.Size([2, 2])
    """

    network: nn.Module | EncoderDesign | None = None

    def __post_init__(self) -> None:
        given = self.network
        outputs = isinstance(given, PointEncoder | DensityEncoder | DensityDesign | Joint)
        if outputs or not (given is None or isinstance(given, nn.Module | EncoderDesign)):
            raise TypeError(
                f"Expected a network of parameters, its design, or None in Joint, but got {type(given).__name__}. "
                "Pass an nn.Module or MLP(), for example."
            )

    def sized(self, x: Tensor, num_outputs: int, start: Tensor, site: str) -> nn.Module:
        """See `EncoderDesign.sized`."""
        if isinstance(self.network, EncoderDesign):
            return self.network.sized(x, num_outputs, start, site)
        if self.network is None:
            return DefaultEncoder(x.shape[-1], num_outputs, start, data=x).to(start)
        return self.network


def joint_factor(site: Site) -> Factor:
    """The factor that couples all features of a site; that of a Markov chain does already.

    Raises:
        ValueError: a discrete site of too many joint states.
    """
    if site.is_chain:
        return mean_field_factor(site)
    if not site.kind.is_discrete:
        return MultivariateNormalFactor(site.num_features)
    units = [site.unit_size] * (site.num_features // site.unit_size)
    if len(units) > 64 or num_states(units) > MAX_STATES:
        raise ValueError(
            f"Expected at most {MAX_STATES} joint states for a Joint encoder, but got {len(units)} units at "
            f"{site.name!r}. Use AutoregressiveBernoulli."
        )
    return JointFactor(units)
