"""Health: numbers that closed forms give, hints, and that looking changes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient, Health, HealthEntry, History, WakeSleep, fit
from pyro_ext.guides import Amortized, Dirac, MeanField
from pyro_ext.health_plot import plot_health
from pyro_ext.models import BinarySparseCoding, FactorAnalysis, SigmoidBeliefNetwork

pytestmark = pytest.mark.usefixtures("float64")

PRIOR = 0.3
LIKELIHOOD = torch.tensor([0.1, 0.8])
"""p(v = 1 | h)."""


def model(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(v.new_tensor(PRIOR)))
        pyro.sample("v", dist.Bernoulli(LIKELIHOOD.to(v)[h.long()]), obs=v)


def posterior(v: Tensor) -> Tensor:
    """p(h = 1 | v)."""
    p = LIKELIHOOD.to(v)
    on = PRIOR * torch.where(v > 0, p[1], 1 - p[1])
    return on / (on + (1 - PRIOR) * torch.where(v > 0, p[0], 1 - p[0]))


def guide(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Bernoulli(posterior(v)))


def of(probs: Any) -> Any:
    """A guide of given probabilities, whatever v is."""

    def guide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(torch.as_tensor(probs).to(v).expand(len(v))))

    return guide


V = torch.tensor([0.0, 1.0]).repeat(2000)


def negative_entropy(p: Tensor) -> Tensor:
    return p * p.log() + (1 - p) * (-p).log1p()


def test_the_exact_posterior_is_in_good_health() -> None:
    """Weights are equal; log q on data and on dreams are means of -H, within 5 standard errors."""
    look = Health(V.double(), num_samples=50, num_dreams=20_000)
    entry = look.measure(model, guide)
    assert look.effective_sample_size is not None
    torch.testing.assert_close(look.effective_sample_size, torch.full((4000,), 50.0), rtol=1e-10, atol=0)
    each = negative_entropy(posterior(torch.tensor([0.0, 1.0])))
    spread = (torch.tensor([0.0, 1.0]) - 0.5).abs().mean() * 2  # log q lies within a few nats of its mean
    assert entry.log_q_on_data == pytest.approx(float(each.mean()), abs=5 * float(spread) / math.sqrt(200_000))
    assert entry.entropy == pytest.approx(-entry.log_q_on_data, abs=1e-10)
    on = PRIOR * 0.8 + (1 - PRIOR) * 0.1
    expected = float((1 - on) * each[0] + on * each[1])
    assert entry.log_q_on_dreams == pytest.approx(expected, abs=5 * 1.0 / math.sqrt(20_000))
    assert entry.units == {"h": 1}
    assert entry.dead_units == {"h": 0}
    assert entry.hints == []


def test_weights_by_enumeration() -> None:
    """One row, q = 1/2 for both states: sizes and log q from the two weights, within 5 standard errors."""
    v = torch.tensor([1.0]).double().repeat(5000)
    look = Health(v, num_samples=2)
    entry = look.measure(model, of(0.5))
    p = float(posterior(v[:1]))
    pairs = {0: 1 / 2, 1: 1.0}  # both particles the same, or different
    same, different = 2.0, 1 / (p**2 + (1 - p) ** 2)
    sizes = look.effective_sample_size
    assert sizes is not None
    assert set(sizes.round(decimals=6).tolist()) == {same, round(different, 6)}
    mean = pairs[0] * same + (1 - pairs[0]) * different
    assert float(sizes.mean()) == pytest.approx(mean, abs=5 * abs(same - different) / 2 / math.sqrt(5000))
    assert entry.log_q_on_data == pytest.approx(math.log(0.5), abs=1e-12)
    assert entry.share_below_two == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(5000))


def test_a_guide_that_is_good_on_dreams_only() -> None:
    """Data that the model never dreams of: the hint names the dreams."""

    def far(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(v.new_tensor(0.99)))
            pyro.sample("v", dist.Normal(8 * h, 1.0), obs=v)

    entry = Health(torch.zeros(200).double()).measure(far, of(0.99))
    assert entry.log_q_on_dreams is not None
    assert entry.log_q_on_dreams > entry.log_q_on_data + 2
    assert "the dreams do not resemble the data" in " ".join(entry.hints)


def test_dead_units_are_those_that_v_does_not_move() -> None:
    v = (torch.rand(300, 4) > 0.5).double()

    def wide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((5,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Bernoulli(0.25 + 0.5 * h[..., :4]).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            moved = torch.cat([0.25 + 0.5 * v[:, :2], torch.full((len(v), 3), 0.4)], -1)
            pyro.sample("h", dist.Bernoulli(moved).to_event(1))
            pyro.sample("x", dist.Normal(torch.stack([3 * v[:, 0], 0 * v[:, 0]], -1), 1.0).to_event(1))

    entry = Health(v, num_samples=20).measure(wide, guide)
    assert (entry.units, entry.dead_units) == ({"h": 5, "x": 2}, {"h": 3, "x": 1})
    assert "3 of the 5 units of 'h' hardly vary with v" in " ".join(entry.hints)


def test_hints_in_words() -> None:
    fine = HealthEntry(1, 100, 40.0, 0.1, -3.0, -2.9, 3.0, {"h": 10}, {"h": 1})
    assert fine.hints == []
    assert (
        "60% of the rows rest on fewer than 2 of 100 samples" in dataclasses.replace(fine, share_below_two=0.6).hints[0]
    )
    assert "log q is 2 nats higher on dreams" in dataclasses.replace(fine, log_q_on_dreams=-1.0).hints[0]
    assert dataclasses.replace(fine, log_q_on_dreams=None).hints == []
    assert "2 of the 10 units of 'h'" in dataclasses.replace(fine, dead_units={"h": 2}).hints[0]
    assert "log q is not finite" in dataclasses.replace(fine, entropy=math.inf).hints[0]


@pytest.mark.parametrize("insomnia", [0.0, 0.5])
def test_looking_changes_no_number_of_a_fit(insomnia: float) -> None:
    v = (torch.rand(30, 6) > 0.5).double()
    losses = []
    for callbacks in ([], [Health(v[:10])]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        network = SigmoidBeliefNetwork([2, 3, 6])
        svi = SVI(network, Amortized(network), Adam({"lr": 0.01}), WakeSleep(num_particles=3, insomnia=insomnia))
        history = fit(svi, [v[:15], v[15:]], 3, callbacks=callbacks, progress=False)
        losses.append(history.loss)
    assert losses[0] == losses[1]
    assert [entry.step for entry in history.health] == [2, 4, 6]
    assert history.health[-1].units == {"h1": 3, "h2": 2}
    assert history.hints == history.health[-1].hints


def test_a_table_has_no_dreams_and_em_runs_are_watched() -> None:
    v = torch.randn(20, 4)
    sparse = BinarySparseCoding(num_visible=4, num_latents=3)
    em = EM(sparse, MeanField(sparse), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.01})))
    history = em.run(v, max_steps=4, tolerance=0.0, callbacks=[Health(v, every=2)], progress=False)
    assert [entry.step for entry in history.health] == [2, 4]
    assert all(entry.log_q_on_dreams is None for entry in history.health)


def test_points_and_bad_counts_are_refused_and_nothing_changes() -> None:
    v = torch.randn(8, 4)
    factors = FactorAnalysis(4, 2)
    before, generators = list(pyro.get_param_store().keys()), torch.get_rng_state()
    with pytest.raises(ValueError, match="Expected factors with a density for Health, but got a point mass"):
        Health(v).measure(factors, Dirac(factors))
    assert list(pyro.get_param_store().keys()) == before
    assert torch.equal(torch.get_rng_state(), generators)
    with pytest.raises(ValueError, match="Expected num_samples of at least 2, but got 1"):
        Health(v, num_samples=1)
    with pytest.raises((TypeError, ValueError), match="every"):
        Health(v, every=0)
    with pytest.raises((TypeError, ValueError), match="num_dreams"):
        Health(v, num_dreams=0)
    with pytest.raises(ValueError, match="Expected finite values in v, but got 1 NaN"):
        Health(torch.full((1, 4), 1.0).index_fill(1, torch.tensor([0]), torch.nan)).measure(factors, MeanField(factors))


def test_the_plot_takes_and_returns_four_axes() -> None:
    entries = [
        HealthEntry(step, 100, 30.0 + step, 0.1, -2.0, dreams, 1.0, {"h1": 4, "h2": 2}, {"h1": 1, "h2": 2})
        for step, dreams in ((1, -1.5), (2, None), (3, -1.0))
    ]
    axes = History(health=entries).plot_health()
    size, log_q, entropy, dead = axes
    assert size.lines[0].get_ydata().tolist() == [31.0, 32.0, 33.0]
    assert [
        line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata())
        for line in log_q.lines
    ] == [
        [1, 2, 3],
        [1, 3],
    ]
    assert len(entropy.lines) == 1
    assert [line.get_ydata()[-1] for line in dead.lines] == [0.25, 1.0]
    plt.close(size.figure)
    with pytest.raises(ValueError, match="Expected at least one entry, but got none"):
        plot_health([])
    with pytest.raises(ValueError, match="Expected four axes, but got 1"):
        plot_health(entries, plt.figure().subplots(1, 1, squeeze=False)[0])
    plt.close("all")


def test_trace_elbo_fits_are_watched_too() -> None:
    v = torch.randn(20, 4)
    factors = FactorAnalysis(4, 2)
    svi = SVI(factors, Amortized(factors), Adam({"lr": 0.01}), Trace_ELBO())
    history = fit(svi, [v], 1, callbacks=[Health(v)], progress=False)
    (entry,) = history.health
    assert entry.log_q_on_dreams is not None
    assert entry.hints == history.summary().splitlines()[2:]
