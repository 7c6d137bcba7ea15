"""How many records a journal lost: told before and after its segments shrink to their entries in the ledger, each counted once."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from neox_rl.queue.journal import open_journal, read_journal, segments
from neox_rl.queue.records import payload_of


def write(directory: Path, *tickets: int, rotate: bool = False) -> None:
    journal, _ = open_journal(directory, 0.01, 5.0)
    for ticket in tickets:
        journal.append(payload_of("group", {"ticket": ticket}, b"tokens"))
    if rotate:
        journal.rotate([])
    journal.close()


def test_a_segment_without_one_whole_record_is_a_hole(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 3)
    oldest = segments(tmp_path)[0]
    oldest.write_bytes(bytes(oldest.stat().st_size))
    before = read_journal(tmp_path)
    assert before.has_holes and before.lost == 3
    write(tmp_path, 4, rotate=True)
    after = read_journal(tmp_path)
    assert len(segments(tmp_path)) == 1 and after.has_holes and after.lost == 3 and not after.damage


@pytest.mark.parametrize("until", [b'"ticket":1', b'"ticket":2'])
def test_a_lost_record_is_counted_once_where_a_segment_did_not_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: bytes) -> None:
    """From the beginning on, the record with ``until`` included: the ledger tells it each time, and so does the segment that stayed."""

    def busy(_: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    write(tmp_path, 1, 2, 3)
    (segment,) = segments(tmp_path)
    end, data = segment.read_bytes().index(until), segment.read_bytes()
    segment.write_bytes(bytes(end) + data[end:])
    num_lost = read_journal(tmp_path).lost
    for stays in (True, True, False):
        with monkeypatch.context() as patch:
            if stays:
                patch.setattr(Path, "unlink", busy)
            write(tmp_path, 4, rotate=True)
        assert segment.exists() is stays and read_journal(tmp_path).lost == num_lost == 1 + int(until[-1:])
