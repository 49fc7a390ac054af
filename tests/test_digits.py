"""Must-show: reweighted wake-sleep with weights per row on binarised digits, by `pyro.infer.SVI` unchanged."""

from __future__ import annotations

import pytest
import torch

from benchmarks.wake_sleep_digits import AIMS, NUM_TRAIN, split, train


def test_split() -> None:
    train_rows, test_rows = split()
    assert train_rows.shape == (NUM_TRAIN, 64)
    assert test_rows.shape == (397, 64)
    assert set(train_rows.unique().tolist()) == {0.0, 1.0}
    torch.randn(3)
    assert torch.equal(split()[1], test_rows), "whatever the state of the generator"


def test_short_training_beats_independent_pixels() -> None:
    train_rows, test_rows = split()
    rate = (train_rows.sum(0) + 0.5) / (len(train_rows) + 1)
    independent = -(test_rows * rate.log() + (1 - test_rows) * (1 - rate).log()).sum(-1).mean()
    result = train(0, insomnia=0.5, num_steps=150, num_samples=50)
    # Fewer samples overstate the NLL: what holds for 50 holds for its limit.
    assert result.nll < float(independent) - 1


@pytest.mark.slow
@pytest.mark.parametrize("setting", AIMS)
def test_nll_after_2000_steps(setting: str) -> None:
    """The aim, which is one for the mean of five seeds, asked of one.

    Five seeds gave 18.680 with standard deviation 0.033 (wake-phi) and 18.736 with 0.045 (half-half), so that another
    seed misses its aim with probability 0.001 and 0.003 (Student's t, 4 degrees of freedom). The seed here is fixed:
    the rate applies where rounding changes the path.
    """
    insomnia, aim = AIMS[setting]
    result = train(0, insomnia)
    assert result.error < 0.02
    assert result.nll <= aim
