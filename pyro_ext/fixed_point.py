"""Fixed-point E-steps: sweeps of (19.56) over the factors of q."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.evaluators import Evaluator, Parameters, Quadratic
from pyro_ext.initial import cold_parameters
from pyro_ext.quadratic import NotQuadraticError, holds_at
from pyro_ext.steps import Call, EResult, EStep


class Schedule(ABC):
    """The order in which the groups of q are updated."""

    monotone: bool = False

    @abstractmethod
    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sweep over all groups."""


class Sequential(Schedule):
    """Each group in turn, given the newest value of the others: L never falls."""

    monotone = True

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sequential sweep."""
        return evaluator.sweep(params)


@dataclass(frozen=True)
class Parallel(Schedule):
    """All groups at once from the old value of the others, damped: lambda <- d lambda + (1 - d) lambda_new.

    Fast on wide models, but L may fall and undamped sweeps may oscillate for ever.

    Args:
        damping: d in [0, 1): the share of the old parameters that is kept (logits; means and log scales of Gaussians).

    Raises:
        ValueError: damping outside [0, 1).
    """

    damping: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.damping < 1:
            raise ValueError(f"Expected damping in [0, 1), but got {self.damping}. Use 0 for undamped sweeps.")

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One damped parallel sweep."""
        new = evaluator.jump(params)
        return {name: torch.lerp(new[name], params[name], self.damping) for name in params}


class Criterion(ABC):
    """When the sweeps have converged (19.4.1 names two ways)."""

    @abstractmethod
    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Whether one more sweep changed little: (before, after) of L ``(R,)`` and of the means ``(R, F)``."""


@dataclass(frozen=True)
class BoundChange(Criterion):
    """A full sweep improves L by no more than a tolerance.

    Args:
        tolerance: nats per row, mean over the rows.
    """

    tolerance: float = 1e-6

    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Compare L before and after the sweep."""
        return bool((bound[1] - bound[0]).abs().mean() <= self.tolerance)


