"""Learning from batches that are never held together: an epoch is one EM step on all of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_ext import EM, Better, ClosedForm, FixedPoint, Gradient, QuasiNewton, Status, StopFit, Warm, fit
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import BinarySparseCoding, FactorAnalysis, GaussianMixture
from pyro_ext.models.covariance import Full

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = [
    pytest.param(lambda: GaussianMixture(2, 3), MeanField, id="mixture"),
    pytest.param(lambda: GaussianMixture(2, 3, covariance=Full()), MeanField, id="full mixture"),
    pytest.param(lambda: FactorAnalysis(3, 2), Structured, id="factor analysis"),
    pytest.param(lambda: BinarySparseCoding(3, 3), Structured, id="sparse coding, joint"),
]


def data(num_rows: int = 44) -> Tensor:
    return torch.randn(num_rows, 3) @ torch.randn(3, 3) + (torch.arange(num_rows) % 2)[:, None]


def driver(make: Callable[[], Any], guide: Callable[[Any], Any], v: Tensor, m_step: Any = None, **settings: Any) -> EM:
    torch.manual_seed(1)
    model = make()
    model.initialize(v)
    return EM(model, guide(model), e_step=FixedPoint(**settings), m_step=ClosedForm() if m_step is None else m_step)


def theta(em: EM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in em.model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def batches(v: Tensor) -> DataLoader[Any]:
    """Batches of 10, the last of 4."""
    return DataLoader(v, batch_size=10)


# ---------------------------------------------------------------- an epoch is an EM step


@pytest.mark.parametrize(("make", "guide"), FAMILIES)
def test_the_trajectory_is_that_of_em_on_all_data(make: Any, guide: Any) -> None:
    v = data()
    whole, streamed = driver(make, guide, v), driver(make, guide, v)
    assert_same(theta(streamed), theta(whole))
    expected: list[dict[str, Tensor]] = []
    found: list[dict[str, Tensor]] = []
    run = whole.run(v, max_steps=6, tolerance=0.0, progress=False, callbacks=[lambda e: expected.append(theta(e.svi))])
    history = fit(streamed, batches(v), 6, progress=False, callbacks=[lambda e: found.append(theta(e.svi))])
    for now, then in zip(found, expected, strict=True):
        assert_same(now, then)
    assert not torch.equal(*(next(iter(x.values())) for x in (expected[0], expected[1])))
    # The losses of an epoch belong to the theta before its M-step.
    sizes = torch.tensor([10.0, 10, 10, 10, 4])
    losses = (torch.tensor(history.loss).reshape(6, 5) * sizes).sum(-1) / 44
    torch.testing.assert_close(losses, torch.tensor(run.loss), atol=1e-10, rtol=1e-10)


def test_a_hand_written_loop_and_shuffled_batches_come_to_the_same() -> None:
    v = data()
    make = lambda: GaussianMixture(2, 3)  # noqa: E731
    by_fit, by_hand = driver(make, MeanField, v), driver(make, MeanField, v)
    fit(by_fit, batches(v), 3, progress=False)
    for _ in range(3):
        before = theta(by_hand)
        with by_hand.epoch():
            for batch in v[torch.randperm(44)].split(7):
                by_hand.step(batch)
                assert_same(theta(by_hand), before)
    assert_same(theta(by_hand), theta(by_fit))
    # Outside of an epoch a step is a whole one.
    by_hand.step(v)
    by_fit.run(v, max_steps=1, progress=False)
    assert_same(theta(by_hand), theta(by_fit))


def test_held_out_data_and_callbacks_see_the_new_theta() -> None:
    v, w = data(), data()
    em = driver(lambda: GaussianMixture(2, 3), MeanField, v)
    seen = []
    history = fit(
        em, batches(v), 2, held_out=[w], progress=False, callbacks=[lambda e: seen.append(em.evaluate_loss(w) / 44)]
    )
    assert history.held_out == pytest.approx(seen, rel=1e-12)
    assert history.held_out[0] != history.held_out[1]


def test_sums_are_taken_in_double_precision() -> None:
    torch.set_default_dtype(torch.float32)
    calls: list[dict[str, Tensor]] = []

    class Counting(GaussianMixture):
        def statistics(self, data: Any, posterior: Any) -> dict[str, Tensor]:
            count = 2.0**24 if data["v"].shape[0] == 3 else 1.0
            return {"count": torch.tensor(count), "one": torch.ones(1)}

        def maximize(self, statistics: Any) -> None:
            calls.append(statistics)

    model = Counting(2, 1)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    fit(em, [torch.randn(3, 1), *torch.randn(8, 2, 1)], progress=False)
    (found,) = calls
    assert found["count"].item() == 2.0**24 + 8
    assert found["count"].dtype is found["one"].dtype is torch.float32


def test_other_m_steps_know_no_epochs() -> None:
    v = data()
    for m_step in (ClosedForm(lambda t: 0.5), QuasiNewton(2), Gradient(pyro.optim.SGD({"lr": 1e-3})), None):
        one, other = (driver(lambda: GaussianMixture(2, 3), MeanField, v, m_step or ClosedForm()) for _ in range(2))
        if m_step is None:
            one.m_step = other.m_step = None
        elif isinstance(m_step, ClosedForm):
            other.m_step = ClosedForm(lambda t: 0.5)
        fit(one, batches(v), progress=False)
        for batch in v.split(10):
            other.step(batch)
        assert_same(theta(one), theta(other))


# ---------------------------------------------------------------- how an epoch fails


def test_an_epoch_that_is_broken_off_leaves_theta_and_no_trace() -> None:
    v = data()
    em, fresh = (driver(lambda: GaussianMixture(2, 3), MeanField, v) for _ in range(2))
    before = theta(em)

    def interrupted() -> Iterator[Tensor]:
        yield v[:10]
        raise KeyboardInterrupt

    history = fit(em, interrupted(), progress=False)
    assert history.status is Status.INTERRUPTED
    assert_same(theta(em), before)

    def spoilt_epoch() -> None:
        with em.epoch():
            em.step(v[:10])
            em.step(torch.full((5, 3), torch.nan))

    with pytest.raises(ValueError, match="Expected finite values in v"):
        spoilt_epoch()
    assert_same(theta(em), before)
    fit(em, batches(v), progress=False)
    fit(fresh, batches(v), progress=False)
    assert_same(theta(em), theta(fresh))


def test_a_refused_maximisation_is_named_and_undone() -> None:
    v = data()

    class Refusing(GaussianMixture):
        def maximize(self, statistics: Any) -> None:
            super().maximize(statistics)
            raise RuntimeError("component 1 is gone")

    em = driver(lambda: Refusing(2, 3), MeanField, v)
    before = theta(em)
    with pytest.raises(RuntimeError, match="component 1 is gone") as caught:
        fit(em, batches(v), progress=False)
    assert caught.value.__notes__ == ["Raised in fit at the end of epoch 1."]
    assert_same(theta(em), before)
    with em.epoch():
        pass
    assert_same(theta(em), before)


def test_statistics_that_are_not_finite_are_refused_at_their_batch() -> None:
    class Spoilt(GaussianMixture):
        def statistics(self, data: Any, posterior: Any) -> dict[str, Tensor]:
            found = super().statistics(data, posterior)
            return found | {"sum": found["sum"] * (torch.nan if data["v"].shape[0] == 4 else 1)}

    v = data()
    em = driver(lambda: Spoilt(2, 3), MeanField, v)
    before = theta(em)
    with pytest.raises(ValueError, match="the statistic 'sum'") as caught:
        fit(em, batches(v), progress=False)
    assert "Raised in fit at step 5 (epoch 1)" in caught.value.__notes__[0]
    assert_same(theta(em), before)


def test_epochs_do_not_nest_and_runs_stay_outside() -> None:
    v = data()
    em = driver(lambda: GaussianMixture(2, 3), MeanField, v)
    before = theta(em)
    with pytest.raises(RuntimeError, match="Expected one epoch at a time"), em.epoch(), em.epoch():
        pass
    with pytest.raises(RuntimeError, match="Expected a new start outside of `EM.epoch"), em.epoch():
        em.run(v, progress=False)
    assert_same(theta(em), before)


def test_a_callback_that_stops_comes_after_the_m_step() -> None:
    v = data()
    em, other = (driver(lambda: GaussianMixture(2, 3), MeanField, v) for _ in range(2))

    def stop(event: Any) -> None:
        raise StopFit

    assert fit(em, batches(v), 5, callbacks=[stop], progress=False).status is Status.STOPPED
    fit(other, batches(v), 1, progress=False)
    assert_same(theta(em), theta(other))


# ---------------------------------------------------------------- what a table guide makes of batches


def test_the_first_batch_is_a_batch_like_any_other() -> None:
    """The table is set up with its rows: after that no answer of the last epoch may help it alone."""
    v = data(40)
    make = lambda: BinarySparseCoding(3, 3)  # noqa: E731
    one, other = driver(make, MeanField, v), driver(make, MeanField, v)
    fit(one, list(v.split(10)), 4, progress=False)
    fit(other, list(v.split(10))[::-1], 4, progress=False)
    assert_same(theta(one), theta(other))


@pytest.mark.parametrize("start", [Warm(), Better()])
def test_starts_from_the_last_answer_need_the_tables_data(start: Any) -> None:
    v = data(40)
    em = driver(lambda: BinarySparseCoding(3, 3), MeanField, v, start=start)
    em.step(v[:10])
    em.step(v[:10].clone())
    before = theta(em)
    name = type(start).__name__
    with pytest.raises(ValueError, match=rf"Expected Cold\(\) starts for data that the table .* but got {name}\(\)"):
        em.step(v[10:20])
    assert_same(theta(em), before)
    em.infer(v[10:20])
    em.evaluate_loss(v[10:20])


@pytest.mark.parametrize("start", [Warm(), Better()])
def test_where_one_sweep_is_exact_any_start_will_do(start: Any) -> None:
    v = data()
    em, cold = (
        driver(lambda: GaussianMixture(2, 3), MeanField, v, start=start),
        driver(FAMILIES[0].values[0], MeanField, v),
    )
    fit(em, batches(v), 3, progress=False)
    fit(cold, batches(v), 3, progress=False)
    assert_same(theta(em), theta(cold))


# ---------------------------------------------------------------- memory


class Fresh(IterableDataset[Tensor]):
    """Batches that exist only while somebody holds them; weak references to all."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[Tensor]:
        for size in (10, 10, 10, 4):
            batch = torch.randn(size, 3)
            self.seen.append(weakref.ref(batch))
            yield batch
            del batch

    def alive(self) -> list[int]:
        return [number for number, reference in enumerate(self.seen) if reference() is not None]


