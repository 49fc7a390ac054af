"""Snapshots of everything that a fit changes, restored into the very same tensors."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state as _get_host_rng_state
from pyro.util import set_rng_state as _set_host_rng_state
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

Part = nn.Module | PyroOptim | Optimizer
_ATOMS = frozenset({bool, int, float, str, tuple, type(None), Tensor})


class _CreatedParameters(Messenger):
    """Remember the value that each new parameter is created with, before an optimizer moves it."""

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, tuple[Tensor, Tensor, Any]] = {}
        self._known = set(pyro.get_param_store().keys())

    def _pyro_post_param(self, msg: Any) -> None:
        name = msg["name"]
        store = pyro.get_param_store()
        if name not in self._known and name in store:
            self._known.add(name)
            tensor = store._params[name]
            self.values[name] = (tensor, tensor.detach().clone(), store._constraints[name])


class Snapshot:
    """A copy of the state of a fit: Pyro's parameter store and, where given, modules, optimizers and RNGs.

    Values are written back *in place* into the unconstrained tensors, so that a `PyroModule`'s
    parameters, the optimizers' state and compiled graphs still belong to the same tensors. Parameters
    created since are removed from the store, deleted ones come back, and gradients written since are
    zeroed (None where they were None), as between the steps of `SVI`. A guide that set itself up since
    stays set up; its modules' new parameters go back to the values they began with only if the set-up
    ran inside `watching`. Python attributes of modules are not covered.

    Example:
        >>> from pyro.distributions import constraints
        >>> pyro.clear_param_store()
        >>> scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        >>> snapshot = Snapshot.take()
        >>> with torch.no_grad():
        ...     _ = scale.unconstrained().add_(1.0)
        >>> snapshot.restore()
        >>> pyro.param("scale").item()
        2.0
    """

    def __init__(self, parts: tuple[Part, ...], rng: bool, settled: Collection[Tensor] = ()) -> None:
        self._parts = parts
        self._settled: dict[int, int | None] = {id(tensor): None for tensor in settled}
        self._with_rng = rng
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._created: dict[str, tuple[Tensor, Tensor, Any]] = {}
        self._record()

    @classmethod
    def take(cls, *parts: Part, rng: bool = False, settled: Collection[Tensor] = ()) -> Snapshot:
        """Record the present state.

        Args:
            settled: large tensors that are rarely written to: `retake` copies them only where their version counter
                says that they were. Writes through ``.data`` pass unseen.
            parts: modules, whose parameters and buffers are recorded as well as the parameter store, and
                optimizers (Pyro's or torch's), whose state and settings are; a learning-rate schedule counts.
            rng: whether the random generators of torch, NumPy and Python are recorded too.

        Raises:
            TypeError: a part is neither a module nor an optimizer.
        """
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(
                    f"Expected modules and optimizers, but got {type(part).__name__}. "
                    "Pyro's parameter store is always recorded; pass `modules_of(program)` for a plain function."
                )
        return cls(parts, rng, settled)

    def retake(self) -> None:
        """Record the present state in place of the one recorded, in the same memory."""
        self._created = {}
        self._record()

    @property
    def num_non_finite(self) -> int:
        """How many elements of the recorded unconstrained parameters are NaN or infinite.

        Some may be so for good: a probability of exactly 0 has the unconstrained value -inf.
        """
        created = [value for name, (_, value, _) in self._created.items() if name not in self._store]
        return sum(map(_num_non_finite, [*(self._values[id(t)][1] for t, _ in self._store.values()), *created]))

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Note the parameters created in the block, with the values they are created with.

        `restore` then puts them back at those values instead of removing them from the store: the state
        before the first step of a fit, in which parameters come into being and move at once.
        """
        watch = _CreatedParameters()
        self._created = watch.values
        with watch:
            yield

    def restore(self, *, keep_created: bool = True) -> None:
        """Put the recorded state back, any number of times.

        Args:
            keep_created: whether parameters that `watching` saw created stay in the store; in either
                case their tensors go back to the values they were created with.
        """
        store = pyro.get_param_store()
        # In the order of the store, not that in which a blocked set-up let them be seen.
        names = [n for n in dict.fromkeys((*store.keys(), *self._created)) if n not in self._store]
        created = {n: self._created[n] for n in names if n in self._created}
        kept = created if keep_created else {}
        store.clear()
        store.set_state(
            {
                "params": {n: t for n, (t, _) in self._store.items()} | {n: t for n, (t, _, _) in kept.items()},
                "constraints": {n: c for n, (_, c) in self._store.items()} | {n: c for n, (_, _, c) in kept.items()},
            }
        )
        for table, name, tensor in self._slots:
            table[name] = tensor
        for pyro_optim, tables in self._tables:
            vars(pyro_optim).update({name: dict(table) for name, table in tables.items()})
        for optimizer, states, groups in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update({p: _copied(state) for p, state in states})
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(_copied(settings))
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for tensor, value in [*self._values.values(), *((t, v) for t, v, _ in created.values())]:
                _write(tensor, value)
        for tensor, version in [*self._grads, *((t, None) for t, _, _ in created.values())]:
            if tensor.grad is not None and tensor.grad._version != version:
                tensor.grad = None if version is None else torch.zeros_like(tensor)
        if self._rng is not None:
            set_rng_state(self._rng)

    def _record(self) -> None:
        store = pyro.get_param_store()
        constraints = store._constraints
        self._old, self._values = self._values, {}
        self._store = {n: (t, constraints[n]) for n, t in store.named_parameters()}
        for tensor, _ in self._store.values():
            self._keep(tensor)
        self._slots: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._tables: list[tuple[PyroOptim, dict[str, dict[Any, Any]]]] = []
        self._optimizers: list[tuple[Optimizer, list[tuple[Tensor, dict[str, Any]]], list[dict[str, Any]]]] = []
        self._schedulers: list[tuple[Any, dict[str, Any]]] = []
        for part in self._parts:
            if isinstance(part, nn.Module):
                self._record_module(part)
            elif isinstance(part, PyroOptim):
                self._record_pyro_optim(part)
            else:
                self._record_optimizer(part)
        self._old = {}
        with torch.no_grad():
            pairs = [
                (value, tensor)
                for key, (tensor, value) in self._values.items()
                if key not in self._settled or self._settled[key] != tensor._version
            ]
            _copy_all([value for value, _ in pairs], [tensor for _, tensor in pairs])
        self._settled.update({id(t): t._version for _, t in pairs if id(t) in self._settled})
        self._grads = [
            (tensor, None if tensor.grad is None else tensor.grad._version)
            for tensor, _ in self._values.values()
            if tensor.requires_grad and tensor.is_leaf
        ]
        self._rng = rng_state() if self._with_rng else None

    def _keep(self, tensor: Tensor) -> None:
        key = id(tensor)
        if key in self._values:
            return
        old = self._old.get(key)
        if old is not None and _same_layout(old[1], tensor):
            self._values[key] = old
        elif not is_lazy(tensor) and not _is_expanded(tensor):
            self._values[key] = (tensor, torch.empty_like(tensor, requires_grad=False))

    def _record_module(self, module: nn.Module) -> None:
        for child in module.modules():
            for table in (child._parameters, child._buffers):
                for name, tensor in table.items():
                    self._slots.append((table, name, tensor))
                    if tensor is not None:
                        self._keep(tensor)

    def _record_pyro_optim(self, optim: PyroOptim) -> None:
        names = ("optim_objs", "grad_clip", "_state_waiting_to_be_consumed")
        self._tables.append((optim, {name: dict(getattr(optim, name)) for name in names}))
        for optimizer in optim.optim_objs.values():
            if hasattr(optimizer, "optimizer"):
                self._schedulers.append((optimizer, copy.deepcopy(optimizer.state_dict())))
                optimizer = optimizer.optimizer
            self._record_optimizer(optimizer)

    def _record_optimizer(self, optimizer: Optimizer) -> None:
        states = [(parameter, self._copy_settings(state)) for parameter, state in optimizer.state.items()]
        groups = [self._copy_settings(group) for group in optimizer.param_groups]
        for group in groups:
            del group["params"]
        self._optimizers.append((optimizer, states, groups))

    def _copy_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        copied = _copied(settings)
        for value in copied.values():
            if type(value) is Tensor or (type(value) not in _ATOMS and isinstance(value, Tensor)):
                self._keep(value)
        return copied


