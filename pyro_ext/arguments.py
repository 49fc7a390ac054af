"""The visible argument: which argument of a program carries the value of each visible site, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_ext.call_arguments import (
    Args,
    Kwargs,
    argument_names,
    label_of,
    leaves_of,
    root_of,
    signature_of,
    with_leaves,
)
from pyro_ext.provenance import Copy, Path, PlateIndex, Provenance, Step, View, get, put
from pyro_ext.rows import is_visible
from pyro_ext.sandbox import sandbox
from pyro_ext.tracing import is_tracing

Indices = Mapping[str, Tensor]

_MAX_LAYOUTS = 256


def find_visible(
    model: Callable[..., Any], args: Args, kwargs: Kwargs, visible: Mapping[str, str | int] | None = None
) -> VisibleArguments:
    """Find, for each visible site of a program, the argument that carries its value.

    The program is run once, blocked: no parameter and no state of the random generator is left changed.
    An argument carries a site when the program only moves its elements on the way there: the same
    object, a view, a slice, a reshape, rows picked by a plate's indices, another dtype, or a chain of
    these; tensors inside lists, tuples and mappings count. Failing that, an argument that is equal to
    the observed value (after ``index_select`` by a plate's indices, or a change of dtype) is taken.

    Args:
        model: any Pyro model.
        args: its positional arguments; tensors of any shape.
        kwargs: its keyword arguments.
        visible: the argument of a site, by name or position, where it cannot be found or is not unique.
            The argument must then have the shape of the observed value, or lead to it as above.

    Raises:
        ValueError: no argument, or more than one, carries a site; or ``visible`` names a site or an
            argument that there is not.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0).expand([len(x)]), obs=x.reshape(-1))
        >>> found = find_visible(model, (torch.zeros(3, 1),), {})
        >>> found.arguments
        {'v': 'x'}
        >>> found.read("v", (torch.ones(2, 1),), {})  # another batch size
        tensor([1., 1.])
        >>> found.write({"v": torch.ones(3)}, (torch.zeros(3, 1),), {})[0][0].squeeze()
        tensor([1., 1., 1.])
    """
    return VisibleArguments(model, args, kwargs, visible)


class VisibleArguments:
    """The arguments that carry the visible sites of a model, for reading data and writing dreams.

    Built by `find_visible`. For arguments of other shapes the program is run again, blocked, once per
    signature (shapes, strides and dtypes of the tensors, values of the rest, contents of integer and
    boolean tensors that carry no visible site). A program that picks elements by an index tensor which
    is not a plate's is run at each call, for that tensor may depend on the data.

    Attributes:
        sites: names of the visible sites, in the order of the program.
        arguments: for each site, the argument that carries it, as one writes it.
    """

    def __init__(
        self, model: Callable[..., Any], args: Args, kwargs: Kwargs, visible: Mapping[str, str | int] | None = None
    ) -> None:
        self._model = model
        self._visible = _checked_visible(visible)
        self._layouts: dict[Any, _Layout] = {}
        layout = self._layout(args, kwargs, {})
        names = argument_names(model, args, kwargs)
        self.arguments = {site: label_of(recipe.path, names) for site, recipe in layout.recipes.items()}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the visible sites, in the order of the program."""
        return tuple(self.arguments)

    def read(self, site: str, args: Args, kwargs: Kwargs, indices: Indices | None = None) -> Tensor:
        """The value of a visible site in given arguments, as the program observes it.

        Args:
            site: name of the site.
            args: positional arguments, of any batch size.
            kwargs: keyword arguments.
            indices: for each subsampled plate, the indices to use, shape (B,); needed when the program
                picks its rows itself (``x[ind]``), see `pyro_ext.sandbox.plate_indices`.

        Returns:
            Tensor of the shape observed; a view of the argument where possible.

        Raises:
            ValueError: the site is not visible in these arguments, or indices are missing.
        """
        layout = self._layout(args, kwargs, indices or {}, site)
        recipe = layout.recipes[site]
        return get(recipe.steps, leaves_of(args, kwargs)[recipe.path], layout.indices(recipe, indices or {}))

    def write(
        self, values: Mapping[str, Tensor], args: Args, kwargs: Kwargs, indices: Indices | None = None
    ) -> tuple[Args, Kwargs]:
        """Arguments in which the visible sites have other values; the given ones are not touched.

        Elements that no site observes (covariates, say) keep their values. Where a plate's indices pick
        the rows (``x[ind]``), the rows left out repeat those written, so that no data remains.

        Args:
            values: for each site to write, a tensor of the shape observed.
            args: positional arguments.
            kwargs: keyword arguments.
            indices: as in `read`.

        Returns:
            ``(args, kwargs)`` with copies in place of the tensors written to.

        Raises:
            ValueError: a site is not visible, its value has another shape, or the argument cannot hold
                the values (elements shared by two sites or rows, an integer argument for real values).
        """
        indices = indices or {}
        # Recipes are strided: written tensors are made contiguous first, and recipes sought for those.
        layout = self._layout(args, kwargs, indices, *values)
        leaves = leaves_of(args, kwargs)
        targets = {layout.recipes[s].path for s in values}
        copies = {p: leaves[p].detach().clone(memory_format=torch.contiguous_format) for p in targets}
        args, kwargs = with_leaves(args, kwargs, copies)
        layout = self._layout(args, kwargs, indices, *values)
        recipes = {site: layout.recipes[site] for site in values}
        chosen = {site: layout.indices(recipe, indices) for site, recipe in recipes.items()}
        for site, recipe in recipes.items():
            if values[site].shape != recipe.shape:
                raise ValueError(
                    f"Expected a value of shape {tuple(recipe.shape)} for site {site!r}, as observed, "
                    f"but got {tuple(values[site].shape)}. Observe a tensor of the site's own shape."
                )
        # Once a layout: the check looks at values, which a compiled step cannot.
        if frozenset(values) not in layout.written:
            _check_writable(recipes, copies, values, chosen)
        with torch.no_grad():
            for site, recipe in recipes.items():
                put(recipe.steps, copies[recipe.path], values[site], chosen[site])
        layout.written.add(frozenset(values))
        return args, kwargs

    def _layout(self, args: Args, kwargs: Kwargs, indices: Indices, *sites: str) -> _Layout:
        key = (signature_of(args, kwargs), tuple(sorted((n, len(i)) for n, i in indices.items())))
        layout = self._layouts.get(key)
        if layout is not None and not layout.fits(args, kwargs, indices):
            layout = None
        if layout is None or not set(sites) <= layout.recipes.keys():
            found = _find(self._model, args, kwargs, indices, self._visible)
            # Sites that come and go with random branches are found one after the other.
            layout = found if layout is None else replace(found, recipes={**layout.recipes, **found.recipes})
            self._layouts[key] = layout
            if len(self._layouts) > _MAX_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        missing = [site for site in sites if site not in layout.recipes]
        if missing:
            raise ValueError(
                f"Expected visible sites of the model, but got {missing}. "
                f"With these arguments it observes {list(layout.recipes)}."
            )
        return layout

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}}


