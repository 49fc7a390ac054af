"""Going back from a spoilt step."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext.guard import Guard

HERE = "the state before that step was restored"
ONE_BACK = "its parameters were not finite, and the state before the previous step was restored"


def param() -> Tensor:
    return pyro.param("w", torch.zeros(2)).unconstrained()


def take(guard: Guard, value: float) -> None:
    with guard.step(), torch.no_grad():
        param().fill_(value)


def test_undoes_the_last_step_when_the_state_before_it_was_finite():
    guard = Guard(())
    for value in (1.0, 2.0, torch.nan):
        take(guard, value)
    assert guard.is_spoilt
    assert not guard.was_spoilt
    assert guard.undo() == HERE
    assert torch.equal(param(), torch.full((2,), 2.0))
    assert not guard.is_spoilt


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_goes_one_step_further_back_when_that_step_began_spoilt(bad):
    guard = Guard(())
    for value in (1.0, bad, 3.0):
        take(guard, value)
    assert guard.was_spoilt
    assert guard.undo() == ONE_BACK
    assert torch.equal(param(), torch.ones(2))


@pytest.mark.parametrize("steps", [1, 2])
def test_parameters_made_in_a_spoilt_first_step_go_back_to_their_first_value(steps):
    guard = Guard(())
    for _ in range(steps):
        take(guard, torch.nan)
    guard.undo()
    assert torch.equal(param(), torch.zeros(2))


def test_goes_on_after_undoing():
    guard = Guard(())
    for value in (1.0, torch.nan):
        take(guard, value)
    guard.undo()
    for value in (2.0, torch.nan, torch.nan):
        take(guard, value)
    for value in (3.0, 4.0):
        assert guard.undo() == ONE_BACK
        assert torch.equal(param(), torch.full((2,), 2.0))
        take(guard, torch.nan)
        take(guard, value)


def test_an_infinite_value_that_was_there_from_the_start_is_no_reason_to_go_back():
    pyro.param("zero", torch.tensor([1.0, 0.0]), constraint=torch.distributions.constraints.simplex)
    guard = Guard(())
    for value in (1.0, 2.0, 3.0):
        take(guard, value)
    assert not guard.is_spoilt
    assert guard.undo() == HERE
    assert torch.equal(param(), torch.full((2,), 2.0))


@pytest.mark.parametrize(("error", "left"), [(ValueError, []), (KeyboardInterrupt, ["w"])])
def test_an_error_in_the_first_step_leaves_nothing_and_an_interrupt_the_first_values(error, left):
    def fail() -> None:
        with Guard(()).step(), torch.no_grad():
            param().fill_(5.0)
            raise error("in the step")

    with pytest.raises(error, match="in the step"):
        fail()
    assert list(pyro.get_param_store()) == left
    assert torch.equal(param(), torch.zeros(2))


def test_nothing_to_undo_yet():
    with pytest.raises(RuntimeError, match=r"Expected a step to undo, but got none taken yet\. Take it inside"):
        Guard(()).undo()
