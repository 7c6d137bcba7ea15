"""A disk that is full for a while: every process goes on writing telemetry, no metrics row is lost, no line is torn."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from synthetic_run import evaluation_rows, rl_row

from neox_rl.batch.record import read_batch, record_batch
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import LoggingConfig
from neox_rl.errors import GIVES_UP, DeadlineError, DiskStaysFullError, exit_status
from neox_rl.metacot import vocabulary
from neox_rl.problems.tokenizer import SymbolicTokenizer
from neox_rl.queue.history import Tally
from neox_rl.queue.state import TicketQueue
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.queue.wire_messages import Phase
from neox_rl.run.resume import next_attempt
from neox_rl.run.scoreboard import Scoreboard
from neox_rl.step import feed as feed_module
from neox_rl.step.feed import LiveFeed, RecordedFeed
from neox_rl.telemetry import events as events_module
from neox_rl.telemetry import jsonl
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.telemetry.heartbeat import Heartbeat, read_beats
from neox_rl.telemetry.jsonl import JsonlWriter, read_jsonl
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import Status, read_status, write_status
from neox_rl.types import Json
from tests.unit.small_run import rollout_group, small_config, small_paths
from tests.unit.wire_peers import Recorder, connected, serving

SILENCE_S = 1.0
"""What the trainer bears in a test that waits for longer, on a clock that leaves out when the machine stands still."""


class Disk:
    """Has room for ``left`` bytes more, and takes the beginning of what does not fit, as a disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 30
        self.error = errno.ENOSPC
        disk = self

        class File(FileIO):
            def write(self, data: Any) -> int:
                if (fits := min(len(data), disk.left)) == 0:
                    raise OSError(disk.error, "No space left on device")
                disk.left -= fits
                return super().write(bytes(data)[:fits])

            def truncate(self, size: int | None = None) -> int:
                before = self.seek(0, 2)
                disk.left += before - super().truncate(size)
                return before

        def write_bytes(path: Path, data: bytes) -> int:
            with File(path, "w") as file:
                return sum(file.write(data[at : at + 1]) for at in range(len(data)))

        self.file = File
        monkeypatch.setattr(jsonl, "FileIO", File)
        monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_rows_wait_for_room_and_are_whole_at_any_time(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1})
    for step, disk.left in ((2, 5), (3, 0), (4, 14)):
        writer.write({"step": step})
        assert path.read_text() == '{"step":1}\n' and not writer.flush()
    disk.left = 1 << 20
    writer.write({"step": 5})
    assert writer.flush() and [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [errno.EIO, errno.EROFS])
def test_a_disk_that_is_broken_is_an_error(tmp_path: Path, disk: Disk, error: int) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    disk.left, disk.error = 0, error
    with pytest.raises(OSError, match="No space") as raised:
        writer.write({"step": 1})
    assert raised.value.errno == error
    with pytest.raises(OSError, match="No space"):
        write_status(tmp_path / "status.json", Status())


def test_every_metrics_row_is_told_once_and_a_writer_that_ends_without_room_says_what_is_missing(tmp_path: Path, disk: Disk) -> None:
    paths, rng = RunPaths.of(tmp_path / "run").create(), random.Random(0)
    writer = MetricsWriter(paths, LoggingConfig())
    disk.left = 100
    writer.step(rl_row(1, 2, rng))
    writer.evaluation(evaluation_rows("final", 2, 1.0, rng, clusters=3)[0])
    assert not writer.written()
    with pytest.raises(OSError, match=r"full: its last rows are missing.*metrics\.jsonl"):
        writer.close()
    disk.left = 1 << 20
    assert writer.written()
    writer.close()
    assert (len(read_jsonl(paths.metrics)), len(read_jsonl(paths.evaluations))) == (1, 1)


