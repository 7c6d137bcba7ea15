"""JSON lines and atomic JSON files, written so that a reader never meets half a value, and a full disk ends no process."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Final

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Of an OSError: there is no room, and there may be again."""
REWRITTEN_BYTES: Final = 2048
READS, READ_S = 3, 0.005
logger = logging.getLogger(__name__)


def finite(value: Any) -> tuple[Any, int]:
    """``value`` with every NaN and infinity replaced by None, and how many there were. JSON has no word for them."""
    if isinstance(value, float):
        return (value, 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, Mapping):
        pairs = {str(k): finite(v) for k, v in value.items()}
        return {k: v for k, (v, _) in pairs.items()}, sum(c for _, c in pairs.values())
    if isinstance(value, list | tuple):
        items = [finite(v) for v in value]
        return [v for v, _ in items], sum(c for _, c in items)
    return value, 0


@contextmanager
def unless_full() -> Iterator[None]:
    """The body may be left undone where the disk is full. Other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise


class LineFile:
    """Appends whole lines. What a full disk does not take waits in memory, beyond ``most`` bytes it is ``dropped`` and counted.

    No descriptor is held between two flushes. One thread at a time.
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path, self._most = path.absolute(), most
        # A line cut off by a crash would otherwise swallow the first row written after a resume.
        self._lines: list[bytes] = [b"\n"] if _ends_torn(path) else []
        self._bytes = 0
        self.dropped = 0

    @property
    def waiting(self) -> bool:
        """Whether lines are not on the disk yet."""
        return self._bytes > 0

    def add(self, line: bytes) -> None:
        """``line`` with its newline, for the next ``flush``."""
        if self._most is not None and self._bytes + len(line) > self._most:
            self.dropped += 1
            return
        self._lines.append(line)
        self._bytes += len(line)

    def flush(self) -> None:
        """Afterwards all is on the disk, or ``waiting`` for room. Raises OSError for anything else that is wrong with the file."""
        if not self.waiting:
            return
        with FileIO(self._path, "a") as file:
            before, data = os.fstat(file.fileno()).st_size, memoryview(b"".join(self._lines))
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError as error:
                file.truncate(before)  # half a line would make one of two rows, none of them readable
                if error.errno not in FULL:
                    raise
                return
        self.forget()

    def forget(self) -> None:
        """Without what waits."""
        self._lines.clear()
        self._bytes = 0


class JsonlWriter:
    """Appends one row a line at once, so that a killed process loses at most the line it was writing, or what a full disk did not take."""

    def __init__(self, path: Path, most: int | None = None) -> None:
        self._file = LineFile(path, most)
        self.path, self._told = path, 0

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the row and return it as written: NaN and infinities as null, counted in ``nonfinite`` where there are any."""
        clean, count = finite(row)
        if count:
            clean["nonfinite"] = count
        self._file.add(json.dumps(clean, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self.flush()
        return dict(clean)

    def flush(self) -> bool:
        """Tries again what a full disk did not take; whether all is on the disk now."""
        self._file.flush()
        if not self._file.waiting and self._file.dropped > self._told:
            logger.warning("%s lacks %d rows that a full disk did not take", self.path, self._file.dropped - self._told)
            self._told = self._file.dropped
        return not self._file.waiting


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist. Lines torn by a crash are left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a torn line: the process was killed while it wrote
            if isinstance(row, dict):
                rows.append(row)
    return rows


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = None, room: int = 0) -> None:
    """Replace the file at once: a reader sees the old value or the new one, never a part. A write that fails leaves the old one.

    With ``room`` the file has that many bytes at least, and a full disk does not matter to what fits: it is rewritten in its place.
    """
    text = json.dumps(finite(value)[0], indent=indent, allow_nan=False)
    data = (text.ljust(room - 1) + "\n").encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if not (room and error.errno in FULL and _in_place(path, data)):
            raise


def to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_place(path: Path, data: bytes) -> bool:
    """Whether the file has as many bytes, which are ``data`` now."""
    try:
        file = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return False
    try:
        fits = os.fstat(file).st_size == len(data)
        return fits and os.pwrite(file, data, 0) == len(data)
    finally:
        os.close(file)


def replace_durably(path: Path, data: bytes) -> None:
    """The file is ``data`` when this returns, after a power cut too; until then it is as it was, never empty. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def rewrite_json(path: Path, value: Mapping[str, Any], *, durably: bool = False) -> None:
    """Like ``write_json``, but within the room that the file has had since its first time: a full disk does not matter.

    Of ``REWRITTEN_BYTES`` at most. A reader on some file systems may meet a part of it, and looks again. Raises OSError, and ValueError
    for a longer value. ``durably``: as ``replace_durably`` where there is room; in its place only where there is none.
    """
    text = json.dumps(value)
    if len(text) >= REWRITTEN_BYTES:
        raise ValueError(f"{path.name}: {len(text)} bytes, at most {REWRITTEN_BYTES - 1} can be rewritten in place")
    data = text.ljust(REWRITTEN_BYTES - 1).encode() + b"\n"
    if durably:
        with unless_full():
            return replace_durably(path, data)
    if not _in_place(path, data):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)


def _whole(path: Path) -> Any:
    """A file that is being rewritten in its place is read again."""
    for _ in range(READS - 1):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            time.sleep(READ_S)
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no file. Raises ValueError when it holds something else."""
    if not path.exists():
        return {}
    value = _whole(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
