"""Guides whose factors are read off the visible data by networks (19.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_ext.arguments import VisibleArguments, find_visible
from pyro_ext.blocks import Block
from pyro_ext.call_arguments import signature_of
from pyro_ext.guides.base import FactorGuide
from pyro_ext.guides.encoders import DefaultEncoder, PointEncoder
from pyro_ext.guides.mean_field import mean_field_factor
from pyro_ext.initial import initial_parameters, prior_spread
from pyro_ext.layout import Layout
from pyro_ext.point_factor import DeltaFactor, point_features
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.rows import Rows, is_visible, sample_sites
from pyro_ext.sites import Kind, Site
from pyro_ext.visible_data import hidden_entries


@dataclass(frozen=True)
class _Structure:
    """What the guide needs to know of one signature of the arguments."""

    rows: Rows
    latents: dict[str, Site]
    visible: dict[str, Site]
    hidden: dict[str, Tensor | None]
    program: Program

    @property
    def lasts(self) -> bool:
        """Whether it holds for all calls of the signature: given subsamples and masks may change."""
        return not self.program.explicit_plates and all(mask is None for mask in self.hidden.values())


@dataclass(frozen=True)
class _Reading:
    """One call: its structure, and the features of the visible sites."""

    structure: _Structure
    features: dict[str, Tensor]


class Amortized(FactorGuide):
    """q(h | v) = prod_i q_i(h_i | f_i(v)): every factor's parameters are a network's output (19.5).

    Latents inside the data's plates get an encoder each. It reads the sites that depend on the latent: visible
    ones straight from the arguments, latent ones from their draw, so that layered models are read from
    the bottom up, q(h1 | v) q(h2 | h1). Latents outside the data's plates (global ones) have no row to
    read and get a table. The data's plates stand around every visible site that depends on a latent; of
    several that latents stand in apart, the subsampled one counts, else the outermost.

    Nothing else is read: covariates and other arguments of the model do not reach an encoder.

    A `PointEncoder`, such as `LISTA`, puts out values of its latent: the factor is a point at them, as in `Dirac`, and
    Pyro's ELBOs train the network on log p(v, h) directly. An encoder that reads such a latent reads its value.

    Any batch size will do, and new data too. Dreams reach the guide through the same arguments as data.
    Values that a mask hides are read as 0.

    Args:
        model: any Pyro model.
        encoder: a network from features ``(R, num_inputs)`` to parameters ``(R, num_params)``, for a model with
            one encoded latent; or a mapping from sites to networks. None for `DefaultEncoder`, sized from the trace.
        visible: the argument that carries a visible site, where it cannot be found: ``{"v": "data"}``.
        name: name of the guide's parameters.

    Raises:
        TypeError: an encoder is no nn.Module.
        ValueError: at the first call, when no argument carries a visible site, or an encoder does not fit; a
            `PointEncoder` of a discrete latent, or one whose values leave the support of its latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)
        >>> guide = Amortized(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> _ = svi.step(torch.randn(10, 1))
        >>> guide.posterior(torch.randn(3, 1))["h"].mean.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        *,
        visible: Mapping[str, str | int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(model, name=name)
        for given in encoder.values() if isinstance(encoder, Mapping) else (encoder,):
            if given is not None and not isinstance(given, nn.Module):
                raise TypeError(
                    f"Expected an nn.Module or a mapping from sites to modules, but got {type(given).__name__}. "
                    "Pass the network itself."
                )
        self.encoders = PyroModule()
        self.tables = PyroModule()
        self._given = (encoder,)
        self._visible_names = visible
        self._arguments: VisibleArguments | None = None
        self._structures: dict[Any, _Structure] = {}
        self._inputs: dict[str, tuple[str, ...]] = {}
        self._data: tuple[str, ...] = ()
        self._static = True

    @property
    def is_static(self) -> bool:
        """Whether no encoder reads a latent."""
        return self._static

    @property
    def is_point(self) -> bool:
        """Whether every latent is encoded as a point."""
        return self.is_set_up and all(block.factor.is_point for block in self.blocks)

    # ------------------------------------------------------------------ set-up

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """One block per site, in the order of the program."""
        points = self._point_sites(program)
        return tuple(
            Block(
                site.name,
                ((site, tuple(range(site.num_features))),),
                _point_factor(site) if site.name in points else mean_field_factor(site),
            )
            for site in program.latents
        )

    def _point_sites(self, program: Program) -> set[str]:
        """The latents whose encoder puts out values."""
        (given,) = self._given
        if isinstance(given, Mapping):
            return {name for name, encoder in given.items() if isinstance(encoder, PointEncoder)}
        if not isinstance(given, PointEncoder):
            return set()
        local = self._inputs or _local_sites(program, _structure_of(program, _data_sites(program)))
        return set(local) if len(local) == 1 else set()

    def order_of_sites(self, program: Program) -> tuple[Site, ...]:
        """Latents with tables first, then the encoded ones: bottom-up where one reads another."""
        self._data = _data_sites(program)
        structure = _structure_of(program, self._data)
        local = _local_sites(program, structure)
        self._inputs = {name: _readers(name, program, structure, local) for name in sorted(local)}
        self._static = all(name in structure.visible for inputs in self._inputs.values() for name in inputs)
        if self._static:
            return program.latents
        tables = [site for site in program.latents if site.name not in local]
        return (*tables, *(site for site in reversed(program.latents) if site.name in local))

    def finish_setup(self, program: Program) -> None:
        structure = _structure_of(program, self._data)
        self._arguments = self._find_arguments(program)
        reading = self._read(structure, program.args, program.kwargs, program.indices)
        values = {site.name: program.trace.nodes[site.name]["value"] for site in program.latents}
        encoders = self._given_encoders(program)
        for block in self.blocks:
            site = block.site
            if site.name not in self._inputs:
                whole = replace(block, parts=tuple((s.at_full_size(), c) for s, c in block.parts))
                start = initial_parameters(whole)
                setattr(self.tables, _key(site.name), PyroParam(start, event_dim=1))
                continue
            x = self._encoder_input(site.name, reading, values)
            copies = Layout(structure.rows, [site]).copies(site)
            is_point = block.factor.is_point
            num_outputs = copies * (math.prod(site.event_shape) if is_point else block.factor.num_params)
            start = (
                Layout(structure.rows, [site])
                .to_rows(initial_parameters(block, prior_spread(site)), site)
                .mean(0)
                .reshape(-1)
            )
            encoder = encoders.get(site.name)
            if encoder is None:
                encoder = DefaultEncoder(x.shape[-1], num_outputs, start, data=x).to(start)
            _check_encoder(encoder, x, num_outputs, site.name)
            if is_point:
                with _evaluating(encoder):
                    self._factor_parameters(block, site, structure.rows, encoder(x))
            for parameter in encoder.parameters():
                # Pyro's store would hold a contiguous copy, which an optimizer moves while the network stays.
                if not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
            setattr(self.encoders, _key(site.name), encoder)

    def _find_arguments(self, program: Program) -> VisibleArguments:
        """The arguments of the sites that are read; the others may be observed from anywhere."""
        read = {source for sources in self._inputs.values() for source in sources}.union(self._visible_names or ())
        unread = [name for name in program.visible if name not in read]
        model = poutine.block(self.model, hide=unread) if unread else self.model
        return find_visible(model, program.args, program.kwargs, self._visible_names)

    def undo_setup(self) -> None:
        super().undo_setup()
        self.encoders, self.tables = PyroModule(), PyroModule()
        self._arguments, self._structures, self._inputs, self._data, self._static = None, {}, {}, (), True

    def _given_encoders(self, program: Program) -> dict[str, nn.Module]:
        (given,) = self._given
        if given is None:
            return {}
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - set(self._inputs))
            if unknown:
                raise ValueError(
                    f"Expected encoders for the latents {sorted(self._inputs)}, but got one for {unknown[0]!r}. "
                    "Name a latent inside the data's plates."
                )
            return dict(given)
        if len(self._inputs) != 1:
            raise ValueError(
                f"Expected one encoded latent for a single encoder, but got {sorted(self._inputs)}. "
                'Pass a mapping, such as {"h1": net1, "h2": net2}.'
            )
        return {next(iter(self._inputs)): given}

    # ------------------------------------------------------------------ calls

    def _structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Structure:
        key = signature_of(args, kwargs)
        found = self._structures.get(key)
        if found is None or not found.lasts:
            found = _structure_of(Program(self.model, args, kwargs), self._data)
            if len(self._structures) > 64:
                self._structures.clear()
            self._structures[key] = found
        return found

    def _read(
        self, structure: _Structure, args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]
    ) -> _Reading:
        if self._arguments is None:
            raise RuntimeError("Expected a guide that was set up, but got one that was not. Call `guide.setup(*args)`.")
        features = {}
        for name in self._arguments.sites:
            site = structure.visible[name]
            value = self._arguments.read(name, args, kwargs, indices)
            features[name] = _visible_features(site, value, structure.hidden[name])
        return _Reading(structure, features)

    def plates_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        structure = self._structure(args, kwargs)
        self.plates = {}
        indices: dict[str, Tensor] = {}
        for site in structure.latents.values():
            for frame in site.frames:
                if frame.name in self.plates:
                    continue
                explicit = (
                    structure.program.indices.get(frame.name) if self._is_explicit(structure, frame.name) else None
                )
                full = frame.full_size
                self.make_plate(frame.name, frame.dim, full, frame.size, explicit)
                if frame.size != full:
                    with self.plates[frame.name] as drawn:
                        indices[frame.name] = drawn
        return self._read(structure, args, kwargs, indices)

    @staticmethod
    def _is_explicit(structure: _Structure, name: str) -> bool:
        return name in structure.program.explicit_plates

    def block_parameters(self, block: Block, values: Mapping[str, Tensor], call: _Reading) -> Tensor:
        name = block.site.name
        if name not in self._inputs:
            return getattr(self.tables, _key(name))
        site = call.structure.latents[name]
        x = self._encoder_input(name, call, values)
        # Encoders are promised rows; draws of other latents may lead them.
        output = getattr(self.encoders, _key(name))(x.reshape(-1, x.shape[-1]))
        return self._factor_parameters(block, site, call.structure.rows, output.reshape(x.shape[:-1] + (-1,)))

    @staticmethod
    def _factor_parameters(block: Block, site: Site, rows: Rows, output: Tensor) -> Tensor:
        """A factor's parameters, ``batch + (P,)``, from an encoder's outputs ``leading + (R, M * X)``."""
        layout = Layout(rows, [site])
        output = output.reshape(output.shape[:-1] + (layout.copies(site), -1))
        params = layout.from_rows(output, site)
        padding = rows.nesting - len(site.batch_shape)
        if output.dim() > 3 and padding:
            params = params.reshape(output.shape[:-3] + tuple(site.batch_shape) + params.shape[-1:])
        if not block.factor.is_point:
            return params
        return point_features(site, params.reshape(params.shape[:-1] + site.event_shape))

    def _encoder_input(self, name: str, call: _Reading, values: Mapping[str, Tensor]) -> Tensor:
        """Features that an encoder reads, ``leading + (R, num_inputs)``."""
        rows = call.structure.rows
        pieces = []
        for source in self._inputs[name]:
            if source in call.features:
                site = call.structure.visible[source]
                features = call.features[source]
            else:
                site = call.structure.latents[source]
                features = self._latent_features(site, values[source])
            batch = len(site.batch_shape)
            leading = features.shape[: features.dim() - 1 - batch]
            ones = (1,) * (rows.nesting - batch)
            features = features.reshape(leading + ones + features.shape[len(leading) :])
            piece = Layout(rows, [site]).to_rows(features, site)
            pieces.append(piece.reshape(piece.shape[:-2] + (-1,)))
        leading = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(leading + piece.shape[-1:]) for piece in pieces], -1)

    def _latent_features(self, site: Site, value: Tensor) -> Tensor:
        # The features of a sparse code hold the logarithm of 0.
        is_point = any(block.factor.is_point for block in self.blocks if block.site.name == site.name)
        return _visible_features(site, value, None) if is_point else site.to_features(value)

    def rows_parameters(self, program: Program, *, detach: bool = True) -> dict[str, Tensor]:
        """Parameters of each block for the rows of a program, ``(R, M, P)`` (static guides)."""
        layout = Layout(program.rows, program.latents)
        reading = self._read_program(program)
        result: dict[str, Tensor] = {}
        with torch.set_grad_enabled(not detach), self._pyro_context:
            for block in self.blocks:
                site = program.site(block.site.name)
                params = self.block_parameters(block, {}, reading)
                if block.site.name not in self._inputs:
                    for frame in site.frames:
                        if frame.name in program.indices:
                            params = params.index_select(frame.dim - 1, program.indices[frame.name])
                result[block.name] = layout.to_rows(params, site)
        return result

    def _read_program(self, program: Program) -> _Reading:
        """The visible values of a program that was traced already, read from its arguments as in a call."""
        return self._read(_structure_of(program, self._data), program.args, program.kwargs, program.indices)

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v) for any data, in one pass of the encoders.

        For a model that draws its own rows, the posterior speaks of one such draw.
        """
        self.check_data(args, kwargs)
        self.setup(*args, **kwargs)
        return self.posterior_at(Program(self.model, args, kwargs))

    def posterior_at(self, program: Program) -> Posterior:
        """q(h | v) for the rows of a program that was traced already."""
        reading = self._read_program(program)
        sites = tuple(program.site(site.name) for site in self.order)

        def conditioner(block: Block, values: Mapping[str, Tensor]) -> Tensor:
            with torch.no_grad(), self._stored_parameters():
                params = self.block_parameters(block, values, reading)
            if block.site.name not in self._inputs:
                for frame in block.site.frames:
                    if frame.name in program.indices:
                        params = params.index_select(frame.dim - 1, program.indices[frame.name])
            return params.detach()

        blocks = self.make_blocks(program)
        if self.is_static:
            held = {block.name: conditioner(block, {}) for block in blocks}
            return Posterior(program.rows, sites, blocks, lambda block, _: held[block.name])
        return Posterior(program.rows, sites, blocks, conditioner, static=False)

    @contextmanager
    def _stored_parameters(self) -> Generator[None]:
        """Read the parameters of Pyro's store where it has them (after a load, say), else the module's own."""
        if not any(name.startswith(f"{self._pyro_name}.") for name in pyro.get_param_store().keys()):
            yield
            return
        with poutine.block(), self._pyro_context:
            yield


def _data_sites(program: Program) -> tuple[str, ...]:
    """The visible sites that depend on a latent: what else is observed (held priors, say) tells nothing of one.

    Raises:
        ValueError: nothing but factors is observed.
    """
    nodes = dict(sample_sites(program.trace))
    visible = [name for name in program.visible if is_visible(nodes[name])]
    if not visible:
        raise ValueError(
            f"Expected visible data for an encoder to read, but got only the factors {list(program.visible)}. "
            "Use MeanField, whose tables read nothing."
        )
    latents = {site.name for site in program.latents}
    return tuple(name for name in visible if program.dependencies.get(name, set()) & latents) or tuple(visible)


def _structure_of(program: Program, data: tuple[str, ...]) -> _Structure:
    """Rows of the data and the local latents: global ones do not take their row away."""
    nodes = dict(sample_sites(program.trace))
    visible = {name: Site.from_message(name, nodes[name]) for name in data if name in program.visible}
    latents = {site.name: site for site in program.latents}
    stacks = [{f.name: f for f in site.frames} for site in visible.values()]
    common = [frame for name, frame in stacks[0].items() if all(name in stack for stack in stacks)]
    # A latent of the columns, not the rows, of a data matrix is global: the data plate is subsampled or outermost.
    common.sort(key=lambda f: f.name not in program.indices)
    holding = ([s for s in program.latents if any(f.name == frame.name for f in s.frames)] for frame in common)
    local = next((sites for sites in holding if sites), [])
    frames = [frame for frame in common if all(frame.name in {f.name for f in site.frames} for site in local)]
    frames.sort(key=lambda f: f.dim)
    rows = Rows(
        tuple(f.name for f in frames),
        tuple(f.dim for f in frames),
        torch.Size(f.size for f in frames),
        1.0,
        program.rows.nesting,
    )
    hidden = {name: hidden_entries(nodes[name]) for name in visible}
    return _Structure(rows, latents, visible, hidden, program)


def _local_sites(program: Program, structure: _Structure) -> set[str]:
    """The latents inside the data's plates, which get an encoder each."""
    rows = set(structure.rows.names)
    return {site.name for site in program.latents if rows <= {frame.name for frame in site.frames}}


