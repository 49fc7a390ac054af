"""Whether a guide fits a model, site by site: mismatches are errors here, where Pyro only warns."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta
from pyro.poutine import Trace

from pyro_ext.rows import is_factor, is_visible, sample_sites
from pyro_ext.sites import kind_of


def check_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Check that a guide draws the latent sites of a model, all of them and no others, with a density.

    Args:
        model_trace: trace of the model, replayed on the guide's.
        guide_trace: trace of the guide.

    Raises:
        ValueError: nothing is visible, a site is missing or too many, a plate stands at another dimension,
            or a continuous site has a Delta factor (other than one that transforms an auxiliary site).
    """
    model_sites, drawn = dict(sample_sites(model_trace)), _drawn(guide_trace)
    if not any(is_visible(site) for site in model_sites.values()):
        raise ValueError(
            "Expected a model with a visible site, but got one in which nothing is observed. "
            "Pass the data, and give it to `pyro.sample(..., obs=...)` in the model."
        )
    latent = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    missing = sorted(latent.keys() - drawn.keys())
    if missing:
        raise ValueError(
            f"Expected a guide that draws every latent site of the model, but got one without {missing}. "
            "Add `pyro.sample` statements of these names to the guide."
        )
    auxiliary = _auxiliary(drawn)
    extra = sorted(drawn.keys() - latent.keys() - auxiliary)
    if extra:
        raise ValueError(
            f"Expected a guide that draws latent sites of the model only, but got {extra} beside them. "
            "Remove them, or mark them by infer={'is_auxiliary': True}."
        )
    _check_plates(model_sites, drawn)
    # A Delta that transforms an auxiliary draw is no point mass: Pyro's AutoNormal is written so.
    points = [n for n in _deltas(drawn) if n in latent and not kind_of(latent[n]["fn"]).is_discrete]
    if points and not auxiliary:
        raise ValueError(
            f"Expected factors with a density, but got a Delta on the continuous sites {points}: "
            "the entropy of a point mass is -inf, and so is L. Give these sites another family."
        )


def check_sleep(model_trace: Trace, guide_trace: Trace) -> None:
    """Check that the model can be dreamt from and that the guide gives a dream a density.

    Raises:
        ValueError: the model holds ``pyro.factor`` statements, or the guide Delta or auxiliary sites.
    """
    factors = [name for name, site in sample_sites(model_trace) if is_factor(site)]
    if factors:
        raise ValueError(
            f"Expected a model that can be sampled for the sleep phase, but got the pyro.factor sites {factors}, "
            "which sampling ignores. Write them as distributions, or use insomnia=1."
        )
    check_density(guide_trace, "any dream", "Use Amortized, or insomnia=1.")


def check_density(guide_trace: Trace, where: str, remedy: str = "Use Amortized, or FromGuide().") -> None:
    """Check that the guide has a density at latents that it did not draw itself.

    Args:
        guide_trace: trace of the guide.
        where: what drew these latents, in words.
        remedy: what the error advises.

    Raises:
        ValueError: the guide holds Delta or auxiliary sites.
    """
    drawn = _drawn(guide_trace)
    refused = sorted(_auxiliary(drawn) | set(_deltas(drawn)))
    if refused:
        raise ValueError(
            f"Expected a guide with a density at {where}, but got the auxiliary or Delta sites {refused}. {remedy}"
        )


def _drawn(guide_trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in sample_sites(guide_trace) if not site["is_observed"]}


def _auxiliary(drawn: dict[str, Any]) -> set[str]:
    return {name for name, site in drawn.items() if site["infer"].get("is_auxiliary")}


def _deltas(drawn: dict[str, Any]) -> list[str]:
    found = []
    for name, site in drawn.items():
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, Delta):
            found.append(name)
    return found


def _check_plates(model_sites: dict[str, Any], drawn: dict[str, Any]) -> None:
    dims = {f.name: f.dim for site in model_sites.values() for f in site["cond_indep_stack"]}
    for name, site in drawn.items():
        for frame in site["cond_indep_stack"]:
            dim = dims.get(frame.name, frame.dim)
            if dim != frame.dim:
                raise ValueError(
                    f"Expected plate {frame.name!r} at dim={dim}, as in the model, but got dim={frame.dim} "
                    f"at site {name!r} of the guide. Write `dim={dim}` in the guide's plate."
                )
