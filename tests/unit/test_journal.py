"""The journal survives what happens to files: cut anywhere, any byte flipped, a full disk, two writers, another release."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.errors import GIVES_UP, ConfigError, JournalFullError, exit_status
from neox_rl.queue import journal as journal_file
from neox_rl.queue import records as records_file
from neox_rl.queue.journal import FORMAT, LEDGER, Journal, Reading, open_journal, read_journal, segments
from neox_rl.queue.records import Damage, Record, beginning, payload_of, scan, to_bytes

NAME = "000000000001.journal"
PAYLOADS = [payload_of("group", {"ticket": i}, bytes([i, 0, 255, 7]) * i) for i in range(6)]
WHOLE = [to_bytes(NAME, 10 + i, payload) for i, payload in enumerate(PAYLOADS)]
DATA = b"".join(WHOLE)
ENDS = [sum(map(len, WHOLE[: i + 1])) for i in range(len(WHOLE))]
ANOTHER = [payload_of("segment", {"format": 2}), *PAYLOADS]
RECORDS = [item for item in scan(NAME, DATA) if isinstance(item, Record)]


def plain(records: list[Record] | tuple[Record, ...]) -> list[tuple[int, str, dict[str, object], bytes]]:
    return [(r.seq, r.kind, dict(r.meta), bytes(r.body)) for r in records]


def found_in(data: bytes) -> tuple[list[Record], list[Damage]]:
    items = list(scan(NAME, data))
    return [i for i in items if isinstance(i, Record)], [i for i in items if isinstance(i, Damage)]


def test_records_come_back_as_they_were() -> None:
    assert [(r.seq, r.kind, r.meta["ticket"], bytes(r.body)) for r in RECORDS] == [
        (10 + i, "group", i, bytes([i, 0, 255, 7]) * i) for i in range(6)
    ]


@given(st.integers(0, len(DATA)))
def test_any_prefix_gives_the_records_that_it_holds_whole(length: int) -> None:
    records, damage = found_in(DATA[:length])
    whole = sum(end <= length for end in ENDS)
    assert plain(records) == plain(RECORDS[:whole])
    assert [d.torn for d in damage] == ([] if length in (0, *ENDS) else [True])


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_flipped_byte_costs_the_record_it_hits_and_no_other(at: int, flip: int) -> None:
    data = bytearray(DATA)
    data[at] ^= flip
    hit = next(i for i, end in enumerate(ENDS) if at < end)
    records, damage = found_in(bytes(data))
    assert plain(records) == plain([r for i, r in enumerate(RECORDS) if i != hit])
    assert [(d.start, d.end) for d in damage] == [(ENDS[hit] - len(WHOLE[hit]), ENDS[hit])]


@given(st.integers(0, len(DATA) - 1), st.integers(1, 60))
def test_bytes_cut_out_cost_the_records_they_belonged_to(at: int, count: int) -> None:
    end = min(len(DATA), at + count)
    hit = {i for i, stop in enumerate(ENDS) if stop - len(WHOLE[i]) < end and at < stop}
    records, damage = found_in(DATA[:at] + DATA[end:])
    assert plain(records) == plain([r for i, r in enumerate(RECORDS) if i not in hit])
    assert len(damage) <= 1


@given(st.binary(max_size=200), st.integers(0, len(DATA)))
def test_bytes_put_in_are_never_taken_for_records(noise: bytes, at: int) -> None:
    records, _ = found_in(DATA[:at] + noise + DATA[at:])
    hit = {i for i, stop in enumerate(ENDS) if stop - len(WHOLE[i]) < at < stop} if noise else set()
    assert plain(records) == plain([r for i, r in enumerate(RECORDS) if i not in hit])


def test_the_beginning_of_a_segment_is_read_alone_and_ends_where_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(DATA)
    assert plain(beginning(path, 2)) == plain(RECORDS[:2]) and plain(beginning(path, 99)) == plain(RECORDS)
    path.write_bytes(DATA[: ENDS[0]] + b"x" + DATA[ENDS[0] + 1 :])
    assert plain(beginning(path, 2)) == plain(RECORDS[:1])
    path.write_bytes(b"")
    assert beginning(path, 2) == []


def test_a_record_copied_into_a_group_is_no_record_when_its_own_head_is_damaged() -> None:
    forged = to_bytes("000000000002.journal", 11, payload_of("taken", {"step": 1}))
    data = bytearray(to_bytes(NAME, 10, payload_of("group", {}, forged)))
    data[6] ^= 1
    records, damage = found_in(bytes(data) + WHOLE[1])
    assert plain(records) == plain(RECORDS[1:2]) and len(damage) == 1


def test_false_heads_are_not_hashed_through_again_and_again() -> None:
    """A head that was not written by us is found out by its own check, whatever length it claims."""
    records, damage = found_in(RECORDS[0].kind.encode() + (WHOLE[0][:24] + b"\0" * 8) * 20_000)
    assert records == [] and len(damage) == 1


# files


def write(directory: Path, *tickets: int, then: Callable[[Journal], None] = lambda journal: None) -> Reading:
    async def main() -> Reading:
        journal, reading = open_journal(directory, 0.01, 5.0)
        for ticket in tickets:
            journal.append(payload_of("group", {"ticket": ticket}, b"tokens"))
        then(journal)
        await journal.durable()
        journal.close()
        return reading

    return asyncio.run(main())


def tickets_in(reading: Reading) -> list[int]:
    return [r.meta["ticket"] for r in reading.records if r.kind == "group"]


def test_each_start_goes_on_behind_the_last_and_nothing_is_lost(tmp_path: Path) -> None:
    assert write(tmp_path / "j", 1, 2) == Reading((), (), 0)
    assert tickets_in(write(tmp_path / "j", 3)) == [1, 2]
    reading = read_journal(tmp_path / "j")
    assert tickets_in(reading) == [1, 2, 3] and (reading.damage, reading.lost) == ((), 0)
    assert [r.seq for r in reading.records] == list(range(1, 6)) and len(segments(tmp_path / "j")) == 2


def test_damage_is_told_with_its_place_a_torn_tail_once(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    (segment,) = segments(tmp_path)
    raw = bytearray(segment.read_bytes())
    raw[raw.index(b'"ticket":2')] ^= 1
    segment.write_bytes(bytes(raw[:-3]))
    reading = write(tmp_path, 5)
    assert tickets_in(reading) == [1, 3]
    words = "; ".join(reading.words())
    assert f"{segment.name}: damaged" in words and f"{segment.name}: torn tail" in words and "1 records are missing" in words
    again = read_journal(tmp_path)
    assert tickets_in(again) == [1, 3, 5] and [d.torn for d in again.damage] == [False]


def test_a_checkpoint_begins_a_segment_and_older_ones_leave_their_short_records(tmp_path: Path) -> None:
    write(tmp_path, 1, then=lambda j: (j.append(payload_of("taken", {"step": 1, "state": {"long": 1}})), None)[1])
    write(tmp_path, 2, then=lambda j: j.rotate([payload_of("state", {}), payload_of("group", {"ticket": 2})]))
    assert len(segments(tmp_path)) == 1
    reading = read_journal(tmp_path)
    assert [(r.kind, dict(r.meta)) for r in reading.records if r.kind != "segment"] == [
        ("taken", {"step": 1}),
        ("state", {}),
        ("group", {"ticket": 2}),
    ]
    assert reading.lost == 0 and not reading.damage
    write(tmp_path, 3)
    assert tickets_in(read_journal(tmp_path)) == [2, 3]


def test_who_goes_on_reads_of_the_ledger_what_no_state_says_and_hears_of_its_damage(tmp_path: Path) -> None:
    def fill(journal: Journal) -> None:
        for kind, meta in (("opened", {"rule": {}}), ("taken", {"step": 1}), ("checkpoint", {"rl_step": 1})):
            journal.append(payload_of(kind, meta))
        journal.rotate([payload_of("state", {"state": {"queue": {}}}), payload_of("group", {"ticket": 2})])

    def opened(directory: Path) -> Reading:
        journal, reading = open_journal(directory, 0.01, 5.0)
        journal.close()
        return reading

    write(tmp_path, 1, then=fill)
    assert [r.kind for r in opened(tmp_path).records] == ["segment", "opened", "segment", "state", "group"][1:]
    ledger = tmp_path / LEDGER
    raw = bytearray(ledger.read_bytes())
    raw[raw.index(b'"step":1')] ^= 1
    ledger.write_bytes(raw + b"torn")
    reading = opened(tmp_path)
    assert reading.has_holes and [f"{LEDGER}: damaged" in word or f"{LEDGER}: torn" in word for word in reading.words()] == [True, True]
    assert len(opened(tmp_path).words()) == 1, "the torn tail is cut off"
    state, *later = segments(tmp_path)
    raw = bytearray(state.read_bytes())
    raw[raw.index(b'"queue"')] ^= 1
    state.write_bytes(raw)
    assert "checkpoint" in [r.kind for r in opened(tmp_path).records] and later, "nothing else says what was before"


def test_a_crash_while_a_segment_is_given_up_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, then=lambda j: (j.append(payload_of("taken", {"step": 1})), None)[1])
    kept = {path.name: path.read_bytes() for path in segments(tmp_path)}
    write(tmp_path, then=lambda j: j.rotate([payload_of("state", {})]))
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    kinds = [r.kind for r in read_journal(tmp_path).records]
    assert kinds.count("taken") == 1 and kinds.count("group") == 1


def test_who_died_before_its_first_record_leaves_no_gap(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (journal_file._name(3), "000000000003.journal.tmp"):
        (tmp_path / name).touch()
    assert write(tmp_path, 2).words() == []
    assert tickets_in(read_journal(tmp_path)) == [1, 2] and read_journal(tmp_path).words() == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_ledger_that_did_not_fit_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, then=lambda j: (j.append(payload_of("taken", {"step": 1})), None)[1])
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal_file._to_ledger(tmp_path / LEDGER, segments(tmp_path), 0)
    assert (tmp_path / LEDGER).stat().st_size == 0
    journal_file._to_ledger(tmp_path / LEDGER, segments(tmp_path), 0)
    assert [r.kind for r in read_journal(tmp_path).records].count("taken") == 1 and not read_journal(tmp_path).damage


def test_another_release_is_a_clear_error(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (segment,) = segments(tmp_path)
    segment.write_bytes(to_bytes(segment.name, 1, payload_of("segment", {"format": FORMAT + 1})))
    with pytest.raises(ConfigError, match=rf"journal format {FORMAT + 1}, this release reads {FORMAT}.*move .* away"):
        read_journal(tmp_path)


def test_a_release_with_another_checksum_is_that_error_and_its_journal_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records_file, "_checksum", lambda segment, seq, payload: b"otherwis")
        whole = b"".join(to_bytes("000000000001.journal", seq, payload) for seq, payload in enumerate(ANOTHER, 1))
    for name in ("000000000001.journal", LEDGER):
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(ConfigError, match=rf"{name} has journal format 2, this release reads {FORMAT}"):
            open_journal(tmp_path, 0.01, 1.0)
        assert (tmp_path / name).read_bytes() == whole
        (tmp_path / name).unlink()


def test_two_orchestrators_cannot_write_one_journal(tmp_path: Path) -> None:
    first, _ = open_journal(tmp_path, 0.01, 1.0)
    with pytest.raises(ConfigError, match=rf"another orchestrator \(pid {os.getpid()}\)"):
        open_journal(tmp_path, 0.01, 1.0, lock_s=0.1)
    first.close()
    open_journal(tmp_path, 0.01, 1.0, lock_s=0.1)[0].close()


class FullDisk:
    """Takes a few bytes of each write until it is ``free``; then everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        self.free = False
        real = getattr(os, where)

        def call(file: int, *args: object) -> int:
            if not self.free:
                if where == "pwrite":
                    real(file, bytes(args[0])[:5], args[1])  # type: ignore[call-overload]
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(real(file, *args) or 0)

        monkeypatch.setattr(os, where, call)


