"""What a run needs to be resumed, and who may work in its directory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.engines.checkpoint_digests import note
from neox_rl.engines.checkpoint_files import publish
from neox_rl.errors import ConfigError
from neox_rl.keys import RUN_FILE
from neox_rl.metacot import vocabulary
from neox_rl.problems.tokenizer import SymbolicTokenizer
from neox_rl.queue.book import Book
from neox_rl.queue.journal import FORMAT, LEDGER
from neox_rl.queue.records import payload_of, to_bytes
from neox_rl.run import endpoints, launch, resume
from neox_rl.run.endpoints import read_endpoints
from neox_rl.run.launch import prepared
from neox_rl.run.processes import ATTEMPT
from neox_rl.run.resume import hold, next_attempt
from neox_rl.run.supervise import Supervisor
from neox_rl.telemetry.paths import RunPaths
from tests.unit.small_run import small_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_config(tmp_path)


def prepare(config: RunConfig, resume: bool = False) -> RunPaths:
    with prepared(config, "train.py", resume) as (paths, _):
        return paths


def save(directory: Path, step: int) -> Path:
    """A checkpoint as two ranks write it."""
    temporary = directory / f"step{step:06d}.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    for rank in range(2):
        (temporary / f"rank{rank:05d}.safetensors").write_bytes(bytes(1000))
        note(temporary, rank, [temporary / f"rank{rank:05d}.safetensors"])
    publish(temporary, temporary.with_suffix(""), {"format": 1, "steps": step, "client_state": {"rl_step": step}})
    return temporary.with_suffix("")


def flip(path: Path) -> None:
    file = path / "rank00001.safetensors"
    file.write_bytes(bytes(500) + b"\x01" + bytes(499))


def spoil_latest(path: Path) -> None:
    (path.parent / "latest").write_text("step000099")


def spoil_latest_with_garbage(path: Path) -> None:
    (path.parent / "latest").write_bytes(bytes(range(1, 256)) * 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda path: os.truncate(path / "rank00001.safetensors", 500),
            r"rank00001.safetensors is damaged: it has 500 bytes, and 1000 were saved",
        ),
        (
            lambda path: (path / "rank00000.safetensors").unlink(),
            r"rank00000.safetensors is missing: meta.json says that it was saved, with 1000",
        ),
        (lambda path: os.truncate(path / "meta.json", 50), r"meta.json is damaged: it cannot be read"),
        (lambda path: (path / "meta.json").write_text("[1]"), r"meta.json is damaged: it cannot be read"),
        (lambda path: (path / "meta.json").write_bytes(b"\xff" * 9), r"meta.json is damaged: it cannot be read"),
        (
            lambda path: (path / "meta.json").write_text((path / "meta.json").read_text().replace('"rl_step": 8', '"rl_step": 9')),
            "meta.json is damaged: its content is not that of its digest",
        ),
        (lambda path: (path / "meta.json").unlink(), "latest names 'step000008', which is no checkpoint: it has no meta.json"),
        (flip, r"rank00001.safetensors is damaged: its digest is \w{32}, and \w{32} was saved"),
        (shutil.rmtree, "latest names 'step000008', which is no checkpoint: it has no meta.json"),
        (spoil_latest, "latest names 'step000099', which is no checkpoint: it has no meta.json"),
        (spoil_latest_with_garbage, r"latest names '.*', which is no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(config: RunConfig, spoil: Callable[[Path], None], said: str) -> None:
    paths = prepare(config)
    save(paths.checkpoints, 4)
    newest = save(paths.checkpoints, 8)
    longer = RunConfig(replace(config.neox, train_iters=99), config.metarl)
    before = paths.config.read_text()
    spoil(newest)
    earlier = "step000008" if spoil in (spoil_latest, spoil_latest_with_garbage) else "step000004"
    fix = f"put back a copy, or go on from another one: echo {earlier} > {paths.checkpoints}/latest"
    with pytest.raises(ConfigError, match=rf"--resume: \S+{said}.*; {fix}"):
        prepare(longer, resume=True)
    assert paths.config.read_text() == before
    (paths.checkpoints / "latest").write_text(f"{earlier}\n")
    assert prepare(longer, resume=True).config.read_text() != before


def test_a_large_checkpoint_is_read_by_the_ranks_alone(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = save(prepare(config).checkpoints, 8)
    assert resume.READ_HERE_BYTES == 2 << 30, "as docs/FAILURES.md says: what is read in a moment"
    monkeypatch.setattr(resume, "READ_HERE_BYTES", 1999)
    flip(newest)
    prepare(config, resume=True)
    os.truncate(newest / "rank00001.safetensors", 999)
    with pytest.raises(ConfigError, match="is damaged: it has 999 bytes"):
        prepare(config, resume=True)


@pytest.mark.parametrize("name", ["rank00001.safetensors", "meta.json", "latest"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_fails_is_tried_again_and_a_file_of_another_user_is_not(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """The system names no file where a read fails, only where an opening does."""
    paths = prepare(config)
    save(paths.checkpoints, 4)
    save(paths.checkpoints, 8)
    opened = Path.open

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name and not path.match("step000004/*"):
            raise OSError(number, os.strerror(number), *([str(path)] if number == errno.EACCES else []))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    again = r"try again; if it stays so, put back a copy, or go on from another one: echo"
    damaged = rf"{name} cannot be read \(\[Errno 5\] Input/output error\): {again}"
    refused = rf"cannot read \S+/{name}: Permission denied; resume as the user who began the run"
    with pytest.raises(ConfigError, match=damaged if number == errno.EIO else refused):
        prepare(config, resume=True)


def test_where_the_only_checkpoint_is_damaged_nothing_but_a_new_start_is_left(config: RunConfig) -> None:
    (save(prepare(config).checkpoints, 4) / "rank00000.safetensors").unlink()
    with pytest.raises(ConfigError, match="there is no earlier checkpoint beside it: start again without --resume"):
        prepare(config, resume=True)


def test_resume_says_what_is_missing(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        prepare(config, resume=True)
    prepare(config)
    with pytest.raises(ConfigError, match=r"holds no checkpoint \(checkpoint_factor = 0\)"):
        prepare(config, resume=True)


def test_an_earlier_run_is_moved_aside_and_a_running_one_is_left_alone(config: RunConfig) -> None:
    paths = prepare(config)
    (paths.root / "mark").touch()
    prepare(config)
    assert (paths.root.with_name("small.1") / "mark").exists() and not (paths.root / "mark").exists()
    save(paths.checkpoints, 1)
    with prepared(config, "train.py", resume=True):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"small is running; .* another --name"):
                prepare(config, resume)
    prepare(config, resume=True)


def test_a_resumed_run_waits_for_its_ports_unless_its_launcher_lives(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guardians end what a launcher that was killed just now had started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        network = replace(config.metarl.network, master_port=taken.getsockname()[1])
        fixed = replace(config, metarl=replace(config.metarl, network=network))
        save(prepare(config).checkpoints, 1)
        monkeypatch.setattr(endpoints.time, "sleep", lambda _: taken.close())
        with prepared(config, "train.py", resume=True), pytest.raises(ConfigError, match="small is running"):
            prepare(fixed, resume=True)
        with pytest.raises(ConfigError, match="choose a free port, or 0"):
            prepare(fixed)
        assert read_endpoints(prepare(fixed, resume=True).endpoints).master_port == network.master_port and taken.fileno() == -1


def test_servers_of_every_part_draw_numbers_of_their_own(config: RunConfig) -> None:
    seeds = []
    for again in (False, True, True):
        with prepared(config, "train.py", again) as (paths, parts):
            save(paths.checkpoints, 1)
            seeds.append(parts[0].argv[parts[0].argv.index("--seed") + 1])
    assert seeds[0] == str(config.metarl.seed) and len({*seeds}) == 3


def test_the_lock_is_held_from_the_move_to_the_end(config: RunConfig) -> None:
    old = prepare(config)
    with prepared(config, "train.py", resume=False) as (paths, parts):
        assert [part.name for part in parts][-2:] == ["orchestrator", "trainer"]
        for root in (paths.root, old.root.with_name("small.1")):
            with pytest.raises(ConfigError, match="is running"):
                hold(RunPaths.of(root))


def test_a_start_that_fails_leaves_the_earlier_run_where_it_is(config: RunConfig, tmp_path: Path) -> None:
    before = prepare(config).config.read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        changes: list[tuple[dict[str, dict[str, object]], str]] = [
            ({"network": {"master_port": port}}, r"metarl\.network\.master_port"),
            ({"network": {"bind_host": "no-such-host.invalid"}}, r"metarl\.network\.bind_host"),
            ({"tokenizer": {"path": str(tmp_path)}}, "no tokenizer.json"),
            ({"problems": {"source": "game24", "num_numbers": 5}}, "set problems.num_numbers"),
            ({"debug": {"record_batches": str(tmp_path)}}, "record_batches = .* holds files of an earlier run"),
        ]
        for blocks, message in changes:
            with pytest.raises(ConfigError, match=message):
                prepare(small_config(tmp_path, 3, **blocks))
    assert not (tmp_path / "small.1").exists() and (tmp_path / "small" / "config.yml").read_text() == before


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "small").touch()
    with pytest.raises(ConfigError, match=r"metarl\.runs_dir = '.*': cannot write .*small/lock \(Not a directory\)"):
        prepare(small_config(tmp_path))


def test_a_bad_problem_file_is_found_before_anything_starts(config: RunConfig, tmp_path: Path) -> None:
    SymbolicTokenizer(vocabulary(36)).save(tmp_path / "tokenizer")
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    problems = {"source": "jsonl", "path": str(tmp_path / "bad.jsonl")}
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1"):
        prepare(small_config(tmp_path, problems=problems, tokenizer={"path": str(tmp_path / "tokenizer")}))
    assert not (tmp_path / "small").exists()


def test_checkpoints_of_an_earlier_run_are_never_written_over(config: RunConfig, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "step000009").mkdir(parents=True)
    elsewhere = RunConfig(replace(config.neox, save=str(kept)), config.metarl)
    with pytest.raises(ConfigError, match=r"save = '.*kept': holds files of an earlier run, .* --resume"):
        prepare(elsewhere)
    (kept / "step000009").rmdir()
    prepare(elsewhere)
    save(kept, 1)
    prepare(elsewhere, resume=True)
    inside = RunConfig(replace(config.neox, save=str(tmp_path / "small" / "kept")), config.metarl)
    (tmp_path / "small" / "kept").mkdir()
    (tmp_path / "small" / "kept" / "step000001").mkdir()
    prepare(inside)
    assert (tmp_path / "small.1" / "kept" / "step000001").is_dir(), "it moves aside with its run"


def test_a_report_that_fails_hides_no_failure_and_is_one_after_a_whole_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(root: str) -> None:
        raise ValueError("no figures")

    monkeypatch.setattr(launch, "write_summary", broken)
    monkeypatch.setattr(Supervisor, "run", lambda self, parts: True)
    with pytest.raises(ValueError, match="no figures"):
        launch.launch(config, "train.py", resume=False)
    monkeypatch.setattr(Supervisor, "run", lambda self, parts: False)
    assert launch.launch(config, "train.py", resume=False) == launch.INTERRUPTED
    assert "warning: no report" in capsys.readouterr().err


def test_a_save_that_was_cut_short_is_no_checkpoint_to_resume_from(config: RunConfig) -> None:
    paths = prepare(config)
    (paths.checkpoints / "step000001.tmp").mkdir()
    (paths.checkpoints / "latest.tmp").touch()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        prepare(config, resume=True)


def test_each_start_of_the_ranks_has_its_number_and_the_orchestrator_has_the_same(config: RunConfig) -> None:
    def attempts(resume: bool) -> set[tuple[str, str]]:
        with prepared(config, "train.py", resume) as (paths, parts):
            save(paths.checkpoints, 1)
            return {(part.env[ATTEMPT], part.argv[-1]) for part in parts if ATTEMPT in part.env}

    root = f"{config.metarl.runs_dir}/small"
    assert attempts(False) == {("1", root)} and attempts(True) == {("2", root), ("2", "--resume")} and attempts(False) == {("1", root)}


def test_a_power_cut_leaves_the_count_of_starts_and_the_config_whole(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty config.yml reads as the defaults, and the user's own keys would be refused as changed."""
    paths = prepare(config)
    save(paths.checkpoints, 1)
    files = (paths.config, paths.attempt)
    before = [path.read_text() for path in files]

    def cut(file: int) -> None:
        raise OSError(errno.EIO, "the power is gone before this is on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut)
        with pytest.raises(ConfigError, match="the power is gone"):
            prepare(RunConfig(replace(config.neox, train_iters=99), config.metarl), resume=True)
        with pytest.raises(OSError, match="the power is gone"):
            next_attempt(paths)
    assert [path.read_text() for path in files] == before and not list(paths.root.glob("*.tmp"))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("left", ["", "[1]", '{"attempt": null}', None, '{"attempt": 1}'])
def test_a_count_of_starts_that_was_lost_or_is_older_is_taken_from_the_journal(config: RunConfig, left: str | None, saved: bool) -> None:
    paths = prepare(config)
    save(paths.checkpoints, 1)
    book = Book.open(paths.journal, 7, 0.02, 5.0)
    book.session("s", 7, 0, 0, {})
    if saved:
        book.checkpoint(2, 0, 0)
    book.close()
    paths.attempt.unlink()
    if left is not None:
        paths.attempt.write_text(left)
    prepare(config, resume=True)
    assert json.loads(paths.attempt.read_text())["attempt"] == 8, "the orchestrator would refuse a trainer of attempt 2"


def test_the_journal_is_not_read_for_a_count_that_is_there(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be large, and the orchestrator reads it anyway."""
    save(prepare(config).checkpoints, 1)
    monkeypatch.delattr(resume, "read_journal")
    prepare(config, resume=True)


def test_a_request_to_stop_does_not_outlive_its_run(config: RunConfig) -> None:
    paths = prepare(config)
    save(paths.checkpoints, 1)
    paths.stop.touch()
    assert not prepare(config, resume=True).stop.exists()


def test_a_journal_of_another_release_is_refused_before_anything_is_touched(config: RunConfig) -> None:
    paths = prepare(config)
    save(paths.checkpoints, 1)
    paths.journal.mkdir(exist_ok=True)
    segment, before = paths.journal / "000000000001.journal", paths.config.read_text()
    longer = RunConfig(replace(config.neox, train_iters=99), config.metarl)
    for bytes_after in (0, 1 << 16):
        segment.write_bytes(to_bytes(segment.name, 1, payload_of("segment", {"format": FORMAT + 1})) + bytes(bytes_after))
        with pytest.raises(ConfigError, match=rf"{segment.name} has journal format {FORMAT + 1}, this release reads {FORMAT}"):
            prepare(longer, resume=True)
        assert paths.config.read_text() == before
    segment.write_bytes(to_bytes(segment.name, 1, payload_of("segment", {"format": FORMAT})))
    assert prepare(longer, resume=True).config.read_text() != before


def test_a_journal_that_cannot_be_read_is_refused_before_anything_is_touched(config: RunConfig) -> None:
    paths = prepare(config)
    save(paths.checkpoints, 1)
    (paths.journal / LEDGER).mkdir(parents=True)  # unreadable also for root
    before = paths.config.read_text()
    with pytest.raises(ConfigError, match=rf"--resume: cannot read \S+/{LEDGER}: Is a directory; resume as the user who began the run"):
        prepare(RunConfig(replace(config.neox, train_iters=99), config.metarl), resume=True)
    assert paths.config.read_text() == before


def test_keys_of_another_release_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    config = small_config(tmp_path, network={"curve": "always"})
    paths = prepare(config)
    save(paths.checkpoints, 1)
    file, before = paths.keys / RUN_FILE, paths.config.read_text()
    written = json.loads(file.read_text())
    file.write_text(json.dumps({name: key for name, key in written.items() if not name.startswith("trainer_")}))
    longer = RunConfig(replace(config.neox, train_iters=99), config.metarl)
    with pytest.raises(ConfigError, match=r"run\.json: is no key file"):
        prepare(longer, resume=True)
    assert paths.config.read_text() == before
    file.write_text(json.dumps(written))
    assert prepare(longer, resume=True).config.read_text() != before