def test_training_on_recorded_batches_waits_for_room_and_keeps_one_row(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed_of(name: str, disk_full_s: float) -> tuple[RecordedFeed, RunPaths]:
        debug = {"mode": "train_only", "batches": str(tmp_path)}
        config = small_config(tmp_path / name, queue={"disk_full_s": disk_full_s}, debug=debug)
        return RecordedFeed(config, small_paths(config)), small_paths(config)

    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            disk.left = 1 << 20

    monkeypatch.setattr(time, "sleep", sleep)
    feed, paths = feed_of("waits", 60.0)
    disk.left = 10
    feed.report(Phase.RL, 1, {"loss": 1.0})
    assert len(waited) == 3 and [row["step"] for row in read_jsonl(paths.metrics)] == [1]
    feed, _ = feed_of("ends", 0.0)
    disk.left = 10
    with pytest.raises(DiskStaysFullError, match=r"for room on the disk of .*metrics\.jsonl: make room there"):
        feed.report(Phase.RL, 2, {"loss": 1.0})


def test_a_batch_that_is_to_be_recorded_waits_for_room_and_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doing: list[str] = []
    events, groups = EventLog(tmp_path / "events.jsonl", "trainer-0"), (rollout_group(0, 0),)

    def record(*args: Any) -> Path:
        if len(doing) < room_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return record_batch(*args)

    monkeypatch.setattr(feed_module, "record_batch", record)
    monkeypatch.setattr(time, "sleep", lambda _: doing.append(events.doing))
    room_after, client = 3, create_autospec(ExperienceClient, instance=True)
    client.next_groups.return_value = groups
    live = LiveFeed(client, tmp_path / "batches", 60.0, events)
    assert live.next_groups(Phase.RL, 1) == groups == read_batch(tmp_path / "batches", "rl", 1)[0]
    assert doing == [f"wait_disk directory {tmp_path}/batches"] * 3
    room_after = 9
    with pytest.raises(DiskStaysFullError, match=r"on the disk of .*batches for room to record a batch .*record_batches"):
        LiveFeed(client, tmp_path / "batches", 0.0, events).next_groups(Phase.RL, 2)
    events.close()


@pytest.mark.parametrize("step", [1, 2])
def test_a_batch_that_does_not_fit_gives_back_the_room_that_it_took(
    step: int, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for room would wait for itself; an earlier record of the step stays."""
    earlier = record_batch(tmp_path, "rl", 1, (rollout_group(0, 0),))
    disk.left = 100
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "open", lambda path, mode: BufferedWriter(disk.file(path, mode)))
        record_batch(tmp_path, "rl", step, (rollout_group(1, 0),))
    assert [*tmp_path.iterdir()] == [earlier] and read_batch(tmp_path, "rl", 1)[0] == (rollout_group(0, 0),)


def new_board(config: RunConfig) -> tuple[Scoreboard, EventLog]:
    paths = small_paths(config)
    writer, events = MetricsWriter(paths, LoggingConfig()), EventLog(paths.event_log("orchestrator"), "orchestrator")
    return Scoreboard(config, paths, writer, TicketQueue(2, 1, 1, "token", 3), Tally(), SymbolicTokenizer(vocabulary(9)), events), events


class Writing(Recorder):
    """Acknowledges a step once its row is on the disk, as the orchestrator does."""

    def __init__(self, board: Scoreboard) -> None:
        super().__init__()
        self._board = board

    async def report(self, id: int, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        await self._board.step(phase, step, metrics)
        await super().report(id, phase, step, {})

    def waiting_for(self) -> str:
        return self._board.trouble


def test_a_trainer_hears_of_a_row_without_room_for_longer_than_it_bears_silence_and_goes_on(tmp_path: Path, disk: Disk) -> None:
    config = small_config(tmp_path)
    board, events = new_board(config)
    handler = Writing(board)
    board.phase("warmstart")
    with serving(handler) as running, connected(running.address, silence_s=SILENCE_S) as client, ThreadPoolExecutor(1) as pool:
        disk.left = 10
        client.report(Phase.SFT, 1, {"loss": 2.0})
        client.published(0, "d0")
        batch = pool.submit(client.next_groups, Phase.RL, 1)
        try:
            end = time.monotonic() + 60.0
            while "waits for the disk of" not in read_status(small_paths(config).status).message:
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(2.5 * SILENCE_S)
            assert not batch.done() and handler.calls == [("hello", 2, {})]
        finally:
            disk.left = 1 << 20
        assert len(batch.result(60.0)) == 1
        assert read_status(small_paths(config).status).message == ""
        client.report(Phase.RL, 1, {"loss": 1.0})
        client.done("finished")
        assert running.result.result(60.0) == "finished"
    expected = [("report", "sft", 1, {}), ("published", 0), ("next", "rl", 1), ("report", "rl", 1, {}), ("done", "finished")]
    assert handler.calls[1:] == expected, "in the order in which they were sent, each once"
    assert [row["phase"] for row in read_jsonl(small_paths(config).metrics)] == ["sft", "rl"]
    board.close()
    events.close()


def test_a_trainer_that_waits_too_long_for_a_row_names_its_disk(tmp_path: Path, disk: Disk) -> None:
    board, events = new_board(small_config(tmp_path))
    with serving(Writing(board)) as running, connected(running.address, deadline_s=2.0) as client:
        disk.left = 10
        client.report(Phase.SFT, 1, {"loss": 2.0})
        with pytest.raises(DeadlineError, match=r"batch of rl step 1.*last waited for the disk of .*metrics\.jsonl to take a row"):
            client.next_groups(Phase.RL, 1)
        disk.left = 1 << 20
    board.close()
    events.close()


def test_an_orchestrator_without_room_for_a_row_is_not_started_again_to_wait_once_more(tmp_path: Path, disk: Disk) -> None:
    """Also where its journal, on another disk, has room."""
    board, events = new_board(small_config(tmp_path, queue={"disk_full_s": 0.0}))
    disk.left = 10
    with pytest.raises(
        DiskStaysFullError, match=r"for the disk of .*metrics\.jsonl to take a row .* make room there; .*--resume"
    ) as raised:
        asyncio.run(board.step(Phase.SFT, 1, {"loss": 1.0}))
    assert exit_status(raised.value) == GIVES_UP
    disk.left = 1 << 20
    board.close()
    events.close()


def test_events_wait_for_room_and_those_beyond_a_bound_are_counted(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MOST_BYTES", 2000)
    log = EventLog(tmp_path / "a.jsonl", "a")
    disk.left = 50
    for version in range(100):
        log.instant("live", version=version)
        log.flush()
    assert read_events(tmp_path) == []
    disk.left = 1 << 20
    log.close()
    *kept, dropped = read_events(tmp_path)
    assert [event.fields["version"] for event in kept] == list(range(len(kept))) and len(kept) > 10
    assert (dropped.name, dropped.fields) == ("dropped", {"events": 100 - len(kept)})


def test_the_status_goes_on_in_the_room_that_it_has(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "status.json"
    disk.left = 20
    write_status(path, Status(phase="rl", step=0))
    assert list(tmp_path.iterdir()) == [], "there is no room at all"
    disk.left = 1 << 20
    write_status(path, Status(phase="rl", step=1))
    disk.left, inode = 20, path.stat().st_ino
    write_status(path, Status(phase="rl", step=2, message="waits for the disk"))
    assert (read_status(path).step, read_status(path).message, path.stat().st_ino) == (2, "waits for the disk", inode)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    write_status(path, Status(phase="rl", step=9, message="x" * 5000))
    assert read_status(path).step == 2, "what does not fit leaves the old one"
    disk.left = 1 << 20
    write_status(path, Status(phase="rl", step=3))
    assert read_status(path).step == 3


def test_beats_and_the_count_of_attempts_take_no_room(tmp_path: Path, disk: Disk) -> None:
    log = EventLog(tmp_path / "events" / "trainer-0.jsonl", "trainer-0")
    heartbeat, paths = Heartbeat(tmp_path, "trainer-0", log, 1.0), RunPaths.of(tmp_path)
    heartbeat.beat()
    assert next_attempt(paths) == 1
    inodes = {path: (path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "trainer-0.json", paths.attempt)}
    disk.left = 20
    with log.span("evaluate", label="é" * 5000):
        heartbeat.beat()
    assert next_attempt(paths) == 2
    beat = read_beats(tmp_path, "trainer-")["trainer-0"]
    assert beat.number == 2 and beat.doing.startswith("evaluate label é")
    assert inodes == {path: (path.stat().st_ino, path.stat().st_size) for path in inodes}
    disk.left = 1 << 20
    log.close()
