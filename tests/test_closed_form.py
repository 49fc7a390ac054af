"""Closed-form M-steps: full data, and stepwise EM on batches (epochs: test_streaming.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_ext import EM, ClosedForm, FixedPoint, fit
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding, GaussianMixture


def clusters(num_rows: int) -> torch.Tensor:
    centers = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, 4.0]])
    return centers[torch.arange(num_rows) % 3] + torch.randn(num_rows, 2)


def test_averaging_with_step_size_one_is_no_averaging(float64: None) -> None:
    v = clusters(60)
    models = [GaussianMixture(3, 2), GaussianMixture(3, 2)]
    for model, m_step in zip(models, (ClosedForm(), ClosedForm(step_size=lambda t: 1.0)), strict=True):
        torch.manual_seed(1)
        model.initialize(v)
        em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=m_step)
        for _ in range(3):
            em.step(v)
    torch.testing.assert_close(models[0].locs, models[1].locs, rtol=1e-12, atol=1e-12)


def test_two_halves_average_to_the_whole(float64: None) -> None:
    # With q held by equal theta, rho = 1/2 at the second call gives the statistics of the whole.
    v = clusters(60)
    model, whole = BinarySparseCoding(2, 3), BinarySparseCoding(2, 3)
    whole.load_state_dict(model.state_dict())
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(step_size=lambda t: 0.5))
    first, second = em.call(v[:30]), em.call(v[30:])
    results = [em.e_half(first), em.e_half(second)]
    em.m_half(first, results[0])
    em.m_half(second, results[1])
    reference = EM(whole, MeanField(whole), e_step=FixedPoint(), m_step=ClosedForm())
    reference.step(v)
    torch.testing.assert_close(model.W, whole.W, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.beta, whole.beta, rtol=1e-6, atol=1e-6)


def test_stepwise_em_on_a_loader_reaches_the_full_data_optimum() -> None:
    v = clusters(3000)
    model = GaussianMixture(3, 2)
    model.initialize(v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(step_size=lambda t: (t + 2) ** -0.7))
    fit(em, DataLoader(v, batch_size=100, shuffle=True), num_epochs=6, progress=False)
    stepwise = em.evaluate_loss(v) / 3000
    full = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    best = full.run(v, tolerance=1e-8, progress=False).loss[-1]
    assert best <= stepwise <= best + 0.01


def test_the_average_is_forgotten_by_a_run_and_kept_after_a_refusal() -> None:
    v = clusters(60)
    model = GaussianMixture(3, 2)
    model.initialize(v)
    m_step = ClosedForm(step_size=lambda t: 0.5 if t < 3 else 2.0)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=m_step)
    em.step(v)
    em.step(v)
    assert m_step.num_calls == 2
    with pytest.raises(ValueError, match=r"step sizes in \(0, 1\], but got 2.0 at step 3"):
        em.step(v)
    assert m_step.num_calls == 2
    em.run(v, max_steps=1, progress=False)
    assert m_step.num_calls == 1


class Recording(GaussianMixture):
    """Theta is held; what it would be maximised at is kept."""

    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        self.recorded = dict(statistics)


def recorded(sizes: list[int], rho: float = 0.3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The average after batches of these sizes, and each batch's statistics per row."""
    torch.manual_seed(2)
    model = Recording(3, 2)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(lambda t: rho))
    plain = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    per_row = []
    parts = clusters(sum(sizes)).split(sizes)
    for part in parts:
        plain.step(part)
        per_row.append({name: value / len(part) for name, value in model.recorded.items()})
    for part in parts:
        em.step(part)
    return model.recorded, per_row


def assert_average(found: Mapping[str, Tensor], per_row: list[dict[str, Tensor]], weights: list[float]) -> None:
    for name, value in found.items():
        expected = sum(w * rows[name] for w, rows in zip(weights, per_row, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_batches_of_one_size_are_averaged_per_row(float64: None) -> None:
    found, per_row = recorded([10, 10, 10])
    assert found["count"].item() == pytest.approx(1)
    assert_average(found, per_row, [0.7 * 0.7, 0.7 * 0.3, 0.3])


def test_a_smaller_batch_weighs_its_share(float64: None) -> None:
    """Two halves push the past away as far as the whole does; per row they weigh as much."""
    half = 0.7**0.5
    found, per_row = recorded([10, 5, 5])
    assert_average(found, per_row, [0.7, half * (1 - half), 1 - half])
    # A larger batch than all before is the new measure.
    found, per_row = recorded([5, 10, 5])
    assert_average(found, per_row, [0.7 * half, 0.3 * half, 1 - half])


def test_a_last_small_batch_does_not_bend_theta(float64: None) -> None:
    """Rows that come last in every epoch, alone: averaged by batch they would weigh as 40 rows do."""
    v = torch.cat([clusters(200), torch.tensor([[9.0, 9.0]])])
    model = Recording(3, 2)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(lambda t: 1 / 16))
    fit(em, DataLoader(v, batch_size=40), num_epochs=60, progress=False)
    average = model.recorded
    plain = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    plain.step(v)
    exact = {name: value / 201 for name, value in model.recorded.items()}
    # By batch the mean would be off by (9 - 1) / 6; the rest is that of the last rows' recency.
    assert (average["sum"].sum(0) - exact["sum"].sum(0)).abs().max() < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_stepwise_em_converges_to_the_optimum_of_em(float64: None, seed: int) -> None:
    """Batches of 100, the last of 50: after 25 epochs within 1e-3 nats a row of the optimum, means within 0.05."""
    torch.manual_seed(seed)
    v = clusters(1550)
    model = GaussianMixture(3, 2)
    model.initialize(v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(step_size=lambda t: (t + 2) ** -0.7))
    fit(em, DataLoader(v, batch_size=100, shuffle=True), num_epochs=25, progress=False)
    stepwise, locs, weights = em.evaluate_loss(v) / 1550, model.locs.detach().clone(), model.weights.detach().clone()
    full = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    best = full.run(v, max_steps=300, tolerance=1e-10, progress=False).loss[-1]
    assert best <= stepwise <= best + 1e-3
    assert (model.locs - locs).abs().max() < 0.05
    assert (model.weights - weights).abs().max() < 0.01


def test_statistics_without_a_count_are_refused() -> None:
    class Uncounted(GaussianMixture):
        def statistics(self, data: Any, posterior: Any) -> dict[str, Tensor]:
            return {name: value for name, value in super().statistics(data, posterior).items() if name != "count"}

    model = Uncounted(2, 2)
    v = clusters(12)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(step_size=lambda t: 0.5))
    with pytest.raises(ValueError, match="Expected statistics with count"):
        em.step(v)
    gathering = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    with pytest.raises(ValueError, match="Expected statistics with count"), gathering.epoch():
        gathering.step(v)


def test_a_number_is_no_step_size() -> None:
    with pytest.raises(TypeError, match="function of the step, but got 0.5. Write `lambda t: 0.5`"):
        ClosedForm(step_size=0.5)
