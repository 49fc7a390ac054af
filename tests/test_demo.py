"""The demo: data at the door by message, what is done to them, and a quick run from end to end."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyro_ext import Evidence, StopFit
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding
from tutorials import demo
from tutorials.demo_data import load, prepare
from tutorials.demo_fits import Watch, similar_groups
from tutorials.demo_table import log_p

GOOD = np.random.default_rng(0).normal(size=(30, 5))


def broken(position: tuple[int, int], value: float) -> np.ndarray:
    array = GOOD.copy()
    array[position] = value
    return array


BAD_ARRAYS = {
    "text": (np.full((30, 2), "a"), "Expected real numbers in data.npy, but got dtype <U1. Save one numeric array"),
    "complex": (GOOD + 1j, "Expected real numbers in data.npy, but got dtype complex128. Save one numeric array"),
    "objects": (
        np.full((30, 2), None),
        "Expected an array of numbers in data.npy, but got: .* Save it with numpy.save",
    ),
    "images": (
        np.zeros((30, 8, 8)),
        r"Expected an array of shape \(N, D\), but got shape \(30, 8, 8\) .* Flatten",
    ),
    "vector": (np.zeros(30), r"Expected an array of shape \(N, D\), but got shape \(30,\)"),
    "short": (GOOD[:19], r"Expected at least 20 rows and 2 columns, but got shape \(19, 5\) .* Take more rows"),
    "narrow": (GOOD[:, :1], r"Expected at least 20 rows and 2 columns, but got shape \(30, 1\)"),
    "nan": (
        broken((3, 2), np.nan),
        "Expected finite numbers, but got 1 .* the first in row 3, column 2. Leave",
    ),
    "infinite": (broken((0, 4), np.inf), "Expected finite numbers, but got 1 .* the first in row 0, column 4"),
    "large": (broken((0, 0), 1e200), r"Expected numbers up to 1e\+100, but got larger ones in data.npy. Rescale"),
    "constant": (np.ones((30, 5)), "Expected columns that vary, but got a constant in every column of data.npy. Check"),
}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the demo says when it refuses to start; nothing else is written."""
    assert demo.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array, message = BAD_ARRAYS[name]
    np.save(tmp_path / "data.npy", array)
    assert re.match(message, refusal(capsys, "--data", tmp_path / "data.npy"))


