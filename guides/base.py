"""The base of all guides: a Pyro guide that is a product of factors, built from the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_ext.blocks import Block, site_distribution
from pyro_ext.checks import check_data_of
from pyro_ext.naming import claim_name
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.sites import Kind, Site
from pyro_ext.tracing import is_tracing


class FactorGuide(AutoGuide):
    """q(h | v) as a product of factors, one per block of latents, as a Pyro guide.

    A subclass says which blocks there are (`make_blocks`) and where their parameters come from
    (`block_parameters`). The guide traces its model at its first call or in `setup`.

    Args:
        model: any Pyro model.
        name: name of the guide's parameters; a free one is found when it is None.

    Raises:
        ValueError: the name is held by another live module.
    """

    is_table: bool = False

    def __init__(self, model: Callable[..., Any], *, name: str | None = None) -> None:
        if not callable(model):
            raise TypeError(f"Expected a model that can be called, but got {type(model).__name__}. Pass a Pyro model.")
        super().__init__(model)
        self._pyro_name = claim_name(self, name)
        self.blocks: tuple[Block, ...] = ()
        self.order: tuple[Site, ...] = ()
        self.inference: Callable[..., Posterior] | None = None

    @property
    def is_set_up(self) -> bool:
        """Whether the model was traced and the blocks are known."""
        return bool(self.blocks)

    @property
    def is_static(self) -> bool:
        """Whether no factor depends on the value of another latent."""
        return True

    @property
    def is_point(self) -> bool:
        """Whether every factor is a point mass."""
        return False

    @abstractmethod
    def make_blocks(self, program: Program) -> tuple[Block, ...]:
        """The blocks of q for a traced program."""

    @abstractmethod
    def block_parameters(self, block: Block, values: Mapping[str, Tensor], call: Any) -> Tensor:
        """Parameters of a block, ``batch + (P,)``, for one call of the guide."""

    def finish_setup(self, program: Program) -> None:
        """Create what `block_parameters` needs, once the blocks are known."""

    def order_of_sites(self, program: Program) -> tuple[Site, ...]:
        """The order in which q draws the sites."""
        return program.latents

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Trace the model and create the factors; done by the first call unless it was done before.

        Raises:
            ValueError: the model has no visible or no latent site, or a latent that no factor can treat.
        """
        if self.is_set_up:
            return
        store = pyro.get_param_store()
        before = set(store.keys())
        try:
            self.check_data(args, kwargs)
            program = Program(self.model, args, kwargs)
            self.prototype_trace = program.trace
            self._prototype_frames = {f.name: f for s in program.latents for f in s.frames}
            refuse_unknown_kinds(program)
            blocks = self.make_blocks(program)
            self.order = self.order_of_sites(program)
            self.blocks = blocks
            with torch.no_grad():
                self.finish_setup(program)
        except Exception:
            self.undo_setup()
            for name in set(store.keys()) - before:
                del store[name]
            raise

    def undo_setup(self) -> None:
        """Forget the first call: it was refused."""
        self.blocks, self.order, self.prototype_trace = (), (), None

    def check_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the model refuse bad data, where it says how (``check_data``)."""
        if any(leaf is not None for leaf in tree_leaves((args, kwargs))):
            check_data_of(self.model, args, kwargs)

    def call_program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """The program at the arguments of one call: its plates and, for encoders, its visible values."""
        return Program(self.model, args, kwargs)

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that the guide cannot serve."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, each at its own site, and return them."""
        if self.is_set_up and not is_tracing():
            self.check_data(args, kwargs)
        self.setup(*args, **kwargs)
        if not is_tracing():
            # Outside a graph its driver asks.
            self.check_call(args, kwargs)
        call = self.plates_of(args, kwargs)
        prototype: Any = self.prototype_trace
        values: dict[str, Tensor] = {}
        params: dict[str, Tensor] = {}
        for site in self.order:
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(self.plates[frame.name])
                holding = [b for b in self.blocks if b.span(site.name) is not None]
                for block in holding:
                    if block.name not in params:
                        params[block.name] = self.block_parameters(block, values, call)
                fn = site_distribution(site, holding, params, values)
                infer: Any = {k: v for k, v in prototype.nodes[site.name]["infer"].items() if k == "enumerate"}
                values[site.name] = pyro.sample(site.name, fn, infer=infer)
        return values

    @abstractmethod
    def plates_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Create ``self.plates`` for one call, and return what `block_parameters` needs of the call."""

    def make_plate(self, name: str, dim: int, size: int, chosen: int, indices: Tensor | None) -> None:
        """Create one plate: with given indices, or with its own draw of ``chosen`` elements."""
        if indices is not None:
            self.plates[name] = pyro.plate(name, size, dim=dim, subsample=indices)
        else:
            self.plates[name] = pyro.plate(name, size, dim=dim, subsample_size=chosen)

    @abstractmethod
    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v) for the given arguments."""

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mean of every site (Pyro's autoguides name this method so)."""
        posterior = self.posterior(*args, **kwargs)
        return {site.name: posterior[site.name].mean for site in self.order}


def refuse_unknown_kinds(program: Program) -> None:
    """Refuse latents that no factor treats, by name.

    Raises:
        ValueError: a latent counts (Poisson, Binomial, ...) or has values of no known kind.
    """
    for site in program.latents:
        if site.kind is Kind.OTHER_DISCRETE:
            raise ValueError(
                f"Expected binary, categorical, one-hot or continuous latents, but got site {site.name!r} with "
                f"{type(site.fn).__name__}. Observe it, or sum it out in the model."
            )
