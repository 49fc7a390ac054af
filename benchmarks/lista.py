"""Learned sparse inference: code error and time of LISTA and PSD against iterations and exact solvers (19.5.2).

Patches: those of `benchmarks.patches`, whitened, mean 0 and variance 1; the dictionary is 196 patches, as atoms of
length 1; lambda = 1/2 and beta = 1 in beta/2 |v - W h|^2 + lambda |h|_1. `FeatureSign` gives h*. Every network is
trained by the library, `EM(model, Amortized(model, encoder), e_step=Refine(target, optim), m_step=None)` in `fit`. As
the dictionary does not move, the training codes are solved once, and the target looks them up (`Known`).

Synthetic: the protocol of papers on LISTA: 256 x 512 Gaussian atoms of length 1, each code on with probability 0.1 and
Gaussian then, no noise, 16 layers, error in decibel to the true codes, on which the networks are trained.

Errors are sum_n |h_n - h*_n|^2 / sum_n |h*_n|^2, squares included.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro import poutine
from pyro.optim import CosineAnnealingLR
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compare import machine, timed
from benchmarks.patches import draw_patches, load_images, whiten
from pyro_ext import EM, FISTA, FeatureSign, Maximize, SpaRSA, fit
from pyro_ext.evaluators import Parameters
from pyro_ext.guides import LISTA, PSD, Amortized, Dirac, PointEncoder
from pyro_ext.models import SparseCoding, assign_parameter
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.refine import Refine
from pyro_ext.solvers import Solver
from pyro_ext.steps import Call, EResult

RATE = 0.5
"""lambda on patches, nats per unit of a code; patches have variance 1."""

LAYERS = (1, 3, 7, 15)

DEEP = 7
"""Layers beyond which the learning rate on patches falls, in inverse proportion to them."""

SYNTHETIC_RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
"""Where lambda is looked for, on data of their own, for ISTA, FISTA and the start of the networks."""

TOLERANCES = (1e-2, 1e-4, 1e-6)
"""Duality gaps at which exact solvers stop, relative to |v|^2 / 2."""


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        train, test: patches, and synthetic rows.
        batch, epochs, lr: of the training on patches.
        synthetic_train, synthetic_batch, synthetic_epochs, synthetic_lr: of the training on synthetic rows.
        shape: (D, H) of the synthetic dictionary.
        iterations: most iterations of ISTA and FISTA that are shown.
        timed_rows, repeats: rows that are timed at once; repeats of which the median is shown.
        single_rows: rows that are timed one by one.
    """

    side: int = 12
    num_atoms: int = 196
    train: int = 20_000
    test: int = 2_000
    batch: int = 200
    epochs: int = 10
    lr: float = 5e-3
    synthetic_train: int = 15_000
    synthetic_batch: int = 100
    synthetic_epochs: int = 4
    synthetic_lr: float = 1e-3
    shape: tuple[int, int] = (256, 512)
    synthetic_layers: int = 16
    iterations: int = 60
    timed_rows: int = 1_000
    repeats: int = 3
    single_rows: int = 20


QUICK = Sizes(6, 48, 200, 50, 50, 3, 5e-3, 200, 50, 2, 1e-3, (16, 32), 4, 15, 40, 1, 2)
"""`--quick`: everything once, to see that it runs. The figures mean nothing."""


class Known(Maximize):
    """The target of `Refine` where codes are known: solved once, or drawn. Rows are recognised by their bytes.

    Args:
        v: rows, shape (N, D).
        codes: shape (N, H).
        bound: log p(v, h) at the codes, shape (N,), nats.
    """

    def __init__(self, v: Tensor, codes: Tensor, bound: Tensor) -> None:
        super().__init__()
        self.codes, self.bound = codes, bound
        self._numbers = {row.tobytes(): number for number, row in enumerate(v.numpy())}

    def solve(self, call: Call, warm: Parameters | None, pull: float = 0.0) -> tuple[EResult, Parameters]:
        index = [self._numbers[row.tobytes()] for row in call.args[0].numpy()]
        params = {"h": self.codes[index].unsqueeze(1)}
        return EResult(self.bound[index], True, "cold", call.posterior(params), monotone=False), params


