"""The demo's data: read, checked, scaled, thresholded and split, with a note on everything that was done."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MIN_ROWS = 20
MAX_ROWS = 2000
HELD_OUT = 0.2
LARGEST = 1e100


class DataError(ValueError):
    """A data file that the demo cannot use; the text says why and what to do."""


@dataclass(frozen=True)
class Data:
    """One data set in the two forms that the models want.

    Attributes:
        name: what it is.
        train, test: real values in [0, 1], shapes (N, D) and (M, D).
        train_bits, test_bits: the same rows as 0 and 1.
        shape: height and width in which a row is drawn.
        notes: what was done to the data, a sentence each.
    """

    name: str
    train: Tensor
    test: Tensor
    train_bits: Tensor
    test_bits: Tensor
    shape: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def is_strip(self) -> bool:
        """Whether a row is no image, and is drawn as one line."""
        return self.shape[0] == 1


def load(path: str | None, max_rows: int = MAX_ROWS) -> Data:
    """Scikit-learn's handwritten digits, or the array in a file.

    Raises:
        DataError: the file holds nothing that the demo can use.
    """
    if path is None:
        from sklearn.datasets import load_digits

        return prepare(load_digits().data, "handwritten digits", max_rows)
    return prepare(read(Path(path)), Path(path).name, max_rows)


def read(path: Path) -> np.ndarray:
    """The array in a .npy or .csv file."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"Expected a data file, but got {str(path)!r}: {what}. Write make demo DATA=<file.npy>.")
    if path.suffix not in (".npy", ".csv"):
        raise DataError(f"Expected a .npy or .csv file, but got {path.name!r}. Save it with numpy.save.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty .csv is only warned about
            if path.suffix == ".npy":
                return np.load(path, allow_pickle=False)
            return np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError, EOFError, UserWarning) as error:
        remedy = (
            "Save it with numpy.save" if path.suffix == ".npy" else "Keep numbers and commas only, without a header"
        )
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"Expected an array of numbers in {path.name}, but got: {reason}. {remedy}.") from error


def prepare(array: np.ndarray, name: str, max_rows: int = MAX_ROWS) -> Data:
    """Check, scale, split and threshold an array of shape (N, D)."""
    check(array, name)
    x = torch.as_tensor(array.astype(np.float64))
    num_rows, width = x.shape
    notes = [f"{name}: {num_rows} rows of {width} columns"]

    # One fixed order for everything that follows: the first rows of files are often sorted.
    x = x[torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))]
    if num_rows > max_rows:
        x = x[:max_rows]
        notes.append(f"{max_rows} of them drawn at random, to keep the demo short")

    side = math.isqrt(width)
    is_image = side * side == width and side > 2
    low, high = (x.min(), x.max()) if is_image else (x.amin(0), x.amax(0))
    constant = x.amin(0) == x.amax(0)
    if bool(constant.all()):
        raise DataError(f"Expected columns that vary, but got a constant in every column of {name}. Check the array.")
    bits_already = bool(((x == x.min()) | (x == x.max())).all())
    v = ((x - low) / torch.where(high > low, high - low, 1.0)).float()
    if is_image:
        notes.append(f"drawn as {side} x {side} images; range {low:g} to {high:g} scaled to 0 to 1")
    else:
        notes.append("drawn as strips; the range of every column scaled to 0 to 1")
    if int(constant.sum()):
        notes.append(f"constant columns: {int(constant.sum())}; they are kept, and teach nothing")

    held_out = max(1, round(HELD_OUT * len(v)))
    train, test = v[held_out:], v[:held_out]
    notes.append(f"{len(train)} rows to learn from, {held_out} held out (fixed seed)")
    if bits_already:
        threshold = torch.tensor(0.5)
        notes.append("sigmoid belief network and Helmholtz machine want bits: the data are bits already")
    else:
        threshold = torch.tensor(0.5) if is_image else train.mean(0)
        where = "at 0.5" if is_image else "at the mean of each column"
        notes.append(f"sigmoid belief network and Helmholtz machine want bits: thresholded {where}")
    bits, test_bits = (train > threshold).float(), (test > threshold).float()
    return Data(name, train, test, bits, test_bits, (side, side) if is_image else (1, width), tuple(notes))


def check(array: np.ndarray, name: str) -> None:
    """Refuse what is no finite numeric array of shape (N, D) with enough rows."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else "several arrays"
        raise DataError(f"Expected real numbers in {name}, but got {got}. Save one numeric array with numpy.save.")
    if array.ndim != 2:
        raise DataError(
            f"Expected an array of shape (N, D), but got shape {array.shape} in {name}. "
            "Flatten each row with array.reshape(len(array), -1)."
        )
    if array.shape[0] < MIN_ROWS or array.shape[1] < 2:
        raise DataError(
            f"Expected at least {MIN_ROWS} rows and 2 columns, but got shape {array.shape} in {name}. "
            "Take more rows; rows are data, columns are variables."
        )
    bad = ~np.isfinite(array)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"Expected finite numbers, but got {int(bad.sum())} that are NaN or infinite in {name}, the first in row "
            f"{row}, column {column}. Leave those rows out."
        )
    if np.abs(array.astype(np.float64)).max() > LARGEST:
        raise DataError(f"Expected numbers up to {LARGEST:g}, but got larger ones in {name}. Rescale the array.")
