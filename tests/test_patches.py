"""Must-show: features of image patches, and how well Gabor functions fit them."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from benchmarks import gabor, patches
from benchmarks.__main__ import main

TRUTH = np.array([0.8, -0.6, 5.2, 4.1, math.log(1.8), math.log(2.7), 0.7, 0.19])
"""(a, b, row, column, log s_x, log s_y, theta, f)."""


def test_the_derivatives_of_a_gabor_function_are_its_differences() -> None:
    rows, columns = (x.ravel().astype(float) for x in np.indices((9, 11)))
    derivatives = gabor._values(TRUTH, rows, columns)[1]
    for i, step in enumerate(1e-6 * np.eye(8)):
        there, back = (gabor._values(TRUTH + sign * step, rows, columns)[0] for sign in (1, -1))
        np.testing.assert_allclose(derivatives[:, i], (there - back) / 2e-6, atol=1e-8)


def test_a_gabor_function_is_recovered_whatever_its_scale() -> None:
    for scale in (1.0, 1e-4, 1e3):
        found = gabor.fit_gabor(scale * gabor.gabor(TRUTH, (12, 12)))
        assert found.r2 > 1 - 1e-6
        np.testing.assert_allclose(found.centre, TRUTH[2:4], atol=1e-2)
        np.testing.assert_allclose(found.widths, np.exp(TRUTH[4:6]), rtol=1e-2)
        assert found.orientation == pytest.approx(TRUTH[6], abs=1e-2)
        assert found.frequency == pytest.approx(TRUTH[7], abs=1e-3)


def test_gabor_functions_in_noise_are_found_from_every_orientation() -> None:
    rng = np.random.default_rng(0)
    for theta in np.linspace(0, math.pi, 5)[:-1]:
        clean = gabor.gabor(np.array([*TRUTH[:6], theta, TRUTH[7]]), (12, 12))
        noise = rng.standard_normal(clean.shape) * clean.std() / 3
        found = gabor.fit_gabor(clean + noise)
        # The clean image explains 0.9 of the variance, less or more by the noise drawn; a fit is at least as good.
        least = 1 - noise.var() * noise.size / np.square(clean + noise - (clean + noise).mean()).sum()
        assert least - 0.02 < found.r2 < 0.99
        assert abs(math.remainder(found.orientation - theta, math.pi)) < 0.15
        assert 0 <= found.orientation < math.pi
        assert found.selectivity > 0.5


def test_white_noise_and_constants_are_no_gabor_functions() -> None:
    rng = np.random.default_rng(1)
    r2 = [gabor.fit_gabor(image).r2 for image in rng.standard_normal((6, 12, 12))]
    assert max(r2) < 0.35
    assert min(r2) > 0, "a Gabor function explains something of everything"
    assert gabor.fit_gabor(np.ones((12, 12))).r2 == 0


def test_selectivity_tells_a_grating_from_a_blob() -> None:
    rows, columns = np.indices((12, 12)) - 5.5
    blob = np.exp(-(rows**2 + columns**2) / 8)
    assert gabor.selectivity(blob) < 1e-6
    for theta in (0.0, 0.4, math.pi / 2, 2.5):
        grating = np.cos(2 * math.pi * 0.25 * (columns * math.cos(theta) + rows * math.sin(theta)))
        assert gabor.selectivity(grating) > 0.8
    assert gabor.selectivity(blob + blob.T * np.cos(rows)) > gabor.selectivity(blob)
    assert gabor.selectivity(np.zeros((4, 4))) == 0


def test_whitening_is_the_filter_of_olshausen_and_field() -> None:
    image = 5 + 3 * np.random.default_rng(2).standard_normal((24, 31))
    flat = patches.whiten(image)
    assert flat.std() == pytest.approx(1)
    frequency = np.hypot(np.fft.fftfreq(24)[:, None], np.fft.fftfreq(31))
    gain = frequency * np.exp(-((frequency / 0.4) ** 4))
    expected = np.fft.ifft2(np.fft.fft2(image) * gain).real
    np.testing.assert_allclose(flat, expected / expected.std(), atol=1e-10)
    assert frequency.ravel()[gain.argmax()] == pytest.approx(0.4 / 4**0.25, abs=0.02), "where the filter is largest"


def test_patches_have_mean_0_and_variance_1_and_come_from_every_image() -> None:
    rng = np.random.default_rng(3)
    images = [rng.standard_normal((30, 40)), np.tile([1.0, -1.0], (30, 20))]
    v = patches.draw_patches(images, 6, 101)
    assert v.shape == (101, 36)
    torch.testing.assert_close(v.mean(1), torch.zeros(101), atol=1e-5, rtol=0)
    torch.testing.assert_close(v.square().mean(1), torch.ones(101))
    assert int((v.abs() - 1).abs().amax(1).lt(1e-5).sum()) == 50
    assert torch.equal(v, patches.draw_patches(images, 6, 101))
    assert not torch.equal(v, patches.draw_patches(images, 6, 101, seed=1))


def test_flat_patches_are_left_out() -> None:
    image = np.full((40, 40), 1e-3) * np.random.default_rng(4).standard_normal((40, 40))
    image[:20] *= 1e3
    v = patches.draw_patches([image], 4, 200, least_contrast=0.2)
    assert v.square().mean(1).min() > 0.99
    with pytest.raises(ValueError, match="Expected 10 patches with a contrast above 9, but found 0"):
        patches.draw_patches([image], 4, 10, least_contrast=9)
    with pytest.raises(ValueError, match="Expected a least contrast above 0"):
        patches.draw_patches([image], 4, 10, least_contrast=0)
    with pytest.raises(ValueError, match="Expected images of at least 50 x 50"):
        patches.draw_patches([image], 50, 10)


def test_a_file_of_images_is_read(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "two.npy", images)
    assert [image.tolist() for image in patches.load_images(tmp_path / "two.npy")] == images.tolist()
    np.save(tmp_path / "one.npy", images[0])
    assert len(patches.load_images(tmp_path / "one.npy")) == 1
    for bad in (np.zeros((2, 3, 4, 3)), np.full((3, 4), np.nan), np.full((3, 4), "x")):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match="Expected finite numbers of shape"):
            patches.load_images(tmp_path / "bad.npy")


def test_dead_units_and_blobs_are_counted_as_they_should() -> None:
    clean = gabor.gabor(TRUTH, (12, 12)).ravel()
    blob = gabor.gabor(np.array([1.0, 0.0, 5.5, 5.5, 0.7, 0.7, 0.0, 0.0]), (12, 12)).ravel()
    fields = patches.gabor_fields(np.stack([clean, clean, blob, clean]), 12)
    assert (fields.share, fields.selective_share) == (1, 0.75)
    dead = patches.Fields(fields.images, fields.fits, np.array([True, False, True, True]))
    assert (dead.share, dead.selective_share) == (0.75, 0.5)
    learned = patches.Learned(torch.ones(1, 3), torch.tensor([0.2, 1e-6, 1e-2]), 1.0, [], 0.0, 0.0)
    assert learned.dead.tolist() == [False, True, False]


def test_area_is_the_share_of_pixels_that_images_cover() -> None:
    images = np.zeros((3, 16))
    images[0, 3], images[1, :4], images[2] = 2.0, -1.0, 5.0
    assert patches.Fields(images, [], np.ones(3)).area == pytest.approx(4 / 16)
    white = np.random.default_rng(8).standard_normal((400, 144))
    assert patches.Fields(white, [], np.ones(400)).area == pytest.approx(1 / 3, abs=0.02)


def test_yardsticks_have_the_statistics_of_the_patches() -> None:
    rng = np.random.default_rng(9)
    scales = np.array([0.5, 3.0, 1.0, 2.0])
    v = torch.from_numpy(rng.standard_normal((5000, 4)) * scales)
    found = patches.yardsticks(v, 2, 4000)
    # k = 5 standard errors of a standard deviation, of the patches and of the noise.
    np.testing.assert_allclose(found["noise of the patches' covariance"].std(0) / scales, 1, atol=5 * 0.015)
    components = np.abs(found["principal components"])
    assert components.argmax(1).tolist() == [1, 3, 2], "largest first, without that of the mean, which is 0 in patches"
    torch.testing.assert_close(torch.from_numpy(found["patches"]), v[:4000])


def test_gabor_functions_in_noise_are_learned(capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline on data whose features are known: Gabor functions, each present or absent."""
    rng = np.random.default_rng(5)
    truth = np.stack(
        [
            gabor.gabor(np.array([4.0, 0.0, *rng.uniform(2, 5, 2), 0.4, 0.8, theta, 0.2]), (8, 8)).ravel()
            for theta in np.linspace(0, math.pi, 6, endpoint=False)
        ]
    )
    present = rng.random((4000, 6)) < 0.2
    v = torch.from_numpy(present @ truth + 0.5 * rng.standard_normal((4000, 64))).float()
    # From other starts mean field may merge two of the features: a local optimum, 5 nats a patch lower.
    learned = patches.learn(v, 6, 4, batch_size=200, seed=2)
    fields = patches.gabor_fields(learned.W.T.numpy().astype(float), 8, ~learned.dead.numpy())
    assert fields.share == fields.selective_share == 1
    assert learned.noise == pytest.approx(0.5, rel=0.05)
    assert learned.losses[-1] < learned.losses[0]
    closest = np.corrcoef(truth, learned.W.T)[:6, 6:].max(1)
    assert closest.min() > 0.95, "every feature is found"
    assert "epoch 4" in capsys.readouterr().out


