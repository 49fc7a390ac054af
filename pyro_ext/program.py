"""A Pyro model at given arguments, seen as a function of its latent values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_ext.markov_chain import MarkovChain
from pyro_ext.rows import Rows, sample_sites
from pyro_ext.sites import Kind, Site, base_of
from pyro_ext.visible_data import check_visible, filled, hidden_entries

MANY = 2**16
"""Numbers of a latent whose draws take noticeable time."""

PARTICLE_PLATE = "_pyro_ext_particles"


class _Evaluate(Messenger):
    """Give sites their values and add up their log-probabilities, per row, while the program runs."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        rows: Rows,
        keep: Callable[[str], bool],
        hiding: Collection[str],
        shared: Collection[str],
        read: Callable[[Any], bool] | None = None,
        num_particles: int | None = None,
    ) -> None:
        super().__init__()
        self.read = read
        self.num_particles = num_particles
        self.values = values
        self.shared = shared
        self.rows = rows
        self.hiding = hiding
        self.keep = keep
        self.total: Tensor | None = None
        self.fns: dict[str, Any] = {}
        self.terms: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"] = value
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        self.fns[msg["name"]] = msg["fn"]
        if self.num_particles is not None:
            self._check_dimensions(msg)
        if not self.keep(msg["name"]) or (self.read is not None and self.read(msg)):
            return
        value = filled(msg["value"], msg) if msg["name"] in self.hiding else msg["value"]
        log_prob = scale_and_mask(msg["fn"].log_prob(value), msg["scale"], msg["mask"])
        if msg["name"] in self.shared:
            # Summed over the batch and multiplied by N/B, as losses are, the shares make the whole.
            inner = list(range(-min(self.rows.nesting, log_prob.dim()), 0))
            share = (log_prob.sum(inner) if inner else log_prob) / (self.rows.count * self.rows.scale)
            term = share.reshape(share.shape + (1,) * len(self.rows.shape)).expand(share.shape + self.rows.shape)
        else:
            term = self.rows.sum_to_rows(log_prob) / self.rows.scale
        self.terms[msg["name"]] = term
        self.total = term if self.total is None else self.total + term

    def _check_dimensions(self, msg: Any) -> None:
        """Refuse particles where a plate inside the row stood, for they would be summed."""
        shape = tuple(msg["fn"].batch_shape)
        taken = {frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized}
        inside = range(-min(self.rows.nesting, len(shape)), 0)
        if any(shape[dim] > 1 and dim not in taken for dim in inside):
            raise ValueError(
                f"Expected site {msg['name']!r} to keep the dimensions of its plates under vectorised evaluation, but "
                f"got batch shape {shape}. Use negative dimensions and keepdim=True."
            )


class _ExplicitPlates(Messenger):
    """Note the plates whose indices the model was given by ``subsample=``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is not None:
            self.names.add(msg["name"])


class _Seen(BaseException):
    """All that was wanted of a run has been seen."""


class _FirstStates(Messenger):
    """Give one-hot latents their first state, and many real ones the same draw in every row.

    A program's structure is read off any state, and draws take time.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["value"] is not None or msg["is_observed"] or isinstance(fn, _Subsample):
            return
        shape = fn.batch_shape + fn.event_shape
        if isinstance(base_of(fn), ONE_HOT):
            value = _logits_of(fn).new_zeros(shape)
            value[..., 0] = 1
        elif _is_many_reals(fn):
            base = base_of(fn)
            first = (0,) * len(fn.batch_shape)
            loc, scale = base.loc.expand(shape)[first], base.scale.expand(shape)[first]
            # A copy: programs may write to a value, or view it in another shape.
            value = torch.normal(loc.detach(), scale.detach()).expand(shape).contiguous()
        else:
            return
        msg["value"] = value
        msg["done"] = True


class _AsTraced(Messenger):
    """Give latents the values that they have in a trace.

    Which site depends on which shows at any values, and some families cannot be drawn while it is followed: Laplace,
    exponential and Cauchy draws take their shape for data then.
    """

    def __init__(self, trace: Any) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        if msg["name"] in self.trace.nodes:
            msg["value"] = self.trace.nodes[msg["name"]]["value"].contiguous()
            msg["done"] = True


