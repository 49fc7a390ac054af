"""From a Pyro program to the lasso of every row: sparse priors are peeled off, the rest is quadratic (19.14-19.16)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.penalties import Penalties, penalty_layout, sparse_sites
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.products import row_chunks
from pyro_ext.program import Program
from pyro_ext.quadratic import (
    NotFiniteError,
    NotQuadraticError,
    QuadraticForm,
    coupling_of,
    holds_on_support,
    rounding,
)
from pyro_ext.rest import gradient_at, read_rest
from pyro_ext.sites import Site, base_of


@dataclass(frozen=True)
class PenalizedForm:
    r"""-log p(v, h) of every row as a lasso in x = h - shift.

    .. math:: -\log p(v, h) = -constant + \tfrac12 x^\top G x - b^\top x + \sum_i rate_i |x_i|

    Attributes:
        problem: G, b and the rates.
        constant: shape ``(R,)``, nats: log p(v, h) at x = 0.
        penalties: the sparse priors, with the shift.
    """

    problem: PenalizedQuadratic
    constant: Tensor
    penalties: Penalties


def penalized_form(program: Program) -> PenalizedForm:
    """Find the lasso of every row in a program, and test it on the support.

    Laplace, exponential and half-normal priors that depend on no other latent are read from their distributions. The
    rest is differentiated as `quadratic_form` does.

    Args:
        program: the program; all its latents are continuous.

    Raises:
        NotQuadraticError: the rest is not quadratic, or a positive latent has another prior.
        NotFiniteError: log p(v, h) is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Laplace(0.0, 0.5))
        ...         pyro.sample("v", dist.Normal(3 * h, 1.0), obs=v)
        >>> form = penalized_form(Program(model, (torch.ones(2),), {}))
        >>> form.problem.quadratic, form.problem.linear.T, form.problem.rate
        (tensor([[9.]]), tensor([[3., 3.]]), tensor([2.]))
    """
    names = sparse_sites(program)
    layout = penalty_layout(program, names)
    for site in layout.sites:
        if site.kind.value != "real":
            raise NotQuadraticError(
                f"Expected real latents, or positive ones with an exponential or half-normal prior, but got the "
                f"{site.kind.value} site {site.name!r}. Use LBFGS() or Newton()."
            )
    for site in program.latents:
        if site.name not in names and not _has_quadratic_prior(site):
            raise NotQuadraticError(
                f"Expected log p(v, h) to be quadratic in {site.name!r} beside sparse priors, but it is not at the "
                "present theta: its own prior is neither Normal nor sparse. Use LBFGS() or Newton(), or FISTA() beside "
                "Laplace priors."
            )
    found = None
    if program.rows.count >= layout.num_features:
        found = _from_gradients(program, layout, names)
    form, fns = found or _from_products(program, layout, names)
    return _in_shifted(form, Penalties.read(program, names, layout, fns))


def _has_quadratic_prior(site: Site) -> bool:
    """Whether the log-density of a real site's prior is quadratic near its centre.

    Beside a likelihood of much larger numbers, rounding would hide in the whole that it is not.
    """
    if isinstance(base_of(site.fn), dist.Normal | dist.MultivariateNormal):
        return True
    generator = torch.Generator().manual_seed(20190424)
    direction = torch.randn(site.event_shape, generator=generator, dtype=torch.float64)
    steps = torch.arange(4.0, dtype=torch.float64).reshape((4,) + (1,) * (len(site.batch_shape) + direction.dim()))
    values = (steps * direction).expand((4,) + site.batch_shape + site.event_shape)
    with torch.no_grad(), pyro.validation_enabled(False):
        log_prob = site.fn.log_prob(values.to(torch.get_default_dtype())).double()
    third = log_prob[3] - 3 * log_prob[2] + 3 * log_prob[1] - log_prob[0]
    return bool((third.abs() <= 1e-4 * (1 + log_prob.abs().sum(0))).all())


def _from_products(program: Program, layout: Layout, names: frozenset[str]) -> tuple[QuadraticForm, Mapping[str, Any]]:
    """c, b and J by Hessian-vector products, tested on the support; and the distributions of the sparse sites.

    Raises:
        NotQuadraticError, NotFiniteError: see `penalized_form`.
    """
    with torch.enable_grad():
        origin = program.origin(layout.num_features)
        rest = read_rest(program, layout, origin, names)
        _check_finite(rest.constant, rest.linear)
        coupling = coupling_of(rest.differentiated, origin)
    coupling = 0.5 * (coupling + coupling.mT).detach()
    form = QuadraticForm(rest.constant.detach(), rest.linear.detach(), coupling, layout)
    fns = {name: rest.fns[name] for name in names}
    # Its graph is as large as several tables, and the test needs memory.
    del rest
    if not holds_on_support(form, program, skip=names):
        raise NotQuadraticError(
            f"Expected log p(v, h) to be quadratic in {', '.join(repr(site.name) for site in program.latents)} beside "
            "sparse priors, but it is not at the present theta. Use FISTA(), or LBFGS() where no prior is sparse."
        )
    return form, fns


def _from_gradients(
    program: Program, layout: Layout, names: frozenset[str]
) -> tuple[QuadraticForm, Mapping[str, Any]] | None:
    """As `_from_products`, for rows that share J and are at least as many as the features; None for others.

    The gradient of a quadratic function is b + J x: rows take turns in probing one feature each, far enough out that b
    costs no digits, and no graph of a gradient is kept. Other rows check that they have the same J.
    """
    count, width = program.rows.count, layout.num_features
    with torch.no_grad():
        x = program.number.new_zeros(count, width)
        constant, linear, fns = _value_and_gradient(program, layout, names, x)
        _check_finite(constant, linear)
        far = 2.0 ** math.ceil(math.log2(64 * max(1.0, float(linear.abs().max()))))
        generator = torch.Generator().manual_seed(20190423)
        direction = torch.randn(width, generator=generator, dtype=torch.float64).to(x)
        number = torch.arange(width, device=x.device)
        x[number, number] = far
        x[width:] = direction
        _, gradient, _ = _value_and_gradient(program, layout, names, x)
        coupling = (gradient[:width] - linear[:width]) / far
        size = coupling.abs().max()
        if not bool(((coupling - coupling.mT).abs() <= rounding(x.dtype) * size).all()):
            return None
        coupling = 0.5 * (coupling + coupling.mT)
        along, size = coupling @ direction, coupling.abs() @ direction.abs()
        for rows in row_chunks(gradient[width:]):
            at = slice(rows.start + width, rows.stop + width)
            apart = (gradient[at] - linear[at] - along).abs()
            if not bool((apart <= rounding(x.dtype) * (size + linear[at].abs())).all()):
                return None
        del gradient, x
        form = QuadraticForm(constant, linear, coupling, layout)
        return (form, fns) if holds_on_support(form, program, skip=names) else None


def _value_and_gradient(
    program: Program, layout: Layout, names: frozenset[str], x: Tensor
) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """The rest of log p ``(R,)`` and its gradient ``(R, F)`` at x, and the distributions of the sparse sites."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total, fns = program.evaluate(layout.values(x), skip=names)
        # The others hold tensors as large as the data.
        fns = {name: fns[name] for name in names}
        value = total.reshape(program.rows.count)
        gradient = gradient_at(value.sum(), x)
    return value.detach(), gradient, fns


def _check_finite(constant: Tensor, linear: Tensor) -> None:
    if not bool(torch.isfinite(constant.sum() + linear.sum())):
        raise NotFiniteError(
            "Expected p(v, h) above 0 and finite at h = 0, but got log p with values or slopes that are not. "
            "Look for NaN in the data and in the parameters."
        )


def _in_shifted(form: QuadraticForm, penalties: Penalties) -> PenalizedForm:
    """The form in x = h - shift, with the curvature of half-normal priors."""
    quadratic, linear, constant = -form.coupling, form.linear, form.constant + penalties.constant
    if bool((penalties.curvature != 0).any()):
        quadratic = quadratic + torch.diag_embed(penalties.curvature)
    shift = penalties.shift
    if bool((shift != 0).any()):
        shift = shift.expand_as(linear)
        product = shift @ quadratic if quadratic.dim() == 2 else (quadratic @ shift.unsqueeze(-1)).squeeze(-1)
        constant = constant + (linear * shift).sum(-1) - 0.5 * (product * shift).sum(-1)
        linear = linear - product
    problem = PenalizedQuadratic(quadratic, linear, penalties.rate, penalties.nonnegative)
    return PenalizedForm(problem, constant, penalties)
