"""The problem that MAP inference poses for a program: a lasso where it can be one, else the program itself (19.13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.eliminated import Eliminated
from pyro_ext.evaluators import Parameters
from pyro_ext.initial import cold_parameters
from pyro_ext.layout import Layout
from pyro_ext.penalized_form import penalized_form
from pyro_ext.penalties import Penalties, is_laplace, laplace_sites, penalty_layout
from pyro_ext.point_factor import point_features
from pyro_ext.problems import PenalizedQuadratic, Problem
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.pull import Pull, PulledProblem
from pyro_ext.quadratic import NotFiniteError, NotQuadraticError
from pyro_ext.solvers import Solution, SolverError

CONVEX = 1e3
"""Eigenvalues below 0 by so many units of rounding of the largest one in size are taken for 0."""


@dataclass(frozen=True)
class PointProblem:
    """-log p(v, h) of a program's rows as a `Problem`, and the way back from its x to the points.

    Attributes:
        problem: what a solver minimises; the x that have a closed form are eliminated from it.
        constant: log p(v, h) + P(x), shape ``(R,)``, nats; with a pull, log p(v, h) less its cost, + P(x).
        layout: where each latent stands in h; sparse positive ones are read as they are.
        shift: h - x, shape ``(F,)`` or ``(R, F)``.
        eliminated: what was eliminated; None for nothing.
    """

    problem: Problem
    constant: Tensor
    layout: Layout
    shift: Tensor
    eliminated: Eliminated | None = None

    def cold_start(self, program: Program, blocks: Sequence[Block]) -> Tensor:
        """The mode of sparse priors, and the median of others where log p(v, h) is not quadratic, ``(R, F)``."""
        rate = self.problem.rate
        zero = self.constant.new_zeros(self.problem.num_rows, rate.shape[-1])
        if not isinstance(self.problem, ProgramProblem):
            return zero
        return torch.where(rate > 0, zero, self.to_x(cold_parameters(program, blocks), blocks))

    def to_x(self, params: Parameters, blocks: Sequence[Block]) -> Tensor:
        """The x ``(R, F)`` of the points."""
        plain = Layout(self.layout.rows, [b.site for b in blocks])
        values = {b.site.name: b.site.from_features(plain.from_rows(params[b.name], b.site)) for b in blocks}
        x = self.layout.flatten(values) - self.shift
        return x if self.eliminated is None else self.eliminated.reduce(x)

    def to_params(self, x: Tensor, blocks: Sequence[Block]) -> Parameters:
        """The parameters ``(R, M, P)`` of the points at x."""
        whole = x if self.eliminated is None else self.eliminated.complete(x)
        # Bit by bit x where there is no shift: adding 0 would cost a pass.
        h = whole + self.shift if bool((self.shift != 0).any()) else whole
        values: Mapping[str, Any] = self.layout.values(h)
        plain = Layout(self.layout.rows, [b.site for b in blocks])
        return {b.name: plain.to_rows(point_features(b.site, values[b.site.name]), b.site) for b in blocks}


def quadratic_point_problem(program: Program, pull: Pull | None = None) -> PointProblem:
    """The lasso of every row, with a pull where one is given; unpenalised latents are eliminated.

    Raises:
        NotQuadraticError: log p(v, h) is not quadratic beside sparse priors.
        NotFiniteError: log p(v, h) is not finite.
        SolverError: no unique maximum in the unpenalised latents.
    """
    form = penalized_form(program)
    problem, constant, shift = form.problem, form.constant, form.penalties.shift
    if pull is not None:
        problem, constant = pull.on_lasso(problem, constant, shift)
    _check_concave(problem)
    eliminated = Eliminated.of(problem)
    if eliminated is not None:
        problem, constant = eliminated.problem, constant - eliminated.offset
    return PointProblem(problem, constant, form.penalties.layout, shift, eliminated)


def _check_concave(problem: PenalizedQuadratic) -> None:
    """Refuse a log p(v, h) that bends upwards somewhere: stationary points would pass for maxima.

    Raises:
        SolverError: as above.
    """
    least, largest = problem.spread
    if bool((least < -CONVEX * torch.finfo(least.dtype).eps * largest).any()):
        raise SolverError(
            f"Expected log p(v, h) to be concave in h, but got a second derivative of {float(-least.min()):.3g} along "
            "some direction: it has no maximum, or one that no solver finds for sure. Look for a sign in the program."
        )


def program_point_problem(program: Program, pull: Pull | None = None) -> PointProblem:
    """The program itself: Laplace priors peeled off, everything else on the real line; a pull is added to it.

    Raises:
        SolverError: a Laplace prior that depends on another latent.
    """
    # Cold starts and rates are those of the present theta.
    program.refresh()
    names = laplace_sites(program)
    for site in program.latents:
        if is_laplace(site) and site.name not in names:
            raise SolverError(
                f"Expected a Laplace prior with fixed loc and scale, but got that of {site.name!r}, which depends on "
                "another latent or is masked: log p(v, h) has a kink that moves. Use `e_step=Gradient(optim)`, or "
                "write it as a scale mixture of Normals."
            )
    layout = penalty_layout(program, names)
    count = program.rows.count
    if not names:
        zero = program.number.new_zeros(layout.num_features)
        return PointProblem(_program_problem(pull, program, layout), program.number.new_zeros(count), layout, zero)
    fns = {site.name: site.fn for site in program.latents}
    penalties = Penalties.read(program, names, layout, fns)
    problem = _program_problem(pull, program, layout, shift=penalties.shift, rate=penalties.rate, skip=names)
    return PointProblem(problem, penalties.constant, layout, penalties.shift)


def _program_problem(pull: Pull | None, program: Program, layout: Layout, **settings: Any) -> ProgramProblem:
    if pull is None:
        return ProgramProblem(program, layout, **settings)
    return PulledProblem(pull, program, layout, **settings)


def point_problem(program: Program, pull: Pull | None = None) -> PointProblem:
    """The lasso of every row where log p(v, h) is one, else the program itself."""
    try:
        return quadratic_point_problem(program, pull)
    except (NotQuadraticError, NotFiniteError):
        # The density of a scale is 0 at h = 0, and yet has a maximum.
        return program_point_problem(program, pull)


def solved_directly(problem: Problem) -> Solution:
    """The solution of a problem from which everything was eliminated."""
    zero = torch.zeros(problem.num_rows, dtype=problem.rate.dtype, device=problem.rate.device)
    steps, done = zero.long(), torch.ones_like(zero, dtype=torch.bool)
    return Solution(zero.new_zeros(problem.num_rows, 0), zero, zero.clone(), steps, done)
