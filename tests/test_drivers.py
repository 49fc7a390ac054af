"""What is read off a driver."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO
from torch import nn

from pyro_ext.drivers import loss_label_of, number, objective_of, parts_of, sleep_loss_of


class Reporting(Trace_ELBO):
    last_sleep_loss: float | None = None
    loss_label = "-log p(h, v)"


def svi(elbo: object) -> SVI:
    return SVI(lambda: None, lambda: None, pyro.optim.Adam({}), elbo)


@pytest.mark.parametrize(
    ("elbo", "label"),
    [
        (Trace_ELBO(), "-L"),
        (TraceEnum_ELBO(), "-L"),
        (JitTrace_ELBO(), "-L"),
        (RenyiELBO(), "loss"),
        (TraceTailAdaptive_ELBO(), "loss"),
        (lambda model, guide: torch.zeros(()), "loss"),
        (Reporting(), "-log p(h, v)"),
    ],
)
def test_label(elbo, label):
    assert loss_label_of(svi(elbo)) == label


def test_the_drivers_own_label_comes_first():
    driver = svi(Reporting())
    driver.loss_label = "mine"
    assert loss_label_of(driver) == "mine"


def test_sleep_loss():
    elbo = Reporting()
    driver = svi(elbo)
    assert objective_of(driver) is elbo
    assert math.isnan(sleep_loss_of(driver))
    elbo.last_sleep_loss = torch.tensor(2.5)
    assert sleep_loss_of(driver) == 2.5
    assert sleep_loss_of(svi(Trace_ELBO())) is None
    assert sleep_loss_of(SimpleNamespace(last_sleep_loss=1.0)) == 1.0


def test_parts_are_found_once_each():
    module, torch_optim = nn.Linear(2, 1), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optim = pyro.optim.Adam({})
    driver = SVI(module.forward, module, optim, Trace_ELBO())
    driver.parts = (torch_optim, module)
    assert parts_of(driver) == (module, optim, torch_optim)
    assert parts_of(SimpleNamespace(model=lambda: None, optim=torch_optim)) == (torch_optim,)


@pytest.mark.parametrize("loss", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), (2.0, 7.0), (torch.tensor(2.0),)])
def test_number(loss):
    assert number(loss, "step") == 2.0


@pytest.mark.parametrize("loss", [None, "2", (), {"w": 2.0}, torch.zeros(2)])
def test_no_number(loss):
    with pytest.raises(TypeError, match=r"Expected `step` to return the loss, a number .*but got .*Return -L in nats"):
        number(loss, "step")
