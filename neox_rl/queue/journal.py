"""The journal of a run: what the queue must not forget, in append-only segments under ``runs/<name>/journal/``.

    000000000001.journal   a segment: records (``records.py``), the first of them ``segment {format}``; named after that record's number
    000000000913.journal   a later one; each start of the orchestrator, and each checkpoint of the trainer, begins a new segment
    ledger.journal         the short records of segments that were no longer needed, for audits: no tokens
    lock                   held by the one orchestrator that writes

Record kinds, their meta and body, and what they mean are in ``history.py``. ``read_journal(directory)`` gives all records in order and the
damage that was found; it never raises for damage, only for a journal of another format. The ledger is never pruned, so who goes on with
the run checks its bytes and reads what the segments know themselves from them alone: a recovery takes no longer in a long run.

Writing is group commit: ``append`` only buffers; a thread writes and syncs everything buffered every ``flush_s``, or at once when somebody
awaits ``durable``. A crash costs what was appended since the last sync, and nobody was told of that yet.

A full disk: nothing that was appended is lost. The writer cuts the half-written batch off and tries again every second, ``trouble`` says
what is wrong meanwhile, and after ``full_s`` the waiters of ``durable`` get a JournalError. A failed fsync is treated alike: the pages may
be gone from the cache, so the whole batch is written again.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final, TextIO

from neox_rl.errors import ConfigError, JournalError, JournalFullError
from neox_rl.queue.records import HEAD_BYTES, HOLE, Damage, Record, first_unchecked, parts_of, payload_of, scan, to_bytes, with_holes
from neox_rl.telemetry.jsonl import to_disk

FORMAT: Final = 5
SUFFIX: Final = ".journal"
LEDGER: Final = f"ledger{SUFFIX}"
LEDGER_KINDS: Final = frozenset(
    {"opened", "session", "taken", "published", "live", "checkpoint", "refused", "lost", "failed", "discarded", "evaluated", HOLE}
)
"""What stays of a segment that is not needed any more: who trained which tickets, of which versions, in which order."""
NOT_IN_LEDGER: Final = frozenset({"state"})
RETRY_S: Final = 1.0
SLOW_S: Final = 1.0
"""A write or sync that takes longer is told: on a disk that hangs it may never end."""
LOCK_S: Final = 10.0
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})


@dataclass(frozen=True, slots=True)
class Reading:
    """``records`` in order of their numbers; ``lost``: how many are missing, of the kept segments and by the ledger's word."""

    records: tuple[Record, ...]
    damage: tuple[Damage, ...]
    lost: int

    @property
    def has_holes(self) -> bool:
        """Whether a record that was there once may be gone. A torn tail was never there for anybody."""
        return self.lost > 0 or any(not damage.torn for damage in self.damage)

    def words(self) -> list[str]:
        """The damage, for a person; empty where there is none."""
        more = [f"{self.lost} records are missing: what they held is done again"] * (self.lost > 0)
        return [*map(str, self.damage), *more]


def segments(directory: Path) -> list[Path]:
    """The segments in order, without the ledger."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def read_journal(directory: Path, ledger: bool = True) -> Reading:
    """Everything that can be read; no journal is an empty one. Raises ConfigError for one that another release wrote.

    Without ``ledger`` only the run's rules are read from it, where the segments begin with the state that its records led to.
    """
    damage, paths = list[Damage](), segments(directory)
    kept = [record for path in paths for record in _records_of(path, damage)]
    begin = next((record for record in kept if record.kind != "segment"), None)
    told = begin is not None and begin.kind == "state" and not begin.meta.get("copy") and "queue" in begin.meta.get("state", {})
    past = _records_of(directory / LEDGER, damage, "opened" if told and not ledger else "")
    found = {record.seq: record for record in (*past, *kept)}  # a crash while a segment was given up leaves its short records in both files
    seqs, first = {record.seq for record in kept}, int(paths[0].stem) if paths else sys.maxsize
    lost = max(seqs) + 1 - first - len(seqs) if seqs else 0
    holes = (record for record in found.values() if record.kind == HOLE and record.seq < first)  # of later ones the segments tell
    lost += sum(min(int(record.meta["records"]), first - record.seq) for record in holes)
    return Reading(tuple(found[seq] for seq in sorted(found)), tuple(damage), lost)


def _records_of(path: Path, damage: list[Damage], only: str = "") -> list[Record]:
    data = path.read_bytes() if path.is_file() else b""
    check_format(path, data)
    found = list(scan(path.name, data, only))
    damage += [item for item in found if isinstance(item, Damage)]
    return [item for item in found if isinstance(item, Record)]


def check_format(path: Path, data: bytes) -> None:
    """Raises ConfigError for another release's segment; its beginning is enough.

    By the first record's words: another release may sum otherwise, and all of its file would be damage here, and be cut off.
    """
    record = first_unchecked(data)
    if record is None or record.kind != "segment" or data.startswith(to_bytes(path.name, record.seq, _first())[:HEAD_BYTES]):
        return  # a head as this release writes it: other words below it are damage
    if record.meta.get("format") != FORMAT:
        raise ConfigError(
            f"{path} has journal format {record.meta.get('format')!r}, this release reads {FORMAT}: continue the run with the release that "
            f"began it, or move {path.parent} away: the run then goes on from its checkpoint, and what was generated since is made again"
        )


class _Rotation:
    """In the buffer: from here on a new segment, which begins with these records; older ones are given up."""

    def __init__(self, first_seq: int, payloads: Sequence[bytes]) -> None:
        self.first_seq, self.payloads = first_seq, payloads


def open_journal(directory: Path, flush_s: float, full_s: float, lock_s: float = LOCK_S) -> tuple[Journal, Reading]:
    """What the journal holds, of the ledger what is needed, and a writer that goes on behind it. Torn tails are cut off, and so told once.

    Raises ConfigError while another process holds the journal for longer than ``lock_s``, and like ``read_journal``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = _hold(directory, lock_s)
    try:
        reading = read_journal(directory, ledger=False)
        for unfinished in directory.glob(f"*{SUFFIX}.tmp"):
            unfinished.unlink()
        for damage in reading.damage:
            if damage.torn:
                os.truncate(directory / damage.segment, damage.start)
        last = reading.records[-1].seq if reading.records else 0
        return Journal(directory, last + 1, flush_s, full_s, lock), reading
    except BaseException:
        lock.close()
        raise


