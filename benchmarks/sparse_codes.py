"""Sparse codes of image patches: h* = argmin |v - W h|^2 / 2 + |h|_1, against scikit-learn's `sparse_encode`.

Ours is the whole of `EM(model, Dirac(model), e_step=Maximize(), m_step=None).infer(v)["h"].mean` on the Pyro program
`SparseCoding`: it is traced, its quadratic form extracted and tested, and the lasso of every row solved. float32,
by ``SpaRSA(1e-4)``: duality gaps of at most 1e-4 of what a code can gain, at which objectives are known from here to
lie within 1e-7 of the optimum. Shown beside it are the default solver with its tolerance of 1e-6, float64, and `by
hand` the same solver on G = W'W and b = v W without a program. scikit-learn is given float64, with which it converges,
the Gram matrix of the atoms, and its fixed tolerance of 1e-8; one process, as by default. All must come to the same
mean objective to 1e-6, computed in float64. ``lasso_lars`` is timed on few rows, and scaled. Atoms are learned from
other patches, or patches themselves (``--dictionary patches``).

Memory is measured in a process of its own for each: how far resident memory rises above the level before the call.
"""

from __future__ import annotations

import argparse
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.compare import Run, Timing, check_agreement, closing_line, machine, table, take_turns, timed
from benchmarks.sparse_patches import learn, objective, patches_of, unit_columns, with_dictionary
from benchmarks.streaming import forget_highest, highest, resident
from pyro_ext import EM, Maximize, SpaRSA
from pyro_ext.guides import Dirac
from pyro_ext.maximize import default_solver
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import Solver

RATE = 1.0
AGREEMENT = 1e-6
"""Share of the mean objective by which contestants may differ."""


def coarse() -> Solver:
    """What is as exact as the comparison asks for."""
    return SpaRSA(1e-4)


def ours(v: Tensor, W: Tensor, solver: Solver | None = None) -> tuple[Tensor, Maximize]:
    """Codes (N, H) in v's dtype, and the E-step with its certificate; the default solver where none is given."""
    model = with_dictionary(W, RATE, v.dtype)
    e_step = Maximize(solver)
    return EM(model, Dirac(model), e_step=e_step, m_step=None).infer(v)["h"].mean, e_step


def by_hand(v: Tensor, W: Tensor, solver: Solver | None = None) -> Tensor:
    """The same solver on G and b; the default one where none is given."""
    W = W.to(v)
    rate = v.new_full((W.shape[1],), RATE)
    problem = PenalizedQuadratic(W.T @ W, v @ W, rate, energy=v.square().sum(-1))
    return (solver or default_solver(problem)).solve(problem, torch.zeros_like(problem.linear)).x


def scikit_learn(v: NDArray[np.float64], atoms: NDArray[np.float64], algorithm: str) -> NDArray[np.float64]:
    """Codes (N, H), given the atoms as rows (H, D)."""
    from sklearn.decomposition import sparse_encode
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The objective tells: it is compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        gram = atoms @ atoms.T
        return sparse_encode(v, atoms, gram=gram, algorithm=algorithm, alpha=RATE, max_iter=10_000)


def atoms_of(W: Tensor) -> NDArray[np.float64]:
    """The atoms as rows (H, D), as scikit-learn wants them."""
    return np.ascontiguousarray(W.double().T.numpy())


def contestants(v: Tensor, W: Tensor) -> dict[str, Run]:
    """All that code every row."""
    twice, atoms = v.double(), atoms_of(W)
    rows = twice.numpy()

    def run_ours(data: Tensor, solver: Solver | None = None) -> Run:
        def run() -> tuple[float, float]:
            seconds, (h, _) = timed(lambda: ours(data, W, solver))
            return seconds, objective(v, W, h, RATE)

        return run

    def run_by_hand() -> tuple[float, float]:
        seconds, h = timed(lambda: by_hand(v, W, coarse()))
        return seconds, objective(v, W, h, RATE)

    def run_scikit_learn() -> tuple[float, float]:
        seconds, h = timed(lambda: scikit_learn(rows, atoms, "lasso_cd"))
        return seconds, objective(v, W, torch.from_numpy(h), RATE)

    return {
        "pyro-ext": run_ours(v, coarse()),
        "pyro-ext, tolerance 1e-6": run_ours(v),
        "pyro-ext, float64": run_ours(twice, coarse()),
        "by hand": run_by_hand,
        "scikit-learn, lasso_cd": run_scikit_learn,
    }


