"""Draws from q for any guide, ours or the user's own, beside log q of each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import PARTICLE_PLATE, Program
from pyro_ext.rows import sample_sites
from pyro_ext.sandbox import refusal

CHUNK_ELEMENTS = 2**22

Draws = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Values of each latent, led by the particles, and log q of each site per row ``(S,) + rows.shape``."""


class _SameRows(Messenger):
    """Let the guide's plates take the rows that the program took."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.values = {n: s["value"] for n, s in program.trace.nodes.items() if isinstance(s.get("fn"), _Subsample)}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


@contextmanager
def unchanged_if_refused(guide: Any) -> Generator[None]:
    """Leave no parameters and no set-up guide behind when what happens in here is refused."""
    was_set_up = getattr(guide, "is_set_up", True)
    try:
        with refusal():
            yield
    except Exception:
        if not was_set_up:
            guide.undo_setup()
        raise


def posterior_of(guide: Callable[..., Any], program: Program) -> Posterior | None:
    """The guide's posterior for the rows of a program, or None for a user's own guide.

    Raises:
        TypeError: the guide cannot be called.
        ValueError: the guide's sites are not the model's latents, or a table guide cannot infer these data.
    """
    if not callable(guide):
        raise TypeError(f"Expected a guide that can be called, but got {type(guide).__name__}. Pass a Pyro guide.")
    if not hasattr(guide, "posterior") or not hasattr(guide, "make_blocks"):
        return None
    ours: Any = guide
    ours.setup(*program.args, **program.kwargs)
    _check_sites({site.name for site in ours.order}, program)
    if not ours.is_table:
        return ours.posterior_at(program)
    if not ours.owns(program.args, program.kwargs):
        return ours.posterior(*program.args, **program.kwargs)
    # The whole table, which `guide.posterior` gives, has other rows than a program that draws its own.
    layout = Layout(program.rows, program.latents)
    rows, blocks = ours.rows_parameters(program), ours.make_blocks(program)
    params = {b.name: layout.from_rows(rows[b.name], b.site) for b in blocks}
    return Posterior.from_parameters(program.rows, program.latents, blocks, params)


def draw(guide: Callable[..., Any], posterior: Posterior | None, program: Program, num_particles: int) -> Draws:
    """Draw all latents ``num_particles`` times for each row of a program.

    Auxiliary sites of a guide (Pyro's autoguides draw unconstrained values there, and hand them on as
    Deltas) keep a log q of their own beside those of the latents.

    Raises:
        ValueError: the guide's sites are not the model's latents, or stand outside the rows.
    """
    if posterior is not None:
        values, log_q = posterior.sample_with_site_log_probs(num_particles)
        return {site.name: program.lead(values[site.name], site) for site in program.latents}, log_q
    rows = program.rows
    with poutine.block(), _SameRows(program), pyro.plate(PARTICLE_PLATE, num_particles, dim=-rows.nesting - 1):
        trace = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
    trace.compute_log_prob()
    found = dict(sample_sites(trace))
    _check_sites({name for name, site in found.items() if not _is_auxiliary(site)}, program)
    log_q: dict[str, Tensor] = {}
    for name, site in found.items():
        missing = set(rows.names) - {frame.name for frame in site["cond_indep_stack"]}
        if missing:
            raise ValueError(
                f"Expected the guide's sites inside the plates of the rows, {list(rows.names)}, but got {name!r} "
                f"outside of {sorted(missing)}. Draw it inside these plates, so that each row has a log q."
            )
        log_q[name] = (rows.sum_to_rows(site["log_prob"]) / rows.scale).expand((num_particles,) + rows.shape)
    return {site.name: found[site.name]["value"] for site in program.latents}, log_q


def _check_sites(found: set[str], program: Program) -> None:
    wanted = {site.name for site in program.latents}
    if found != wanted:
        raise ValueError(
            f"Expected a guide over the model's latents {sorted(wanted)}, but got one over {sorted(found)}. "
            "Give every latent site of the model a site of the same name in the guide."
        )


def _is_auxiliary(site: Any) -> bool:
    return bool(site["infer"].get("is_auxiliary"))


def row_width(program: Program) -> int:
    """Largest number of elements that one site takes in a row."""
    return max(
        site["fn"].event_shape.numel() * max(1, site["fn"].batch_shape.numel() // max(1, program.rows.count))
        for _, site in sample_sites(program.trace)
    )


def chunks(program: Program, num_samples: int) -> Iterator[int]:
    """Split a number of samples so that the largest tensor of one chunk stays bounded."""
    size = max(1, CHUNK_ELEMENTS // max(1, program.rows.count * row_width(program)))
    done = 0
    while done < num_samples:
        yield min(size, num_samples - done)
        done += size


def continuous_points(guide: Callable[..., Any], posterior: Posterior | None, program: Program) -> list[str]:
    """The continuous latents on which the guide puts a point mass."""
    if posterior is not None:
        return [b.site.name for b in posterior.blocks if b.factor.is_point and not b.site.kind.is_discrete]
    with poutine.block(), _SameRows(program), torch.random.fork_rng(devices=[]), torch.no_grad():
        traces = [poutine.trace(guide).get_trace(*program.args, **program.kwargs) for _ in range(2)]
    first, second = (dict(sample_sites(trace)) for trace in traces)
    # Behind auxiliary sites a Delta hands on what was drawn there: only one that never varies is a point.
    through = any(_is_auxiliary(site) for site in first.values())
    return [
        site.name
        for site in program.latents
        if not site.kind.is_discrete
        and isinstance(first.get(site.name, {}).get("fn"), dist.Delta)
        and not (through and not torch.equal(first[site.name]["value"], second[site.name]["value"]))
    ]


def refuse_continuous_points(
    guide: Callable[..., Any], posterior: Posterior | None, program: Program, what: str
) -> None:
    """Refuse a point mass on a continuous latent, whose L is minus infinity by entropy.

    Raises:
        ValueError: naming the site.
    """
    points = continuous_points(guide, posterior, program)
    if points:
        raise ValueError(
            f"Expected factors with a density for {what}, but got a point mass on the continuous site {points[0]!r}, "
            "whose L is minus infinity by entropy. Report log p(h, v) for it, or use MeanField."
        )