class Journal:
    """The writer; ``open_journal`` makes it. One event loop calls ``append``, ``durable`` and ``rotate``; ``close`` writes what is left."""

    def __init__(self, directory: Path, next_seq: int, flush_s: float, full_s: float, lock: TextIO) -> None:
        self.directory, self._flush_s, self._full_s, self._lock_file = directory, flush_s, full_s, lock
        self._seq = next_seq
        while (path := directory / _name(self._seq)).exists() and path.stat().st_size:  # one that died at once left an empty segment
            self._seq += 1
        self.full = ""
        """What the disk says that takes nothing, in words; empty while it does not refuse."""
        self._writing: float | None = None  # since when
        self._failed: JournalError | None = None
        self._buffer: list[tuple[int, bytes] | _Rotation] = []
        self._appended = self._committed = 0
        self._waiters: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._urgent = self._closing = False
        self._wake = threading.Condition()
        self._segment = _Segment(directory, self._seq)
        self._buffer.append((self._take_seq(), _first()))
        self._appended = 1
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why nothing can be written at this moment, or is not written yet, in words; empty while all is well."""
        slow_s = time.monotonic() - since if (since := self._writing) is not None else 0.0
        return self.full or (f"the disk of {self.directory} to take the journal, for {slow_s:.0f} s so far" if slow_s > SLOW_S else "")

    def append(self, payload: bytes) -> int:
        """Buffers a record (``payload_of``); returns its number. Raises JournalError once the journal has given up."""
        self.check()
        with self._wake:
            seq = self._take_seq()
            self._buffer.append((seq, payload))
            self._appended += 1
        return seq

    async def durable(self) -> None:
        """Returns once everything appended so far is on the disk. Raises JournalError when it cannot be brought there."""
        self.check()
        loop = asyncio.get_running_loop()
        with self._wake:
            if self._committed >= self._appended:
                return
            future: asyncio.Future[None] = loop.create_future()
            self._waiters.append((self._appended, loop, future))
            self._urgent = True
            self._wake.notify()
        await future

    def rotate(self, payloads: Sequence[bytes]) -> None:
        """A new segment that begins with ``payloads``. Once it is on the disk the older ones shrink to their entries in the ledger."""
        self.check()
        with self._wake:
            first = self._seq
            self._seq += 1 + len(payloads)
            self._buffer.append(_Rotation(first, payloads))
            self._appended += 1

    def close(self) -> None:
        """Writes what is buffered and lets the journal go. A second call does nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30.0)
        if not self._thread.is_alive():
            self._segment.close()
        self._lock_file.close()

    def check(self) -> None:
        """Raises JournalError once the journal has given up."""
        if self._failed is not None:
            raise type(self._failed)(str(self._failed)) from self._failed

    def _take_seq(self) -> int:
        self._seq += 1
        return self._seq - 1

    # the writer thread

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except Exception as error:
            self._failed = error if isinstance(error, JournalError) else JournalError(f"{self.directory}: {type(error).__name__}: {error}")
            self._settle()

    def _round(self) -> bool:
        with self._wake:
            # Nobody wakes this thread for what is not urgent: it would take the interpreter from who appends, ten times a second.
            self._wake.wait_for(lambda: self._urgent or self._closing, timeout=self._flush_s)
            batch, self._buffer, self._urgent = self._buffer, [], False
        start = 0
        for i, item in enumerate(batch):
            if isinstance(item, _Rotation):
                self._persist(batch[start:i])
                self._persist(item)
                start = i + 1
        self._persist(batch[start:])
        self._committed += len(batch)
        self._settle()
        return bool(self._buffer) or not self._closing

    def _persist(self, work: Sequence[tuple[int, bytes] | _Rotation] | _Rotation) -> None:
        """Tries until it succeeds or the deadline for a full disk passes."""
        self._writing = begin = time.monotonic()
        while True:
            try:
                if isinstance(work, _Rotation):
                    self._segment = _rotated(self.directory, self._segment, work)
                elif work:
                    self._segment.write([item for item in work if not isinstance(item, _Rotation)])
                self.full, self._writing = "", None
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                waited = time.monotonic() - begin
                free = f"{error.strerror}; {_free(self.directory)} bytes free"
                self.full = f"the disk of {self.directory} to take the journal ({free}): make room there"
                if waited > self._full_s or self._closing:
                    raise JournalFullError(f"waited {waited:.0f} s for {self.full}; the run goes on from there with --resume") from error
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, timeout=min(RETRY_S, self._full_s / 4))

    def _settle(self) -> None:
        with self._wake:
            # In order of what they wait for: each waits for all that was appended when it came.
            ready = len(self._waiters) if self._failed else bisect_right(self._waiters, self._committed, key=lambda waiter: waiter[0])
            done, self._waiters = self._waiters[:ready], self._waiters[ready:]
        for loop, waiters in groupby(done, key=lambda waiter: waiter[1]):
            with suppress(RuntimeError):  # the loop has ended, and who waited with it
                loop.call_soon_threadsafe(_resolve, [future for _, _, future in waiters], self._failed)


