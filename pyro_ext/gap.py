"""The gap between L and log p(v) during a run, as a callback (19.5.1)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_ext.checks import check_count
from pyro_ext.draws import continuous_points, posterior_of
from pyro_ext.evidence import log_evidence
from pyro_ext.fit import EpochEnd
from pyro_ext.over_states import bound_over_states
from pyro_ext.program import Program
from pyro_ext.steps import Call

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GapEntry:
    """L and log p(v) at one moment of a run, nats per row.

    Attributes:
        step: number of the EM step, from 1.
        half: the half that was just taken: ``"E"`` (q changed) or ``"M"`` (theta changed).
        bound: mean over the rows of L.
        log_evidence: mean over the rows of log p(v), or of a stochastic lower bound on it where not exact.
        exact: whether both are exact.
    """

    step: int
    half: Literal["E", "M"]
    bound: float
    log_evidence: float
    exact: bool

    @property
    def gap(self) -> float:
        """log p(v) - L, nats per row: the mean of KL(q || p(h | v)) where exact (19.1)."""
        return self.log_evidence - self.bound


class Gap:
    r"""Notes L and log p(v) after the half-steps of a run: ``em.run(v, callbacks=[Gap(v)])``.

    .. math:: \log p(v) - L(\theta, q) = KL(q(h | v) \| p(h | v)) \ge 0

    After every M half-step both are evaluated, by `log_evidence` and exactly where that can be. The E half-step after
    it has moved q alone, so that its gap is L of the ledger beside the same log p(v); the first E half-step, whose
    theta no callback saw, has none. Under `fit` there is one entry an epoch. Random numbers are put back: a run
    with this callback gives the same numbers as one without.

    Args:
        *args: the data of the run: arguments of model and guide.
        every: evaluate after every so many steps.
        num_samples: samples of q per row where log p(v) is not exact, at least 2.
        **kwargs: keyword arguments of model and guide.

    Attributes:
        entries: a `GapEntry` for each half-step that was evaluated, of the latest run.

    Raises:
        TypeError, ValueError: `every` or `num_samples` is no positive int. At the first call: what `log_evidence`
            refuses, or another number of rows than the run has.

    Example:
        >>> from pyro.optim import Adam
        >>> from pyro_ext import EM, FixedPoint, Gradient
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import BinarySparseCoding
        >>> v, model = torch.randn(10, 4), BinarySparseCoding(num_visible=4, num_latents=2)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.01})))
        >>> gap = Gap(v)
        >>> history = em.run(v, max_steps=3, callbacks=[gap], progress=False)
        >>> [(entry.step, entry.half) for entry in gap.entries]
        [(1, 'M'), (2, 'E'), (2, 'M'), (3, 'E'), (3, 'M')]
        >>> all(entry.exact and entry.gap > -1e-5 for entry in gap.entries)
        True
    """

    def __init__(self, *args: Any, every: int = 1, num_samples: int = 1000, **kwargs: Any) -> None:
        check_count(every, "every")
        check_count(num_samples, "num_samples")
        self.args, self.kwargs = args, kwargs
        self.every = every
        self.num_samples = num_samples
        self.entries: list[GapEntry] = []
        self._history: Any = None
        self._last: tuple[int, GapEntry] | None = None

    def __call__(self, event: EpochEnd) -> None:
        """Note the gap after the step that has just ended."""
        if event.history is not self._history:
            self.entries, self._history, self._last = [], event.history, None
        self._note_e_half(event)
        if event.step % self.every == 0:
            entry = self.measure(event.svi, step=event.step, half="M")
            self._last = (event.step, entry)

    def _note_e_half(self, event: EpochEnd) -> None:
        """The E half that has just been, beside the log p(v) before it."""
        of_step = [e for e in event.history.ledger[-2:] if e.step == event.step and e.half == "E"]
        if not of_step or self._last is None or self._last[0] != event.step - 1:
            return
        before = self._last[1]
        self.entries.append(
            GapEntry(event.step, "E", of_step[0].bound_per_row, before.log_evidence, before.exact and of_step[0].exact)
        )

    def measure(self, svi: Any, *, step: int, half: Literal["E", "M"]) -> GapEntry:
        """Evaluate L and log p(v) of a driver's model and guide as they are now, and note them.

        Args:
            svi: `EM`, or `pyro.infer.SVI`.
            step: number to note.
            half: the half that was just taken.
        """
        log_p, bound, exact = self._evaluate(svi.model, svi.guide)
        if self._history is not None and self._history.ledger:
            rows = self._history.ledger[-1].rows
            if rows != log_p.numel():
                raise ValueError(
                    f"Expected the data of the run, which has {rows} rows, but got {log_p.numel()} rows. Write "
                    "em.run(v, callbacks=[Gap(v)])."
                )
        entry = GapEntry(step, half, float(bound.mean()), float(log_p.mean()), exact)
        self.entries.append(entry)
        return entry

    def _evaluate(self, model: Any, guide: Any) -> tuple[Tensor, Tensor, bool]:
        with _generators_kept(self.args, self.kwargs):
            bound = self._exact_bound(model, guide)
            if bound is not None:
                # Without the guide nothing is sampled: either the sum is exact, or it is refused.
                with suppress(ValueError):
                    return log_evidence(model, None, *self.args, **self.kwargs).log_evidence, bound, True
            evidence = log_evidence(model, guide, *self.args, num_samples=self.num_samples, **self.kwargs)
        if evidence.bound is None:
            raise ValueError(
                "Expected factors with a density for Gap, but got points on continuous latents, whose L is minus "
                "infinity by entropy. Look at log p(h, v) in the ledger."
            )
        return evidence.log_evidence, evidence.bound, False

    def _exact_bound(self, model: Any, guide: Any) -> Tensor | None:
        with torch.no_grad(), poutine.block():
            program = Program(model, self.args, self.kwargs)
            posterior = posterior_of(guide, program)
            if posterior is None or continuous_points(guide, posterior, program):
                return None
            if not posterior.static:
                return bound_over_states(program, posterior)
            bound, exact = Call(model, guide, program).bound(posterior, guide.rows_parameters(program), 1)
            return bound if exact else None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw log p(v) and L after each half-step, and the gap between them.

        Args:
            ax: axes to draw on; None for a new figure.
        """
        # Drawing is optional: importing the package must not import Matplotlib.
        from pyro_ext.gap_plot import plot_gap

        return plot_gap(self.entries, ax)


@contextmanager
def _generators_kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[None, None, None]:
    leaves = tree_leaves((args, kwargs))
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield
