"""Sparse codes, dictionaries and sparse features of patches: what the benchmarks compare, at tiny sizes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Generator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pyro import poutine
from torch import Tensor

from benchmarks import dictionary, sparse_codes, sparse_patches
from benchmarks.__main__ import main
from benchmarks.compare import Timing


@pytest.fixture(autouse=True)
def _same_threads() -> Generator[None, None, None]:
    """The benchmarks set torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def data(num_rows: int, num_visible: int = 16, num_latents: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (N, D) of a few atoms each with noise, and the atoms (D, H) of norm 1, float32."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((num_visible, num_latents))
    W /= np.linalg.norm(W, axis=0)
    h = rng.laplace(scale=3, size=(num_rows, num_latents)) * (rng.random((num_rows, num_latents)) < 0.15)
    v = h @ W.T + 0.3 * rng.standard_normal((num_rows, num_visible))
    return torch.from_numpy(v).float(), torch.from_numpy(W).float()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with an image of random edges."""
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(6).standard_normal((40, 50)).cumsum(0).cumsum(1))
    return path


def test_the_objective_is_that_of_each_row() -> None:
    v, W = data(5)
    h = torch.randn(5, 20)
    rows = [0.5 * float((v[n] - W @ h[n]).norm()) ** 2 + 0.7 * float(h[n].abs().sum()) for n in range(5)]
    assert sparse_patches.objective(v, W, h, 0.7) == pytest.approx(np.mean(rows), rel=1e-6)


def test_the_program_has_the_objective_of_the_peers() -> None:
    """-log p(h, v) is |v - W h|^2 / 2 + rate |h|_1 up to a constant."""
    v, W = data(3)
    model = sparse_patches.with_dictionary(W, 0.7, torch.float64)
    constants = []
    for h in (torch.zeros(3, 20), torch.randn(3, 20)):
        at_h = poutine.trace(poutine.condition(model, data={"h": h.double()})).get_trace(v.double())
        log_joint = float(at_h.log_prob_sum().detach())
        constants.append(-log_joint / 3 - sparse_patches.objective(v, W, h, 0.7))
    assert constants[0] == pytest.approx(constants[1], abs=1e-6)
    assert float(model.beta) == 1
    assert not model.learn_bias


def test_codes_are_those_of_scikit_learn_and_of_the_solver_alone() -> None:
    v, W = data(40)
    atoms = sparse_codes.atoms_of(W)
    ours, e_step = sparse_codes.ours(v, W)
    cd, lars = (
        torch.from_numpy(sparse_codes.scikit_learn(v.double().numpy(), atoms, f"lasso_{name}"))
        for name in ("cd", "lars")
    )
    for other in (cd, lars, sparse_codes.by_hand(v, W), sparse_codes.ours(v.double(), W)[0]):
        torch.testing.assert_close(ours.double(), other.double(), atol=2e-3, rtol=0)
        assert sparse_patches.objective(v, W, other, 1.0) == pytest.approx(
            sparse_patches.objective(v, W, ours, 1.0), rel=1e-6
        )
    assert ours.dtype == torch.float32
    assert bool(e_step.certificate.converged.all())


def test_lars_on_few_rows_is_scaled_and_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    v, W = data(40)
    monkeypatch.setattr(sparse_codes, "timed", lambda work: (2.0, work()))
    assert sparse_codes.lars_on_few(v, W, 10).median == 8.0
    monkeypatch.setattr(sparse_codes, "scikit_learn", lambda v, atoms, algorithm: np.zeros((len(v), len(atoms))))
    with pytest.raises(RuntimeError, match="Expected the same answer within 1e-06"):
        sparse_codes.lars_on_few(v, W, 10)


def test_memory_counts_what_a_call_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fills 40 MB is seen to, whatever the process holds or has held before.

    The pages are asked of the system itself: an allocator may hand out blocks that were freed and are resident still.
    """
    v, W = data(100)
    held = torch.ones(5_000_000)
    torch.ones(30_000_000)

    def call(rows: Tensor, _: Tensor, solver: object) -> tuple[mmap.mmap, None]:
        pages = mmap.mmap(-1, 40_000_000 if len(rows) == 100 else 1)
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        return pages, None

    monkeypatch.setattr(sparse_codes, "ours", call)
    rise = sparse_codes.measure_memory("pyro-ext", v.numpy(), W.double().numpy(), torch.get_num_threads())
    assert rise == pytest.approx(40e6, abs=2e6)
    assert len(held) == 5_000_000


def test_step_sizes_keep_the_peers_statistics() -> None:
    """scikit-learn's S <- beta S + s, in its own words, over its weight."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    batch_size, rho = 4, dictionary.additive(4)
    peer = MiniBatchDictionaryLearning()
    peer._A, peer._B = np.zeros((1, 1)), np.zeros((1, 1))
    average, rng = np.zeros((1, 1)), np.random.default_rng(0)
    for step in range(12):
        x, code = rng.standard_normal((batch_size, 1)), rng.standard_normal((batch_size, 1))
        peer._update_inner_stats(x, code, batch_size, step)
        average = average + rho(step + 1) * (code.T @ code / batch_size - average)
        np.testing.assert_allclose(average * (1 / rho(step + 1)), peer._A, rtol=1e-10)
    assert rho(1) == 1
    assert rho(3) == dictionary.additive(4)(3), "whatever was asked before"


def test_with_the_peers_statistics_the_dictionary_is_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same start, batches, codes and statistics: the same atoms, not only as good ones."""
    v, _ = data(120)
    start = sparse_patches.unit_columns(v[:12].T)
    task = dictionary.Task(v[:96], v[96:], start, alpha=0.5, batch_size=16, num_epochs=2)
    task.v = task.v.double()
    monkeypatch.setattr(dictionary, "learner", lambda model, schedule: sparse_patches.learner(model, schedule, 1e-12))
    kept: list[Tensor] = []
    monkeypatch.setattr(task, "score", lambda W: kept.append(W) or 0.0)
    dictionary.ours(task, dictionary.additive(16))()
    dictionary.scikit_learn(task, "cd")()
    # scikit-learn's codes have a gap of up to 1e-8 |v|^2.
    torch.testing.assert_close(kept[0], kept[1], atol=1e-4, rtol=0)
    assert float((kept[1] - start).abs().max()) > 0.05, "something was learned"


def test_dictionaries_are_scored_by_exact_codes() -> None:
    v, W = data(60)
    task = dictionary.Task(v, v, W, alpha=0.5, batch_size=20, num_epochs=1)
    from sklearn.decomposition import sparse_encode

    h = sparse_encode(v.double().numpy(), sparse_codes.atoms_of(W), algorithm="lasso_cd", alpha=0.5, max_iter=10_000)
    expected = sparse_patches.objective(v, W, torch.from_numpy(h), 0.5)
    assert task.score(W) == pytest.approx(expected, rel=1e-7)
    assert task.score(1.01 * W) == pytest.approx(task.score(W), rel=1e-6), "no atom gains by its length"
    assert task.score(0.5 * W) > 1.01 * task.score(W), "short atoms stay short"


def test_seconds_of_few_batches_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    v, _ = data(100)
    task = dictionary.Task(v, v[:20], sparse_patches.unit_columns(v[:12].T), alpha=0.5, batch_size=20, num_epochs=3)
    monkeypatch.setattr(dictionary, "timed", lambda work: (2.0, work()))
    assert dictionary.scikit_learn(task, "lars", 2)()[0] == pytest.approx(2 * 3 * 100 / 40)
    assert dictionary.scikit_learn(task, "cd")()[0] == 2


def test_a_worse_dictionary_is_refused() -> None:
    dictionary.check_no_higher(Timing("ours", answer=10.0), Timing("peer", answer=10.0))
    dictionary.check_no_higher(Timing("ours", answer=9.0), Timing("peer", answer=10.0))
    for answer in (10.001, float("nan")):
        with pytest.raises(RuntimeError, match="Expected an objective no higher than peer's 10, but got"):
            dictionary.check_no_higher(Timing("ours", answer=answer), Timing("peer", answer=10.0))


def test_atoms_are_learned() -> None:
    """Held-out data cost less than with the first atoms, and true atoms come out."""
    v, W = data(2000, num_latents=12)
    learned = sparse_patches.learn(v, 12, 6, rate=0.5, batch_size=100, quiet=True)
    assert learned.losses[-1] < learned.losses[0]
    h, _ = sparse_patches.codes(learned.W, v, 0.5)
    constant = 8 * math.log(2 * math.pi) - 12 * math.log(0.25)
    exact = sparse_patches.objective(v, learned.W, h, 0.5) + constant
    assert learned.losses[-1] == pytest.approx(exact, rel=0.01), "coarse codes, of moving atoms"
    closest = (W.T @ learned.W).abs().amax(1)
    assert int((closest > 0.95).sum()) >= 9
    assert not learned.dead.any()
    assert learned.seconds > 0
    unused = sparse_patches.Learned(learned.W, torch.tensor([0.2, 0.0, 1e-3]), [], 0.0, 0.0)
    assert unused.dead.tolist() == [False, True, False]


def test_patches_for_learning_and_for_coding_differ(image: Path) -> None:
    one, other, few = sparse_patches.patches_of(image, 6, 30, 30, 20)
    assert (len(one), len(other), len(few)) == (30, 30, 20)
    assert not torch.equal(one, other)
    assert torch.equal(one, sparse_patches.patches_of(image, 6, 30)[0])
    assert not torch.equal(one, sparse_patches.patches_of(image, 6, 30, seed=1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "patches"])
def test_the_codes_benchmark_runs(kind: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--path {image} --dictionary {kind} --side 6 --rows 80 --latents 30 --training 512 --lars-rows 10"
    assert main(["sparse_codes", *options.split(), "--threads", "1", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("sparse_codes ours=")
    for label in ("pyro-ext, float64", "by hand", "scikit-learn, lasso_cd", "scikit-learn, lasso_lars", "memory above"):
        assert any(line.strip().startswith(label) for line in lines)
    assert any("80 of 80 rows converged" in line for line in lines)


def test_the_dictionary_benchmark_runs(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--path {image} --side 5 --patches 512 --held-out 64 --latents 16 --batch-size 64 --lars-batches 1"
    assert main(["dictionary", *options.split(), "--threads", "1", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("dictionary ours=")
    assert any(line.strip().startswith("pyro-ext, peer's statistics") for line in lines)
    assert any("scaled from 1 batches" in line for line in lines)


def test_the_patches_benchmark_runs_and_draws(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "new" / "features.png"
    options = f"--path {image} --figure {figure} --side 6 --patches 600 --latents 8 --epochs 1"
    assert main(["sparse_patches", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("sparse_patches seconds=")
    assert "latents=8 dead=" in lines[-1]
    for label in ("features", "noise of the patches' covariance", "principal components", "patches"):
        assert any(line.strip().startswith(label) for line in lines)
    assert plt.imread(figure).shape[2] == 4
    assert not plt.get_fignums()
