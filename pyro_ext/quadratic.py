"""The quadratic rest of a program: log p(v, h) = c + b'h + h'Jh / 2 per row (19.56, design section 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.products import row_chunks
from pyro_ext.program import Program
from pyro_ext.rest import hessian_product, read_rest
from pyro_ext.sites import Kind, Site, base_of
from pyro_ext.states import enumerate_states
from pyro_ext.tracing import holds, is_tracing

MAX_ROW_COUPLINGS = 2**27
"""Most entries of couplings that are stored one matrix a row."""

MAX_DRAWS = 1022
"""Different random states of continuous latents in one test; no multiple of the number of REACHES."""

REACHES = (1.0, 3.0, 10.0)
"""How far out the quadratic form of a continuous latent is tested, in standard deviations of its prior."""


class NotQuadraticError(ValueError):
    """The program's log p(v, h) is no quadratic function of its latents."""


class NotFiniteError(ValueError):
    """log p(v, h) is NaN or infinite on the support: a hard zero of p, or parameters that are not finite."""


@dataclass(frozen=True)
class QuadraticForm:
    """log p(v, h) as a quadratic function of each row's latent features.

    Attributes:
        constant: c, shape ``(R,)``, nats.
        linear: b, shape ``(R, F)``; the natural parameters of peeled priors are part of it.
        coupling: J, symmetric, shape ``(F, F)`` when all rows share it, else ``(R, F, F)``.
        layout: where each feature stands.
    """

    constant: Tensor
    linear: Tensor
    coupling: Tensor
    layout: Layout

    def log_joint(self, flat: Tensor) -> Tensor:
        """c + b'h + h'Jh / 2 at ``h`` of shape ``leading + (R, F)``, nats per row."""
        product = (flat[..., None, :] @ self.coupling).squeeze(-2)
        return self.constant + (self.linear * flat).sum(-1) + 0.5 * (product * flat).sum(-1)


def quadratic_form(program: Program, *, create_graph: bool = False, num_tests: int = 4) -> QuadraticForm:
    """Extract c, b and J from any Pyro program, and test them on the support.

    Discrete priors that depend on no other latent are peeled off and read from their distribution;
    the rest is differentiated at h = 0. One product of the Hessian with a random direction shows whether all
    rows share J; one evaluation of log p(v, h) at states of the support, at the present theta, decides
    whether the result holds.

    Args:
        program: the program.
        create_graph: keep the graph to theta, for a gradient M-step.
        num_tests: least number of states that are compared.

    Raises:
        NotQuadraticError: log p(v, h) is not quadratic here, or a latent has no place in a quadratic form.
        NotFiniteError: log p(v, h) is not finite on the support (a hard zero of p, or NaN in the data or in theta).

    Example:
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(2 * h, 1.0), obs=v)
        >>> import pyro
        >>> form = quadratic_form(Program(model, (torch.ones(3),), {}))
        >>> form.coupling
        tensor([[-5.]])
    """
    for site in program.latents:
        if site.kind not in (Kind.BINARY, Kind.ONE_HOT, Kind.REAL):
            raise NotQuadraticError(
                f"Expected binary, one-hot or real latents, but got the {site.kind.value} site {site.name!r}. "
                "Use `Gradient`, or pyro.infer.SVI."
            )
    layout = Layout(program.rows, program.latents)
    peeled = program.peelable

    with torch.enable_grad():
        origin = program.origin(layout.num_features)
        rest = read_rest(program, layout, origin, peeled, create_graph=create_graph)
        # One sum in place of a test of every entry: it is not finite where one of them is not.
        if not holds(torch.isfinite(rest.constant.sum() + rest.linear.sum())):
            raise NotQuadraticError(_not_quadratic(program))
        coupling = coupling_of(rest.differentiated, origin, create_graph)
    scales = {name: torch.as_tensor(program.trace.nodes[name]["scale"] / program.rows.scale) for name in peeled}
    constant, linear = rest.constant, rest.linear
    coupling = 0.5 * (coupling + coupling.mT)
    if not create_graph:
        constant, linear, coupling = constant.detach(), linear.detach(), coupling.detach()
    with torch.set_grad_enabled(create_graph):
        own = rest.differentiated is None and not create_graph
        constant, linear = add_priors(constant, linear, layout, rest.fns, scales, in_place=own)
    form = QuadraticForm(constant, linear, coupling, layout)
    # What is linear by construction, peeled priors beside it, needs no test.
    needs_test = rest.differentiated is not None or len(peeled) < len(layout.sites)
    if needs_test and not is_tracing() and not holds_on_support(form, program, num_tests):
        raise NotQuadraticError(_not_quadratic(program))
    return form


