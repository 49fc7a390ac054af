"""MAP inference as an E-step: points move to the maximum of log p(v, h), with a certificate (19.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyro_ext.coordinate_descent import CoordinateDescent
from pyro_ext.evaluators import Parameters
from pyro_ext.in_turn import InTurn
from pyro_ext.lbfgs import LBFGS
from pyro_ext.newton import Newton
from pyro_ext.point_problems import PointProblem, point_problem, program_point_problem, solved_directly
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program import Program
from pyro_ext.proximal import FISTA, SpaRSA
from pyro_ext.pull import Pull, point_values
from pyro_ext.solvers import Solution, Solver, instance
from pyro_ext.starts import Better, Cold, Start, Warm
from pyro_ext.steps import Call, EResult, EStep


@dataclass(frozen=True)
class Certificate:
    """How far the points of an E-step are from the maximum of log p(v, h), row by row.

    Attributes:
        gap: an upper bound on max_h log p(v, h) - log p(v, h), ``rows.shape``, nats; NaN where none is known: the
            program is not Laplace + quadratic, and its maxima may be local ones.
        slope: largest derivative of log p(v, h) that is left, in size, ``rows.shape``, nats per unit of the latent.
        num_iterations: of each row, ``rows.shape``.
        converged: rows that met the solver's tolerance, boolean, ``rows.shape``.
    """

    gap: Tensor
    slope: Tensor
    num_iterations: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        rows = self.converged.numel()
        most = "unknown" if bool(self.gap.isnan().any()) else f"at most {float(self.gap.max()):.2g} nats"
        return (
            f"Certificate(gap {most}, slope at most {float(self.slope.max()):.2g}, "
            f"{int(self.converged.sum())} of {rows} rows converged, "
            f"in at most {int(self.num_iterations.max())} iterations)"
        )


class Maximize(EStep):
    r"""Moves the points of a `Dirac` guide to h* = argmax_h p(h | v), for any Pyro program (19.13).

    Programs that are quadratic beside Laplace, exponential and half-normal priors are recognised by peeling these off
    (`penalized_form`); every row is a convex problem then, zeros of the answer are exact, and `certificate` bounds
    how much log p(v, h) could still rise. Other programs are maximised as they are: with Laplace priors by proximal
    steps, without by quasi-Newton steps, from one start, to a local maximum where there are several. Positive,
    simplex-valued and other constrained latents are looked for on the real line, but the density is that in their own
    space, as MAP means it.

    L under a point mass is minus infinity by its entropy; what is reported is log p(v, h), which is no bound on
    log p(v). `Noisy(guide, scale)` has one.

    Args:
        solver: `FeatureSign()`, `CoordinateDescent()`, `SpaRSA()` or `FISTA()` for Laplace + quadratic programs;
            `FISTA()` for Laplace priors beside anything smooth; `LBFGS()` or `Newton()` for smooth programs. None
            takes what serves: ``InTurn(SpaRSA(max_iterations=300), CoordinateDescent())``, `FISTA()` or `LBFGS()`.
        start: `Warm()` from the last answer where there is one, `Cold()` from the prior's mode (median, where the
            program is not quadratic), or `Better()` of both.

    Raises:
        TypeError: a solver or start of another type; at the door of `EM`, a guide that is no `Dirac`.
        SolverError: at the first step, a solver that does not serve the program, or a program without a maximum.
        NotFiniteError: log p(v, h) is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext import EM
        >>> from pyro_ext.guides import Dirac
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Laplace(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> em = EM(model, Dirac(model), e_step=Maximize(), m_step=None)
        >>> em.infer(torch.tensor([0.5, 3.0]))["h"].mean
        tensor([0., 2.])
        >>> em.e_step.certificate.gap
        tensor([0., 0.])
    """

    def __init__(self, solver: Solver | None = None, start: Start | None = None) -> None:
        if solver is not None:
            instance(solver, Solver, "solver", "FeatureSign(), FISTA(), LBFGS() or another solver")
        if start is not None:
            instance(start, Start, "start", "Cold(), Better() or Warm()")
        self.solver = solver
        self.start = Warm() if start is None else start
        self._certificate: Certificate | None = None

    @property
    def certificate(self) -> Certificate:
        """How far the points of the latest E-step are from the maximum.

        Raises:
            RuntimeError: there was no E-step yet.
        """
        if self._certificate is None:
            raise RuntimeError("Expected an E-step before its certificate, but there was none. Call `em.infer` first.")
        return self._certificate

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse guides that are no tables of points.

        Raises:
            TypeError: as above.
        """
        if not (getattr(guide, "is_table", False) and getattr(guide, "is_point", False)):
            raise TypeError(
                f"Expected a Dirac guide for Maximize, but got {type(guide).__name__}. "
                "Use FixedPoint() or Gradient(optim) for it, or Refine(Maximize(), optim) for a network of points."
            )

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Solve every row from the chosen starts."""
        if keep:
            call.flush()
        warm = call.guide.rows_parameters(call.program) if keep and call.guide.holds_answer else None
        result, params = self.solve(call, warm)
        if keep:
            call.guide.assign(call.program, params)
        promised = keep and (warm is None or self.start.monotone)
        return replace(result, monotone=promised)

    def solve(self, call: Call, warm: Parameters | None, pull: float = 0.0) -> tuple[EResult, Parameters]:
        """The points of a call's rows and their parameters ``(R, M, P)``, given those of the last answer.

        Args:
            call: the model, guide and data.
            warm: parameters ``(R, M, P)`` of the points h' to start from; None for a cold start.
            pull: alpha, nats per squared unit. Above 0, with `warm`, the points are the maximum of
                log p(v, h) - alpha/2 |h - h'|^2, and the certificate speaks of that. The bound is log p(v, h).
        """
        _refuse_discrete(call.program)
        blocks = call.blocks
        with torch.no_grad():
            towards = Pull.towards(warm, blocks, call.program, pull) if pull and warm is not None else None
            view = self._view(call.program, towards)
            ends = [self._solve(view.problem, x, is_warm) for x, is_warm in self._starts(view, call, warm)]
            found, value = ends[0]
            for other, other_value in ends[1:]:
                found, value = _better(found, value, other, other_value)
            params = view.to_params(found.x, blocks)
        shape = call.program.rows.shape
        details = (found.gap, found.slope, found.num_iterations, found.converged)
        self._certificate = Certificate(*(detail.reshape(shape) for detail in details))
        bound = view.constant - value
        if towards is not None:
            bound = bound + towards.cost(point_values(params, blocks, call.program.rows))
        return EResult(bound, True, self.start.label, call.posterior(params), monotone=False), params

    def _view(self, program: Program, pull: Pull | None = None) -> PointProblem:
        """What the solver is given: the lasso of every row where the program is one, else the program itself."""
        if isinstance(self.solver, LBFGS | Newton):
            return program_point_problem(program, pull)
        return point_problem(program, pull)

    def _starts(self, view: PointProblem, call: Call, warm: Parameters | None) -> list[tuple[Tensor, bool]]:
        """Where to start, and whether it is the last answer."""
        starts: list[tuple[Tensor, bool]] = []
        if warm is not None and not isinstance(self.start, Cold):
            x = view.to_x(warm, call.blocks)
            inside = x.isfinite()
            if not bool(inside.all()):
                # The logarithm of an exact 0 is no place to start from.
                x = torch.where(inside, x, view.cold_start(call.program, call.blocks))
            starts.append((x, True))
        if not starts or isinstance(self.start, Better):
            starts.append((view.cold_start(call.program, call.blocks), False))
        return starts

    def _solve(self, problem: Problem, start: Tensor, is_warm: bool) -> tuple[Solution, Tensor]:
        """The end from one start, and P there."""
        if not start.shape[1]:
            found = solved_directly(problem)
            return found, torch.zeros_like(found.gap)
        solver = self.solver or default_solver(problem)
        solver.check(problem)
        found = solver.solve(problem, start)
        value = problem.objective(found.x)
        if not is_warm:
            return found, value
        # The promise of a warm start, to the last digit.
        return _better(found, value, *_unmoved(problem, start, found.converged))


def default_solver(problem: Problem) -> Solver:
    """The solver that `Maximize()` takes where none is given."""
    if isinstance(problem, PenalizedQuadratic):
        return InTurn(SpaRSA(max_iterations=300), CoordinateDescent())
    return LBFGS() if problem.is_smooth else FISTA()


def _unmoved(problem: Problem, start: Tensor, converged: Tensor) -> tuple[Solution, Tensor]:
    """The start as an end: of a row that converged elsewhere it is as good as solved, as far as the dtype can tell."""
    value, gradient = problem.smooth(start)
    gap, slope = problem.gap(start, gradient), problem.slope(start, gradient)
    steps = torch.zeros(len(start), dtype=torch.long, device=start.device)
    return Solution(start, gap, slope, steps, converged), value + problem.penalty(start)


def _better(one: Solution, value: Tensor, other: Solution, other_value: Tensor) -> tuple[Solution, Tensor]:
    """Of two ends, row by row the one with the lower P."""
    lower = other_value < value
    if not bool(lower.any()):
        return one, value
    chosen = {}
    for field in fields(Solution):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        chosen[field.name] = torch.where(lower.unsqueeze(-1) if mine.dim() == 2 else lower, theirs, mine)
    return Solution(**chosen), torch.where(lower, other_value, value)


def _refuse_discrete(program: Program) -> None:
    discrete = [site.name for site in program.latents if site.kind.is_discrete]
    if discrete:
        raise TypeError(
            f"Expected continuous latents for Maximize, but got the discrete {', '.join(map(repr, discrete))}. "
            "Use FixedPoint() (coordinate-wise MAP)."
        )