def test_files_that_hold_no_array_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {
        "words.npy": (b"no array", "Expected an array of numbers in words.npy, but got: .* Save it with numpy.save"),
        "empty.npy": (b"", "Expected an array of numbers in empty.npy, but got: "),
        "empty.csv": (b"", "Expected an array of numbers in empty.csv, but got: .* without a header"),
        "header.csv": (b"a,b\n1,2\n", "Expected an array of numbers in header.csv, but got: .* without a header"),
        "ragged.csv": (b"1,2\n3\n", "Expected an array of numbers in ragged.csv, but got: "),
        "data.txt": (b"1 2\n", "Expected a .npy or .csv file, but got 'data.txt'. Save it with numpy.save"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert re.match(message, refusal(capsys, "--data", tmp_path / name)), name

    np.savez(tmp_path / "several.npz", a=GOOD, b=GOOD)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    message = "Expected real numbers in several.npy, but got several arrays"
    assert re.match(message, refusal(capsys, "--data", tmp_path / "several.npy"))


def test_missing_files_and_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert re.match("Expected a data file, but got '.*missing': no such file", refusal(capsys, "--data", missing))
    assert re.match("Expected a data file, but got '.*': a folder", refusal(capsys, "--data", tmp_path))
    assert re.match(
        "Expected a folder to write to, but got '.*missing'. Make it",
        refusal(capsys, "--output", missing / "a.png"),
    )


def test_images_share_one_scale_and_are_thresholded_in_its_middle() -> None:
    array = np.random.default_rng(1).integers(0, 17, size=(50, 16))
    array[0, 0], array[0, 1] = 0, 16
    data = prepare(array, "images")
    assert data.shape == (4, 4)
    assert (len(data.train), len(data.test)) == (40, 10)
    rows = torch.cat([data.test, data.train])
    wanted = torch.as_tensor(array).float() / 16
    torch.testing.assert_close(sorted(rows.tolist()), sorted(wanted.tolist()))
    torch.testing.assert_close(data.train_bits, (data.train > 0.5).float())
    torch.testing.assert_close(data.test_bits, (data.test > 0.5).float())
    assert "drawn as 4 x 4 images; range 0 to 16 scaled to 0 to 1" in data.notes
    assert data.notes[-1].endswith("want bits: thresholded at 0.5")


def test_columns_have_their_own_scale_and_are_thresholded_at_their_mean() -> None:
    array = np.c_[GOOD * [1, 10, 100, 1, 1], np.full(30, 7.0)]
    data = prepare(array, "table")
    assert data.shape == (1, 6)
    rows = torch.cat([data.test, data.train])
    torch.testing.assert_close(rows.amin(0), torch.zeros(6))
    torch.testing.assert_close(rows.amax(0), torch.tensor([1.0, 1, 1, 1, 1, 0]))
    torch.testing.assert_close(data.test_bits, (data.test > data.train.mean(0)).float())
    assert "constant columns: 1; they are kept, and teach nothing" in data.notes
    assert data.notes[-1].endswith("thresholded at the mean of each column")


def test_bits_stay_as_they_are() -> None:
    array = np.random.default_rng(2).random((40, 7)) > 0.5
    data = prepare(array, "bits")
    torch.testing.assert_close(data.train_bits, data.train)
    assert data.notes[-1].endswith("the data are bits already")


def test_large_files_are_thinned_and_the_split_is_always_the_same(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "data.csv", GOOD, delimiter=",")
    data = load(str(tmp_path / "data.csv"), max_rows=25)
    assert (len(data.train), len(data.test)) == (20, 5)
    assert "25 of them drawn at random, to keep the demo short" in data.notes
    torch.manual_seed(1)
    again = load(str(tmp_path / "data.csv"), max_rows=25)
    torch.testing.assert_close(again.test, data.test, rtol=0, atol=0)


def test_the_default_data_are_the_handwritten_digits() -> None:
    data = load(None)
    assert len(data.train) + len(data.test) == 1797
    assert data.shape == (8, 8)
    assert {float(data.train.min()), float(data.train.max())} == {0.0, 1.0}


def test_similar_groups_put_parallel_features_together() -> None:
    W = torch.eye(4)[:, [0, 1, 2, 3, 2, 0]] * torch.tensor([1.0, 2, -3, 1, 5, 1])
    groups = similar_groups(W, 2)
    assert [0, 5] in groups
    assert [2, 4] in groups
    assert sorted(i for group in similar_groups(W, 4) for i in group) == list(range(6))


def test_the_watch_leaves_out_its_own_time_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BinarySparseCoding(3, 2)
    guide = MeanField(model)
    v = torch.randn(5, 3)
    guide.setup(v)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    watch = Watch(model, guide, v, seconds=10.0, offset=2.0)

    def slow(*_: Any, **__: Any) -> Any:
        clock.now += 100.0
        torch.rand(7)
        return SimpleNamespace(bound=torch.tensor([-1.0, -3.0]))

    monkeypatch.setattr("tutorials.demo_fits.elbo_terms", slow)
    state = torch.get_rng_state()
    clock.now = 3.0
    watch(SimpleNamespace(epoch=1))
    assert (watch.times, watch.bounds, watch.seconds) == ([5.0], [-2.0], 5.0)
    assert torch.equal(torch.get_rng_state(), state)
    clock.now += 8.0
    with pytest.raises(StopFit, match="time for one fit is up"):
        watch(SimpleNamespace(epoch=2))


def test_the_table_tells_exact_numbers_from_estimates() -> None:
    value, error = torch.tensor([-1.0, -3.0]), torch.tensor([0.3, 0.4])
    assert log_p(Evidence(value, torch.zeros(2), True, None, None, 0)) == "-2.00 exact"
    assert log_p(Evidence(value, error, False, value, value, 10)) == ">= -2.00 +- 0.250"


@pytest.mark.parametrize("width", [9, 5], ids=["images", "strips"])
def test_a_quick_run_from_end_to_end(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "data.npy", np.random.default_rng(3).normal(size=(60, width)))
    output = tmp_path / "figure.png"
    assert demo.main(["--quick", "--data", str(tmp_path / "data.npy"), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.stat().st_size > 20_000
    real, bits = said.split("Densities of real values")[1].split(f"Probabilities of {width} bits")
    for guide in ("MeanField", "Structured", "Dirac", "Amortized"):
        (row,) = [line for line in real.splitlines() if f"  {guide} " in line]
        bound, evidence = map(float, re.search(r"(-?\d+\.\d\d) +(-?\d+\.\d\d) exact +\d+\.\d$", row).groups())
        assert bound <= evidence + 0.01
    rows = re.findall(r"(-?\d+\.\d\d) +>= (-?\d+\.\d\d) \+- (\d+\.\d\d\d) +\d+\.\d$", bits, re.MULTILINE)
    assert len(rows) == 3
    # L is estimated from the same samples, and below the log-mean-exp of their weights.
    assert all(float(bound) <= float(evidence) < 0 for bound, evidence, _ in rows)
