"""A warning for the pathological solution of MAP learning: parameters grow, points shrink (after 19.16)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.program import Program
from pyro_ext.sites import Kind
from pyro_ext.snapshot import rng_state, set_rng_state
from pyro_ext.steps import Call, EResult

FACTORS = 1.01, 10.0, 100.0, 1000.0

MODULE_SEPARATOR = "$$$"
"""What Pyro's store writes between the name of a module and that of its parameter."""

ROUNDING = 4
"""Rises below so many units of rounding, relative to the sum of the rows' sizes, are none."""


class UnboundedWarning(UserWarning):
    """log p(v, h) rises as a parameter grows and the points of h shrink: it has no maximum."""


def warn_if_unbounded(call: Call, result: EResult) -> None:
    """Warn where log p(v, h) has no maximum in theta and the points together.

    For every learnable real parameter W of the model, log p(v, h) at (c W, h / c) is compared for c = 1, 1.01, 10, 100
    and 1000, h being the points on real latents. Nothing is said unless it rises each time, by more than rounding, and
    does not do so at (W, h / c): then the points are not at their best yet, and tell nothing. Constrained parameters,
    and q that are no points throughout, are not looked at.

    Parameters, points and random generators are left as they were.

    Args:
        call: the model, guide and data.
        result: that of the E-step.

    Warns:
        UnboundedWarning: naming the parameter and the sites.
    """
    posterior = result.posterior
    real = [site.name for site in call.program.latents if site.kind is Kind.REAL]
    if not real or not all(block.factor.is_point for block in posterior.blocks):
        return
    state = rng_state()
    try:
        with torch.no_grad(), poutine.block():
            found = _unbounded(call.program, _points(result), real)
    finally:
        set_rng_state(state)
    sites = ", ".join(map(repr, real))
    for name in (name.replace(MODULE_SEPARATOR, ".") for name in found):
        warnings.warn(
            f"Expected log p(v, h) with a maximum, but it rises as {name!r} grows and the points of {sites} shrink "
            f"(Deep Learning, after 19.16). Constrain the norm of {name!r}, give it a prior (weight decay), or use a "
            "guide with an entropy.",
            UnboundedWarning,
            stacklevel=2,
        )


def _points(result: EResult) -> dict[str, Tensor]:
    if result.posterior.static:
        return result.posterior.mode()
    # A point's draw is the point.
    return {name: value[0] for name, value in result.posterior.sample(1).items()}


def _unbounded(program: Program, values: Mapping[str, Tensor], real: list[str]) -> list[str]:
    """The parameters that log p rises with."""
    with poutine.trace(param_only=True) as capture:
        start = program.log_joint(values)
    parameters = _real_parameters(capture.trace.nodes)

    def rises(tensor: Tensor | None) -> bool:
        """Whether log p rises from each factor to the next; with a tensor that grows, or with the points alone."""
        last = start
        for factor in FACTORS:
            shrunk = {n: v / factor if n in real else v for n, v in values.items()}
            with _scaled(tensor, factor):
                try:
                    present = program.log_joint(shrunk)
                except (ValueError, RuntimeError):
                    # A program that cannot be run out there has an end.
                    return False
            if not _is_above(present, last):
                return False
            last = present
        return True

    if not parameters or rises(None):
        return []
    return [name for name, tensor in parameters.items() if rises(tensor)]


def _real_parameters(nodes: Any) -> dict[str, Tensor]:
    """The learnable parameters without a constraint that a run of the model showed, by name."""
    held = pyro.get_param_store()._constraints
    found: dict[str, Tensor] = {}
    for name, site in nodes.items():
        if site["type"] != "param":
            continue
        constraint = held.get(name, site["kwargs"].get("constraint", constraints.real))
        while isinstance(constraint, constraints.independent):
            constraint = constraint.base_constraint
        tensor = cast("Tensor", site["value"].unconstrained())
        if isinstance(constraint, type(constraints.real)) and tensor.is_floating_point() and tensor.requires_grad:
            found[name] = tensor
    return found


def _is_above(present: Tensor, last: Tensor) -> bool:
    """Whether the sum over rows rose by more than rounding; what is not finite did not."""
    size = torch.maximum(last.abs(), present.abs()).sum(dtype=torch.float64)
    rise = (present.double() - last.double()).sum()
    return bool(rise > ROUNDING * torch.finfo(last.dtype).eps * size)


@contextmanager
def _scaled(tensor: Tensor | None, factor: float) -> Generator[None]:
    """The parameter times a factor, for as long as this lasts; its own memory is not touched."""
    if tensor is None:
        yield
        return
    own = tensor.data
    try:
        tensor.data = own * factor
        yield
    finally:
        tensor.data = own
