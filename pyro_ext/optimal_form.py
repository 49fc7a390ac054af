"""The form of the optimal factor of each continuous latent, found from the program (19.56, 19.62-19.67)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site

CHUNK_ELEMENTS = 2**22
NUM_REDRAWS = 3


@dataclass(frozen=True)
class _Family:
    """An exponential family: q(h) proportional to exp(sum_i c_i T_i(h)).

    Attributes:
        distribution: Pyro's distribution.
        names: what T_1, T_2, ... are.
        statistics: T of values ``(..., width)``, stacked last.
        is_proper: whether coefficients ``(..., P)`` can be normalised.
    """

    distribution: type[dist.Distribution]
    names: tuple[str, ...]
    statistics: Callable[[Tensor], Tensor]
    is_proper: Callable[[Tensor], Tensor]


def _pair(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.cat([first(h), second(h)], -1)


_NORMAL = _Family(dist.Normal, ("h", "h^2"), _pair(lambda h: h, torch.square), lambda c: c[..., 1] < 0)
_POSITIVE = (
    _Family(dist.Gamma, ("log h", "h"), _pair(torch.log, lambda h: h), lambda c: (c[..., 0] > -1) & (c[..., 1] < 0)),
    _Family(
        dist.InverseGamma,
        ("log h", "1 / h"),
        _pair(torch.log, torch.reciprocal),
        lambda c: (c[..., 0] < -1) & (c[..., 1] < 0),
    ),
    _Family(
        dist.LogNormal,
        ("log h", "(log h)^2"),
        _pair(torch.log, lambda h: h.log().square()),
        lambda c: c[..., 1] < 0,
    ),
)
_BETA = _Family(
    dist.Beta, ("log h", "log(1 - h)"), _pair(torch.log, lambda h: torch.log1p(-h)), lambda c: (c > -1).all(-1)
)


def _dirichlet(num_classes: int) -> _Family:
    names = tuple(f"log h_{k + 1}" for k in range(num_classes))
    return _Family(dist.Dirichlet, names, torch.log, lambda c: (c > -1).all(-1))


@dataclass(frozen=True)
class OptimalForm:
    r"""The family of the factor q(h_i) that (19.56) gives one unit of a latent site.

    .. math:: \tilde q(h_i) = \exp\Big(\sum_j E_{q_{-i}}[c_j(v, h_{-i})]\, T_j(h_i)\Big)

    Attributes:
        site: name of the site; a unit is one of its numbers, or one probability vector on a simplex.
        family: Pyro's distribution with these statistics; None where no known family fits.
        statistics: names of T_1, T_2, ...; empty without a family.
        depends_on: for each statistic the latent sites that its coefficient c_j changes with (the site itself: with
            its other units).
        varies: for each statistic whether c_j differs from row to row, or from unit to unit.
        coefficients: c at one draw of the other latents, ``(R, units, P)``; None without a family.
        reason: why there is no family; empty where there is one.
    """

    site: str
    family: type[dist.Distribution] | None
    statistics: tuple[str, ...] = ()
    depends_on: dict[str, tuple[str, ...]] = field(default_factory=dict)
    varies: dict[str, bool] = field(default_factory=dict)
    coefficients: Tensor | None = None
    reason: str = ""

    def __repr__(self) -> str:
        if self.family is None:
            return f"OptimalForm({self.site!r}: None, {self.reason})"
        letters = [f"c{i + 1}" for i in range(len(self.statistics))]
        exponent = " + ".join(f"{c} {name}" for c, name in zip(letters, self.statistics, strict=True))
        notes = [f"{c} {self._note(name)}" for c, name in zip(letters, self.statistics, strict=True)]
        return f"OptimalForm({self.site!r}: {self.family.__name__}, exp({exponent}); {', '.join(notes)})"

    def _note(self, name: str) -> str:
        causes = ["varies"] if self.varies[name] else []
        if self.depends_on[name]:
            causes.append("depends on " + ", ".join(map(repr, self.depends_on[name])))
        return " and ".join(causes) or "is constant"


def optimal_form(model: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, OptimalForm]:
    """Say what family the optimal factor of each continuous latent belongs to, when the others are held.

    log p(v, h) is evaluated where one unit moves and all else is held, regressed on the statistics T of each family
    on the unit's support, and compared with the regression at fresh points, for several values of all else. A
    family whose statistics explain it exactly is closed under the expectation in (19.56): the optimal q is in
    it, whatever the other factors are. Nothing is assumed about q beforehand, and no prior is looked at by name. The
    points are random, near and far: a bend that lies beyond all of them stays unseen.

    Known families: Normal; Gamma, InverseGamma and LogNormal on positive numbers; Beta; Dirichlet.

    Args:
        model: any Pyro model.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        A form for each continuous latent site, by name.

    Raises:
        ValueError: the model has no visible or no latent site (see `Program`).

    Example:
        >>> import pyro
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h @ torch.tensor([1.0, 2.0]), 1.0), obs=v)
        >>> optimal_form(model, torch.randn(5))["h"]
        OptimalForm('h': Normal, exp(c1 h + c2 h^2); c1 varies and depends on 'h', c2 varies)
    """
    program = Program(model, args, kwargs)
    probe = _Probe(program)
    return {site.name: probe.form(site) for site in program.latents if not site.kind.is_discrete}


class _Probe:
    """Evaluates log p(v, h) around several draws of the latents."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layout = Layout(program.rows, program.latents)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            torch.manual_seed(20190422)
            self.draws = [self._draw() for _ in range(1 + NUM_REDRAWS)]
        self.tolerance = 1e-8 if program.number.dtype == torch.float64 else 2e-3

    def _draw(self) -> Tensor:
        """All latents from the program itself, ``(R, F)``: random values of the support."""
        trace: Any = poutine.trace(self.program.model).get_trace(*self.program.args, **self.program.kwargs)
        flat = self.layout.flatten({site.name: trace.nodes[site.name]["value"] for site in self.layout.sites})
        return flat.to(self.program.number)

    def form(self, site: Site) -> OptimalForm:
        """The first family that fits every unit of a site, at every draw of the others."""
        families = _families(site)
        if not families:
            return OptimalForm(site.name, None, reason=f"no family is known on the support {_support(site)}")
        misfits: list[str] = []
        for family in families:
            found = self._fit_all(site, family)
            if isinstance(found, str):
                misfits.append(found)
                continue
            depends_on, held = self._dependence(found)
            varies = _differ(held, held[:1, :1], self.tolerance).flatten(0, 1).any(0).tolist()
            return OptimalForm(
                site.name,
                family.distribution,
                family.names,
                {name: depends_on[j] for j, name in enumerate(family.names)},
                dict(zip(family.names, varies, strict=True)),
                held,
            )
        return OptimalForm(site.name, None, reason="; ".join(dict.fromkeys(misfits)))

    def _settings(self) -> Iterator[tuple[str | None, Tensor]]:
        """The held values: one draw, and then those in which one site is drawn anew."""
        base = self.draws[0]
        yield None, base
        for other in self.layout.sites:
            span = self.layout.indices(other, range(other.num_features)).flatten().to(base.device)
            for draw in self.draws[1:]:
                flat = base.clone()
                flat[:, span] = draw[:, span]
                yield other.name, flat

    def _fit_all(self, site: Site, family: _Family) -> dict[str | None, list[Tensor]] | str:
        """Coefficients ``(R, units, P)`` for each setting, by what was drawn anew; or why the family does not fit."""
        found: dict[str | None, list[list[Tensor]]] = {}
        units = self._units(site)
        for mine, picks in units:
            seen: dict[str | None, int] = {}
            for source, flat in self._settings():
                fit = self._fit(site, family, flat, mine, picks)
                if isinstance(fit, str):
                    return fit
                number = seen[source] = seen.get(source, -1) + 1
                runs = found.setdefault(source, [])
                if number == len(runs):
                    runs.append([])
                runs[number].append(fit)
        return {source: [torch.stack(run, 1) for run in runs] for source, runs in found.items()}

    def _units(self, site: Site) -> list[tuple[Tensor, tuple[int, slice]]]:
        """For each unit the positions of its features in a row's vector, and where its value stands."""
        width = site.event_shape[-1] if _is_simplex(site) else 1
        features = max(width - 1, 1)
        offsets = self.layout.indices(site, range(site.num_features)).to(self.draws[0].device)
        return [
            (offsets[copy, unit * features : (unit + 1) * features], (copy, slice(unit * width, (unit + 1) * width)))
            for copy in range(len(offsets))
            for unit in range(site.num_features // features)
        ]

    def _fit(self, site: Site, family: _Family, flat: Tensor, mine: Tensor, picks: tuple[int, slice]) -> Tensor | str:
        """Coefficients ``(R, P)`` of the family in log p as a function of one unit, or why it does not fit."""
        size = len(family.names) + 1
        num_fit, num_test = 3 * size, 2 * size
        points = self._points(site, flat, mine, num_fit + num_test)
        statistics, log_p = self._evaluate(site, family, points, picks)
        if not bool((log_p.isfinite() & statistics.isfinite().all(-1)).all()):
            return "log p(v, h) is not finite on the support"
        # Columns of one size: their coefficients are compared with the same tolerance.
        center, spread = statistics.mean(0), statistics.std(0).clamp_min(1e-300)
        design = torch.cat([(statistics - center) / spread, torch.ones_like(statistics[..., :1])], -1)
        fit = design[:num_fit].transpose(0, 1), log_p[:num_fit].T.unsqueeze(-1)
        solution = torch.linalg.lstsq(*fit).solution.squeeze(-1)
        predicted = (design * solution).sum(-1)
        scale = 1 + log_p.abs() + (design * solution).abs().sum(-1)
        error = (predicted - log_p).abs()
        if bool((error > self.tolerance * scale).any()):
            names = ", ".join(family.names)
            return f"log p(v, h) is not linear in {names}: off by up to {float(error.max()):.2g} nats"
        coefficients = solution[..., :-1] / spread
        # A coefficient below the rounding of log p is 0.
        noise = self.tolerance * scale.amax(0).unsqueeze(-1) / spread
        coefficients = torch.where(coefficients.abs() <= noise, torch.zeros_like(coefficients), coefficients)
        if not bool(family.is_proper(coefficients).all()):
            names = ", ".join(family.names)
            return f"log p(v, h) is linear in {names}, but with coefficients that no {family.distribution.__name__} has"
        return coefficients

    def _points(self, site: Site, flat: Tensor, mine: Tensor, count: int) -> Tensor:
        """States ``(S, R, F)`` in which one unit takes random values of its support, near and far."""
        generator = torch.Generator().manual_seed(20190423)
        noise = torch.randn(count, 1, len(mine), generator=generator, dtype=torch.float64).to(flat)
        # Both the regression and its test see near and far values.
        reach = torch.tensor([0.5, 1.0, 2.0, 4.0]).to(flat)[torch.arange(count) % 4].reshape(-1, 1, 1)
        if site.kind is not Kind.REAL:
            reach = reach / 2
        states = flat.expand(count, *flat.shape).clone()
        states[..., mine] = flat[:, mine] + reach * noise * self._spread(site)
        return states

    def _spread(self, site: Site) -> float:
        """The typical size of a real latent's deviations; 1 on the real line behind a constraint."""
        if site.kind is not Kind.REAL:
            return 1.0
        spans = self.layout.indices(site, range(site.num_features)).flatten()
        values = torch.stack([draw[:, spans.to(draw.device)] for draw in self.draws])
        spread = float(values.std(0).mean())
        return spread if math.isfinite(spread) and spread > 0 else 1.0

    def _evaluate(self, site: Site, family: _Family, points: Tensor, picks: tuple[int, slice]) -> tuple[Tensor, Tensor]:
        """T ``(S, R, P)`` and log p ``(S, R)`` in float64, in chunks of states."""
        widest = max(self.program.trace.nodes[n]["fn"].event_shape.numel() for n in self.program.visible)
        chunk = max(1, CHUNK_ELEMENTS // max(1, points.shape[1] * max(widest, points.shape[2])))
        found: list[tuple[Tensor, Tensor]] = []
        for part in points.split(chunk):
            values = self.layout.values(part)
            with torch.no_grad():
                log_p = self.program.log_joint(values, num_particles=len(part)).reshape(len(part), -1)
            value = values[site.name]
            value = value.reshape(value.shape[: value.dim() - len(site.event_shape)] + (-1,))
            unit = self.layout.to_rows(value, site)[:, :, picks[0], picks[1]].double()
            found.append((family.statistics(unit), log_p.double()))
        return torch.cat([t for t, _ in found]), torch.cat([p for _, p in found])

    def _dependence(self, found: dict[str | None, list[Tensor]]) -> tuple[list[tuple[str, ...]], Tensor]:
        """The latents that each coefficient changes with, and the coefficients at the first draw."""
        (held,) = found[None]
        names: list[list[str]] = [[] for _ in range(held.shape[-1])]
        for source, runs in found.items():
            if source is None:
                continue
            changed = torch.stack([_differ(run, held, self.tolerance) for run in runs]).flatten(0, 2).any(0)
            for j in changed.nonzero().flatten().tolist():
                names[j].append(source)
        return [tuple(n) for n in names], held


def _differ(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    return (one - other).abs() > 100 * tolerance * (1e-3 + one.abs() + other.abs())


def _families(site: Site) -> tuple[_Family, ...]:
    support = _support(site)
    if site.kind is Kind.REAL:
        return (_NORMAL,)
    if _is_simplex(site):
        return (_dirichlet(site.event_shape[-1]),)
    if isinstance(support, constraints.interval) and _is(support.lower_bound, 0) and _is(support.upper_bound, 1):
        return (_BETA,)
    if isinstance(support, constraints.greater_than | constraints.greater_than_eq) and _is(support.lower_bound, 0):
        return _POSITIVE
    return ()


def _support(site: Site) -> Any:
    support: Any = site.fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_simplex(site: Site) -> bool:
    return isinstance(_support(site), type(constraints.simplex))


def _is(bound: Any, value: float) -> bool:
    return bool((torch.as_tensor(bound) == value).all())
