"""Tables of parameters: the data they belong to, and the rows that a subsampled call touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.tables import DataIdentity
from pyro_ext.program import Program

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0


def model(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def drawn(v: Tensor) -> None:
    """The model draws 4 rows itself."""
    with pyro.plate("data", len(v), subsample_size=4) as index:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])


def told(v: Tensor, index: Tensor | None) -> None:
    """The model is told its rows."""
    with pyro.plate("data", len(v), subsample=index) as rows:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v[rows])


def nested(v: Tensor, rows: Tensor | None = None, inner: Tensor | None = None) -> None:
    """Rows at dim -1 (10), an inner plate at dim -2 (6), both subsampled; v is (6, 10)."""
    some_rows: dict[str, Any] = {"subsample": rows} if rows is not None else {"subsample_size": 4}
    some_inner: dict[str, Any] = {"subsample": inner} if inner is not None else {"subsample_size": 2}
    with pyro.plate("rows", 10, dim=-1, **some_rows) as i:
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", 6, dim=-2, **some_inner) as j:
            x = pyro.sample("x", dist.Normal(a, 1.0))
            pyro.sample("v", dist.Normal(x, 1.0), obs=v[j[:, None], i])


def table(guide: Any, name: str = "h") -> Tensor:
    return guide.table(next(block for block in guide.blocks if block.name == name))


def touched(new: Tensor, old: Tensor) -> Tensor:
    return (new.detach() != old).any(-1)


# ---------------------------------------------------------------- whose data


def test_a_clone_is_the_same_data() -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    guide(v)
    guide(v.clone())
    guide(v.detach())
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(v.clone())


@pytest.mark.parametrize("change", ["values", "order", "length", "dtype", "in place", "one entry"])
def test_other_data_are_refused(change: str) -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    guide(v)
    before = table(guide).detach().clone()
    other = {
        "values": lambda: torch.randn(5),
        "order": lambda: v.flip(0),
        "length": lambda: v[:1],
        "dtype": lambda: v.float(),
        "in place": lambda: v.add_(1),
        "one entry": lambda: torch.cat([v[:4], v[4:] + 1e-9]),
    }[change]()
    match = r"Expected the data that the table of 'MeanField.*' was set up with, but got other data \(shapes .*em.infer"
    for call in (guide, guide.posterior):
        with pytest.raises(ValueError, match=match):
            call(other)
    with pytest.raises(ValueError, match=match):
        SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step(other)
    assert torch.equal(table(guide), before)


def test_an_em_infers_other_data_for_the_guide() -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    EM(model, guide, e_step=FixedPoint(), m_step=None).step(v)
    before = table(guide).detach().clone()
    other = torch.randn(3)
    torch.testing.assert_close(guide.posterior(other)["h"].mean, other / 2)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, v / 2)
    assert torch.equal(table(guide), before)


def test_identity_looks_at_every_tensor() -> None:
    v, w = torch.randn(5), torch.tensor([1.0, torch.nan, torch.inf])
    identity = DataIdentity((v,), {"rest": {"w": w, "n": 3}})
    assert identity.matches((v.clone(),), {"rest": {"w": w.clone(), "n": 3}})
    assert not identity.matches((v,), {"rest": {"w": w + 1, "n": 3}})
    assert not identity.matches((v,), {})
    assert not identity.matches((v, w, w), {})
    assert identity.matches((), {})
    assert identity.matches((v,), {"rest": {"w": w, "n": 3}})


def test_calls_without_data_use_the_table_at_hand() -> None:
    data = torch.randn(5)

    def closed(v: Tensor | None = None) -> None:
        model(data if v is None else v)

    guide = MeanField(closed)
    guide()
    assert guide(None)["h"].shape == (5,)


# ---------------------------------------------------------------- which rows


def test_rows_that_the_model_draws_are_the_guides() -> None:
    v = torch.randn(20)
    guide = MeanField(drawn)
    guide.setup(v)
    assert table(guide).shape == (20, 2)
    for _ in range(5):
        old = table(guide).detach().clone()
        SVI(drawn, guide, SGD({"lr": 0.1}), Trace_ELBO()).step(v)
        assert int(touched(table(guide), old).sum()) == 4
    trace = poutine.trace(guide).get_trace(v)
    replayed = poutine.trace(poutine.replay(drawn, trace=trace)).get_trace(v)
    assert torch.equal(trace.nodes["data"]["value"], replayed.nodes["data"]["value"])


def test_subsampled_losses_are_unbiased() -> None:
    v = torch.randn(20)
    guide = MeanField(drawn)
    guide.setup(v)
    with torch.no_grad():
        table(guide).copy_(0.5 * torch.randn(20, 2))
    loc, scale = table(guide).detach()[:, 0], table(guide).detach()[:, 1].exp()
    prior = dist.Normal(0.0, 1.0).log_prob(loc) - 0.5 * scale**2
    likelihood = dist.Normal(loc, 1.0).log_prob(v) - 0.5 * scale**2
    bound = (prior + likelihood + dist.Normal(loc, scale).entropy()).sum()
    losses = torch.tensor([Trace_ELBO().loss(drawn, guide, v) for _ in range(600)])
    assert abs(losses.mean() + bound) < K * losses.std() / 600**0.5


@pytest.mark.parametrize("rows", [[7, 2, 19, 0], [3], list(reversed(range(20)))], ids=["some", "one", "all, reversed"])
@pytest.mark.parametrize("family", [MeanField, Dirac])
def test_rows_that_the_model_is_told_are_the_tables(family: Callable[[Any], Any], rows: list[int]) -> None:
    v, index = torch.randn(20), torch.tensor(rows)
    guide = family(told)
    guide.setup(v, index)
    assert table(guide).shape[0] == 20
    with torch.no_grad():
        table(guide)[:, 0] = 100 * torch.arange(20.0)
        if family is MeanField:
            table(guide)[:, 1] = -20
    torch.testing.assert_close(guide(v, index)["h"], 100 * index.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(guide.posterior(v, index)["h"].mean, 100 * index.double())
    old = table(guide).detach().clone()
    SVI(told, guide, SGD({"lr": 0.1}), Trace_ELBO()).step(v, index)
    assert touched(table(guide), old).nonzero().squeeze(-1).tolist() == sorted(rows)


def test_told_rows_may_change_in_number_from_call_to_call() -> None:
    v = torch.randn(20)
    guide = MeanField(told)
    em = EM(told, guide, e_step=FixedPoint(), m_step=None)
    for rows in ([7, 2, 19, 0], [5], [11, 3]):
        em.step(v, torch.tensor(rows))
        torch.testing.assert_close(guide.posterior(v, torch.tensor(rows))["h"].mean, v[rows] / 2)
    assert guide.posterior(v, torch.tensor([7, 5, 3]))["h"].entropy().shape == (3,)
    torch.testing.assert_close(guide.posterior(v, torch.tensor([7, 5, 3]))["h"].mean, v[[7, 5, 3]] / 2)


@pytest.mark.parametrize("rows", [[7, 2, 19, 0], list(reversed(range(20)))], ids=["some", "all, reversed"])
def test_em_writes_the_rows_of_the_model(rows: list[int]) -> None:
    v, index = torch.randn(20), torch.tensor(rows)
    guide = MeanField(told)
    guide.setup(v, index)
    old = table(guide).detach().clone()
    em = EM(told, guide, e_step=FixedPoint(), m_step=None)
    em.step(v, index)
    assert touched(table(guide), old).nonzero().squeeze(-1).tolist() == sorted(rows)
    torch.testing.assert_close(table(guide)[index, 0].detach(), v[index] / 2)


def test_gradient_e_steps_touch_the_rows_of_the_model() -> None:
    v, index = torch.randn(20), torch.tensor([7, 2, 19, 0])
    guide = MeanField(told)
    guide.setup(v, index)
    old = table(guide).detach().clone()
    EM(told, guide, e_step=Gradient(SGD({"lr": 0.1})), m_step=None).step(v, index)
    assert touched(table(guide), old).nonzero().squeeze(-1).tolist() == [0, 2, 7, 19]


# ---------------------------------------------------------------- nested plates


@pytest.mark.parametrize("told_rows", [False, True])
def test_nested_plates_touch_their_elements_only(told_rows: bool) -> None:
    v = torch.randn(6, 10)
    rows, inner = torch.tensor([9, 0, 4]), torch.tensor([5, 1])
    args = (v, rows, inner) if told_rows else (v,)
    guide = MeanField(nested)
    guide.setup(*args)
    old = {name: table(guide, name).detach().clone() for name in ("a", "x")}
    assert (old["a"].shape, old["x"].shape) == ((10, 1), (6, 10, 2))
    SVI(nested, guide, SGD({"lr": 0.1}), Trace_ELBO()).step(*args)
    a, x = touched(table(guide, "a"), old["a"]), touched(table(guide, "x"), old["x"])
    if told_rows:
        expected = torch.zeros(6, 10, dtype=torch.bool)
        expected[inner[:, None], rows] = True
        assert torch.equal(x, expected)
        assert a.nonzero().squeeze(-1).tolist() == [0, 4, 9]
    else:
        assert int(x.sum()) == 8
        assert torch.equal(x.any(0), a)
        assert int(a.sum()) == 4


def test_nested_tables_are_read_and_written_in_place() -> None:
    v = torch.randn(6, 10)
    rows, inner = torch.tensor([9, 0, 4]), torch.tensor([5, 1])
    guide = MeanField(nested)
    guide.setup(v, rows, inner)
    program = Program(nested, (v, rows, inner), {})
    assert not guide.holds_answer
    with torch.no_grad():
        table(guide, "x").copy_(torch.arange(120.0).reshape(6, 10, 2))
    assert guide.holds_answer
    params = guide.rows_parameters(program)
    assert (params["a"].shape, params["x"].shape) == ((3, 1, 1), (3, 2, 2))
    for n, row in enumerate(rows):
        for m, element in enumerate(inner):
            assert torch.equal(params["x"][n, m], table(guide, "x")[element, row].detach())
    new = {name: torch.randn_like(value) for name, value in params.items()}
    old = table(guide, "x").detach().clone()
    guide.assign(program, new)
    for name, value in guide.rows_parameters(program).items():
        assert torch.equal(value, new[name])
    assert int(touched(table(guide, "x"), old).sum()) == 6
    live = guide.rows_parameters(program, detach=False)
    assert all(value.requires_grad for value in live.values())


@pytest.mark.parametrize("e_step", ["fixed point", "gradient"])
def test_subsampled_elements_are_inferred_as_if_all_were_there(e_step: str) -> None:
    """An element's q does not depend on how many of its plate were drawn: terms and entropy count alike."""

    def apart(v: Tensor, inner: Tensor) -> None:
        with pyro.plate("rows", 10, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 6, dim=-2, subsample=inner):
                x = pyro.sample("x", dist.Normal(0.0, 1.0))
                pyro.sample("v", dist.Normal(x, 1.0), obs=v[inner])
            pyro.sample("w", dist.Normal(a, 1.0), obs=v[0])

    v, inner = torch.randn(6, 10), torch.tensor([5, 1])
    guide = MeanField(apart)
    steps = {"fixed point": FixedPoint(), "gradient": Gradient(Adam({"lr": 0.05}), num_steps=300)}
    em = EM(apart, guide, e_step=steps[e_step], m_step=None)
    loss = em.step(v, inner)
    tolerance = 1e-8 if e_step == "fixed point" else 1e-2
    x = table(guide, "x")[inner].detach()
    torch.testing.assert_close(x[..., 0], v[inner] / 2, atol=tolerance, rtol=0)
    torch.testing.assert_close(x[..., 1].exp() ** 2, torch.full((2, 10), 0.5), atol=tolerance, rtol=0)
    # Both factors are exact posteriors: L is log p of the rows, three times that of the two drawn elements.
    log_p = dist.Normal(0.0, 2**0.5).log_prob(v)
    expected = -(log_p[0] + 3 * log_p[inner].sum(0)).sum()
    assert loss == pytest.approx(expected.item(), abs=1e-8 if e_step == "fixed point" else 0.2)
    if e_step == "fixed point":
        draws = torch.tensor([Trace_ELBO().loss(apart, guide, v, inner) for _ in range(200)])
        assert abs(draws.mean() - expected) <= K * draws.std() / 200**0.5 + 1e-9


