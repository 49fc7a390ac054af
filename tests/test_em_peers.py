"""The EM driver against a peer library on the same data, from the same start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as PeerMixture

from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import Covariance, GaussianMixture
from tests.models.covariance_structures import PEER_TYPES, covariances_of, peer_precisions, structures

NUM_STEPS = 20


@pytest.mark.parametrize("guide_type", [MeanField, Structured])
@structures
def test_the_likelihood_before_each_m_step_is_scikit_learns(
    float64: None, covariance: Covariance, guide_type: type
) -> None:
    v = torch.randn(600, 3) + 2.5 * torch.randint(4, (600, 1)) * torch.tensor([1.0, -0.5, 0.2]) + 7
    model = GaussianMixture(4, 3, covariance, covariance_floor=0.0)
    model.initialize(v)
    peer = PeerMixture(
        4,
        covariance_type=PEER_TYPES[covariance],
        reg_covar=0.0,
        tol=0.0,
        max_iter=NUM_STEPS,
        weights_init=model.weights.detach().numpy(),
        means_init=model.locs.detach().numpy(),
        precisions_init=peer_precisions(covariance, covariances_of(model)).numpy(),
    )
    with pytest.warns(ConvergenceWarning):
        peer.fit(v.numpy())
    em = EM(model, guide_type(model), e_step=FixedPoint(), m_step=ClosedForm())
    history = em.run(v, max_steps=NUM_STEPS, tolerance=0.0, progress=False)
    assert history.steps == NUM_STEPS
    np.testing.assert_allclose(-np.array(history.loss), np.array(peer.lower_bounds_), rtol=1e-8, atol=0)
    bounds = [entry.bound for entry in history.ledger]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(bounds))
