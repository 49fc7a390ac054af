"""Checkpoint files: plain data, a checksum, and one atomic write."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

MAGIC = b"pyro-ext checkpoint\n"
"""The first line of every checkpoint."""

FORMAT = 1
"""The number of the present format; files of a higher one are refused."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit what it is loaded into. Nothing has changed then."""


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write plain data to a file, all or nothing.

    The file is the line `MAGIC`, a line of JSON with the format, the length and the SHA-256 of what follows, and what
    torch.save makes of the content. It is written beside the old file and put in its place once it is on the disk: at
    any moment, and after a failed write, the old file or the new one is there, whole.

    Args:
        path: where to; a link is followed.
        content: dictionaries, lists, numbers, strings, None and tensors.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full.
    """
    target = os.path.realpath(path)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    header = _header(len(payload), hashlib.sha256(payload).hexdigest(), FORMAT)
    # One name for all attempts: what a killed write leaves behind is taken by the next.
    beside = unfinished(target)
    try:
        with open(beside, "wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    _sync_folder(os.path.dirname(target))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write` wrote, tensors on the CPU. Nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is of another kind, of a newer format, truncated, damaged, or holds more than plain
            data.
    """
    whole = Path(path).read_bytes()
    length = _payload_start(path, whole)
    format_number, size, digest = _read_header(path, whole[len(MAGIC) : length])
    if format_number > FORMAT:
        raise CheckpointError(
            f"Expected a checkpoint of format {FORMAT} or lower, but got format {format_number} in {str(path)!r}. "
            "Update pyro-ext."
        )
    payload = memoryview(whole)[length:]
    if len(payload) != size:
        what = "a truncated one" if len(payload) < size else "one with something behind its end"
        raise CheckpointError(
            f"Expected a whole checkpoint, but got {what}: {str(path)!r} holds {len(payload)} of {size} bytes. {_LOST}"
        )
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(
            f"Expected an undamaged checkpoint, but the checksum of {str(path)!r} does not fit its content. {_LOST}"
        )
    try:
        if bytes(payload[:4]) != _ZIP:
            raise ValueError("it is not in the format of torch.save")
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"Expected a checkpoint of plain data, but got something else in {str(path)!r}, which was not run: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. {_LOST}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Expected a checkpoint that holds a dictionary, but got {type(content).__name__} in {str(path)!r}. {_LOST}"
        )
    return content


def unfinished(path: str | os.PathLike[str]) -> str:
    """Where a file is written before it takes its place."""
    return f"{os.path.realpath(path)}.unfinished"


_ZIP = b"PK\x03\x04"
_LOST = "Take a copy of the file, or remove it and start anew."


def _header(size: int, digest: str, format_number: int) -> bytes:
    fields = {"bytes": size, "format": format_number, "sha256": digest}
    return MAGIC + json.dumps(fields).encode() + b"\n"


def _payload_start(path: str | os.PathLike[str], whole: bytes) -> int:
    """Where the payload begins, after two lines."""
    if not whole:
        raise CheckpointError(f"Expected a checkpoint, but got an empty file: {str(path)!r}. {_LOST}")
    if not whole.startswith(MAGIC):
        if MAGIC.startswith(whole):
            raise _truncated_header(path)
        raise CheckpointError(
            f"Expected a checkpoint of pyro-ext, but got a file of another kind: {str(path)!r} begins with "
            f"{whole[: len(MAGIC)]!r}. Pass a file that `save` wrote."
        )
    end = whole.find(b"\n", len(MAGIC), len(MAGIC) + 1000)
    if end < 0:
        raise _truncated_header(path)
    return end + 1


def _truncated_header(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(f"Expected a whole checkpoint, but {str(path)!r} ends within its first lines. {_LOST}")


def _read_header(path: str | os.PathLike[str], line: bytes) -> tuple[int, int, str]:
    """Format, size and checksum; a line that `write` would not have written is damaged."""
    try:
        fields = json.loads(line)
        found = fields["format"], fields["bytes"], fields["sha256"]
        sound = _header(found[1], found[2], found[0]) == MAGIC + line
    except (ValueError, KeyError, TypeError, RecursionError):
        sound, found = False, (0, 0, "")
    if not sound or any(type(number) is not int or number < 1 for number in found[:2]):
        raise CheckpointError(f"Expected a sound checkpoint, but the second line of {str(path)!r} is damaged. {_LOST}")
    return found


def _sync_folder(folder: str) -> None:
    """Make the new name last, where the system lets folders be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
