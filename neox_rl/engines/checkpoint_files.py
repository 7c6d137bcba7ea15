"""Checkpoints as directories, whatever engine fills them.

    <directory>/step000042/meta.json   layout, client state, sizes and digests of all files; written last
    <directory>/step000042/...         what the engine wrote (GPT-NeoX: global_step42)
    <directory>/latest                 name of the newest whole checkpoint

A checkpoint is written to ``<name>.tmp`` and renamed once every rank is done: a reader never sees half of one. One of the same step is
moved to ``<name>.old`` until the new one stands in its place. Every file is on the disk before the rename that makes it count.

Who points ``latest`` at an earlier one undoes those of higher steps: the next save moves them to ``<name>.undone1`` (2, ...), where
nothing sees them any more. Its own step may be higher than theirs, and they would pass for what lies between the two.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from neox_rl.engines.checkpoint_digests import FILES, META, check_digests, earlier, fix, noted, read_sealed, reading, sealed, step_of, whole
from neox_rl.errors import DamagedError, WeightError
from neox_rl.telemetry.jsonl import FULL, to_disk
from neox_rl.types import Json

logger = logging.getLogger(__name__)
FORMAT = 1
LATEST = "latest"


def publish(temporary: Path, final: Path, meta: Mapping[str, Json]) -> None:
    """Makes a whole checkpoint visible: meta last, then the rename, then the pointer."""
    _write(temporary / META, sealed({**meta, FILES: noted(temporary)}))
    to_disk(temporary)
    _set_undone_aside(final)
    replaced = _replaced(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    to_disk(final.parent)
    pointer = final.parent / f"{LATEST}.tmp"
    _write(pointer, final.name + "\n")
    pointer.rename(final.parent / LATEST)
    to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _set_undone_aside(final: Path) -> None:
    """The pointer still names what was loaded or saved last: no checkpoint of a higher step is of this timeline."""
    last = min(step for step in (step_of(pointed(final.parent)), step_of(final.name)) if step is not None)
    for path in whole(final.parent):
        if (step_of(path.name) or 0) > last:
            names = (path.with_name(f"{path.name}.undone{n}") for n in count(1))
            aside = next(name for name in names if not name.exists())
            logger.warning("%s was undone and is now %s: training went on from step %d", path, aside.name, last)
            path.rename(aside)


def prune(newest: Path, keep: int) -> None:
    """Removes all checkpoints beside ``newest`` but the ``keep`` - 1 last ones before it, also those that were undone; 0 keeps all."""
    if keep:
        before = earlier(newest)[: keep - 1]
        undone = [path for path in newest.parent.glob("*step*.undone*") if (path / META).is_file()]
        for path in [path for path in (*whole(newest.parent), *undone) if path != newest and path not in before]:
            # Without its meta data it is no checkpoint: a removal that is cut short leaves none that looks whole.
            (path / META).unlink()
            shutil.rmtree(path, ignore_errors=True)


def find(directory: Path) -> Path:
    """The checkpoint that ``directory`` is or points to. Raises WeightError when there is none.

    A crash can leave the one that the pointer names under its ``.old`` name, or no pointer: then the newest whole checkpoint counts. It
    leaves no pointer to what is not there: somebody removed that, and steps would be undone without a word.
    """
    if (directory / META).is_file():
        return directory
    pointer, name = directory / LATEST, pointed(directory)
    if name and step_of(name) is None:
        raise DamagedError(f"{pointer} names {name[:80]!r}, which is no checkpoint; {fix(pointer)}")
    named = [directory / name, _replaced(directory / name)] if name else []
    for found in named or (*whole(directory), *whole(directory, ".old")):
        if (found / META).is_file():
            if found not in named[:1]:
                logger.warning("%s names %r, which is no whole checkpoint; %s is taken", pointer, name, found)
            return found
    if name:
        raise DamagedError(f"{pointer} names {name!r}, which is no checkpoint: it has no {META}; {fix(directory / name)}")
    raise WeightError(f"{directory} holds neither a checkpoint ({META}) nor a file {LATEST!r} that names one")


def pointed(directory: Path) -> str:
    """The name that the pointer in ``directory`` holds; empty without one. Raises UnreadableError, PermissionError."""
    pointer = directory / LATEST
    with reading(pointer, pointer):
        return pointer.read_text(errors="replace").strip() if pointer.is_file() else ""


def find_foreign(directory: Path) -> Path | None:
    """The checkpoint of GPT-NeoX's own training that ``directory`` is or points to: it has no meta data of ours. None: none."""
    found = directory / pointed(directory)
    return found if found.name.startswith("global_step") and found.is_dir() and not (found / META).is_file() else None


def tidy(directory: Path) -> None:
    """Removes what killed saves left, once a newer checkpoint is whole: nobody else works in ``directory``."""
    for path in (*directory.glob("*step*.tmp"), *directory.glob("*step*.old")):
        shutil.rmtree(path, ignore_errors=True)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    to_disk(path)


def out_of_room(error: BaseException) -> bool:
    """Whether a write failed only for lack of room. safetensors has no other way to say so than the words of the system."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in FULL)
    return isinstance(error, OSError) and error.errno in FULL


def read_meta(checkpoint: Path, layout: Mapping[str, Json], rank: int, num_ranks: int) -> dict[str, Json]:
    """The meta data, after checking that the layout fits, and the digests of this rank's share of the files: who goes on behind a barrier
    knows all of them. Raises WeightError naming every difference, DamagedError."""
    meta = read_sealed(checkpoint)
    if meta.get("format") != FORMAT:
        raise WeightError(f"{checkpoint} has format {meta.get('format')!r}, this engine reads {FORMAT}")
    saved = meta["layout"]
    different = [f"{key} {saved.get(key)!r} there, {value!r} here" for key, value in layout.items() if saved.get(key) != value]
    if different:
        raise WeightError(
            f"{checkpoint} is bound to another layout: {'; '.join(different)}; "
            "start with the same layout, or export HF weights and use warmstart.hf_checkpoint"
        )
    if FILES not in meta:
        logger.warning("%s is of an earlier release, without digests: whether its files are as they were saved is not known", checkpoint)
    check_digests(checkpoint, meta, rank, num_ranks)
    return meta
