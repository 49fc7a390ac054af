"""Must-show: code error, time and excess of learned sparse inference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import lista
from benchmarks.__main__ import main
from pyro_ext.guides import LISTA, PSD
from pyro_ext.models import SparseCoding

TINY = replace(lista.QUICK, side=4, num_atoms=20, train=120, test=40, batch=30, epochs=6, timed_rows=30, iterations=15)


def unit_atoms(D: int, H: int) -> Tensor:
    W = torch.randn(D, H)
    return W / W.norm(dim=0)


def test_iterates_are_ista_and_fista_as_published() -> None:
    W, v, rate = unit_atoms(6, 9).double(), 2 * torch.randn(4, 6).double(), 0.3
    problem = lista.lasso(W, v, rate)
    for layers in (1, 2, 5):
        untrained = LISTA.from_dictionary(W, rate, num_layers=layers)
        found = lista.iterates(problem, 5, accelerated=False)[layers - 1]
        torch.testing.assert_close(found, lista.encode(untrained, v), rtol=0, atol=1e-12)
    A, L = W.numpy(), np.linalg.eigvalsh(W.mT @ W)[-1]
    for row, y in enumerate(v.numpy()):
        # Beck and Teboulle (2009), (4.1)-(4.3), one vector at a time.
        x, z, t = np.zeros(9), np.zeros(9), 1.0
        for k, codes in enumerate(lista.iterates(problem, 30, accelerated=True)):
            u = z - A.T @ (A @ z - y) / L
            new = np.sign(u) * np.maximum(np.abs(u) - rate / L, 0)
            longer = (1 + math.sqrt(1 + 4 * t**2)) / 2
            x, z, t = new, new + (t - 1) / longer * (new - x), longer
            np.testing.assert_allclose(codes[row], x, atol=1e-12, err_msg=f"iteration {k + 1}")


def _untied(model: SparseCoding, layers: int) -> LISTA:
    return LISTA.from_model(model, num_layers=layers, tied=False)


def test_the_lasso_is_the_objective_without_its_constant() -> None:
    W, v, h = unit_atoms(5, 7).double(), torch.randn(3, 5).double(), torch.randn(3, 7).double()
    wanted = 0.5 * (v - h @ W.mT).square().sum(1) + 0.4 * h.abs().sum(1) - 0.5 * v.square().sum(1)
    torch.testing.assert_close(lista.lasso(W, v, 0.4).objective(h), wanted, rtol=0, atol=1e-12)


def test_errors_are_squared_and_in_decibel() -> None:
    truth = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    codes = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert lista.code_error(codes, truth) == pytest.approx((1 + 4) / (9 + 16))
    assert lista.code_error(torch.zeros_like(truth), truth) == 1
    assert lista.decibel(0.01) == pytest.approx(-20)


@pytest.mark.usefixtures("float64")
def test_log_joint_is_that_of_laplace_codes_and_gaussian_data() -> None:
    W, v, h = unit_atoms(5, 7), torch.randn(3, 5), torch.randn(3, 7)
    prior = 7 * math.log(0.4 / 2) - 0.4 * h.abs().sum(1)
    noise = -0.5 * (v - h @ W.mT).square().sum(1) - 2.5 * math.log(2 * math.pi)
    torch.testing.assert_close(lista.log_joint(lista.sparse_coding(W, 0.4), v, h), prior + noise)


def test_training_is_the_regression_on_the_known_codes_of_every_row() -> None:
    torch.manual_seed(0)
    W, v = unit_atoms(4, 6), torch.randn(64, 4)
    # Not what the program would infer.
    codes = v @ torch.randn(4, 6)
    model = lista.sparse_coding(W, 0.3)
    before = model.W.detach().clone()
    network = LISTA.from_model(model, num_layers=2)
    seen: list[Tensor] = []
    known = lista.Known(v, codes, lista.log_joint(model, v, codes))
    solve = known.solve

    def spied(call: object, warm: object, pull: float = 0.0) -> object:
        result, params = solve(call, warm, pull)  # pyright: ignore[reportArgumentType]
        rows = [int((v == row).all(1).nonzero()) for row in call.args[0]]  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(params["h"].squeeze(1), codes[rows])
        torch.testing.assert_close(result.posterior["h"].mean, codes[rows])
        torch.testing.assert_close(result.bound, lista.log_joint(model, v[rows], codes[rows]))
        seen.append(torch.tensor(rows))
        return result, params

    known.solve = spied  # pyright: ignore[reportAttributeAccessIssue]
    start = lista.code_error(lista.encode(network, v), codes)
    assert lista.train(model, network, known, v, epochs=20, lr=0.05, batch=16) > 0
    assert len(seen) == 80
    assert torch.cat(seen[:4]).sort().values.tolist() == list(range(64)), "each row once an epoch"
    assert torch.cat(seen[:4]).tolist() != torch.cat(seen[4:8]).tolist(), "in another order"
    assert lista.code_error(lista.encode(network, v), codes) < 0.1 < 0.5 < start
    assert torch.equal(model.W.detach(), before), "the dictionary stays"


def test_the_step_size_falls_to_zero_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    W, v = unit_atoms(4, 6), torch.randn(8, 4)
    model = lista.sparse_coding(W, 0.3)
    network = LISTA.from_model(model, num_layers=1)
    used: list[float] = []
    step = torch.optim.Adam.step

    def spied(self: torch.optim.Adam, closure: None = None) -> None:
        used.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", spied)
    known = lista.Known(v, torch.zeros(8, 6), torch.zeros(8))
    lista.train(model, network, known, v, epochs=4, lr=0.1, batch=8)
    rates = sorted(set(used), reverse=True)
    np.testing.assert_allclose(rates, [0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)], rtol=1e-6)


def test_codes_are_bernoulli_gaussian() -> None:
    codes = lista.draw_codes(4000, 25, torch.Generator().manual_seed(0))
    on = codes[codes != 0]
    # k = 5 standard errors.
    assert len(on) / codes.numel() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / codes.numel()))
    assert float(on.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / len(on)))


def test_networks_of_patches_beat_as_many_iterations_of_ista(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    atoms = torch.randn(16, 20, generator=generator)
    drawn = lista.draw_codes(180, 20, generator) @ (3 * atoms / atoms.norm(dim=0)).mT
    v = drawn + 0.3 * torch.randn(180, 16, generator=generator)
    found = lista.learn_patches(v, TINY)
    assert (found.v.shape, found.codes.shape, len(found.ista)) == ((40, 16), (40, 20), 15)
    assert torch.equal(found.v, v[140:])
    directions = v[:20].mT / v[:20].norm(dim=1)
    torch.testing.assert_close(found.W, directions)
    problem = lista.lasso(found.W.double(), found.v.double(), lista.RATE)
    gap = problem.gap(found.codes, problem.gradient(found.codes))
    assert float(gap.max()) < 1e-8, "h* is the optimum"
    for (_, layers), error in found.errors.items():
        assert error < found.ista[layers - 1]
    for label, fresh in (("PSD", PSD.from_model(found.model)), ("LISTA untied 3", _untied(found.model, 3))):
        trained = dict(found.networks[label].named_parameters())
        for name, start in fresh.named_parameters():
            assert not torch.equal(trained[name], start), f"{name} of {label} never moved"
    assert set(found.networks) == {"PSD", *(f"LISTA {t} {k}" for t in ("tied", "untied") for k in lista.LAYERS)} - {
        "LISTA untied 1"
    }
    for layers in lista.LAYERS:
        network = found.networks[f"LISTA tied {layers}"]
        assert found.errors["LISTA tied", layers] == lista.code_error(lista.encode(network, found.v), found.codes)
    assert lista.learn_patches(v, TINY).errors == found.errors, "seeds decide"
    assert "140" not in capsys.readouterr().out.split("training codes")[0]

    costs = lista.measure(found, TINY)
    for label, cost in costs.items():
        assert min(cost.batch, cost.single) > 0
        assert cost.excess > -1e-6, label
    assert costs["FISTA 1"].excess > costs["FISTA 3"].excess > costs["FISTA 7"].excess > costs["FISTA 15"].excess
    for solver in ("FeatureSign", "SpaRSA", "FISTA to a gap of"):
        for tolerance in lista.TOLERANCES:
            # The gap is relative to |v|^2 / 2, above the objective at its optimum.
            energy = found.v[:30].double().square().sum() / 2
            least = problem.objective(found.codes)[:30].sum() + energy
            assert costs[f"{solver} {tolerance:g}"].excess <= float(tolerance * energy / least) + 1e-6
    assert abs(costs["Maximize()"].excess) < 1e-6
    codes = {label: lista.encode(found.networks[label], found.v[:30]) for label in ("PSD", "LISTA tied 7")}
    codes["FISTA 7"] = lista.iterates(lista.lasso(found.W, found.v[:30], lista.RATE), 7, accelerated=True)[-1]
    for label, h in codes.items():
        h = h.double()
        excess = problem.rows(torch.arange(30)).objective(h) - problem.objective(found.codes)[:30]
        assert costs[label].excess == pytest.approx(float(excess.sum() / least), rel=1e-4)

    lines = {line.get_label(): line for line in lista.draw_errors(found).axes[0].get_lines()}
    np.testing.assert_allclose(lines["FISTA"].get_ydata(), found.fista)
    np.testing.assert_array_equal(lines["LISTA untied"].get_xdata(), [3, 7, 15])
    left, right = lista.draw_costs(costs, 30).axes
    for ax, field in ((left, "batch"), (right, "single")):
        drawn_lines = {line.get_label(): line for line in ax.get_lines()}
        assert len(drawn_lines) == 7
        np.testing.assert_allclose(drawn_lines["PSD"].get_xdata(), [getattr(costs["PSD"], field)])
        np.testing.assert_allclose(
            drawn_lines["FISTA, iterations"].get_ydata(), [costs[f"FISTA {k}"].excess for k in lista.LAYERS]
        )


def test_synthetic_networks_beat_as_many_iterations_of_ista(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = replace(lista.QUICK, synthetic_epochs=8, synthetic_train=600, test=200)
    found = lista.learn_synthetic(sizes, 0)
    assert list(found) == ["ISTA", "FISTA", "LISTA tied", "LISTA untied"]
    assert found["FISTA"] < found["ISTA"] < 0
    assert max(found["LISTA tied"], found["LISTA untied"]) < found["ISTA"]
    assert capsys.readouterr().out.count("dB") == 4


def test_the_benchmark_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    image, folder = tmp_path / "images.npy", tmp_path / "new"
    np.save(image, rng.standard_normal((40, 50)).cumsum(0).cumsum(1))
    threads = torch.get_num_threads()
    try:
        assert main(["lista", "--quick", "--path", str(image), "--figure-folder", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("lista error7=")
    for name in ("lista_error", "code_time"):
        assert plt.imread(folder / f"{name}.png").shape[2] == 4
    assert not plt.get_fignums()
