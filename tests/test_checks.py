from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pyro_ext.checks import check_binary, check_count, check_finite, check_rows, check_statistics

LIKE = torch.zeros(3)


def test_good_data_pass() -> None:
    check_count(1, "n")
    check_count(np.int64(3), "n")
    check_rows(torch.zeros(2, 3), 3)
    check_rows(torch.zeros(2, 3), 3, like=LIKE)
    check_rows(torch.zeros(2, 5, 3), 3, like=LIKE, axes=("N", "T"))
    check_finite(torch.zeros(2, 3))
    check_binary(torch.tensor([[0.0, 1.0]]))
    check_statistics({"count": torch.tensor(2.0), "sum": torch.zeros(3)}, "sum")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_count(1.0, "n"), TypeError, "Expected n to be an int, but got 1.0 of type float. Pass a whole"),
        (lambda: check_count(True, "n"), TypeError, "Expected n to be an int, but got True of type bool."),
        (lambda: check_count(0, "n"), ValueError, "Expected n >= 1, but got 0. Pass a positive whole number."),
        (
            lambda: check_rows(np.zeros((2, 3)), 3),
            TypeError,
            "Expected v to be a torch.Tensor, but got ndarray. Convert it, `torch.as_tensor(v)`.",
        ),
        (
            lambda: check_rows(torch.zeros(3), 3),
            ValueError,
            "Expected v of shape (N, 3), but got (3,). Add the missing dimensions; a single datum is `v.unsqueeze(0)`.",
        ),
        (
            lambda: check_rows(torch.zeros(2, 4, 3), 12),
            ValueError,
            "Expected v of shape (N, 12), but got (2, 4, 3). Flatten each datum, for instance `v.flatten(1)`.",
        ),
        (
            lambda: check_rows(torch.zeros(4, 3), 3, name="y", axes=("N", "T")),
            ValueError,
            "Expected y of shape (N, T, 3), but got (4, 3). Add the missing dimensions",
        ),
        (
            lambda: check_rows(torch.zeros(2, 4), 3),
            ValueError,
            "Expected v of shape (N, 3), but got (2, 4). Select 3 columns, or build the model with width 4.",
        ),
        (
            lambda: check_rows(torch.zeros(0, 3), 3),
            ValueError,
            "Expected at least one row in v, but got shape (0, 3). Pass data that are not empty.",
        ),
        (
            lambda: check_rows(torch.zeros(2, 3, dtype=torch.int64), 3),
            TypeError,
            "Expected v of a floating dtype, but got torch.int64. Convert it, `v.to(torch.float32)`.",
        ),
        (
            lambda: check_rows(torch.zeros(2, 3, dtype=torch.int64), 3, like=LIKE),
            TypeError,
            "Expected v of dtype torch.float32, that of the parameters, but got torch.int64. "
            "Convert the data, `v.to(torch.float32)`.",
        ),
        (
            lambda: check_rows(torch.zeros(2, 3, dtype=torch.float64), 3, like=LIKE),
            TypeError,
            "Expected v of dtype torch.float32, that of the parameters, but got torch.float64. "
            "Convert the data, `v.to(torch.float32)`, or the model, `model.to(torch.float64)`.",
        ),
        (
            lambda: check_rows(torch.zeros(2, 3, device="meta"), 3, like=LIKE),
            ValueError,
            "Expected v on device cpu, that of the parameters, but got meta. "
            "Move the data, `v.to('cpu')`, or the model, `model.to('meta')`.",
        ),
        (
            lambda: check_finite(torch.tensor([[0.0, 1.0], [math.nan, -math.inf]])),
            ValueError,
            "Expected finite values in v, but got 2 NaN or infinite, the first at (1, 0). Leave the rows",
        ),
        (
            lambda: check_binary(torch.tensor([[0.0, 1.0, 0.5], [1.0, 2.0, math.nan]])),
            ValueError,
            "Expected only 0 and 1 in v, but got 3 other values, the first 0.5 at (0, 2). Binarize the data",
        ),
        (
            lambda: check_statistics({"count": torch.tensor(1.0)}, "sum"),
            ValueError,
            "Expected statistics with count, sum, but got count. Pass what this model's statistics() returns.",
        ),
        (
            lambda: check_statistics({"count": torch.tensor(1.0), "sum": torch.tensor([math.nan])}, "sum"),
            ValueError,
            "Expected finite values in the statistic 'sum', but got 1 NaN or infinite, the first at (0,).",
        ),
        (
            lambda: check_statistics({"count": torch.tensor(0.0)}),
            ValueError,
            "Expected statistics of at least one row, but got a count of 0. Sum statistics() over the data first.",
        ),
    ],
)
def test_refusals_name_rule_value_and_remedy(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
