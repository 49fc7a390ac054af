"""Binary sparse coding of image patches by minibatch variational EM: oriented features (Henniges et al., 2010).

Data: the two photographs that scikit-learn ships, grey, pseudo-whitened with the filter f exp(-(f / f_0)^4) of
Olshausen and Field (1996), cut into patches at random places, each with its mean removed and scaled to unit variance.
Patches with little contrast (sky, blur) are left out: once scaled, they are noise of the camera and of the JPEG format.
``--path FILE.npy`` takes other grey images: an array of shape (height, width) or (number, height, width).

Learning is the library's: `BinarySparseCoding` from its own `initialize`, q the `MeanField` guide, damped parallel
sweeps from cold starts, stepwise EM over a DataLoader. A Gabor function is then fitted to every column of W by least
squares (`benchmarks.gabor`), with yardsticks: the same fit to Gaussian noise of the patches' covariance, to principal
components, and to the patches themselves. ``share``, also in the closing line, counts fits with R^2 > 0.5; units that
are hardly ever on are never counted. Two more figures say how much that means. Blobs are Gabor functions, but round:
``selective`` counts only fits whose spectrum favours one orientation (selectivity > 0.5). Gratings that fill the patch
are Gabor functions, too: ``area`` tells how much of the patch a feature w covers, the median of (sum w^2)^2 / (D sum
w^4), 1/3 for white noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compare import machine
from benchmarks.gabor import GaborFit, fit_gabor
from pyro_ext import EM, ClosedForm, EpochEnd, FixedPoint, MeanChange, Parallel, fit
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding
from pyro_ext.plots import image_grid
from pyro_ext.schedules import Schedule

Array = NDArray[np.float64]

LEAST_R2, LEAST_SELECTIVITY, LEAST_USE = 0.5, 0.5, 1e-4
"""From where a fit counts, its orientation counts, and a unit counts as alive: P(h_i = 1) = sigma(b_i)."""


def load_images(path: Path | None = None) -> list[Array]:
    """Grey images, each (height, width): those of a file, or scikit-learn's ``china.jpg`` and ``flower.jpg``."""
    if path is None:
        from sklearn.datasets import load_sample_images

        return [image.astype(np.float64) @ [0.299, 0.587, 0.114] for image in load_sample_images().images]
    images = np.load(path, allow_pickle=False)
    images = images[None] if images.ndim == 2 else images
    if images.ndim != 3 or not np.issubdtype(images.dtype, np.number) or not np.isfinite(images).all():
        raise ValueError(
            "Expected finite numbers of shape (height, width) or (number, height, width), but got "
            f"{images.dtype} of shape {images.shape} in {path}. Average the colours, for example."
        )
    return list(images.astype(np.float64))


def whiten(image: Array, cutoff: float = 0.4) -> Array:
    """Flatten the 1 / f^2 spectrum of natural images up to the cutoff (cycles a pixel), to unit variance."""
    down, across = np.meshgrid(np.fft.fftfreq(image.shape[0]), np.fft.fftfreq(image.shape[1]), indexing="ij")
    frequency = np.hypot(down, across)
    spectrum = np.fft.fft2(image - image.mean()) * frequency * np.exp(-((frequency / cutoff) ** 4))
    flat = np.fft.ifft2(spectrum).real
    return flat / flat.std()