@pytest.mark.parametrize("step_size", [None, lambda t: (t + 2) ** -0.7], ids=["epoch", "stepwise"])
@pytest.mark.parametrize(("make", "guide"), FAMILIES)
def test_no_batch_outlives_its_step(make: Any, guide: Any, step_size: Any) -> None:
    """Without the garbage collector. The first one stays with the guide, whose structure was read from it."""
    em, source = driver(make, guide, data(), ClosedForm(step_size)), Fresh()
    alive: list[list[int]] = []
    step = em.step

    def watched(v: Tensor) -> float:
        alive.append(source.alive())
        return step(v)

    em.step = watched
    gc.collect()
    gc.disable()
    try:
        history = fit(em, DataLoader(source, batch_size=None), 2, progress=False)
        del em.step
        remaining = source.alive()
    finally:
        gc.enable()
    assert history.steps == len(source.seen) == 8
    assert alive[0] == [0]
    assert all(set(now) <= {0, number - 1, number} for number, now in enumerate(alive))
    assert set(remaining) <= {0, 7}
    assert em.guide.is_set_up


def test_statistics_that_depend_on_theta_keep_no_graph() -> None:
    class Leaning(GaussianMixture):
        def statistics(self, data: Any, posterior: Any) -> dict[str, Tensor]:
            found = super().statistics(data, posterior)
            found["sum"] = found["sum"] + 0 * self.locs
            return found

    kept: list[bool] = []

    class Watched(Leaning):
        def maximize(self, statistics: Any) -> None:
            kept.append(any(value.requires_grad for value in statistics.values()))
            super().maximize(statistics)

    v = data()
    fit(driver(lambda: Watched(2, 3), MeanField, v), batches(v), progress=False)
    assert kept == [False]