def lars_on_few(v: Tensor, W: Tensor, num_rows: int) -> Timing:
    """``lasso_lars`` on the first rows, its seconds scaled to all; refused where it does not agree with ours there."""
    few = v[:num_rows]
    rows, atoms = few.double().numpy(), atoms_of(W)
    seconds, h = timed(lambda: scikit_learn(rows, atoms, "lasso_lars"))
    mine = Timing("pyro-ext", answer=objective(few, W, ours(few, W)[0], RATE))
    lars = Timing("scikit-learn, lasso_lars", answer=objective(few, W, torch.from_numpy(h), RATE))
    check_agreement([mine, lars], AGREEMENT)
    lars.seconds.append(seconds * len(v) / len(few))
    return lars


def measure_memory(label: str, v: NDArray[np.float32], W: NDArray[np.float64], threads: int) -> float:
    """Bytes by which resident memory rose at most during one call in this process."""
    torch.set_num_threads(threads)
    data, dictionary = torch.from_numpy(v), torch.from_numpy(W)
    if label == "pyro-ext":

        def call(rows: slice) -> object:
            return ours(data[rows], dictionary, coarse())[0]
    else:
        twice, atoms = data.double().numpy(), atoms_of(dictionary)

        def call(rows: slice) -> object:
            return scikit_learn(twice[rows], atoms, label)

    # Modules that are loaded late, threads and the like are no part of it.
    call(slice(0, 64))
    before = resident()
    forget_highest()
    kept = call(slice(None))
    rise = highest() - before
    del kept
    return rise


def memory(v: Tensor, W: Tensor, labels: list[str], threads: int) -> list[float]:
    """Megabytes of each contestant, each in a process of its own, one after the other."""
    # Read by the C library when a process starts: blocks that are freed are given back at once.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [pool.submit(measure_memory, label, v.numpy(), W.double().numpy(), threads) for label in labels]
        return [run.result() / 1e6 for run in runs]


def main(options: list[str]) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sparse_codes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", type=Path, help="grey images, a .npy file; default: scikit-learn's two photographs")
    parser.add_argument("--dictionary", choices=("learned", "patches"), default="learned", help="the atoms (learned)")
    parser.add_argument("--side", type=int, default=12, help="pixels of a patch's edge (12)")
    parser.add_argument("--rows", type=int, default=10_000, help="patches that are coded (10,000)")
    parser.add_argument("--latents", type=int, default=196, help="atoms (196)")
    parser.add_argument("--training", type=int, default=20_000, help="patches that atoms are learned from (20,000)")
    parser.add_argument("--lars-rows", type=int, default=500, help="rows that lasso_lars is timed on (500)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the peers' BLAS (2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each contestant (5)")
    given = parser.parse_args(options)

    torch.set_num_threads(given.threads)
    v, training = patches_of(given.path, given.side, given.rows, given.training)
    if given.dictionary == "learned":
        W = unit_columns(learn(training, given.latents, num_epochs=2, quiet=True).W)
    else:
        W = unit_columns(training[: given.latents].T)
    print(
        f"{len(v):,} patches of {given.side} x {given.side}, {given.latents} atoms ({given.dictionary}), "
        f"lambda {RATE:g}, beta 1; {machine()}"
    )
    runs = contestants(v, W)
    shown_only = tuple(label for label in list(runs)[1:] if not label.startswith("scikit-learn"))
    timings = take_turns(runs, given.repeats, shown_only=shown_only)
    print(table("float32 where not said otherwise; peers float64", timings, "mean objective"))
    check_agreement(timings, AGREEMENT)
    lars = lars_on_few(v, W, given.lars_rows)
    print(f"  {lars.label}: {1e3 * lars.median:.0f} ms, scaled from {given.lars_rows} rows")
    timings.append(lars)
    h, e_step = ours(v, W, coarse())
    steps, gap = e_step.certificate.num_iterations.double().mean(), e_step.certificate.gap.mean()
    print(f"  {e_step.certificate!r}; in the mean {float(steps):.1f} iterations, a gap of {float(gap):.2g} nats")
    print(f"  {float((h != 0).sum(1).double().mean()):.1f} atoms a patch")
    peers = [timing for timing in timings if timing.label.startswith("scikit-learn")]
    peer = min(peers, key=lambda timing: timing.median).label.removeprefix("scikit-learn, ")
    mine, theirs = memory(v, W, ["pyro-ext", peer], given.threads)
    print(f"  memory above the level before: ours={mine:.1f}MB peer={theirs:.1f}MB ratio={theirs / mine:.3g}")
    print(closing_line("sparse_codes", timings))