def sparse_coding(W: Tensor, rate: float) -> SparseCoding:
    """The model with atoms W (D, H), of length 1, without a bias."""
    pyro.clear_param_store()
    model = SparseCoding(*W.shape, rate=rate, beta=1.0, bias=False)
    assign_parameter(model, "W", W)
    return model


@torch.no_grad()
def log_joint(model: SparseCoding, v: Tensor, codes: Tensor) -> Tensor:
    """log p(v, h), shape (N,), nats."""
    trace = poutine.trace(poutine.condition(model, {"h": codes})).get_trace(v)
    trace.compute_log_prob()
    return trace.nodes["h"]["log_prob"] + trace.nodes["v"]["log_prob"]


def train(
    model: SparseCoding, encoder: PointEncoder, known: Known, v: Tensor, *, epochs: int, lr: float, batch: int
) -> float:
    """Train an encoder on known codes, Adam with a cosine schedule, and return the seconds."""
    optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": epochs})
    em = EM(model, Amortized(model, encoder=encoder), e_step=Refine(known, optim), m_step=None)
    loader = DataLoader(v, batch_size=batch, shuffle=True)
    callbacks = [lambda _: optim.step()]
    return timed(lambda: fit(em, loader, epochs, callbacks=callbacks, progress=False, guard=False, seed=0))[0]


def iterates(problem: PenalizedQuadratic, num: int, *, accelerated: bool) -> list[Tensor]:
    """ISTA from 0, or FISTA as it was published, without restarts; the codes (R, H) after 1, ..., num iterations."""
    step = 1 / problem.curvature
    x = y = torch.zeros_like(problem.linear)
    t, found = 1.0, []
    for _ in range(num):
        new = problem.shrink(y - step * problem.gradient(y), step)
        longer = (1 + math.sqrt(1 + 4 * t * t)) / 2
        y = new + (t - 1) / longer * (new - x) if accelerated else new
        x, t = new, longer
        found.append(x)
    return found


def code_error(codes: Tensor, truth: Tensor) -> float:
    """sum |h - h*|^2 / sum |h*|^2."""
    return float((codes - truth).double().square().sum() / truth.double().square().sum())


def decibel(error: float) -> float:
    """10 log10 of an error."""
    return 10 * math.log10(error)


def lasso(W: Tensor, v: Tensor, rate: float) -> PenalizedQuadratic:
    """|v - W h|^2 / 2 + rate |h|_1 - |v|^2 / 2 for rows v (R, D)."""
    return PenalizedQuadratic(W.mT @ W, v @ W, v.new_full((W.shape[1],), rate), energy=v.square().sum(-1))


@torch.no_grad()
def encode(encoder: PointEncoder, v: Tensor) -> Tensor:
    """Codes of a network, without a graph."""
    return encoder(v)


# ---------------------------------------------------------------------- patches


@dataclass(frozen=True)
class Patches:
    """What part A leaves to part C.

    Attributes:
        model: with the dictionary.
        W: atoms, shape (D, H).
        v, codes: held-out patches and their h*, shapes (N, D) and (N, H).
        networks: trained, by label.
        errors: code error of each network, by (label of its kind, layers).
        ista, fista: code error after 1, 2, ... iterations.
    """

    model: SparseCoding
    W: Tensor
    v: Tensor
    codes: Tensor
    networks: dict[str, PointEncoder]
    errors: dict[tuple[str, int], float]
    ista: list[float]
    fista: list[float]


