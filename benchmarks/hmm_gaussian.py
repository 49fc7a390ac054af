"""EM for a Gaussian HMM, 100 sequences of 200 steps, K = D = 8, diagonal covariances: seconds an iteration.

Ours is `EM.run`; the peer is hmmlearn's GaussianHMM without priors, on the same data, in float64, from the same start.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import MeanField
from pyro_ext.models import GaussianEmission, HiddenMarkovModel, assign_parameters

ITERATIONS = 20


def draw_data(sequences: int, steps: int, states: int, visible: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sequences of a sticky chain, shape (N, T, D), and parameters to start from."""
    rng = np.random.default_rng(0)
    transition = 0.8 * np.eye(states) + 0.2 * rng.dirichlet(np.ones(states), states)
    means = 0.8 * rng.standard_normal((states, visible))
    path = np.zeros((sequences, steps), dtype=int)
    path[:, 0] = rng.integers(states, size=sequences)
    for step in range(1, steps):
        level = rng.random((sequences, 1))
        path[:, step] = (transition[path[:, step - 1]].cumsum(-1) < level).sum(-1).clip(max=states - 1)
    rows = means[path] + rng.standard_normal((sequences, steps, visible))
    start = {
        "initial": np.full(states, 1 / states),
        "transition": 0.5 * np.eye(states) + 0.5 / states,
        "locs": means + 0.5 * rng.standard_normal(means.shape),
        "scale": np.ones_like(means),
    }
    return rows, start


def ours(v: np.ndarray, start: dict[str, np.ndarray]) -> Run:
    """EM of the library."""
    states, visible = start["locs"].shape
    model = HiddenMarkovModel(states, GaussianEmission(visible, covariance_floor=0.0)).double()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    data = torch.from_numpy(v)
    values = {name: torch.from_numpy(value) for name, value in start.items()}

    def run() -> tuple[float, float]:
        assign_parameters(model, values)
        seconds, history = timed(lambda: em.run(data, max_steps=ITERATIONS, tolerance=0.0, progress=False))
        return seconds / len(history.loss), -history.loss[-1] * len(v)

    return run


def hmmlearn(v: np.ndarray, start: dict[str, np.ndarray]) -> Run:
    """hmmlearn's EM without its priors."""
    from hmmlearn.hmm import GaussianHMM

    sequences, steps, visible = v.shape
    flat, lengths = v.reshape(-1, visible), [steps] * sequences

    def run() -> tuple[float, float]:
        peer = GaussianHMM(
            len(start["initial"]), "diag", min_covar=0.0, covars_prior=0.0, covars_weight=0.0, means_weight=0.0,
            n_iter=ITERATIONS, tol=-np.inf, init_params="",
        )  # fmt: skip
        peer.startprob_, peer.transmat_ = start["initial"].copy(), start["transition"].copy()
        peer.means_, peer.covars_ = start["locs"].copy(), start["scale"] ** 2
        seconds, fitted = timed(lambda: peer.fit(flat, lengths))
        return seconds / fitted.monitor_.iter, float(fitted.monitor_.history[-1])

    return run


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, sequences=100, steps=200, states=8, visible=8)
    v, start = draw_data(arguments.sequences, arguments.steps, arguments.states, arguments.visible)
    print(f"{v.shape[0]} sequences of {v.shape[1]} steps, D = {v.shape[2]}, K = {arguments.states}; {machine()}")
    timings = take_turns({"pyro-ext": ours(v, start), "hmmlearn": hmmlearn(v, start)}, arguments.repeats)
    check_agreement(timings, 1e-8)
    print(table("float64, an iteration", timings, "log-likelihood"))
    print(closing_line("hmm_gaussian", timings))
