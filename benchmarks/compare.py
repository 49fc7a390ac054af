"""Ours and the peers in turn, in one process: medians, agreement of the answers, and the closing line."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timing:
    """Seconds of one contestant.

    Attributes:
        label: who.
        seconds: of each repeat.
        answer: what the last repeat came to, a number that is compared.
        peer: whether the closing line may name it.
    """

    label: str
    seconds: list[float] = field(default_factory=list)
    answer: float = float("nan")
    peer: bool = True

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


Run = Callable[[], tuple[float, float]]
"""One repeat: (seconds, answer). It times only what is compared."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def take_turns(runs: Mapping[str, Run], repeats: int, *, shown_only: tuple[str, ...] = ()) -> list[Timing]:
    """Let every contestant run once to warm up, then all in turn; the first is ours."""
    timings = [Timing(label, peer=label not in shown_only) for label in runs]
    for repeat in range(repeats + 1):
        for timing, run in zip(timings, runs.values(), strict=True):
            seconds, timing.answer = run()
            if repeat:
                timing.seconds.append(seconds)
    return timings


def check_agreement(timings: list[Timing], tolerance: float) -> None:
    """Refuse a comparison whose contestants came to different answers.

    Raises:
        RuntimeError: naming both answers.
    """
    ours = timings[0]
    for other in timings[1:]:
        if not abs(other.answer - ours.answer) <= tolerance * max(1.0, abs(ours.answer)):
            raise RuntimeError(
                f"Expected the same answer within {tolerance:g}, but {ours.label} came to {ours.answer:.10g} and "
                f"{other.label} to {other.answer:.10g}."
            )


def table(title: str, timings: list[Timing], unit: str) -> str:
    """A table of medians, with the ratio of each to ours."""
    ours = timings[0].median
    lines = [f"{title}", f"  {'':28}{'median ms':>12}{'least ms':>12}{'x ours':>9}  {unit}"]
    for timing in timings:
        least = min(timing.seconds)
        lines.append(
            f"  {timing.label:28}{1e3 * timing.median:12.3f}{1e3 * least:12.3f}{timing.median / ours:9.2f}  "
            f"{timing.answer:.8g}"
        )
    return "\n".join(lines)


def closing_line(name: str, timings: list[Timing], peer: str | None = None) -> str:
    """``NAME ours=<s> peer=<s> ratio=<peer/ours>`` against the fastest peer, or the one named."""
    peers = [t for t in timings[1:] if t.peer and (peer is None or t.label.startswith(peer))]
    best = min(peers, key=lambda t: t.median)
    ours = timings[0].median
    return f"{name} ours={ours:.6g} peer={best.median:.6g} ratio={best.median / ours:.3g}"


def parse(options: list[str], description: str | None, **defaults: int) -> argparse.Namespace:
    """Read the options that all comparisons have: threads, repeats, and sizes of their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the peers' BLAS (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of each contestant (default 7)")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"(default {value})")
    arguments = parser.parse_args(options)
    torch.set_num_threads(arguments.threads)
    return arguments


def machine() -> str:
    """What the figures were seen on, as far as they depend on it."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
