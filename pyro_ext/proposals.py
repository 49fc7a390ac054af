"""Where the particles of the wake phase come from, and with what density."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import is_identically_one
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.matching import check_density
from pyro_ext.particles import Run, drawn_sites, log_prob, plate_sites, scale_beside_rows
from pyro_ext.rows import Rows, sample_sites


@dataclass(frozen=True)
class Particles:
    """Particles of every row, scored.

    Attributes:
        rows: the rows of the program.
        log_joint: log p(v_n, h_nk), shape (K, *rows.shape), nats, with theta's gradient.
        log_guide: log q(h_nk | v_n), the same shape, with phi's gradient.
        log_proposal: log-density of what drew them, the same shape.
        model_trace: trace of the model at the particles.
    """

    rows: Rows
    log_joint: Tensor
    log_guide: Tensor
    log_proposal: Tensor
    model_trace: Trace


class Proposal(ABC):
    """What draws the particles h_nk of the wake phase."""

    @abstractmethod
    def draw(self, run: Run) -> Particles:
        """Draw and score the particles of one run."""


@dataclass(frozen=True)
class FromGuide(Proposal):
    """All particles come from the guide, h ~ q(h | v).

    Example:
        >>> FromGuide()
        FromGuide()
    """

    def draw(self, run: Run) -> Particles:
        """One run of the guide, and one of the model at what it drew."""
        guide_trace = run.guide()
        model_trace = run.model(drawn_sites(guide_trace))
        rows = run.rows(model_trace, guide_trace)
        run.validate(model_trace, guide_trace)
        log_guide = log_prob(guide_trace, rows)
        return Particles(rows, log_prob(model_trace, rows), log_guide, log_guide, model_trace)


@dataclass(frozen=True)
class Defensive(Proposal):
    """A share of the particles comes from the model's own prior (Le et al., 2020, section 3).

        h ~ (1 - share) q(h | v) + share p(h),    w = p(v, h) / [(1 - share) q(h | v) + share p(h)]

    A coin for each particle of each row says where all latents of the row come from; weights use the density of
    the mixture, so that they stay below p(v | h) / share however wrong q is. Wake-phi regresses log q on these
    particles: q hears of states that it would not have drawn itself.

    p(h) is the product of the model's latent sites as the program runs: a latent that the program draws after a
    visible value, and from it, is drawn so here too. This serves programs that have the same sites whatever is
    drawn, continuous or discrete, under any plates and masks. A step runs each program twice.

    Args:
        share: probability of the prior, between 0 and 1, both excluded; 0.2 in the paper.

    Raises:
        ValueError: share out of range; at the call, a guide with auxiliary or Delta sites, which give a draw of the
            prior no density; sites that come and go with the draws; or a latent site whose log-probability is
            scaled (a subsampled plate inside a row, `poutine.scale`): its power is no density to mix.

    Example:
        >>> from pyro_ext.wake_sleep import WakeSleep
        >>> WakeSleep(num_particles=10, insomnia=1.0, proposal=Defensive(0.2)).proposal
        Defensive(share=0.2)
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not number or not 0 < self.share < 1:
            raise ValueError(
                f"Expected a share above 0 and below 1, but got {self.share!r}. Pass 0.2, or FromGuide() for none."
            )

    def draw(self, run: Run) -> Particles:
        """Two draws of each latent, one of them chosen by a coin a row and particle, and both programs there."""
        with torch.no_grad():
            proposed = run.guide()
            prior = run.model(plate_sites(proposed))
            check_density(proposed, "a Defensive proposal")
            if _latent_shapes(prior) != _latent_shapes(proposed):
                # Either the guide does not fit the model at all, which this tells, or its sites depend on the draws.
                run.rows(run.model(drawn_sites(proposed)), proposed)
                raise _changing_sites(proposed, prior)
            rows = run.rows(prior, proposed)
            _check_unscaled(prior, rows)
            _check_unscaled(proposed, rows)
            mixed = self._mix(run, rows, proposed, prior)
        guide_trace = run.guide(mixed)
        model_trace = run.model(drawn_sites(guide_trace))
        if _latent_shapes(guide_trace) != _latent_shapes(prior):
            raise _changing_sites(guide_trace, prior)
        run.rows(model_trace, guide_trace)
        run.validate(model_trace, guide_trace)
        log_latent = log_prob(model_trace, rows, observed=False)
        log_guide = log_prob(guide_trace, rows)
        log_proposal = torch.logaddexp(
            math.log1p(-self.share) + log_guide.detach(), math.log(self.share) + log_latent.detach()
        )
        log_joint = log_latent + log_prob(model_trace, rows, observed=True)
        return Particles(rows, log_joint, log_guide, log_proposal, model_trace)

    def _mix(self, run: Run, rows: Rows, proposed: Trace, prior: Trace) -> dict[str, Any]:
        """The guide's sites with each value from the guide or from the prior."""
        mixed, others = drawn_sites(proposed), drawn_sites(prior)
        coin: Tensor | None = None
        for name in _latent_shapes(proposed):
            site, other = mixed[name], others[name]["value"]
            if coin is None:
                coin = torch.rand(_coin_shape(run, rows), device=other.device) < self.share
            chosen = coin.reshape(coin.shape + (1,) * site["fn"].event_dim)
            mixed[name] = {**site, "value": torch.where(chosen, other, site["value"])}
        return mixed


def _coin_shape(run: Run, rows: Rows) -> torch.Size:
    """One coin a row and particle, at the dimensions where plates put them."""
    shape = [1] * rows.nesting
    for dim, size in zip(rows.dims, rows.shape, strict=True):
        shape[dim] = size
    if run.num_vectorized is not None:
        outer = int(run.max_plate_nesting) - 1 - rows.nesting
        shape = [run.num_vectorized] + [1] * outer + shape
    return torch.Size(shape)


def _check_unscaled(trace: Trace, rows: Rows) -> None:
    for name, site in sample_sites(trace):
        if not site["is_observed"] and not is_identically_one(scale_beside_rows(site, rows.scale)):
            raise ValueError(
                f"Expected latents with a density for a Defensive proposal, but got the scaled site {name!r}. "
                "Use all elements of the plates inside a row and no poutine.scale, or FromGuide()."
            )


def _latent_shapes(trace: Trace) -> dict[str, torch.Size]:
    return {name: site["value"].shape for name, site in sample_sites(trace) if not site["is_observed"]}


def _changing_sites(first: Trace, second: Trace) -> ValueError:
    names = sorted(_latent_shapes(first).keys() ^ _latent_shapes(second).keys())
    return ValueError(
        "Expected a program with the same latent sites and shapes at each run for a Defensive proposal, but got one "
        f"that changes{f' in {names}' if names else ''}. Use FromGuide()."
    )
