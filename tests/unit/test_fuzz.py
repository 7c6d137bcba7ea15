"""Hostile messages at everything that reads messages. The tool is the test; what it must find is planted here."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import ModuleType

import pytest

from neox_rl.framing import PREFIX_BYTES
from tests.contracts.test_floors import ROOT, tool

FRAMES, LIVE, SEED = 100_000, 500, 20


def test_no_reader_and_no_live_socket_falls_for_a_hundred_thousand_messages() -> None:
    command = [sys.executable, "tools/fuzz.py", "--frames", str(FRAMES), "--live", str(LIVE), "--seed", str(SEED)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{FRAMES} messages in" in done.stdout and done.stdout.count("messages over ZeroMQ") == 4


@pytest.fixture(scope="module")
def fuzzing() -> ModuleType:
    return tool("fuzzing")


@pytest.fixture(scope="module")
def readers(fuzzing: ModuleType) -> ModuleType:
    return tool("fuzz_targets")


def test_a_reader_that_reads_a_damaged_message_is_found(fuzzing: ModuleType, readers: ModuleType) -> None:
    reader = fuzzing.Target(
        "careless", readers.example_requests(), lambda m: json.loads(m[0][PREFIX_BYTES:])["kind"], (ValueError, LookupError)
    )
    with pytest.raises(fuzzing.Finding, match="careless: read a damaged message"):
        fuzzing.fuzz([reader], 2000, SEED)


def test_a_reader_that_raises_something_else_is_found(fuzzing: ModuleType, readers: ModuleType) -> None:
    with pytest.raises(fuzzing.Finding, match="crashing: IndexError"):
        fuzzing.fuzz([fuzzing.Target("crashing", readers.example_requests(), lambda m: m[0][:0] or m[2], (), digested=False)], 2000, SEED)


def test_a_reader_that_takes_for_ever_is_found(fuzzing: ModuleType, readers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "MAX_READ_S", 0.0)
    with pytest.raises(fuzzing.Finding, match="took"):
        fuzzing.fuzz(readers.targets(), 100, SEED)


def test_forged_messages_have_right_digests_and_some_are_well_formed(fuzzing: ModuleType, readers: ModuleType) -> None:
    tally = fuzzing.fuzz([t for t in readers.targets() if t.forge is not None], 5000, SEED)
    assert sum(counts[fuzzing.Outcome.VALID] for counts in tally.counts.values()) > 100
    sent = readers.example_requests()[0]
    assert fuzzing.forged(random.Random(SEED), sent) == fuzzing.forged(random.Random(SEED), sent), "a seed repeats a finding"
