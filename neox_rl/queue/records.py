"""One journal record as bytes, and finding the records in bytes that may be damaged anywhere.

    record   = head (28 bytes) | payload
    head     = magic (4) | payload length uint32 | sequence number uint64 | checksum (8) | CRC-32 of the 24 bytes before it, little-endian
    payload  = length of meta uint32 | meta (JSON object with a "kind") | body

The checksum is XXH3 (64 bits) over the segment's file name, length, sequence number and payload. The name is in it so that a record
that was copied into the payload of another is none when a reader has to look for the next one after damage. ``body`` is opaque here:
of a group it is ``codec.encode_group``, so that a reader decodes only the groups that it needs.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from neox_rl.types import Json

MAGIC = b"\xf5NXJ"
_HEAD = struct.Struct("<4sIQ8s")
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
HEAD_BYTES = _HEAD.size + _CRC.size
MAX_PAYLOAD_BYTES = 1 << 31
HOLE = "hole"
"""Kind of the ledger's record in place of those that were lost: what shrinks to an entry must not look whole."""
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Record:
    """``seq`` counts up by one from record to record of a run; a gap is a record that was lost."""

    seq: int
    kind: str
    meta: Mapping[str, Any]
    body: bytes | memoryview = b""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes ``start:end`` of a segment hold no record. ``torn``: they are the end of it, as a crash while writing leaves them."""

    segment: str
    start: int
    end: int
    torn: bool

    def __str__(self) -> str:
        what = "torn tail" if self.torn else "damaged"
        return f"{self.segment}: {what}, {self.end - self.start} bytes from byte {self.start} on hold no record"


def payload_of(kind: str, meta: Mapping[str, Json], body: bytes | memoryview = b"") -> bytes:
    """Raises ValueError for a meta that is not JSON."""
    head = _ENCODER.encode({"kind": kind, **meta}).encode()
    return b"".join((_LENGTH.pack(len(head)), head, body))


def to_bytes(segment: str, seq: int, payload: bytes | memoryview) -> bytes:
    """The record as it stands in the file ``segment``."""
    return b"".join(parts_of(segment, seq, payload))


def parts_of(segment: str, seq: int, payload: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """``to_bytes`` in pieces, for who joins many records: a payload is copied once."""
    head = _HEAD.pack(MAGIC, len(payload), seq, _checksum(segment, seq, payload))
    return head, _CRC.pack(zlib.crc32(head)), payload


def scan(segment: str, data: bytes | memoryview, only: str = "") -> Iterator[Record | Damage]:
    """Every whole record, in order, and what lies between them. Never raises; a record that was hit is lost, no other.

    With ``only`` the records of other kinds are checked and passed over unread: reading JSON takes a hundred times as long.
    """
    view = memoryview(data)
    raw = data if isinstance(data, bytes) else bytes(data)
    at, lost = 0, -1
    while at < len(raw):
        found = _record_at(segment, view, at, only)
        if found is not None:
            record, end = found
            if lost >= 0:
                yield Damage(segment, lost, at, torn=False)
                lost = -1
            if record is not None:
                yield record
            at = end
        else:
            lost = at if lost < 0 else lost
            at = raw.find(MAGIC, at + 1)
            if at < 0:
                break
    if lost >= 0:
        yield Damage(segment, lost, len(raw), torn=True)


def with_holes(records: Iterable[Record], begin: int, end: int) -> Iterator[Record]:
    """``records`` in order, and a ``hole {records}`` for those that are missing of the numbers from ``begin`` to before ``end``."""
    due = begin
    for record in chain(records, [Record(end, "", {})]):
        if due < record.seq:
            yield Record(due, HOLE, {"records": record.seq - due})
        if record.kind:
            yield record
        due = record.seq + 1


def beginning(path: Path, number: int) -> list[Record]:
    """The first records of a segment, at most ``number`` and none behind one that is damaged; of the file nothing more is read."""
    found: list[Record] = []
    with path.open("rb") as file:
        while len(found) < number and (head := _head_at(memoryview(data := file.read(HEAD_BYTES)), 0)) is not None:
            record = _record_at(path.name, memoryview(data + file.read(head[0])), 0) if head[0] <= MAX_PAYLOAD_BYTES else None
            if record is None or record[0] is None:
                break
            found.append(record[0])
    return found


def first_unchecked(data: bytes | memoryview) -> Record | None:
    """The record at the beginning, if its head is whole, whatever its checksum says: a release that sums otherwise is told by its words."""
    view = memoryview(data)
    if (head := _head_at(view, 0)) is None:
        return None
    length, seq, _ = head
    return _parse(seq, view[HEAD_BYTES : HEAD_BYTES + length])


def _head_at(view: memoryview, at: int) -> tuple[int, int, bytes] | None:
    """Length of the payload, sequence number, checksum."""
    if at + HEAD_BYTES > len(view):
        return None
    magic, length, seq, checksum = _HEAD.unpack_from(view, at)
    # The head has a check of its own: a false one would have the whole rest of the file hashed, for each place that looks like one.
    if magic != MAGIC or _CRC.unpack_from(view, at + _HEAD.size)[0] != zlib.crc32(view[at : at + _HEAD.size]):
        return None
    return length, seq, checksum


def _record_at(segment: str, view: memoryview, at: int, only: str = "") -> tuple[Record | None, int] | None:
    if (head := _head_at(view, at)) is None:
        return None
    length, seq, checksum = head
    start = at + HEAD_BYTES
    end = start + length
    if length > MAX_PAYLOAD_BYTES or end > len(view) or _checksum(segment, seq, view[start:end]) != checksum:
        return None
    begin = b'{"kind":"%s"' % only.encode()  # as ``payload_of`` writes it
    if only and view[start + _LENGTH.size :][: len(begin)] != begin:
        return None, end
    record = _parse(seq, view[start:end])
    return None if record is None else (record, end)


def _parse(seq: int, payload: memoryview) -> Record | None:
    if len(payload) < _LENGTH.size:
        return None
    end = _LENGTH.size + int(_LENGTH.unpack_from(payload)[0])
    try:
        meta = json.loads(bytes(payload[_LENGTH.size : end]))
    except (ValueError, RecursionError):
        return None
    if end > len(payload) or not isinstance(meta, dict) or not isinstance(kind := meta.pop("kind", None), str):
        return None
    return Record(seq, kind, meta, payload[end:])


def _checksum(segment: str, seq: int, payload: bytes | memoryview) -> bytes:
    found = xxh3_64(f"{segment}/{seq}/{len(payload)}/".encode())
    found.update(payload)
    return found.digest()
