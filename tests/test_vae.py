"""The variational autoencoder in both forms of the textbooks, and the benchmarks on it."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from benchmarks import gradient_variance, vae
from benchmarks.gradient_variance import ESTIMATORS, estimates, named, spread
from benchmarks.vae import LOSSES, VAE, reconstruction_alone
from pyro_ext import elbo_terms
from pyro_ext.guides import Amortized

K = 5.0
"""Standard errors that a sampled number may be off."""

NOISE = 0.6


class Linear(nn.Module):
    """p(h) = N(0, I), p(v | h) = N(W h + b, NOISE^2): everything is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def forward(self, v: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(self.decoder(h), NOISE).to_event(1), obs=v)


def linear() -> tuple[Linear, nn.Linear, Amortized, Tensor]:
    """Model, network, guide and four rows."""
    model, network, v = Linear(), nn.Linear(3, 4), torch.randn(4, 3)
    with torch.no_grad():
        network.bias[2:] -= 0.5
    guide = Amortized(model, encoder=network)
    guide.setup(v)
    return model, network, guide, v


def closed_form(model: Linear, network: nn.Linear, v: Tensor) -> tuple[Tensor, Tensor]:
    """E_q[log p(v | h)] and KL(q || p(h)) of each row."""
    loc, log_scale = network(v).split(2, -1)
    variance = (2 * log_scale).exp()
    W, b = model.decoder.weight, model.decoder.bias
    squares = (v - loc @ W.T - b).square().sum(-1) + (variance @ W.square().T).sum(-1)
    reconstruction = -squares / (2 * NOISE**2) - 1.5 * math.log(2 * math.pi * NOISE**2)
    return reconstruction, 0.5 * (variance + loc**2 - 1 - 2 * log_scale).sum(-1)


