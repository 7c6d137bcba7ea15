"""What a machine that loses its power may leave of the end of a run's journal, and a disk that is not well of the rest.

The end: noise behind it, or without records that nobody waited for. Only what the journal promises may be lost is lost there: nothing in
front of a record that an answer to the trainer waited for. The rest: one flipped byte in any other record, of whatever kind. The run then
goes on, from its checkpoint where it must, and what the audit cannot know any more it leaves open.
"""

from __future__ import annotations

import fcntl
import json
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from neox_rl.queue.journal import segments
from neox_rl.queue.records import HEAD_BYTES, MAGIC

LOSABLE = frozenset({"issued", "span", "group", "refused", "failed"})
"""Kinds that are written down when it suits the disk. The others may have been answered for."""
FLIP, TEAR = "flip", "tear"
FLIPPED = 1 / 3
LOCK_S = 3.0
POLL_S = 0.01
MOST_NOISE = 300


def harm(directory: Path, rng: random.Random) -> tuple[str, str] | None:
    """What was done to the journal in ``directory``: FLIP or TEAR, and in words; None where a successor of its writer was faster.

    The writer is dead. Its lock is held meanwhile, for which a successor waits.
    """
    with (directory / "lock").open("a+") as lock:
        if not _locked(lock.fileno()) or not (found := segments(directory)):
            return None
        if rng.random() < FLIPPED and (words := flip(found, rng)):
            return FLIP, words
        path = found[-1]
        whole = list(_records(path.read_bytes()))
        tail = losable(whole)
        if tail and rng.random() < 0.5:
            start, end, _ = rng.choice(tail)
            cut = rng.randrange(start, end)
            lost = path.stat().st_size - cut
            with path.open("r+b") as file:
                file.truncate(cut)
            return TEAR, f"the last {lost} bytes of {path.name} are lost"
        noise = _noise(path.read_bytes(), whole, rng)
        with path.open("ab") as file:
            file.write(noise)
        return TEAR, f"{len(noise)} bytes of noise behind {path.name}"


def flip(found: list[Path], rng: random.Random) -> str:
    """One byte of any record but the last; in words, empty where there is no other. Of the last one nobody could tell that it was there.

    By kind: most are answers of servers, and cost the least.
    """
    every = [(path, *record) for path in found for record in _records(path.read_bytes())][:-1]
    if not every:
        return ""
    kind = rng.choice(sorted({kind for *_, kind in every}))
    path, start, end, _ = rng.choice([record for record in every if record[-1] == kind])
    data = bytearray(path.read_bytes())
    data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"a flipped byte in a record of {path.name}: {kind}"


def losable(records: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Of ``(start, end, kind)`` those at the end that a crash may take."""
    kept = max((at + 1 for at, (_, _, kind) in enumerate(records) if kind not in LOSABLE), default=0)
    return records[kept:]


def _noise(data: bytes, whole: list[tuple[int, int, str]], rng: random.Random) -> bytes:
    """Anything, nothing that was written, or the beginning of a record that was there before."""
    start, end, _ = rng.choice(whole) if whole else (0, 1, "")
    begun = data[start : start + rng.randint(1, max(1, min(end - start - 1, MOST_NOISE)))]
    return rng.choice([rng.randbytes(rng.randint(1, MOST_NOISE)), bytes(rng.randint(1, MOST_NOISE)), begun])


def _records(data: bytes) -> Iterator[tuple[int, int, str]]:
    """``(start, end, kind)`` of the records from the beginning on, as far as they are whole."""
    at = 0
    while data.startswith(MAGIC, at) and at + HEAD_BYTES + 4 <= len(data):
        end = at + HEAD_BYTES + int(struct.unpack_from("<I", data, at + len(MAGIC))[0])
        if end > len(data):
            return
        begin = at + HEAD_BYTES + 4
        meta = json.loads(data[begin : begin + int(struct.unpack_from("<I", data, at + HEAD_BYTES)[0])])
        yield at, end, str(meta["kind"])
        at = end


def _locked(file: int) -> bool:
    """The kernel takes a killed process's lock away when it is gone."""
    end = time.monotonic() + LOCK_S
    while time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(POLL_S)
        else:
            return True
    return False
