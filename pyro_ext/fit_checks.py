"""What `fit` checks at its door, and what a checkpoint must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro_ext.batches import check_loader
from pyro_ext.checkpoint import Keeper, driver_settings, loader_settings
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.early_stopping import EarlyStopping
from pyro_ext.plain_data import settings_of


def fit_settings(
    svi: Any, loader: Any, held_out: Any, early_stopping: EarlyStopping | None, seed: int | None, skip_non_finite: int
) -> dict[str, Any]:
    """What the numbers of a fit depend on, beside its number of epochs.

    Raises:
        ValueError: an iterator, whose epochs cannot be read again.
    """
    for name, given in (("loader", loader), ("held_out", held_out)):
        if isinstance(given, Iterator):
            raise ValueError(
                f"Expected {name} to be read anew with a checkpoint, but got a {type(given).__name__}, which can be "
                "read only once. Pass a list or a DataLoader."
            )
    return {
        "loop": "fit",
        **driver_settings(svi),
        "loader": loader_settings(loader),
        "held_out": loader_settings(held_out),
        "early_stopping": settings_of(early_stopping),
        "seed": seed,
        "skip_non_finite": skip_non_finite,
    }


def read_fit(keeper: Keeper, num_epochs: int) -> dict[str, Any] | None:
    """What the checkpoint says.

    Raises:
        CheckpointError: more epochs were run than are asked for.
    """
    kept = keeper.read()
    if kept is not None and kept["epochs"] > num_epochs:
        raise CheckpointError(
            f"Expected num_epochs of at least {kept['epochs']}, the epochs in {keeper.where}, but got {num_epochs}. "
            "Take another path to start anew."
        )
    return kept


def check_fit(
    svi: Any,
    loader: Any,
    num_epochs: Any,
    held_out: Any,
    early_stopping: Any,
    callbacks: Any,
    seed: Any,
    skip_non_finite: Any,
    guard: Any,
) -> None:
    """Refuse wrong arguments of `fit` before anything runs; see there."""
    if not callable(getattr(svi, "step", None)):
        raise TypeError(
            f"Expected a driver with a method `step`, but got {type(svi).__name__}. "
            "Pass pyro.infer.SVI, EM or CompiledSVI."
        )
    if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 1:
        raise ValueError(
            f"Expected num_epochs to be a whole number, at least 1, but got {num_epochs!r}. "
            "Pass the number of passes over the loader."
        )
    check_loader(loader, num_epochs, "loader")
    if held_out is not None:
        check_loader(held_out, num_epochs, "held_out")
        if not callable(getattr(svi, "evaluate_loss", None)):
            raise TypeError(
                f"Expected a driver with a method `evaluate_loss` for held-out data, but got {type(svi).__name__}. "
                "Leave `held_out` out, or give the driver that method."
            )
    if early_stopping is not None:
        if not isinstance(early_stopping, EarlyStopping):
            raise TypeError(
                f"Expected early_stopping to be an EarlyStopping, but got {type(early_stopping).__name__}. "
                "Pass EarlyStopping(patience=5)."
            )
        if held_out is None:
            raise ValueError(
                "Expected held-out data with early stopping, but got held_out=None. "
                "Pass `held_out=`: the training loss does not tell when to stop."
            )
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(
                f"Expected callbacks to be functions of an EpochEnd, but got {type(callback).__name__}. "
                "Pass a list of functions."
            )
    if isinstance(skip_non_finite, bool) or not isinstance(skip_non_finite, int) or skip_non_finite < 0:
        raise ValueError(
            f"Expected skip_non_finite to be a whole number of steps, at least 0, but got {skip_non_finite!r}. "
            "Pass 0 to stop at the first non-finite loss."
        )
    if skip_non_finite and not guard and not getattr(svi, "guards_non_finite", False):
        raise ValueError(
            f"Expected guard=True with skip_non_finite={skip_non_finite}, but got guard=False. "
            "Only a guarded step can be undone and skipped."
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"Expected seed to be a whole number or None, but got {seed!r}. Pass an int.")
