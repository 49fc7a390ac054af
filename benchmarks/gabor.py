"""Two-dimensional Gabor functions, and how well one fits an image.

    g(x, y) = exp(-x'^2 / 2 s_x^2 - y'^2 / 2 s_y^2) (a cos(2 pi f x') + b sin(2 pi f x')),

with (x', y') the pixel seen from the centre, turned by theta: amplitude and phase are those of a + ib. The model of
simple cells in Jones and Palmer (1987) and Ringach (2002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaborFit:
    """The least-squares Gabor function of an image.

    Attributes:
        r2: 1 - SSE / SST, SST about the image's mean; may be below 0. 0 for a constant image.
        image: the fitted function, shape of the image.
        centre: (row, column), pixels.
        widths: (s_x, s_y) across and along the stripes, pixels.
        orientation: theta in [0, pi), of the direction across the stripes, from the columns' axis towards the rows'.
        frequency: f, cycles a pixel.
        selectivity: |sum_k P(k) exp(2 i angle(k))| / sum_k P(k) over the power spectrum P of the fit: 0 for a round
            blob, 1 for a grating (the orientation index of Ringach et al., 2002).
    """

    r2: float
    image: Array
    centre: tuple[float, float]
    widths: tuple[float, float]
    orientation: float
    frequency: float
    selectivity: float


def gabor(parameters: Array, shape: tuple[int, int]) -> Array:
    """The function at all pixels; parameters (a, b, row, column, log s_x, log s_y, theta, f)."""
    return _values(parameters, *_pixels(shape))[0].reshape(shape)


def fit_gabor(image: Array) -> GaborFit:
    """Least squares from several starts: peaks of the spectrum, two centres, two widths; the best is kept.

    Centres stay inside the image, widths between half a pixel and its longer side, frequencies at most 1/2.
    """
    image = np.asarray(image, dtype=np.float64)
    shape = (image.shape[0], image.shape[1])
    total = float(np.square(image - image.mean()).sum())
    if total == 0:
        nothing = np.zeros(shape)
        return GaborFit(0.0, nothing, (0.0, 0.0), (1.0, 1.0), 0.0, 0.0, 0.0)
    # The scale is divided out: tolerances are relative to a field of about 1 a pixel.
    scale = math.sqrt(total / image.size)
    target, (rows, columns), longest = (image / scale).ravel(), _pixels(shape), max(shape)
    low = np.array([-np.inf, -np.inf, -0.5, -0.5, math.log(0.5), math.log(0.5), -np.inf, 0.0])
    high = np.array([np.inf, np.inf, shape[0] - 0.5, shape[1] - 0.5, math.log(longest), math.log(longest), np.inf, 0.5])

    def improved(start: Array, max_nfev: int) -> tuple[float, Array]:
        found = least_squares(
            lambda p: _values(p, rows, columns)[0] - target,
            np.clip(start, low + 1e-3, high - 1e-3),
            jac=lambda p: _values(p, rows, columns)[1],
            bounds=(low, high),
            max_nfev=max_nfev,
            ftol=1e-6,
            xtol=1e-6,
        )
        return 2 * float(found.cost), found.x

    # A few steps tell which starts are worth many.
    tried = sorted((improved(start, 12) for start in _starts(image / scale)), key=lambda pair: pair[0])
    least, best = min((improved(start, 100) for _, start in tried[:2]), key=lambda pair: pair[0])
    fitted = scale * gabor(best, shape)
    return GaborFit(
        r2=1 - least * scale**2 / total,
        image=fitted,
        centre=(float(best[2]), float(best[3])),
        widths=(float(np.exp(best[4])), float(np.exp(best[5]))),
        orientation=float(best[6] % math.pi),
        frequency=float(best[7]),
        selectivity=selectivity(fitted),
    )


def selectivity(image: Array) -> float:
    """How far the power of an image lies in one orientation: 0 for none, 1 for one alone."""
    power, down, across = _spectrum(image)
    angle = np.arctan2(down, across)
    # The mean of an image has no orientation; where that is all, the image is as round as can be.
    turning = abs(float((power * np.cos(2 * angle)).sum()) + 1j * float((power * np.sin(2 * angle)).sum()))
    return turning / max(float(power.sum()), np.finfo(np.float64).tiny)


def _pixels(shape: tuple[int, int]) -> tuple[Array, Array]:
    rows, columns = np.indices(shape, dtype=np.float64)
    return rows.ravel(), columns.ravel()


def _values(parameters: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    """The function at all pixels ``(D,)``, and its derivatives ``(D, 8)``."""
    a, b, row, column, log_x, log_y, theta, frequency = parameters
    down, right, cos, sin = rows - row, columns - column, math.cos(theta), math.sin(theta)
    x, y = right * cos + down * sin, down * cos - right * sin
    narrow_x, narrow_y = math.exp(-2 * log_x), math.exp(-2 * log_y)
    envelope = np.exp(-0.5 * (narrow_x * x**2 + narrow_y * y**2))
    phase = 2 * math.pi * frequency * x
    even, odd = envelope * np.cos(phase), envelope * np.sin(phase)
    value, turned = a * even + b * odd, b * even - a * odd
    by_x = 2 * math.pi * frequency * turned - narrow_x * x * value
    by_y = -narrow_y * y * value
    derivatives = (
        even,
        odd,
        -(by_x * sin + by_y * cos),
        -(by_x * cos - by_y * sin),
        narrow_x * x**2 * value,
        narrow_y * y**2 * value,
        by_x * y - by_y * x,
        2 * math.pi * x * turned,
    )
    return value, np.stack(derivatives, -1)


def _spectrum(image: Array, size: int = 32) -> tuple[Array, Array, Array]:
    """Power without the mean's, and the frequencies down and across."""
    padded = (max(size, 2 * image.shape[0]), max(size, 2 * image.shape[1]))
    power = np.abs(np.fft.fft2(image, padded)) ** 2
    power[0, 0] = 0
    down, across = np.meshgrid(np.fft.fftfreq(padded[0]), np.fft.fftfreq(padded[1]), indexing="ij")
    return power, down, across


def _starts(image: Array, num_peaks: int = 2) -> list[Array]:
    """Parameters to start from, with the best a and b for the rest."""
    shape = (image.shape[0], image.shape[1])
    (rows, columns), energy = _pixels(shape), np.square(image).ravel()
    loudest = int(energy.argmax())
    centres = [
        (float(rows @ energy / energy.sum()), float(columns @ energy / energy.sum())),
        (float(rows[loudest]), float(columns[loudest])),
    ]
    power, down, across = _spectrum(image - image.mean())
    starts = []
    for _ in range(num_peaks):
        peak = np.unravel_index(int(power.argmax()), power.shape)
        frequency = math.hypot(down[peak], across[peak])
        theta = math.atan2(down[peak], across[peak])
        for row, column in centres:
            for width in (max(shape) / 8, max(shape) / 4):
                rest = [row, column, math.log(width), math.log(width), theta, min(frequency, 0.5)]
                slopes = _values(np.array([1.0, 0.0, *rest]), rows, columns)[1][:, :2]
                starts.append(np.array([*np.linalg.lstsq(slopes, image.ravel(), rcond=None)[0], *rest]))
        near = np.hypot(down - down[peak], across - across[peak]) < 1 / max(shape)
        opposite = np.hypot(down + down[peak], across + across[peak]) < 1 / max(shape)
        power = np.where(near | opposite, 0.0, power)
    return starts