def learn_patches(v: Tensor, sizes: Sizes) -> Patches:
    """Part A: train PSD and LISTA on patches (N, D), the first `num_atoms` of which are the dictionary."""
    atoms, rest = v[: sizes.num_atoms].mT, v[sizes.num_atoms :]
    model = sparse_coding(atoms / atoms.norm(dim=0), RATE)
    W = model.W.detach()
    rows, held = rest[: sizes.train], rest[sizes.train :]
    solving = EM(model, Dirac(model), e_step=Maximize(), m_step=None)
    seconds, codes = timed(lambda: solving.infer(rows)["h"].mean)
    known = Known(rows, codes, log_joint(model, rows, codes))
    exact = FeatureSign(tolerance=1e-10, max_iterations=10_000)
    problem = lasso(W.double(), held.double(), RATE)
    truth = exact.solve(problem, torch.zeros_like(problem.linear)).x
    active = float((truth != 0).double().sum(1).mean())
    print(f"  {len(rows):,} training codes solved in {seconds:.1f} s; {active:.1f} of {W.shape[1]} atoms active")
    ista, fista = (
        [code_error(h, truth) for h in iterates(problem, sizes.iterations, accelerated=accelerated)]
        for accelerated in (False, True)
    )
    print(f"  {'':14}{'layers':>7}{'untrained':>11}{'trained':>9}{'root':>7}{'as FISTA':>10}{'seconds':>9}", flush=True)
    networks: dict[str, PointEncoder] = {}
    errors: dict[tuple[str, int], float] = {}
    made: list[tuple[str, int, PointEncoder]] = [("PSD", 1, PSD.from_model(model))]
    for name, tied in (("LISTA tied", True), ("LISTA untied", False)):
        # A single layer is the same, tied or not.
        made += [(name, k, LISTA.from_model(model, num_layers=k, tied=tied)) for k in LAYERS if tied or k > 1]
    for name, layers, network in made:
        before = code_error(encode(network, held), truth)
        # Deep networks bear shorter steps.
        lr = sizes.lr * min(1, DEEP / layers)
        seconds = train(model, network, known, rows, epochs=sizes.epochs, lr=lr, batch=sizes.batch)
        error = errors[name, layers] = code_error(encode(network, held), truth)
        networks[name if name == "PSD" else f"{name} {layers}"] = network
        matched = next((str(k) for k, other in enumerate(fista, 1) if other <= error), f"> {len(fista)}")
        print(
            f"  {name:14}{layers:7}{before:11.3f}{error:9.4f}{error**0.5:7.3f}{matched:>10}{seconds:9.1f}", flush=True
        )
    for name, found in (("ISTA", ista), ("FISTA", fista)):
        shown = [k for k in (*LAYERS, 25, 60) if k <= len(found)]
        print(f"  {name:14}" + ", ".join(f"{k}: {found[k - 1]:.4f} ({found[k - 1] ** 0.5:.3f})" for k in shown))
    return Patches(model, W, held, truth, networks, errors, ista, fista)


def draw_errors(found: Patches) -> Figure:
    """Code error against layers or iterations."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    for label, errors, style in (("ISTA", found.ista, ":"), ("FISTA", found.fista, "--")):
        ax.plot(range(1, len(errors) + 1), errors, style, color="0.4", label=label)
    for label, marker in (("LISTA tied", "o"), ("LISTA untied", "s"), ("PSD", "^")):
        points = sorted((layers, error) for (name, layers), error in found.errors.items() if name == label)
        ax.plot(*zip(*points, strict=True), marker=marker, label=label)
    ax.set(xscale="log", yscale="log", xlabel="layers or iterations", ylabel="Σ|h − h*|² / Σ|h*|²")
    ticks = [k for k in (1, 3, 7, 15, 30, 60) if k <= len(found.ista)]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.legend()
    return figure


# ---------------------------------------------------------------------- synthetic


def draw_codes(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Bernoulli-Gaussian codes (num, width), a tenth of them on."""
    on = torch.rand(num, width, generator=generator) < 0.1
    return torch.randn(num, width, generator=generator) * on


