"""The terms of L: expected log-likelihood, KL of each latent site, entropy (19.7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.checks import check_data_of
from pyro_ext.choose import choose_evaluator
from pyro_ext.draws import chunks, draw, posterior_of, refuse_continuous_points, unchanged_if_refused
from pyro_ext.evaluators import NoEvaluatorError
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site, base_of

_CLASSES = torch.distributions.Bernoulli, torch.distributions.OneHotCategorical, torch.distributions.Categorical


@dataclass(frozen=True)
class ElboTerms:
    """L = E_q[log p(v | h)] - sum_s KL_s, per row, nats; H(q) beside it.

    Attributes:
        expected_log_likelihood: E_q[log p(v | h)], ``rows.shape``.
        kl: for each latent site E_q[log q_s - log p_s], ``rows.shape``; for an auxiliary site of a guide E_q[log q_s].
        entropy: H(q), ``rows.shape``.
        bound: L, ``rows.shape``.
        standard_error: Monte-Carlo standard error of `bound`, ``rows.shape``; 0 where exact, NaN for one sample.
        exact: whether all terms are exact.
    """

    expected_log_likelihood: Tensor
    kl: dict[str, Tensor]
    entropy: Tensor
    bound: Tensor
    standard_error: Tensor
    exact: bool

    def __repr__(self) -> str:
        parts = [
            f"L = {float(self.bound.mean()):.6g}",
            f"E_q[log p(v|h)] = {float(self.expected_log_likelihood.mean()):.6g}",
        ]
        parts += [f"KL[{name}] = {float(value.mean()):.6g}" for name, value in self.kl.items()]
        parts.append(f"H(q) = {float(self.entropy.mean()):.6g}")
        return f"ElboTerms({', '.join(parts)}; nats per row, {'exact' if self.exact else 'sampled'})"


def elbo_terms(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1000, **kwargs: Any
) -> ElboTerms:
    """Split L into its terms, exactly where an evaluator and closed forms serve, else by samples of q.

    Args:
        model: any Pyro model.
        guide: a guide of this project or any Pyro guide.
        *args: arguments of model and guide.
        num_samples: samples of q per row, where the terms are not exact.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: num_samples below 1, bad data, or a point mass on a continuous latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> terms = elbo_terms(model, MeanField(model), torch.zeros(2))
        >>> terms.bound, terms.kl["h"], terms.exact
        (tensor([-1.1689, -1.1689]), tensor([0., 0.]), True)
    """
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"Expected num_samples of at least 1, but got {num_samples!r}. Use 100 or more.")
    with unchanged_if_refused(guide), poutine.block(), torch.no_grad():
        check_data_of(model, args, kwargs)
        program = Program.with_fresh_rows(model, args, kwargs)
        posterior = posterior_of(guide, program)
        refuse_continuous_points(guide, posterior, program, "elbo_terms")
        return terms_of(program, guide, posterior, num_samples)


def terms_of(program: Program, guide: Callable[..., Any], posterior: Posterior | None, num_samples: int) -> ElboTerms:
    """The terms for a program that was traced and a posterior that was inferred already."""
    exact = None if posterior is None or not posterior.static else _exact(program, posterior)
    return _sampled(program, guide, posterior, num_samples) if exact is None else exact


def _exact(program: Program, posterior: Posterior) -> ElboTerms | None:
    kl = {}
    latent = {site.name for site in program.latents}
    for site in program.latents:
        if program.dependencies.get(site.name, set()) & latent:
            return None
        term = _closed_form_kl(program, posterior, site)
        if term is None:
            return None
        kl[site.name] = term
    layout = Layout(program.rows, program.latents)
    try:
        evaluator = choose_evaluator(program, posterior.blocks)
    except NoEvaluatorError:
        return None
    params = {b.name: layout.to_rows(posterior.conditioner(b, {}), program.site(b.site.name)) for b in posterior.blocks}
    bound = evaluator.bound(params).reshape(program.rows.shape)
    entropy = evaluator.entropy(params).reshape(program.rows.shape)
    likelihood = bound + sum(kl.values())
    return ElboTerms(likelihood, kl, entropy, bound, torch.zeros_like(bound), True)


def _closed_form_kl(program: Program, posterior: Posterior, site: Site) -> Tensor | None:
    """KL(q_s || p_s) per row where the block holds this site alone and E_q[log p_s] has a closed form."""
    blocks = [b for b in posterior.blocks if b.span(site.name) is not None]
    node = program.trace.nodes[site.name]
    if any(len(b.parts) > 1 for b in blocks) or node["mask"] is not None or node["scale"] != program.rows.scale:
        return None
    marginal, base = posterior[site.name], base_of(site.fn)
    if isinstance(base, _CLASSES) and not isinstance(site.fn, dist.MaskedDistribution):
        logits = base.logits.expand(site.batch_shape + site.real_shape)
        log_p = marginal.features.reshape(logits.shape) * logits
        if site.kind is Kind.BINARY:
            log_p = log_p - torch.nn.functional.softplus(logits)
        log_p = log_p.reshape(site.batch_shape + (-1,)).sum(-1)
        return -marginal.entropy() - posterior._to_rows(log_p, site)
    if site.kind is not Kind.REAL or len(blocks) != 1:
        return None
    q, p = marginal.distribution, site.fn
    if isinstance(q, dist.MultivariateNormal) and isinstance(base, dist.Normal) and len(site.event_shape) == 1:
        loc, scale = (x.expand(site.batch_shape + site.event_shape) for x in (base.loc, base.scale))
        p = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    try:
        kl = torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return None
    return posterior._to_rows(kl.expand(site.batch_shape), site)


def _sampled(program: Program, guide: Callable[..., Any], posterior: Posterior | None, num_samples: int) -> ElboTerms:
    means: dict[str, Tensor] = {}
    deviations = program.number.new_zeros(())
    seen = 0
    for size in chunks(program, num_samples):
        values, log_q = draw(guide, posterior, program, size)
        log_p = program.site_log_probs(values, num_particles=size)
        likelihood = sum((log_p[name] for name in program.visible), torch.zeros(()))
        # An auxiliary site of the guide has a density of its own and none in the model.
        found = {f"kl {n}": term - log_p[n] if n in log_p else term for n, term in log_q.items()}
        bound = likelihood - sum(found.values())
        found |= {"likelihood": likelihood, "bound": bound, "entropy": -sum(log_q.values(), torch.zeros(()))}
        new = {key: value.mean(0) for key, value in found.items()}
        # Deviations from each chunk's mean, joined (Chan et al., 1979): a sum of squares would cancel.
        deviations = deviations + (bound - new["bound"]).square().sum(0)
        if means:
            deviations = deviations + (new["bound"] - means["bound"]).square() * (seen * size / (seen + size))
            new = {key: torch.lerp(means[key], value, size / (seen + size)) for key, value in new.items()}
        means, seen = new, seen + size
    error = (deviations / (num_samples * max(num_samples - 1, 1))).sqrt()
    return ElboTerms(
        means["likelihood"],
        {key.removeprefix("kl "): value for key, value in means.items() if key.startswith("kl ")},
        means["entropy"],
        means["bound"],
        error if num_samples > 1 else torch.full_like(error, math.nan),
        False,
    )