@dataclass(frozen=True)
class _Recipe:
    path: Path
    steps: tuple[Step, ...]
    shape: torch.Size

    @cached_property
    def plates(self) -> frozenset[str]:
        return frozenset[str]().union(*(s.plates for s in self.steps if isinstance(s, Copy)))

    @property
    def is_static(self) -> bool:
        return all(s.is_static for s in self.steps if isinstance(s, Copy))


@dataclass(frozen=True)
class _Plate:
    """A plate as the program declared it: its full size, the indices it took, and who chose them."""

    size: int
    indices: Tensor
    explicit: bool


@dataclass
class _Layout:
    """The recipes of all visible sites at one signature."""

    recipes: dict[str, _Recipe]
    plates: dict[str, _Plate]
    probes: dict[Path, Tensor] = field(default_factory=dict)
    written: set[frozenset[str]] = field(default_factory=set)

    def fits(self, args: Args, kwargs: Kwargs, indices: Indices) -> bool:
        """Whether the recipes hold for arguments of the same signature, not only for those they came from."""
        if not self._is_static or not self._explicit <= indices.keys():
            return False
        if not self.probes:
            return True
        leaves = leaves_of(args, kwargs)
        return is_tracing() or all(torch.equal(leaves[path], probe) for path, probe in self.probes.items())

    @cached_property
    def _is_static(self) -> bool:
        return all(recipe.is_static for recipe in self.recipes.values())

    @cached_property
    def _explicit(self) -> frozenset[str]:
        used = frozenset[str]().union(*(recipe.plates for recipe in self.recipes.values()))
        return frozenset(name for name in used if self.plates[name].explicit)

    def indices(self, recipe: _Recipe, given: Indices) -> Indices:
        """The indices that a recipe needs: those given, the model's own, or all rows of a full plate."""
        chosen = dict(given)
        for name in recipe.plates - given.keys():
            plate = self.plates[name]
            if not plate.explicit and len(plate.indices) != plate.size:
                raise ValueError(
                    f"Expected the indices of the subsampled plate {name!r}, but got none. "
                    f"Pass `indices={{{name!r}: ...}}`, those that the guide's own plate drew."
                )
            chosen[name] = plate.indices
        return chosen


