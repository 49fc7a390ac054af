"""Reweighted wake-sleep on three binary data sets of the NADE suite: ADULT, DNA and MUSHROOMS.

Model and guide are sigmoid belief networks ("SBN/SBN" of Bornschein and Bengio, Reweighted wake-sleep, 2015), in the
sizes of an independent NumPy run. The paper's protocol is kept: batches of 25, K = 5 particles, wake-phi and sleep-phi
both, biases that start at -1, early stopping on the validation set; the learning rate is the best of a grid on the
validation set. Ours uses Adam in place of momentum, half of each phase at every step in place of a sleep step every
second one, and compiled steps. Validation after each epoch: the bound of 25 samples a row; the best state is kept.

Test NLL: -log(1/S sum_s w_s) with S samples of q, nats a row, an upper bound on the NLL in expectation; for S = 100 and
S = 1000 on all test rows. Data: a folder with NAME/NAME.npz that hold train_data, valid_data and test_data (0 or 1).
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.optim import Adam
from torch import Tensor, nn

from benchmarks.compare import machine
from pyro_ext import CompiledSVI, EarlyStopping, WakeSleep, fit, log_evidence
from pyro_ext.guides import Amortized
from pyro_ext.models import SigmoidBeliefNetwork


@dataclass(frozen=True)
class Task:
    """A data set, latent layers, and the figure to compare with.

    Attributes:
        layers: latent layers, the one next to v first.
        reported: test NLL of the paper, as remembered (unverified), nats a row.
        by_numpy: test NLL of an independent NumPy run of the protocol with S = 100.
    """

    layers: tuple[int, ...]
    reported: float
    by_numpy: float


TASKS = {
    "adult": Task((100, 20, 5), 13.65, 13.69),
    "dna": Task((200, 150, 20), 90.63, 91.46),
    "mushrooms": Task((150, 100, 90), 9.90, 9.81),
}

NUM_PARTICLES, BATCH = 5, 25


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """Training, validation and test rows, float32."""
    with np.load(folder / name / f"{name}.npz") as data:
        return {part: torch.as_tensor(data[f"{part}_data"]).float() for part in ("train", "valid", "test")}


class Layer(nn.Sequential):
    """Logits of one layer of the recognition network: linear, as in a sigmoid belief network."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(nn.Linear(num_inputs, num_outputs))
        nn.init.constant_(self[0].bias, -1.0)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Outcome:
    """One run: the validation NLL that chose it, epochs, seconds, and the fitted programs."""

    valid: float
    epochs: int
    seconds: float
    model: SigmoidBeliefNetwork
    guide: Amortized


def train(data: dict[str, Tensor], layers: tuple[int, ...], rate: float, epochs: int, patience: int) -> Outcome:
    """Train with one learning rate, and keep the state that is best on the validation rows."""
    pyro.set_rng_seed(0)
    v = data["train"]
    model = SigmoidBeliefNetwork([*reversed(layers), v.shape[1]])
    with torch.no_grad():
        for level in range(len(layers) + 1):
            getattr(model, f"b{level}").fill_(-1.0)
    widths = [v.shape[1], *layers]
    encoders: dict[str, nn.Module] = {
        f"h{level}": Layer(below, width) for level, (below, width) in enumerate(itertools.pairwise(widths), start=1)
    }
    guide = Amortized(model, encoder=encoders)
    guide.setup(v[:BATCH])
    loss = WakeSleep(NUM_PARTICLES, insomnia=0.5, max_plate_nesting=1)
    svi = CompiledSVI(model, guide, Adam({"lr": rate}), loss)
    loader = torch.utils.data.DataLoader(
        v,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=torch.stack,
        generator=torch.Generator().manual_seed(0),
    )
    held_out = Bound(svi, model, guide)
    started = time.perf_counter()
    history = fit(
        held_out,
        loader,
        epochs,
        held_out=[data["valid"]],
        early_stopping=EarlyStopping(patience=patience),
        progress=False,
    )
    return Outcome(min(history.held_out), len(history.held_out), time.perf_counter() - started, model, guide)


class Bound:
    """The compiled driver, whose held-out loss is the bound of 25 particles."""

    def __init__(self, svi: CompiledSVI, model: SigmoidBeliefNetwork, guide: Amortized) -> None:
        self.svi, self.model, self.guide, self.optim, self.step = svi, model, guide, svi.optim, svi.step

    def evaluate_loss(self, v: Tensor) -> float:
        """-log 1/25 sum_s w_s, summed over the rows."""
        return -float(log_evidence(self.model, self.guide, v, num_samples=25).log_evidence.sum())


def main(options: list[str]) -> None:
    """Train and print a row for each data set."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks uci_binary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="holds adult/adult.npz, dna/dna.npz, mushrooms/mushrooms.npz")
    parser.add_argument("--names", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--epochs", type=int, default=600, help="most epochs of a run (600)")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a better validation NLL (5)")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    print(machine())
    for name in given.names:
        task, data = TASKS[name], read(given.folder, name)
        runs = {}
        for rate in given.rates:
            runs[rate] = run = train(data, task.layers, rate, given.epochs, given.patience)
            print(f"{name}: rate {rate:g}, valid {run.valid:.3f}, {run.epochs} epochs, {run.seconds:.0f} s", flush=True)
        rate, best = min(runs.items(), key=lambda pair: pair[1].valid)
        line = f"{name} {'-'.join(map(str, task.layers))}: rate {rate:g}, test NLL"
        for num_samples in (100, 1000):
            parts = [
                log_evidence(best.model, best.guide, rows, num_samples=num_samples) for rows in data["test"].split(2000)
            ]
            nll = -float(torch.cat([part.log_evidence for part in parts]).mean())
            error = float(torch.cat([part.standard_error for part in parts]).square().sum().sqrt()) / len(data["test"])
            line += f" {nll:.3f} +- {error:.3f} (S = {num_samples})"
        print(f"{line}; reported {task.reported}, NumPy {task.by_numpy} (S = 100)", flush=True)
