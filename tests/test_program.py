"""Programs as functions of their latents, judged by Pyro's own traces."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.distributions import Tabulated
from pyro_ext.program import Program
from pyro_ext.sites import base_of

pytestmark = pytest.mark.usefixtures("float64")


def nested(v: Tensor) -> None:
    """Rows at dim -1, an inner plate at dim -2, latents in both; v is (3, N)."""
    rows = pyro.plate("rows", v.shape[-1], dim=-1)
    inner = pyro.plate("inner", v.shape[-2], dim=-2)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with inner:
            c = pyro.sample("c", dist.Normal(a, 1.0))
            pyro.sample("v", dist.Normal(a + 2 * c, 0.5), obs=v)


def nested_left(v: Tensor) -> None:
    """Rows at dim -2, an inner plate at dim -1; v is (N, 3)."""
    with pyro.plate("rows", v.shape[-2], dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", v.shape[-1], dim=-1):
            c = pyro.sample("c", dist.Normal(a, 1.0))
            pyro.sample("v", dist.Normal(a + 2 * c, 0.5), obs=v)


def one_row(v: Tensor) -> None:
    """A latent outside every plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(mu, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def total(model: Callable[..., None], values: dict[str, Tensor], *args: Tensor) -> Tensor:
    return poutine.trace(poutine.condition(model, data=values)).get_trace(*args).log_prob_sum()


@pytest.mark.parametrize(
    ("model", "shape", "rows"),
    [(nested, (3, 4), (4,)), (nested_left, (4, 3), (4,)), (one_row, (4,), ())],
    ids=["rows at -1", "rows at -2", "one row"],
)
def test_log_joint_is_that_of_a_trace(model: Callable[..., None], shape: tuple[int, ...], rows: tuple[int]) -> None:
    v = torch.randn(shape)
    program = Program(model, (v,), {})
    assert program.rows.shape == rows
    values = {site.name: torch.randn(site.batch_shape) for site in program.latents}
    if "a" in values:
        values["a"] = torch.bernoulli(torch.full(program.site("a").batch_shape, 0.5))
    log_joint = program.log_joint(values)
    assert log_joint.shape == rows
    torch.testing.assert_close(log_joint.sum(), total(model, values, v))
    sites = program.site_log_probs(values)
    torch.testing.assert_close(sum(sites.values()), log_joint)


@pytest.mark.parametrize(("model", "shape"), [(nested, (3, 4)), (nested_left, (4, 3)), (one_row, (4,))])
def test_particles_stand_left_of_all_plates(model: Callable[..., None], shape: tuple[int, ...]) -> None:
    v = torch.randn(shape)
    program = Program(model, (v,), {})
    draws = [{s.name: s.fn.sample() for s in program.latents} for _ in range(5)]
    stacked = {s.name: torch.stack([d[s.name] for d in draws]) for s in program.latents}
    led = {s.name: program.lead(stacked[s.name], s) for s in program.latents}
    result = program.log_joint(led, num_particles=5)
    torch.testing.assert_close(result, torch.stack([program.log_joint(d) for d in draws]))


def test_gradients_flow_to_values_and_parameters() -> None:
    def model(v: Tensor) -> None:
        w = pyro.param("w", torch.tensor(2.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)

    v, h = torch.randn(3), torch.randn(3, requires_grad=True)
    program = Program(model, (v,), {})
    program.log_joint({"h": h}).sum().backward()
    torch.testing.assert_close(h.grad, (-h + 2 * (v - 2 * h)).detach())
    torch.testing.assert_close(pyro.param("w").grad, (h * (v - 2 * h)).sum().detach())


def test_subsample_scale_is_divided_out_and_rows_stay_fixed() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", 10, subsample_size=4) as index:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    v = torch.arange(10.0)
    program = Program(model, (v,), {})
    rows = program.indices["data"]
    assert (program.rows.scale, program.draws_rows, program.explicit_plates) == (2.5, True, frozenset())
    expected = dist.Normal(0.0, 1.0).log_prob(torch.ones(4)) + dist.Normal(1.0, 1.0).log_prob(v[rows])
    for _ in range(2):
        torch.testing.assert_close(program.log_joint({"h": torch.ones(4)}), expected)


@pytest.mark.parametrize("chosen", [[7, 2, 5], [2, 0, 1]], ids=["some rows", "a permutation of all rows"])
def test_explicit_rows_are_noted(chosen: list[int]) -> None:
    def model(v: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(v), subsample=index):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    program = Program(model, (torch.zeros(max(chosen) + 1), torch.tensor(chosen)), {})
    assert program.explicit_plates == {"data"}
    assert program.indices["data"].tolist() == chosen
    assert not program.draws_rows


def test_mask_and_scale_stay_in_the_sum() -> None:
    mask = torch.tensor([True, False, True])

    def model(v: Tensor) -> None:
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v, h = torch.randn(3), torch.randn(3)
    prior, likelihood = dist.Normal(0.0, 1.0).log_prob(h), dist.Normal(h, 1.0).log_prob(v)
    torch.testing.assert_close(Program(model, (v,), {}).log_joint({"h": h}), mask * (prior + 0.5 * likelihood))


def test_a_factor_statement_is_a_term_of_the_sum() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.factor("coupling", 3 * h * v)

    program = Program(model, (torch.tensor([1.0, 2.0]),), {})
    torch.testing.assert_close(
        program.log_joint({"h": torch.ones(2)}), torch.tensor([3.0, 6.0]) + torch.tensor(0.5).log()
    )


def test_reading_a_program_draws_nothing_and_changes_nothing() -> None:
    def model(v: Tensor) -> None:
        pyro.param("w", torch.tensor(1.0))
        with pyro.plate("data", 10, subsample_size=4) as index:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    v = torch.zeros(10)
    model(v)
    state = torch.get_rng_state()
    with poutine.trace() as outer:
        program = Program(model, (v,), {})
        assert program.dependencies["v"] == {"h"}
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(outer.trace.nodes)


def test_only_independent_plain_priors_are_peeled() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("one_hot", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("depends", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("real", dist.Normal(0.0, 1.0))
            pyro.sample("table", Tabulated(torch.zeros(4), [1, 1]))
            pyro.sample("wrapped", dist.Bernoulli(0.5).expand([2]).mask(torch.tensor(False)).to_event(1))
            with poutine.mask(mask=torch.tensor(False)):
                pyro.sample("masked", dist.Bernoulli(0.5))
            with poutine.scale(scale=2.0):
                pyro.sample("scaled", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(a, 1.0), obs=v)

    assert Program(model, (torch.zeros(2),), {}).peelable == {"a", "one_hot", "scaled"}


def test_skipped_sites_leave_the_sum() -> None:
    v = torch.randn(4, 3)
    program = Program(nested_left, (v,), {})
    values = {"a": torch.ones(4, 1), "c": torch.randn(4, 3)}
    prior = torch.tensor(0.3).log()
    torch.testing.assert_close(program.log_joint(values, skip={"a"}), program.log_joint(values) - prior)
    with pytest.raises(ValueError, match="Expected at least one site in the sum, but got none. Skip fewer sites."):
        program.log_joint(values, skip={"a", "c", "v"})


def test_sites_are_found_by_name() -> None:
    program = Program(nested, (torch.zeros(3, 4),), {})
    assert program.site("c").name == "c"
    with pytest.raises(KeyError, match="nothing"):
        program.site("nothing")


def test_programs_without_visible_or_latent_sites_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Expected a model with a visible site, but got one in which nothing is observed"
    ):
        Program(lambda: pyro.sample("h", dist.Normal(0.0, 1.0)), (), {})
    with pytest.raises(ValueError, match="Expected a model with a latent site, but got one in which every site is"):
        Program(lambda: pyro.sample("v", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)), (), {})


def test_sequential_plates_are_refused_by_name() -> None:
    def model(v: Tensor) -> None:
        for i in pyro.plate("steps", 2):
            h = pyro.sample(f"h{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"v{i}", dist.Normal(h, 1.0), obs=v[i])

    with pytest.raises(
        ValueError, match="Expected vectorised plates, but got the sequential plate 'steps' around .*'h0'"
    ):
        Program(model, (torch.zeros(2),), {})


def drops_an_inner_plate(v: Tensor, *, keeps: bool) -> None:
    """The sum over the inner plate takes its dimension along, unless it keeps it."""
    with pyro.plate("data", v.shape[-1], dim=-1):
        with pyro.plate("inner", 2, dim=-2):
            h = pyro.sample("h", dist.Bernoulli(0.4))
        total = h.sum(-2, keepdim=True) if keeps else h.sum(-2)
        pyro.sample("v", dist.Normal(total, 1.0), obs=v)


def test_particles_are_not_summed_in_the_place_of_a_plate() -> None:
    v = torch.randn(3)
    values = {"h": torch.randint(2, (5, 2, 3)).double()}
    program = Program(drops_an_inner_plate, (v,), {"keeps": True})
    found = program.log_joint(values, num_particles=5)
    for number in range(5):
        alone = program.log_joint({"h": values["h"][number]})
        torch.testing.assert_close(found[number], alone, rtol=1e-12, atol=1e-12)
    program = Program(drops_an_inner_plate, (v,), {"keeps": False})
    torch.testing.assert_close(program.log_joint({"h": values["h"][4]}), found[4])
    with pytest.raises(
        ValueError,
        match="Expected site 'v' to keep the dimensions of its plates under vectorised evaluation, but got batch "
        r"shape \(.*5, 3\). Use negative dimensions and keepdim=True.",
    ):
        program.log_joint(values, num_particles=5)


def test_refreshed_latents_are_those_of_the_present_theta_and_the_rest_is_not_run() -> None:
    ran: list[str] = []

    def model(v: Tensor) -> None:
        logit = pyro.param("logit", torch.zeros(()))
        with pyro.plate("data", len(v), dim=-1):
            h = pyro.sample("h", dist.Bernoulli(logits=logit))
            c = pyro.sample("c", dist.Normal(h + logit, 1.0))
            ran.append("after")
            pyro.sample("v", dist.Normal(c, 1.0), obs=v)

    program = Program(model, (torch.zeros(4),), {})
    pyro.get_param_store()["logit"] = torch.tensor(1.5)
    ran.clear()
    program.refresh()
    assert not ran
    assert base_of(program.site("h").fn).logits.unique().tolist() == [1.5]
    assert bool((program.site("c").fn.mean >= 1.5).all())
    # Nothing of the run that was cut short is left: plates are free, and handlers are gone.
    assert not pyro.poutine.runtime._PYRO_STACK
    with pyro.plate("another", 3, dim=-1):
        assert pyro.sample("x", dist.Normal(0.0, 1.0)).shape == (3,)
    truth = Program(model, (torch.zeros(4),), {})
    values = {"h": torch.ones(4), "c": torch.randn(4)}
    torch.testing.assert_close(program.log_joint(values), truth.log_joint(values))


def test_the_structure_is_read_off_first_states_without_a_draw() -> None:
    seen: list[Tensor] = []

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.OneHotCategorical(torch.ones(2, 3)).to_event(1))
            seen.append(h)
            pyro.sample("v", dist.Normal(h.sum((-1, -2)), 1.0), obs=v)

    state = torch.get_rng_state()
    program = Program(model, (torch.zeros(4),), {})
    assert torch.equal(torch.get_rng_state(), state)
    first = torch.zeros(4, 2, 3)
    first[..., 0] = 1
    assert torch.equal(seen[0], first)
    assert program.site("h").num_features == 6


def test_the_origin_is_made_once_for_a_width_and_stays_zero() -> None:
    program = Program(nested, (torch.randn(3, 4),), {})
    origin = program.origin(7)
    assert program.origin(7) is origin
    assert origin.requires_grad
    assert program.origin(5).shape == (4, 5)
    assert not bool(origin.any())
