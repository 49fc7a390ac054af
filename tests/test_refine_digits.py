"""Must-show: after training with `Refine` one pass and one sweep are worth several sweeps from the default start."""

from __future__ import annotations

import pytest
import torch

from benchmarks import refine_digits
from benchmarks.refine_digits import Row, compare, digits, learn_apart, learn_together, worth
from pyro_ext import EM, FixedPoint
from pyro_ext.guides import Amortized, MeanField


def test_digits() -> None:
    train, held_out = digits()
    assert (train.shape, held_out.shape) == ((1400, 64), (397, 64))
    assert (float(train.min()), float(train.max())) == (0, 1)


def test_worth_counts_the_sweeps_that_are_reached() -> None:
    rows = {f"{n} sweeps": Row("", float(n), 10.0 * n, 0.0) for n in refine_digits.SWEEPS}
    rows["network + 1 sweep"] = Row("", 4.0, 9.9, 0.0)
    assert worth(rows, "train") == 4
    assert worth(rows, "held_out") == 0


@pytest.mark.parametrize("together", [False, True])
def test_a_small_network_learns_to_save_sweeps(together: bool) -> None:
    """100 rows and 8 latents: one pass and one sweep beat two sweeps from the prior on the training rows."""
    train, held_out = digits()
    train, held_out = train[:100], held_out[:30]
    guide = learn_together(train, 8, 25, 1e-2) if together else learn_apart(train, 8, 25, 1e-2, em_steps=4)
    rows = compare(guide, train, held_out, repeats=1)
    assert worth(rows, "train") >= 2
    assert rows["network"].train < rows["network + 1 sweep"].train
    # L of the table is that of the posterior inferred.
    em = EM(guide.model, MeanField(guide.model), e_step=FixedPoint(max_sweeps=25), m_step=None)
    assert rows["25 sweeps"].train == pytest.approx(-em.evaluate_loss(train) / 100, abs=0.05)
    assert all(row.seconds > 0 for name, row in rows.items() if name not in ("2 sweeps", "3 sweeps", "6 sweeps"))


def test_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = digits()
    monkeypatch.setattr(refine_digits, "digits", lambda: (train[:50], held_out[:20]))
    threads = torch.get_num_threads()
    try:
        refine_digits.main(["--latents", "4", "--epochs", "1", "--em-steps", "1"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("refine_digits one pass and one sweep reach")
    assert sum("network + 1 sweep" in line for line in lines) == 2


def test_the_guide_is_a_network() -> None:
    train, _ = digits()
    assert isinstance(learn_together(train[:20], 3, 1, 1e-3), Amortized)
