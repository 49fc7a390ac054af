"""Checksums of data: exact, the same in every process, and different for other data."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyro_ext import data_identity
from pyro_ext.data_identity import DataIdentity, checksum


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.cfloat]
)
def test_every_entry_and_every_place_counts(dtype: torch.dtype) -> None:
    x = (torch.arange(60).reshape(5, 12) % 7).to(dtype)
    marks = {checksum(x), checksum(x.flip(0)), checksum(x.roll(1))}
    for i, j in itertools.product(range(5), range(12)):
        other = x.clone()
        other[i, j] += 1
        marks.add(checksum(other))
    assert len(marks) == 63
    assert checksum(x.T.contiguous().T) == checksum(x)
    assert checksum(x == 1) != checksum(x == 2)


def test_opposite_moves_do_not_cancel() -> None:
    """a at i and -a at j and k: sums linear in the position would not see it."""
    x = torch.zeros(30, dtype=torch.int64)
    for i in range(10):
        other = x.clone()
        other[i], other[i + 1], other[i + 2] = 1, -2, 1
        assert checksum(other) != checksum(x)


def test_checksums_are_sums_of_bits_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000)
    words = [int(w) for w in x.view(torch.int32)]

    def weight(n: int) -> int:
        # In 64-bit two's complement, as tensors multiply and shift.
        w = (n * 0x1E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
        return w ^ (w >> 29)

    expected = sum(words) % 2**64, sum(w * weight(n) for n, w in enumerate(words, 1)) % 2**64
    assert checksum(x) == expected
    monkeypatch.setattr(data_identity, "_CHUNK", 7)
    assert checksum(x) == expected


def test_an_identity_survives_as_plain_data() -> None:
    v, w = torch.randn(5, 2), torch.tensor([1.0, torch.nan])
    identity = DataIdentity.from_state(DataIdentity((v,), {"w": w}).state())
    assert identity.matches((v,), {"w": w})
    assert not identity.matches((v + 1,), {"w": w})
    assert not identity.matches((v.double(),), {"w": w})
    assert not identity.matches((v.reshape(2, 5),), {"w": w})
    assert not identity.matches((v,), {})
    assert identity.matches((v.clone(),), {"w": w.clone()})
    v += 1
    assert not identity.matches((v,), {"w": w})
