"""Sparse priors, read from their distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.penalties import Penalties, is_laplace, laplace_sites, penalty_layout, sparse_sites
from pyro_ext.program import Program
from pyro_ext.sites import Kind

pytestmark = pytest.mark.usefixtures("float64")

V = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of_prior(make: Callable[[], Any], *, mask: bool = False, scale: float | Tensor = 1.0) -> Program:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.scale(scale=scale):
                if mask:
                    with poutine.mask(mask=torch.arange(len(v)) > 1):
                        h = pyro.sample("h", make())
                else:
                    h = pyro.sample("h", make())
            pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    return Program(model, (V,), {})


def read(program: Program) -> Penalties:
    names = sparse_sites(program)
    layout = penalty_layout(program, names)
    return Penalties.read(program, names, layout, {site.name: site.fn for site in program.latents})


PRIORS: dict[str, Callable[[], Any]] = {
    "Laplace": lambda: dist.Laplace(0.5, 2.0).expand([3]).to_event(1),
    "Laplace per atom": lambda: dist.Laplace(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5, 1.0, 2.0])).to_event(1),
    "Laplace per row": lambda: dist.Laplace(V, V.exp()).to_event(1),
    "Exponential": lambda: dist.Exponential(torch.tensor([0.5, 1.0, 2.0])).to_event(1),
    "HalfNormal": lambda: dist.HalfNormal(torch.tensor([0.5, 1.0, 2.0])).to_event(1),
    "HalfNormal per row": lambda: dist.HalfNormal(V.exp()).to_event(1),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("scale", [1.0, 2.5, torch.arange(1.0, 6.0, dtype=torch.float64)], ids=["1", "2.5", "rows"])
def test_they_are_their_log_density(name: str, scale: float | Tensor) -> None:
    program = of_prior(PRIORS[name], scale=scale)
    found = read(program)
    h = torch.randn(5, 3) if "Laplace" in name else torch.randn(5, 3).abs()
    x = h - found.shift
    mine = found.constant - (found.rate * x.abs()).sum(-1) - 0.5 * (found.curvature * x.square()).sum(-1)
    assert torch.allclose(mine, scale * PRIORS[name]().log_prob(h), rtol=1e-12, atol=1e-12)
    apart = "per row" in name or isinstance(scale, Tensor)
    rows = {
        part: getattr(found, part).dim() == 2 for part in ("rate", "shift", "curvature") if getattr(found, part).any()
    }
    assert rows.pop("shift", "per row" in name) == ("per row" in name)
    assert set(rows.values()) == {apart}
    bounded = found.nonnegative
    assert (bounded is None) == ("Laplace" in name)
    assert bounded is None or bool(bounded.all())


def test_which_priors_are_peeled() -> None:
    laplace, exponential = (lambda: dist.Laplace(0.0, 1.0).expand([3]).to_event(1)), PRIORS["Exponential"]
    assert sparse_sites(of_prior(laplace)) == laplace_sites(of_prior(laplace)) == {"h"}
    assert sparse_sites(of_prior(exponential)) == {"h"}
    assert laplace_sites(of_prior(exponential)) == set()
    assert sparse_sites(of_prior(laplace, mask=True)) == set()
    seen = torch.arange(5) > 1
    assert sparse_sites(of_prior(lambda: laplace().mask(seen))) == set()
    within = of_prior(lambda: dist.Laplace(0.0, 1.0).expand([5, 3]).mask(seen[:, None]).to_event(1))
    assert sparse_sites(within) == set()
    # It has its kink all the same.
    assert is_laplace(within.site("h"))
    assert sparse_sites(of_prior(lambda: dist.Gamma(1.0, 1.0).expand([3]).to_event(1))) == set()
    assert sparse_sites(of_prior(lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1))) == set()


@pytest.mark.parametrize("family", [dist.Laplace, dist.Exponential, dist.Cauchy])
def test_priors_on_other_latents_stay(family: Any) -> None:
    """Families whose draws Pyro cannot follow with provenance are told apart too."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Laplace(0.0, 1.0).expand([3]).to_event(1))
            args = (z.exp(),) if family is dist.Exponential else (z, 1.0)
            h = pyro.sample("h", family(*args).to_event(1))
            pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    program = Program(model, (V,), {})
    assert program.latent_parents("h") == {"z"}
    assert sparse_sites(program) == {"z"}


def test_positive_latents_are_read_as_they_are() -> None:
    program = of_prior(PRIORS["Exponential"])
    layout = penalty_layout(program, frozenset({"h"}))
    assert layout.sites[0].kind is Kind.REAL
    assert penalty_layout(program, frozenset()).sites[0].kind is Kind.CONSTRAINED
    flat = -torch.ones(5, 3)
    assert torch.equal(layout.values(flat)["h"], flat)


def test_other_latents_have_no_penalty() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            h = pyro.sample("h", dist.Exponential(2.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    found = read(Program(model, (V,), {}))
    assert found.rate.tolist() == [0, 0, 2, 2, 2]
    assert found.nonnegative is not None
    assert found.nonnegative.tolist() == [False, False, True, True, True]
    assert torch.allclose(found.constant, 3 * torch.tensor(2.0).log())