def draw_patches(images: Sequence[Array], side: int, num: int, *, least_contrast: float = 0.3, seed: int = 0) -> Tensor:
    """Patches (num, side^2) of mean 0 and variance 1, float32, from random places, as many from each image.

    Args:
        images: whitened images of unit variance.
        side: pixels of an edge.
        num: patches.
        least_contrast: standard deviation within a patch below which it is left out, above 0.
        seed: of the places.

    Raises:
        ValueError: an image below the patch size; least_contrast not above 0, or so high that too few are left.
    """
    rng = np.random.default_rng(seed)
    if not least_contrast > 0:
        raise ValueError(f"Expected a least contrast above 0, but got {least_contrast}. Flat patches have no features.")
    found = []
    for i, image in enumerate(images):
        if min(image.shape) < side:
            raise ValueError(
                f"Expected images of at least {side} x {side}, but got {image.shape}. Choose a lower side."
            )
        wanted = num // len(images) + (i < num % len(images))
        windows = np.lib.stride_tricks.sliding_window_view(image, (side, side))
        kept = np.empty((0, side * side))
        for _ in range(100):
            if len(kept) >= wanted:
                break
            places = (rng.integers(size, size=4 * wanted) for size in windows.shape[:2])
            patches = windows[tuple(places)].reshape(-1, side * side)
            patches = patches - patches.mean(1, keepdims=True)
            contrast = patches.std(1, keepdims=True)
            kept = np.concatenate([kept, (patches / contrast.clip(least_contrast))[contrast[:, 0] >= least_contrast]])
        if len(kept) < wanted:
            raise ValueError(
                f"Expected {wanted} patches with a contrast above {least_contrast}, but found {len(kept)} in an image "
                f"of shape {image.shape}. Lower it."
            )
        found.append(kept[:wanted])
    return torch.from_numpy(rng.permutation(np.concatenate(found))).float()


@dataclass(frozen=True)
class Learned:
    """What a fit came to.

    Attributes:
        W: features in the columns, (D, H).
        activity: P(h_i = 1) under the prior, (H,).
        noise: standard deviation of the noise; patches have 1.
        losses: -L a patch, mean over each epoch, nats.
        seconds: of the fit.
        cpu_seconds: of the fit, all threads.
    """

    W: Tensor
    activity: Tensor
    noise: float
    losses: list[float]
    seconds: float
    cpu_seconds: float

    @property
    def dead(self) -> Tensor:
        """Units that are hardly ever on, boolean (H,)."""
        return self.activity < LEAST_USE