def gradient(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
    return {name: g.reshape(-1) for name, g in zip(parameters, zeros, strict=True)}


def check_mean(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """k standard errors for every coordinate."""
    for name, grads in found.items():
        error = grads.std(0) / math.sqrt(len(grads))
        assert ((grads.mean(0) - expected[name]).abs() <= K * error + 1e-12).all(), name


@pytest.mark.usefixtures("float64")
class TestLinearAutoencoder:
    def test_terms_are_those_of_the_closed_form(self) -> None:
        model, network, guide, v = linear()
        reconstruction, kl = (x.detach() for x in closed_form(model, network, v))
        terms = elbo_terms(model, guide, v)
        assert terms.exact
        torch.testing.assert_close(terms.expected_log_likelihood, reconstruction)
        torch.testing.assert_close(terms.kl, {"h": kl})
        torch.testing.assert_close(terms.bound, reconstruction - kl)

    @pytest.mark.parametrize("label", ["L by samples", "reconstruction - KL"])
    def test_both_forms_have_the_bound_as_their_mean(self, label: str) -> None:
        model, network, guide, v = linear()
        reconstruction, kl = closed_form(model, network, v)
        loss: Any = LOSSES[label]()
        losses = torch.tensor([loss.loss(model, guide, v) for _ in range(400)])
        assert abs(losses.mean() - (kl - reconstruction).sum().item()) <= K * losses.std() / 20

    def test_at_the_posterior_only_the_form_by_samples_has_no_variance(self) -> None:
        model, network, guide, v = linear()
        with torch.no_grad():
            # Orthogonal columns: the posterior is a product of Gaussians.
            W = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]) @ torch.tensor([[1.0, -0.5], [0.0, 1.0]])
            precision = (W.T @ W) / NOISE**2 + torch.eye(2)
            assert precision[0, 1].abs() < 1e-12
            model.decoder.weight.copy_(W)
            A = torch.linalg.inv(precision) @ W.T / NOISE**2
            network.weight.copy_(torch.cat([A, torch.zeros(2, 3)]))
            network.bias.copy_(torch.cat([-A @ model.decoder.bias, -0.5 * precision.diagonal().log()]))
        forms = [LOSSES[label]() for label in ("L by samples", "reconstruction - KL")]
        sampled, closed = ([form.loss(model, guide, v) for _ in range(20)] for form in forms)
        covariance = W @ W.T + NOISE**2 * torch.eye(3)
        log_p = dist.MultivariateNormal(model.decoder.bias.detach(), covariance).log_prob(v).sum().item()
        assert sampled == pytest.approx([-log_p] * 20, abs=1e-10)
        assert np.std(closed) > 0.1

    @pytest.mark.parametrize("label", [label for label, e in ESTIMATORS.items() if e.follows_bound])
    def test_every_estimator_of_the_bound_has_its_gradient_as_mean(self, label: str) -> None:
        model, network, guide, v = linear()
        parameters = named(model, network)  # pyright: ignore[reportArgumentType]
        reconstruction, kl = closed_form(model, network, v)
        expected = gradient((kl - reconstruction).mean(), parameters)
        found = estimates(ESTIMATORS[label], model, guide, parameters, v, 200, settle=20)
        check_mean(found, expected)
        assert all(len(grads) == 200 for grads in found.values())
        assert all(parameter.grad is None for parameter in parameters.values())

    def test_wake_theta_of_one_sample_is_that_of_the_bound(self) -> None:
        model, network, guide, v = linear()
        parameters = named(model, network)  # pyright: ignore[reportArgumentType]
        reconstruction, kl = closed_form(model, network, v)
        expected = gradient((kl - reconstruction).mean(), parameters)
        found = estimates(ESTIMATORS["wake (K = 1), sleep-phi"], model, guide, parameters, v, 300)
        check_mean({n: g for n, g in found.items() if n.startswith("decoder")}, expected)
        phi = torch.cat([g for n, g in found.items() if n.startswith("encoder")], -1)
        aim = torch.cat([g for n, g in expected.items() if n.startswith("encoder")])
        away = (phi.mean(0) - aim).abs() / (phi.std(0) / math.sqrt(300))
        assert away.max() > 10, "phi follows another aim"

    def test_the_score_function_has_the_larger_variance(self) -> None:
        model, network, guide, v = linear()
        parameters = named(model, network)  # pyright: ignore[reportArgumentType]
        found = {
            label: spread(
                [g for n, g in estimates(ESTIMATORS[label], model, guide, parameters, v, 60, settle=20).items()]
            )
            for label in ("reparametrised", "score function", "score, baseline of the row")
        }
        variances = [s.variance for s in found.values()]
        assert 2 * variances[0] < variances[2] < variances[1] / 2

    def test_the_reconstruction_alone_has_its_own_gradient(self) -> None:
        model, network, guide, v = linear()
        parameters = named(model, network)  # pyright: ignore[reportArgumentType]
        reconstruction, _ = closed_form(model, network, v)
        expected = gradient(-reconstruction.sum(), parameters)
        assert expected["encoder.bias"].abs().min() > 1e-3
        grads = [gradient(reconstruction_alone(model, guide, v), parameters) for _ in range(300)]
        check_mean({name: torch.stack([g[name] for g in grads]) for name in parameters}, expected)

    def test_pyros_svi_takes_the_reconstruction_alone(self) -> None:
        model, network, guide, v = linear()
        before = [p.detach().clone() for p in (*model.parameters(), *network.parameters())]
        svi = SVI(model, guide, Adam({"lr": 0.01}), loss=reconstruction_alone)
        losses = [svi.step(v) for _ in range(200)]
        assert sum(losses[-20:]) < sum(losses[:20]) - 20
        after = [*model.parameters(), *network.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        reconstruction, kl = closed_form(model, network, v)
        assert reconstruction.mean() > -3
        assert kl.mean() > 3


@pytest.mark.usefixtures("float64")
def test_the_kl_is_subtracted() -> None:
    """Two binary units, enumerated: reconstruction - KL is log p(v) - KL(q || p(h | v)), with a plus no bound."""
    prior, logits = torch.tensor([0.3, 0.8]), torch.tensor([2.0, -1.5])

    def program(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(prior).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=h @ logits), obs=v)

    v = torch.tensor([0.0, 1.0])
    guide = Amortized(program, encoder=nn.Linear(1, 2))
    guide.setup(v)
    q = torch.sigmoid(guide.encoders.h(v[:, None])).detach()
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    log_q = dist.Bernoulli(q).to_event(1).log_prob(states[:, None])
    log_prior = dist.Bernoulli(prior).to_event(1).log_prob(states)[:, None]
    log_likelihood = dist.Bernoulli(logits=states @ logits).log_prob(v[:, None]).mT
    log_evidence = (log_prior + log_likelihood).logsumexp(0)
    gap = (log_q.exp() * (log_q - log_prior - log_likelihood + log_evidence)).sum(0)
    terms = elbo_terms(program, guide, v)
    torch.testing.assert_close(terms.expected_log_likelihood - terms.kl["h"], log_evidence - gap)
    torch.testing.assert_close(terms.bound, log_evidence - gap)
    assert (gap > 0).all()
    with torch.no_grad():
        # A q that is far from the prior and right about v.
        guide.encoders.h.weight.zero_()
        guide.encoders.h.bias.copy_(torch.tensor([6.0, -6.0]))
    terms = elbo_terms(program, guide, v[1:])
    assert terms.expected_log_likelihood + terms.kl["h"] > log_evidence[1]


