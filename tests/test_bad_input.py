"""Every public entry refuses bad input by rule, value and remedy, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_ext import (
    EM,
    FISTA,
    LBFGS,
    Adaptive,
    ClosedForm,
    FeatureSign,
    FixedPoint,
    Gradient,
    InTurn,
    Maximize,
    Newton,
    Parallel,
    Sampled,
    SolverError,
    SpaRSA,
    WakeSleep,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.models import (
    BinarySparseCoding,
    FactorialHMM,
    GaussianEmission,
    GaussianMixture,
    HelmholtzMachine,
    HiddenMarkovModel,
    SigmoidBeliefNetwork,
    assign_parameters,
)

Entry = Callable[..., Any]


def state(*modules: Any) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    store = pyro.get_param_store()
    found: dict[str, Any] = {f"store {name}": store[name].detach().clone() for name in store.keys()}
    for number, module in enumerate(modules):
        if isinstance(module, nn.Module):
            found |= {f"{number} {name}": p.detach().clone() for name, p in module.state_dict().items()}
        found[f"{number} set up"] = getattr(module, "is_set_up", None)
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"{name} changed"


def refused(call: Callable[[], Any], match: str, *modules: Any, error: type[Exception] = ValueError) -> None:
    before = state(*modules)
    with pytest.raises(error, match=match) as caught:
        call()
    # Pyro's tracers say where on a line before, and append the shapes of the trace on further lines.
    text = next(line for line in str(caught.value).splitlines() if not line.startswith("Error while"))
    assert text.startswith("Expected ")
    assert ", but " in text
    assert text.endswith(".")
    assert_same(before, state(*modules))


# --------------------------------------------------------------------------- data


def driver_entries(model: Any, guide: Any, em: EM) -> dict[str, Entry]:
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=Trace_ELBO())
    return {
        "EM.step": em.step,
        "EM.run": lambda v: em.run(v, progress=False),
        "EM.evaluate_loss": em.evaluate_loss,
        "EM.infer": em.infer,
        "log_evidence": lambda v: log_evidence(model, guide, v),
        "elbo_terms": lambda v: elbo_terms(model, guide, v),
        "guide": guide,
        "guide.posterior": guide.posterior,
        "guide.setup": guide.setup,
        "fit(em)": lambda v: fit(em, [v], progress=False),
        "fit(svi)": lambda v: fit(svi, [v], progress=False),
        "SVI.step": svi.step,
    }


ENTRIES = (
    "EM.step",
    "EM.run",
    "EM.evaluate_loss",
    "EM.infer",
    "log_evidence",
    "elbo_terms",
    "guide",
    "guide.posterior",
    "guide.setup",
    "fit(em)",
    "fit(svi)",
    "SVI.step",
)

GOOD = torch.zeros(6, 4)
BAD_REAL = {
    "one dimension": (torch.zeros(4), "shape"),
    "three dimensions": (torch.zeros(2, 6, 4), "shape"),
    "too wide": (torch.zeros(6, 5), "columns|width|shape"),
    "integers": (torch.zeros(6, 4, dtype=torch.long), "dtype|floating"),
    "double precision": (torch.zeros(6, 4, dtype=torch.float64), "dtype"),
    "another device": (torch.zeros(6, 4, device="meta"), "device"),
    "NaN": (GOOD.clone().index_put_((torch.tensor(2), torch.tensor(1)), torch.tensor(torch.nan)), "finite"),
    "infinity": (GOOD.clone().index_put_((torch.tensor(2), torch.tensor(1)), torch.tensor(torch.inf)), "finite"),
    "no rows": (torch.zeros(0, 4), "row"),
    "a list": ([[0.0] * 4], "Tensor|tensor"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("bad", BAD_REAL, ids=str)
def test_bad_data_is_refused_before_anything_exists(entry: str, bad: str) -> None:
    model = BinarySparseCoding(num_visible=4, num_latents=2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    value, match = BAD_REAL[bad]
    refused(lambda: driver_entries(model, guide, em)[entry](value), match, model, guide, error=(ValueError, TypeError))


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e not in ("guide.setup",)])
@pytest.mark.parametrize("bad", BAD_REAL, ids=str)
def test_bad_data_is_refused_by_a_fitted_guide(entry: str, bad: str) -> None:
    model = BinarySparseCoding(num_visible=4, num_latents=2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    em.step(torch.randn(6, 4))
    value, match = BAD_REAL[bad]
    refused(
        lambda: driver_entries(model, guide, em)[entry](value),
        f"{match}|set up with",
        model,
        guide,
        error=(ValueError, TypeError),
    )


@pytest.mark.parametrize("set_up", [False, True])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.full((5, 4), 0.5), "0 and 1|binary"),
        (torch.full((5, 4), torch.nan), "finite"),
        (torch.zeros(5, 3), "columns|shape"),
    ],
    ids=["grey", "NaN", "narrow"],
)
def test_wake_sleep_refuses_bad_data(value: Tensor, match: str, set_up: bool) -> None:
    model = SigmoidBeliefNetwork([2, 4])
    guide = Amortized(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss=WakeSleep(num_particles=2))
    if set_up:
        svi.step(torch.zeros(5, 4))
    refused(lambda: svi.step(value), match, model, guide)
    refused(lambda: svi.evaluate_loss(value), match, model, guide)


def users_model(v: Tensor, mask: Tensor | None = None) -> None:
    with pyro.plate("data", len(v), dim=-1):
        h = pyro.sample("h", dist.Bernoulli(0.3))
        with pyro.poutine.mask(mask=True if mask is None else mask):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def users_bits(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3))
        pyro.sample("v", dist.Bernoulli(0.2 + 0.5 * h), obs=v)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "svi" not in e.lower()])
@pytest.mark.parametrize(
    ("program", "value", "match"),
    [
        (users_model, torch.tensor([0.0, torch.nan]), "finite values at the visible site 'v'.*nan at \\(1,\\)"),
        (users_model, torch.tensor([-torch.inf, 0.0]), "finite values at the visible site 'v'.*-inf at \\(0,\\)"),
        (users_bits, torch.tensor([0.0, 0.5]), "support of Bernoulli.*0.5 at \\(1,\\)"),
        (users_bits, torch.tensor([2.0, 0.0]), "support of Bernoulli.*2 at \\(0,\\)"),
    ],
    ids=["NaN", "infinity", "grey bits", "counts"],
)
def test_a_users_program_is_checked_too(entry: str, program: Entry, value: Tensor, match: str) -> None:
    guide = MeanField(program)
    em = EM(program, guide, e_step=FixedPoint(), m_step=None)
    refused(lambda: driver_entries(program, guide, em)[entry](value), match, guide)


def test_masked_values_are_never_read() -> None:
    torch.set_default_dtype(torch.float64)
    v, mask = torch.tensor([0.3, torch.nan, 1.2]), torch.tensor([True, False, True])
    guide = MeanField(users_model)
    em = EM(users_model, guide, e_step=FixedPoint(), m_step=None)
    loss = em.step(v, mask)
    assert em.infer(v, mask)["h"].mean[1] == pytest.approx(0.3)
    other = MeanField(users_model)
    clean = EM(users_model, other, e_step=FixedPoint(), m_step=None)
    assert loss == pytest.approx(clean.step(torch.tensor([0.3, 7.0, 1.2]), mask), abs=1e-12)


# --------------------------------------------------------------------------- models, guides, steps


def no_visible(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Bernoulli(0.3))


def no_latent(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)


def counting(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Poisson(2.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def one_by_one(v: Tensor) -> None:
    for i in pyro.plate("data", len(v)):
        h = pyro.sample(f"h{i}", dist.Bernoulli(0.3))
        pyro.sample(f"v{i}", dist.Normal(h, 1.0), obs=v[i])


def skewed(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Gamma(2.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def cubic(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h**3, 1.0), obs=v)


def bent(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1).exp(), 1.0), obs=v)


def hard_zero(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.OneHotCategorical(logits=torch.tensor([0.0, -torch.inf])))
        pyro.sample("v", dist.Normal(h[..., 0], 1.0), obs=v)


V = torch.randn(5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guide_type", [MeanField, Dirac, Structured, Amortized])
@pytest.mark.parametrize(
    ("program", "match"),
    [
        (no_visible, "visible site"),
        (no_latent, "latent site"),
        (counting, "site 'h' with Poisson"),
        (one_by_one, "vectorised plates.*'data'"),
    ],
)
def test_programs_that_no_guide_can_serve(guide_type: type, program: Entry, match: str) -> None:
    guide = guide_type(program)
    refused(lambda: guide(V), match, guide)
    refused(lambda: guide.posterior(V), match, guide)


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (skewed, "constrained continuous site 'h'.*Gradient"),
        (cubic, "quadratic in 'h'.*Gradient"),
        (hard_zero, "above 0"),
    ],
)
def test_fixed_point_names_what_it_cannot_treat(program: Entry, match: str) -> None:
    guide = MeanField(program)
    em = EM(program, guide, e_step=FixedPoint(), m_step=None)
    guide.setup(V)
    refused(lambda: em.step(V), match, guide)
    refused(lambda: em.infer(V), match, guide)


def sparse(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def sparse_with_heavy_tails(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0))
        pyro.sample("v", dist.StudentT(3.0, h, 1.0), obs=v)


def sparse_with_a_scale(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        h = pyro.sample("h", dist.Laplace(0.0, tau))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


@pytest.mark.parametrize("set_up", [False, True])
@pytest.mark.parametrize(
    ("program", "solver", "match", "error"),
    [
        (users_model, None, "continuous latents for Maximize, but got the discrete 'h'.*FixedPoint", TypeError),
        (
            sparse_with_a_scale,
            None,
            "Laplace prior with fixed loc and scale, but got that of 'h'.*Gradient",
            SolverError,
        ),
        (cubic, FeatureSign(), "quadratic beside its sparse prior for FeatureSign.*LBFGS", SolverError),
        (cubic, SpaRSA(), "quadratic beside its sparse prior for SpaRSA.*LBFGS", SolverError),
        (sparse_with_heavy_tails, FeatureSign(), "for FeatureSign, but it is not. Use FISTA", SolverError),
        (sparse, LBFGS(), "smooth .* for LBFGS.*FISTA", SolverError),
        (sparse, Newton(), "smooth .* for Newton.*FISTA", SolverError),
    ],
)
def test_maximize_names_what_it_cannot_treat(
    program: Entry, solver: Any, match: str, error: type[Exception], set_up: bool
) -> None:
    guide = Dirac(program)
    em = EM(program, guide, e_step=Maximize(solver), m_step=None)
    if set_up:
        guide(V)
    generator = torch.get_rng_state()
    for call in (em.step, em.infer, lambda v: em.run(v, progress=False)):
        refused(lambda call=call: call(V), match, guide, error=error)
    assert torch.equal(generator, torch.get_rng_state())


def test_maximize_moves_points_only() -> None:
    for guide in (MeanField(sparse), Structured(sparse), Amortized(sparse)):
        refused(
            lambda guide=guide: EM(sparse, guide, e_step=Maximize(), m_step=None),
            f"a Dirac guide for Maximize, but got {type(guide).__name__}",
            guide,
            error=TypeError,
        )


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "svi" not in e.lower()])
def test_maximize_reads_no_bad_data(entry: str) -> None:
    guide = Dirac(sparse)
    em = EM(sparse, guide, e_step=Maximize(), m_step=None)
    bad = torch.tensor([0.0, torch.nan])
    refused(lambda: driver_entries(sparse, guide, em)[entry](bad), "finite values at the visible site 'v'", guide)


def test_fixed_point_sends_points_of_sparse_programs_on() -> None:
    guide = Dirac(sparse)
    em = EM(sparse, guide, e_step=FixedPoint(), m_step=None)
    guide(V)
    refused(lambda: em.step(V), r"quadratic in 'h' for FixedPoint on point masses.*`e_step=Maximize\(\)`", guide)
    refused(lambda: em.infer(V), r"`e_step=Maximize\(\)`", guide)


def test_elbos_refuse_discrete_factors_that_they_would_get_wrong() -> None:
    for validation in (True, False):
        pyro.enable_validation(validation)
        guide = MeanField(users_model)
        guide(V)
        svi = SVI(users_model, guide, Adam({"lr": 0.1}), loss=TraceMeanField_ELBO())
        error = ValueError if not validation else Exception
        before = state(guide)
        with pytest.raises(error):
            svi.step(V)
        assert_same(before, state(guide))


def test_a_discrete_point_mass_has_no_gradient() -> None:
    guide = Dirac(users_model)
    guide(V)
    refused(
        lambda: SVI(users_model, guide, Adam({"lr": 0.1}), loss=Trace_ELBO()).step(V),
        "point mass.*EM with FixedPoint",
        guide,
    )


def test_continuous_points_have_no_bound() -> None:
    guide = Dirac(cubic)
    guide.setup(V)
    refused(lambda: elbo_terms(cubic, guide, V), "point mass on the continuous site 'h'", guide)
    refused(lambda: log_evidence(cubic, guide, V), "point mass on the continuous site 'h'", guide)
    svi = SVI(cubic, guide, Adam({"lr": 0.1}), loss=WakeSleep(num_particles=2, insomnia=1.0))
    refused(lambda: svi.step(V), "Delta|point mass", guide)


def test_a_table_belongs_to_its_data() -> None:
    guide = MeanField(users_model)
    guide(V)
    svi = SVI(users_model, guide, Adam({"lr": 0.1}), loss=Trace_ELBO())
    for other in (V[:3], V + 1):
        refused(lambda other=other: guide(other), "em.infer", guide)
        refused(lambda other=other: guide.posterior(other), "em.infer", guide)
        refused(lambda other=other: svi.step(other), "em.infer", guide)
    guide(V.clone())


def test_a_sleep_phase_with_a_table_is_refused() -> None:
    guide = MeanField(users_bits)
    v = torch.zeros(5)
    guide.setup(v)
    svi = SVI(users_bits, guide, Adam({"lr": 0.1}), loss=WakeSleep(num_particles=2))
    refused(lambda: svi.step(v), "table", guide)


def test_names_of_live_modules_are_not_shared() -> None:
    first = BinarySparseCoding(4, 2, name="mine")
    refused(lambda: BinarySparseCoding(4, 2, name="mine"), "'mine'.*name=", first)
    refused(lambda: MeanField(first, name="mine"), "'mine'.*name=", first)
    assert BinarySparseCoding(4, 2)._pyro_name != BinarySparseCoding(4, 2)._pyro_name


def test_em_refuses_what_does_not_go_together() -> None:
    model, other = BinarySparseCoding(4, 2), BinarySparseCoding(4, 2)
    guide, network = MeanField(model), Amortized(model)
    network_model = HelmholtzMachine(4, 2)
    step = FixedPoint()
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: EM(other, guide, e_step=step, m_step=None), "built from this model"),
        (lambda: EM(model, lambda v: None, e_step=step, m_step=None), "guide of pyro_ext.guides"),
        (lambda: EM(3, guide, e_step=step, m_step=None), "Pyro model"),
        (lambda: EM(model, guide, e_step="fixed point", m_step=None), "E-step object"),
        (lambda: EM(model, guide, e_step=step, m_step="closed"), "M-step object"),
        (lambda: EM(model, network, e_step=step, m_step=None), "FixedPoint.*Gradient"),
        (
            lambda: EM(network_model, MeanField(network_model), e_step=step, m_step=ClosedForm()),
            "`statistics` and `maximize`.*Gradient",
        ),
    ]
    for call, match in wrong:
        refused(call, match, model, guide, error=TypeError)


@pytest.mark.parametrize(
    ("call", "match", "error"),
    [
        (lambda: FixedPoint(max_sweeps=0), "max_sweeps", ValueError),
        (lambda: FixedPoint(schedule="parallel"), "schedule", TypeError),
        (lambda: FixedPoint(criterion=1e-3), "criterion", TypeError),
        (lambda: FixedPoint(start="warm"), "start", TypeError),
        (lambda: Parallel(damping=1.0), "damping", ValueError),
        (lambda: Adaptive(damping=1.0), "damping in \\[0, 1\\), but got 1.0", ValueError),
        (lambda: Adaptive(max_halvings=0), "max_halvings of at least 1, but got 0", ValueError),
        (lambda: FixedPoint(evaluator=Sampled(num_samples=0)), "num_samples of at least 1, but got 0", ValueError),
        (lambda: FixedPoint(evaluator="sampled"), "evaluator to be Sampled", TypeError),
        (lambda: FixedPoint(Adaptive(), evaluator=Sampled()), "with Sampled.*but got Adaptive", TypeError),
        (lambda: Structured(users_model, max_block_size=0), "max_block_size >= 1, but got 0", ValueError),
        (lambda: Structured(users_model, max_block_size=1.5), "max_block_size", TypeError),
        (lambda: Structured(users_model, max_states=0), "max_states >= 1, but got 0", ValueError),
        (lambda: Structured(users_model, [["h"]], max_block_size=2), "blocks or max_block_size.*both", ValueError),
        (lambda: Gradient(torch.optim.SGD([torch.zeros(1)], lr=0.1)), "pyro.optim", TypeError),
        (lambda: Gradient(Adam({"lr": 0.1}), num_steps=0), "num_steps", ValueError),
        (lambda: Gradient(Adam({"lr": 0.1}), loss="elbo"), "ELBO", TypeError),
        (lambda: Maximize("FISTA"), "solver to be FeatureSign\\(\\)", TypeError),
        (lambda: Maximize(FISTA), "solver to be FeatureSign\\(\\)", TypeError),
        (lambda: Maximize(start="warm"), "start to be Cold\\(\\)", TypeError),
        (lambda: FISTA(tolerance=0.0), "tolerance above 0, but got 0.0", ValueError),
        (lambda: FISTA(tolerance=float("nan")), "tolerance above 0, but got nan", ValueError),
        (lambda: SpaRSA(max_iterations=0), "max_iterations of at least 1, but got 0", ValueError),
        (lambda: SpaRSA(check_every=0), "check_every of at least 1, but got 0", ValueError),
        (lambda: LBFGS(history=0), "history of at least 1, but got 0", ValueError),
        (lambda: InTurn(), "at least one solver", ValueError),
        (lambda: InTurn("FISTA"), "every solver to be a solver", TypeError),
        (lambda: MeanField(3), "model", TypeError),
        (lambda: MeanField(users_model, name="no good"), "identifier", ValueError),
        (lambda: Amortized(users_model, encoder=3), "nn.Module", TypeError),
        (lambda: GaussianMixture(0, 3), "num_components", ValueError),
        (lambda: SigmoidBeliefNetwork([4]), "sizes|layer", ValueError),
        (lambda: WakeSleep(num_particles=0), "num_particles", ValueError),
        (lambda: WakeSleep(insomnia=1.5, num_particles=2), "insomnia", ValueError),
    ],
)
def test_settings_are_checked_when_they_are_given(call: Callable[[], Any], match: str, error: type[Exception]) -> None:
    refused(call, match, error=(error, TypeError, ValueError))


def test_run_settings() -> None:
    model = BinarySparseCoding(4, 2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.randn(6, 4)
    for kwargs, match in (
        ({"max_steps": 0}, "max_steps"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"tolerance": -1.0}, "tolerance"),
    ):
        refused(lambda kwargs=kwargs: em.run(v, progress=False, **kwargs), match, model, guide)
    for number in (0, 2.5):
        refused(lambda number=number: log_evidence(model, guide, v, num_samples=number), "num_samples", model, guide)
        refused(lambda number=number: elbo_terms(model, guide, v, num_samples=number), "num_samples", model, guide)


def test_more_components_than_can_be_filled_is_named() -> None:
    model = GaussianMixture(num_components=3, num_visible=2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    match = "at least 3 distinct rows, one per component, but got 2. Use fewer"
    refused(lambda: em.run(v, progress=False), match, model, guide)
    refused(lambda: model.initialize(v), match, model, guide)


def test_an_emptied_component_is_named() -> None:
    model = GaussianMixture(num_components=2, num_visible=1)
    assign_parameters(model, {"locs": torch.tensor([[0.0], [1e6]])})
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.randn(5, 1)
    match = "responsible for some data, but got none for component 1, .* Use fewer"
    guide.setup(v)
    refused(lambda: em.step(v), match, model, guide, error=RuntimeError)
    refused(lambda: em.run(v, progress=False), match, model, guide, error=RuntimeError)


@pytest.mark.parametrize(
    ("mask", "match", "error"),
    [
        (torch.ones(5, 3, dtype=torch.bool), r"mask of shape \(5, 2\).*, but got \(5, 3\)", ValueError),
        (torch.ones(5, 2), "mask to be a boolean tensor, but got dtype torch.float32", TypeError),
        (
            torch.arange(5).unsqueeze(1).expand(5, 2) != 3,
            "observed entry in every row, but got none in row 3",
            ValueError,
        ),
    ],
    ids=["shape", "dtype", "row"],
)
def test_bad_masks_are_named(mask: Tensor, match: str, error: type[Exception]) -> None:
    model = GaussianMixture(num_components=2, num_visible=2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.randn(5, 2)
    entries: tuple[Entry, ...] = (em.step, em.evaluate_loss, em.infer, lambda v, mask: em.run(v, mask=mask))
    for entry in entries:
        refused(lambda entry=entry: entry(v, mask=mask), match, model, guide, error=error)


def mixed_lengths(*lengths: float) -> dict[str, Tensor]:
    return {"lengths": torch.tensor(lengths)}


@pytest.mark.parametrize("set_up", [False, True], ids=["new", "set up"])
@pytest.mark.parametrize(
    ("hiding", "match"),
    [
        (mixed_lengths(3, 4, 2, 1), r"lengths of shape \(3,\).*, but got \(4,\)"),
        ({"lengths": torch.full((3, 1), 2)}, r"lengths of shape \(3,\).*, but got \(3, 1\)"),
        (mixed_lengths(3, 0, 2), "lengths .*1.*4.*, but got 0"),
        (mixed_lengths(3, 5, 2), "lengths .*1.*4.*, but got 5"),
        (mixed_lengths(3.0, 4.0, 2.0), "lengths .*integer.*, but got .*float32"),
        ({"lengths": [3, 4, 2]}, "lengths .*list"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask of shape \(3, 4\).*, but got \(3, 5\)"),
        ({"mask": torch.ones(3, 4, 2, dtype=torch.bool)}, r"mask of shape \(3, 4\).*, but got \(3, 4, 2\)"),
        ({"mask": torch.ones(3, 4)}, "mask to be a boolean tensor, but got dtype torch.float32"),
        (
            {"mask": torch.arange(3)[:, None].expand(3, 4) != 1},
            "observed step in every sequence, .* none in sequence 1",
        ),
        (
            {"mask": torch.arange(4).expand(3, 4) > 1, **mixed_lengths(4, 2, 4)},
            "observed step in every sequence, .* none in sequence 1",
        ),
    ],
    ids=["many", "matrix", "0", "long", "float", "list", "mask's T", "entries", "mask's dtype", "hidden", "both"],
)
@pytest.mark.parametrize("build", [lambda: HiddenMarkovModel(2, GaussianEmission(2)), lambda: FactorialHMM(2, [2, 2])])
def test_lengths_and_masks_that_do_not_fit(
    build: Callable[[], Any], hiding: dict[str, Any], match: str, set_up: bool
) -> None:
    model = build()
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.randn(3, 4, 2)
    if set_up:
        em.step(v, lengths=torch.tensor([4, 3, 2]))
    entries: tuple[Entry, ...] = (
        em.step,
        em.evaluate_loss,
        em.infer,
        lambda v, **hiding: em.run(v, progress=False, **hiding),
        lambda v, **hiding: log_evidence(model, guide, v, **hiding),
        guide.posterior,
        model.initialize,
    )
    for entry in entries:
        refused(lambda entry=entry: entry(v, **hiding), match, model, guide, error=(ValueError, TypeError))


@pytest.mark.parametrize("build", [lambda: HiddenMarkovModel(2, GaussianEmission(2)), lambda: FactorialHMM(2, [2, 2])])
def test_sequences_that_are_not_padded(build: Callable[[], Any]) -> None:
    model = build()
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    sequences = [torch.randn(4, 2), torch.randn(3, 2)]
    for entry in (em.step, em.run, em.infer, model.initialize):
        refused(lambda entry=entry: entry(sequences), "but got a list.*pad_sequence", model, guide, error=TypeError)
    refused(lambda: em.step(sequences[0]), r"Expected v of shape \(N, T, 2\), but got \(4, 2\)", model, guide)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda m: Structured(m, [[("h", [0, 1])], [("h", [1, 2])]]),
            "do not overlap, but got unit 1 of 'h' twice",
        ),
        (lambda m: Structured(m, [[("h", [0, 0])]]), "blocks that do not overlap, but got unit 0 of 'h' twice"),
        (lambda m: Structured(m, [[("h", [0, 7])]]), "units of 'h' from 0 to 2, but got 7"),
        (lambda m: Structured(m, [["g", "h"]]), "latent sites 'h', but got 'g'"),
        (lambda m: Structured(m, [[("h", [0, 1, 2])]], max_states=7), "at most 7 joint states.*3 units.*max_states"),
        (lambda m: Structured(m, max_states=7), "at most 7 joint states.*max_states"),
    ],
    ids=["overlap", "twice", "unit", "site", "states", "all states"],
)
def test_blocks_that_do_not_fit(build: Callable[[Any], Structured], match: str) -> None:
    model = BinarySparseCoding(num_visible=4, num_latents=3)
    guide = build(model)
    v = torch.randn(6, 4)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    for call in (em.step, guide, guide.posterior, guide.setup, em.infer):
        refused(lambda call=call: call(v), match, model, guide)


def test_found_blocks_want_a_quadratic_program() -> None:
    guide = Structured(bent, max_block_size=2)
    em = EM(bent, guide, e_step=FixedPoint(), m_step=None)
    for call in (em.step, guide, guide.posterior, guide.find_blocks):
        refused(lambda call=call: call(V), "quadratic.*give `blocks=`", guide)
    given = Structured(bent)
    refused(lambda: given.find_blocks(V), "guide with max_block_size", given)


def test_a_block_of_chains_has_a_limit() -> None:
    model = FactorialHMM(2, [3, 4])
    guide = Structured(model, max_states=143)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    v = torch.randn(3, 4, 2)
    for call in (em.step, guide, guide.posterior, em.infer):
        refused(lambda call=call: call(v), r"at most 143 pairs of joint states.*12\^2.*`max_states`", model, guide)


def test_a_name_is_free_again_once_its_holder_is_deleted() -> None:
    model = BinarySparseCoding(4, 2, name="mine")
    guide = MeanField(model, name="q")
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    em.step(torch.zeros(3, 4))
    del model, guide, em
    MeanField(BinarySparseCoding(4, 2, name="mine"), name="q")


def test_a_refused_run_does_not_start_the_model() -> None:
    model = BinarySparseCoding(4, 2)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    refused(lambda: em.run(torch.full((3, 4), torch.nan), seed=1, progress=False), "finite", model, guide)
    assert model.is_untouched


def test_what_holds_data_but_is_no_tensor_is_named() -> None:
    guide = MeanField(users_model)
    em = EM(users_model, guide, e_step=FixedPoint(), m_step=None)
    refused(lambda: em.run(DataLoader(V)), "the data, but got a DataLoader. Use `fit\\(em, loader\\)`", error=TypeError)
    refused(lambda: em.step(V.numpy()), "torch.as_tensor", error=TypeError)
    refused(
        lambda: EM(users_model, MeanField, e_step=FixedPoint(), m_step=None),
        "Write MeanField\\(model\\)",
        error=TypeError,
    )


def test_a_forgotten_plate_is_named() -> None:
    def forgot(v: Tensor) -> None:
        h = pyro.sample("h", dist.Bernoulli(torch.full((len(v),), 0.3)))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    guide = MeanField(forgot)
    with pyro.validation_enabled(False):
        refused(lambda: guide(V), "batch dimension of site 'h' in a plate.*to_event", guide)
