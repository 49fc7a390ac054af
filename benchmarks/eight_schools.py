"""Reference of the eight schools posterior (Rubin, 1981), non-centred as in Pyro's examples/eight_schools.

mu ~ N(0, 10), tau ~ HalfCauchy(25), eta_j ~ N(0, 1), y_j ~ N(mu + tau eta_j, sigma_j). Three independent routes: Pyro's
NUTS; quadrature over (mu, log tau), given which every eta_j is Gaussian in closed form; and the optimum of L over
Gaussians of (mu, log tau, eta) by L-BFGS on quasi-random draws, which tells how near a guide of that family can come.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import cache

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
NAMES = ("mu", "tau", "log tau", *(f"eta {j}" for j in range(8)))


def program(sigma: Tensor, y: Tensor) -> None:
    """Pyro's eight schools; sigma and y of shape (8,)."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0 * torch.ones(1)).to_event(1))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """(sigma, y) in the default dtype."""
    return torch.tensor(ERRORS), torch.tensor(EFFECTS)


@cache
def quadrature(num_mu: int = 400, num_tau: int = 1500) -> tuple[Tensor, Tensor, float]:
    """Posterior means and standard deviations, in the order of `NAMES`, and log p(y); float64."""
    sigma, y = (x.double() for x in data())
    mu = torch.linspace(-45, 55, num_mu, dtype=torch.float64)[:, None]
    u = torch.linspace(-12, 8, num_tau, dtype=torch.float64)
    tau = u.exp()
    log_joint = dist.Normal(0.0, 10.0).log_prob(mu) + dist.HalfCauchy(25.0).log_prob(tau) + u
    for j in range(8):
        log_joint = log_joint + dist.Normal(mu, (sigma[j] ** 2 + tau**2).sqrt()).log_prob(y[j])
    cell = (mu[1] - mu[0]).log() + (u[1] - u[0]).log()
    log_evidence = log_joint.flatten().logsumexp(0)
    weights = (log_joint - log_evidence).exp()
    moments = [(mu, mu**2), (tau, tau**2), (u, u**2)]
    for j in range(8):
        precision = 1 + (tau / sigma[j]) ** 2
        mean = tau / sigma[j] ** 2 * (y[j] - mu) / precision
        moments.append((mean, mean**2 + 1 / precision))
    first, second = (torch.stack([(weights * m[i]).sum() for m in moments]) for i in (0, 1))
    return first, (second - first**2).sqrt(), float(log_evidence + cell)


def nuts(num_samples: int, warmup_steps: int, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior means, standard deviations and the Monte-Carlo standard errors of the means, by batch means."""
    chains = []
    for chain in range(num_chains):
        pyro.set_rng_seed(chain)
        mcmc = MCMC(NUTS(program), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
        mcmc.run(*data())
        draws = mcmc.get_samples()
        chains.append(torch.cat([draws["mu"], draws["tau"], draws["tau"].log(), draws["eta"]], -1))
    samples = torch.stack(chains).double()
    batches = samples.unflatten(1, (20, -1)).mean(2).flatten(0, 1)
    return samples.flatten(0, 1).mean(0), samples.flatten(0, 1).std(0), batches.std(0) / math.sqrt(len(batches))


@cache
def gaussian_optimum(*, factorised: bool) -> tuple[float, Tensor]:
    """-L of the best Gaussian q of (mu, log tau, eta), and its means in the order of `NAMES`; float64."""
    sigma, y = (x.double() for x in data())
    uniform = torch.quasirandom.SobolEngine(10, scramble=True, seed=0).draw(2**13).double().clamp(1e-9, 1 - 1e-9)
    noise = dist.Normal(0.0, 1.0).icdf(uniform)
    loc = torch.tensor([6.0, 1.0] + [0.0] * 8, dtype=torch.float64, requires_grad=True)
    root = (0.5 * torch.eye(10, dtype=torch.float64)).requires_grad_()
    kept = torch.eye(10, dtype=torch.float64) if factorised else torch.ones(10, 10, dtype=torch.float64).tril()
    optimizer = torch.optim.LBFGS(
        [loc, root], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-7, history_size=50
    )

    def loss() -> Tensor:
        mu, u, eta = (loc + noise @ (root * kept).T).split([1, 1, 8], -1)
        log_joint = dist.Normal(0.0, 10.0).log_prob(mu) + dist.HalfCauchy(25.0).log_prob(u.exp()) + u
        log_joint = log_joint.squeeze(-1) + dist.Normal(0.0, 1.0).log_prob(eta).sum(-1)
        log_joint = log_joint + dist.Normal(mu + u.exp() * eta, sigma).log_prob(y).sum(-1)
        entropy = root.diagonal().abs().log().sum() + 5 * math.log(2 * math.pi * math.e)
        return -(log_joint.mean() + entropy)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        variance = (root * kept).square().sum(-1)[1]
        tau = (loc[1] + variance / 2).exp()
        return float(loss()), torch.cat([loc[:1], tau[None], loc[1:]])


def main(options: list[str]) -> None:
    """Print the moments by every route."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks eight_schools", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000, help="NUTS samples a chain (2000)")
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--chains", type=int, default=4)
    given = parser.parse_args(options)
    torch.set_num_threads(1)
    mean, sd, log_evidence = quadrature()
    begin = time.perf_counter()
    nuts_mean, nuts_sd, error = nuts(given.samples, given.warmup, given.chains)
    seconds = time.perf_counter() - begin
    families = {name: gaussian_optimum(factorised=name == "factorised") for name in ("factorised", "joint")}
    print(
        f"log p(y) = {log_evidence:.4f} nats; NUTS: {given.chains} chains of {given.samples} draws in {seconds:.0f} s"
    )
    for name, (loss, _) in families.items():
        print(f"-L of the best {name} Gaussian: {loss:.4f} nats")
    print("\n" + " " * 26 + "NUTS" + " " * 22 + "distance of the best Gaussian's mean in sd")
    print(f"{'':8} {'mean':>8} {'sd':>7} {'mean':>9} {'sd':>7} {'error':>7} {'factorised':>12} {'joint':>8}")
    for i, name in enumerate(NAMES):
        away = [float((q[i] - mean[i]) / sd[i]) for _, q in families.values()]
        print(
            f"{name:8} {mean[i]:8.4f} {sd[i]:7.4f} {nuts_mean[i]:9.4f} {nuts_sd[i]:7.4f} {error[i]:7.4f}"
            f" {away[0]:12.3f} {away[1]:8.3f}"
        )
    worst = ((nuts_mean - mean) / error).abs().max()
    print(f"NUTS and quadrature differ by at most {worst:.1f} standard errors.")