def _not_quadratic(program: Program) -> str:
    names = ", ".join(repr(site.name) for site in program.latents)
    discrete = all(site.kind.is_discrete for site in program.latents)
    remedy = "few enough states a row to enumerate them" if discrete else "`e_step=Gradient(optim)`"
    return (
        f"Expected log p(v, h) to be quadratic in {names} on their support, but it is not at the present theta. "
        f"Use {remedy}, or pyro.infer.SVI."
    )


def coupling_of(linear: Tensor | None, origin: Tensor, create_graph: bool = False) -> Tensor:
    """J, ``(F, F)`` where all rows share it, else ``(R, F, F)``, from the gradient at the origin with its graph."""
    if linear is None:
        return torch.zeros(origin.shape[1], origin.shape[1], dtype=origin.dtype, device=origin.device)
    coupling = _shared_coupling(linear, origin, create_graph)
    shared = _is_shared(coupling, linear, origin) and not (create_graph and _parts_with_theta(linear, origin))
    return coupling if shared else _row_couplings(linear, origin, create_graph)


def _shared_coupling(linear: Tensor, origin: Tensor, create_graph: bool) -> Tensor:
    """J from one Hessian-vector product per ``R`` features: each row probes another direction."""
    count, width = origin.shape
    found = []
    for start in range(0, width, count):
        probes = min(count, width - start)
        directions = torch.zeros_like(origin)
        directions[torch.arange(probes), start + torch.arange(probes)] = 1
        product = hessian_product(linear, origin, directions, create_graph=create_graph)[:probes]
        # A view would keep the products of all rows.
        found.append(product if create_graph else product.clone())
    return torch.cat(found, 0)


def _is_shared(coupling: Tensor, linear: Tensor, origin: Tensor) -> bool:
    """Whether one J serves all rows: states of the support could miss a row that differs, a direction cannot."""
    generator = torch.Generator().manual_seed(20190420)
    direction = torch.randn(origin.shape[-1], generator=generator, dtype=torch.float64).to(origin)
    with torch.no_grad():
        product = hessian_product(linear, origin, direction.expand_as(origin), create_graph=False)
        error = (product - coupling @ direction).abs_()
        size = product.abs().add_(coupling.abs() @ direction.abs())
        return holds((error <= size.mul_(rounding(origin.dtype))).all())


def _parts_with_theta(linear: Tensor, origin: Tensor) -> bool:
    """Whether rows that share J at the present theta would not share it at another.

    With w summing to 0 over the rows, the gradient in theta of sum_n w_n d'J_n d is 0 where theta moves all J_n alike.
    """
    count, width = origin.shape
    generator = torch.Generator().manual_seed(20190422)
    direction, weights = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(origin) for size in (width, count)
    )
    energy = hessian_product(linear, origin, direction.expand_as(origin)) @ direction
    theta = [tensor for _, tensor in pyro.get_param_store().named_parameters() if tensor.requires_grad]
    if count < 2 or not theta or not energy.requires_grad:
        return False

    def sizes(weights: Tensor) -> Tensor:
        total = (weights * energy).sum()
        found = torch.autograd.grad(total, theta, retain_graph=True, materialize_grads=True)
        return torch.stack([g.abs().max().to(origin) for g in found])

    weights = weights - weights.mean()
    apart, size = sizes(weights), sizes(weights.abs())
    noise = 100 * torch.finfo(origin.dtype).eps * size.sum()
    return bool((apart > rounding(origin.dtype) * size + noise).any())


