"""Plots: what is drawn, where, and in which style; the pictures' own numbers are read back."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_ext.history import History, LedgerEntry
from pyro_ext.plots import image_grid, plot_history, plot_ledger


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is shown, and no global setting changes."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plt.show was called")

    monkeypatch.setattr(plt, "show", refuse)
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def entry(half: str, bound: float, exact: bool = True) -> LedgerEntry:
    return LedgerEntry(1, half, bound, "theta 1, q 1", "better", "full", exact, rows=2)


def style(line: object) -> tuple[str, str]:
    return line.get_linestyle(), line.get_marker()


def test_history_draws_losses_held_out_losses_and_the_best_epoch():
    history = History(loss=[4.0, 3.0, 2.0, 1.0], held_out=[3.0, 3.5], epoch_ends=[2, 4])
    figure, given = plt.subplots()
    ax = plot_history(history, given)
    assert ax is given
    assert plt.get_fignums() == [figure.number]
    training, held_out, best = ax.get_lines()
    assert training.get_xdata().tolist() == [1, 2, 3, 4]
    assert training.get_ydata().tolist() == history.loss
    assert held_out.get_xdata().tolist() == [2, 4]
    assert held_out.get_ydata().tolist() == history.held_out
    assert set(best.get_xdata()) == {2}
    assert len({style(line) for line in ax.get_lines()}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "training, each step",
        "held out",
        "best epoch (1)",
    ]


def test_history_of_training_alone_needs_no_legend():
    ax = plot_history(History(loss=[2.0, float("nan"), 1.0]))
    assert len(ax.get_lines()) == 1
    assert ax.get_legend() is None
    assert len(plt.get_fignums()) == 1


def test_history_without_a_finite_held_out_loss():
    ax = plot_history(History(loss=[2.0], held_out=[float("nan")], epoch_ends=[1]))
    assert len(ax.get_lines()) == 2


def test_refuses_an_empty_history():
    with pytest.raises(ValueError, match=r"Expected a history with at least one step, but got an empty one\."):
        plot_history(History())


def test_ledger_tells_halves_and_estimates_apart_without_colour():
    ax = plot_ledger([entry("E", -8.0), entry("M", -6.0), entry("E", -5.0, exact=False), entry("M", -4.0)], label="L!")
    assert ax.get_ylabel() == "L!"
    path, e_exact, e_estimate, m_exact = ax.get_lines()
    assert path.get_ydata().tolist() == [-4.0, -3.0, -2.5, -2.0]
    assert (e_exact.get_xdata().tolist(), e_exact.get_marker()) == ([1], "o")
    assert (e_estimate.get_xdata().tolist(), e_estimate.get_markerfacecolor()) == ([3], "none")
    assert (m_exact.get_xdata().tolist(), m_exact.get_marker()) == ([2, 4], "s")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["after E-step", "after E-step, estimate", "after M-step"]


def test_refuses_an_empty_ledger():
    with pytest.raises(ValueError, match=r"Expected a ledger with at least one half-step, but got an empty one\."):
        plot_ledger([])


def test_grid_lays_images_out_row_by_row_with_separators():
    images = torch.arange(1.0, 31.0).reshape(5, 6).requires_grad_()
    ax = image_grid(images, (2, 3), ncols=3)
    (picture,) = ax.get_images()
    mosaic = picture.get_array()
    assert mosaic.shape == (2 * 3 + 1, 3 * 4 + 1)
    for i in range(5):
        top, left = (i // 3) * 3 + 1, (i % 3) * 4 + 1
        assert np.array_equal(mosaic[top : top + 2, left : left + 3], images[i].detach().reshape(2, 3).numpy())
    # All else is separator or empty cell.
    assert mosaic.count() == 30
    assert picture.get_clim() == (1.0, 30.0)
    assert picture.get_cmap().name == "gray"
    assert picture.get_interpolation() == "nearest"


@pytest.mark.parametrize(("number", "width"), [(1, 1), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_grid_is_about_square(number, width):
    ax = image_grid(torch.rand(number, 4), (2, 2))
    assert ax.get_images()[0].get_array().shape[1] == width * 3 + 1


def test_symmetric_scale_puts_zero_in_the_middle():
    ax = image_grid(torch.tensor([[-3.0, 1.0]]), (1, 2), symmetric=True)
    assert ax.get_images()[0].get_clim() == (-3.0, 3.0)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (0, 4), (1, 2, 4)], ids=str)
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(
        ValueError, match=r"Expected images of shape \(N, 4\), N >= 1, for shape 2 x 2, but got .*Reshape"
    ):
        image_grid(torch.zeros(shape), (2, 2))
    assert not plt.get_fignums()


def test_grid_refuses_other_values():
    with pytest.raises(TypeError, match=r"Expected images as a tensor of shape \(N, D\), but got list\. Use torch"):
        image_grid([[0.0]], (1, 1))
    with pytest.raises(ValueError, match=r"Expected real and finite images, but got torch.float32 with 1 values"):
        image_grid(torch.tensor([[0.0, torch.nan]]), (1, 2))
    with pytest.raises(ValueError, match=r"Expected ncols >= 1, but got 0\. Pass None"):
        image_grid(torch.zeros(1, 1), (1, 1), ncols=0)
