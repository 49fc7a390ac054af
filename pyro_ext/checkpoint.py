"""Checkpoints: one file from which a driver, a fit or a run goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_ext import checkpoint_file
from pyro_ext.batches import arguments
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.data_identity import DataIdentity
from pyro_ext.driver_state import capture, moved
from pyro_ext.drivers import objective_of
from pyro_ext.history import History
from pyro_ext.ownership import noting_parameters, waits_for_data
from pyro_ext.plain_data import from_plain, name_of, settings_of, to_plain
from pyro_ext.random_state import (
    check_random_state,
    loader_states,
    random_state,
    random_state_from,
    set_loader_states,
)
from pyro_ext.restoring import restore
from pyro_ext.snapshot import modules_of, rng_state, set_rng_state

Path = str | os.PathLike[str]

_SECTIONS = {"versions": dict, "state": dict, "random": dict, "loaders": list}


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `fit` and `EM.run` save themselves; where the file exists already, they go on from it.

    Args:
        path: the file. Its folder must exist.
        every: number of epochs of `fit`, or of EM steps of `EM.run`, between two writes.
        seconds: least time between two writes, so that quick steps are not slowed. The end of a run is always written.

    Raises:
        ValueError: every below 1, seconds negative or not finite, a path that is a folder or in none.

    Example:
        >>> Checkpoint("fit.checkpoint", every=5).seconds
        1.0
    """

    path: Path
    every: int = 1
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"Expected every to be a whole number of epochs or steps, at least 1, but got {self.every!r}. "
                "Pass every=1 to write after each."
            )
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, int | float) or not 0 <= self.seconds < 1e9:
            raise ValueError(
                f"Expected seconds of at least 0, but got {self.seconds!r}. Pass seconds=0.0 to write every time."
            )
        _check_place(self.path)


def save(path: Path, driver: Any, history: History | None = None, *, loader: Any = None) -> None:
    """Write the state of a driver to one file.

    The file holds the parameters of the driver's model and guide (unconstrained values, and the constraints by name;
    other parameters in Pyro's store are left out), buffers, the state of optimizers and learning-rate schedules, what
    steps remember, the tables of guides with checksums of the data that they belong to, the random generators of torch,
    NumPy and Python, the history, and the versions of the packages. It is written beside an old file and then put in
    its place, so that a failed write changes nothing.

    Args:
        path: the file.
        driver: `EM`, `pyro.infer.SVI`, or anything with their ``model``, ``guide`` and ``optim``.
        history: a record to keep with it.
        loader: a DataLoader whose own generator is kept too.

    Raises:
        ValueError: the parameters of plain functions are not known, for they were never run; a path in no folder.
        TypeError: an optimizer or schedule keeps functions, or history is no `History`.
        OSError: the file could not be written.

    Example:
        >>> import pathlib, tempfile, pyro, torch
        >>> from pyro_ext import EM, ClosedForm, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import GaussianMixture
        >>> def make():
        ...     pyro.clear_param_store()
        ...     model = GaussianMixture(num_components=2, num_visible=1, name="mixture")
        ...     return EM(model, MeanField(model, name="q"), e_step=FixedPoint(), m_step=ClosedForm())
        >>> v = torch.randn(20, 1)
        >>> em = make()
        >>> history = em.run(v, max_steps=5, progress=False)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "mixture.checkpoint"
        >>> save(path, em, history)
        >>> loss = em.evaluate_loss(v)
        >>> del em
        >>> em = make()
        >>> load(path, em).steps == history.steps, em.evaluate_loss(v) == loss
        (True, True)
    """
    if history is not None and not isinstance(history, History):
        raise TypeError(f"Expected a History or None, but got {type(history).__name__}. Pass what `fit` returned.")
    _check_place(path)
    checkpoint_file.write(path, _content(driver, history, (loader,), None))


