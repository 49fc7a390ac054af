"""The page that prints the hand-written updates shows what the benchmarks run."""

import inspect
from pathlib import Path

import pytest
import torch

from benchmarks import bsc_joint, bsc_mean_field

PAGE = Path(__file__).parents[1] / "docs" / "hand_written_updates.md"


@pytest.mark.parametrize("module", [bsc_joint, bsc_mean_field], ids=["joint", "mean field"])
def test_the_page_prints_the_code_that_is_timed(module):
    assert inspect.getsource(module.by_hand).strip() in PAGE.read_text()


def test_the_joint_update_is_the_librarys():
    v = bsc_joint.draw_data(60)
    start = bsc_joint.start_of(v, 4)
    _, by_hand = bsc_joint.hand_written(v, start)()
    _, ours = bsc_joint.ours(v, start, compiled=False)()
    assert by_hand == pytest.approx(ours, rel=1e-10)


def test_the_mean_field_update_is_the_librarys():
    v, start = bsc_mean_field.draw_data(60, 8, 4)
    v, start = v.double(), {name: value.double() for name, value in start.items()}
    _, by_hand = bsc_mean_field.hand_written(v, start)()
    _, ours = bsc_mean_field.ours(v, start, compiled=False)()
    # By hand ten sweeps, ours until nothing moves any more.
    assert by_hand == pytest.approx(ours, rel=1e-6)
    assert torch.isfinite(torch.tensor(by_hand))
