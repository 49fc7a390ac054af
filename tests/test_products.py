from __future__ import annotations

import pytest
import torch

from pyro_ext.products import tall_product


@pytest.mark.parametrize("num_rows", [1, 5, 1024, 4096, 5000])
def test_tall_products(float64: None, num_rows: int) -> None:
    a, b = torch.randn(num_rows, 3), torch.randn(num_rows, 2)
    torch.testing.assert_close(tall_product(a, b), a.mT @ b, rtol=1e-12, atol=1e-12)
    strided = torch.randn(3, num_rows).mT
    torch.testing.assert_close(tall_product(strided, b[:, :1]), strided.mT @ b[:, :1], rtol=1e-12, atol=1e-12)
