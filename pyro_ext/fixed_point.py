"""Fixed-point E-steps: sweeps of (19.56) over the factors of q."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ext.criteria import BoundChange, Criterion, MeanChange
from pyro_ext.evaluators import Evaluator, Parameters, Quadratic
from pyro_ext.initial import cold_parameters
from pyro_ext.quadratic import NotQuadraticError, holds_at
from pyro_ext.sampled import Sampled, SampledEvaluator
from pyro_ext.schedules import Adaptive, Coloured, Parallel, Schedule, Sequential, interpolate
from pyro_ext.starts import Better, Cold, Start, Warm, better
from pyro_ext.steps import Call, EResult, EStep

__all__ = [
    "Adaptive",
    "Better",
    "BoundChange",
    "Cold",
    "Coloured",
    "Criterion",
    "FixedPoint",
    "MeanChange",
    "Parallel",
    "Sampled",
    "Schedule",
    "Sequential",
    "Start",
    "Warm",
]


class FixedPoint(EStep):
    """Coordinate ascent on q: sets each factor to its optimum given the others, until L settles (19.56).

    log q_i(h_i) = E_{q_-i}[log p(v, h)] + const, found from any Pyro program whose log p(v, h) is quadratic
    in its latents (tested on the support, at the present theta), whose states can be enumerated, or that is
    multilinear in its discrete latents. Where none of these holds, `Sampled` estimates the optima.
    For binary sparse coding this is (19.44); with one joint factor a single sweep is the exact
    posterior; with point masses on binary latents it is coordinate-wise MAP.

    Args:
        schedule: `Sequential()`, `Coloured()` or `Adaptive()` (L never falls), or `Parallel(damping)`.
        criterion: `BoundChange(tolerance)` or `MeanChange(tolerance)`.
        max_sweeps: most sweeps of one E-step.
        start: `Cold()`, `Better()` or `Warm()`. While theta is learned, cold starts end higher by far (figures in
            ``docs/architecture.md``): q stays within reach of inference from scratch, on held-out data too. They
            promise no monotony; `Better()` and `Warm()` do.
        evaluator: `Sampled(...)` estimates the optima from samples, in exactly ``max_sweeps`` sweeps; None finds the
            exact evaluator that serves the program.

    Raises:
        ValueError: max_sweeps below 1.
        TypeError: a schedule, criterion, start or evaluator of another type; `Adaptive()` with `Sampled()`.
        NoEvaluatorError: at the first step, for a program that nothing exact serves.
        NotFiniteError: at the first step, for a program with hard zeros (the proviso of 19.56).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext import EM
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
        >>> em.infer(torch.tensor([0.5, 3.0]))["h"].mean
        tensor([0.5000, 0.9241])
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        criterion: Criterion | None = None,
        max_sweeps: int = 50,
        start: Start | None = None,
        evaluator: Sampled | None = None,
    ) -> None:
        self.schedule = _instance(
            schedule, Schedule, Sequential(), "schedule", "Sequential(), Coloured(), Adaptive() or Parallel()"
        )
        self.criterion = _instance(criterion, Criterion, BoundChange(), "criterion", "BoundChange() or MeanChange()")
        self.start = _instance(start, Start, Cold(), "start", "Cold(), Better() or Warm()")
        if not isinstance(max_sweeps, int) or max_sweeps < 1:
            raise ValueError(f"Expected max_sweeps of at least 1, but got {max_sweeps!r}. One sweep may be enough.")
        self.max_sweeps = max_sweeps
        if evaluator is not None and not isinstance(evaluator, Sampled):
            raise TypeError(
                f"Expected evaluator to be Sampled() or None, but got {evaluator!r}. "
                "None takes the exact one that serves."
            )
        if evaluator is not None and isinstance(self.schedule, Adaptive):
            raise TypeError(
                "Expected Sequential() or Parallel() with Sampled(), but got Adaptive(), which compares values of L "
                "that samples only estimate. Sampled(step_size=...) damps."
            )
        self.evaluator = evaluator
        self._last_sweeps = 0
        self._converged = False

    @property
    def last_sweeps(self) -> int:
        """Number of sweeps of the latest E-step (the longest of its starts)."""
        return self._last_sweeps

    @property
    def converged(self) -> bool:
        """Whether the latest E-step met its criterion from each of its starts; a swing or samples never do."""
        return self._converged

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse guides without tables.

        Raises:
            TypeError: the guide's parameters come from a network.
        """
        if not getattr(guide, "is_table", False):
            raise TypeError(
                f"Expected a guide with a table (MeanField, Dirac, Structured) for FixedPoint, but got "
                f"{type(guide).__name__}. Use `Gradient(optim)` to train a network."
            )

    def check_other_data(self, call: Call) -> None:
        """Refuse starts from the last answer where there is none, unless one sweep is exact from any start.

        Raises:
            ValueError: `Warm()` or `Better()` on batches that the guide's table has no rows for.
        """
        if isinstance(self.start, Cold) or call.evaluator().exact_posterior:
            return
        raise ValueError(
            f"Expected Cold() starts for data that the table of {type(call.guide).__name__} has no rows for, but got "
            f"{type(self.start).__name__}(): such batches have no last answer to start from. Use "
            "FixedPoint(start=Cold()), `subsample=` in the model, or the Amortized guide."
        )

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Sweep until the criterion is met, from the chosen starts."""
        evaluator = self._sweepable(call)
        # The table is large, and a step that is exact from anywhere reads nothing of it.
        defers = keep and call.defers and evaluator.exact and evaluator.exact_posterior
        if keep and not defers:
            call.flush()
        warm = call.guide.rows_parameters(call.program) if keep and call.guide.holds_answer else None
        result, params = self._solve(call, evaluator, self.start, warm)
        if defers:
            call.pending = params
        elif keep:
            call.guide.assign(call.program, params)
        keeps_up = keep and (warm is None or self.start.monotone)
        monotone = evaluator.exact and (evaluator.exact_posterior or (self.schedule.monotone and keeps_up))
        return replace(result, monotone=monotone)

    def solve(self, call: Call, start: Parameters | None) -> tuple[EResult, Parameters]:
        """Sweep from a given q, whatever `start` the step was built with; nothing is written to the guide.

        Args:
            call: the model, guide and data; the guide may be a network.
            start: parameters ``(R, M, P)`` for each block; None for a cold start.

        Returns:
            The result, which promises nothing about the guide's last answer, and the parameters ``(R, M, P)``.
        """
        return self._solve(call, self._sweepable(call), Cold() if start is None else Warm(), start)

    def _solve(
        self, call: Call, evaluator: Evaluator, start: Start, warm: Parameters | None
    ) -> tuple[EResult, Parameters]:
        with torch.no_grad():
            ends = self._ends(call, evaluator, start, warm)
            params, bound = ends[0]
            for other, other_bound in ends[1:]:
                params, bound = better(params, bound, other, other_bound)
            error = None
            if isinstance(evaluator, SampledEvaluator):
                # Anew, for the estimate that chose an end flatters it.
                bound, error = evaluator.estimate_bound(params)
        self._check_mass(call, evaluator, params)
        return EResult(bound, evaluator.exact, start.label, call.posterior(params), False, error), params

    def _sweepable(self, call: Call) -> Evaluator:
        evaluator = self._evaluator(call)
        self._refuse_damped_points(evaluator)
        return evaluator

    def _evaluator(self, call: Call) -> Evaluator:
        return call.evaluator() if self.evaluator is None else self.evaluator.build(call.program, call.blocks)

    def _check_mass(self, call: Call, evaluator: Evaluator, params: Parameters) -> None:
        """Test the quadratic form once more where q puts its mass, which may lie far from where it was tested."""
        if not isinstance(evaluator, Quadratic) or all(s.kind.is_discrete for s in call.program.latents):
            return
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = call.posterior(params).sample(2)
            led = {site.name: call.program.lead(values[site.name], site) for site in call.program.latents}
            draws = evaluator.layout.flatten(led)
            means = evaluator.means(params)
        for flat in (draws[0], torch.lerp(means, draws[1], 3.0) if self._all_real(call) else draws[1]):
            if not holds_at(evaluator.form, call.program, flat):
                raise NotQuadraticError(
                    "Expected log p(v, h) to be quadratic where q puts its mass, but it is not. "
                    "Use `e_step=Gradient(optim)`, or pyro.infer.SVI."
                )

    @staticmethod
    def _all_real(call: Call) -> bool:
        return not any(site.kind.is_discrete for site in call.program.latents)

    def _refuse_damped_points(self, evaluator: Evaluator) -> None:
        points = [b.name for b in evaluator.blocks if b.factor.is_point]
        if points and self.schedule.damps:
            raise TypeError(
                f"Expected the Sequential() schedule for the point masses {', '.join(map(repr, points))}, but got "
                f"{self.schedule}. A damped point is no state of a discrete latent."
            )

    def _ends(
        self, call: Call, evaluator: Evaluator, start: Start, warm: Parameters | None
    ) -> list[tuple[Parameters, Tensor]]:
        """Where the sweeps end from each start, with L per row."""
        self._last_sweeps, self._converged = 1, evaluator.exact
        if evaluator.exact and evaluator.exact_posterior:
            return [evaluator.solve()]
        # The prior of the present theta, not of the theta that the program was traced at.
        call.program.refresh()
        cold = cold_parameters(call.program, call.blocks)
        # Every start has its own evaluator where that counts its sweeps.
        return [self._sweeps(self._evaluator(call), params) for params in start.candidates(cold, warm)]

    def _sweeps(self, evaluator: Evaluator, params: Parameters) -> tuple[Parameters, Tensor]:
        sweep = self.schedule.sweeper(evaluator)
        if not evaluator.exact:
            for _ in range(self.max_sweeps):
                params = sweep(params)
            self._last_sweeps = self.max_sweeps
            return params, evaluator.bound(params)
        # What neither the criterion nor the choice of the best sweep reads is found once, at the end.
        bounds = self.criterion.reads_bound or not self.schedule.monotone
        reads_means = self.criterion.reads_means or not self.schedule.monotone
        none = torch.zeros(())
        bound = evaluator.bound(params) if bounds else none
        means = evaluator.means(params) if reads_means else none
        best, best_bound = params, bound
        settled = False
        for number in range(1, self.max_sweeps + 1):
            old, params = params, sweep(params)
            new_bound = evaluator.bound(params) if bounds else none
            new_means = evaluator.means(params) if reads_means else none
            settled = self.criterion.met((bound, new_bound), (means, new_means))
            bound, means = new_bound, new_means
            if not self.schedule.monotone:
                # Sweeps that swing or diverge must not end below where they have been.
                best, best_bound = better(best, best_bound, params, bound)
                settled = settled and self._is_at_rest(evaluator, old, params, bound, means)
            self._last_sweeps = max(self._last_sweeps, number)
            if settled:
                break
        self._converged = self._converged and settled
        if not self.schedule.monotone:
            return best, best_bound
        return params, bound if bounds else evaluator.bound(params)

    def _is_at_rest(self, evaluator: Evaluator, old: Parameters, new: Parameters, bound: Tensor, means: Tensor) -> bool:
        """Whether halfway between two sweeps is as near as their ends are: in a swing L may be equal at both ends."""
        halfway = interpolate(evaluator, old, new, 0.5)
        return self.criterion.met((bound, evaluator.bound(halfway)), (means, evaluator.means(halfway)))


def _instance(value: Any, kind: type, default: Any, name: str, choices: str) -> Any:
    if value is None:
        return default
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be {choices}, but got {value!r}. Pass an object, not its name or class.")
    return value