def _is_many_reals(fn: Any) -> bool:
    """Whether a draw takes time, and another of the same family will do."""
    families = torch.distributions.Normal, torch.distributions.Laplace
    count = (fn.batch_shape + fn.event_shape).numel()
    return count > MANY and fn.event_shape.numel() > 1 and type(base_of(fn)).__base__ in families


def _forget_copies(trace: Any) -> None:
    """Keep one row of the values that all rows share: a trace lives as long as its program."""
    for _, node in sample_sites(trace):
        if not node["is_observed"] and _is_many_reals(node["fn"]):
            shape = node["value"].shape
            node["value"] = node["value"][(0,) * len(node["fn"].batch_shape)].clone().expand(shape)


@contextmanager
def _without_draws() -> Generator[None, None, None]:
    """Put torch's generator back, unless parameters were created: their numbers must not be drawn again.

    Plate dimensions that are in use outside are free in here, for the messages do not meet.
    """
    state, known = torch.get_rng_state(), len(pyro.get_param_store())
    plates, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = plates
        if len(pyro.get_param_store()) == known:
            torch.set_rng_state(state)


ONE_HOT = torch.distributions.OneHotCategorical, MarkovChain


def _logits_of(fn: Any) -> Tensor:
    base = base_of(fn)
    return base.initial_logits if isinstance(base, MarkovChain) else base.logits


def _has_natural_parameters(site: Site) -> bool:
    """Whether the prior of a discrete site is one whose natural parameters Pyro gives as ``logits``."""
    base = site.fn
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    families = torch.distributions.Bernoulli, torch.distributions.OneHotCategorical, torch.distributions.Categorical
    return site.kind is not Kind.OTHER_DISCRETE and isinstance(base, families)