def load(
    path: Path, driver: Any, *, batch: Any = None, loader: Any = None, map_location: torch.device | str | None = None
) -> History | None:
    """Put the state in a file back into a driver that was built the same way, in place.

    Values are written into the tensors that are there, on their devices. A driver that was never run gets its
    parameters created; one whose programs draw random numbers when they are set up (autoguides, encoders) goes on as if
    it had never stopped only when `batch` is given, for it is then set up before the generators are put back.

    Args:
        path: a file that `save`, `fit` or `EM.run` wrote.
        driver: where to.
        batch: the data of one call of the model, as a loader yields them (a tensor, a tuple of arguments, or a dict of
            keyword arguments). The programs are run on them first, so that every name, shape and constraint is checked,
            and so is that a table belongs to these data.
        loader: the DataLoader whose generator was saved.
        map_location: device for parameters that do not exist yet; "cpu" also leaves the generators of other
            devices alone. None for the devices that they were on.

    Returns:
        The history that was saved, or None.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: (a ValueError) the file is damaged, truncated, of another kind or of a newer format; or its
            names, shapes, dtypes, constraints, modules or optimizers are not those of the driver. Nothing has changed
            then, but that an autoguide of Pyro stays set up for `batch`.
        ValueError: a table belongs to other data than `batch`. Nothing has changed then.
    """
    content = _read(path)
    where = repr(str(path))
    history = from_plain(content["history"])
    if map_location is None:
        check_random_state(content["random"], where)
    generators = rng_state()
    store: Any = pyro.get_param_store()
    guide: Any = getattr(driver, "guide", None)
    before, was_set_up = set(store.keys()), getattr(guide, "is_set_up", True)
    try:
        if batch is not None:
            args, kwargs = arguments(batch)
            set_up(driver, args, kwargs)
            _check_data(driver, content["state"], args, kwargs)
        if loader is not None:
            set_loader_states(content["loaders"], loader, where=where)
        restore(driver, content["state"], where=where, map_location=map_location)
    except BaseException:
        for name in set(store.keys()) - before:
            del store[name]
        if not was_set_up:
            guide.undo_setup()
        set_rng_state(generators)
        raise
    set_rng_state(random_state_from(content["random"], devices=map_location is None))
    return history


class Keeper:
    """The checkpoint of one fit or run: reads it at the start, writes it on the way and at the end.

    Args:
        checkpoint: where and how often.
        driver: whose state it is.
        settings: what the answer depends on; those in the file must be the same.
        loaders: whose generators belong to the state.
    """

    def __init__(self, checkpoint: Checkpoint, driver: Any, settings: dict[str, Any], loaders: tuple[Any, ...]) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"Expected checkpoint to be a Checkpoint, but got {type(checkpoint).__name__}. Write Checkpoint(path)."
            )
        self.checkpoint, self.driver, self.settings, self.loaders = checkpoint, driver, settings, loaders
        self.where = repr(str(checkpoint.path))
        self._written = time.perf_counter()
        self._content: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """What the file says about the run, or None where there is no file. Nothing of it is put back yet.

        Raises:
            CheckpointError: the file cannot be read, or was written by a run with other settings or packages.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(checkpoint_file.unfinished(self.checkpoint.path))
        _check_place(self.checkpoint.path)
        try:
            content = _read(self.checkpoint.path)
        except FileNotFoundError:
            return None
        if content["run"] is None:
            raise CheckpointError(
                f"Expected the checkpoint of a fit or a run, but got one that `save` wrote: {self.where}. Take another "
                "path; `load` reads this one."
            )
        self._check_versions(content["versions"])
        self._check_settings(content["run"]["settings"])
        check_random_state(content["random"], self.where)
        self._content = content
        return content["run"]["progress"] | {"history": from_plain(content["history"])}

    @property
    def needs_set_up(self) -> bool:
        """Whether the file has parameters that do not exist yet, for the programs were never run."""
        content: Any = self._content
        guide = getattr(self.driver, "guide", None)
        waits = any(waits_for_data(module) for module in modules_of(guide))
        store = pyro.get_param_store()
        return waits or any(name not in store for name in content["state"]["parameters"])

    def put_back(self) -> None:
        """Put the state of the driver and all generators back, as they were when the file was written."""
        content = self._content
        if content is None:
            raise RuntimeError("Expected a checkpoint that was read, but got none. Call `read` first.")
        last = content["run"]["last"]
        set_loader_states(content["loaders"], *self.loaders, where=self.where)
        restore(self.driver, content["state"] if last is None else last, where=self.where)
        set_rng_state(random_state_from(content["random"]))
        self._content = None

    def is_due(self, number: int) -> bool:
        """Whether the epoch or step of this number is to be written."""
        waited = time.perf_counter() - self._written
        return number % self.checkpoint.every == 0 and waited >= self.checkpoint.seconds

    def write(self, history: History | None, progress: Mapping[str, Any], *, in_force: Any = None) -> None:
        """Write the present state.

        Args:
            history: the record so far.
            progress: how far the run has come, as plain data and tensors.
            in_force: the state that `load` is to give, where it is not the present one.
        """
        run = {"settings": self.settings, "progress": dict(progress), "in_force": in_force}
        checkpoint_file.write(self.checkpoint.path, _content(self.driver, history, self.loaders, run))
        self._written = time.perf_counter()

    def _check_versions(self, saved: Mapping[str, str]) -> None:
        for name, ours in _versions().items():
            if saved.get(name) != ours:
                raise CheckpointError(
                    f"Expected {name} {saved.get(name)} to go on from {self.where}, but got {ours}. Other versions may "
                    "give other numbers: install that one, or `load` the file and start a new run from it."
                )

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        for key in dict.fromkeys((*saved, *self.settings)):
            difference = _difference(key, saved.get(key), self.settings.get(key))
            if difference is not None:
                name, old, new = difference
                raise CheckpointError(
                    f"Expected {name} = {old!r}, with which {self.where} was written, but got {new!r}. Call with "
                    "the settings of the file (default names count upwards: pass name= to model and guide), or take "
                    "another path to start anew."
                )


def driver_settings(driver: Any) -> dict[str, Any]:
    """What a driver was built with, as plain data."""
    parts = {"objective": objective_of(driver), "optimizer": getattr(driver, "optim", None)}
    parts |= {name: getattr(driver, name, None) for name in ("e_step", "m_step", "compile")}
    programs = {name: name_of(getattr(driver, name)) for name in ("model", "guide") if hasattr(driver, name)}
    return {"driver": _kind(driver)} | programs | {name: settings_of(part) for name, part in parts.items()}


def _kind(driver: Any) -> str:
    # A driver may stand in for another.
    return getattr(driver, "checkpoint_kind", type(driver).__name__)


def loader_settings(loader: Any) -> dict[str, Any] | None:
    """What a loader yields, as far as it can be told: its length, the size of its batches, checksums of its data."""
    if loader is None:
        return None
    dataset = getattr(loader, "dataset", None)
    held = loader if isinstance(loader, list) else getattr(dataset, "tensors", dataset)
    return {
        "length": len(loader) if hasattr(loader, "__len__") else None,
        "batch_size": getattr(loader, "batch_size", None),
        "data": data_mark((held,), {}),
    }


def data_mark(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """A checksum of all tensors in nested arguments; None without any."""
    state = DataIdentity(args, dict(kwargs)).state()
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16] if state else None


def set_up(driver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run guide and model once, blocked, so that their parameters exist."""
    model, guide = getattr(driver, "model", None), getattr(driver, "guide", None)
    if not (callable(model) and callable(guide)):
        return
    with torch.no_grad(), noting_parameters(driver):
        if hasattr(driver, "call"):
            driver.call(*args, **kwargs)
            return
        with _unseen():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
            poutine.replay(model, trace=trace)(*args, **kwargs)


