"""q as a point mass: MAP inference (19.3)."""

from __future__ import annotations

from pyro_ext.blocks import Block
from pyro_ext.guides.tables import TableGuide
from pyro_ext.point_factor import DeltaFactor
from pyro_ext.program import Program


class Dirac(TableGuide):
    """q(h | v) = delta(h - mu), a point per datum (19.12-19.13).

    Continuous points are moved by `Maximize` to the maximum of log p(h, v), or by gradients, and live in the
    constrained space; discrete points have no gradient and are moved by `FixedPoint` (coordinate-wise MAP).
    L of a discrete point is log p(h, v), a valid bound; a continuous point has no bound (its entropy is minus
    infinity), and what is reported is log p(h, v). `Noisy` puts a narrow Normal in its place, which has a bound.

    Args:
        model: any Pyro model.
        name: name of the guide's parameters.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> Dirac(model).posterior(torch.zeros(2))["h"].mean.shape
        torch.Size([2])
    """

    @property
    def is_point(self) -> bool:
        return True

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """One point per site."""
        return tuple(
            Block(
                site.name,
                ((site, tuple(range(site.num_features))),),
                DeltaFactor(site.num_features, site.unit_size, discrete=site.kind.is_discrete),
            )
            for site in program.latents
        )
