from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_ext.models import (
    BernoulliEmission,
    CategoricalEmission,
    Diagonal,
    Emission,
    Full,
    GaussianEmission,
    HiddenMarkovModel,
    PoissonEmission,
    Spherical,
    Tied,
    read_parameter,
)
from pyro_ext.models.unread import Unread

K, D, M = 3, 2, 40
FAMILIES: list[Emission] = [
    GaussianEmission(D),
    GaussianEmission(D, Full()),
    CategoricalEmission(4),
    BernoulliEmission(D),
    PoissonEmission(D),
    GaussianEmission(D, Spherical()),
    GaussianEmission(D, Tied()),
]
NAMES = ["diagonal", "full", "categorical", "bernoulli", "poisson", "spherical", "tied"]
families = pytest.mark.parametrize("emission", FAMILIES, ids=NAMES)


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def covariances_of(model: HiddenMarkovModel) -> Tensor:
    """Covariances (K, D, D) of a Gaussian emission."""
    covariance = model.emission.covariance
    if isinstance(covariance, Full | Tied):
        return (model.scale_tril @ model.scale_tril.mT).expand(model.num_states, D, D)
    if isinstance(covariance, Spherical):
        return torch.stack([scale.square() * torch.eye(D) for scale in model.scale])
    return model.scale.square().diag_embed()


def step_log_probs(model: HiddenMarkovModel, v: Tensor) -> Tensor:
    """log p(v_t | k) for steps v (M,) + event, by torch's own densities, state by state; shape (M, K)."""
    emission = model.emission
    columns = []
    for k in range(model.num_states):
        if isinstance(emission, GaussianEmission):
            fn = torch.distributions.MultivariateNormal(model.locs[k], covariances_of(model)[k])
            columns.append(fn.log_prob(v))
        elif isinstance(emission, CategoricalEmission):
            columns.append(torch.distributions.Categorical(model.probs[k]).log_prob(v))
        elif isinstance(emission, BernoulliEmission):
            columns.append(torch.distributions.Bernoulli(logits=model.logits[k]).log_prob(v).sum(-1))
        else:
            columns.append(torch.distributions.Poisson(model.rates[k]).log_prob(v).sum(-1))
    return torch.stack(columns, -1)