# ---------------------------------------------------------------- subsampled programs


class Draws:
    """A mixture whose plate takes the rows that it is told; statistics of the rows taken."""

    def __init__(self) -> None:
        self.weights, self.locs = torch.tensor([0.5, 0.5]), torch.tensor([-0.5, 0.5])
        self.__name__ = "draws"

    def __call__(self, v: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(v), subsample=index):
            h = pyro.sample("h", dist.OneHotCategorical(self.weights))
            pyro.sample("v", dist.Normal(h @ self.locs, 1.0), obs=v[index])

    def statistics(self, data: Any, posterior: Any) -> dict[str, Tensor]:
        rows, r = data["v"][data["index"]], posterior["h"].mean
        return {"count": torch.tensor(float(len(rows))), "r": r.sum(0), "sum": rows @ r}

    def maximize(self, statistics: Any) -> None:
        self.weights = statistics["r"] / statistics["count"]
        self.locs = statistics["sum"] / statistics["r"]


@pytest.mark.parametrize("step_size", [None, lambda t: 1.0])
def test_a_subsampled_program_counts_the_rows_that_it_took(step_size: Any) -> None:
    v, index = torch.randn(24), torch.arange(0, 24, 4)
    sub, plain = Draws(), Draws()
    em = EM(sub, MeanField(sub), e_step=FixedPoint(), m_step=ClosedForm(step_size))
    reference = EM(plain, MeanField(plain), e_step=FixedPoint(), m_step=ClosedForm())
    rows, everything = v[index], torch.arange(6)
    for _ in range(3):
        loss, expected = em.step(v, index), reference.step(rows, everything)
        assert loss == pytest.approx(4 * expected, rel=1e-12)
    torch.testing.assert_close(sub.weights, plain.weights, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sub.locs, plain.locs, atol=1e-12, rtol=1e-12)


def test_the_losses_of_a_subsampled_program_are_per_row() -> None:
    v = torch.randn(24)
    model = Draws()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    parts = torch.arange(24).split(6)
    history = fit(em, [(v, index) for index in parts], progress=False)
    log_p = (model.weights.log() + dist.Normal(model.locs, 1.0).log_prob(v[:, None])).logsumexp(-1)
    assert history.loss == pytest.approx([-log_p[index].mean().item() for index in parts], rel=1e-10)