def test_the_benchmark_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    image, figure = tmp_path / "images.npy", tmp_path / "new" / "features.png"
    np.save(image, rng.standard_normal((40, 50)).cumsum(0).cumsum(1))
    threads = torch.get_num_threads()
    options = ["--path", image, "--figure", figure, "--side", 6, "--patches", 600, "--latents", 4, "--epochs", 1]
    try:
        assert main(["patches", *map(str, options)]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("patches seconds=")
    assert "latents=4 dead=" in lines[-1]
    for label in ("features", "noise of the patches' covariance", "principal components", "patches"):
        assert any(line.strip().startswith(label) for line in lines)
    assert plt.imread(figure).shape[2] == 4
    assert not plt.get_fignums()


def test_features_are_drawn_by_falling_r2() -> None:
    noise, clean = np.random.default_rng(7).standard_normal((12, 12)), gabor.gabor(TRUTH, (12, 12))
    features = np.stack([noise.ravel(), 1e-3 * clean.ravel()])
    figure = patches.draw_features(features, patches.gabor_fields(features, 12), 12)
    (drawn,) = figure.axes[0].get_images()
    mosaic = np.asarray(drawn.get_array())
    np.testing.assert_allclose(mosaic[1:13, 1:13], clean / np.abs(clean).max())
    np.testing.assert_allclose(mosaic[1:13, 14:26], noise / np.abs(noise).max())
