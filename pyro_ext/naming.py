"""Names of live modules: two modules of one name would silently share their parameters."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pyro

_holders: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def claim_name(module: Any, name: str | None) -> str:
    """Reserve a name for a module's parameters and return it.

    Args:
        module: the module that will hold the name for as long as it lives.
        name: the wanted name, or None for the class name, numbered when it is taken.

    Raises:
        ValueError: the name is held by another live module, or is not a usable identifier.

    Example:
        >>> class Thing: pass
        >>> first, second = Thing(), Thing()
        >>> claim_name(first, None), claim_name(second, None)
        ('Thing', 'Thing_2')
    """
    if name is None:
        base = type(module).__name__
        name, number = base, 1
        while name in _holders or _in_param_store(name):
            number += 1
            name = f"{base}_{number}"
    elif not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"Expected a name that is a Python identifier, but got {name!r}. Use letters, digits and '_'.")
    elif _is_held(name, module):
        raise ValueError(
            f"Expected a name that no other live module holds, but got {name!r}. "
            "Pass another `name=`, or delete the other module first: Pyro would share the parameters of both."
        )
    _holders[name] = module
    return name


def _is_held(name: str, module: Any) -> bool:
    if _holders.get(name, module) is module:
        return False
    # A guide and its EM refer to each other: deleted ones live on until the collector runs.
    gc.collect()
    return _holders.get(name, module) is not module


def _in_param_store(name: str) -> bool:
    return any(key.startswith((f"{name}.", f"{name}$$$")) for key in pyro.get_param_store().keys())
