"""The record of a run and what is read off it."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

from pyro_ext.history import History, LedgerEntry, Status


def entry(step: int, half: str, bound: float, **changes: object) -> LedgerEntry:
    first = LedgerEntry(step, half, bound, f"theta {step}, q {step}", "better", "full", exact=True, rows=4)
    return dataclasses.replace(first, **changes)


def two_epochs() -> History:
    return History(
        loss=[4.0, 3.0, 2.0],
        held_out=[3.5, 3.6],
        seconds=[0.1, 0.2, 0.3],
        epoch_ends=[2, 3],
        status=Status.MAX_STEPS,
        message="All 2 epochs (3 steps) were run.",
    )


def test_statuses_are_their_values():
    assert {str(status) for status in Status} == {
        "running",
        "converged",
        "max_steps",
        "non_finite",
        "decreased",
        "stopped_early",
        "stopped",
        "interrupted",
    }
    assert Status.CONVERGED == "converged"


def test_a_new_history_is_empty_and_shares_nothing():
    one, other = History(), History()
    one.loss.append(1.0)
    assert other.loss == []
    assert other.status == "running"
    assert (other.steps, other.epochs, other.best_epoch, other.best_held_out, other.records) == (0, 0, None, None, [])


@pytest.mark.parametrize(
    ("held_out", "epoch", "value"),
    [
        ([2.0, 1.0, 3.0], 2, 1.0),
        ([1.0, 1.0], 1, 1.0),
        ([math.nan, 5.0, -math.inf], 2, 5.0),
        ([math.nan, math.inf], None, None),
    ],
)
def test_best_epoch(held_out, epoch, value):
    history = History(held_out=held_out)
    assert (history.best_epoch, history.best_held_out) == (epoch, value)


def test_records():
    history = two_epochs()
    assert history.records == [
        {"step": 1, "epoch": 1, "seconds": 0.1, "loss": 4.0, "sleep_loss": None, "held_out": None},
        {"step": 2, "epoch": 1, "seconds": 0.2, "loss": 3.0, "sleep_loss": None, "held_out": 3.5},
        {"step": 3, "epoch": 2, "seconds": 0.3, "loss": 2.0, "sleep_loss": None, "held_out": 3.6},
    ]
    history.sleep_loss = [1.0, 2.0, 3.0]
    assert [record["sleep_loss"] for record in history.records] == [1.0, 2.0, 3.0]


def test_records_of_an_unfinished_run():
    records = History(loss=[1.0, 2.0], seconds=[0.1]).records
    assert [record["epoch"] for record in records] == [1, 1]
    assert [record["seconds"] for record in records] == [0.1, None]


def test_ledger():
    ledger = [entry(1, "E", -8.0), entry(1, "M", -6.0, exact=False)]
    history = History(ledger=ledger, loss_label="-log p(h, v), nats per row")
    assert ledger[0].bound_per_row == -2.0
    assert history.bound_label == "log p(h, v), nats per row"
    assert history.ledger_records[1] == dataclasses.asdict(ledger[1]) | {"bound_per_row": -1.5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        ledger[0].bound = 0.0


def test_summary_says_what_happened():
    history = two_epochs()
    assert history.summary() == (
        "max_steps: 3 steps, 2 epochs, 0.3 s; -L, nats per row: 4 -> 2; held-out: best 3.5 after epoch 1\n"
        "All 2 epochs (3 steps) were run."
    )
    assert repr(history) == f"History({history.summary().splitlines()[0]})"
    with_ledger = History(loss=[2.0], ledger=[entry(1, "E", -8.0), entry(1, "M", -6.0)])
    assert "ledger of 2 half-steps: -2 -> -1.5" in repr(with_ledger)
    assert repr(History()) == "History(running: 0 steps)"


def test_survives_pickling():
    history = two_epochs()
    history.ledger.append(entry(1, "E", -8.0))
    assert pickle.loads(pickle.dumps(history)) == history


def test_plot_draws_the_ledger_when_there_is_one():
    history = two_epochs()
    ax = history.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "-L, nats per row")
    plt.close(ax.figure)
    history.ledger = [entry(1, "E", -8.0), entry(1, "M", -6.0)]
    figure, ax = plt.subplots()
    assert history.plot(ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("half-step", "L, nats per row")
    plt.close(figure)


def test_importing_it_does_not_import_matplotlib():
    code = "import sys, pyro_ext.history; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
