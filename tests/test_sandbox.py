from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.sandbox import FixedIndices, plate_indices, refusal, sandbox


def model():
    pyro.param("w", torch.randn(2))
    with pyro.plate("data", 10, subsample_size=3) as ind:
        pyro.sample("h", dist.Normal(0.0, 1.0))
    return ind


@pytest.mark.parametrize("fails", [False, True])
def test_a_sandbox_leaves_no_trace(fails):
    kept = pyro.param("kept", torch.ones(2)).unconstrained()
    state = torch.get_rng_state()
    with poutine.trace() as outer, pyro.plate("outside", 4, dim=-1):
        try:
            with sandbox():
                model()  # its plate takes dim -1 as well
                if fails:
                    raise ValueError
        except ValueError:
            assert fails
        h = pyro.sample("after", dist.Normal(0.0, 1.0))
    assert h.shape == (4,)
    assert set(outer.trace.nodes) == {"outside", "after"}
    assert list(pyro.get_param_store()) == ["kept"]
    assert pyro.get_param_store()._params["kept"] is kept
    torch.set_rng_state(state)
    with pyro.plate("outside", 4, dim=-1):
        assert torch.equal(poutine.trace(lambda: pyro.sample("after", dist.Normal(0.0, 1.0)))(), h)


def test_a_refusal_removes_new_parameters_and_success_keeps_them():
    pyro.param("kept", torch.ones(2))

    @refusal()
    def refused():
        model()
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert list(pyro.get_param_store()) == ["kept"]
    with refusal():
        model()
    assert list(pyro.get_param_store()) == ["kept", "w"]


def test_indices_can_be_fixed():
    ind = torch.tensor([7, 2, 0])
    with FixedIndices({"data": ind, "other": torch.zeros(1)}):
        trace = poutine.trace(model).get_trace()
    assert torch.equal(trace.nodes["_RETURN"]["value"], ind)
    assert torch.equal(plate_indices(trace)["data"], ind)


def test_explicit_indices_stay():
    def explicit():
        with pyro.plate("data", 10, subsample=torch.tensor([1, 2])) as ind:
            return ind

    with FixedIndices({"data": torch.tensor([7, 8])}):
        assert torch.equal(poutine.trace(explicit)(), torch.tensor([1, 2]))
