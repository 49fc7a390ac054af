"""Draws from q for any guide, ours or the user's own, beside log q of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_ext.posterior import Posterior
from pyro_ext.program import PARTICLE_PLATE, Program
from pyro_ext.rows import sample_sites

CHUNK_ELEMENTS = 2**22

Draws = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Values of each latent, led by the particles, and log q of each latent per row ``(S,) + rows.shape``."""


class _SameRows(Messenger):
    """Let the guide's plates take the rows that the program took."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.values = {n: s["value"] for n, s in program.trace.nodes.items() if isinstance(s.get("fn"), _Subsample)}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def posterior_of(guide: Callable[..., Any], program: Program) -> Posterior | None:
    """The guide's posterior for the rows of a program, or None for a user's own guide."""
    if not hasattr(guide, "posterior") or not hasattr(guide, "make_blocks"):
        return None
    return guide.posterior(*program.args, **program.kwargs)


def draw(guide: Callable[..., Any], posterior: Posterior | None, program: Program, num_particles: int) -> Draws:
    """Draw all latents ``num_particles`` times for each row of a program.

    Raises:
        ValueError: the guide's sites are not the model's latents.
    """
    if posterior is not None:
        values, log_q = posterior.sample_with_site_log_probs(num_particles)
        return {site.name: program.lead(values[site.name], site) for site in program.latents}, log_q
    with poutine.block(), _SameRows(program), pyro.plate(PARTICLE_PLATE, num_particles, dim=-program.rows.nesting - 1):
        trace = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
    trace.compute_log_prob()
    found = dict(sample_sites(trace))
    wanted = {site.name for site in program.latents}
    if set(found) != wanted:
        raise ValueError(
            f"Expected a guide over the model's latents {sorted(wanted)}, but got one over {sorted(found)}. "
            "Give every latent site of the model a site of the same name in the guide."
        )
    log_q = {
        name: (program.rows.sum_to_rows(site["log_prob"]) / program.rows.scale).expand(
            (num_particles,) + program.rows.shape
        )
        for name, site in found.items()
    }
    return {name: site["value"] for name, site in found.items()}, log_q


def chunks(program: Program, num_samples: int) -> Iterator[int]:
    """Split a number of samples so that the largest tensor of one chunk stays bounded."""
    widest = max(
        site["fn"].event_shape.numel() * max(1, site["fn"].batch_shape.numel() // max(1, program.rows.count))
        for _, site in sample_sites(program.trace)
    )
    size = max(1, CHUNK_ELEMENTS // max(1, program.rows.count * widest))
    done = 0
    while done < num_samples:
        yield min(size, num_samples - done)
        done += size


def refuse_continuous_points(
    guide: Callable[..., Any], posterior: Posterior | None, program: Program, what: str
) -> None:
    """Refuse a point mass on a continuous latent, whose L is minus infinity by entropy.

    Raises:
        ValueError: naming the site.
    """
    if posterior is not None:
        points = [b.site.name for b in posterior.blocks if b.factor.is_point and not b.site.kind.is_discrete]
    else:
        with poutine.block(), torch.random.fork_rng(devices=[]), torch.no_grad():
            trace = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
        latent = {s.name: s for s in program.latents}
        points = [
            n
            for n, s in sample_sites(trace)
            if isinstance(s["fn"], pyro.distributions.Delta) and n in latent and not latent[n].kind.is_discrete
        ]
    if points:
        raise ValueError(
            f"Expected factors with a density for {what}, but got a point mass on the continuous site {points[0]!r}, "
            "whose L is minus infinity by entropy. Report log p(h, v) for it, or use MeanField."
        )
