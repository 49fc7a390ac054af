"""Running guide and model for the particles of every row, and what is known of their structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_ext.call_arguments import Args, Kwargs, is_same_program, signature_of
from pyro_ext.matching import check_match, check_sleep
from pyro_ext.rows import Rows, is_visible, sample_sites

Program = Callable[..., Any]

PARTICLES = "num_particles_vectorized"
"""The name that pyro.infer.ELBO gives its plate."""

_MAX_STRUCTURES = 256


class Structures:
    """What is known of a model and a guide: rows by structure, and the calls whose values were validated.

    Attributes:
        model: the model.
        guide: the guide.

    A *structure* is what two traces tell without a look at their numbers: names, plates, families and flags of
    the sites. Rows are found, and model and guide are matched, once a structure.
    """

    def __init__(self, model: Program, guide: Program) -> None:
        self.model = model
        self.guide = guide
        self._rows: dict[Any, Rows] = {}
        self._validated: set[Any] = set()

    def rows(self, model_trace: Trace, guide_trace: Trace, *, sleep: bool) -> Rows:
        """The rows of two traces.

        Args:
            model_trace: trace of the model.
            guide_trace: trace of the guide.
            sleep: whether the model must be one to dream from.

        Raises:
            ValueError: see `check_match` and `check_sleep`.
        """
        key = (sleep, _structure_of(model_trace), _structure_of(guide_trace))
        rows = self._rows.get(key)
        if rows is None:
            check_match(model_trace, guide_trace)
            if sleep:
                check_sleep(model_trace, guide_trace)
            rows = Rows.from_trace(model_trace, guide_trace, ignore={PARTICLES})
            if len(self._rows) >= _MAX_STRUCTURES:
                self._rows.clear()
            self._rows[key] = rows
        return rows

    def are_of(self, model: Program, guide: Program) -> bool:
        """Whether this is known of the given programs."""
        return is_same_program(self.model, model) and is_same_program(self.guide, guide)

    def is_validated(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether Pyro validates, and has done so for a call of this signature."""
        return is_validation_enabled() and signature_of(args, kwargs) in self._validated

    def note_validated(self, args: Args, kwargs: Kwargs) -> None:
        """Remember that all values of a call were validated, if Pyro validates."""
        if is_validation_enabled():
            if len(self._validated) >= _MAX_STRUCTURES:
                self._validated.clear()
            self._validated.add(signature_of(args, kwargs))


def _structure_of(trace: Trace) -> tuple[Any, ...]:
    return tuple(
        (
            name,
            site["is_observed"],
            # Frames of unequal full size are equal to Pyro.
            tuple((f.name, f.dim, f.size, f.full_size) for f in site["cond_indep_stack"]),
            _families(site["fn"]),
            bool(site["infer"].get("is_auxiliary")),
        )
        for name, site in sample_sites(trace)
    )


def _families(fn: Any) -> tuple[type, ...]:
    found = [type(fn)]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        found.append(type(fn))
    return tuple(found)


