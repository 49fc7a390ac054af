"""How good is it: log p(v), exact where the states allow, else a stochastic lower bound with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.chain_form import are_chains, chain_form
from pyro_ext.chains import Chains
from pyro_ext.checks import check_data_of
from pyro_ext.choose import choose_evaluator
from pyro_ext.draws import (
    chunks,
    continuous_points,
    draw,
    posterior_of,
    refuse_continuous_points,
    row_width,
    unchanged_if_refused,
)
from pyro_ext.elbo_terms import terms_of
from pyro_ext.evaluators import (
    MAX_STATES,
    NoEvaluatorError,
    can_enumerate,
    check_rows_apart,
    latent_units,
)
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError, QuadraticForm, holds_at, quadratic_form
from pyro_ext.rows import sample_sites
from pyro_ext.sites import Kind
from pyro_ext.states import enumerate_states

STATES_CHUNK = 2**24

MAX_JOINT_STATES = 256
"""Most joint states of several chains at one step: forward-backward takes the square of them."""


@dataclass(frozen=True)
class Evidence:
    """log p(v) of each row.

    Attributes:
        log_evidence: ``rows.shape``, nats: log p(v), or a stochastic lower bound on it (below in expectation).
        standard_error: Monte-Carlo standard error of each row's number, nats; 0 where exact. It is the
            estimator's error, not the spread over the data.
        exact: whether `log_evidence` is log p(v) itself.
        bound: L of the guide for the same rows, from the same samples where not exact, nats; None without guide.
        effective_sample_size: (sum w)^2 / sum w^2 of the importance weights per row; None where exact.
        num_samples: samples of q per row; 0 where exact.
    """

    log_evidence: Tensor
    standard_error: Tensor
    exact: bool
    bound: Tensor | None
    effective_sample_size: Tensor | None
    num_samples: int

    @property
    def mean(self) -> float:
        """Mean over the rows, nats per row."""
        return float(self.log_evidence.mean())

    @property
    def mean_standard_error(self) -> float:
        """Monte-Carlo standard error of `mean`, nats per row."""
        return float(self.standard_error.square().sum().sqrt() / self.standard_error.numel())

    @property
    def gap(self) -> Tensor | None:
        """log p(v) - L per row, nats: KL(q || p(h | v)) where exact (19.1)."""
        return None if self.bound is None else self.log_evidence - self.bound

    def __repr__(self) -> str:
        rows = self.log_evidence.numel()
        unit, count = ("nats per row", f", {rows} rows") if self.log_evidence.dim() else ("nats in total", "")
        if self.exact:
            text = f"log p(v) = {self.mean:.6g} {unit}, exact{count}"
        else:
            text = (
                f"log p(v) >= {self.mean:.6g} +- {self.mean_standard_error:.2g} {unit} in expectation{count}, "
                f"{self.num_samples} samples"
            )
            if self.effective_sample_size is not None:
                text += f" (effective: {float(self.effective_sample_size.median()):.3g})"
        if self.bound is not None:
            text += f"; L = {float(self.bound.mean()):.6g}"
        return f"Evidence({text})"


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *args: Any,
    num_samples: int = 1000,
    max_states: int = MAX_STATES,
    **kwargs: Any,
) -> Evidence:
    """log p(v) per row: exact by enumeration, forward-backward or Gaussian integral, else by importance sampling.

    With S samples h_s ~ q(h | v) and w_s = p(v, h_s) / q(h_s), the estimate log(1/S sum_s w_s) lies below
    log p(v) in expectation and rises with S (Burda, Grosse & Salakhutdinov, 2016). Its standard error is that of
    the delta method, sd(w) / (mean(w) sqrt(S)): trust it only where the effective sample size is not tiny.

    Args:
        model: any Pyro model; its rows are the plates that all sites share.
        guide: a guide of this project or any Pyro guide; None where enumeration is possible.
        *args: arguments of model and guide.
        num_samples: samples of q per row, S; drawn in chunks, so that memory stays bounded.
        max_states: most joint states of a row that are enumerated.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Evidence, in nats per row.

    Raises:
        ValueError: num_samples below 1, bad data, a point mass on a continuous latent, a guide that cannot infer
            these data, no guide where one is needed, or rows that see a subsample of their elements only.
            Parameters that a refused call brought into being are removed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> log_evidence(model, None, torch.zeros(2)).log_evidence
        tensor([-1.1380, -1.1380])
    """
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"Expected num_samples of at least 1, but got {num_samples!r}. Use 100 or more.")
    with unchanged_if_refused(guide), poutine.block(), torch.no_grad():
        check_data_of(model, args, kwargs)
        program = Program.with_fresh_rows(model, args, kwargs)
        _refuse_subsampled_rows(program)
        sums = _sums_over_paths(program)
        if sums is not None:
            return _exact(sums, program, guide, num_samples)
        if can_enumerate(program, max_states):
            return _exact(_enumerated(program), program, guide, num_samples)
        integral = _gaussian_integral(program)
        if integral is not None:
            return _exact(integral, program, guide, num_samples)
        if guide is None:
            raise ValueError(
                "Expected a guide, for the latents can neither be enumerated nor integrated, but got None. "
                "Pass a fitted guide to draw samples from."
            )
        return _sampled(program, guide, num_samples)


def _refuse_subsampled_rows(program: Program) -> None:
    """A row with a subsample inside has likelihoods to the power N/B, which integrate to no probability."""
    for _, site in sample_sites(program.trace):
        for frame in site["cond_indep_stack"]:
            if frame.name not in program.rows.names and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"Expected rows with all their elements, but got {frame.size} of {frame.full_size} elements of the "
                    f"plate {frame.name!r}, which some latent site is outside of. Evaluate without subsampling."
                )


def _refuse_nan(log_p: Tensor) -> None:
    if bool(torch.isnan(log_p).any()):
        raise ValueError(
            f"Expected log p(v, h) without NaN, but got NaN in {int(torch.isnan(log_p).sum())} of {log_p.numel()} "
            "rows. Look for NaN in the data and in the parameters; mask missing values."
        )


def _exact(value: Tensor, program: Program, guide: Callable[..., Any] | None, num_samples: int) -> Evidence:
    _refuse_nan(value)
    value = value.reshape(program.rows.shape)
    bound = None if guide is None else _bound(program, guide, num_samples)
    return Evidence(value, torch.zeros_like(value), True, bound, None, 0)


def _bound(program: Program, guide: Callable[..., Any], num_samples: int) -> Tensor | None:
    posterior = posterior_of(guide, program)
    if continuous_points(guide, posterior, program):
        return None
    exact = None if posterior is None or not posterior.static else _exact_bound(program, posterior)
    return terms_of(program, guide, posterior, num_samples).bound if exact is None else exact


def _exact_bound(program: Program, posterior: Posterior) -> Tensor | None:
    layout = Layout(program.rows, program.latents)
    try:
        evaluator = choose_evaluator(program, posterior.blocks)
    except (NoEvaluatorError, NotFiniteError):
        return None
    params = {b.name: layout.to_rows(posterior.conditioner(b, {}), program.site(b.site.name)) for b in posterior.blocks}
    return evaluator.bound(params).reshape(program.rows.shape)


def _enumerated(program: Program) -> Tensor:
    """log sum_h p(v, h) per row ``(R,)``, in chunks of states."""
    layout = Layout(program.rows, program.latents)
    states = enumerate_states(latent_units(layout), device=program.number.device).to(program.number.dtype)
    form = _form(program) if len(states) > 2 * layout.num_features else None
    per_state = program.rows.count * (1 if form is not None else max(row_width(program), layout.num_features))
    total = program.number.new_full((program.rows.count,), -math.inf)
    for part in states.split(max(1, STATES_CHUNK // max(1, per_state))):
        if form is not None:
            part = part.to(form.linear)
            log_joint = _form_at(form, part)
        else:
            flat = part[:, None, :].expand(len(part), program.rows.count, layout.num_features)
            log_joint = program.log_joint(layout.values(flat), num_particles=len(part)).reshape(len(part), -1)
        total = torch.logaddexp(total.to(log_joint), log_joint.logsumexp(0))
    if form is None:
        check_rows_apart(program, layout)
    return total


def _form(program: Program) -> QuadraticForm | None:
    try:
        return quadratic_form(program)
    except ValueError:  # not quadratic, or with states of probability 0, which are no obstacle to a sum
        return None


def _form_at(form: QuadraticForm, states: Tensor) -> Tensor:
    """The quadratic form of every row at common states ``(S, F)`` -> ``(S, R)``."""
    if form.coupling.dim() == 2:
        energy = 0.5 * ((states @ form.coupling) * states).sum(-1)[:, None]
    else:
        energy = 0.5 * torch.einsum("sf,rfg,sg->sr", states, form.coupling, states)
    return form.constant + states @ form.linear.mT + energy


def _sums_over_paths(program: Program) -> Tensor | None:
    """log of the sum over all paths of Markov chains, by forward-backward on their joint states."""
    if not are_chains(program):
        return None
    units = [site.event_shape[1] for site in program.latents]
    if math.prod(units) > MAX_JOINT_STATES:
        return None
    try:
        form = chain_form(program)
    except ValueError:  # not quadratic, or with hard zeros, which are no obstacle to enumeration and to sampling
        return None
    homogeneous = all(log_a.shape[1] == 1 for log_a in form.transitions)
    factor = MarkovChainFactor(units, form.num_steps, homogeneous=homogeneous)
    parts = tuple((site, tuple(range(site.num_features))) for site in program.latents)
    return Chains(form, [Block("chains", parts, factor)]).log_evidence()


def _gaussian_integral(program: Program) -> Tensor | None:
    """log of the integral of exp(c + b'h + h'Jh / 2) where all latents are real and the form is quadratic."""
    if any(site.kind is not Kind.REAL for site in program.latents):
        return None
    form = _form(program)
    if form is None:
        return None
    root, info = torch.linalg.cholesky_ex(-form.coupling)
    if bool((info != 0).any()):
        return None
    width = form.linear.shape[-1]
    solved = torch.linalg.solve_triangular(root, form.linear[..., None], upper=False).squeeze(-1)
    log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # The form must hold where the posterior lies: its mean is J^-1 b, its noise root^-T.
    back = root.mT.expand(form.linear.shape[:-1] + root.shape[-2:])
    for reach in (0.0, 1.0, 3.0):
        noisy = solved + reach * torch.randn(solved.shape, generator=torch.Generator().manual_seed(3)).to(solved)
        state = torch.linalg.solve_triangular(back, noisy[..., None], upper=True).squeeze(-1)
        if not holds_at(form, program, state):
            return None
    return form.constant + 0.5 * solved.square().sum(-1) - log_root + 0.5 * width * math.log(2 * math.pi)


def _sampled(program: Program, guide: Callable[..., Any], num_samples: int) -> Evidence:
    posterior = posterior_of(guide, program)
    refuse_continuous_points(guide, posterior, program, "log_evidence")
    log_sum = log_squares = total = None
    for size in chunks(program, num_samples):
        values, log_q = draw(guide, posterior, program, size)
        log_w = program.log_joint(values, num_particles=size) - sum(log_q.values())
        first, second, plain = log_w.logsumexp(0), (2 * log_w).logsumexp(0), log_w.sum(0)
        if log_sum is None or log_squares is None or total is None:
            log_sum, log_squares, total = first, second, plain
        else:
            log_sum, log_squares = torch.logaddexp(log_sum, first), torch.logaddexp(log_squares, second)
            total = total + plain
    if log_sum is None or log_squares is None or total is None:
        raise RuntimeError("Expected at least one sample, but drew none. Ask for num_samples of at least 1.")
    _refuse_nan(log_sum)
    size = (2 * log_sum - log_squares).exp()
    # var(w) / (S mean(w)^2), with Bessel's correction; one sample has no error to speak of.
    spread = (1 / size - 1 / num_samples).clamp_min(0) * (num_samples / max(num_samples - 1, 1))
    error = spread.sqrt() if num_samples > 1 else torch.full_like(size, math.nan)
    return Evidence(log_sum - math.log(num_samples), error, False, total / num_samples, size, num_samples)
