"""Doctests run as the tests do: from a clean start, and under the names that users import."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import clean_pyro  # noqa: F401  (autouse, here for the doctests outside tests/)

ROOT = Path(__file__).parent
MAPPED = ("models", "guides")


def pytest_collect_file(file_path: Path) -> None:
    """Let pytest find models/x.py already imported as pyro_ext.models.x.

    pytest names a module after its folders, and would run a second copy of it, models.x, whose classes are not those
    that ``from pyro_ext.models import ...`` gives.
    """
    if file_path.suffix != ".py" or not file_path.is_relative_to(ROOT):
        return
    parts = file_path.relative_to(ROOT).with_suffix("").parts
    if parts[0] not in MAPPED:
        return
    for end in range(1, len(parts) + 1):
        if parts[end - 1] != "__init__":
            name = ".".join(parts[:end])
            sys.modules[name] = importlib.import_module(f"pyro_ext.{name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
