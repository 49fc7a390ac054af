"""What the models of sequences share: lengths and masks, the chain's prior, and probabilities with a floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ext.checks import check_count
from pyro_ext.markov_chain import MarkovChain


def extent(v: Tensor | None, size: int | None, num_steps: int | None, event_dim: int) -> tuple[int, int]:
    """Number of sequences N and of steps T, from v of shape (..., N, T) + event or from what is to be dreamt.

    Raises:
        TypeError: size or num_steps is no int.
        ValueError: not exactly one of v and (size, num_steps); or v has too few dimensions.
    """
    if v is not None and size is None and num_steps is None:
        if v.dim() < 2 + event_dim:
            raise ValueError(
                f"Expected v with dimensions for sequences and steps, but got shape {tuple(v.shape)}. "
                "A single sequence is `v.unsqueeze(0)`."
            )
        return v.shape[-2 - event_dim], v.shape[-1 - event_dim]
    if v is None and size is not None and num_steps is not None:
        check_count(size, "size")
        check_count(num_steps, "num_steps")
        return size, num_steps
    given = [n for n, x in (("v", v), ("size", size), ("num_steps", num_steps)) if x is not None]
    raise ValueError(
        f"Expected either v or both size and num_steps, but got {' and '.join(given) or 'none of them'}. "
        "Pass v to condition on data, or size=n and num_steps=T to dream."
    )


def seen_steps(num_steps: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which steps are observed, boolean of shape (N, T); None when all are."""
    if lengths is None:
        return mask
    within = torch.arange(num_steps, device=lengths.device) < lengths.unsqueeze(-1)
    return within if mask is None else within & mask


def linked_steps(num_steps: int, lengths: Tensor) -> Tensor:
    """Whether step t and the step before it both belong to the sequence, boolean of shape (N, T - 1)."""
    return torch.arange(1, num_steps, device=lengths.device) < lengths.unsqueeze(-1)


def chain_prior(initial: Tensor, transition: Tensor, num_steps: int, lengths: Tensor | None) -> MarkovChain:
    """The prior of a path: initial (K,), transition (K, K), and beyond the length a uniform draw at every step.

    That tail is a constant: it holds no parameter, so that nothing is learned from steps that do not exist, and
    L of the program does not depend on how far the sequences were padded.
    """
    # From logs, because distributions clamp probabilities at the machine epsilon.
    start, step = initial.log(), transition.log()
    if lengths is None:
        return MarkovChain(start, step, num_steps)
    linked = linked_steps(num_steps, lengths)[..., None, None]
    return MarkovChain(start.expand(len(lengths), -1), torch.where(linked, step, 0), num_steps)


def chain_statistics(path: Any, num_steps: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expected first states (K,) and transitions (K, K; from, to), summed over the sequences.

    Args:
        path: the marginal of a chain's site under q.
        num_steps: T.
        lengths: lengths (N,) of the sequences; steps beyond them count nothing.
    """
    mean = path.mean
    weights = None if lengths is None else linked_steps(num_steps, lengths).to(mean.dtype)
    return mean[:, 0].sum(0), path.pairwise(weights)


def floored(counts: Tensor, floor: float, old: Tensor) -> Tensor:
    """argmax_p sum_k c_k log p_k over probabilities p >= floor, along the last dimension.

    p_k = max(floor, c_k / lambda). Rows without any count keep their old value, for nothing is known about them.

    Args:
        counts: expected counts, at least 0, shape (..., K).
        floor: least probability, below 1 / K.
        old: the present probabilities, of the same shape.
    """
    empty = counts.sum(-1, keepdim=True) <= torch.finfo(counts.dtype).tiny
    counts = torch.where(empty, old, counts)
    low = torch.zeros_like(counts, dtype=torch.bool)
    while True:
        # Lifting some probabilities to the floor lowers the others, which may then lie below it themselves.
        share = (1 - floor * low.sum(-1, keepdim=True)) / counts.masked_fill(low, 0).sum(-1, keepdim=True)
        probs = torch.where(low, floor, counts * share)
        below = probs < floor
        if not below.any():
            return probs
        low = low | below


def check_floor(floor: float, num_outcomes: int) -> None:
    """Refuse a floor under which probabilities could not sum to 1.

    Raises:
        ValueError: not inside (0, 1 / num_outcomes).
    """
    if not 0 < floor < 1 / num_outcomes:
        raise ValueError(
            f"Expected probability_floor in (0, 1/{num_outcomes}), for {num_outcomes} probabilities that sum to 1, but "
            f"got {floor}. Pass 1e-10, say."
        )


def check_lengths(lengths: Any, num_rows: int, num_steps: int) -> None:
    """Refuse lengths that do not fit N sequences padded to T steps.

    Raises:
        TypeError: no tensor of integers.
        ValueError: of another shape than (N,), or outside 1..T.

    Example:
        >>> check_lengths(torch.tensor([3, 9]), 2, 5)
        Traceback (most recent call last):
        ValueError: Expected lengths in 1..5, but got 9 for sequence 1. Correct it, or pad v to 9 steps.
    """
    if not isinstance(lengths, torch.Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        what = f"dtype {lengths.dtype}" if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise TypeError(
            f"Expected lengths to be a tensor of integers, but got {what}. Write `torch.tensor([len(x) for x in ...])`."
        )
    if lengths.shape != (num_rows,):
        raise ValueError(
            f"Expected lengths of shape ({num_rows},), one a sequence, but got {tuple(lengths.shape)}. "
            "Pass the number of steps of each sequence."
        )
    bad = (lengths < 1) | (lengths > num_steps)
    if bad.any():
        row = int(bad.nonzero()[0])
        value = int(lengths[row])
        remedy = f"Correct it, or pad v to {value} steps" if value > num_steps else "Leave empty sequences out"
        raise ValueError(f"Expected lengths in 1..{num_steps}, but got {value} for sequence {row}. {remedy}.")


def check_steps(num_rows: int, num_steps: int, lengths: Any, mask: Any) -> None:
    """Refuse lengths and masks that do not fit N sequences of T steps, and sequences of which nothing is observed.

    Raises:
        TypeError: see `check_lengths`; or the mask is no boolean tensor.
        ValueError: see `check_lengths`; a mask of another shape than (N, T); or a sequence without observed steps.
    """
    if lengths is not None:
        check_lengths(lengths, num_rows, num_steps)
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        what = f"dtype {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"Expected mask to be a boolean tensor, but got {what}. True marks an observed step.")
    if mask.shape != (num_rows, num_steps):
        raise ValueError(
            f"Expected mask of shape ({num_rows}, {num_steps}), one entry a step, but got {tuple(mask.shape)}. "
            "Say for each step of each sequence whether it is observed."
        )
    seen = seen_steps(num_steps, lengths, mask)
    if seen is not None and not seen.any(-1).all():
        row = int((~seen.any(-1)).nonzero()[0])
        raise ValueError(
            f"Expected at least one observed step in every sequence, but got none in sequence {row}. Leave it out."
        )


def check_no_hiding(lengths: Any, mask: Any) -> None:
    """Refuse lengths and masks without data.

    Raises:
        ValueError: one of them is given.
    """
    for name, value in (("lengths", lengths), ("mask", mask)):
        if value is not None:
            raise ValueError(f"Expected {name} only together with v, but got {name} and size. Dream whole sequences.")