def random_hmm(emission: Emission, num_states: int = K, **kwargs: float) -> HiddenMarkovModel:
    model = HiddenMarkovModel(num_states, emission, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


@families
def test_densities(emission: Emission) -> None:
    model = random_hmm(emission)
    v = model.dream(1, M)[0]
    found = emission.components(model).log_prob(v)
    torch.testing.assert_close(found, step_log_probs(model, v), rtol=1e-12, atol=1e-12)


@families
def test_log_prob_is_linear_in_the_choice(emission: Emission) -> None:
    model = random_hmm(emission)
    v = model.dream(1, M)[0]
    h = torch.rand(M, K)
    found = emission.distribution(h, emission.components(model)).log_prob(v)
    torch.testing.assert_close(found, (h * step_log_probs(model, v)).sum(-1), rtol=1e-12, atol=1e-12)


@families
def test_values_behind_a_mask_reach_no_gradient(emission: Emission) -> None:
    model = random_hmm(emission)
    v = model.dream(1, M)[0]
    mask = torch.arange(M) % 3 != 0
    bad = v.clone()
    bad[~mask] = -7 if emission.width is None else math.nan
    h = torch.rand(M, K, requires_grad=True)
    fn = Unread(emission.distribution(h, emission.components(model)), mask)
    found = fn.expand((2, M)).log_prob(bad)[1]
    torch.testing.assert_close(found, mask * (h * step_log_probs(model, v)).sum(-1), rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(found.sum(), [h, *model.parameters()], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@families
def test_draws_follow_the_chosen_component(emission: Emission) -> None:
    model, n = random_hmm(emission), 20_000
    h = torch.eye(K)
    fn = emission.distribution(h, emission.components(model))
    draws = fn.sample((n,))
    assert draws.shape == (n, K) + fn.event_shape
    assert fn.support.check(draws).all()
    if isinstance(emission, CategoricalEmission):
        draws = torch.eye(emission.num_categories)[draws]
        mean = read_parameter(model, "probs")
    elif isinstance(emission, BernoulliEmission):
        mean = read_parameter(model, "logits").sigmoid()
    elif isinstance(emission, PoissonEmission):
        mean = read_parameter(model, "rates")
        second = mean.square() + mean
        error = draws.square().std(0) / n**0.5
        assert ((draws.square().mean(0) - second).abs() < 5 * error).all()
    else:
        mean = read_parameter(model, "locs")
        products = (draws - mean).unsqueeze(-1) * (draws - mean).unsqueeze(-2)
        error = products.std(0) / n**0.5
        assert ((products.mean(0) - covariances_of(model).detach()).abs() < 5 * error).all()
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / n**0.5).all()


def test_statistics_by_hand() -> None:
    r = torch.rand(M, K)
    model = random_hmm(CategoricalEmission(4))
    v = torch.randint(3, (M,))
    counts = model.emission.statistics(model, v, r)["categories"]
    by_hand = torch.stack([r[v == c].sum(0) for c in range(4)], -1)
    torch.testing.assert_close(counts, by_hand)
    x = torch.randn(M, D) + 3
    model = random_hmm(GaussianEmission(D, Full()))
    model.shift.fill_(2.0)
    found = model.emission.statistics(model, x, r)
    torch.testing.assert_close(found["sum"], torch.einsum("mk,md->kd", r, x - 2))
    torch.testing.assert_close(found["second"], torch.einsum("mk,md,me->kde", r, x - 2, x - 2))


def test_starts_of_the_counts_stay_near_the_data_mean() -> None:
    v = torch.poisson(torch.tensor([2.0, 9.0]).expand(500, 2))
    model = HiddenMarkovModel(200, PoissonEmission(2))
    ratio = (model.emission.initialize(model, v, 200)["rates"] / v.mean(0)).log()
    # The logs are N(0, 1/4) around the mean's: 5 standard errors of mean and deviation over 400 draws.
    assert ratio.mean().abs() < 5 * 0.5 / 20
    assert abs(ratio.std() - 0.5) < 5 * 0.5 / 20 / 2**0.5
    v = (torch.rand(500, 2) < torch.tensor([0.2, 0.7])).double()
    model = HiddenMarkovModel(200, BernoulliEmission(2))
    centre = ((v.sum(0) + 1) / 502).logit()
    noise = model.emission.initialize(model, v, 200)["logits"] - centre
    assert noise.mean().abs() < 5 * 0.5 / 20
    assert abs(noise.std() - 0.5) < 5 * 0.5 / 20 / 2**0.5
    v = torch.randint(3, (500,))
    model = HiddenMarkovModel(200, CategoricalEmission(4))
    probs = model.emission.initialize(model, v, 200)["probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(200))
    assert 0 < probs[:, 3].max() < 0.02
    assert ((probs[:, :3].mean(0) - 1 / 3).abs() < 0.05).all()
    assert probs[:, 0].std() > 0.05


def test_starts_of_constant_columns_keep_the_floors() -> None:
    v = torch.zeros(10, 2)
    model = HiddenMarkovModel(2, PoissonEmission(2, rate_floor=0.125))
    assert (model.emission.initialize(model, v, 2)["rates"] == 0.125).all()
    model = HiddenMarkovModel(2, GaussianEmission(2, covariance_floor=0.0))
    message = "Expected every column to vary around the means, but got no variance in column 1. Leave it out, or pass"
    v[:, 0] = torch.arange(10.0)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.emission.initialize(model, v, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GaussianEmission(0), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: GaussianEmission(2, "full"), TypeError, "Expected a covariance structure, but got 'full'. Pass Dia"),
        (lambda: GaussianEmission(2, Diagonal(), -1), ValueError, "Expected covariance_floor >= 0, but got -1."),
        (lambda: CategoricalEmission(1), ValueError, "Expected num_categories >= 2, but got 1. A single category"),
        (lambda: CategoricalEmission(2.0), TypeError, "Expected num_categories to be an int, but got 2.0 of type"),
        (
            lambda: CategoricalEmission(4, 0.3),
            ValueError,
            "Expected probability_floor in (0, 1/4), for 4 probabilities",
        ),
        (lambda: BernoulliEmission(0), ValueError, "Expected num_visible >= 1, but got 0."),
        (lambda: BernoulliEmission(2, 0.5), ValueError, "Expected probability_floor in (0, 1/2), for 2 probabilities"),
        (lambda: PoissonEmission(-2), ValueError, "Expected num_visible >= 1, but got -2."),
        (lambda: PoissonEmission(2, 0.0), ValueError, "Expected rate_floor > 0, but got 0.0. Pass 1e-10, say."),
    ],
)
def test_refusals_of_the_constructors(build: Callable[[], Emission], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


def good(emission: Emission) -> Tensor:
    return random_hmm(emission, name="source").dream(4, 5)


def spoilt(emission: Emission, value: float) -> Tensor:
    v = good(emission)
    v[2, 3] = value
    return v


@pytest.mark.parametrize(
    ("emission", "make", "error", "message"),
    [
        (
            FAMILIES[0],
            lambda e: good(e)[0],
            ValueError,
            "Expected v of shape (N, T, 2), but got (5, 2). Add the missing",
        ),
        (
            FAMILIES[0],
            lambda e: good(e).float(),
            TypeError,
            "Expected v of dtype torch.float64, that of the parameters",
        ),
        (FAMILIES[0], lambda e: good(e).numpy(), TypeError, "Expected v to be a torch.Tensor, but got ndarray."),
        (
            FAMILIES[0],
            lambda e: good(e)[:, :0],
            ValueError,
            "Expected sequences of at least one step, but got shape (4,",
        ),
        (FAMILIES[0], lambda e: good(e)[:0], ValueError, "Expected at least one row in v, but got shape (0, 5, 2)."),
        (
            FAMILIES[0],
            lambda e: spoilt(e, math.nan),
            ValueError,
            "finite values in v, but got 2 NaN or infinite, the f",
        ),
        (FAMILIES[2], lambda e: good(e).double(), TypeError, "Expected v of an integer dtype, but got torch.float64."),
        (
            FAMILIES[2],
            lambda e: good(e).tolist(),
            TypeError,
            "Expected v to be a tensor of sequences padded to the same number of steps, but got a list. Write",
        ),
        (
            FAMILIES[2],
            lambda e: good(e)[0],
            ValueError,
            "Expected v of shape (N, T) with at least one step, but got (5,",
        ),
        (
            FAMILIES[2],
            lambda e: good(e)[:, :0],
            ValueError,
            "Expected v of shape (N, T) with at least one step, but got",
        ),
        (
            FAMILIES[2],
            lambda e: spoilt(e, 4),
            ValueError,
            "Expected categories in 0..3, but got 4 at (2, 3) (1 such valu",
        ),
        (
            FAMILIES[2],
            lambda e: spoilt(e, -1),
            ValueError,
            "Expected categories in 0..3, but got -1 at (2, 3) (1 such va",
        ),
        (
            FAMILIES[3],
            lambda e: spoilt(e, 0.5),
            ValueError,
            "Expected only 0 and 1 in v, but got 2 other values, the fir",
        ),
        (
            FAMILIES[4],
            lambda e: spoilt(e, 1.5),
            ValueError,
            "Expected counts 0, 1, 2, ... in v, but got 1.5 at (2, 3, 0)",
        ),
        (
            FAMILIES[4],
            lambda e: spoilt(e, -1),
            ValueError,
            "Expected counts 0, 1, 2, ... in v, but got -1 at (2, 3, 0)",
        ),
        (
            FAMILIES[4],
            lambda e: spoilt(e, math.inf),
            ValueError,
            "Expected finite values in v, but got 2 NaN or infini",
        ),
    ],
)
def test_refusals_of_data(
    emission: Emission, make: Callable[[Emission], object], error: type[Exception], message: str
) -> None:
    model = random_hmm(emission)
    v = make(emission)
    with pytest.raises(error, match=re.escape(message)):
        model.check_data(v)
    if message.startswith(("Expected finite", "finite", "Expected cat", "Expected only", "Expected counts")):
        hidden = torch.ones(4, 5, dtype=torch.bool)
        hidden[2, 3] = False
        model.check_data(v, mask=hidden)
        model.check_data(v, lengths=torch.tensor([5, 5, 3, 5]))