class _Segment:
    """A file that is appended to; a write that fails leaves it as it was, or as a torn tail that the next write cuts off."""

    def __init__(self, directory: Path, first_seq: int, suffix: str = "") -> None:
        self.path = directory / _name(first_seq)
        self._written = directory / (self.path.name + suffix)
        self._file = os.open(self._written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._end = 0
        to_disk(directory)

    def rename(self) -> None:
        """It counts from now on, whole."""
        self._written.rename(self.path)
        to_disk(self.path.parent)

    def write(self, items: Sequence[tuple[int, bytes]]) -> None:
        data = memoryview(b"".join(part for seq, payload in items for part in parts_of(self.path.name, seq, payload)))
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)
        at = self._end
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written
        os.fdatasync(self._file)
        self._end = at

    def close(self) -> None:
        os.close(self._file)


def _rotated(directory: Path, old: _Segment, rotation: _Rotation) -> _Segment:
    """The new segment, durable, before an older one is touched; then these become entries of the ledger."""
    new = _Segment(directory, rotation.first_seq, ".tmp")
    try:
        new.write(list(enumerate([_first(), *rotation.payloads], rotation.first_seq)))
        new.rename()
    except OSError:
        new.close()
        raise
    older = [path for path in segments(directory) if path.name < new.path.name]
    try:
        _to_ledger(directory / LEDGER, older, rotation.first_seq)
        for path in older:
            path.unlink()
    except OSError:
        pass  # they stay until the next rotation: a reader takes no record twice
    old.close()
    return new


def _to_ledger(ledger: Path, older: Sequence[Path], end: int) -> None:
    """All or nothing: what a full disk cut off would be taken for damage ever after."""
    with ledger.open("ab", buffering=0) as file:
        before = file.tell()
        entries = [] if before else [to_bytes(LEDGER, 0, payload_of("segment", {"format": FORMAT}))]
        found = (record for path in older for record in scan(path.name, path.read_bytes()) if isinstance(record, Record))
        begin = int(older[0].stem) if older else end  # by its name: its first records may be the lost ones
        for record in (r for r in with_holes(found, begin, end) if r.kind in LEDGER_KINDS):
            meta = {key: value for key, value in record.meta.items() if key not in NOT_IN_LEDGER}
            entries.append(to_bytes(LEDGER, record.seq, payload_of(record.kind, meta)))
        data = memoryview(b"".join(entries))
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _first() -> bytes:
    return payload_of("segment", {"format": FORMAT})


def _name(first_seq: int) -> str:
    return f"{first_seq:012d}{SUFFIX}"


def _resolve(futures: Iterable[asyncio.Future[None]], failed: JournalError | None) -> None:
    for future in (future for future in futures if not future.done()):
        if failed is None:
            future.set_result(None)
        else:
            future.set_exception(failed)


def _free(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def _hold(directory: Path, limit_s: float) -> TextIO:
    """A process that was killed may take a moment to let go."""
    file = (directory / "lock").open("a+")
    end = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            file.close()
            raise ConfigError(
                f"another orchestrator (pid {holder}) writes {directory}: two would train tickets twice; end it, or use another --name"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file
