"""L and log p(v) during a run: exact where they can be, of the right theta and q, and without a trace in the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient, Maximize, fit
from pyro_ext.dream import Dream
from pyro_ext.fit import EpochEnd
from pyro_ext.gap import Gap, GapEntry
from pyro_ext.gap_plot import plot_gap
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.models import BinarySparseCoding, HelmholtzMachine, SigmoidBeliefNetwork, SparseCoding
from tests.oracles.enumeration import binary_states, elbo, factorial_posterior, log_evidence, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")


def binary(n: int = 6, width: int = 4) -> Tensor:
    return torch.rand(n, width).round()


def asleep_and_awake(num_steps: int = 2) -> tuple[EM, Tensor]:
    model, v = SigmoidBeliefNetwork([3, 4]), binary()
    steps = Dream(Adam({"lr": 0.1}), num_steps, 20), Gradient(Adam({"lr": 0.1}), num_steps)
    return EM(model, Amortized(model), e_step=steps[0], m_step=steps[1]), v


class ByHand:
    """log p(v) and L after each step, by enumeration."""

    def __init__(self, v: Tensor) -> None:
        self.v, self.seen = v, []

    def __call__(self, event: EpochEnd) -> None:
        em = event.svi
        with torch.no_grad():
            log_joint = program_log_joint(em.model, {"h1": binary_states(3).unsqueeze(1)}, self.v)
        q = factorial_posterior(em.guide.posterior(self.v)["h1"].mean)
        self.seen.append((float(log_evidence(log_joint).mean()), float(elbo(log_joint, q).mean())))


def test_entries_are_those_of_an_enumeration() -> None:
    em, v = asleep_and_awake()
    gap, by_hand = Gap(v), ByHand(v)
    history = em.run(v, max_steps=3, tolerance=0, callbacks=[gap, by_hand], progress=False)
    assert [(e.step, e.half) for e in gap.entries] == [(1, "M"), (2, "E"), (2, "M"), (3, "E"), (3, "M")]
    assert all(e.exact for e in gap.entries)
    after_m = [e for e in gap.entries if e.half == "M"]
    for entry, (log_p, bound) in zip(after_m, by_hand.seen, strict=True):
        assert entry.log_evidence == pytest.approx(log_p, abs=1e-12)
        assert entry.bound == pytest.approx(bound, abs=1e-12)
        assert entry.gap == pytest.approx(log_p - bound, abs=1e-12)
    # The sleep of step 3 moved q alone: its L is the ledger's, its log p(v) that of step 2.
    assert gap.entries[3].bound == history.ledger[4].bound_per_row
    assert gap.entries[3].log_evidence == after_m[1].log_evidence
    assert len({e.log_evidence for e in gap.entries}) == 3


def test_every_second_step() -> None:
    em, v = asleep_and_awake()
    gap = Gap(v, every=2)
    em.run(v, max_steps=5, tolerance=0, callbacks=[gap], progress=False)
    assert [(e.step, e.half) for e in gap.entries] == [(2, "M"), (3, "E"), (4, "M"), (5, "E")]


def test_the_run_is_the_one_without() -> None:
    numbers = []
    for callbacks in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model, v = HelmholtzMachine(4, 2), binary()
        em = EM(model, Amortized(model), e_step=Dream(Adam({"lr": 0.1})), m_step=Gradient(Adam({"lr": 0.1})))
        gap = Gap(v, num_samples=7)
        history = em.run(v, max_steps=3, callbacks=[gap] if callbacks else [], progress=False)
        numbers.append((history.loss, [p.detach().clone() for p in model.parameters()]))
    assert numbers[0][0] == numbers[1][0]
    assert all(map(torch.equal, numbers[0][1], numbers[1][1]))
    assert len(gap.entries) == 5
    assert not any(e.exact for e in gap.entries)


def test_an_estimate_lies_near_what_it_estimates() -> None:
    """A user's guide is sampled; the entry says so."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))

    v = torch.tensor([0.3, -0.2])
    entry = Gap(v, num_samples=40_000).measure(SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()), step=1, half="M")
    log_p = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(v).mean())
    # KL from N(0, 1) to N(v / 2, 1 / 2) a row.
    kl = float((0.5 * (2 + 2 * (v / 2).square() - 1 - math.log(2))).mean())
    assert entry.log_evidence == pytest.approx(log_p, abs=1e-12)
    assert entry.gap == pytest.approx(kl, abs=0.03)
    assert not entry.exact