@dataclass(frozen=True)
class MeanChange(Criterion):
    """A full sweep changes no mean by more than a tolerance.

    Args:
        tolerance: largest change of any entry of E_q[h] (a probability for discrete latents).
    """

    tolerance: float = 1e-4

    def met(self, bound: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> bool:
        """Compare the means before and after the sweep."""
        return bool((means[1] - means[0]).abs().max() <= self.tolerance)


class Start(ABC):
    """Where the sweeps of an E-step start."""

    label: str
    monotone: bool

    @abstractmethod
    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The starts to try; the better end is kept, row by row."""


class Cold(Start):
    """From the prior, every time; L may fall from one E-step to the next."""

    label, monotone = "cold", False

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The cold start."""
        return [cold]


class Warm(Start):
    """From the last answer, where there is one."""

    label, monotone = "warm", True

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """The warm start."""
        return [cold if warm is None else warm]


class Better(Start):
    """From both the prior and the last answer; each row keeps the end with the higher L."""

    label, monotone = "better", True

    def candidates(self, cold: Parameters, warm: Parameters | None) -> list[Parameters]:
        """Both starts."""
        return [cold] if warm is None else [warm, cold]


class FixedPoint(EStep):
    """Coordinate ascent on q: sets each factor to its optimum given the others, until L settles (19.56).

    log q_i(h_i) = E_{q_-i}[log p(v, h)] + const, found from any Pyro program whose log p(v, h) is quadratic
    in its latents (tested on the support, at the present theta), or whose states can be enumerated.
    For binary sparse coding this is (19.44); with one joint factor a single sweep is the exact
    posterior; with point masses on binary latents it is coordinate-wise MAP.

    Args:
        schedule: `Sequential()` (L never falls) or `Parallel(damping)`.
        criterion: `BoundChange(tolerance)` or `MeanChange(tolerance)`.
        max_sweeps: most sweeps of one E-step.
        start: `Cold()`, `Better()` or `Warm()`. While theta is learned, cold starts end higher by far (figures in
            ``docs/architecture.md``): q stays within reach of inference from scratch, on held-out data too. They
            promise no monotony; `Better()` and `Warm()` do.

    Raises:
        ValueError: max_sweeps below 1.
        TypeError: a schedule, criterion or start of another type.
        NoEvaluatorError: at the first step, for a program that is neither quadratic nor enumerable.

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
    ) -> None:
        self.schedule = _instance(schedule, Schedule, Sequential(), "schedule", "Sequential() or Parallel()")
        self.criterion = _instance(criterion, Criterion, BoundChange(), "criterion", "BoundChange() or MeanChange()")
        self.start = _instance(start, Start, Cold(), "start", "Cold(), Better() or Warm()")
        if not isinstance(max_sweeps, int) or max_sweeps < 1:
            raise ValueError(f"Expected max_sweeps of at least 1, but got {max_sweeps!r}. One sweep may be enough.")
        self.max_sweeps = max_sweeps
        self._last_sweeps = 0

    @property
    def last_sweeps(self) -> int:
        """Number of sweeps of the latest E-step (the longest of its starts)."""
        return self._last_sweeps

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

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Sweep until the criterion is met, from the chosen starts."""
        evaluator = call.evaluator()
        self._refuse_damped_points(evaluator)
        warm = call.guide.rows_parameters(call.program) if keep and call.guide.holds_answer else None
        with torch.no_grad():
            ends = self._ends(call, evaluator, warm)
            params, bound = ends[0]
            for other, other_bound in ends[1:]:
                params, bound = _better(params, bound, other, other_bound)
        self._check_mass(call, evaluator, params)
        if keep:
            call.guide.assign(call.program, params)
        keeps_up = keep and (warm is None or self.start.monotone)
        monotone = evaluator.exact_posterior or (self.schedule.monotone and keeps_up)
        return EResult(bound, True, self.start.label, call.posterior(params), monotone)

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
        if points and not self.schedule.monotone:
            raise TypeError(
                f"Expected the Sequential() schedule for the point masses {', '.join(map(repr, points))}, but got "
                f"{self.schedule}. A damped point is no state of a discrete latent."
            )

    def _ends(self, call: Call, evaluator: Evaluator, warm: Parameters | None) -> list[tuple[Parameters, Tensor]]:
        """Where the sweeps end from each start, with L per row."""
        if evaluator.exact_posterior:
            self._last_sweeps = 1
            return [evaluator.solve()]
        # The prior of the present theta, not of the theta that the program was traced at.
        call.program.refresh()
        cold = cold_parameters(call.program, call.blocks)
        return [self._sweeps(evaluator, params) for params in self.start.candidates(cold, warm)]

    def _sweeps(self, evaluator: Evaluator, params: Parameters) -> tuple[Parameters, Tensor]:
        bound, means = evaluator.bound(params), evaluator.means(params)
        best, best_bound = params, bound
        for sweep in range(1, self.max_sweeps + 1):
            self._last_sweeps = sweep
            params = self.schedule.apply(evaluator, params)
            new_bound, new_means = evaluator.bound(params), evaluator.means(params)
            settled = self.criterion.met((bound, new_bound), (means, new_means))
            bound, means = new_bound, new_means
            if not self.schedule.monotone:
                # Sweeps that swing or diverge must not end below where they have been.
                best, best_bound = _better(best, best_bound, params, bound)
            if settled:
                break
        return (params, bound) if self.schedule.monotone else (best, best_bound)


def _better(params: Parameters, bound: Tensor, other: Parameters, other_bound: Tensor) -> tuple[Parameters, Tensor]:
    """Of two sets of parameters, row by row the one with the higher L."""
    higher = other_bound > bound
    chosen = {name: torch.where(higher[:, None, None], other[name], params[name]) for name in params}
    return chosen, torch.where(higher, other_bound, bound)


def _instance(value: Any, kind: type, default: Any, name: str, choices: str) -> Any:
    if value is None:
        return default
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be {choices}, but got {value!r}. Pass an object, not its name or class.")
    return value