@contextmanager
def unchanged(*parts: Part, rng: bool = True) -> Generator[Snapshot, None, None]:
    """Put everything back as it was when the block ends, in whatever way it ends.

    Args:
        parts: as in `Snapshot.take`.
        rng: whether the random generators are put back too.
    """
    snapshot = Snapshot.take(*parts, rng=rng)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def unchanged_on_error(*parts: Part, rng: bool = True) -> Generator[Snapshot, None, None]:
    """Put everything back as it was when the block raises, and let the error pass.

    Args:
        parts: as in `Snapshot.take`.
        rng: whether the random generators are put back too.

    Example:
        >>> pyro.clear_param_store()
        >>> try:
        ...     with unchanged_on_error():
        ...         _ = pyro.param("w", torch.zeros(2))
        ...         raise ValueError("refused")
        ... except ValueError as error:
        ...     print(error, list(pyro.get_param_store()))
        refused []
    """
    snapshot = Snapshot.take(*parts, rng=rng)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise


def modules_of(*programs: Any) -> tuple[nn.Module, ...]:
    """The modules behind models and guides: themselves, owners of bound methods, and what handlers wrap.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> modules_of(linear, linear.forward, pyro.poutine.block(linear), len)
        (Linear(in_features=2, out_features=1, bias=True),)
    """
    found: dict[int, nn.Module] = {}
    for program in programs:
        inner = program
        while inner is not None:
            owner = inner if isinstance(inner, nn.Module) else getattr(inner, "__self__", None)
            if isinstance(owner, nn.Module):
                found[id(owner)] = owner
                break
            wrapped = getattr(inner, "__wrapped__", None)
            inner = inner.func if wrapped is None and isinstance(inner, functools.partial) else wrapped
    return tuple(found.values())


