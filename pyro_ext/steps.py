"""Steps: what raises L in one block, q (an E-step) or theta (an M-step)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_ext.choose import choose_evaluator
from pyro_ext.compiled import Compilation, CompiledSolution
from pyro_ext.evaluators import Enumerated, Evaluator, NoEvaluatorError, Parameters
from pyro_ext.layout import Layout
from pyro_ext.multilinear import Multilinear
from pyro_ext.points import Points
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program


@dataclass
class Call:
    """One model, guide and data that steps work on, with what they have in common.

    Attributes:
        model: the Pyro model.
        guide: a guide of this project.
        program: the model at the data.
        quadratic: whether the quadratic test is worth another try on this model.
        compilation: compiled graphs of the driver's E-steps, where it asked for them.
        defers: q need not be in the guide's table between steps: an E-step that would write it whole leaves it in
            `pending`, for the run to write when it ends.
        pending: parameters of q that the table does not hold yet.
    """

    model: Callable[..., Any]
    guide: Any
    program: Program
    quadratic: bool = True
    compilation: Compilation | None = None
    defers: bool = False
    pending: Parameters | None = None
    _evaluator: Evaluator | None = field(default=None, repr=False)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of model and guide."""
        return self.program.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of model and guide."""
        return self.program.kwargs

    @property
    def scale(self) -> float:
        """N/B of a subsampled program: losses are -L summed over the batch, times this."""
        return self.program.rows.scale

    def evaluator(self) -> Evaluator:
        """The exact evaluator at the present theta.

        Raises:
            NoEvaluatorError: nothing exact serves this program.
        """
        if self._evaluator is None:
            if not self.guide.is_static:
                raise NoEvaluatorError(
                    "Expected factors that do not depend on each other's values, but got a guide with conditional "
                    "factors or density encoders. Use `Gradient`, or pyro.infer.SVI."
                )
            if self.compilation is None:
                self._evaluator = self._choose()
            else:
                self._evaluator = self.compilation.evaluator(self, self._choose)
        return self._evaluator

    def _choose(self) -> Evaluator:
        evaluator = choose_evaluator(self.program, self.blocks, try_quadratic=self.quadratic)
        self.quadratic = not isinstance(evaluator, Enumerated | Multilinear | Points)
        return evaluator

    def bound_arguments(self) -> dict[str, Any]:
        """The arguments of the model by name."""
        forward = getattr(self.model, "forward", self.model)
        return inspect.signature(forward).bind(*self.args, **self.kwargs).arguments

    def statistics(self, result: EResult) -> Mapping[str, Tensor]:
        """The expected sufficient statistics of a model that has them, under the q of an E-step."""
        if isinstance(self._evaluator, CompiledSolution):
            known = self._evaluator.statistics(self.parameters(result))
            if known is not None:
                return known
        model: Any = self.model
        # Sums that kept a graph would keep every batch.
        with torch.no_grad():
            return model.statistics(self.bound_arguments(), result.posterior)

    @property
    def blocks(self) -> Any:
        """The guide's blocks, on this program's sites."""
        return self.guide.make_blocks(self.program)

    def flush(self) -> None:
        """Write what is pending into the guide's table."""
        if self.pending is not None:
            # Cleared last: an interrupt in between must lose nothing.
            self.guide.assign(self.program, self.pending)
            self.pending = None

    def theta_changed(self) -> None:
        """Forget the evaluator: it belongs to the theta before."""
        self._evaluator = None

    def posterior(self, params: Parameters) -> Posterior:
        """The posterior of these rows from parameters ``(R, M, P)``."""
        layout = Layout(self.program.rows, self.program.latents)
        blocks = self.blocks
        batch = {b.name: layout.from_rows(params[b.name], b.site) for b in blocks}
        return Posterior.from_parameters(self.program.rows, self.program.latents, blocks, batch)

    def parameters(self, result: EResult) -> Parameters:
        """The factors' parameters ``(R, M, P)`` that an E-step ended at."""
        layout = Layout(self.program.rows, self.program.latents)
        return {b.name: layout.to_rows(result.posterior.conditioner(b, {}), b.site) for b in self.blocks}

    def bound(self, posterior: Posterior | None, params: Parameters | None, num_particles: int) -> tuple[Tensor, bool]:
        """L per row ``(R,)`` in nats, and whether it is exact (else a mean over particles)."""
        if params is not None:
            try:
                with torch.no_grad():
                    return self.evaluator().bound(params), True
            except NoEvaluatorError:
                pass
        if posterior is None:
            posterior = self._posterior(params)
        return sampled_bound(self.program, posterior, num_particles), False

    def _posterior(self, params: Parameters | None) -> Posterior:
        return self.guide.posterior(*self.args, **self.kwargs) if params is None else self.posterior(params)


def sampled_bound(program: Program, posterior: Posterior, num_particles: int) -> Tensor:
    """Monte-Carlo estimate of L per row ``(R,)``, nats; points count log q = 0."""
    with torch.no_grad():
        values, log_q = posterior.sample_with_log_prob(num_particles)
        led = {site.name: program.lead(values[site.name], site) for site in program.latents}
        log_p = program.log_joint(led, num_particles=num_particles)
        return (log_p - log_q).mean(0).reshape(-1)


@dataclass(frozen=True)
class EResult:
    """What an E half-step did.

    Attributes:
        bound: L per row after it ``(R,)``, nats.
        exact: whether that is exact, not a mean over particles.
        start: where it started: "cold", "warm" or "better".
        posterior: the new q of these rows.
        monotone: the step promises that L did not fall.
        error: Monte-Carlo standard error of the bound ``(R,)``, nats, where it is estimated with one.
    """

    bound: Tensor
    exact: bool
    start: str
    posterior: Posterior
    monotone: bool
    error: Tensor | None = None


class EStep(ABC):
    """An E-step: moves q, leaves theta."""

    infers_for_tables: bool = True
    """Whether it can infer new data for a guide with tables, without writing to them."""

    infers_itself: bool = False
    """Whether q is what it finds on the spot, whatever the guide puts out (`SemiAmortized`)."""

    @abstractmethod
    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse a guide that the step cannot move, by name."""

    @abstractmethod
    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Raise L in q.

        Args:
            call: the model, guide and data.
            keep: write the answer into the guide; False infers new data from a cold start and leaves no trace.
        """

    def check_other_data(self, call: Call) -> None:  # noqa: B027 (most steps do not look at the last answer)
        """Refuse to learn from data that the guide's table has no rows for, where a table's last answer is needed."""


class MStep(ABC):
    """An M-step: moves theta, leaves q."""

    @property
    def monotone(self) -> bool:
        """Whether it promises, with exact moments of q on the full data, that L does not fall."""
        return False

    @property
    def reads_guide(self) -> bool:
        """Whether it looks at the guide: q must stand in its table then, not in the result of the E-step alone."""
        return True

    def reset(self) -> None:  # noqa: B027 (most steps remember nothing)
        """Forget what was gathered on the way, before another start."""

    @contextmanager
    def epoch(self, model: Callable[..., Any]) -> Generator[None, None, None]:
        """Take the calls of `improve` in the block as the batches of one data set; see `EM.epoch`."""
        yield

    @abstractmethod
    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse a model that the step cannot move, by name."""

    @abstractmethod
    def improve(self, call: Call, result: EResult) -> None:
        """Raise L in theta."""