def _row_couplings(linear: Tensor, origin: Tensor, create_graph: bool) -> Tensor:
    """J of every row, one Hessian-vector product a feature."""
    count, width = origin.shape
    if count * width * width > MAX_ROW_COUPLINGS:
        raise NotQuadraticError(
            f"Expected rows that share their couplings, but got {count} rows of {width} features that do not: too many "
            "to store one matrix a row. Use minibatches."
        )
    columns = []
    for i in range(width):
        direction = torch.zeros_like(origin)
        direction[:, i] = 1
        columns.append(hessian_product(linear, origin, direction, create_graph=create_graph))
    return torch.stack(columns, -1)


def add_priors(
    constant: Tensor,
    linear: Tensor,
    layout: Layout,
    fns: Mapping[str, Any],
    scales: Mapping[str, Tensor],
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add c and b of the peeled priors, scale by scale: log p_s(h_s) = const + natural' h_s.

    With ``in_place`` the sums are written over `linear`.
    """
    pieces = list(linear.split([layout.copies(s) * s.num_features for s in layout.sites], -1))
    for i, site in enumerate(layout.sites):
        if site.name not in scales:
            continue
        base, natural = (collapsed(x) for x in _natural(site, fns[site.name]))
        if not holds(torch.isfinite(natural).all()):
            raise NotFiniteError(
                f"Expected a prior above 0 on every state of {site.name!r} (the proviso of 19.56), but got a hard "
                "zero. Keep probabilities inside (0, 1)."
            )
        # The sample fn of the run may be unexpanded over plates; batch shapes broadcast.
        scale = scales[site.name].to(natural)
        base = (scale * base).expand(site.batch_shape)
        natural = (scale[..., None] * natural).expand(site.batch_shape + natural.shape[-1:])
        prior = layout.to_rows(natural, site).reshape(pieces[i].shape)
        pieces[i] = pieces[i].add_(prior) if in_place else pieces[i] + prior
        constant = constant + layout.to_rows(base[..., None], site).sum((-1, -2))
    return constant, pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def collapsed(value: Tensor) -> Tensor:
    """The value with a size of 1 in the dimensions that were expanded, where all entries are the same memory."""
    for dim in range(value.dim()):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value


def _natural(site: Site, fn: Any) -> tuple[Tensor, Tensor]:
    base = fn
    while isinstance(base, dist.Independent | torch.distributions.Independent):
        base = base.base_dist
    batch = fn.batch_shape
    if site.kind is Kind.BINARY:
        logits = base.logits.expand(batch + site.event_shape).reshape(batch + (site.num_features,))
        return -torch.nn.functional.softplus(logits).sum(-1), logits
    logits = base.logits.expand(batch + site.real_shape).reshape(batch + (site.num_features,))
    return logits.new_zeros(batch), logits


def holds_on_support(form: QuadraticForm, program: Program, num_tests: int = 4, *, skip: Collection[str] = ()) -> bool:
    """Compare the form with log p(v, h), without the sites in `skip`, at states of the support: one for every row."""
    layout = form.layout
    count = program.rows.count
    generator = torch.Generator().manual_seed(20190419)
    discrete = all(site.kind.is_discrete for site in layout.sites)
    repeats = max(1, -(-(num_tests if discrete else num_tests * len(REACHES)) // count))
    for repeat in range(repeats):
        flat = random_states(layout, count, generator, first=repeat * count).to(form.linear)
        with torch.no_grad():
            truth = program.log_joint(layout.values(flat), skip=skip).reshape(count)
            # Off h = 0 a continuous program may be undefined, and then it is just not quadratic.
            if not bool(torch.isfinite(truth if discrete else form.constant).all()):
                row = int((~torch.isfinite(truth + form.constant)).nonzero()[0])
                raise NotFiniteError(
                    "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got log p = "
                    f"{float(truth[row]):g} in row {row}. Look for NaN in the data and in the parameters, and keep "
                    "probabilities inside (0, 1)."
                )
            if not _agrees(form, flat, truth):
                return False
    return True


def holds_at(form: QuadraticForm, program: Program, flat: Tensor) -> bool:
    """Whether the form is log p(v, h) at given states ``(R, F)``: where q puts its mass, for example."""
    with torch.no_grad():
        return _agrees(form, flat, program.log_joint(form.layout.values(flat)).reshape(program.rows.count))


def _agrees(form: QuadraticForm, flat: Tensor, truth: Tensor) -> bool:
    # In chunks of rows: every product is as large as a table.
    for rows in row_chunks(flat):
        coupling = form.coupling if form.coupling.dim() == 2 else form.coupling[rows]
        part = QuadraticForm(form.constant[rows], form.linear[rows], coupling, form.layout)
        size = part.constant.abs() + (part.linear * flat[rows]).abs().sum(-1) + truth[rows].abs()
        error = (truth[rows] - part.log_joint(flat[rows])).abs()
        if not bool((error <= rounding(form.linear.dtype) * (1 + size)).all()):
            return False
    return True


def _prior_moments(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a real latent's prior; 0 and 1 where it has none.

    Both are ``batch + (F,)``, with batch dimensions of size 1 where these are known to be alike.
    """
    base = base_of(site.fn)
    depth = len(site.fn.batch_shape)
    if isinstance(base, dist.Normal | dist.Laplace) and base.loc.dim() == depth + len(site.event_shape):
        # Expanded numbers stay few; the factor between a scale and a standard deviation does not matter here.
        few = (collapsed(given.detach()) for given in (base.loc, base.scale))
        loc, scale = (x.expand(x.shape[:depth] + site.event_shape).reshape(x.shape[:depth] + (-1,)) for x in few)
        return loc, scale
    found = []
    for name, default in (("mean", 0.0), ("stddev", 1.0)):
        value = torch.full(site.batch_shape + site.event_shape, default)
        with contextlib.suppress(NotImplementedError, AttributeError):
            given = getattr(site.fn, name).detach().expand(value.shape)
            value = torch.where(given.isfinite(), given, value.to(given))
        found.append(value.reshape(site.batch_shape + (-1,)))
    return found[0], found[1]


def rounding(dtype: torch.dtype) -> float:
    """Relative difference of two log-densities that is rounding."""
    return 1e-9 if dtype == torch.float64 else 2e-4


def random_states(layout: Layout, count: int, generator: torch.Generator, *, first: int) -> Tensor:
    """Random states ``(count, F)``; all binary units are on in every second row, where no product of units hides."""
    every_second = ((torch.arange(count) + first) % 2 == 0)[:, None]
    pieces = []
    for site in layout.sites:
        copies = layout.copies(site)
        if site.kind is Kind.ONE_HOT:
            groups = site.num_features // site.num_classes
            states = enumerate_states([site.num_classes])
            picks = torch.randint(site.num_classes, (count, copies * groups), generator=generator)
            pieces.append(states[picks].reshape(count, -1))
        elif site.kind is Kind.BINARY:
            bits = torch.randint(2, (count, copies * site.num_features), generator=generator).double()
            pieces.append(torch.where(every_second, 1.0, bits))
        else:
            # Rows differ in their data: past some, the draws may come again.
            draws = torch.randn(
                min(count, MAX_DRAWS), copies * site.num_features, generator=generator, dtype=torch.float64
            )
            loc, scale = (layout.to_rows(x, site).reshape(count, -1) for x in _prior_moments(site))
            # A kink or a bend may lie far out: rows take turns in how far they reach.
            reach = torch.tensor(REACHES)[(torch.arange(count) + first) % len(REACHES)].to(loc)
            piece = draws.to(loc).repeat(-(-count // MAX_DRAWS), 1)[:count]
            pieces.append(piece.mul_(reach[:, None]).mul_(scale.to(loc)).add_(loc))
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.double().cpu() for piece in pieces], -1)
