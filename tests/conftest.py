"""Every test starts from an empty parameter store, one seed and Pyro's validation on."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

# The tensors are small: two threads spend their time waiting for each other, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_pyro() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    yield
    torch.set_default_dtype(dtype)
    pyro.enable_validation(True)
    pyro.clear_param_store()


@pytest.fixture
def float64() -> None:
    """Run the test in double precision (restored by ``clean_pyro``)."""
    torch.set_default_dtype(torch.float64)
