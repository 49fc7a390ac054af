"""EM for mixtures of Gaussians against scikit-learn and pomegranate: seconds an iteration from the same start."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import MeanField
from pyro_ext.models import Diagonal, Full, GaussianMixture, assign_parameters

ITERATIONS = 20


def draw_data(num_rows: int, num_visible: int, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a mixture of overlapping Gaussians, float64, and the means to start from."""
    rng = np.random.default_rng(0)
    # So near to each other that EM has far to go.
    means = 0.8 * rng.standard_normal((num_components, num_visible))
    rows = means[rng.integers(num_components, size=num_rows)] + rng.standard_normal((num_rows, num_visible))
    return rows, means + 0.5 * rng.standard_normal(means.shape)


def ours(v: Tensor, means: Tensor, full: bool) -> Run:
    """EM of the library: `EM.run`, ledger, snapshots and posterior table included."""
    num_components, num_visible = means.shape
    model = GaussianMixture(num_components, num_visible, Full() if full else Diagonal(), covariance_floor=0.0)
    model.to(v.dtype)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    roots = torch.ones_like(means).diag_embed() if full else torch.ones_like(means)
    start = {
        "weights": torch.full_like(means[:, 0], 1 / num_components),
        "locs": means,
        "scale_tril" if full else "scale": roots,
    }

    def run() -> tuple[float, float]:
        model.shift.copy_(v.mean(0))
        assign_parameters(model, start)
        seconds, history = timed(lambda: em.run(v, max_steps=ITERATIONS, tolerance=0.0, progress=False))
        return seconds / len(history.loss), -history.loss[-1]

    return run


def scikit_learn(v: np.ndarray, means: np.ndarray, full: bool) -> Run:
    """scikit-learn's GaussianMixture from the same start, without its k-means."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Peer

    num_components, num_visible = means.shape
    ones = np.ones_like(means)
    precisions = np.stack([np.eye(num_visible, dtype=means.dtype)] * num_components) if full else ones

    def run() -> tuple[float, float]:
        peer = Peer(
            num_components,
            covariance_type="full" if full else "diag",
            max_iter=ITERATIONS,
            tol=0.0,
            reg_covar=0.0,
            weights_init=np.full(num_components, 1 / num_components, dtype=means.dtype),
            means_init=means,
            precisions_init=precisions,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            seconds, fitted = timed(lambda: peer.fit(v))
        return seconds / fitted.n_iter_, float(fitted.lower_bound_)

    return run


def pomegranate(v: Tensor, means: Tensor, full: bool) -> Run:
    """pomegranate's GeneralMixtureModel: ten of its summaries and updates."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    num_components, num_visible = means.shape
    covariance = torch.eye(num_visible, dtype=v.dtype) if full else torch.ones(num_visible, dtype=v.dtype)

    def iterate(peer: Any) -> float:
        total = 0.0
        for _ in range(ITERATIONS):
            total = float(peer.summarize(v).sum())
            peer.from_summaries()
        return total

    def run() -> tuple[float, float]:
        kind = "full" if full else "diag"
        parts = [Normal(mean.clone(), covariance.clone(), covariance_type=kind, min_cov=0.0) for mean in means]
        peer = GeneralMixtureModel(parts, priors=torch.full_like(means[:, 0], 1 / num_components))
        seconds, total = timed(lambda: iterate(peer))
        return seconds / ITERATIONS, total / len(v)

    return run


def compare(name: str, full: bool, options: list[str], description: str | None) -> None:
    """Both dtypes; the closing line is that of the smaller ratio."""
    arguments: argparse.Namespace = parse(options, description, rows=100_000, visible=16, components=16)
    rows, means = draw_data(arguments.rows, arguments.visible, arguments.components)
    print(f"{arguments.rows} rows, D = {arguments.visible}, K = {arguments.components}; {machine()}")
    lines = []
    for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-8)):
        v, start = rows.astype(dtype), means.astype(dtype)
        runs = {
            "pyro-ext": ours(torch.from_numpy(v), torch.from_numpy(start), full),
            "scikit-learn": scikit_learn(v, start, full),
        }
        if dtype == np.float32:
            # pomegranate holds its parameters in float32 whatever it is given.
            runs["pomegranate"] = pomegranate(torch.from_numpy(v), torch.from_numpy(start), full)
        timings = take_turns(runs, arguments.repeats)
        check_agreement(timings, tolerance)
        print(table(f"{np.dtype(dtype).name}, an iteration", timings, "log-likelihood a row"))
        lines.append(closing_line(name, timings, "scikit-learn"))
    print(min(lines, key=lambda line: float(line.rsplit("=", 1)[1])))