def learn(
    v: Tensor,
    num_latents: int,
    num_epochs: int,
    *,
    schedule: Schedule | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> Learned:
    """Minibatch variational EM from the model's own start; the sweeps are ``Parallel(0.5)`` where none are given.

    All units of a patch leave the prior together and slowly. In sequential sweeps the first units explain what they can
    of every patch before the later ones are asked, and L ends lower (figures in the documentation).
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = BinarySparseCoding(v.shape[1], num_latents, shared_precision=True)
    model.initialize(v)
    em = EM(
        model,
        MeanField(model),
        e_step=FixedPoint(schedule or Parallel(0.5), MeanChange(0.02), max_sweeps=20),
        m_step=ClosedForm(step_size=lambda t: (t + 2) ** -0.6),
    )
    losses: list[float] = []

    def report(event: EpochEnd) -> None:
        losses.append(event.loss)
        print(f"  epoch {event.epoch}: -L = {event.loss:.3f} nats a patch", flush=True)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    fit(em, DataLoader(v, batch_size=batch_size, shuffle=True), num_epochs, progress=False, callbacks=[report])
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    noise = float(model.beta.detach().rsqrt())
    return Learned(model.W.detach(), model.b.detach().sigmoid(), noise, losses, seconds, cpu_seconds)


@dataclass(frozen=True)
class Fields:
    """Gabor fits of many images.

    Attributes:
        images: one a row, (N, side^2).
        fits: one an image.
        counted: which of them may count, boolean.
    """

    images: Array
    fits: list[GaborFit]
    counted: Array

    @property
    def r2(self) -> Array:
        """R^2 of the fits."""
        return np.array([found.r2 for found in self.fits])

    @property
    def share(self) -> float:
        """Share of all images with R^2 > 0.5."""
        return float(((self.r2 > LEAST_R2) & self.counted).mean())

    @property
    def selective_share(self) -> float:
        """Share of all images with R^2 > 0.5 whose fit has one orientation."""
        selective = np.array([found.selectivity > LEAST_SELECTIVITY for found in self.fits])
        return float(((self.r2 > LEAST_R2) & selective & self.counted).mean())

    @property
    def area(self) -> float:
        """Median share of the pixels that an image covers (participation ratio of its energy)."""
        energy = np.square(self.images)
        return float(np.median(energy.mean(1) ** 2 / np.square(energy).mean(1)))

    def line(self, label: str) -> str:
        """A line of the table."""
        return f"  {label:34}{self.share:9.3f}{self.selective_share:11.3f}{np.median(self.r2):11.3f}{self.area:7.3f}"


def gabor_fields(images: Array, side: int, counted: Array | None = None) -> Fields:
    """Fit a Gabor function to every row, (N, side^2)."""
    counted = np.ones(len(images), dtype=bool) if counted is None else counted
    return Fields(images, [fit_gabor(image.reshape(side, side)) for image in images], counted)


def yardsticks(v: Tensor, side: int, num: int, seed: int = 0) -> dict[str, Array]:
    """What a fit finds where nothing was learned: images (num, side^2) each.

    Principal components are fewer where the patches have fewer pixels than `num`.
    """
    rng = np.random.default_rng(seed)
    covariance = np.cov(v.numpy().astype(np.float64).T)
    values, vectors = np.linalg.eigh(covariance)
    noise = rng.standard_normal((num, len(values))) * np.sqrt(values.clip(0)) @ vectors.T
    return {
        "noise of the patches' covariance": noise,
        "principal components": vectors.T[::-1][: min(num, side * side - 1)],
        "patches": v[:num].numpy().astype(np.float64),
    }


def draw_features(features: Array, fields: Fields, side: int) -> Figure:
    """All features in the order of falling R^2, row by row, each on a grey scale of its own with 0 in the middle."""
    order = np.argsort(-fields.r2, kind="stable")
    shown = features[order] / np.abs(features[order]).max(1, keepdims=True)
    columns = min(16, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(0.55 * columns, 0.55 * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = image_grid(torch.from_numpy(shown), (side, side), figure.add_subplot(), ncols=columns, symmetric=True)
    best, least = fields.r2[order[0]], fields.r2[order[-1]]
    ax.set_title(f"R² of the Gabor fit falls from {best:.2f} (first) to {least:.2f} (last)", fontsize=10)
    return figure


def main(options: list[str]) -> None:
    """Learn, fit and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks patches", description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="grey images, a .npy file; default: scikit-learn's two photographs")
    parser.add_argument("--figure", type=Path, help="where to save the picture of the features")
    parser.add_argument("--side", type=int, default=12, help="pixels of a patch's edge (12)")
    parser.add_argument("--patches", type=int, default=40_000, help="number of patches (40,000)")
    parser.add_argument("--latents", type=int, default=128, help="number of features (128)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the patches (8)")
    parser.add_argument("--least-contrast", type=float, default=0.3, help="of the images' standard deviation (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of places, start and order (0)")
    parser.add_argument("--threads", type=int, default=1, help="more do not help: operations are small (1)")
    given = parser.parse_args(options)

    torch.set_num_threads(given.threads)
    images = [whiten(image) for image in load_images(given.path)]
    v = draw_patches(images, given.side, given.patches, least_contrast=given.least_contrast, seed=given.seed)
    print(f"{machine()}; {len(v):,} patches of {given.side} x {given.side}, {given.latents} latents, float32")
    learned = learn(v, given.latents, given.epochs, seed=given.seed)
    dead = int(learned.dead.sum())
    print(
        f"  {learned.seconds:.1f} s, {learned.cpu_seconds:.1f} s of processor time; noise {learned.noise:.3f}; "
        f"{float(learned.activity.sum()):.1f} units on in a patch, {dead} hardly ever"
    )
    features = learned.W.T.numpy().astype(np.float64)
    fields = gabor_fields(features, given.side, ~learned.dead.numpy())
    print(f"  {'Gabor fit':34}{'share':>9}{'selective':>11}{'median R2':>11}{'area':>7}")
    print(fields.line("features"), flush=True)
    for label, others in yardsticks(v, given.side, given.latents, given.seed).items():
        print(gabor_fields(others, given.side).line(label), flush=True)
    if given.figure is not None:
        given.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_features(features, fields, given.side).savefig(given.figure, dpi=100)
        print(f"  {given.figure}")
    print(f"patches seconds={learned.seconds:.1f} share={fields.share:.3f} latents={given.latents} dead={dead}")
