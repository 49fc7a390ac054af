"""Putting a driver's state back, by name and in place, into the same driver or one that was built the same way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parameter import is_lazy

from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.driver_state import capture, is_untouched, moved, owners, put_back, state_of
from pyro_ext.drivers import parts_of
from pyro_ext.optimizer_state import check_optimizer, restore_optimizer
from pyro_ext.ownership import (
    can_wait,
    modules_and_optimizers,
    note_parameters,
    parameter_names,
    registered_slots,
    slots,
    waits_for_data,
)
from pyro_ext.plain_data import constraint_from_plain, constraint_to_plain, shown
from pyro_ext.snapshot import Snapshot


def restore(
    driver: Any,
    state: Mapping[str, Any],
    *,
    where: str = "the state",
    map_location: torch.device | str | None = None,
    roles: Collection[str] | None = None,
    removes: bool = False,
) -> None:
    """Put a captured state back, in place, into the same driver or one built the same way.

    Parameters that do not exist yet, for their program was never run, are created: in the module's own tensor where
    there is one, else in Pyro's store. Everything is checked before anything is written.

    Args:
        driver: where to.
        state: what `capture` gave.
        where: what it is, for messages.
        map_location: where to create parameters of plain functions; None for the devices that they were on.
        roles: whose own state is put back beside the tensors ("guide", "m_step", ...); None for all.
        removes: whether parameters that the state does not have are removed from the store, not refused.

    Raises:
        CheckpointError: names, shapes, dtypes, constraints, modules or optimizers differ. Nothing has changed then.
    """
    modules, optims = modules_and_optimizers(driver)
    plan = _Plan(driver, state, where, map_location, removes)
    plan.check_modules(modules)
    plan.check_parameters(modules)
    plan.check_optimizers(optims)
    keeping = {role: owner for role, owner in owners(driver).items() if roles is None or role in roles}
    before = {role: state_of(owner) for role, owner in keeping.items()}
    snapshot = Snapshot.take(*parts_of(driver))
    try:
        plan.write(optims)
        for role, owner in keeping.items():
            if state["states"].get(role) is not None:
                put_back(owner, moved(state["states"][role], plan.beside))
        note_parameters(driver, state["parameters"])
    except BaseException:
        snapshot.restore()
        for role, owner in keeping.items():
            if before[role] is not None:
                put_back(owner, before[role])
        raise


class KeptState:
    """A state of a driver that can be written to a file, where a `Snapshot` cannot.

    Args:
        driver: whose state it is.
        state: what a file holds of it; None for the present one.
    """

    def __init__(self, driver: Any, state: dict[str, Any] | None = None) -> None:
        self.driver = driver
        self.state = capture(driver) if state is None else state

    def restore(self) -> None:
        """Put it back. What steps remember stays as it is, and parameters created since are removed."""
        restore(self.driver, self.state, roles=("guide",), removes=True)


class _Plan:
    """The writes of one restoration, each checked."""

    def __init__(self, driver: Any, state: Mapping[str, Any], where: str, map_location: Any, removes: bool) -> None:
        self.driver, self.state, self.where = driver, state, where
        self.map_location, self.removes = map_location, removes
        self.removed: list[str] = []
        self.targets: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.writes: list[tuple[Tensor, Tensor]] = []
        self.grads: list[tuple[Tensor, Any]] = []
        self.waiting: dict[str, Any] = {}
        self.new_buffers: list[tuple[dict[str, Any], str, Tensor]] = []

    def refuse(self, rule: str, got: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"Expected {rule} as in {self.where}, but got {got}. {remedy}")

    def check_modules(self, modules: list[nn.Module]) -> None:
        saved = self.state["modules"]
        names, ours = [m["class"] for m in saved], [type(m).__name__ for m in modules]
        if names != ours:
            raise self.refuse(
                f"the modules {', '.join(names) or 'none'}", ", ".join(ours) or "none", "Build model and guide alike."
            )
        for module, entry in zip(modules, saved, strict=True):
            tensors = {slot: t for slot, table, n in slots(module) if (t := table[n]) is not None and not is_lazy(t)}
            buffers = {slot: (table, name) for slot, table, name in slots(module, buffers=True)}
            for slot, name in entry["aliases"].items():
                if slot in tensors:
                    # Both, where the store holds another tensor than the module: a call reads the store's.
                    self.check_like(name, self.state["parameters"][name]["value"], tensors[slot])
                    self.targets.setdefault(name, tensors[slot])
                    self.write_later(tensors[slot], self.state["parameters"][name])
                elif not can_wait(name, module):
                    raise self.missing(slot, entry["class"], module)
            registered = registered_slots(module)
            for slot, held in entry["values"].items():
                if slot in tensors:
                    self.check_like(f"{entry['class']}.{slot}", held["value"], tensors[slot])
                    self.check_constraint(slot, held, registered.get(slot, ("", constraints.real))[1])
                    self.write_later(tensors[slot], held)
                elif can_wait(held["name"], module):
                    self.waiting[held["name"]] = held
                else:
                    raise self.missing(slot, entry["class"], module)
            for slot, value in entry["buffers"].items():
                if slot not in buffers:
                    raise self.missing(slot, entry["class"], module)
                table, name = buffers[slot]
                if table[name] is None:
                    self.new_buffers.append((table, name, value))
                else:
                    self.check_like(f"{entry['class']}.{slot}", value, table[name])
                    self.writes.append((table[name], value))
            extra = tensors.keys() - entry["aliases"].keys() - entry["values"].keys()
            if extra:
                raise self.refuse(
                    f"no parameters of {entry['class']} but those",
                    f"{', '.join(map(repr, sorted(extra)))} too",
                    "Build model and guide alike.",
                )

    def missing(self, slot: str, kind: str, module: nn.Module) -> CheckpointError:
        if waits_for_data(module):
            return self.refuse(
                f"{slot!r} of {kind}",
                "a guide that was not set up",
                "Pass `batch=`, the data of one call of the model.",
            )
        return self.refuse(f"{slot!r} of {kind}", "none", "Build model and guide alike.")

    def check_parameters(self, modules: list[nn.Module]) -> None:
        store = pyro.get_param_store()
        saved = self.state["parameters"]
        try:
            ours = parameter_names(self.driver)
        except ValueError:
            ours = []
        values = {held["name"] for entry in self.state["modules"] for held in entry["values"].values()}
        missing = [name for name in ours if name not in saved and name not in values]
        if self.removes:
            self.removed = missing
        elif missing:
            raise self.refuse(
                f"only the parameters {', '.join(map(repr, saved)) or 'none'}",
                f"{', '.join(map(repr, missing))} too",
                "Build model and guide alike, and give them the same names (`name=`).",
            )
        owned = dict(pair for module in modules for pair in registered_slots(module).values())
        for name, entry in (saved | self.waiting).items():
            if name in store:
                target = store._params[name]
                constraint = store._constraints[name]
            elif name in self.targets:
                target, constraint = self.targets[name], owned.get(name, constraints.real)
            else:
                if ours and not any(waits_for_data(module) for module in modules):
                    raise self.refuse(
                        f"a parameter {name!r}",
                        f"none among {', '.join(map(repr, ours))}",
                        "Build model and guide alike; for programs that were never run, pass `batch=`.",
                    )
                target, constraint = self.created(name, entry), constraint_from_plain(entry["constraint"])
            self.check_like(name, entry["value"], target)
            self.check_constraint(name, entry, constraint)
            self.targets[name], self.constraints[name] = target, constraint
            self.write_later(target, entry)

    def write_later(self, target: Tensor, entry: Mapping[str, Any]) -> None:
        self.writes.append((target, entry["value"]))
        self.grads.append((target, entry["grad"]))

    def check_constraint(self, name: str, entry: Mapping[str, Any], constraint: Any) -> None:
        found = constraint_to_plain(constraint)
        if found != entry["constraint"]:
            raise self.refuse(
                f"{name!r} under the constraint {shown(entry['constraint'])}",
                shown(found),
                "Declare it as it was when the file was written.",
            )

    def created(self, name: str, entry: Mapping[str, Any]) -> Tensor:
        if constraint_from_plain(entry["constraint"]) is None:
            raise CheckpointError(
                f"Expected a constraint of torch or Pyro on {name!r}, which does not exist yet, but got "
                f"{shown(entry['constraint'])} in {self.where}. Pass `batch=`, the data of one call of the model."
            )
        device = entry["device"] if self.map_location is None else self.map_location
        try:
            value = torch.empty_like(entry["value"], device=device)
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"Expected the device {device} for {name!r} as in {self.where}, but it is not there ({error}). "
                'Pass `map_location="cpu"`.'
            ) from error
        return nn.Parameter(value, requires_grad=value.is_floating_point())

    def check_like(self, name: str, value: Tensor, target: Tensor) -> None:
        if value.shape != target.shape:
            raise self.refuse(
                f"{name!r} of shape {tuple(value.shape)}", f"{tuple(target.shape)}", "Build model and guide alike."
            )
        if value.dtype != target.dtype:
            raise self.refuse(
                f"{name!r} of dtype {value.dtype}",
                f"{target.dtype}",
                f"Build the model in that dtype (torch.set_default_dtype({value.dtype})).",
            )

    def check_optimizers(self, optims: list[Any]) -> None:
        saved = self.state["optimizers"]
        if len(saved) != len(optims):
            raise self.refuse(f"{len(saved)} optimizers", f"{len(optims)}", "Build the driver alike.")
        for optim, entry in zip(optims, saved, strict=True):
            problem = check_optimizer(optim, entry)
            if problem is not None:
                raise self.refuse(*problem)

    def beside(self, tensor: Tensor) -> Tensor:
        """A tensor of a step's own state, on the device of the parameters."""
        first = next(iter(self.targets.values()), tensor)
        return tensor.to(first.device)

    def write(self, optims: list[Any]) -> None:
        store: Any = pyro.get_param_store()
        for name in self.removed:
            del store[name]
        for name, tensor in self.targets.items():
            if name not in store:
                store._params[name] = tensor
                store._param_to_name[tensor] = name
                store._constraints[name] = self.constraints[name]
        # A model tells by the version counters of its tensors whether it holds more than its start.
        unseen = self.state["untouched"] and is_untouched(self.driver)
        with torch.no_grad():
            for target, value in self.writes:
                if unseen:
                    target.data.copy_(value)
                else:
                    target.copy_(value)
        for table, name, value in self.new_buffers:
            table[name] = value.clone()
        for tensor, grad in self.grads:
            if grad is None:
                tensor.grad = None
            else:
                tensor.grad = (
                    grad.to(tensor.device, copy=True) if isinstance(grad, Tensor) else torch.zeros_like(tensor)
                )
        for optim, entry in zip(optims, self.state["optimizers"], strict=True):
            restore_optimizer(optim, entry)
