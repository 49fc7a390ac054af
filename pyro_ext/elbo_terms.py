"""The terms of L: expected log-likelihood, KL of each latent site, entropy (19.7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from pyro_ext.blocks import GuideBernoulli, GuideCategorical, GuideOneHot
from pyro_ext.checks import check_data_of
from pyro_ext.choose import choose_evaluator
from pyro_ext.distributions import SiteDistribution
from pyro_ext.draws import _SameRows, chunks, draw, posterior_of, refuse_continuous_points, unchanged_if_refused
from pyro_ext.evaluators import NoEvaluatorError
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.rows import sample_sites
from pyro_ext.sites import Kind, Site, base_of

_CLASSES = torch.distributions.Bernoulli, torch.distributions.OneHotCategorical, torch.distributions.Categorical
_OURS = GuideBernoulli, GuideOneHot, GuideCategorical, SiteDistribution


@dataclass(frozen=True)
class ElboTerms:
    """L = E_q[log p(v | h)] - sum_s KL_s, per row, nats; H(q) beside it.

    For a variational autoencoder: reconstruction less KL(q(h | v) || p(h)).

    Attributes:
        expected_log_likelihood: E_q[log p(v | h)], ``rows.shape``.
        kl: for each latent site E_q[log q_s - log p_s], ``rows.shape``; for an auxiliary site of a guide E_q[log q_s].
        entropy: H(q), ``rows.shape``.
        bound: L, ``rows.shape``.
        standard_error: Monte-Carlo standard error of `bound`, ``rows.shape``; 0 where exact, NaN for one sample.
            Where every KL is in closed form it is that of `expected_log_likelihood` too.
        exact: whether all terms are exact.
        closed_form_kl: the latents whose KL is in closed form, without an error; all of them where `exact`.
        closed_form_entropy: whether `entropy` is in closed form.
    """

    expected_log_likelihood: Tensor
    kl: dict[str, Tensor]
    entropy: Tensor
    bound: Tensor
    standard_error: Tensor
    exact: bool
    closed_form_kl: frozenset[str]
    closed_form_entropy: bool

    def __repr__(self) -> str:
        parts = [
            f"L = {float(self.bound.mean()):.6g}",
            f"E_q[log p(v|h)] = {float(self.expected_log_likelihood.mean()):.6g}",
        ]
        closed = [f"KL[{name}]" for name in self.kl if name in self.closed_form_kl]
        closed += ["H(q)"] if self.closed_form_entropy else []
        parts += [f"KL[{name}] = {float(value.mean()):.6g}" for name, value in self.kl.items()]
        parts.append(f"H(q) = {float(self.entropy.mean()):.6g}")
        how = "exact" if self.exact else "sampled" + (f" but for {', '.join(closed)}" if closed else "")
        return f"ElboTerms({', '.join(parts)}; nats per row, {how})"


def elbo_terms(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1000, **kwargs: Any
) -> ElboTerms:
    """Split L into its terms, exactly where an evaluator and closed forms serve, else by samples of q.

    Where no evaluator serves, the KL of a latent is still in closed form if torch or this project has one for the pair
    q_s, p_s and neither depends on other latents, as in a variational autoencoder with Gaussian latents, for any guide.
    L is then the mean of log p(v, h) - log q(h | v) over samples, and E_q[log p(v | h)] is L plus all KLs, for which
    log q - log p less its known mean is a control variate: near the posterior log p(v, h) - log q(h | v) hardly varies.

    Args:
        model: any Pyro model.
        guide: a guide of this project or any Pyro guide.
        *args: arguments of model and guide.
        num_samples: samples of q per row, where the terms are not exact.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: num_samples below 1, bad data, or a point mass on a continuous latent.

    Source: (19.7); the form with the KL is that of Kingma & Welling (2014), equation 10.

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
    kl = _closed_forms(program, posterior)
    if len(kl) < len(program.latents):
        return None
    layout = Layout(program.rows, program.latents)
    try:
        evaluator = choose_evaluator(program, posterior.blocks)
    except NoEvaluatorError:
        return None
    params = {b.name: layout.to_rows(posterior.conditioner(b, {}), program.site(b.site.name)) for b in posterior.blocks}
    bound = evaluator.bound(params).reshape(program.rows.shape)
    entropy = evaluator.entropy(params).reshape(program.rows.shape)
    likelihood = bound + sum(kl.values())
    return ElboTerms(likelihood, kl, entropy, bound, torch.zeros_like(bound), True, frozenset(kl), True)


def _closed_forms(program: Program, posterior: Posterior) -> dict[str, Tensor]:
    """The KLs in closed form, of a guide of this project, in the order of the program."""
    if not posterior.static:
        return {}
    free = [site for site in program.latents if not program.latent_parents(site.name)]
    found = ((site.name, _closed_form_kl(program, posterior, site)) for site in free)
    return {name: term for name, term in found if term is not None}