@pytest.mark.usefixtures("float64")
def test_two_layers_of_latents_are_not_for_the_form_with_the_kl() -> None:
    """q(h1 | v) q(h2 | h1) reads upwards, p(h1 | h2) downwards: Pyro warns, and its number is not L."""

    def program(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Normal(0.0, 1.0))
            h1 = pyro.sample("h1", dist.Normal(2 * h2, 1.0))
            pyro.sample("v", dist.Normal(h1, 0.7), obs=v)

    v = torch.tensor([1.0, -2.0, 0.5])
    guide = Amortized(program, encoder={name: nn.Linear(1, 2) for name in ("h1", "h2")})
    guide.setup(v)
    with torch.no_grad():
        guide.encoders.h2.weight.copy_(torch.tensor([[0.4], [0.0]]))
    with pytest.warns(UserWarning, match="mean field restriction"):
        TraceMeanField_ELBO().loss(program, guide, v)
    bound = elbo_terms(program, guide, v, num_samples=20_000)
    elbo = TraceMeanField_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=1)
    with pytest.warns(UserWarning, match="mean field restriction"):
        wrong = -elbo.loss(program, guide, v)
    assert abs(wrong - bound.bound.sum()) > 0.5


def test_spread_is_variance_and_signal() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 3)) * [1.0, 2.0, 0.5] + [3.0, 0.0, 4.0]
    found = spread([torch.as_tensor(x[:, :1]), torch.as_tensor(x[:, 1:])])
    assert found.variance == pytest.approx(x.var(0, ddof=1).sum())
    assert found.signal == pytest.approx((x.mean(0) ** 2).sum() - found.variance / 5000)
    assert found.signal_to_noise == pytest.approx(5 / math.sqrt(5.25), rel=0.03)
    assert spread([torch.tensor([[1.0], [-1.0]])]).signal_to_noise == 0


def test_without_a_kl_the_autoencoder_overfits() -> None:
    settings = {"num_train": 50, "num_steps": 150, "every": 150, "num_samples": 20, "refit_steps": 60}
    with_kl, without = (
        vae.train(LOSSES[label](), 0, **settings) for label in ("reconstruction - KL", "reconstruction alone")
    )
    last, alone = with_kl.records[-1], without.records[-1]
    assert alone.reconstruction[0] > last.reconstruction[0]
    assert alone.kl[1] > 5 * last.kl[1]
    assert alone.bound[1] < last.bound[1] - 20
    assert without.refitted.mean > without.own.mean
    for run in (with_kl, without):
        assert [r.step for r in run.records] == [0, 150]
        for r in run.records:
            for which in (0, 1):
                assert r.bound[which] == pytest.approx(r.reconstruction[which] - r.kl[which], abs=1e-3)


def test_refitting_leaves_the_decoder_and_raises_the_bound() -> None:
    _, v = vae.split()
    model = VAE()
    guide = Amortized(model, encoder=vae.encoder())
    before = [p.detach().clone() for p in model.parameters()]
    guide.setup(v[:20])
    q = vae.refit(model, v[:20], 300)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert elbo_terms(model, q, v[:20]).bound.mean() > elbo_terms(model, guide, v[:20]).bound.mean()


def test_benchmarks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        small = ["--rows", "30", "--steps", "6", "--seeds", "1", "--samples", "5", "--refit-steps", "3"]
        vae.main([*small, "--figure-folder", str(tmp_path / "new")])
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("vae test log p(v): L by samples -")
        assert len(lines) == 3 + 3 + 1
        assert plt.imread(tmp_path / "new" / "vae_overfitting.png").shape[2] == 4
        assert not plt.get_fignums()
        gradient_variance.main(["--repeats", "3", "--steps", "2", "--settle", "1"])
        out = capsys.readouterr().out
        for label in ESTIMATORS:
            assert out.count(f"  {label} ") == 2
    finally:
        torch.set_num_threads(threads)


DOC = (Path(__file__).parent.parent / "docs" / "variational_autoencoders.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "variational_autoencoders.md", "exec"), namespace)
    assert namespace["terms"].closed_form_kl == {"h"}
    assert namespace["terms"].bound.mean() > -35
    model, guide, v = namespace["model"], namespace["guide"], namespace["v"]
    pyro.set_rng_seed(1)
    by_pyro = Trace_ELBO().loss(model, guide, v)
    pyro.set_rng_seed(1)
    assert namespace["weighted"](1.0)(model, guide, v).item() == pytest.approx(by_pyro, rel=1e-5)
    pyro.set_rng_seed(1)
    alone = namespace["weighted"](0.0)(model, guide, v).item()
    pyro.set_rng_seed(1)
    assert alone == pytest.approx(reconstruction_alone(model, guide, v).item(), rel=1e-5)


def test_figures_of_the_page_exist() -> None:
    root = Path(__file__).parent.parent / "docs"
    links = re.findall(r"\]\(([^)#]+)\)", DOC)
    assert links
    assert [link for link in links if "://" not in link and not (root / link).exists()] == []