def learn_synthetic(sizes: Sizes, seed: int) -> dict[str, float]:
    """Part B: the error to the true codes of `synthetic_layers` layers or iterations, dB."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sizes.shape, generator=generator)
    W = W / W.norm(dim=0)
    drawn = [draw_codes(n, W.shape[1], generator) for n in (sizes.synthetic_train, sizes.test, sizes.test)]
    (rows, codes), (chosen_v, chosen_h), (held, truth) = ((h @ W.mT, h) for h in drawn)
    depth, found = sizes.synthetic_layers, dict[str, float]()

    def error(v: Tensor, h: Tensor, rate: float, accelerated: bool) -> float:
        return decibel(code_error(iterates(lasso(W, v, rate), depth, accelerated=accelerated)[-1], h))

    start = 0.0
    for name, accelerated in (("ISTA", False), ("FISTA", True)):
        rate = min(SYNTHETIC_RATES, key=lambda r: error(chosen_v, chosen_h, r, accelerated))
        start = start or rate
        found[name] = error(held, truth, rate, accelerated)
        print(f"  {name}-{depth:<12} {found[name]:7.2f} dB with lambda = {rate:g}", flush=True)
    model = sparse_coding(W, start)
    known = Known(rows, codes, log_joint(model, rows, codes))
    for name, tied in (("LISTA tied", True), ("LISTA untied", False)):
        network = LISTA.from_model(model, num_layers=depth, tied=tied)
        settings = {"epochs": sizes.synthetic_epochs, "lr": sizes.synthetic_lr, "batch": sizes.synthetic_batch}
        seconds = train(model, network, known, rows, **settings)
        found[name] = decibel(code_error(encode(network, held), truth))
        print(f"  {name:18} {found[name]:7.2f} dB, {seconds:.1f} s", flush=True)
    return found


# ---------------------------------------------------------------------- time


@dataclass(frozen=True)
class Cost:
    """What a code costs, and how good it is.

    Attributes:
        excess: sum of P(h) - P(h*) over the sum of P(h*), where P = |v - W h|^2 / 2 + lambda |h|_1.
        batch: microseconds a code, all rows at once.
        single: microseconds a code, one row at a time.
    """

    excess: float
    batch: float
    single: float


def inference(found: Patches, sizes: Sizes) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions from numbers of held-out rows to their codes, by label.

    Iterations and solvers are given W'W, its eigenvalues and v W, and networks only v. ``Maximize()`` is the whole way
    from the program.
    """
    v, problem = found.v, lasso(found.W, found.v, RATE)
    _ = problem.curvature
    em = EM(found.model, Dirac(found.model), e_step=Maximize(), m_step=None)

    def iterate(k: int) -> Callable[[Tensor], Tensor]:
        return lambda rows: iterates(problem.rows(rows), k, accelerated=True)[-1]

    def solve(solver: Solver) -> Callable[[Tensor], Tensor]:
        return lambda rows: solver.solve(problem.rows(rows), v.new_zeros(len(rows), problem.rate.shape[-1])).x

    def network(encoder: PointEncoder) -> Callable[[Tensor], Tensor]:
        return lambda rows: encode(encoder, v[rows])

    runs = {label: network(encoder) for label, encoder in found.networks.items() if "untied" not in label}
    runs |= {f"FISTA {k}": iterate(k) for k in (*LAYERS, 30, 60) if k <= sizes.iterations}
    for kind in (FeatureSign, SpaRSA, FISTA):
        label = "FISTA to a gap of" if kind is FISTA else kind.__name__
        runs |= {f"{label} {tolerance:g}": solve(kind(tolerance=tolerance)) for tolerance in TOLERANCES}
    return runs | {"Maximize()": lambda rows: em.infer(v[rows])["h"].mean}


def measure(found: Patches, sizes: Sizes) -> dict[str, Cost]:
    """Part C: time and excess of every way to a code, all in turn in each repeat."""
    rows = torch.arange(min(sizes.timed_rows, len(found.v)))
    v, W = found.v[rows].double(), found.W.double()

    def objective(h: Tensor) -> float:
        h = h.double()
        return float(0.5 * (v - h @ W.mT).square().sum() + RATE * h.abs().sum())

    runs = inference(found, sizes)
    least, codes = objective(found.codes[rows]), {label: run(rows) for label, run in runs.items()}
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    singles: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(sizes.repeats):
        for label, run in runs.items():
            seconds[label].append(_seconds(run, rows))
    for row in rows[: sizes.single_rows].split(1):
        for label, run in runs.items():
            singles[label].append(_seconds(run, row))
    return {
        label: Cost(
            objective(codes[label]) / least - 1,
            1e6 * statistics.median(seconds[label]) / len(rows),
            1e6 * statistics.median(singles[label]),
        )
        for label in runs
    }


