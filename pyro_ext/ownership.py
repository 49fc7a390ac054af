"""Which parameters in Pyro's store belong to a driver, and where its modules keep them."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints
from torch.optim import Optimizer

from pyro_ext.drivers import parts_of
from pyro_ext.plain_data import name_of
from pyro_ext.snapshot import modules_of
from pyro_ext.unbounded import MODULE_SEPARATOR

_asked_for: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""The parameters that programs of plain functions were seen to have, for each driver."""


class _Names(Messenger):
    """Note the names of the parameters that a program asks for."""

    only_watches = True

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_post_param(self, msg: Any) -> None:
        self.names.add(msg["name"])


@contextmanager
def noting_parameters(driver: Any) -> Generator[None, None, None]:
    """Remember the parameters that a driver's programs ask for in the block: they belong to it."""
    with _Names(_asked_for.setdefault(driver, set())):
        yield


def note_parameters(driver: Any, names: Iterable[str]) -> None:
    """Remember that parameters belong to a driver."""
    _asked_for.setdefault(driver, set()).update(names)


def parameter_names(driver: Any) -> list[str]:
    """The parameters in Pyro's store that belong to a driver, in the order of the store.

    They are those of its modules, those that its optimizers know, and those that its programs were seen to ask for.

    Raises:
        ValueError: a program is a plain function that nobody has seen running, so that its parameters are not known.
    """
    store = pyro.get_param_store()
    modules, optims = modules_and_optimizers(driver)
    known = set(_asked_for.get(driver, ()))
    for optim in optims:
        known |= _names_in(optim)
    noted = getattr(driver, "parameter_names", None)
    known |= set(noted or ())
    functions = [p for p in (getattr(driver, "model", None), getattr(driver, "guide", None)) if p is not None]
    unknown = [name_of(p) for p in functions if not modules_of(p)]
    if unknown and not known and noted is None and driver not in _asked_for and len(store):
        raise ValueError(
            f"Expected a driver whose parameters are known, but got the plain functions {', '.join(unknown)}, which "
            "have not been run. Take a step first."
        )
    tensors = {id(tensor) for module in modules for tensor in module.parameters()}
    for module in modules:
        known |= {name for name, _ in registered_slots(module).values()}
    return [name for name, tensor in store.named_parameters() if name in known or id(tensor) in tensors]


def _names_in(optim: Any) -> set[str]:
    store = pyro.get_param_store()
    if isinstance(optim, PyroOptim):
        names = {store.param_name(tensor) for tensor in optim.optim_objs} | set(optim._state_waiting_to_be_consumed)
    else:
        names = {store.param_name(tensor) for group in optim.param_groups for tensor in group["params"]}
    return {name for name in names if name is not None}


def registered_slots(root: nn.Module) -> dict[str, tuple[str, Any]]:
    """Where PyroModules keep their parameters, with the name and constraint that each has in Pyro's store, or will."""
    found: dict[str, tuple[str, Any]] = {}
    for place, child in root.named_modules():
        if not isinstance(child, PyroModule):
            continue
        slot = f"{place}." if place else ""
        prefix = f"{child._pyro_name}." if child._pyro_name else ""
        for name in child._parameters:
            # A PyroParam's own entry, which follows, has another name.
            found[f"{slot}{name}"] = f"{prefix}{name}", constraints.real
        for name, (constraint, _) in child._pyro_params.items():
            found[f"{slot}{name}_unconstrained"] = f"{prefix}{name}", constraint
        for name, inner in child._modules.items():
            if inner is not None and not isinstance(inner, PyroModule):
                for parameter, _ in inner.named_parameters():
                    found[f"{slot}{name}.{parameter}"] = (
                        f"{prefix}{name}{MODULE_SEPARATOR}{parameter}",
                        constraints.real,
                    )
    return found


def modules_and_optimizers(driver: Any) -> tuple[list[nn.Module], list[Any]]:
    """The parts of a driver, as `parts_of` finds them."""
    parts = parts_of(driver)
    return (
        [part for part in parts if isinstance(part, nn.Module)],
        [part for part in parts if isinstance(part, PyroOptim | Optimizer)],
    )


def slots(module: nn.Module, *, buffers: bool = False) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The places of a module's parameters, or buffers: dotted name, table and key."""
    for prefix, child in module.named_modules():
        table: dict[str, Any] = child._buffers if buffers else child._parameters
        for name in table:
            yield (f"{prefix}.{name}" if prefix else name), table, name


def waits_for_data(module: nn.Module) -> bool:
    """Whether a guide makes its parameters at its first call."""
    return any(isinstance(child, AutoGuide) and child.prototype_trace is None for child in module.modules())


def can_wait(name: str | None, module: nn.Module) -> bool:
    """Whether a parameter may wait in the store for the set-up of its guide: the layers in it would not look there."""
    return name is not None and MODULE_SEPARATOR not in name and waits_for_data(module)
