"""Factor analysis, 50,000 x 64, 16 factors: seconds from raw data to the log-likelihood at which scikit-learn stops.

The exact likelihood reads the data through their covariance only. Ours condenses the rows to D + 1 that have the same
one (`condense`), climbs log p(v) on those (`maximize_evidence`, ECME), and lets `EM.run` confirm the maximum. Its
start is the model's own. Plain EM from that start, on the condensed rows too, is shown beside it. float64.
"""

from __future__ import annotations

import numpy as np
import pyro
import torch

from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import Structured
from pyro_ext.models import FactorAnalysis

SCIKIT_LEARN_TOLERANCE = 1e-2
"""Gain of the total log-likelihood below which scikit-learn stops by default."""


def draw_data(num_rows: int, num_visible: int, num_factors: int) -> np.ndarray:
    """Rows of a factor model with unequal noise, float64."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((num_visible, num_factors))
    noise = rng.uniform(0.5, 2, num_visible) ** 0.5
    rows = rng.standard_normal((num_rows, num_factors)) @ W.T
    return rows + noise * rng.standard_normal(rows.shape) + rng.standard_normal(num_visible)


def ours(rows: np.ndarray, num_factors: int) -> Run:
    """Condense, climb, confirm by EM."""
    v = torch.from_numpy(rows)
    tolerance = SCIKIT_LEARN_TOLERANCE / len(rows)

    def fit() -> float:
        pyro.set_rng_seed(0)
        model = FactorAnalysis(v.shape[1], num_factors).double()
        few, _ = model.condense(v)
        model.initialize(few)
        model.maximize_evidence(few, tolerance=tolerance)
        em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
        history = em.run(few, max_steps=50, tolerance=tolerance, progress=False)
        return -history.loss[-1]

    return lambda: timed(fit)


def plain(rows: np.ndarray, num_factors: int, target: float) -> Run:
    """EM on the condensed rows until it reaches a log-likelihood."""
    v = torch.from_numpy(rows)

    def fit() -> float:
        pyro.set_rng_seed(0)
        model = FactorAnalysis(v.shape[1], num_factors).double()
        few, _ = model.condense(v)
        model.initialize(few)
        em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
        for _ in range(100):
            history = em.run(few, max_steps=20, tolerance=0.0, progress=False)
            if -history.loss[-1] >= target:
                break
        return -history.loss[-1]

    return lambda: timed(fit)


def scikit_learn(rows: np.ndarray, num_factors: int) -> Run:
    """scikit-learn's FactorAnalysis with its defaults."""
    from sklearn.decomposition import FactorAnalysis as Peer

    def run() -> tuple[float, float]:
        seconds, fitted = timed(lambda: Peer(num_factors, random_state=0).fit(rows))
        return seconds, fitted.loglike_[-1] / len(rows)

    return run


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, rows=50_000, visible=64, factors=16)
    rows = draw_data(arguments.rows, arguments.visible, arguments.factors)
    print(f"{rows.shape[0]} x {rows.shape[1]}, {arguments.factors} factors; {machine()}")
    peer = scikit_learn(rows, arguments.factors)
    target = peer()[1]
    runs = {
        "pyro-ext": ours(rows, arguments.factors),
        "pyro-ext, plain EM": plain(rows, arguments.factors, target),
        "scikit-learn": peer,
    }
    timings = take_turns(runs, arguments.repeats, shown_only=("pyro-ext, plain EM",))
    check_agreement(timings, 1e-6)
    print(table("float64, the whole fit", timings, "log-likelihood a row"))
    print(closing_line("factor_analysis", timings))