class _Recorder(Messenger):
    """Note what is observed and which rows the plates take; fix the rows of the plates it was given."""

    def __init__(self, indices: Indices, provenance: Provenance) -> None:
        super().__init__()
        self.given = indices
        self.provenance = provenance
        self.values: dict[str, Any] = {}
        self.plates: dict[str, _Plate] = {}
        self._explicit: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample):
            return
        if msg["value"] is not None:
            self._explicit.add(msg["name"])
        elif msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]]

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if isinstance(msg["fn"], _Subsample):
            if isinstance(value, Tensor):
                self.plates[name] = _Plate(msg["fn"].size, value, name in self._explicit)
                self.provenance.add_plate(name, value)
        elif is_visible(msg):
            self.values[name] = value


def _find(
    model: Callable[..., Any], args: Args, kwargs: Kwargs, indices: Indices, visible: Mapping[str, str | int]
) -> _Layout:
    leaves = {path: leaf for path, leaf in leaves_of(args, kwargs).items() if isinstance(leaf, Tensor)}
    provenance = Provenance()
    for path, leaf in leaves.items():
        provenance.add_source(path, leaf)
    recorder = _Recorder(indices, provenance)
    with sandbox(*leaves.values()), torch.no_grad(), recorder, provenance:
        model(*args, **kwargs)
    taken = {name: plate.indices for name, plate in recorder.plates.items()}
    names = argument_names(model, args, kwargs)
    unknown = visible.keys() - recorder.values.keys()
    if unknown:
        raise ValueError(
            f"Expected `visible` to name visible sites of the model, but got {sorted(unknown)}. "
            f"With these arguments it observes {list(recorder.values)}."
        )
    recipes: dict[str, _Recipe] = {}
    for site, value in recorder.values.items():
        allowed = leaves
        if site in visible:
            root = root_of(visible[site], args, kwargs, names)
            allowed = {path: leaf for path, leaf in leaves.items() if path[:2] == root}
        found = _candidates(value, allowed, provenance, recorder.plates, taken, site in visible)
        if len(found) != 1:
            raise ValueError(_message(site, [label_of(path, names) for path in found], site in visible, visible))
        ((path, steps),) = found.items()
        recipes[site] = _Recipe(path, steps, value.shape)
    carriers = {recipe.path for recipe in recipes.values()}
    probes = {
        path: leaf.clone()
        for path, leaf in leaves.items()
        if path not in carriers and not leaf.is_floating_point() and not leaf.is_complex()
    }
    return _Layout(recipes, recorder.plates, probes)


def _candidates(
    value: Any,
    leaves: Mapping[Path, Tensor],
    provenance: Provenance,
    plates: Mapping[str, _Plate],
    taken: Indices,
    named: bool,
) -> dict[Path, tuple[Step, ...]]:
    """The arguments that carry a value, each with a recipe."""
    if not isinstance(value, Tensor):
        return {}
    found: dict[Path, tuple[Step, ...]] = {}
    for path, steps in provenance.trace(value):
        # Elements may have been overwritten on the way: what counts is that the recipe gives the value.
        if path in leaves and path not in found and _same(get(steps, leaves[path], taken), value):
            found[path] = steps
    if found:
        return found
    for path, leaf in leaves.items():
        for steps in _copies(value, leaf, plates):
            # A constant is equal too easily to prove anything.
            if named or (_varies(value) and _same(get(steps, leaf, taken), value)):
                found.setdefault(path, steps)
    return found