@contextlib.contextmanager
def _unseen() -> Any:
    # Parameters still reach the messenger that notes them, samples reach nobody.
    with poutine.block(hide_types=["sample"]):
        yield


def _check_data(driver: Any, state: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check = getattr(getattr(driver, "guide", None), "check_checkpoint_state", None)
    if callable(check):
        check(state["states"].get("guide") or {}, args, kwargs)


def _content(driver: Any, history: History | None, loaders: tuple[Any, ...], run: dict[str, Any] | None) -> Any:
    state, last = capture(driver), None
    if run is not None:
        in_force = run.pop("in_force")
        if in_force is not None:
            state, last = in_force, state
        run = run | {"last": last}
    content = {
        "versions": _versions(),
        "driver": _kind(driver),
        "state": state,
        "random": random_state(),
        "loaders": [to_plain(s, "the state of a loader") for s in loader_states(*loaders)],
        "history": to_plain(history, "the history"),
        "run": run,
    }
    return moved(content, lambda tensor: tensor.detach().cpu())


def _read(path: Path) -> dict[str, Any]:
    content = checkpoint_file.read(path)
    wrong = [name for name, kind in _SECTIONS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"Expected a checkpoint with {', '.join(_SECTIONS)}, but {str(path)!r} lacks {', '.join(wrong)}. "
            "Pass a file that `save` wrote."
        )
    return content


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": str(torch.__version__)}
    return found | {name: _installed(name) for name in ("pyro-ext", "pyro-ppl", "numpy")}


@functools.cache
def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _check_place(path: Path) -> None:
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise ValueError(f"Expected the path of a file, but got the folder {str(path)!r}. Add a file name.")
    if not os.path.isdir(os.path.dirname(target)):
        raise ValueError(f"Expected a path in a folder that exists, but got {str(path)!r}. Make the folder first.")


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first place where two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            found = _difference(f"{name}.{key}", old.get(key), new.get(key))
            if found is not None:
                return found
        return None
    return None if old == new or (old != old and new != new) else (name, old, new)