class Program:
    """A Pyro model with its arguments: sites, rows, and log p(v, h) at any h.

    The program is run once, blocked, to read its structure; the rows that its plates drew are then
    held fixed, so that ``log_joint`` is a deterministic function of the latent values and of theta.

    Args:
        model: any Pyro model.
        args: positional arguments that the model is called with.
        kwargs: keyword arguments that the model is called with.

    Attributes:
        rows: the program's rows.
        constant: observed sites outside the rows that no latent reaches, such as a prior whose value is held, or a
            penalty on theta by `pyro.factor`. Each row bears an equal share of their log-probability.
        latents: its latent sites, in the order of the program.
        visible: the names of its visible sites.
        indices: for each subsampled plate, the indices of its elements in this call.
        explicit_plates: the plates whose indices the model was given by ``subsample=``.
        draws_rows: whether some plate drew its elements at random.

    Raises:
        ValueError: no visible site, no latent site, a sequential plate, or visible values that are not finite or
            lie outside their support (entries that a mask hides excepted).

    Example:
        >>> import pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> program = Program(model, (torch.zeros(3),), {})
        >>> program.log_joint({"h": torch.zeros(3)})
        tensor([-1.8379, -1.8379, -1.8379])
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and not len(leaf):
                raise ValueError(
                    f"Expected data with at least one row, but got an empty tensor of shape {tuple(leaf.shape)}. "
                    "Pass at least one row."
                )
        explicit = _ExplicitPlates()
        with _without_draws(), poutine.block(), torch.no_grad(), explicit, _FirstStates():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        _forget_copies(trace)
        self.trace: Any = trace
        self.explicit_plates = frozenset(explicit.names)
        self._check_structure()
        check_visible(trace)
        self._hiding = frozenset(
            n for n, s in sample_sites(trace) if s["is_observed"] and hidden_entries(s) is not None
        )
        self.latents = tuple(Site.from_message(n, s) for n, s in sample_sites(trace) if not s["is_observed"])
        self.visible = tuple(n for n, s in sample_sites(trace) if s["is_observed"])
        self.constant = self._constant_sites()
        self.rows = Rows.from_trace(trace, without=self.constant)
        self.indices: dict[str, Tensor] = {
            frame.name: self.trace.nodes[frame.name]["value"]
            for _, site in sample_sites(trace)
            for frame in site["cond_indep_stack"]
            if frame.vectorized and (frame.name in explicit.names or frame.full_size not in (None, frame.size))
        }
        self.draws_rows = bool(self.indices.keys() - self.explicit_plates)
        self._origin: Tensor | None = None
        self._plate_values: dict[str, Tensor] = {
            n: s["value"] for n, s in self.trace.nodes.items() if isinstance(s.get("fn"), _Subsample)
        }

    @classmethod
    def with_fresh_rows(cls, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """A program that takes other rows than the last, where its plates draw them at random."""
        program = cls(model, args, kwargs)
        if program.draws_rows:
            # Tracing puts the generator back: without a draw here every call would take the same rows.
            torch.rand(())
        return program

    def _check_structure(self) -> None:
        sites = list(sample_sites(self.trace))
        for name, site in sites:
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized:
                    raise ValueError(
                        f"Expected vectorised plates, but got the sequential plate {frame.name!r} around site "
                        f"{name!r}. Write it as `with pyro.plate(...)`."
                    )
            taken = {frame.dim for frame in site["cond_indep_stack"]}
            shape = site["fn"].batch_shape
            if any(size > 1 and dim - len(shape) not in taken for dim, size in enumerate(shape)):
                raise ValueError(
                    f"Expected every batch dimension of site {name!r} in a plate, but got batch shape {tuple(shape)} "
                    f"in plates {[f.name for f in site['cond_indep_stack']]}. Put the site in `with pyro.plate(...)`, "
                    "or make the dimension part of one value by `.to_event(1)`."
                )
        if not any(site["is_observed"] for _, site in sites):
            raise ValueError(
                "Expected a model with a visible site, but got one in which nothing is observed. "
                "Pass the data, and give it to `pyro.sample(..., obs=...)` in the model."
            )
        if all(site["is_observed"] for _, site in sites):
            raise ValueError(
                "Expected a model with a latent site, but got one in which every site is observed. "
                "Maximise its likelihood directly."
            )

    def _constant_sites(self) -> frozenset[str]:
        """Observed sites outside the rows that no latent reaches: held priors, penalties on theta."""
        plates = {n: {f.name for f in s["cond_indep_stack"] if f.vectorized} for n, s in sample_sites(self.trace)}
        latent = {site.name for site in self.latents}
        common = set.intersection(*(plates[name] for name in latent))
        outside = {name for name in self.visible if not common <= plates[name]}
        if not outside or outside == set(self.visible):
            return frozenset()
        return frozenset(name for name in outside if not self.dependencies.get(name, set()) & latent)

    def refresh(self) -> None:
        """Read the latents' distributions anew, at the present theta."""
        values = {site.name: self.trace.nodes[site.name]["value"].contiguous() for site in self.latents}
        seen: set[str] = set()

        def skip_all(message: Any) -> bool:
            seen.add(message["name"])
            if values.keys() <= seen:
                raise _Seen
            return True

        fns: dict[str, Any] = {}
        with torch.no_grad(), suppress(_Seen):
            # What comes after the last latent takes time, and tells nothing.
            self._run(values, (), None, skip_all, fns)
        self.latents = tuple(replace(site, fn=fns[site.name]) for site in self.latents)

    def site(self, name: str) -> Site:
        """The latent site of a name."""
        for site in self.latents:
            if site.name == name:
                return site
        raise KeyError(name)

    @cached_property
    def number(self) -> Tensor:
        """A log-probability of the program: its dtype and device are those to work in."""
        site = self.trace.nodes[self.visible[0]]
        with torch.no_grad(), pyro.validation_enabled(False):
            return site["fn"].log_prob(filled(site["value"], site)).sum()

    def origin(self, num_features: int) -> Tensor:
        """Zeros ``(R, num_features)`` to differentiate at: made once, for their memory is that of a table."""
        if self._origin is None or self._origin.shape[1] != num_features:
            self._origin = self.number.new_zeros(self.rows.count, num_features).requires_grad_()
        return self._origin

    @cached_property
    def dependencies(self) -> dict[str, set[str]]:
        """For every site, the other sites that its distribution depends on directly."""
        with _without_draws(), poutine.block(), _AsTraced(self.trace):
            found: Any = get_dependencies(self.model, self.args, self.kwargs)
        return {name: set(parents) - {name} for name, parents in found["prior_dependencies"].items()}

    @cached_property
    def peelable(self) -> frozenset[str]:
        """Discrete latents whose prior depends on no other latent: read from it, in any family."""
        return frozenset(
            site.name
            for site in self.latents
            if _has_natural_parameters(site)
            and self.trace.nodes[site.name]["mask"] is None
            and not self.latent_parents(site.name)
        )

    def latent_parents(self, name: str) -> set[str]:
        """The other latents that a site's distribution depends on directly."""
        others = {site.name for site in self.latents} - {name}
        # A lone latent has none, and the run that tells dependencies is spared.
        return self.dependencies.get(name, set()) & others if others else set()

    def log_joint(
        self, values: Mapping[str, Tensor], *, skip: Collection[str] = (), num_particles: int | None = None
    ) -> Tensor:
        """log p(v, h; theta) per row, in nats, differentiable in the values and in theta.

        Args:
            values: a value for every latent site, ``(num_particles,) + batch + event``.
            skip: sites left out of the sum (peeled priors).
            num_particles: size of the leading dimension of the values; None when they have none.

        Returns:
            Tensor of shape ``rows.shape``, or ``(num_particles,) + rows.shape``.
        """
        return self.evaluate(values, skip=skip, num_particles=num_particles)[0]

    def evaluate(
        self, values: Mapping[str, Tensor], *, skip: Collection[str] = (), num_particles: int | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `log_joint`, with the distribution that each site had in the run beside it."""
        handler = self._run(values, skip, num_particles)
        if handler.total is None:
            raise ValueError("Expected at least one site in the sum, but got none. Skip fewer sites.")
        total = handler.total
        if num_particles is not None:
            total = total.expand((num_particles,) + self.rows.shape)
        return total, handler.fns

    def evaluate_unread(
        self, values: Mapping[str, Tensor], *, skip: Collection[str], read: Callable[[Any], bool]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """As `evaluate`, without the sites of which ``read(message)`` is true; None when no other is left."""
        handler = self._run(values, skip, None, read)
        return handler.total, handler.fns

    def site_log_probs(self, values: Mapping[str, Tensor], *, num_particles: int | None = None) -> dict[str, Tensor]:
        """log p of every site per row, nats, at given latent values; shapes as in `log_joint`."""
        terms = self._run(values, (), num_particles).terms
        if num_particles is None:
            return terms
        return {name: term.expand((num_particles,) + self.rows.shape) for name, term in terms.items()}

    def _run(
        self,
        values: Mapping[str, Tensor],
        skip: Collection[str],
        num_particles: int | None,
        read: Callable[[Any], bool] | None = None,
        fns: dict[str, Any] | None = None,
    ) -> _Evaluate:
        given: dict[str, Any] = {**values, **self._plate_values}
        handler = _Evaluate(
            given, self.rows, lambda name: name not in skip, self._hiding, self.constant, read, num_particles
        )
        handler.fns = handler.fns if fns is None else fns
        with ExitStack() as stack:
            # theta must still reach an outer `param_only` tracer; sample statements must not.
            stack.enter_context(poutine.block(hide_types=["sample", "observe"]))
            # Relaxed values lie outside the support; the values were checked at the door.
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(handler)
            if num_particles is not None:
                stack.enter_context(pyro.plate(PARTICLE_PLATE, num_particles, dim=-self.rows.nesting - 1))
            self.model(*self.args, **self.kwargs)
        return handler

    def lead(self, value: Tensor, site: Site) -> Tensor:
        """Reshape ``(S,) + batch + event`` so that S stands left of all the program's plates."""
        batch = value.shape[1 : value.dim() - len(site.event_shape)]
        ones = (1,) * (self.rows.nesting - len(batch))
        return value.reshape(value.shape[:1] + ones + batch + site.event_shape)
