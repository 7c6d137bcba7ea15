"""``tools/chaos.py`` may cost a journal what a power failure may, and nothing that somebody was told is there."""

from __future__ import annotations

import fcntl
import random
import shutil
from pathlib import Path

import pytest

from neox_rl.queue.journal import open_journal
from neox_rl.queue.records import payload_of
from tests.contracts.test_floors import tool

chaos_journal = tool("chaos_journal")
KINDS = ("session", "issued", "group", "taken", "issued", "span", "group", "refused", "failed")
ANSWERED = 1 + KINDS.index("taken") + 1
"""Records up to the last that an answer waited for, with the one that begins the segment."""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    journal, _ = open_journal(tmp_path / "written", 0.01, 1.0)
    for number, kind in enumerate(KINDS):
        journal.append(payload_of(kind, {"ticket": number}, bytes(20 * number)))
    journal.close()
    return tmp_path / "written"


def test_what_was_answered_for_is_never_lost_and_the_rest_may_be(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_journal, "FLIPPED", 0.0)
    lost: set[int] = set()
    noisy = False
    for seed in range(60):
        directory = written.parent / f"{seed}"
        shutil.copytree(written, directory)
        kind, said = chaos_journal.harm(directory, random.Random(seed))
        assert kind == "tear"
        journal, reading = open_journal(directory, 0.01, 1.0)
        journal.close()
        kinds = [record.kind for record in reading.records]
        assert kinds == ["segment", *KINDS][: len(kinds)] and len(kinds) >= ANSWERED
        assert not reading.has_holes, "who takes over finds an end that was never there"
        lost.add(1 + len(KINDS) - len(kinds))
        noisy = noisy or "noise" in said
        assert ("noise" in said) is (len(kinds) == 1 + len(KINDS)), said
    assert noisy and lost == set(range(1 + len(KINDS) - ANSWERED + 1))


def test_a_journal_with_a_living_writer_is_left_alone(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_journal, "LOCK_S", 0.05)
    before = {path: path.read_bytes() for path in written.glob("*.journal")}
    with (written / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert chaos_journal.harm(written, random.Random(1)) is None
    assert {path: path.read_bytes() for path in written.glob("*.journal")} == before


def test_an_empty_segment_of_one_that_died_at_once_may_hold_noise(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_journal, "FLIPPED", 0.0)
    (written / "000000000099.journal").touch()
    assert "noise" in chaos_journal.harm(written, random.Random(3))[1]
    journal, reading = open_journal(written, 0.01, 1.0)
    journal.close()
    assert len(reading.records) == 1 + len(KINDS) and not reading.has_holes


def test_a_flipped_byte_takes_one_record_and_never_the_last_of_which_nothing_would_tell(written: Path) -> None:
    hit: set[int] = set()
    for seed in range(60):
        directory = written.parent / f"{seed}"
        shutil.copytree(written, directory)
        if seed % 2:
            (directory / "000000000099.journal").touch()  # a successor that died at once
        said = chaos_journal.flip(sorted(directory.glob("*.journal")), random.Random(seed))
        journal, reading = open_journal(directory, 0.01, 1.0)
        journal.close()
        (gone,) = set(range(1, len(KINDS) + 2)) - {record.seq for record in reading.records}
        assert said.endswith(f": {['segment', *KINDS][gone - 1]}") and reading.has_holes
        hit.add(gone)
    assert hit == set(range(1, len(KINDS) + 1))
