"""Guides whose factors have a row of parameters for every datum."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.data_identity import DataIdentity, tensors_in
from pyro_ext.guides.base import FactorGuide
from pyro_ext.initial import initial_parameters
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.sites import Site


class TableGuide(FactorGuide):
    """A guide with a table of parameters: one row per element of the plates of each block.

    The table belongs to one data set. Rows are addressed by the indices of the plates: the model's own
    when it was given ``subsample=``, else the guide's. Other data in the same argument is refused.
    """

    is_table = True

    def __init__(self, model: Callable[..., Any], *, name: str | None = None) -> None:
        super().__init__(model, name=name)
        self.tables = PyroModule()
        self._identity: DataIdentity | None = None
        self._answered = False
        self._cold_versions: dict[str, int] = {}
        self._explicit: frozenset[str] = frozenset()
        self._loaded: dict[str, Any] | None = None

    def finish_setup(self, program: Program) -> None:
        self._explicit = program.explicit_plates
        for block in self.blocks:
            start = initial_parameters(_whole(block))
            self._check_loaded_table(block, start)
            setattr(self.tables, _key(block), PyroParam(start, constraints.real, event_dim=1))
        if not self._explicit:
            self._identity = DataIdentity(program.args, program.kwargs)
        self.holds_answer = False
        if self._loaded is not None:
            self._check_loaded_data(self._loaded, program.args, program.kwargs)
            store: Any = pyro.get_param_store()
            for block in self.blocks:
                name = f"{self._pyro_name}.tables.{_key(block)}"
                if name in store:
                    self.tables._parameters[f"{_key(block)}_unconstrained"] = store._params[name]
            self.load_checkpoint_state(self._loaded)

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tables: whose data they belong to, and whether they hold an answer."""
        if not self.is_set_up:
            return self._loaded or {}
        identity = None if self._identity is None else self._identity.state()
        return {"identity": identity, "answered": self.holds_answer}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Put back what `checkpoint_state` gave; before the set-up, it is kept until then.

        The tables themselves must have been written before.
        """
        if not state or not self.is_set_up:
            self._loaded = state or None
            return
        self._loaded = None
        if state["identity"] is not None and not self._explicit:
            self._identity = DataIdentity.from_state(state["identity"])
        self.holds_answer = state["answered"]

    def was_loaded_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether tables for these data were loaded, and wait for the set-up."""
        loaded = self._loaded
        if loaded is None or loaded["identity"] is None:
            return False
        return DataIdentity.from_state(loaded["identity"]).matches(args, kwargs)

    def check_checkpoint_state(self, state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a checkpoint whose tables belong to other data than these.

        Raises:
            ValueError: the data are not those that the tables were saved with.
        """
        if state:
            self._check_loaded_data(state, args, kwargs)

    def _check_loaded_data(self, state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state["identity"] is None or DataIdentity.from_state(state["identity"]).matches(args, kwargs):
            return
        raise ValueError(
            f"Expected the data that the table of {self._pyro_name!r} was saved with, but got other data. A table "
            "holds a row of q per datum: pass the same data in the same order, or use `em.infer(...)` for new data."
        )

    def _check_loaded_table(self, block: Block, start: Tensor) -> None:
        store: Any = pyro.get_param_store()
        name = f"{self._pyro_name}.tables.{_key(block)}"
        if self._loaded is not None and name in store and store[name].shape != start.shape:
            raise ValueError(
                f"Expected {name} of shape {tuple(start.shape)} for these data, but got {tuple(store[name].shape)} "
                "from the file that was loaded. Pass the data and the model that it was saved with."
            )

    @property
    def holds_answer(self) -> bool:
        """Whether the tables hold more than their cold start: an E-step or an optimizer wrote to them."""
        if not self.is_set_up:
            return False
        return self._answered or any(self.table(b)._version != self._cold_versions[b.name] for b in self.blocks)

    @holds_answer.setter
    def holds_answer(self, value: bool) -> None:
        self._answered = value
        self._cold_versions = {block.name: self.table(block)._version for block in self.blocks}

    def undo_setup(self) -> None:
        super().undo_setup()
        self.tables = PyroModule()
        self._identity, self._explicit, self._answered = None, frozenset(), False

    def owns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the table belongs to these data (or to rows that the model is told to use)."""
        return self._identity is None or self._identity.matches(args, kwargs)

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse other data than the table's.

        Raises:
            ValueError: the data are not those of the first call.
        """
        if not self.owns(args, kwargs):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(args, kwargs))
            raise ValueError(
                f"Expected the data that the table of {self._pyro_name!r} was set up with, but got other data (shapes "
                f"{shapes}). A table holds a row of q per datum: use `em.infer(...)` for new data, `subsample=` in the "
                "model for minibatches, or the Amortized guide."
            )

    def plates_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Create the plates; returned are the indices that Pyro does not heed, of plates with all their elements."""
        self.plates = {}
        indices: Mapping[str, Tensor] = {}
        if self._explicit:
            indices = _explicit_indices(self.call_program(args, kwargs))
        for frame in self._prototype_frames.values():
            full = frame.full_size
            self.make_plate(frame.name, frame.dim, full, frame.size, indices.get(frame.name))
        sizes = {frame.name: frame.full_size for frame in self._prototype_frames.values()}
        return {name: index for name, index in indices.items() if len(index) == sizes.get(name)}

    def block_parameters(self, block: Block, values: Mapping[str, Tensor], call: Any) -> Tensor:
        table = getattr(self.tables, _key(block))
        for frame in block.site.frames:
            if frame.name in call:
                table = table.index_select(frame.dim - 1, call[frame.name])
        return table

    def table(self, block: Block) -> Tensor:
        """The whole table of a block, ``full batch + (P,)``: the tensor that optimizers see."""
        name = f"{self._pyro_name}.tables.{_key(block)}"
        store: Any = pyro.get_param_store()
        if name in store:
            return store[name].unconstrained()
        return getattr(self.tables, f"{_key(block)}_unconstrained")

    def rows_parameters(self, program: Program, *, detach: bool = True) -> dict[str, Tensor]:
        """The table's rows for the rows of a program: for each block ``(R, M, P)``."""
        layout = Layout(program.rows, program.latents)
        result = {}
        for block in self.blocks:
            site = program.site(block.site.name)
            if detach:
                table = self.table(block).detach()
            else:
                # Read inside the module's context, so that a tracer outside sees the parameter.
                with self._pyro_context:
                    table = getattr(self.tables, _key(block))
            for dim, index in _selections(site, program):
                table = table.index_select(dim - 1, index)
            result[block.name] = layout.to_rows(table, site)
        return result

    def assign(self, program: Program, params: Mapping[str, Tensor]) -> None:
        """Write parameters ``(R, M, P)`` into the table's rows for the rows of a program."""
        layout = Layout(program.rows, program.latents)
        for block in self.blocks:
            site = program.site(block.site.name)
            table = self.table(block)
            new = layout.from_rows(params[block.name], site)
            selections = _selections(site, program)
            with torch.no_grad():
                if not selections:
                    table.copy_(new)
                    continue
                position: list[Any] = [slice(None)] * table.dim()
                if len(selections) == 1:
                    dim, index = selections[0]
                    position[table.dim() + dim - 1] = index
                    table[tuple(position)] = new
                else:
                    _assign_grid(table, selections, new)
        self.holds_answer = True

    def forget(self) -> None:
        """Put the whole table back to its cold start, at the present theta's prior of the first call."""
        for block in self.blocks:
            with torch.no_grad():
                self.table(block).copy_(initial_parameters(_whole(block)))
        self.holds_answer = False

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v) of the table's data, or of new data when an `EM` gave the guide its E-step.

        Raises:
            ValueError: other data, and no E-step to infer with.
        """
        self.check_data(args, kwargs)
        self.setup(*args, **kwargs)
        if not self.owns(args, kwargs):
            if self.inference is not None:
                return self.inference(*args, **kwargs)
            self.check_call(args, kwargs)
        program = Program(self.model, args, kwargs)
        if self._explicit:
            layout, blocks = Layout(program.rows, program.latents), self.make_blocks(program)
            rows = self.rows_parameters(program)
            params = {b.name: layout.from_rows(rows[b.name], b.site) for b in blocks}
            return Posterior.from_parameters(program.rows, program.latents, blocks, params)
        sizes = {f.name: f.full_size for s in program.latents for f in s.frames}
        sites = [site.at_full_size() for site in self.order]
        blocks = [_whole(block) for block in self.blocks]
        params = {block.name: self.table(block) for block in blocks}
        return Posterior.from_parameters(program.rows.at_full_size(sizes), sites, blocks, params)


def _whole(block: Block) -> Block:
    """A block over all elements of its plates."""
    return replace(block, parts=tuple((site.at_full_size(), components) for site, components in block.parts))


def _assign_grid(table: Tensor, selections: list[tuple[int, Tensor]], new: Tensor) -> None:
    ranges = [torch.arange(size, device=table.device) for size in table.shape]
    for dim, index in selections:
        ranges[table.dim() + dim - 1] = index
    table[torch.meshgrid(*ranges, indexing="ij")] = new


def _selections(site: Site, program: Program) -> list[tuple[int, Tensor]]:
    return [(f.dim, program.indices[f.name]) for f in site.frames if f.name in program.indices]


def _explicit_indices(program: Program) -> dict[str, Tensor]:
    return {name: program.trace.nodes[name]["value"] for name in program.explicit_plates}


def _key(block: Block) -> str:
    return re.sub(r"\W", lambda found: f"_{ord(found.group()):x}_", block.name)
