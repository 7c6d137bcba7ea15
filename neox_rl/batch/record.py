"""Delivered batches as files, to train on without generating. Exact: what is read back equals what was delivered.

A file is the frames of one message (``neox_rl.codec``): magic, number of frames, then each frame's length and bytes,
lengths as little-endian uint64.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from neox_rl.codec import decode_groups, encode_groups
from neox_rl.errors import ConfigError, WireError
from neox_rl.types import Group, Json

MAGIC = b"neoxrl\x00\x01"
_SUFFIX = ".batch"
_LENGTH = struct.Struct("<Q")


def record_batch(directory: Path, phase: str, step: int, groups: Sequence[Group], meta: Mapping[str, Json] | None = None) -> Path:
    """Writes ``<directory>/<phase>-<step>.batch`` and returns its path. A crash leaves the whole file or none.

    So does an OSError: what a full disk took of it would keep the disk full.
    """
    frames = encode_groups(groups, meta)
    path = _path(directory, phase, step)
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(MAGIC + _LENGTH.pack(len(frames)))
            for frame in frames:
                file.write(_LENGTH.pack(len(frame)))
                file.write(frame)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):  # the first one says what is wrong
            partial.unlink(missing_ok=True)
        raise
    return path


def read_batch(directory: Path, phase: str, step: int) -> tuple[tuple[Group, ...], dict[str, Json]]:
    """``(groups, meta)`` as recorded. Raises ConfigError when there is no such batch, WireError when the file is damaged."""
    path = _path(directory, phase, step)
    if not path.is_file():
        raise ConfigError(f"no recorded batch {path}; {directory} has steps {recorded_steps(directory, phase)[:20]} of phase {phase!r}")
    data = memoryview(path.read_bytes())
    if data[: len(MAGIC)] != MAGIC:
        raise WireError(f"{path} is not a recorded batch of this release")
    count, at = _length(path, data, len(MAGIC))
    frames: list[memoryview] = []
    for _ in range(min(count, len(data))):
        size, at = _length(path, data, at)
        frames.append(data[at : at + size])
        at += size
    if at != len(data) or len(frames) != count:
        raise WireError(f"{path} has {len(data)} bytes, its frames take {at}: it was cut or overwritten")
    return decode_groups(frames)


def recorded_steps(directory: Path, phase: str) -> list[int]:
    """Steps of ``phase`` that are recorded in ``directory``, rising."""
    names = [path.stem.removeprefix(f"{phase}-") for path in directory.glob(f"{phase}-*{_SUFFIX}")]
    return sorted(int(name) for name in names if name.isdigit())


def _path(directory: Path, phase: str, step: int) -> Path:
    return directory / f"{phase}-{step:06d}{_SUFFIX}"


def _length(path: Path, data: memoryview, at: int) -> tuple[int, int]:
    if at + _LENGTH.size > len(data):
        raise WireError(f"{path} ends in the middle of a frame: it was cut")
    return int(_LENGTH.unpack_from(data, at)[0]), at + _LENGTH.size