def _point_factor(site: Site) -> DeltaFactor:
    if site.kind.is_discrete:
        raise ValueError(
            f"Expected a continuous latent for a PointEncoder, but got the {site.kind.value} site {site.name!r}. Pass "
            "a network whose outputs are logits, or use Dirac with FixedPoint()."
        )
    return DeltaFactor(site.num_features, site.unit_size, discrete=False)


def _readers(name: str, program: Program, structure: _Structure, local: set[str]) -> tuple[str, ...]:
    """The sites that a latent's encoder reads: those that depend on it and can be read, else all visible ones."""
    children = [child for child, parents in program.dependencies.items() if name in parents]
    return tuple(c for c in children if c in structure.visible or c in local) or tuple(structure.visible)


def _visible_features(site: Site, value: Tensor, hidden: Tensor | None) -> Tensor:
    """A visible value as numbers for a network, ``batch + (X,)``: classes as indicators, what a mask hides as 0."""
    if hidden is not None:
        hidden = hidden.expand(value.shape)
        value = value.masked_fill(hidden, 0)
    if site.kind is Kind.CATEGORICAL:
        features = site.to_features(value)
    else:
        batch = value.shape[: value.dim() - len(site.event_shape)]
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        features = value.reshape(batch + (-1,)).to(dtype)
    if hidden is not None:
        off = hidden.reshape(features.shape[:-1] + (-1,)).repeat_interleave(site.unit_size, -1)
        features = features.masked_fill(off, 0) if site.kind is Kind.CATEGORICAL else features
    return features


@contextmanager
def _evaluating(encoder: nn.Module) -> Generator[None]:
    """Evaluation mode, put back after: running means must not move, and batch norm refuses a single row."""
    modes = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_encoder(encoder: nn.Module, x: Tensor, num_outputs: int, name: str) -> None:
    try:
        with _evaluating(encoder):
            output = encoder(x[:1])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"Expected an encoder of {name!r} that reads {x.shape[-1]} features, but it failed: {error}. "
            f"Its input is (R, {x.shape[-1]})."
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, num_outputs):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = (
            "one for each number of the latent" if isinstance(encoder, PointEncoder) else "the parameters of its factor"
        )
        raise ValueError(
            f"Expected an encoder of {name!r} with {num_outputs} outputs, {what}, but got {got}. "
            f"Let its last layer have {num_outputs} units."
        )


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)