# ---------------------------------------------------------------- cold starts


def test_forgetting_goes_back_to_the_cold_start() -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    guide.setup(v)
    cold = table(guide).detach().clone()
    EM(model, guide, e_step=FixedPoint(), m_step=None).step(v)
    assert not torch.equal(table(guide), cold)
    tensor = table(guide)
    guide.forget()
    assert torch.equal(table(guide), cold)
    assert table(guide) is tensor
    assert not guide.holds_answer


def test_the_table_is_one_tensor_before_and_after_it_is_seen_by_svi() -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    guide.setup(v)
    tensor = table(guide)
    assert not list(pyro.get_param_store())
    SVI(model, guide, Adam({"lr": 0.1}), TraceMeanField_ELBO()).step(v)
    assert table(guide) is tensor
    assert list(pyro.get_param_store()) == [f"{guide._pyro_name}.tables.h"]


def test_an_undone_setup_leaves_nothing() -> None:
    v = torch.randn(5)
    guide = MeanField(model)
    guide.setup(v)
    guide.undo_setup()
    assert not guide.is_set_up
    assert not list(guide.parameters())
    guide(torch.randn(3))
    assert table(guide).shape == (3, 2)


def test_sites_whose_names_differ_in_punctuation_keep_their_tables_apart() -> None:
    def punctuated(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            a = pyro.sample("a.b", dist.Normal(0.0, 1.0))
            c = pyro.sample("a_b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(a + c.sum(-1), 1.0), obs=v)

    guide = MeanField(punctuated)
    guide.setup(torch.randn(5))
    assert (table(guide, "a.b").shape, table(guide, "a_b").shape) == ((5, 2), (5, 4))
