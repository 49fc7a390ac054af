"""The rule of early stopping, fed with held-out losses."""

from __future__ import annotations

import math

import pytest

from pyro_ext.early_stopping import EarlyStopping


def stops_after(rule: EarlyStopping, losses: list[float]) -> int | None:
    watch = rule.start()
    for epoch, loss in enumerate(losses, 1):
        watch.update(loss)
        if watch.exhausted:
            return epoch
    return None


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "epoch"),
    [
        (1, 0.0, [3.0, 2.0, 2.0], 3),
        (2, 0.0, [3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 6),
        (2, 0.0, [3.0, 2.0, 1.0, 0.0], None),
        (2, 0.5, [3.0, 2.8, 2.6, 2.4], 3),
        (2, 0.5, [3.0, 2.8, 2.4, 2.0, 1.8], None),
        (2, 0.0, [math.nan, math.nan], 2),
        (2, 0.0, [math.inf, 1.0, math.nan, 2.0], 4),
    ],
)
def test_stops_after_patience_epochs_without_progress(patience, min_delta, losses, epoch):
    assert stops_after(EarlyStopping(patience, min_delta), losses) == epoch


def test_the_lowest_is_tracked_below_min_delta_too():
    watch = EarlyStopping(patience=5, min_delta=1.0).start()
    assert [watch.update(loss) for loss in (3.0, 2.9, 2.95, 2.8)] == [True, True, False, True]
    assert watch.epochs_without_progress == 3


def test_one_rule_serves_several_fits():
    rule = EarlyStopping(patience=1)
    assert stops_after(rule, [1.0, 1.0]) == stops_after(rule, [1.0, 1.0]) == 2


@pytest.mark.parametrize("patience", [0, -1, 1.5, True])
def test_refuses_a_wrong_patience(patience):
    with pytest.raises(
        ValueError, match=r"Expected patience to be a whole number .* at least 1, but got .*Pass patience=1"
    ):
        EarlyStopping(patience=patience)


@pytest.mark.parametrize("min_delta", [-0.1, math.nan, math.inf])
def test_refuses_a_wrong_min_delta(min_delta):
    with pytest.raises(ValueError, match=r"Expected min_delta >= 0, in nats per row, but got .*Pass min_delta=0"):
        EarlyStopping(min_delta=min_delta)


def test_a_watch_goes_on_from_its_state():
    losses = [3.0, 2.0, 2.5, math.nan, 1.9, 1.95, 1.85, 1.84, 1.83]
    for split in range(len(losses)):
        whole, first, second = (EarlyStopping(patience=2, min_delta=0.1).start() for _ in range(3))
        expected = [(whole.update(loss), whole.exhausted) for loss in losses]
        seen = [(first.update(loss), first.exhausted) for loss in losses[:split]]
        second.resume(first.state)
        assert seen + [(second.update(loss), second.exhausted) for loss in losses[split:]] == expected
