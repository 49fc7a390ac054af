"""The form of a program whose latents are Markov chains: log p(v, h) step by step, without a matrix over all steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.forward_backward import times
from pyro_ext.layout import Layout
from pyro_ext.markov_chain import MarkovChain, features_to_paths, paths_to_features
from pyro_ext.program import Program
from pyro_ext.quadratic import (
    NotFiniteError,
    NotQuadraticError,
    random_states,
    rounding,
)
from pyro_ext.rest import hessian_product, read_rest
from pyro_ext.sites import Site, base_of


@dataclass(frozen=True)
class ChainForm:
    """log p(v, h) = c + sum_t (b_t'g_t + g_t'J_t g_t / 2) + sum_t g_{t-1}'A_t g_t per row, g_t all chains at step t.

    Attributes:
        constant: c, shape ``(R,)``, nats.
        linear: b, shape ``(R, T, G)``; the initial log-probabilities are part of b_1.
        coupling: J, symmetric, shape ``(1 or R, 1 or T, G, G)``; None where no two chains meet in the data.
        transitions: log A of each chain, shape ``(1 or R, 1 or T - 1, K, K)``.
        units: number of states K of each chain.
        layout: where each feature stands in a row's vector: chain by chain, step by step.
    """

    constant: Tensor
    linear: Tensor
    coupling: Tensor | None
    transitions: tuple[Tensor, ...]
    units: tuple[int, ...]
    layout: Layout

    @property
    def num_steps(self) -> int:
        """T."""
        return self.linear.shape[1]

    def log_joint(self, path: Tensor) -> Tensor:
        """log p(v, h) at paths ``(R, T, G)``, nats per row."""
        total = self.constant + (self.linear * path).sum((-1, -2))
        if self.coupling is not None:
            total = total + 0.5 * (times(path, self.coupling) * path).sum((-1, -2))
        for part, log_a in zip(path.split(self.units, -1), self.transitions, strict=True):
            total = total + (times(part[:, :-1], log_a) * part[:, 1:]).sum((-1, -2))
        return total


def are_chains(program: Program) -> bool:
    """Whether all latents of a row are Markov chains of the same length, independent in the prior."""
    latent = {site.name for site in program.latents}
    layout = Layout(program.rows, program.latents)
    return (
        all(site.is_chain and layout.copies(site) == 1 for site in program.latents)
        and len({site.event_shape[0] for site in program.latents}) == 1
        and not any(program.latent_parents(name) for name in latent)
        and all(program.trace.nodes[name]["mask"] is None for name in latent)
        and all(_is_plain(program, name) for name in latent)
    )


def _is_plain(program: Program, name: str) -> bool:
    node = program.trace.nodes[name]
    scale = torch.as_tensor(node["scale"] / program.rows.scale)
    return isinstance(_bare(node["fn"]), MarkovChain) and bool((scale == 1).all())


def _bare(fn: Any) -> Any:
    return fn.base_dist if isinstance(fn, torch.distributions.Independent) and not fn.reinterpreted_batch_ndims else fn


def chain_form(program: Program, *, create_graph: bool = False) -> ChainForm:
    """Extract b and J step by step from a program of Markov chains (`are_chains`), and test them on the support.

    The priors are read from their distributions. The rest is differentiated at h = 0; one product of the Hessian with a
    direction for each state, on at all steps, gives J of every step, if no step's data depend on another step's state,
    which a random direction verifies.

    Raises:
        NotQuadraticError: the rest is not quadratic here, or couples steps.
        NotFiniteError: log p(v, h) is not finite on the support.
    """
    layout = Layout(program.rows, program.latents)
    units = tuple(site.event_shape[1] for site in program.latents)
    steps = program.latents[0].event_shape[0]
    with torch.enable_grad():
        origin = program.origin(layout.num_features)
        rest = read_rest(program, layout, origin, {site.name for site in program.latents}, create_graph=create_graph)
        constant, linear = rest.constant, rest.linear
        if not bool(torch.isfinite(constant.sum() + linear.sum())):
            raise NotQuadraticError(_refusal(program))
        coupling = None
        if rest.differentiated is not None:
            coupling = _local_coupling(rest.differentiated, origin, units, steps)
            if coupling is not None:
                _check_local(rest.differentiated, origin, coupling, units, program)
                # What is equal, or zero, at the present theta may have another derivative in theta.
                coupling = coupling if create_graph else _shared(coupling.detach())
    fns = rest.fns
    initial, transitions = zip(*(_prior(site, fns[site.name], layout) for site in program.latents), strict=True)
    first = torch.cat([part.expand(program.rows.count, -1) for part in initial], -1)
    timed = features_to_paths(linear, units, steps)
    if create_graph or rest.differentiated is not None:
        timed = torch.cat([timed[:, :1] + first[:, None], timed[:, 1:]], 1)
    else:
        # What was read is this function's own.
        timed = timed.detach()
        timed[:, 0] += first.detach()
    transitions = tuple(log_a.to(timed) for log_a in transitions)
    if not create_graph:
        constant, timed = constant.detach(), timed.detach()
        transitions = tuple(log_a.detach() for log_a in transitions)
    form = ChainForm(constant, timed, coupling, transitions, units, layout)
    # What is linear by construction needs no test.
    if rest.differentiated is not None:
        _check(form, program)
    return form


def _refusal(program: Program) -> str:
    names = ", ".join(repr(site.name) for site in program.latents)
    return (
        f"Expected log p(v, h) to be quadratic in {names}, step by step, but it is not at the present theta. "
        "Use `e_step=Gradient(optim)`, or pyro.infer.SVI."
    )


def _local_coupling(linear: Tensor, origin: Tensor, units: tuple[int, ...], steps: int) -> Tensor | None:
    """J of each row and step; None where the gradient does not depend on the latents."""
    if not linear.requires_grad:
        return None
    columns = []
    for state in range(sum(units)):
        timed = origin.new_zeros(1, steps, sum(units))
        timed[..., state] = 1
        product = hessian_product(linear, origin, paths_to_features(timed, units).expand_as(origin))
        columns.append(features_to_paths(product, units, steps))
    coupling = torch.stack(columns, -1)
    return 0.5 * (coupling + coupling.mT)


def _shared(coupling: Tensor) -> Tensor | None:
    """J with sizes of 1 where rows or steps share it; None where it vanishes."""
    if not bool(coupling.any()):
        return None
    tolerance = rounding(coupling.dtype) * coupling.abs().amax()
    for dim in (0, 1):
        first = coupling.narrow(dim, 0, 1)
        if bool(((coupling - first).abs() <= tolerance).all()):
            coupling = first
    return coupling


def _check_local(linear: Tensor, origin: Tensor, coupling: Tensor, units: tuple[int, ...], program: Program) -> None:
    generator = torch.Generator().manual_seed(20190420)
    direction = torch.randn(origin.shape[-1], generator=generator, dtype=torch.float64).to(origin).expand_as(origin)
    with torch.no_grad():
        steps = program.latents[0].event_shape[0]
        timed = features_to_paths(direction, units, steps)
        product = features_to_paths(hessian_product(linear, origin, direction), units, steps)
        size = times(timed.abs(), coupling.abs()) + product.abs()
        if bool(((product - times(timed, coupling)).abs() > rounding(origin.dtype) * size.amax()).any()):
            raise NotQuadraticError(_refusal(program))


def _prior(site: Site, fn: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Initial log-probabilities ``(1 or R, K)`` and transitions ``(1 or R, 1 or T - 1, K, K)`` of one chain."""
    chain: MarkovChain = base_of(fn)
    found = []
    for value, depth in ((chain.initial_logits, 1), (chain.pairwise, 3)):
        if not bool(value.isfinite().all()):
            raise NotFiniteError(
                f"Expected a prior above 0 on every state of {site.name!r} (the proviso of 19.56), but got a hard "
                "zero. Keep probabilities inside (0, 1)."
            )
        batch = value.shape[: value.dim() - depth]
        tail = value.shape[value.dim() - depth :]
        if batch.numel() == 1:
            found.append(value.reshape((1,) + tail))
        else:
            flat = value.expand(site.batch_shape + tail).flatten(len(site.batch_shape))
            found.append(layout.to_rows(flat, site)[:, 0].reshape((-1,) + tail))
    return found[0], found[1]


def _check(form: ChainForm, program: Program) -> None:
    """Compare the form with log p(v, h) at random paths, every row another one."""
    generator = torch.Generator().manual_seed(20190419)
    count = program.rows.count
    for repeat in range(max(1, -(-4 // count))):
        flat = random_states(form.layout, count, generator, first=repeat * count).to(form.linear)
        with torch.no_grad():
            truth = program.log_joint(form.layout.values(flat)).reshape(count)
            if not bool(truth.isfinite().all()):
                row = int((~truth.isfinite()).nonzero()[0])
                raise NotFiniteError(
                    "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got log p = "
                    f"{float(truth[row]):g} in row {row}. Look for NaN in the data and in the parameters, and keep "
                    "probabilities inside (0, 1)."
                )
            path = features_to_paths(flat, form.units, form.num_steps)
            size = form.constant.abs() + (form.linear * path).abs().sum((-1, -2)) + truth.abs()
            if bool(((truth - form.log_joint(path)).abs() > rounding(truth.dtype) * (1 + size)).any()):
                raise NotQuadraticError(_refusal(program))
