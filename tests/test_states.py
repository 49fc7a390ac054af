"""Enumeration of joint states."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyro_ext.states import enumerate_states, num_states, state_weights

UNITS = [[1], [1, 1, 1], [3], [1, 3], [3, 1], [2, 1, 4], [1, 1, 3, 2]]


@pytest.mark.parametrize("units", UNITS, ids=str)
def test_states_are_all_joint_states_in_lexicographic_order(units: list[int]) -> None:
    choices = [[[0.0], [1.0]] if k == 1 else torch.eye(k).tolist() for k in units]
    expected = [[x for part in parts for x in part] for parts in itertools.product(*choices)]
    assert enumerate_states(units).tolist() == expected
    assert num_states(units) == len(expected)


@pytest.mark.parametrize("units", UNITS, ids=str)
def test_weights_give_the_index_of_a_state(units: list[int]) -> None:
    index = enumerate_states(units).double() @ state_weights(units)
    assert index.tolist() == list(range(num_states(units)))


def test_no_units_have_one_state() -> None:
    assert num_states([]) == 1
    assert enumerate_states([]).shape == (1, 0)


def test_states_take_the_default_dtype(float64: None) -> None:
    assert enumerate_states([1, 3]).dtype == torch.float64
    assert enumerate_states([1, 1]).dtype == torch.float64
