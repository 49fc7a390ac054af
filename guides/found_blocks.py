"""Blocks that a structured guide finds itself: from the strongest couplings of the program (section 19.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_ext.factors import check_concave
from pyro_ext.initial import prior_features
from pyro_ext.program import Program
from pyro_ext.quadratic import NotQuadraticError, QuadraticForm, quadratic_form
from pyro_ext.sites import Kind, Site

Unit = tuple[str, int]
"""A site and the position of one of its units."""


@dataclass(frozen=True)
class Couplings:
    """How far each pair of units is from independent given the data.

    Attributes:
        units: the units of all latent sites in the order of the program.
        counts: number of states of each unit; 1 for continuous ones.
        groups: the same number for units that may share a block: both discrete or both real, in the same plates.
        strength: ``(U, U)``, symmetric, nats; 0 on the diagonal, between units of different groups, and wherever
            only rounding is left.
    """

    units: list[Unit]
    counts: list[int]
    groups: list[int]
    strength: Tensor


@torch.no_grad()
def find_couplings(program: Program) -> Couplings:
    """The couplings between the units of a program whose log p(v, h) is quadratic, at the present theta.

    strength^2 = tr(S_a J_ab S_b J_ba), the variance of the pair's term h_a'J_ab h_b less what is due to either unit
    alone, when the units are independent with covariances S_a and S_b; half of it is their mutual information, to
    lowest order in J. For real units S = -1/J_aa, and the strength is the partial correlation |J_ab| / sqrt(J_aa J_bb).
    For binary ones it is |J_ab| times both standard deviations, and in one-hot units S takes out whatever adds to a
    row or a column of J_ab, which cannot matter. For discrete units S is the prior's covariance, averaged over the
    rows, where the prior depends on no other latent, else that of equal probabilities. It is not the covariance of the
    mean-field posterior: where one of two causes explains all, this commits to one, and the pair
    that matters most would look independent. Couplings of many rows or elements of inner plates are combined
    by their root mean square.

    Raises:
        ValueError: log p(v, h) is not quadratic in the latents (`NotQuadraticError`) or not finite.
    """
    form = quadratic_form(program)
    names: dict[tuple[bool, tuple[tuple[str, int], ...]], list[Site]] = {}
    for site in program.latents:
        # A Markov chain is one unit with a factor of its own.
        if site.is_chain:
            continue
        names.setdefault((site.kind.is_discrete, tuple((f.name, f.dim) for f in site.frames)), []).append(site)
    units = [(s.name, u) for s in program.latents for u in range(s.num_features // s.unit_size)]
    position = {unit: place for place, unit in enumerate(units)}
    counts, groups = [1] * len(units), [-1] * len(units)
    strength = form.linear.new_zeros(len(units), len(units))
    for number, sites in enumerate(names.values()):
        mine = [(s, u) for s in sites for u in range(s.num_features // s.unit_size)]
        places = [position[s.name, u] for s, u in mine]
        for place, (site, _) in zip(places, mine, strict=True):
            counts[place], groups[place] = site.num_classes if site.kind.is_discrete else 1, number
        index = torch.tensor(places)
        strength[index[:, None], index] = _strengths(form, sites, program)
    return Couplings(units, counts, groups, strength)


def _strengths(form: QuadraticForm, sites: Sequence[Site], program: Program) -> Tensor:
    """Strengths between all units of sites in the same plates, ``(U, U)``."""
    index = torch.cat([form.layout.indices(s, range(s.num_features)) for s in sites], -1).to(form.linear.device)
    coupling = form.coupling[..., index[:, :, None], index[:, None, :]]
    root = torch.block_diag(*(_root_covariance(s, program) for s in sites)).to(coupling)
    if not sites[0].kind.is_discrete:
        precision = -coupling.diagonal(dim1=-2, dim2=-1)
        check_concave(precision)
        coupling = coupling * (precision[..., :, None] * precision[..., None, :]).rsqrt()
    squares = (root @ coupling @ root).square()
    squares = squares.reshape((-1,) + squares.shape[-2:]).mean(0)
    owner = torch.block_diag(*(torch.ones(s.unit_size, 1) for s in sites for _ in range(s.num_features // s.unit_size)))
    strength = (owner.to(squares).mT @ squares @ owner.to(squares)).sqrt()
    # Orthogonal components are so to rounding only; own terms take part in the scale.
    rounding = torch.finfo(strength.dtype).eps ** (2 / 3)
    strength = torch.where(strength > rounding * strength.amax(), strength, torch.zeros_like(strength))
    return strength - strength.diagonal().diag()


def _root_covariance(site: Site, program: Program) -> Tensor:
    """Symmetric root of the covariance of a site's independent units, ``(F, F)``; the identity for real ones."""
    if not site.kind.is_discrete:
        return torch.eye(site.num_features)
    if site.name in program.peelable:
        probs = prior_features(site).reshape(-1, site.num_features).mean(0).double()
    else:
        probs = torch.full((site.num_features,), 1 / site.num_classes, dtype=torch.float64)
    if site.kind is Kind.BINARY:
        return (probs * (1 - probs)).sqrt().diag()
    roots = []
    for p in probs.split(site.unit_size):
        values, vectors = torch.linalg.eigh(p.diag() - torch.outer(p, p))
        roots.append((vectors * values.clamp_min(0).sqrt()) @ vectors.mT)
    return torch.block_diag(*roots)


