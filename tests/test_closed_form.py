"""Closed-form M-steps: full data, and stepwise EM on batches."""

from __future__ import annotations

import pytest
import torch
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


def test_a_number_is_no_step_size() -> None:
    with pytest.raises(TypeError, match="function of the step, but got 0.5. Write `lambda t: 0.5`"):
        ClosedForm(step_size=0.5)