def _seconds(run: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    begin = time.perf_counter()
    run(rows)
    return time.perf_counter() - begin


def print_costs(costs: Mapping[str, Cost], num_rows: int) -> None:
    """The table of part C."""
    print(f"  {'':26}{'excess':>10}{f'us a code, {num_rows} rows':>24}{'us, one row':>14}")
    for label, cost in costs.items():
        print(f"  {label:26}{cost.excess:10.1e}{cost.batch:24.1f}{cost.single:14.0f}")


NAMES = {"FISTA": "FISTA, iterations", "FISTA to a gap of": "FISTA, to a gap", "LISTA": "LISTA tied, layers"}
"""Kinds whose names in the figure are not their labels."""

LEAST_EXCESS = 1e-8
"""What is below is drawn there."""


def draw_costs(costs: Mapping[str, Cost], num_rows: int) -> Figure:
    """Time against excess, of batches and of single rows."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = ("PSD", "LISTA", "FISTA to a gap of", "FISTA", "FeatureSign", "SpaRSA", "Maximize()")
    groups: dict[str, list[tuple[str, Cost]]] = {kind: [] for kind in kinds}
    for label, cost in costs.items():
        groups[next(kind for kind in kinds if label.startswith(kind))].append((label.split()[-1], cost))
    for ax, field, title in zip(
        figure.subplots(1, 2, sharey=True), ("batch", "single"), (f"{num_rows} rows at once", "one row"), strict=True
    ):
        for kind, marker in zip(kinds, "^ov*sDP", strict=True):
            x = [getattr(cost, field) for _, cost in groups[kind]]
            y = np.maximum([cost.excess for _, cost in groups[kind]], LEAST_EXCESS)
            ax.plot(x, y, marker=marker, label=NAMES.get(kind, kind))
            if kind in ("LISTA", "FISTA"):
                for (text, _), *place in zip(groups[kind], x, y, strict=True):
                    ax.annotate(text, tuple(place), textcoords="offset points", xytext=(4, 4), fontsize=8)
        ax.set(xscale="log", yscale="log", xlabel="microseconds a code", title=title)
    figure.axes[0].set_ylabel("excess over the optimum, relative")
    figure.axes[1].legend(fontsize=8)
    return figure


def main(options: list[str]) -> None:
    """All three parts, and the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks lista", description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="grey images, a .npy file; default: scikit-learn's two photographs")
    parser.add_argument("--figure-folder", type=Path, help="where to save lista_error.png and code_time.png")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of places and of synthetic data (0)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else Sizes()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    images = [whiten(image) for image in load_images(given.path)]
    v = draw_patches(images, sizes.side, sizes.num_atoms + sizes.train + sizes.test, seed=given.seed)
    print(
        f"{machine()}; float32; training: batches of {sizes.batch}, Adam, cosine schedule from {sizes.lr:g} in "
        f"{sizes.epochs} epochs (synthetic: batches of {sizes.synthetic_batch}, {sizes.synthetic_lr:g}, "
        f"{sizes.synthetic_epochs})"
    )
    print(f"Patches {sizes.side} x {sizes.side}: errors on {sizes.test:,} that were held out")
    found = learn_patches(v, sizes)
    print(f"Synthetic, {sizes.shape[0]} x {sizes.shape[1]}, {sizes.synthetic_train:,} training rows")
    synthetic = learn_synthetic(sizes, given.seed)
    num_timed = min(sizes.timed_rows, len(found.v))
    print("Time and excess of codes of patches")
    costs = measure(found, sizes)
    print_costs(costs, num_timed)
    if given.figure_folder is not None:
        given.figure_folder.mkdir(parents=True, exist_ok=True)
        for name, figure in (("lista_error", draw_errors(found)), ("code_time", draw_costs(costs, num_timed))):
            figure.savefig(given.figure_folder / f"{name}.png", dpi=100)
    error = found.errors["LISTA tied", 7]
    print(
        f"lista error7={error:.4f} fista7={found.fista[6]:.4f} synthetic_dB={min(synthetic.values()):.2f} "
        f"seconds={time.perf_counter() - begin:.0f} cpu_seconds={time.process_time() - begin_cpu:.0f}"
    )
