"""Fit three models to handwritten digits, print one table and write one figure.

    python -m tutorials.demo [--data FILE] [--output FILE] [--quick]

See `make demo`. Own data: any numeric array of shape (N, D) in a .npy or .csv file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tutorials.demo_data import DataError, load
from tutorials.demo_figure import draw
from tutorials.demo_fits import QUICK, Sizes, binary_sparse_coding, wake_sleep
from tutorials.demo_table import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0, or 2 for data that it cannot use."""
    options = parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        if not options.output.parent.is_dir():
            raise DataError(f"Expected a folder to write to, but got {str(options.output.parent)!r}. Make it first.")
        data = load(options.data, max_rows=200 if options.quick else 2000)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for note in data.notes:
        say(f"- {note}")
    sizes = QUICK if options.quick else Sizes()
    results = [*binary_sparse_coding(data, sizes, say), *wake_sleep(data, sizes, say)]
    say("\n" + table(results, *data.test.shape))
    draw(data, results, options.output)
    say(f"\nFigure: {options.output} ({time.perf_counter() - began:.0f} s in all)")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m tutorials.demo", description="Fit three models, look inside them.")
    found.add_argument("--data", metavar="FILE", help=".npy or .csv array of shape (N, D); default: handwritten digits")
    found.add_argument("--output", metavar="FILE", type=Path, default=Path("demo.png"), help="figure (demo.png)")
    found.add_argument("--quick", action="store_true", help="tiny fits, to see that everything runs")
    return found


def say(text: str) -> None:
    """Write a line beside the progress bars."""
    tqdm.write(text, file=sys.stdout)


if __name__ == "__main__":
    # The tensors are small: on a busy machine, threads would spend their time on waiting for each other.
    torch.set_num_threads(1)
    sys.exit(main())