def _copies(value: Tensor, leaf: Tensor, plates: Mapping[str, _Plate]) -> Iterator[tuple[Step, ...]]:
    """Recipes that could turn an argument into a value, by shape: as it is, or the rows of a plate."""
    convert = () if leaf.dtype == value.dtype else (Copy(torch.ops.aten._to_copy.default, (), {"dtype": value.dtype}),)
    if leaf.shape == value.shape:
        yield convert
    for name, plate in plates.items():
        index = PlateIndex(name, View(tuple(plate.indices.shape), (1,), 0))
        for dim in range(leaf.dim()):
            shape = leaf.shape[:dim] + plate.indices.shape + leaf.shape[dim + 1 :]
            if leaf.shape[dim] == plate.size and shape == value.shape:
                yield (Copy(torch.ops.aten.index_select.default, (dim, index)), *convert)


def _message(site: str, found: list[str], named: bool, visible: Mapping[str, str | int]) -> str:
    remedy = f"Name it by `visible={{{site!r}: 'argument'}}`."
    if named:
        got = f"none in it: {visible[site]!r} does not have the shape of the value" if not found else f"{found}"
        return (
            f"Expected one tensor in the argument named for the visible site {site!r}, but got {got}. "
            f"Pass the value as a tensor of its own. {remedy}"
        )
    if found:
        return f"Expected one argument to carry the visible site {site!r}, but got {len(found)}: {found}. {remedy}"
    return (
        f"Expected an argument to carry the visible site {site!r}, but got none: no tensor among the arguments "
        f"is its value, a view of it, or equal to it. Pass the data to the model as an argument. {remedy}"
    )


def _check_writable(
    recipes: Mapping[str, _Recipe],
    copies: Mapping[Path, Tensor],
    values: Mapping[str, Tensor],
    indices: Mapping[str, Indices],
) -> None:
    """Check that each observed element has an element of an argument to itself, which can hold it."""
    cells = {path: torch.zeros(leaf.shape, dtype=torch.long, device=leaf.device) for path, leaf in copies.items()}
    moves = {
        site: tuple(step.without_dtype() if isinstance(step, Copy) else step for step in recipe.steps)
        for site, recipe in recipes.items()
    }
    numbers: dict[str, Tensor] = {}
    begin = 1
    for site, recipe in recipes.items():
        end = begin + recipe.shape.numel()
        numbers[site] = torch.arange(begin, end, device=values[site].device).view(recipe.shape)
        begin = end
        try:
            put(moves[site], cells[recipe.path], numbers[site], indices[site])
        except RuntimeError as error:  # torch refuses to write to an expanded view
            raise _cannot_hold(site) from error
    for site, recipe in recipes.items():
        if is_tracing():
            # Tested by the eager run beside.
            break
        dtype = copies[recipe.path].dtype
        narrow = not dtype.is_floating_point and not _same(values[site].to(dtype).to(values[site].dtype), values[site])
        if narrow or not torch.equal(get(moves[site], cells[recipe.path], indices[site]), numbers[site]):
            raise _cannot_hold(site)


def _cannot_hold(site: str) -> ValueError:
    return ValueError(
        f"Expected an argument that can hold any value of site {site!r}, but got one whose elements are shared "
        "between rows or sites, or of too narrow a dtype. Let each observed element be one element of the argument."
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _varies(value: Tensor) -> bool:
    return value.numel() > 1 and bool((value != value.flatten()[0]).any())


def _checked_visible(visible: Mapping[str, str | int] | None) -> dict[str, str | int]:
    if visible is None:
        return {}
    if not isinstance(visible, Mapping) or not all(
        isinstance(site, str) and isinstance(argument, str | int) and not isinstance(argument, bool)
        for site, argument in visible.items()
    ):
        raise TypeError(
            f"Expected `visible` to map names of sites to names or positions of arguments, but got {visible!r}. "
            'Write `visible={"site": "argument"}`.'
        )
    return dict(visible)
