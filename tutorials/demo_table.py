"""The demo's table: how good each fit is on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_ext import Evidence
from tutorials.demo_fits import Result

HEADER = ("model", "guide", "algorithm", "bound L", "log p(v)", "seconds")


def table(results: Sequence[Result], num_rows: int, num_columns: int) -> str:
    """One line a fit, in two groups that must not be compared."""
    groups = {
        "real": f"Densities of real values scaled to [0, 1], {num_columns} a row (they may exceed 0)",
        "bits": f"Probabilities of {num_columns} bits a row (never above 0)",
    }
    lines = {key: [cells(result) for result in results if result.data == key] for key in groups}
    widths = [max(map(len, column)) for column in zip(HEADER, *lines["real"], *lines["bits"], strict=True)]
    text = [f"Held-out rows: {num_rows}. All numbers in nats per row; densities and bits are not comparable.", ""]
    text += [line(HEADER, widths), line(["-" * width for width in widths], widths)]
    for key, title in groups.items():
        if lines[key]:
            text += [title, *(line(row, widths) for row in lines[key]), ""]
    return "\n".join([*text, *NOTES])


NOTES = (
    "bound L: lower bound on log p(v); under Dirac it is log p(h, v) at the most probable h that was found.",
    "log p(v): exact by summing all states, or a stochastic lower bound (>=) +- its Monte-Carlo standard error.",
    "seconds: learning only. Structured, Dirac and Amortized go on from what MeanField learned, and count its time.",
)


def cells(result: Result) -> tuple[str, ...]:
    """The words of one line."""
    evidence = result.evidence
    bound = float("nan") if evidence.bound is None else float(evidence.bound.mean())
    seconds = f"{result.watch.times[-1]:.1f}"
    return (result.title, result.guide_name, result.algorithm, f"{bound:.2f}", log_p(evidence), seconds)


def log_p(evidence: Evidence) -> str:
    """The log-evidence with what is known of its error."""
    if evidence.exact:
        return f"{evidence.mean:.2f} exact"
    return f">= {evidence.mean:.2f} +- {evidence.mean_standard_error:.3f}"


def line(words: Sequence[str], widths: Sequence[int]) -> str:
    """Words in columns; numbers to the right."""
    left = [word.ljust(width) for word, width in zip(words[:3], widths[:3], strict=True)]
    right = [word.rjust(width) for word, width in zip(words[3:], widths[3:], strict=True)]
    return "  ".join(left + right).rstrip()