def strongest_blocks(couplings: Couplings, max_block_size: int, max_states: int) -> list[list[Unit]]:
    """Blocks of at most so many units, by greedy agglomeration.

    Each step joins the two blocks between which most of the coupling lies (the sum of squared strengths), among those
    that may share a block and are together small enough, until none is left that is coupled.

    Raises:
        ValueError: blocks of that size could have more than ``max_states`` joint states.
    """
    for group in set(couplings.groups):
        counts = [c for c, g in zip(couplings.counts, couplings.groups, strict=True) if g == group]
        largest = math.prod(sorted(counts)[-max_block_size:])
        if largest > max_states:
            raise ValueError(
                f"Expected at most {max_states} joint states in a block of max_block_size={max_block_size} units, but "
                f"got up to {largest}. Use a smaller `max_block_size`, or raise `max_states`."
            )
    blocks = [[unit] for unit in range(len(couplings.units))]
    squares = couplings.strength.double().square().cpu().numpy().copy()
    while len(blocks) > 1:
        sizes = np.array([len(block) for block in blocks])
        fits = sizes[:, None] + sizes[None, :] <= max_block_size
        candidates = np.triu(np.where(fits, squares, 0.0), 1)
        first, second = np.unravel_index(int(candidates.argmax()), candidates.shape)
        if not candidates[first, second] > 0:
            break
        blocks[first] = sorted(blocks[first] + blocks.pop(second))
        squares[first] += squares[second]
        squares[:, first] += squares[:, second]
        squares = np.delete(np.delete(squares, second, 0), second, 1)
    joined = sorted(block for block in blocks if len(block) > 1)
    return [[couplings.units[unit] for unit in block] for block in joined]


def strongest_forest(couplings: Couplings, units: Sequence[Unit]) -> list[tuple[int, int]]:
    """Edges of the maximum-weight spanning forest of some units, weighted by squared strengths (Chow & Liu, 1968).

    Half of a squared strength is the mutual information to lowest order, so that the edges are those that lose least.
    Units that are not coupled stay apart.

    Returns:
        Pairs of positions in ``units``.
    """
    places = [couplings.units.index(unit) for unit in units]
    strength = couplings.strength[places][:, places].cpu()
    pairs = [(float(strength[i, j]), i, j) for i in range(len(units)) for j in range(i)]
    leader = list(range(len(units)))
    edges = []
    for weight, second, first in sorted(pairs, key=lambda pair: (-pair[0], pair[2], pair[1])):
        if weight > 0 and leader[first] != leader[second]:
            leader = [leader[first] if name == leader[second] else name for name in leader]
            edges.append((first, second))
    return sorted(edges)


def couplings_or_refuse(program: Program, remedy: str) -> Couplings:
    """`find_couplings`, with a remedy for programs that have none.

    Raises:
        ValueError: log p(v, h) is not quadratic in the latents, naming the reason and the remedy.
    """
    try:
        return find_couplings(program)
    except NotQuadraticError as error:
        rule_and_value = str(error).partition(". Use ")[0]
        raise ValueError(f"{rule_and_value}. The couplings tell what to join: {remedy}") from error
