"""Baum-Welch through the EM driver against hmmlearn, on the same sequences from the same start."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hmmlearn import hmm as peers
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import MeanField
from pyro_ext.models import (
    CategoricalEmission,
    Covariance,
    Diagonal,
    Emission,
    Full,
    GaussianEmission,
    HiddenMarkovModel,
    PoissonEmission,
    Spherical,
    Tied,
    assign_parameters,
    read_parameter,
)

NUM_STEPS, N, T, K, D = 15, 12, 30, 3, 2
STRUCTURES: dict[str, Covariance] = {"diag": Diagonal(), "full": Full(), "spherical": Spherical(), "tied": Tied()}


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def ragged(emission: Emission) -> tuple[HiddenMarkovModel, Tensor, Tensor]:
    """A model at a random start, and sequences of different lengths that another one dreamt."""
    truth = HiddenMarkovModel(K, emission, name="truth")
    sticky = 0.8 * torch.eye(K) + 0.2 * torch.randn(K, K).softmax(-1)
    assign_parameters(truth, {"transition": sticky, "initial": torch.tensor([0.6, 0.3, 0.1])})
    if isinstance(emission, GaussianEmission):
        assign_parameters(truth, {"locs": torch.tensor([[0.0, 0.0], [2.0, -1.0], [-1.0, 2.5]])})
    v, lengths = truth.dream(N, num_steps=T), torch.randint(2, T + 1, (N,))
    lengths[0] = T
    model = HiddenMarkovModel(K, emission)
    model.initialize(v, lengths=lengths)
    start = {"initial": torch.randn(K).softmax(-1), "transition": torch.randn(K, K).softmax(-1)}
    assign_parameters(model, start)
    return model, v, lengths


def own_history(model: HiddenMarkovModel, v: Tensor, lengths: Tensor) -> np.ndarray:
    """log p(v) before each M-step, summed over the sequences."""
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    # What lies beyond a length must not be read.
    v = v.clone()
    v[torch.arange(v.shape[1]) >= lengths[:, None]] = -1 if model.event_dim == 0 else torch.nan
    history = em.run(v, lengths=lengths, max_steps=NUM_STEPS, tolerance=0.0, progress=False)
    assert history.steps == NUM_STEPS
    bounds = [entry.bound for entry in history.ledger]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(bounds))
    return -np.array(history.loss) * len(v)


def peer_history(peer: Any, model: HiddenMarkovModel, v: Tensor, lengths: Tensor) -> np.ndarray:
    peer.startprob_ = read_parameter(model, "initial").numpy()
    peer.transmat_ = read_parameter(model, "transition").numpy()
    steps = torch.cat([row[:length] for row, length in zip(v, lengths.tolist(), strict=True)]).numpy()
    peer.fit(steps if steps.ndim == 2 else steps[:, None], lengths.numpy())
    return np.array(list(peer.monitor_.history))


def agree(model: HiddenMarkovModel, own: np.ndarray, peer: Any, found: np.ndarray) -> None:
    assert len(found) == NUM_STEPS
    assert found[-1] - found[0] > 1
    np.testing.assert_allclose(own, found, rtol=1e-8, atol=0)
    np.testing.assert_allclose(read_parameter(model, "transition").numpy(), peer.transmat_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(read_parameter(model, "initial").numpy(), peer.startprob_, rtol=0, atol=1e-6)


SETTINGS: dict[str, Any] = {"n_iter": NUM_STEPS, "tol": -np.inf, "init_params": "", "implementation": "log"}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gaussian_emissions(structure: str) -> None:
    model, v, lengths = ragged(GaussianEmission(D, STRUCTURES[structure], covariance_floor=0.0))
    peer = peers.GaussianHMM(K, structure, min_covar=0, covars_prior=0, **SETTINGS)
    peer.n_features = D
    peer.means_ = read_parameter(model, "locs").numpy()
    if structure in ("diag", "spherical"):
        peer.covars_ = read_parameter(model, "scale").square().numpy()
    else:
        root = read_parameter(model, "scale_tril")
        peer.covars_ = (root @ root.mT).numpy()
    found = peer_history(peer, model, v, lengths)
    agree(model, own_history(model, v, lengths), peer, found)
    np.testing.assert_allclose(read_parameter(model, "locs").numpy(), peer.means_, rtol=0, atol=1e-6)


def test_categorical_emissions() -> None:
    model, v, lengths = ragged(CategoricalEmission(5))
    peer = peers.CategoricalHMM(K, n_features=5, **SETTINGS)
    peer.emissionprob_ = read_parameter(model, "probs").numpy()
    found = peer_history(peer, model, v, lengths)
    agree(model, own_history(model, v, lengths), peer, found)
    np.testing.assert_allclose(read_parameter(model, "probs").numpy(), peer.emissionprob_, rtol=0, atol=1e-6)


def test_poisson_emissions() -> None:
    model, v, lengths = ragged(PoissonEmission(D))
    peer = peers.PoissonHMM(K, **SETTINGS)
    peer.n_features = D
    peer.lambdas_ = read_parameter(model, "rates").numpy()
    found = peer_history(peer, model, v.long(), lengths)
    agree(model, own_history(model, v, lengths), peer, found)
    np.testing.assert_allclose(read_parameter(model, "rates").numpy(), peer.lambdas_, rtol=0, atol=1e-6)


def test_the_most_probable_path_is_hmmlearns() -> None:
    model, v, lengths = ragged(GaussianEmission(D))
    peer = peers.GaussianHMM(K, "diag", init_params="")
    peer.n_features, peer.means_ = D, read_parameter(model, "locs").numpy()
    peer.startprob_ = read_parameter(model, "initial").numpy()
    peer.transmat_ = read_parameter(model, "transition").numpy()
    peer.covars_ = read_parameter(model, "scale").square().numpy()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    mode = em.infer(v, lengths=lengths)["h"].mode().argmax(-1)
    for row, path, length in zip(v, mode, lengths.tolist(), strict=True):
        np.testing.assert_array_equal(path[:length].numpy(), peer.predict(row[:length].numpy()))
