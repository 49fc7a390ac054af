"""q as a Gaussian around MAP points: a bound again (19.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.continuous_factors import NormalFactor
from pyro_ext.draws import posterior_of
from pyro_ext.guides.base import FactorGuide
from pyro_ext.point_factor import LOG_OF_ZERO
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site

Scale = float | Mapping[str, float | Tensor]


class Noisy(FactorGuide):
    r"""q(h | v) = N(mu, scale^2) around the points mu of another guide (19.3).

    L of a point on a continuous latent is minus infinity, by its entropy. "Adding noise to mu would make the bound
    meaningful again": with a spread L is a bound on log p(v), and minus infinity only in the limit scale -> 0. Latents
    with another support are spread on the real line, and mapped by Pyro's bijection: a positive latent is log-normal
    around its point.

    It has no parameters of its own: `scale` is held, and data, tables and networks are those of the guide that is
    wrapped. Where an optimizer trains it, the points move.

    Args:
        guide: a guide whose factors are points on continuous latents: `Dirac`, or `Amortized` with `PointEncoder`s.
        scale: standard deviations on the real line, in units of the latent (of its logarithm, where it is positive): a
            number, or for each site a number or a tensor that broadcasts to its event.
        name: name of the guide.

    Raises:
        TypeError: guide is none of this project, or its factors are no points; a scale of another type.
        ValueError: a scale that is not positive and finite; at the first call, a scale that names other sites than the
            latents or has another shape, and discrete points; at any call, points at the end of their support, such as
            the exact zeros of a positive sparse code, which have no Normal around their logarithm.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext import EM, Maximize, elbo_terms
        >>> from pyro_ext.guides import Dirac
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> v = torch.tensor([0.0, 2.0])
        >>> guide = Dirac(model)
        >>> _ = EM(model, guide, e_step=Maximize(), m_step=None).step(v)
        >>> elbo_terms(model, Noisy(guide, 0.5 ** 0.5), v).bound  # log p(v), for this is the posterior
        tensor([-1.2655, -2.2655])
    """

    def __init__(self, guide: FactorGuide, scale: Scale, *, name: str | None = None) -> None:
        if not isinstance(guide, FactorGuide):
            raise TypeError(
                f"Expected a guide of pyro_ext.guides for Noisy, but got {type(guide).__name__}. Pass Dirac(model)."
            )
        if guide.is_table and not guide.is_point:
            raise TypeError(
                f"Expected a guide of points for Noisy, but got {type(guide).__name__}. Its factors have a spread of "
                "their own, and L is a bound already."
            )
        self._check_scale(scale)
        super().__init__(guide.model, name=name)
        # A submodule, but not by the ways of PyroModule, which would rename it, and with it its parameters.
        self._modules["points"] = guide
        self._sets_up_points = False
        self.scale = dict(scale) if isinstance(scale, Mapping) else float(scale)

    @staticmethod
    def _check_scale(scale: Any) -> None:
        entries = scale.values() if isinstance(scale, Mapping) else (scale,)
        for entry in entries:
            is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
            if not is_number and not (isinstance(entry, Tensor) and isinstance(scale, Mapping)):
                raise TypeError(
                    f"Expected scale to be a number, or a mapping from sites to numbers or tensors, but got {entry!r}. "
                    'Write 0.1, or {"h": 0.1}.'
                )
            value = torch.as_tensor(entry)
            if not bool(((value > 0) & (value < math.inf)).all()):
                raise ValueError(
                    f"Expected a scale that is positive and finite, but got {entry!r}. A spread of 0 has no bound."
                )

    @property
    def guide(self) -> FactorGuide:
        """The guide whose points these are."""
        return cast("FactorGuide", self._modules["points"])

    @property
    def is_static(self) -> bool:
        """Whether no point depends on the value of another latent."""
        return self.guide.is_static

    # ------------------------------------------------------------------ set-up

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """A Gaussian block for every point."""
        if not self.guide.is_set_up:
            self._sets_up_points = True
            self.guide.setup(*program.args, **program.kwargs)
        blocks = tuple(_spread(block) for block in self.guide.make_blocks(program))
        if not self.is_set_up:
            self._check_sites({block.site.name: block.site for block in blocks})
        return blocks

    def _check_sites(self, sites: Mapping[str, Site]) -> None:
        if not isinstance(self.scale, dict):
            return
        if set(self.scale) != set(sites):
            raise ValueError(
                f"Expected a scale for each of the latents {sorted(sites)}, but got {sorted(self.scale)}. Name every "
                "latent, or pass a number."
            )
        for name, site in sites.items():
            try:
                torch.as_tensor(self.scale[name]).expand(site.real_shape)
            except RuntimeError as error:
                raise ValueError(
                    f"Expected a scale of {name!r} that broadcasts to {tuple(site.real_shape)}, but got shape "
                    f"{tuple(torch.as_tensor(self.scale[name]).shape)}. Pass one number per entry of a value."
                ) from error

    def order_of_sites(self, program: Program) -> tuple[Site, ...]:
        return self.guide.order

    def undo_setup(self) -> None:
        super().undo_setup()
        if self._sets_up_points:
            self._sets_up_points = False
            self.guide.undo_setup()

    # ------------------------------------------------------------------ calls

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guide.check_call(args, kwargs)

    def plates_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.guide.plates_of(args, kwargs)
        self.plates = self.guide.plates
        return call

    def block_parameters(self, block: Block, values: Mapping[str, Tensor], call: Any) -> Tensor:
        points = next(b for b in self.guide.blocks if b.name == block.name)
        with self.guide._pyro_context:
            return self._with_scale(block, self.guide.block_parameters(points, values, call))

    def _with_scale(self, block: Block, points: Tensor) -> Tensor:
        """A Normal's parameters ``(..., 2 F)`` from points ``(..., F)``."""
        site = block.site
        at_end = (points <= LOG_OF_ZERO) | points.isinf()
        if site.kind is Kind.CONSTRAINED and bool(at_end.any()):
            raise ValueError(
                f"Expected points of {site.name!r} inside its support, {site.fn.support}, but got {int(at_end.sum())} "
                f"of {at_end.numel()} at its end, where there is no Normal around them on the real line. Take a latent "
                "on the whole line (a Laplace prior), or a family that keeps off 0, such as MeanField."
            )
        scale = self.scale[site.name] if isinstance(self.scale, dict) else self.scale
        log_scale = torch.as_tensor(scale).to(points).expand(site.real_shape).reshape(-1).log()
        return torch.cat([points, log_scale.expand_as(points)], -1)

    def rows_parameters(self, program: Program, *, detach: bool = True) -> dict[str, Tensor]:
        """Parameters of each block for the rows of a program, ``(R, M, 2 F)``.

        Raises:
            ValueError: data that the table of points has no rows for.
        """
        self.guide.check_call(program.args, program.kwargs)
        inner: Any = self.guide
        found = inner.rows_parameters(program, detach=detach)
        return {block.name: self._with_scale(block, found[block.name]) for block in self.blocks}

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v): the guide's own answer for these data, with its spread."""
        self.check_data(args, kwargs)
        self.setup(*args, **kwargs)
        return self._with_spread(self.guide.posterior(*args, **kwargs))

    def posterior_at(self, program: Program) -> Posterior:
        """q(h | v) for the rows of a program that was traced already."""
        inner = posterior_of(self.guide, program)
        if inner is None:
            raise RuntimeError("Expected a guide with a posterior, but got one without. Wrap Dirac or Amortized.")
        return self._with_spread(inner)

    def _with_spread(self, points: Posterior) -> Posterior:
        inner = {block.name: block for block in points.blocks}
        blocks = tuple(map(_spread, points.blocks))

        def conditioner(block: Block, values: Mapping[str, Tensor]) -> Tensor:
            return self._with_scale(block, points.conditioner(inner[block.name], values)).detach()

        if not points.static:
            return Posterior(points.rows, points.sites, blocks, conditioner, static=False)
        held = {block.name: conditioner(block, {}) for block in blocks}
        return Posterior(points.rows, points.sites, blocks, lambda block, _: held[block.name])


def _spread(block: Block) -> Block:
    """The Gaussian block around a point.

    Raises:
        TypeError: the factor is no point.
        ValueError: it is a discrete one.
    """
    if not block.factor.is_point:
        raise TypeError(
            f"Expected points for Noisy, but got a {type(block.factor).__name__} for {block.name!r}. Pass an encoder "
            "of values (PointEncoder) for every latent."
        )
    if block.site.kind.is_discrete:
        raise ValueError(
            f"Expected continuous points for Noisy, but got the {block.site.kind.value} site {block.site.name!r}. L of "
            "a discrete point is a bound as it is: use the guide itself."
        )
    return replace(block, factor=NormalFactor(block.factor.size))
