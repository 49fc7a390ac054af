"""The README: its examples run when pasted, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def run(*blocks: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_the_first_example_stands_alone_and_finds_the_features(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(BLOCKS[0])
    said = capsys.readouterr().out
    assert "exact, 500 rows" in said
    assert len(BLOCKS[0].splitlines()) <= 25
    features, bars = pyro.param("W").detach(), found["bars"]
    # Most features are one bar: within a fifth of its height at every pixel, on average.
    distance = (features[:, None] - bars).abs().mean(-1).min(1).values
    assert int((distance < 1).sum()) >= 6


# Of torch's own compiler.
@pytest.mark.filterwarnings("ignore:.*torch._prims_common:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_the_other_examples_run_after_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 5
    found = run(*BLOCKS)
    assert found["history"].epochs == 5
    assert len(found["history"].health) == 5
    assert (tmp_path / "network.checkpoint").exists()
    assert found["em"].model.W.shape == torch.Size([16, 32])
    assert 0.5 < float((found["codes"] == 0).double().mean()) < 1
    assert bool(found["em"].e_step.certificate.converged.all())
    assert "log p(v) = " in capsys.readouterr().out
    assert found["model"].dream(3).shape == torch.Size([3, 16])


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
