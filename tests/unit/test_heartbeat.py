"""Signs of life as files: what a process is at, from a thread or from its event loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from neox_rl.errors import ConfigError
from neox_rl.run import orchestrator
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.heartbeat import Beat, Heartbeat, forget_beats, interval_s, read_beats
from tests.unit.small_run import small_config, small_paths


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path / "events.jsonl", "trainer-0")
    yield log
    log.close()


def beat_after(folder: Path, number: int) -> Beat:
    """The first of trainer-0 that is found with a higher number; within half a minute."""
    for _ in range(1500):
        beat = read_beats(folder, "trainer-").get("trainer-0")
        if beat is not None and beat.number > number:
            return beat
        time.sleep(0.02)
    raise AssertionError(f"no beat after {number}")


def test_a_beat_says_who_and_at_what_and_the_thread_goes_on_while_the_main_thread_waits(tmp_path: Path, events: EventLog) -> None:
    (tmp_path / "beats").mkdir()
    heartbeat = Heartbeat(tmp_path / "beats", "trainer-0", events, 0.02).start()
    with events.span("train_step", phase="rl", step=3), events.span("publish", version=4):
        first = beat_after(tmp_path / "beats", 0)
        while first.doing != "publish version 4":
            first = beat_after(tmp_path / "beats", first.number)
        second = beat_after(tmp_path / "beats", first.number)
    heartbeat.stop()
    assert (first.pid, first.doing) == (os.getpid(), "publish version 4") and second.number > first.number
    assert events.doing == "" and read_beats(tmp_path / "beats", "orchestrator") == {}


def test_a_beat_of_the_event_loop_stops_with_it(tmp_path: Path, events: EventLog) -> None:
    async def story() -> tuple[int, int]:
        beating = asyncio.ensure_future(Heartbeat(tmp_path, "orchestrator", events, 0.01).forever())
        async with asyncio.timeout(30.0):
            while not (beats := read_beats(tmp_path, "orchestrator")) or beats["orchestrator"].number < 2:
                await asyncio.sleep(0.02)
        alive = read_beats(tmp_path, "orchestrator")["orchestrator"].number
        time.sleep(0.3)  # what holds the loop is what must be found
        stuck = read_beats(tmp_path, "orchestrator")["orchestrator"].number
        beating.cancel()
        return alive, stuck

    alive, stuck = asyncio.run(story())
    assert alive >= 2 and stuck <= alive + 1


def test_what_is_no_beat_is_none_and_those_of_a_predecessor_are_forgotten(tmp_path: Path, events: EventLog) -> None:
    Heartbeat(tmp_path, "trainer-0", events, 1.0).beat()
    (tmp_path / "trainer-1.json").write_text('{"process": "trainer-1"')
    (tmp_path / "trainer-2.json").write_text("[1]")
    (tmp_path / "trainer-3.json.17.tmp").write_text("{")
    Heartbeat(tmp_path, "orchestrator", events, 1.0).beat()
    assert set(read_beats(tmp_path, "")) == {"trainer-0", "orchestrator"}
    forget_beats(tmp_path, "trainer-")
    assert [path.name for path in tmp_path.glob("*.json*") if path.name != "events.jsonl"] == ["orchestrator.json"]


def test_the_span_that_failed_is_the_innermost_that_the_first_exception_left(events: EventLog) -> None:
    with pytest.raises(ValueError, match="gloo"), events.span("evaluate", label="final"), events.span("train_step", step=9):
        raise ValueError("gloo")
    assert events.failed_at == "train_step step 9"


@pytest.mark.parametrize(("silence_s", "every_s"), [(1.0, 0.1), (30.0, 3.0), (600.0, 3.0)])
def test_many_beats_fit_into_the_silence_that_means_death(silence_s: float, every_s: float) -> None:
    assert interval_s(silence_s) == every_s


def test_an_orchestrator_says_what_it_is_at_before_it_has_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    paths = small_paths(config)
    heard: list[dict[str, Beat]] = []

    async def refuses(*_: object) -> None:
        heard.append(read_beats(paths.beats, ""))
        raise ConfigError("no problems")

    monkeypatch.setattr(orchestrator, "build_parts", refuses)
    with pytest.raises(ConfigError, match="no problems"):
        asyncio.run(orchestrator.serve(config, paths))
    assert [(beat.number, beat.doing) for beat in heard[0].values()] == [(1, "prepare")]