def num_non_finite() -> int:
    """How many elements of the unconstrained values in Pyro's parameter store are NaN or infinite."""
    return sum(_num_non_finite(tensor.detach()) for _, tensor in pyro.get_param_store().named_parameters())


def rng_state() -> dict[str, Any]:
    """State of the random generators of torch (every device in use), NumPy and Python."""
    state = _get_host_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back a state given by `rng_state`."""
    _set_host_rng_state({name: value for name, value in state.items() if name != "cuda"})
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _num_non_finite(tensor: Tensor) -> int:
    # A finite sum proves that there are none; the sum of finite values may still overflow.
    return 0 if math.isfinite(tensor.sum().item()) else int((~tensor.isfinite()).sum())


def _write(tensor: Tensor, value: Tensor) -> None:
    if _same_layout(tensor, value):
        tensor.copy_(value)
    else:
        tensor.data = value.clone()


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    # A fit does this at every step: one call for all tensors halves its price.
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _is_expanded(tensor: Tensor) -> bool:
    # Elements that share memory cannot be written in place, by a fit or by us: such tensors are constants.
    return tensor.layout == torch.strided and any(
        s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _copied(settings: dict[str, Any]) -> dict[str, Any]:
    """Copy a dictionary and the lists and dictionaries in it; tensors keep their identity."""
    copied = settings.copy()
    for key, value in settings.items():
        # Read at every step for every optimizer: the common types are told apart first.
        if type(value) not in _ATOMS and isinstance(value, list | dict) and key != "params":
            copied[key] = copy.deepcopy(value)
    return copied