def _closed_form_kl(program: Program, posterior: Posterior, site: Site) -> Tensor | None:
    """KL(q_s || p_s) per row where the block holds this site alone and E_q[log p_s] has a closed form."""
    blocks = [b for b in posterior.blocks if b.span(site.name) is not None]
    node = program.trace.nodes[site.name]
    if any(len(b.parts) > 1 for b in blocks) or node["mask"] is not None or node["scale"] != program.rows.scale:
        return None
    marginal, base = posterior[site.name], base_of(site.fn)
    if _is_masked(site.fn):
        return None
    if isinstance(base, _CLASSES):
        logits = base.logits.expand(site.batch_shape + site.real_shape)
        log_p = marginal.features.reshape(logits.shape) * logits
        if site.kind is Kind.BINARY:
            log_p = log_p - torch.nn.functional.softplus(logits)
        log_p = log_p.reshape(site.batch_shape + (-1,)).sum(-1)
        return -marginal.entropy() - posterior._to_rows(log_p, site)
    if site.kind not in (Kind.REAL, Kind.CONSTRAINED) or len(blocks) != 1:
        return None
    q, p = marginal.distribution, site.fn
    if site.kind is Kind.CONSTRAINED:
        # Both through the same bijection, as a LogNormal prior: the KL is that of the Gaussians before it.
        if not _transformed_alike(q, base):
            return None
        q, base = q.base_dist, base.base_dist
        p = base.expand(site.batch_shape + site.event_shape).to_event(len(site.event_shape))
    if isinstance(q, dist.MultivariateNormal) and isinstance(base, dist.Normal) and len(site.event_shape) == 1:
        loc, scale = (x.expand(site.batch_shape + site.event_shape) for x in (base.loc, base.scale))
        p = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    try:
        kl = torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return None
    return posterior._to_rows(kl.expand(site.batch_shape), site)


def _is_masked(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def _transformed_alike(q: Any, p: Any) -> bool:
    kind = torch.distributions.TransformedDistribution
    return isinstance(q, kind) and isinstance(p, kind) and _elementwise(q.transforms) == _elementwise(p.transforms)


def _elementwise(transforms: Sequence[Transform]) -> list[Transform]:
    """The steps of a bijection, without what only wraps them."""
    found: list[Transform] = []
    for step in transforms:
        if isinstance(step, IndependentTransform):
            found += _elementwise([step.base_transform])
        elif isinstance(step, ComposeTransform):
            found += _elementwise(step.parts)
        elif step != AffineTransform(0.0, 1.0):
            found.append(step)
    return found


def _closed_form_entropy(program: Program, posterior: Posterior) -> Tensor | None:
    if not posterior.static or any(site.kind is Kind.CONSTRAINED for site in program.latents):
        return None
    return posterior.entropy().expand(program.rows.shape)


def _of_users_guide(program: Program, guide: Callable[..., Any]) -> tuple[dict[str, Tensor], Tensor | None]:
    """KLs in closed form for a guide that is not of this project, and its entropy where that has one."""
    with poutine.block(), _SameRows(program), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
        nodes = dict(sample_sites(trace))
        # A lone latent reads none.
        found: Any = get_dependencies(guide, program.args, program.kwargs) if len(nodes) > 1 else None
    # Deltas, which hand on what auxiliary sites drew, are not listed.
    parents = {name: set() for name in nodes} if found is None else found["prior_dependencies"]
    kl: dict[str, Tensor] = {}
    entropies: list[Tensor] = []
    for name, q in nodes.items():
        if name not in parents or set(parents[name]) & (nodes.keys() - {name}):
            continue
        if q["mask"] is not None or _is_masked(q["fn"]):
            continue
        entropy, term = _entropy(q["fn"]), _kl_to_prior(program, name, q)
        if entropy is not None:
            entropies.append(_in_rows(program, entropy, q))
        if term is not None:
            kl[name] = _in_rows(program, term, q)
    ordered = {site.name: kl[site.name] for site in program.latents if site.name in kl}
    return ordered, sum(entropies[1:], entropies[0]) if len(entropies) == len(nodes) else None


def _in_rows(program: Program, term: Tensor, node: Mapping[str, Any]) -> Tensor:
    return program.rows.sum_to_rows(term * node["scale"]) / program.rows.scale


def _entropy(fn: Any) -> Tensor | None:
    try:
        return fn.entropy()
    except NotImplementedError:
        return None


def _kl_to_prior(program: Program, name: str, q: Mapping[str, Any]) -> Tensor | None:
    """KL(q_s || p_s), batch-shaped, of a site that no other latent conditions in either program."""
    p = program.trace.nodes.get(name)
    if p is None or program.latent_parents(name) or p["mask"] is not None or _is_masked(p["fn"]):
        return None
    # The KL of this project's own discrete factors, here inside another guide, is refused for the sake of Pyro's ELBOs.
    if not torch.equal(torch.as_tensor(p["scale"]), torch.as_tensor(q["scale"])) or isinstance(base_of(q["fn"]), _OURS):
        return None
    try:
        return torch.distributions.kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None


def _sampled(program: Program, guide: Callable[..., Any], posterior: Posterior | None, num_samples: int) -> ElboTerms:
    if posterior is None:
        closed, closed_entropy = _of_users_guide(program, guide)
    else:
        closed, closed_entropy = _closed_forms(program, posterior), _closed_form_entropy(program, posterior)
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
        found |= {"bound": bound, "entropy": -sum(log_q.values(), torch.zeros(()))}
        new = {key: value.mean(0) for key, value in found.items()}
        # Deviations from each chunk's mean, joined (Chan et al., 1979): a sum of squares would cancel.
        deviations = deviations + (bound - new["bound"]).square().sum(0)
        if means:
            deviations = deviations + (new["bound"] - means["bound"]).square() * (seen * size / (seen + size))
            new = {key: torch.lerp(means[key], value, size / (seen + size)) for key, value in new.items()}
        means, seen = new, seen + size
    error = (deviations / (num_samples * max(num_samples - 1, 1))).sqrt()
    kl = {key.removeprefix("kl "): value for key, value in means.items() if key.startswith("kl ")} | closed
    return ElboTerms(
        # The bound keeps its samples of log q - log p: a known mean in their place would make it noisier.
        means["bound"] + sum(kl.values()),
        kl,
        means["entropy"] if closed_entropy is None else closed_entropy,
        means["bound"],
        error if num_samples > 1 else torch.full_like(error, math.nan),
        False,
        frozenset(closed),
        closed_entropy is not None,
    )
