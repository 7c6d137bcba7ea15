"""JSON lines and atomic JSON files, written so that a reader never meets half a value."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


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


class JsonlWriter:
    """Appends one row a line and flushes it, so that a killed process loses at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_torn(path)
        self._file: TextIO = path.open("a", encoding="utf-8")
        if torn:
            # A line cut off by a crash would otherwise swallow the first row written after a resume.
            self._file.write("\n")

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the row and return it as written: NaN and infinities as null, counted in ``nonfinite`` where there are any."""
        clean, count = finite(row)
        if count:
            clean["nonfinite"] = count
        self._file.write(json.dumps(clean, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        return dict(clean)

    def close(self) -> None:
        self._file.close()


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


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replace the file at once: a reader sees the old value or the new one, never a part."""
    clean, _ = finite(value)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(clean, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no file. Raises ValueError when it holds something else."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
