"""Must-show: dreams of a Helmholtz machine, drawn beside the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import dreams
from benchmarks.wake_sleep_digits import split


def test_a_short_training_comes_nearer_to_the_data() -> None:
    found = dreams.train(6, num_samples=50)
    assert found.nll[1] < min(found.nll[0], dreams.independent_nll()) - 0.5
    assert found.before.shape == found.after.shape == (100, 64)
    assert set(found.after.unique().tolist()) == {0.0, 1.0}
    assert found.sleep_loss[1] < found.sleep_loss[0]
    figure = dreams.draw(found, split()[0])
    data, before, after = (ax.get_images()[0].get_array() for ax in figure.axes)
    # The first image of each panel, inked; panels differ.
    assert torch.equal(torch.tensor(data[1:9, 1:9].tolist()), 1 - split()[0][0].reshape(8, 8))
    assert data.tolist() != after.tolist() != before.tolist()
    assert [ax.get_title() for ax in figure.axes] == ["data", "dreams before training", "dreams after wake-sleep"]


def test_it_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, held_out = split()
    monkeypatch.setattr(dreams, "split", lambda: (rows[:100], held_out[:20]))
    threads = torch.get_num_threads()
    try:
        dreams.main(["--epochs", "2", "--figure-folder", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("dreams test_nll=")
    assert (tmp_path / "dreams.png").stat().st_size > 10_000
