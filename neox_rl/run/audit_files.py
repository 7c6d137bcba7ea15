"""Reads what a run has left and hands it to the audit: journal, events of servers, metrics, checkpoints, summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from neox_rl.config.derived import warmstart_skipped
from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.engines.checkpoint_digests import META, step_of, whole
from neox_rl.engines.checkpoint_files import pointed
from neox_rl.errors import ConfigError
from neox_rl.queue.history import fold
from neox_rl.queue.journal import read_journal
from neox_rl.run.audit import Audit, Rule, Session
from neox_rl.run.audit_results import MAX_NAMED
from neox_rl.telemetry.events import read_events
from neox_rl.telemetry.jsonl import read_json, read_jsonl
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import NO_VERSION

SERVER_EVENTS = ("serving", "staged")


@dataclass
class Audited:
    """``damage``: words about what of the journal could not be read; ``open``: tickets that are in hand, of a run that is not done;
    ``compared``: versions that a server held by its own digest, too, counted for each life of each server."""

    audit: Audit
    finished: bool
    damage: list[str]
    open: list[int]
    compared: int


def audit_run(paths: RunPaths) -> Audited:
    """Raises ConfigError for a directory that is no run, or has no journal."""
    if not paths.config.is_file():
        raise ConfigError(f"{paths.root}: is no run directory, it has no config.yml")
    config = load_resolved(paths.config)
    if config.metarl.debug.mode == "train_only":
        raise ConfigError(f"{paths.root}: trained on recorded batches (debug.mode train_only), which has no journal to audit")
    reading = read_journal(paths.journal)
    if not reading.records:
        raise ConfigError(f"{paths.journal}: holds no record: the run did not get far enough, or its journal was moved away")
    audit = Audit(Rule.of(config), reading.has_holes)
    audit.spent.foresee(reading.records)
    for record in reading.records:
        audit.apply(record)
    summary = _object(paths.summary)
    finished = summary.get("phase") == "done" and _object(paths.status).get("message") != "stopped by the user"
    compared = _servers(audit, paths.events, config.metarl.weights.publish_every)
    rows = read_jsonl(paths.metrics)
    _rows(audit, rows, sft_steps(config, audit), finished)
    _checkpoints(audit, Path(config.neox.save) if config.neox.save else paths.checkpoints)
    if summary:
        _summary(audit, summary, rows, finished)
    if finished:
        generated = summary.get("tokens_generated") or 0  # null where no RL step was trained
        expected = fold(reading.records).tally.tokens_generated
        audit.expect("summary", "tokens_generated", generated, expected, of_journal=True)
    audit.close(finished)
    return Audited(audit, finished, reading.words(), audit.open_tickets(), compared)


def _servers(audit: Audit, directory: Path, publish_every: int) -> int:
    """Returns how many versions were compared with what a server reckoned itself, counted for each life of each server.

    What a server serves is told with the digest of the trainer's offer, which is the trainer's word; by its own it acks what it holds.
    """
    served: set[tuple[str, int]] = set()
    acked: set[tuple[str, int]] = set()
    begun: dict[str, int] = {}
    for event in read_events(directory):
        said = event.fields
        version, digest = int(said.get("version", NO_VERSION)), str(said.get("digest", ""))
        begun.setdefault(str(said.get("incarnation", "")), event.t_ns)
        if event.name in SERVER_EVENTS and event.kind == "instant" and version != NO_VERSION:
            served.add((incarnation := str(said.get("incarnation", "")), version))
            audit.served(event.process, incarnation, version, digest, event.t_ns)
        elif event.name == "acked":
            life = (who := str(said.get("who", ""))).rpartition("/")[0]
            if _is_undone(audit.sessions, publish_every, version, digest, begun.get(life), event.t_ns):
                audit.gap("digests", f"{who} held v{version} with digest {digest} of steps that were undone, or is no server of this run")
                continue
            acked.add((life, version))
            audit.acked(who, version, digest, event.t_ns)
    if audit.last and not audit.results["versions"].checked:
        audit.gap("versions", f"no server says in {directory} what it served")
    if alone := sorted(served - acked):
        named, more = ", ".join(f"{life} v{version}" for life, version in alone[:MAX_NAMED]), len(alone) - MAX_NAMED
        named += f" and {more} more" if more > 0 else ""
        audit.gap("digests", f"by the trainer's word alone, without an ack of the server's own digest: {named}")
    return len(served & acked)


def _is_undone(sessions: Sequence[Session], publish_every: int, version: int, digest: str, begun_ns: int | None, t_ns: int) -> bool:
    """Whether what a server held at ``t_ns`` may be of a trainer before the one of that time, because it was there since ``begun_ns``.

    The trainer has refused it. Its publication may be in no record: that trainer may have died before it was on the disk. One at most is
    so, its last: the batch of the next step leaves only once all records before it are on the disk.
    """
    now = next(session for session in reversed(sessions) if session.since_ns is None or session.since_ns <= t_ns)
    if now.published.get(version, digest) == digest:
        return False
    overlaps = (a for a, b in pairwise(sessions) if a.since_ns and b.since_ns and (begun_ns or 0) < b.since_ns <= t_ns)
    return begun_ns is None or any(_may_have_offered(before, publish_every, version, digest) for before in overlaps)


def _may_have_offered(trainer: Session, publish_every: int, version: int, digest: str) -> bool:
    if version in trainer.published:
        return trainer.published[version] == digest
    return version <= max([trainer.rl_step, *(known + publish_every for known in trainer.published)])


def sft_steps(config: RunConfig, audit: Audit) -> int:
    """Steps of the warm start that the run did itself: a trainer that began with a checkpoint in its place says that all are done."""
    return 0 if warmstart_skipped(config) else audit.sft_step


def _rows(audit: Audit, rows: list[dict[str, Any]], warm_steps: int, finished: bool) -> None:
    """Each step has one row, in order; the last one may still be on its way."""
    by_phase: dict[str, list[int]] = {"sft": [], "rl": []}
    for row in rows:
        by_phase.setdefault(str(row.get("phase")), []).append(int(row.get("step", -1)))
        if row.get("phase") == "rl":
            audit.reported(int(row["step"]), row)
    for phase, taken in (("sft", warm_steps), ("rl", audit.last)):
        steps = by_phase[phase]
        last = steps[-1] if steps else 0
        audit.expect("metrics", f"{phase} steps without a row", sorted(set(range(1, last + 1)).difference(steps)), [])
        audit.expect("metrics", f"the number of {phase} rows", len(steps), len(set(steps)))
        if finished or not taken - 1 <= last <= taken:
            audit.expect("metrics", f"the last {phase} step with a row", last, taken, of_journal=True)


def _checkpoints(audit: Audit, directory: Path) -> None:
    """Those behind the one that the pointer names are of a timeline that was undone: the user went back. So is what the next save moved
    aside, and what a save of the same step replaced."""
    newest = step_of(pointed(directory))
    for path in reversed(whole(directory)):
        if newest is not None and (step_of(path.name) or 0) > newest:
            continue
        state = _object(path / META).get("client_state") or {}
        feed = state.get("feed") or {}
        audit.saved(path.name, int(state.get("rl_step", 0)), feed.get("queue") if isinstance(feed, dict) else None)


def _summary(audit: Audit, summary: dict[str, Any], rows: list[dict[str, Any]], finished: bool) -> None:
    rl = [row for row in rows if row.get("phase") == "rl"]
    for key in ("rollouts_dropped", "rollouts_trained_twice"):
        if summary.get(key) is not None:
            audit.expect("summary", key, summary[key], 0)
    if finished:
        audit.expect("summary", "steps", summary.get("steps"), audit.last, of_journal=True)
    for key in ("tokens_trained", "tokens_masked_stale"):
        if summary.get(key) is not None:
            audit.expect("summary", key, summary[key], sum(row.get(key) or 0 for row in rl))
    if rl and summary.get("max_staleness_seen") is not None:
        audit.expect("summary", "max_staleness_seen", summary["max_staleness_seen"], max(row.get("staleness_max") or 0 for row in rl))


def _object(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is there and holds no JSON object."""
    try:
        return read_json(path)
    except (OSError, json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
