"""Colours: sets of groups of q that do not reach each other, whose optima may be taken at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext.blocks import Block


@dataclass(frozen=True)
class Group:
    """Features of one element of a block that change at once.

    Attributes:
        block: the block.
        copy: which element of the block's inner plates.
        features: the features within the block, increasing.
        positions: where they stand in a row's vector, ``(k,)``.
    """

    block: Block
    copy: int
    features: tuple[int, ...]
    positions: Tensor


@dataclass(frozen=True)
class Batch:
    """Groups of one colour with the same features in several elements of a block: one update sets them all.

    Attributes:
        block: the block.
        copies: the elements, ``(C,)``.
        features: the features within the block, increasing; whole groups, perhaps many.
        positions: where they stand in a row's vector, ``(C, k)``.
        columns: their columns in the block's parameters.
    """

    block: Block
    copies: Tensor
    features: tuple[int, ...]
    positions: Tensor
    columns: Tensor


def groups_of(blocks: Sequence[Block], indices: Sequence[Tensor]) -> list[Group]:
    """All groups in the order of a sequential sweep.

    Args:
        blocks: the factors of q.
        indices: positions of each block's features in a row's vector, ``(M, k)``.
    """
    return [
        Group(block, copy, tuple(group), positions[list(group)])
        for block, index in zip(blocks, indices, strict=True)
        for copy, positions in enumerate(index)
        for group in block.factor.groups
    ]


def coupled_features(coupling: Tensor) -> Tensor:
    """Which pairs of features interact, boolean ``(F, F)``, from second derivatives ``(F, F)`` or ``(R, F, F)``.

    Rounding is no coupling: entries below one unit in the last place of both features' largest ones are left out.
    """
    size = coupling.detach().abs()
    size = size if size.dim() == 2 else size.amax(0)
    largest = size.amax(-1)
    least = torch.finfo(size.dtype).eps * torch.minimum(largest[:, None], largest[None, :])
    pairs = size > least
    return pairs | pairs.mT


def colour_groups(groups: Sequence[Group], coupled: Tensor) -> list[list[int]]:
    """Greedy colouring: each group, in order, takes the first colour that none of its neighbours has.

    Args:
        groups: the groups.
        coupled: which features interact, boolean ``(F, F)``.

    Returns:
        For each colour the numbers of its groups. Where all groups interact, each has a colour of its own, in order.
    """
    member = coupled.new_zeros(len(groups), coupled.shape[0], dtype=torch.float32)
    for number, group in enumerate(groups):
        member[number, group.positions] = 1
    neighbours = (member @ coupled.float() @ member.mT > 0).cpu().numpy()
    colours: list[list[int]] = []
    taken = [-1] * len(groups)
    for number, row in enumerate(neighbours):
        used = {taken[other] for other in row[:number].nonzero()[0]}
        colour = next(c for c in range(len(colours) + 1) if c not in used)
        if colour == len(colours):
            colours.append([])
        colours[colour].append(number)
        taken[number] = colour
    return colours


def batches_of(groups: Sequence[Group]) -> list[Batch]:
    """The fewest batches that hold the groups of one colour, which must not interact."""
    elements: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        elements.setdefault((group.block.name, group.copy), []).append(group)
    alike: dict[tuple[str, tuple[int, ...]], list[tuple[Block, int, Tensor]]] = {}
    for (name, copy), members in elements.items():
        members = sorted(members, key=lambda g: g.features)
        features = tuple(i for g in members for i in g.features)
        positions = torch.cat([g.positions for g in members])
        alike.setdefault((name, features), []).append((members[0].block, copy, positions))
    found = []
    for (_, features), members in alike.items():
        block = members[0][0]
        positions = torch.stack([p for _, _, p in members])
        device = positions.device
        copies = torch.tensor([copy for _, copy, _ in members], device=device)
        columns = torch.tensor(block.factor.columns(features), device=device)
        found.append(Batch(block, copies, features, positions, columns))
    return found


def write(params: dict[str, Tensor], batch: Batch, new: Tensor) -> None:
    """Put a batch's new parameters ``(R, C, P)`` into the tables, in place."""
    params[batch.block.name][:, batch.copies[:, None], batch.columns[None, :]] = new