@pytest.mark.parametrize("where", ["pwrite", "fdatasync"])
def test_a_full_disk_is_waited_for_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(journal_file, "RETRY_S", 0.02)

    async def main() -> None:
        journal, _ = open_journal(tmp_path, 0.01, 60.0)
        journal.append(payload_of("group", {"ticket": 1}))
        await journal.durable()
        disk = FullDisk(monkeypatch, where)
        journal.append(payload_of("group", {"ticket": 2}))
        waiting = asyncio.ensure_future(journal.durable())
        async with asyncio.timeout(60.0):
            while not journal.trouble:
                await asyncio.sleep(0.01)
        assert str(tmp_path) in journal.trouble and "bytes free" in journal.trouble and not waiting.done()
        journal.append(payload_of("group", {"ticket": 3}))
        disk.free = True
        await asyncio.wait_for(waiting, 60.0)
        await journal.durable()
        assert journal.trouble == ""
        journal.close()

    asyncio.run(main())
    reading = read_journal(tmp_path)
    assert tickets_in(reading) == [1, 2, 3] and not reading.damage


def test_a_sync_that_hangs_is_told_while_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, sync = threading.Event(), os.fdatasync

    def hangs(file: int) -> None:
        assert goes_on.wait(60.0)
        sync(file)

    async def main() -> None:
        journal, _ = open_journal(tmp_path, 0.01, 60.0)
        await journal.durable()
        monkeypatch.setattr("neox_rl.queue.journal.SLOW_S", 0.1)
        monkeypatch.setattr(os, "fdatasync", hangs)
        journal.append(payload_of("failed", {"ticket": 1}))
        waiting = asyncio.ensure_future(journal.durable())
        try:
            async with asyncio.timeout(60.0):
                while not journal.trouble:
                    await asyncio.sleep(0.01)
            assert f"the disk of {tmp_path} to take the journal, for" in journal.trouble and not journal.full and not waiting.done()
        finally:
            goes_on.set()
        await waiting
        assert journal.trouble == ""
        journal.close()

    asyncio.run(main())


