"""CompiledSVI in `fit` with a checkpoint: a fit that was stopped and resumed ends like one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_ext import Checkpoint, CompiledSVI, WakeSleep, fit, load, save, step_graph
from pyro_ext.guides import Amortized
from pyro_ext.models import FactorAnalysis, SigmoidBeliefNetwork


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they were traced, in double precision."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(step_graph, "_compiled", lambda module, inputs: module)


V = (torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double()


def network(driver: Any = CompiledSVI) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = SigmoidBeliefNetwork([2, 3, 6], name="network")
    loss = WakeSleep(num_particles=3, insomnia=0.5)
    return driver(model, Amortized(model, name="guide"), pyro.optim.Adam({"lr": 0.01}), loss)


def loader() -> Any:
    rows: Any = V
    return torch.utils.data.DataLoader(
        rows, batch_size=10, shuffle=True, collate_fn=torch.stack, generator=torch.Generator().manual_seed(0)
    )


def parameters() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


def test_a_resumed_fit_agrees_to_rounding(tmp_path: Path) -> None:
    """The first step after a resumption is Pyro's own: losses and parameters agree to 1e-10, not bit for bit."""
    whole = fit(network(), loader(), 4, progress=False)
    expected = parameters()
    checkpoint = Checkpoint(tmp_path / "fit.checkpoint", seconds=0.0)
    fit(network(), loader(), 2, checkpoint=checkpoint, progress=False)
    svi = network()
    resumed = fit(svi, loader(), 4, checkpoint=checkpoint, progress=False)
    assert len(svi._graphs) == 1, "the graph serves inside the handlers of fit"
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-10)
    torch.testing.assert_close(parameters(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("drivers", [(SVI, CompiledSVI), (CompiledSVI, SVI)])
def test_either_driver_goes_on_with_the_others_fit(drivers: Any, tmp_path: Path) -> None:
    whole = fit(network(SVI), loader(), 4, progress=False)
    checkpoint = Checkpoint(tmp_path / "fit.checkpoint", seconds=0.0)
    fit(network(drivers[0]), loader(), 2, checkpoint=checkpoint, progress=False)
    resumed = fit(network(drivers[1]), loader(), 4, checkpoint=checkpoint, progress=False)
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-10)


def test_loading_into_a_running_driver_keeps_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(step_graph, "_compiled", lambda module, inputs: made.append(module) or module)
    v = torch.randn(20, 4)
    model = FactorAnalysis(4, 2)
    svi = CompiledSVI(model, Amortized(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(4):
        svi.step(v)
    save(tmp_path / "state", svi)
    losses = [svi.step(v) for _ in range(3)]
    after = parameters()
    load(tmp_path / "state", svi)
    assert [svi.step(v) for _ in range(3)] == pytest.approx(losses, rel=1e-10)
    torch.testing.assert_close(parameters(), after, rtol=1e-9, atol=1e-12)
    assert len(made) <= 2
