"""``python -m benchmarks`` lists the benchmarks, ``python -m benchmarks NAME [OPTIONS]`` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "bars": "binary sparse coding on bars with one joint factor over 2^10 states: bars found, L and seconds",
    "eight_schools": "reference of the eight schools posterior: quadrature, and Pyro's NUTS",
    "patches": "binary sparse coding of whitened image patches, 128 latents: share of oriented features, and a figure",
    "streaming": "EM on data drawn when they are read: resident memory at N rows and at 10 N (1 GB)",
    "wake_sleep_digits": "reweighted wake-sleep on binarised digits: test NLL of five seeds",
}
"""What `python -m benchmarks` knows: a module of this package, and what it measures."""


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named first, or list all."""
    if not arguments:
        print("python -m benchmarks NAME [--help]\n")
        for name, text in BENCHMARKS.items():
            print(f"  {name:20}{text}")
        return 0
    name, *options = arguments
    if name not in BENCHMARKS:
        print(f"Expected one of {', '.join(BENCHMARKS)}, but got {name}.", file=sys.stderr)
        return 2
    importlib.import_module(f"benchmarks.{name}").main(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