@pytest.mark.parametrize("build", [MeanField, Structured])
def test_tables_are_evaluated_where_they_are(build: Callable[[Any], Any]) -> None:
    model, v = BinarySparseCoding(4, 3), torch.randn(8, 4)
    em = EM(model, build(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.1})))
    gap = Gap(v)
    em.run(v, max_steps=3, tolerance=0, callbacks=[gap], progress=False)
    assert all(e.exact for e in gap.entries)
    after_e = [e.gap for e in gap.entries if e.half == "E"]
    if build is Structured:
        assert max(map(abs, after_e)) < 1e-9
        assert min(e.gap for e in gap.entries if e.half == "M") > 1e-9
    else:
        assert min(after_e) > 1e-9


def test_another_run_begins_anew_and_fit_has_one_entry_an_epoch() -> None:
    em, v = asleep_and_awake()
    gap = Gap(v)
    for _ in range(2):
        em.run(v, max_steps=2, tolerance=0, callbacks=[gap], progress=False)
        assert [(e.step, e.half) for e in gap.entries] == [(1, "M"), (2, "E"), (2, "M")]
    fit(em, list(v.split(4)), num_epochs=2, callbacks=[gap], progress=False)
    assert [(e.step, e.half) for e in gap.entries] == [(2, "M"), (4, "M")]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Expected every >= 1, but got 0"):
        Gap(binary(), every=0)
    with pytest.raises(TypeError, match="Expected num_samples to be an int"):
        Gap(binary(), num_samples=2.5)  # type: ignore[arg-type]
    em, v = asleep_and_awake()
    before = [p.detach().clone() for p in em.model.parameters()]
    with pytest.raises(ValueError, match="Expected the data of the run, which has 6 rows, but got 5 rows. Write"):
        em.run(v, max_steps=2, callbacks=[Gap(v[:5])], progress=False)
    assert len(before) == len(list(em.model.parameters()))
    model = SparseCoding(4, 3)
    points = EM(model, Dirac(model), e_step=Maximize(), m_step=None)
    with pytest.raises(ValueError, match="point"):
        points.run(torch.randn(5, 4), max_steps=2, callbacks=[Gap(torch.randn(5, 4))], progress=False)


ENTRIES = [
    GapEntry(0, "M", -3.0, -2.5, True),
    GapEntry(1, "E", -2.7, -2.5, True),
    GapEntry(1, "E", -2.6, -2.5, True),
    GapEntry(1, "M", -2.4, -2.0, False),
]


def test_the_plot() -> None:
    ax = plot_gap(ENTRIES, x=[0, 5, 10, 20], halves=("asleep", "awake"), xlabel="steps")
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["L, estimate"].get_ydata().tolist() == [-3.0, -2.7, -2.6, -2.4]
    assert lines["log p(v), estimate"].get_ydata().tolist() == [-2.5, -2.5, -2.5, -2.0]
    assert lines["L, estimate"].get_xdata().tolist() == [0, 5, 10, 20]
    assert lines["L, estimate"].get_linestyle() != lines["log p(v), estimate"].get_linestyle()
    bands = sorted((p.get_x(), p.get_x() + p.get_width()) for p in ax.patches)
    assert bands == [(0, 5), (5, 10)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("steps", "nats per row")
    assert plot_gap(ENTRIES, ax) is ax
    plt.close(ax.figure)
    gap = Gap()
    gap.entries = ENTRIES[:3]
    ax = gap.plot()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["E-step", "gap", "log p(v)", "L"]
    plt.close(ax.figure)


def test_refusals_of_the_plot() -> None:
    with pytest.raises(ValueError, match="Expected at least one entry, but got none"):
        Gap(binary()).plot()
    with pytest.raises(ValueError, match="Expected 4 positions, one an entry, but got 1"):
        plot_gap(ENTRIES, x=[1])
