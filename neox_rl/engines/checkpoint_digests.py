"""Whether a checkpoint is what was saved: sizes and digests of its files, and of the meta data itself, in ``meta.json``.

    save: each rank notes what it wrote in digests-rank00000.json -> rank 0 moves all of it into meta.json
    load: the launcher compares sizes before it starts anything, and digests where it takes a moment; the ranks all of them, each a share

A damaged checkpoint is never loaded, and none is chosen in its place: who goes back to an earlier one undoes steps, and should know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_128

from neox_rl.errors import DamagedError, UnreadableError
from neox_rl.types import Json

META, FILES, SEAL = "meta.json", "files", "xxh3"
NAME = re.compile(r"(?:global_)?step(\d{1,18})")
_NOTE, _NOTES = "digests-rank{:05d}.json", "digests-rank*.json"
_CHUNK_BYTES = 8 << 20


def note(checkpoint: Path, rank: int, paths: Iterable[Path]) -> None:
    """Notes size in bytes and digest of these files of a checkpoint that is being saved."""
    rows = {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _digest(path)] for path in paths}
    (checkpoint / _NOTE.format(rank)).write_text(json.dumps(rows))


def noted(checkpoint: Path) -> dict[str, Json]:
    """What all ranks have noted, and of the files that nobody has what is found now. Removes the notes."""
    found: dict[str, Json] = {}
    for path in sorted(checkpoint.glob(_NOTES)):
        found |= json.loads(path.read_text())
        path.unlink()
    names = {path.relative_to(checkpoint).as_posix(): path for path in saved_files(checkpoint)}
    return found | {name: [path.stat().st_size, _digest(path)] for name, path in names.items() if name not in found}


def saved_files(checkpoint: Path) -> list[Path]:
    """All files of a checkpoint that is being saved, in an order that all ranks see alike, but for notes and meta data."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != META and not path.match(_NOTES))


def sealed(meta: Mapping[str, Json]) -> str:
    """The text of ``meta.json``. Raises ValueError for numbers that JSON has not."""
    return json.dumps({**meta, SEAL: _seal(meta)}, indent=1, allow_nan=False) + "\n"


def read_sealed(checkpoint: Path) -> dict[str, Any]:
    """The meta data of a checkpoint. Raises DamagedError, UnreadableError, PermissionError."""
    path = checkpoint / META
    try:
        with reading(path, checkpoint):
            meta: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: it cannot be read ({error}); {fix(checkpoint)}") from error
    seal = meta.pop(SEAL, None)
    if seal is not None and seal != _seal(meta):
        raise DamagedError(f"{path} is damaged: its content is not that of its digest {seal}; {fix(checkpoint)}")
    return meta


def check_sizes(checkpoint: Path, meta: Mapping[str, Any]) -> None:
    """Reads no file. Raises DamagedError for one that is missing or of another size than was saved, PermissionError."""
    for name, (size, _) in meta.get(FILES, {}).items():
        path = checkpoint / name
        with reading(path, checkpoint):
            found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise DamagedError(f"{path} is missing: {META} says that it was saved, with {size} bytes; {fix(checkpoint)}")
        if found != size:
            raise DamagedError(f"{path} is damaged: it has {found} bytes, and {size} were saved; {fix(checkpoint)}")


def num_bytes(meta: Mapping[str, Any]) -> int:
    return sum(size for size, _ in meta.get(FILES, {}).values())


def check_digests(checkpoint: Path, meta: Mapping[str, Any], rank: int, num_ranks: int) -> None:
    """Reads the share of a rank. Raises DamagedError for one that does not hold what was saved, PermissionError."""
    check_sizes(checkpoint, meta)
    for name, (_, digest) in sorted(meta.get(FILES, {}).items())[rank::num_ranks]:
        with reading(checkpoint / name, checkpoint):
            found = _digest(checkpoint / name)
        if found != digest:
            raise DamagedError(f"{checkpoint / name} is damaged: its digest is {found}, and {digest} was saved; {fix(checkpoint)}")


@contextmanager
def reading(path: Path, checkpoint: Path) -> Iterator[None]:
    """What the system does not give may be whole: that undoes no steps yet. ``OSError`` of a read names no file; one of rights does."""
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error}): try again; if it stays so, {fix(checkpoint)}") from error


def fix(checkpoint: Path) -> str:
    """What helps where ``checkpoint`` cannot be used: the last one before it, or none. Later ones are of a timeline that was undone."""
    before = earlier(checkpoint)
    if not before:
        return "put back a copy; there is no earlier checkpoint beside it: start again without --resume"
    return f"put back a copy, or go on from another one: echo {before[0].name} > {checkpoint.parent / 'latest'}"


def earlier(checkpoint: Path) -> list[Path]:
    """The whole checkpoints beside it that are of lower steps, the highest first; all where its own name says no step."""
    here = step_of(checkpoint.name)
    return [path for path in whole(checkpoint.parent) if path != checkpoint and (here is None or (step_of(path.name) or 0) < here)]


def whole(directory: Path, suffix: str = "") -> list[Path]:
    """The whole checkpoints in ``directory``, of the highest step first. What was cut short in writing is none."""
    paths = [path for path in (directory.iterdir() if directory.is_dir() else ()) if path.name.endswith(suffix)]
    steps = {path: step_of(path.name.removesuffix(suffix)) for path in paths}
    found = {path: step for path, step in steps.items() if step is not None and (path / META).is_file()}
    return sorted(found, key=found.__getitem__, reverse=True)


def step_of(name: str) -> int | None:
    """Of a checkpoint of this name; None where it is no name of one."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


def _seal(meta: Mapping[str, Json]) -> str:
    return xxh3_64_hexdigest(json.dumps(dict(meta), sort_keys=True, separators=(",", ":")).encode())


def _digest(path: Path) -> str:
    found = xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
