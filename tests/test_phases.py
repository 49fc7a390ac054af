"""Must-show: while awake the gap between L and log p(v) grows, while asleep it closes, and theta sleeps (19.5.1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import phases
from pyro_ext import EM, Gradient
from pyro_ext.dream import Dream
from pyro_ext.gap import GapEntry
from pyro_ext.guides import Amortized
from pyro_ext.models import SigmoidBeliefNetwork


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "SIZES", [2, 4, 9])


def test_bars_are_of_one_direction() -> None:
    v = phases.bars(500).reshape(-1, 3, 3)
    across, down = (v == v[:, :, :1]).all(-1).all(-1), (v == v[:, :1, :]).all(-1).all(-1)
    assert (across | down).all()
    assert 0.25 < float(v.mean()) < 0.35
    assert 0.3 < float((across & ~down).double().mean()) < 0.5
    assert torch.equal(v, phases.bars(500).reshape(-1, 3, 3))


def test_the_gap_grows_awake_and_closes_asleep() -> None:
    found = phases.alternate(phases.bars(60), num_phases=2, num_steps=40, num_looks=2)
    assert found.theta_kept
    assert all(entry.exact for entry in found.entries)
    assert all(entry.gap >= 0 for entry in found.entries)
    assert found.steps == list(range(0, 161, 20))
    assert len(found.grew) == len(found.closed) == 2
    assert all(change > 0 for change in found.grew)
    assert all(change > 0 for change in found.closed)
    # Asleep log p(v) stands still, awake it rises.
    for before, after in zip(found.entries, found.entries[1:], strict=False):
        if after.half == "E":
            assert after.log_evidence == before.log_evidence
    assert found.entries[-1].log_evidence > found.entries[0].log_evidence + 0.02


def test_the_ends_are_those_of_a_run() -> None:
    """Looking into a phase changes nothing: `EM.run` with whole phases comes to the same ledger."""
    v = phases.bars(40)
    found = phases.alternate(v, num_phases=2, num_steps=6, num_looks=1)
    torch.manual_seed(0)
    model = SigmoidBeliefNetwork(phases.SIZES).double()
    model.initialize(v)
    asleep = Dream(phases.Adam({"lr": phases.RATE_ASLEEP}), 6, phases.NUM_DREAMS)
    em = EM(model, Amortized(model), e_step=asleep, m_step=Gradient(phases.Adam({"lr": phases.RATE_AWAKE}), 6))
    history = em.run(v, max_steps=1, progress=False)
    sleep = next(e for e in found.ends if e.half == "E")
    assert history.ledger[0].bound_per_row == pytest.approx(sleep.bound, abs=1e-12)


def test_theta_that_moves_asleep_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        phases, "Dream", lambda optim, num_steps, num_dreams: _Sleepwalker(optim, num_steps, num_dreams)
    )
    found = phases.alternate(phases.bars(10), num_phases=1, num_steps=1, num_looks=1)
    assert not found.theta_kept


class _Sleepwalker(Dream):
    def improve(self, call, *, keep):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            next(call.model.parameters()).add_(0.1)
        call.theta_changed()
        return super().improve(call, keep=keep)


def test_changes_of_the_gap() -> None:
    def at(step: int, half: str, gap: float) -> GapEntry:
        return GapEntry(step, half, -gap, 0.0, True)  # type: ignore[arg-type]

    entries = [
        at(0, "M", 5),
        at(1, "E", 4.5),
        at(1, "E", 4),
        at(1, "M", 4.2),
        at(1, "M", 6),
        at(2, "E", 7),
        at(2, "M", 1),
    ]
    found = phases.Phases(entries, list(range(7)), True)
    assert [(e.step, e.half, e.gap) for e in found.ends] == [(1, "E", 4), (1, "M", 6), (2, "E", 7), (2, "M", 1)]
    assert found.closed == [1, -1]
    assert found.grew == [2, -6]


def test_it_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "SHORT", 4)
    threads = torch.get_num_threads()
    try:
        phases.main(["--phases", "2", "--steps", "4", "--looks", "2", "--figure-folder", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("phases grew=")
    assert "theta_kept=True" in lines[-1]
    assert sum(line.strip().startswith(("sleep", "wake")) for line in lines) == 4
    assert (tmp_path / "phases.png").stat().st_size > 10_000