def test_a_disk_that_stays_full_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        journal, _ = open_journal(tmp_path, 0.01, 0.1)
        await journal.durable()
        FullDisk(monkeypatch, "pwrite")
        journal.append(payload_of("group", {"ticket": 1}))
        with pytest.raises(JournalFullError, match=rf"waited \d+ s for the disk of {tmp_path}.*bytes free.*--resume") as raised:
            await asyncio.wait_for(journal.durable(), 60.0)
        assert exit_status(raised.value) == GIVES_UP, "a new start would wait again"
        with pytest.raises(JournalFullError):
            journal.append(payload_of("group", {"ticket": 2}))
        journal.close()

    asyncio.run(main())
    assert tickets_in(read_journal(tmp_path)) == []


def test_one_sync_serves_everything_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs, real, everybody = [0], os.fdatasync, threading.Event()

    def counted(file: int) -> None:
        assert everybody.wait(60.0)
        syncs[0] += 1
        real(file)

    monkeypatch.setattr(os, "fdatasync", counted)

    async def main() -> None:
        journal, _ = open_journal(tmp_path, 0.05, 1.0)

        async def one(ticket: int) -> None:
            journal.append(payload_of("group", {"ticket": ticket}))
            if ticket == 199:
                everybody.set()  # no sync ends before all of them wait, however slow this loop is
            await journal.durable()

        await asyncio.gather(*map(one, range(200)))
        journal.close()

    asyncio.run(main())
    assert sorted(tickets_in(read_journal(tmp_path))) == list(range(200)) and syncs[0] <= 10


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_journal_with_a_byte_hit_anywhere_loses_one_record_at_most(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("journal")
    write(directory, 1, 2, 3)
    write(directory, 4, then=lambda j: j.rotate([payload_of("state", {}), payload_of("group", {"ticket": 5})]))
    write(directory, 6, 7)
    before = read_journal(directory)
    path = data.draw(st.sampled_from([*segments(directory), directory / LEDGER]))
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    after = read_journal(directory)
    assert len(after.records) >= len(before.records) - 1 and set(plainly(after)) <= set(plainly(before))


def plainly(reading: Reading) -> list[str]:
    return [repr(replace(r, body=bytes(r.body))) for r in reading.records]
