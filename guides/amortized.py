"""Guides whose factors are read off the visible data by networks (19.5)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_ext.arguments import VisibleArguments, find_visible
from pyro_ext.blocks import Block
from pyro_ext.call_arguments import signature_of
from pyro_ext.factors import Factor
from pyro_ext.guides.base import FactorGuide
from pyro_ext.guides.context import Context, check_context
from pyro_ext.guides.density_encoders import DensityFactor, is_density
from pyro_ext.guides.density_posterior import DensityPosterior
from pyro_ext.guides.encoding import (
    Given,
    check_given,
    evaluating,
    factor_of,
    factor_parameters,
    given_encoders,
    network_of,
)
from pyro_ext.guides.reading import Reading, Structure, data_sites, local_sites, readers, structure_of, visible_features
from pyro_ext.initial import initial_parameters
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.sites import Site
from pyro_ext.tracing import is_tracing


class Amortized(FactorGuide):
    """q(h | v) = prod_i q_i(h_i | f_i(v)): every factor's parameters are a network's output (19.5).

    Latents inside the data's plates get an encoder each. It reads the sites that depend on the latent: visible
    ones straight from the arguments, latent ones from their draw, so that layered models are read from
    the bottom up, q(h1 | v) q(h2 | h1). Latents outside the data's plates (global ones) have no row to
    read and get a table. The data's plates stand around every visible site that depends on a latent; of
    several that latents stand in apart, the subsampled one counts, else the outermost.

    Other arguments of the model (covariates, labels, masks, lengths) are read where `context` names them: side by
    side after the sites, by every encoder. Booleans and integers are read as numbers; encode classes before. Context is
    no data: it stays as it is when dreams take the data's place.

    What an encoder gives decides the family of its factor. Parameters: independent units. `Joint`: all features of the
    site together. `PointEncoder`, such as `LISTA`: values of the latent; the factor is a point at them, as in `Dirac`,
    and Pyro's ELBOs train the network on log p(v, h) directly; an encoder that reads such a latent reads its value.
    `ConditionalFlow`, `AutoregressiveBernoulli` and every other `DensityEncoder`: a density without moments in
    closed form.

    Any batch size will do, and new data too. Dreams reach the guide through the same arguments as data.
    Values that a mask hides are read as 0.

    Args:
        model: any Pyro model.
        encoder: a network from features ``(R, num_inputs)`` to parameters ``(R, num_params)``, for a model with
            one encoded latent; or an `EncoderDesign`, which makes one for each; or a mapping from sites to these. None
            for `DefaultEncoder`, sized from the trace.
        visible: the argument that carries a visible site, where it cannot be found: ``{"v": "data"}``.
        context: names or positions of further arguments to read, tensors with a row for each row of the data; see
            `Context`.
        name: name of the guide's parameters.

    Raises:
        TypeError: an encoder is neither a network nor a design; context is no sequence; at the first call, an argument
            named as context is no tensor, or a density encoder gives no distribution of Pyro.
        ValueError: at the first call, when no argument carries a visible site, context has no row for each row, or an
            encoder does not fit; a `PointEncoder` of a discrete latent, or one whose values leave the support.

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
        encoder: Given | Mapping[str, Given] | None = None,
        *,
        visible: Mapping[str, str | int] | None = None,
        context: Sequence[str | int] = (),
        name: str | None = None,
    ) -> None:
        check_given(encoder)
        further = Context(model, context)
        super().__init__(model, name=name)
        self.encoders = PyroModule()
        self.tables = PyroModule()
        self._given = (encoder,)
        self._visible_names = visible
        self._context = further
        self._forget()

    def _forget(self) -> None:
        self._arguments: VisibleArguments | None = None
        self._structures: dict[Any, Structure] = {}
        self._inputs: dict[str, tuple[str, ...]] = {}
        self._chosen: dict[str, tuple[Given]] = {}
        self._widths: dict[str, int] = {}
        self._data: tuple[str, ...] = ()
        self._static = True

    @property
    def is_static(self) -> bool:
        """Whether no encoder reads a latent or puts out a density: parameters of factors follow from the data."""
        return self._static and not self._widths

    @property
    def is_point(self) -> bool:
        """Whether every latent is encoded as a point."""
        return self.is_set_up and all(block.factor.is_point for block in self.blocks)

    # ------------------------------------------------------------------ set-up

    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """One block per site, in the order of the program."""
        if not self.is_set_up:
            self._look_at(program)
        return tuple(
            Block(site.name, ((site, tuple(range(site.num_features))),), self._factor(site)) for site in program.latents
        )

    def _look_at(self, program: Program) -> None:
        """Find out which latents are encoded, what their encoders read, and what they were given."""
        self._data = data_sites(program)
        structure = structure_of(program, self._data)
        local = local_sites(program, structure)
        self._inputs = {name: readers(name, program, structure, local) for name in sorted(local)}
        self._static = all(name in structure.visible for inputs in self._inputs.values() for name in inputs)
        (given,) = self._given
        # Tuples, for a module that is an attribute would be a child of the guide.
        self._chosen = {name: (encoder,) for name, encoder in given_encoders(given, sorted(local)).items()}

    def _encoder_of(self, name: str) -> Given | None:
        return self._chosen[name][0] if name in self._chosen else None

    def _factor(self, site: Site) -> Factor:
        if not is_density(self._encoder_of(site.name)):
            return factor_of(site, self._encoder_of(site.name))
        width = self._widths.get(site.name, 0)
        if not width:
            # Not bound to the guide, which would then be in a cycle and outlive its last user.
            return DensityFactor(site, 0, partial(_call, self.encoders, _key(site.name)))
        # What a posterior says must not change when the network is trained on, nor carry its graph.
        return DensityFactor(site, width, copy.deepcopy(getattr(self.encoders, _key(site.name))).requires_grad_(False))

    def order_of_sites(self, program: Program) -> tuple[Site, ...]:
        """Latents with tables first, then the encoded ones: bottom-up where one reads another."""
        if self._static:
            return program.latents
        tables = [site for site in program.latents if site.name not in self._inputs]
        return (*tables, *(site for site in reversed(program.latents) if site.name in self._inputs))

    def finish_setup(self, program: Program) -> None:
        structure = structure_of(program, self._data)
        self._arguments = self._find_arguments(program)
        reading = self._read(structure, program.args, program.kwargs, program.indices, checked=True)
        values = {site.name: program.trace.nodes[site.name]["value"] for site in program.latents}
        widths: dict[str, int] = {}
        for block in self.blocks:
            site = block.site
            if site.name not in self._inputs:
                whole = replace(block, parts=tuple((s.at_full_size(), c) for s, c in block.parts))
                setattr(self.tables, _key(site.name), PyroParam(initial_parameters(whole), event_dim=1))
                continue
            x = self._encoder_input(site.name, reading, values)
            network = network_of(self._encoder_of(site.name), block, x, structure)
            if block.factor.is_point:
                with evaluating(network):
                    factor_parameters(block, site, structure, network(x))
            if isinstance(block.factor, DensityFactor):
                widths[site.name] = block.factor.num_params = x.shape[-1]
            setattr(self.encoders, _key(site.name), network)
        self._widths = widths
        self._structures[signature_of(program.args, program.kwargs)] = structure

    def _find_arguments(self, program: Program) -> VisibleArguments:
        """The arguments of the sites that are read; the others may be observed from anywhere."""
        read = {source for sources in self._inputs.values() for source in sources}.union(self._visible_names or ())
        unread = [name for name in program.visible if name not in read]
        model = poutine.block(self.model, hide=unread) if unread else self.model
        return find_visible(model, program.args, program.kwargs, self._visible_names)

    def undo_setup(self) -> None:
        super().undo_setup()
        self.encoders, self.tables = PyroModule(), PyroModule()
        self._forget()

    # ------------------------------------------------------------------ calls

    def check_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the model refuse bad data; in calls after the first, only while Pyro's validation is on."""
        if not self.is_set_up or (is_validation_enabled() and not is_tracing()):
            super().check_data(args, kwargs)

    def _structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
        key = signature_of(args, kwargs)
        found = self._structures.get(key)
        if found is None or not found.lasts:
            found = structure_of(Program(self.model, args, kwargs), self._data)
            self._refuse_other_latents(found)
            if len(self._structures) > 64:
                self._structures.clear()
            self._structures[key] = found
        return found

    def _refuse_other_latents(self, found: Structure) -> None:
        """Refuse a call in which other sites are latent than at set-up.

        Raises:
            ValueError: naming them.
        """
        known = {block.site.name for block in self.blocks}
        if set(found.latents) != known:
            raise ValueError(
                f"Expected the latents {sorted(known)} of the first call, but got {sorted(found.latents)}. Give every "
                "set of latents a guide of its own, or write the guide by hand."
            )

    def _read(
        self,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: Mapping[str, Tensor],
        *,
        checked: bool,
    ) -> Reading:
        if self._arguments is None:
            raise RuntimeError("Expected a guide that was set up, but got one that was not. Call `guide.setup(*args)`.")
        features = {}
        for name in self._arguments.sites:
            site = structure.visible[name]
            value = self._arguments.read(name, args, kwargs, indices)
            features[name] = visible_features(site, value, structure.hidden[name])
        if not self._context.arguments:
            return Reading(structure, features)
        chosen = {**structure.explicit, **indices}
        context = self._context.read(args, kwargs, structure.rows, structure.full_sizes, chosen)
        if checked:
            check_context(context, self._context.arguments)
        return Reading(structure, features, context)

    def plates_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        structure = self._structure(args, kwargs)
        self.plates = {}
        indices: dict[str, Tensor] = {}
        for frame in structure.frames:
            self.make_plate(frame.name, frame.dim, frame.full_size, frame.size, structure.explicit.get(frame.name))
            if frame.size != frame.full_size:
                with self.plates[frame.name] as drawn:
                    indices[frame.name] = drawn
        return self._read(structure, args, kwargs, indices, checked=is_validation_enabled() and not is_tracing())

    def block_parameters(self, block: Block, values: Mapping[str, Tensor], call: Reading) -> Tensor:
        name = block.site.name
        if name not in self._inputs:
            return getattr(self.tables, _key(name))
        site = call.structure.latents[name]
        x = self._encoder_input(name, call, values)
        if isinstance(block.factor, DensityFactor):
            return call.structure.from_rows(site, x)
        encoder = getattr(self.encoders, _key(name))
        # Encoders are promised rows; draws of other latents may lead them.
        output = encoder(x) if x.dim() == 2 else encoder(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1] + (-1,))
        return factor_parameters(block, site, call.structure, output)

    def _encoder_input(self, name: str, call: Reading, values: Mapping[str, Tensor]) -> Tensor:
        points = {block.site.name for block in self.blocks if block.factor.is_point}
        return call.encoder_input(self._inputs[name], values, points)

    # ------------------------------------------------------------------ posteriors

    def rows_parameters(self, program: Program, *, detach: bool = True) -> dict[str, Tensor]:
        """Parameters of each block for the rows of a program, ``(R, M, P)`` (static guides)."""
        layout = Layout(program.rows, program.latents)
        reading = self._read_program(program)
        result: dict[str, Tensor] = {}
        with torch.set_grad_enabled(not detach), self._pyro_context:
            for block in self.blocks:
                site = program.site(block.site.name)
                params = self._of_these_rows(block, site, program, self.block_parameters(block, {}, reading))
                result[block.name] = layout.to_rows(params, site)
        return result

    def _of_these_rows(self, block: Block, site: Site, program: Program, params: Tensor) -> Tensor:
        """Tables hold all elements of their plates."""
        if block.site.name in self._inputs:
            return params
        for frame in site.frames:
            if frame.name in program.indices:
                params = params.index_select(frame.dim - 1, program.indices[frame.name])
        return params

    def _read_program(self, program: Program) -> Reading:
        """The visible values of a program that was traced already, read from its arguments as in a call."""
        structure = structure_of(program, self._data)
        return self._read(structure, program.args, program.kwargs, program.indices, checked=True)

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v) for any data, in one pass of the encoders.

        For a model that draws its own rows, the posterior speaks of one such draw.
        """
        super().check_data(args, kwargs)
        self.setup(*args, **kwargs)
        return self.posterior_at(Program(self.model, args, kwargs))

    def posterior_at(self, program: Program) -> Posterior:
        """q(h | v) for the rows of a program that was traced already."""
        reading = self._read_program(program)
        sites = tuple(program.site(site.name) for site in self.order)

        def read(block: Block, values: Mapping[str, Tensor]) -> Tensor:
            with torch.no_grad(), self._stored_parameters():
                params = self.block_parameters(block, values, reading)
            return self._of_these_rows(block, block.site, program, params).detach()

        blocks = self.make_blocks(program)
        held = {block.name: read(block, {}) for block in blocks} if self._static else {}
        conditioner = (lambda block, values: held[block.name]) if held else read
        if not self._widths:
            return Posterior(program.rows, sites, blocks, conditioner, self._static)
        conditional = {name for name, sources in self._inputs.items() if not self._inputs.keys().isdisjoint(sources)}
        return DensityPosterior(program.rows, sites, blocks, conditioner, False, frozenset(conditional))

    @contextmanager
    def _stored_parameters(self) -> Generator[None]:
        """Read the parameters of Pyro's store where it has them (after a load, say), else the module's own."""
        if not any(name.startswith(f"{self._pyro_name}.") for name in pyro.get_param_store().keys()):
            yield
            return
        with poutine.block(), self._pyro_context:
            yield


def _call(encoders: PyroModule, key: str, x: Tensor) -> Any:
    return getattr(encoders, key)(x)


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)
