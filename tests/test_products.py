from __future__ import annotations

import pytest
import torch

from pyro_ext.products import CHUNK_BYTES, row_chunks, tall_product, weighted_moments
from pyro_ext.tracing import tracing


@pytest.mark.parametrize("num_rows", [1, 5, 1024, 4096, 5000])
def test_tall_products(float64: None, num_rows: int) -> None:
    a, b = torch.randn(num_rows, 3), torch.randn(num_rows, 2)
    torch.testing.assert_close(tall_product(a, b), a.mT @ b, rtol=1e-12, atol=1e-12)
    strided = torch.randn(3, num_rows).mT
    torch.testing.assert_close(tall_product(strided, b[:, :1]), strided.mT @ b[:, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 70_000])
def test_chunks_are_all_rows_once(num_rows: int) -> None:
    value = torch.empty(num_rows, 5)
    rows = torch.arange(num_rows)
    parts = [rows[chunk] for chunk in row_chunks(value)]
    assert torch.equal(torch.cat([rows[:0], *parts]), rows)
    assert all(len(part) * 5 * value.element_size() <= CHUNK_BYTES for part in parts)
    with tracing():
        assert len(list(row_chunks(value))) <= 1


@pytest.mark.parametrize("num_rows", [1, 3, 60_000])
def test_weighted_moments(float64: None, num_rows: int) -> None:
    w, v, shift = torch.rand(num_rows, 2), 50 + torch.randn(num_rows, 3), torch.full((3,), 50.0)
    kept = v.clone()
    first, second = weighted_moments(w, v, shift)
    x = v - shift
    torch.testing.assert_close(first, torch.einsum("nk,nd->kd", w, x), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(second, torch.einsum("nk,nd->kd", w, x * x), rtol=1e-10, atol=1e-9)
    assert torch.equal(v, kept)


def test_gradients_of_weighted_moments(float64: None) -> None:
    w, v = torch.rand(6, 2, requires_grad=True), torch.randn(6, 3)
    first, second = weighted_moments(w, v, torch.zeros(3))
    (found,) = torch.autograd.grad(first.sum() + 2 * second.sum(), w)
    torch.testing.assert_close(found, (v + 2 * v.square()).sum(-1, keepdim=True).expand(6, 2))
