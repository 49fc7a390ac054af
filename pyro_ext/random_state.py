"""Random generators as plain data: torch's, NumPy's, Python's, and those of data loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.snapshot import rng_state


def random_state(state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of the global generators, or one given by `rng_state`, as tensors and plain containers."""
    state = rng_state() if state is None else state
    kind, keys, position, has_gauss, gauss = state["numpy"]
    version, words, left_over = state["random"]
    return {
        "torch": state["torch"],
        "cuda": list(state.get("cuda", ())),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words, dtype=torch.int64), left_over],
    }


def check_random_state(state: Mapping[str, Any], where: str) -> None:
    """Refuse generators of devices that are not there.

    Raises:
        CheckpointError: the number of CUDA devices differs.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) > devices:
        raise CheckpointError(
            f"Expected {len(state['cuda'])} CUDA devices, whose generators are in {where}, but got {devices}. "
            'Resume on a machine with as many; `load(..., map_location="cpu")` takes the parameters without them.'
        )


def random_state_from(state: Mapping[str, Any], *, devices: bool = True) -> dict[str, Any]:
    """What `set_rng_state` takes, from `random_state`; without CUDA devices if they are to be left alone."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    version, words, left_over = state["python"]
    found: dict[str, Any] = {
        "torch": state["torch"],
        "numpy": (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss),
        "random": (version, tuple(words.tolist()), left_over),
    }
    return found | ({"cuda": state["cuda"]} if devices and state["cuda"] else {})


def loader_states(*loaders: Any) -> list[Any]:
    """The states of the generators that loaders own, and of loaders that keep a state themselves."""
    return [
        owner.get_state() if isinstance(owner, torch.Generator) else owner.state_dict() for owner in _owners(loaders)
    ]


def set_loader_states(states: Sequence[Any], *loaders: Any, where: str) -> None:
    """Put the states given by `loader_states` back.

    Raises:
        CheckpointError: the loaders have another number of generators.
    """
    owners = _owners(loaders)
    if len(states) != len(owners):
        raise CheckpointError(
            f"Expected loaders with {len(states)} generators of their own as in {where}, but got {len(owners)}. "
            "Build the loaders alike."
        )
    for owner, state in zip(owners, states, strict=True):
        if isinstance(owner, torch.Generator):
            owner.set_state(state)
        else:
            owner.load_state_dict(state)


def _owners(loaders: Iterable[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for loader in loaders:
        if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
            found[id(loader)] = loader
            continue
        sampler = getattr(loader, "sampler", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for holder in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
