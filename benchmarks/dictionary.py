"""Minibatch dictionary learning on image patches, against scikit-learn's MiniBatchDictionaryLearning.

Both minimise |v - W h|^2 / 2 + alpha |h|_1 over atoms of norm at most 1, on the same patches in the same batches, from
the same random patches as atoms, with one sweep over the atoms a batch (Mairal et al., 2009). Ours is `fit` on
`SparseCoding`, float32; scikit-learn is given float64, with which its coder converges, and neither stops early. Both
dictionaries are scored by one exact coder on patches from other places of the same images: mean objective, float64. A
dictionary of ours that scores higher than the peer's is an error.

Beside the step sizes (t + 2)^-0.6, `additive` is shown: those with which stepwise EM keeps scikit-learn's statistics.
The codes of scikit-learn's ``lars`` are timed on few batches, and scaled.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare import Run, Timing, closing_line, machine, table, take_turns, timed
from benchmarks.sparse_patches import (
    Schedule,
    codes,
    learner,
    objective,
    patches_of,
    unit_columns,
    with_dictionary,
)
from pyro_ext import fit

SLACK = 1e-6
"""Share by which our objective may lie above the peer's: rounding of float32."""


def additive(batch_size: int) -> Schedule:
    r"""Step sizes that make the running average one of scikit-learn's statistics.

    Those are S_t = beta_t S_{t-1} + s_t, sums that forget, with its beta_t. Over their weight n_t = beta_t n_{t-1} + 1
    they are averages with rho_t = 1 / n_t; W is the same for both.
    """
    weights: list[float] = []

    def rho(t: int) -> float:
        while len(weights) < t:
            step = len(weights)
            theta = (step + 1) * batch_size if step < batch_size - 1 else batch_size**2 + step + 1 - batch_size
            beta = (theta + 1 - batch_size) / (theta + 1)
            weights.append(beta * (weights[-1] if weights else 0) + 1)
        return 1 / weights[t - 1]

    return rho


class Task:
    """What all contestants are given.

    Args:
        v: training patches (N, D), float32, in the order of the batches.
        held_out: patches that dictionaries are scored on.
        start: first atoms (D, H), of norm 1.
        alpha: the penalty's weight.
        batch_size: rows of a batch.
        num_epochs: passes over v.
    """

    def __init__(
        self, v: Tensor, held_out: Tensor, start: Tensor, *, alpha: float, batch_size: int, num_epochs: int
    ) -> None:
        self.v, self.held_out, self.start = v, held_out, start
        self.alpha, self.batch_size, self.num_epochs = alpha, batch_size, num_epochs

    def score(self, W: Tensor) -> float:
        """Mean objective on the held-out patches with exact codes; atoms of more than norm 1 by rounding are cut."""
        W = W.double() / W.double().norm(dim=0).clamp(min=1)
        v = self.held_out.double()
        h, e_step = codes(W, v, self.alpha, tolerance=1e-9)
        if not bool(e_step.certificate.converged.all()):
            raise RuntimeError(f"Expected exact codes, but got {e_step.certificate}. Raise max_iterations.")
        return objective(v, W, h, self.alpha)


def ours(task: Task, schedule: Schedule | None = None) -> Run:
    """`fit` over the batches."""

    def learn() -> Tensor:
        model = with_dictionary(task.start, task.alpha, task.v.dtype)
        batches = list(task.v.split(task.batch_size))
        fit(learner(model, schedule), batches, task.num_epochs, progress=False)
        return model.W.detach()

    def run() -> tuple[float, float]:
        seconds, W = timed(learn)
        return seconds, task.score(W)

    return run


