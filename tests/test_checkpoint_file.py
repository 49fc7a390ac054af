"""The file itself: damage, other files and code in it are refused by name; a failed write changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_ext import checkpoint_file
from pyro_ext.checkpoint_file import FORMAT, MAGIC, CheckpointError, read, unfinished, write

CONTENT = {"w": torch.arange(6.0).reshape(2, 3), "n": [1, 2.5, None, "x"], "nan": torch.tensor(torch.nan)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.checkpoint"
    write(path, CONTENT)
    return path


def rewritten(payload: bytes, **fields: Any) -> bytes:
    header = {"bytes": len(payload), "format": FORMAT, "sha256": hashlib.sha256(payload).hexdigest()} | fields
    return MAGIC + json.dumps(header).encode() + b"\n" + payload


def test_what_is_written_is_read(path: Path) -> None:
    found = read(path)
    assert torch.equal(found["w"], CONTENT["w"])
    assert found["n"] == CONTENT["n"]
    assert bool(found["nan"].isnan())
    assert os.listdir(path.parent) == [path.name]


def test_a_flipped_bit_anywhere_is_found(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    end = whole.index(b"\n", len(MAGIC))
    for place in (*range(end + 2), *range(end + 2, len(whole), 37), len(whole) - 1):
        damaged = whole.copy()
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"Expected .* checkpoint.*some\.checkpoint"):
            read(path)


def test_a_truncated_file_is_refused_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in (*range(len(MAGIC) + 120), *range(len(MAGIC) + 120, len(whole), 101), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"some\.checkpoint") as caught:
            read(path)
        wanted = "an empty file" if length == 0 else "whole checkpoint"
        assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"Expected a checkpoint, but got an empty file: '.*some\.checkpoint'\. Take a copy"),
        (rewritten(b"abc").replace(b'{"bytes"', b'{ "bytes"'), "the second line of '.*' is damaged"),
        (b"PK\x03\x04 something", r"but got a file of another kind: '.*' begins with b'PK"),
        (MAGIC + b'{"bytes": 1, "format": 1}\n', "but the second line of '.*' is damaged"),
        (MAGIC + b"x" * 2000, "ends within its first lines"),
        (rewritten(b"abc", format=FORMAT + 1), r"format 1 or lower, but got format 2 in '.*'\. Update pyro-ext"),
        (rewritten(b"abc", format=0), "second line of '.*' is damaged"),
        (rewritten(b"abc", bytes=4), "a truncated one: '.*' holds 3 of 4 bytes"),
        (rewritten(b"abc", bytes=2), "something behind its end: '.*' holds 3 of 2 bytes"),
        (rewritten(b"abc", sha256="0" * 64), "the checksum of '.*' does not fit its content"),
        (rewritten(b"abc"), "Expected a checkpoint of plain data, but got something else in '.*', which was not run"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, match: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read(path)


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Code.place),)

    place: Path


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(kind: str, path: Path) -> None:
    Code.place = path.parent / "made by the file"
    buffer = io.BytesIO()
    if kind == "torch":
        torch.save({"w": Code()}, buffer)
    else:
        pickle.dump({"w": Code()}, buffer)
    # Its checksum fits: it was made so on purpose.
    path.write_bytes(rewritten(buffer.getvalue()))
    with pytest.raises(CheckpointError, match="plain data, but got something else in '.*', which was not run"):
        read(path)
    assert not Code.place.exists()
    pickle.loads(pickle.dumps(Code()))
    assert Code.place.exists()


def test_other_things_than_a_dictionary_are_refused(path: Path) -> None:
    write(path, [1, 2])
    with pytest.raises(CheckpointError, match="Expected a checkpoint that holds a dictionary, but got list"):
        read(path)


@pytest.mark.parametrize("place", ["fsync", "replace", "open", "save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    place: str, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise error

    if place == "save":
        monkeypatch.setattr(torch, "save", fail)
    elif place == "open":

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(data[:3])
                raise error

        monkeypatch.setattr(checkpoint_file, "open", lambda name, mode: Full(name, mode), raising=False)
    else:
        monkeypatch.setattr(os, place, fail)
    with pytest.raises(type(error)):
        write(path, {"other": 1})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_a_killed_write_left_behind_is_taken_by_the_next(path: Path) -> None:
    Path(unfinished(path)).write_bytes(b"half")
    assert torch.equal(read(path)["w"], CONTENT["w"])
    write(path, {"other": 1})
    assert read(path) == {"other": 1}
    assert os.listdir(path.parent) == [path.name]


def test_the_new_file_is_on_the_disk_before_it_takes_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        done = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, done=done, name=name: (calls.append(name), done(*a))[1])
    write(path, {"other": 1})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_link_is_followed(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    write(link, {"other": 1})
    assert link.is_symlink()
    assert read(path) == {"other": 1}