class Run:
    """The two programs of one step at given arguments, for a proposal to run.

    Args:
        structures: what is known of the programs.
        args: their positional arguments.
        kwargs: their keyword arguments.
        sleep: whether the model must be one to dream from.
        num_vectorized: K particles in a plate to the left of all others, or None.
        max_plate_nesting: number of nested plates, that of the particles included.
    """

    def __init__(
        self,
        structures: Structures,
        args: Args,
        kwargs: Kwargs,
        *,
        sleep: bool,
        num_vectorized: int | None = None,
        max_plate_nesting: float,
    ) -> None:
        self.structures = structures
        self.args = args
        self.kwargs = kwargs
        self.sleep = sleep
        self.max_plate_nesting = max_plate_nesting
        self.num_vectorized = num_vectorized
        self._plate: Any = None
        if num_vectorized is not None:
            # One for both programs: making it is itself a statement that all handlers see.
            self._plate = pyro.plate(PARTICLES, num_vectorized, dim=-int(max_plate_nesting))

    def guide(self, values: Mapping[str, Any] | None = None) -> Trace:
        """Trace the guide; what it draws has no gradient."""
        return self._trace(self.structures.guide, _Given(values or {}, detach=True))

    def model(self, values: Mapping[str, Any]) -> Trace:
        """Trace the model at given values of its latent sites and plates."""
        return self._trace(self.structures.model, _Given(values))

    def _trace(self, program: Program, given: _Given) -> Trace:
        inside = program if self._plate is None else self._plate(program)
        with given:
            return poutine.trace(inside).get_trace(*self.args, **self.kwargs)

    def rows(self, model_trace: Trace, guide_trace: Trace) -> Rows:
        """The rows of two traces, which are checked against each other."""
        return self.structures.rows(model_trace, guide_trace, sleep=self.sleep)

    def validate(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Pyro's own checks of two traces and their values, where they are switched on."""
        if not is_validation_enabled():
            return
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        for trace in (model_trace, guide_trace):
            for _, site in sample_sites(trace):
                check_site_shape(site, self.max_plate_nesting)  # pyright: ignore[reportArgumentType]


class _Given(Messenger):
    """Give sites values, with the annotations of the sites that these come from; cut the gradient at each draw."""

    def __init__(self, values: Mapping[str, Any], *, detach: bool = False) -> None:
        super().__init__()
        self.values = values
        self.detach = detach

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            site = self.values[msg["name"]]
            msg["value"], msg["done"] = site["value"], True
            msg["infer"] = site["infer"]

    def _pyro_post_sample(self, msg: Any) -> None:
        # What is drawn next must not depend on phi through it.
        if self.detach and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def drawn_sites(trace: Trace) -> dict[str, Any]:
    """The sites of a trace that were drawn, indices of plates included: what a second run is given."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site["is_observed"]}


def plate_sites(trace: Trace) -> dict[str, Any]:
    """The sites at which plates drew their indices."""
    return {name: site for name, site in drawn_sites(trace).items() if isinstance(site["fn"], _Subsample)}


def observed_are_valid(trace: Trace) -> bool:
    """Whether observed values lie where their distributions do; values of a masked site are left alone."""
    for _, site in sample_sites(trace):
        if not is_visible(site) or site["mask"] is not None or not all(map(_is_pyros, _families(site["fn"]))):
            continue
        try:
            support: Any = site["fn"].support
        except NotImplementedError:
            continue
        if not bool(support.check(site["value"]).all()):
            return False
    return True


def _is_pyros(family: type) -> bool:
    # Others may hide entries of their own.
    return family.__module__.startswith(("pyro.distributions.", "torch.distributions.")) and not issubclass(
        family, MaskedDistribution
    )


def log_prob(trace: Trace, rows: Rows, *, observed: bool | None = None) -> Tensor:
    """Row-wise log-probability of a trace, with masks, without the scale N/B of the row plates.

    Args:
        trace: trace of model or guide.
        rows: the rows of the program.
        observed: only the visible sites and factors (True), only the latent ones (False), or all (None).

    Returns:
        Tensor of shape ``(K, *rows.shape)``, nats; K is 1 for a single particle.
    """
    total: Tensor | None = None
    for name, site in sample_sites(trace):
        if observed is not None and bool(site["is_observed"]) != observed:
            continue
        term = rows.sum_to_rows(site_log_prob(name, site, trace, rows.scale))
        total = term if total is None else total + term
    total = torch.zeros(rows.shape) if total is None else total
    return total.reshape(-1, *rows.shape)


def site_log_prob(name: str, site: Any, trace: Trace, row_scale: float = 1.0) -> Tensor:
    """log p of one site, batch-shaped, masked, and scaled by what is left of its scale without that of the rows."""
    if "log_prob" in site:
        return site["log_prob"] / row_scale
    try:
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(
            f"Error while computing log_prob at site {name!r}:\n{error}\n{trace.format_shapes(last_site=name)}"
        ) from error
    return scale_and_mask(value, scale_beside_rows(site, row_scale), site["mask"])


def scale_beside_rows(site: Any, row_scale: float) -> Any:
    """The scale of a site that its rows do not account for."""
    scale = site["scale"]
    if isinstance(scale, int | float) and math.isclose(scale, row_scale, rel_tol=1e-12):
        return 1.0
    return scale / row_scale
