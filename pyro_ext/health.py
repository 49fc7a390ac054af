"""A monitor for fits that fail silently: weights, dreams, entropy and dead units."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.checks import check_count, check_data_of
from pyro_ext.draws import chunks, draw, posterior_of, refuse_continuous_points, unchanged_if_refused
from pyro_ext.dreams import HandOver, log_q_of_dreams
from pyro_ext.fit import EpochEnd
from pyro_ext.history import HealthEntry
from pyro_ext.layout import Layout
from pyro_ext.matching import check_sleep
from pyro_ext.program import Program
from pyro_ext.snapshot import rng_state, set_rng_state

if TYPE_CHECKING:
    from pyro_ext.posterior import Posterior

EXPLAINED = 0.01
"""A unit is dead if v explains less than this share of its variance under q."""


class Health:
    r"""Notes how well q serves the model on given data: ``fit(svi, loader, callbacks=[Health(v)])``.

    With S samples :math:`h_s \sim q(h | v_n)` and weights :math:`w_{ns} = p(v_n, h_s) / q(h_s | v_n)`,

    - *effective sample size* of a row, :math:`(\sum_s w_{ns})^2 / \sum_s w_{ns}^2`, from 1 to S: near 1, estimates of
      that row rest on one sample;
    - *log q on data*, :math:`\sum_s \bar w_{ns} \log q(h_s | v_n)`, the self-normalised estimate of its mean under
      the posterior, beside *log q on dreams*, :math:`\log q(h' | v')` for :math:`(h', v') \sim p`, which a sleep phase
      trains: q that is good on dreams and poor on data was trained on dreams that do not resemble data, the main
      drawback of wake-sleep (section 19.5.1). Where the effective sample size is small, the first is too rosy;
    - *entropy* of q, :math:`-E_q[\log q]`, nats per row: near 0, q has collapsed to points;
    - *dead units*: those whose posterior mean varies so little from row to row that v explains less than 1 % of their
      variance under q (compare Burda, Grosse and Salakhutdinov, 2016, on active units).

    Masks and scales count here as they count in L: rows that are mostly masked have weights that hardly differ.

    Entries go to ``history.health``, their hints in words to ``history.hints``; random numbers are put back: a fit with
    this callback gives the same numbers as one without.

    Args:
        *args: data to look at: arguments of model and guide, held-out rows for instance.
        every: look after every so many epochs of `fit`, or steps of `EM.run`.
        num_samples: S, samples of q per row, at least 2.
        num_dreams: dreams a look; None for as many as there are rows.
        **kwargs: keyword arguments of model and guide.

    Attributes:
        effective_sample_size: of each row at the last look, shape ``rows.shape``; None before.

    Raises:
        TypeError, ValueError: a count that is no int or below its least; at the first look bad data, or a point mass on
            a continuous latent, which has no weights.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_ext import WakeSleep, fit
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import SigmoidBeliefNetwork
        >>> v, model = torch.ones(10, 4), SigmoidBeliefNetwork([2, 4])
        >>> svi = SVI(model, Amortized(model), Adam({"lr": 0.01}), WakeSleep())
        >>> history = fit(svi, [v], 2, callbacks=[Health(v)], progress=False)
        >>> [entry.units for entry in history.health]
        [{'h1': 2}, {'h1': 2}]
    """

    def __init__(
        self, *args: Any, every: int = 1, num_samples: int = 100, num_dreams: int | None = None, **kwargs: Any
    ) -> None:
        check_count(every, "every")
        check_count(num_samples, "num_samples")
        if num_samples < 2:
            raise ValueError(f"Expected num_samples of at least 2, but got {num_samples}. Use 100 or more.")
        if num_dreams is not None:
            check_count(num_dreams, "num_dreams")
        self.args, self.kwargs = args, kwargs
        self.every, self.num_samples, self.num_dreams = every, num_samples, num_dreams
        self.effective_sample_size: Tensor | None = None
        self._hand_over = HandOver()

    def __call__(self, event: EpochEnd) -> None:
        """Look after the epoch or step that has just ended."""
        if event.epoch % self.every == 0:
            event.history.health.append(self.measure(event.svi.model, event.svi.guide, step=event.step))

    def measure(self, model: Callable[..., Any], guide: Callable[..., Any], *, step: int = 0) -> HealthEntry:
        """Look at a model and a guide as they are now.

        Args:
            model: any Pyro model.
            guide: a guide of this project or any Pyro guide.
            step: number to note.
        """
        generators = rng_state()
        try:
            with unchanged_if_refused(guide), poutine.block(), torch.no_grad():
                check_data_of(model, self.args, self.kwargs)
                program = Program.with_fresh_rows(model, self.args, self.kwargs)
                posterior = posterior_of(guide, program)
                refuse_continuous_points(guide, posterior, program, "Health")
                return self._entry(model, guide, program, posterior, step)
        finally:
            set_rng_state(generators)

    def _entry(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        program: Program,
        posterior: Posterior | None,
        step: int,
    ) -> HealthEntry:
        log_w, log_q, features = self._sampled(guide, program, posterior)
        weights = log_w.softmax(0)
        sizes = 1 / weights.square().sum(0)
        self.effective_sample_size = sizes.reshape(program.rows.shape)
        # A sample without weight may have log q = -inf, whose product is NaN.
        on_data = torch.where(weights > 0, weights * log_q, torch.zeros_like(log_q)).sum(0).mean()
        dreams = self._on_dreams(model, guide, program)
        units, dead = self._units(program, features)
        return HealthEntry(
            step=step,
            num_samples=self.num_samples,
            effective_sample_size=float(sizes.median()),
            share_below_two=float((sizes < 2).float().mean()),
            log_q_on_data=float(on_data),
            log_q_on_dreams=None if dreams is None else float(dreams.mean()),
            entropy=float(-log_q.mean()),
            units=units,
            dead_units=dead,
        )

    def _sampled(
        self, guide: Callable[..., Any], program: Program, posterior: Posterior | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log w and log q, ``(S, R)``, and features of all latents, ``(S, R, F)``."""
        layout = Layout(program.rows, program.latents)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for size in chunks(program, self.num_samples):
            values, log_q = draw(guide, posterior, program, size)
            total = torch.stack([x.reshape(size, -1) for x in log_q.values()]).sum(0)
            log_p = program.log_joint(values, num_particles=size).reshape(size, -1)
            parts.append((log_p - total, total, layout.flatten(values)))
        log_w, log_q, features = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_w, log_q, features

    def _units(self, program: Program, features: Tensor) -> tuple[dict[str, int], dict[str, int]]:
        """How many units each latent has, and how many of them v hardly moves."""
        layout = Layout(program.rows, program.latents)
        num_samples, num_rows, _ = features.shape
        within = features.var(0).mean(0)
        # The means of few samples vary by themselves.
        between = features.mean(0).var(0) - within / num_samples if num_rows > 1 else torch.ones_like(within)
        is_dead = ~(between > EXPLAINED * (between + within))
        units: dict[str, int] = {}
        dead: dict[str, int] = {}
        for site in layout.sites:
            start = layout.offsets[site.name]
            count = layout.copies(site) * site.num_features
            units[site.name] = count
            dead[site.name] = int(is_dead[start : start + count].sum())
        return units, dead

    def _on_dreams(self, model: Callable[..., Any], guide: Callable[..., Any], program: Program) -> Tensor | None:
        """log q of dreams; None where the guide cannot read them."""
        if getattr(guide, "is_table", False):
            return None
        args, kwargs = program.args, program.kwargs
        try:
            check_sleep(program.trace, poutine.trace(guide).get_trace(*args, **kwargs))
            return log_q_of_dreams(model, guide, args, kwargs, program.rows, self._hand_over, self.num_dreams)
        except (ValueError, TypeError, NotImplementedError):
            return None