def scikit_learn(task: Task, algorithm: str, num_batches: int | None = None) -> Run:
    """scikit-learn's fit; with `num_batches` only these are seen, and the seconds scaled to all."""
    from sklearn.decomposition import MiniBatchDictionaryLearning as Peer
    from sklearn.exceptions import ConvergenceWarning

    v = task.v.double().numpy()
    few = v if num_batches is None else v[: num_batches * task.batch_size]
    num_epochs = task.num_epochs if num_batches is None else 1
    share = len(few) * num_epochs / (len(v) * task.num_epochs)

    def learn() -> Peer:
        peer = Peer(
            task.start.shape[1],
            alpha=task.alpha,
            batch_size=task.batch_size,
            max_iter=num_epochs,
            fit_algorithm=algorithm,
            dict_init=np.ascontiguousarray(task.start.double().T.numpy()),
            shuffle=False,
            tol=0.0,
            max_no_improvement=None,
            random_state=0,
        )
        return peer.fit(few)

    def run() -> tuple[float, float]:
        with warnings.catch_warnings():
            # The score tells what its codes were worth.
            warnings.simplefilter("ignore", ConvergenceWarning)
            seconds, peer = timed(learn)
        wanted = -(-len(few) // task.batch_size) * num_epochs
        if peer.n_steps_ != wanted:
            raise RuntimeError(
                f"Expected {wanted} batches, but scikit-learn saw {peer.n_steps_}. Look at its stopping."
            )
        return seconds / share, task.score(torch.from_numpy(peer.components_.T.copy()))

    return run


def check_no_higher(ours: Timing, peer: Timing, slack: float = SLACK) -> None:
    """Refuse a comparison in which ours learned the worse dictionary.

    Raises:
        RuntimeError: naming both objectives.
    """
    if not ours.answer <= peer.answer * (1 + slack):
        raise RuntimeError(
            f"Expected an objective no higher than {peer.label}'s {peer.answer:.8g}, but got {ours.answer:.8g}. "
            "Learn longer, or with other step sizes."
        )


def main(options: list[str]) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks dictionary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", type=Path, help="grey images, a .npy file; default: scikit-learn's two photographs")
    parser.add_argument("--side", type=int, default=12, help="pixels of a patch's edge (12)")
    parser.add_argument("--patches", type=int, default=20_480, help="patches learned from (20,480)")
    parser.add_argument("--held-out", type=int, default=4_000, help="patches scored on (4,000)")
    parser.add_argument("--latents", type=int, default=196, help="atoms (196)")
    parser.add_argument("--alpha", type=float, default=1.0, help="the penalty's weight (1)")
    parser.add_argument("--batch-size", type=int, default=256, help="patches of a batch (256)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the patches (2)")
    parser.add_argument("--lars-batches", type=int, default=2, help="batches that lars is timed on (2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each contestant (3)")
    given = parser.parse_args(options)

    torch.set_num_threads(given.threads)
    v, held_out = patches_of(given.path, given.side, given.patches, given.held_out)
    start = unit_columns(v[torch.randperm(len(v), generator=torch.Generator().manual_seed(0))[: given.latents]].T)
    task = Task(v, held_out, start, alpha=given.alpha, batch_size=given.batch_size, num_epochs=given.epochs)
    print(
        f"{len(v):,} patches of {given.side} x {given.side}, batches of {given.batch_size}, {given.epochs} epochs, "
        f"{given.latents} atoms, alpha {given.alpha:g}; {machine()}"
    )
    print(f"  held-out objective at the start {task.score(start):.6g}")
    runs = {
        "pyro-ext": ours(task),
        "pyro-ext, peer's statistics": ours(task, additive(given.batch_size)),
        "scikit-learn, cd": scikit_learn(task, "cd"),
    }
    timings = take_turns(runs, given.repeats, shown_only=("pyro-ext, peer's statistics",))
    scaled, _ = scikit_learn(task, "lars", given.lars_batches)()
    print(table("the whole fit, ours float32, peers float64", timings, "held-out objective"))
    print(f"  scikit-learn, lars: {1e3 * scaled:.0f} ms, scaled from {given.lars_batches} batches")
    check_no_higher(timings[0], timings[2])
    timings.append(Timing("scikit-learn, lars (scaled)", [scaled]))
    print(closing_line("dictionary", timings))
