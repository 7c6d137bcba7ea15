"""A run that kept its rules, as what it wrote: records, metrics, checkpoints and words of servers, for an audit."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_rl.config.dump import dump
from neox_rl.queue.journal import open_journal, segments
from neox_rl.queue.positions import packed
from neox_rl.queue.records import Record, payload_of
from neox_rl.run.audit import Audit, Rule
from tests.unit.small_run import small_config, small_paths

RULE = Rule(groups_per_step=2, admission_slack=1, delivery_slack=1, mode="token", stale_tokens="mask", num_steps=4)
BATCHES = {1: (0, 1), 2: (2, 4), 3: (5, 6), 4: (3, 7)}
POSITIONS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 6, 5: 5, 6: 7, 7: 8}
"""Of the problems that were trained. Ticket 4 had another before, which was refused between steps 1 and 2."""
REFUSED, CURSORS = 4, {0: 4, 1: 6, 2: 9, 3: 9, 4: 9}
OLD = 4
"""Tokens of v0 in step 4: one step beyond the bound, so that they are masked. Their rollout was written slowly, over three versions."""


@dataclass
class Run:
    """What a run wrote. Steps 3 and 4 are done twice: the ranks died after step 4, their checkpoint was after step 2."""

    records: list[dict[str, Any]]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    served: list[tuple[str, str, int, str]] = field(default_factory=list)
    saved: dict[int, dict[str, Any]] = field(default_factory=dict)

    def of(self, kind: str, step: int) -> dict[str, Any]:
        """The last record of this kind about this step or version."""
        return next(
            r for r in reversed(self.records) if r["kind"] == kind and r.get("phase") != "sft" and step in (r.get("step"), r.get("version"))
        )

    def drop(self, record: dict[str, Any]) -> None:
        """This very record, not an equal one of the timeline before."""
        self.records = [r for r in self.records if r is not record]

    def audit(self, damaged: bool = False, finished: bool = True) -> Audit:
        audit = Audit(RULE, damaged)
        for seq, row in enumerate(self.records):
            audit.apply(Record(seq, row["kind"], {key: value for key, value in row.items() if key != "kind"}))
        for server in self.served:
            audit.served(*server)
        for step, row in self.rows.items():
            audit.reported(step, row)
        for step, queue in self.saved.items():
            audit.saved(f"step{step}", step, queue)
        audit.close(finished)
        return audit


def queue_after(step: int) -> dict[str, Any]:
    """Two steps of tickets are issued ahead."""
    trained = {ticket for s in range(1, step + 1) for ticket in BATCHES[s]}
    fresh = min(8, 2 * step + 4)
    return {"step": step, "fresh": fresh, "open": sorted(set(range(fresh)) - trained)}


def state_after(step: int) -> dict[str, Any]:
    queue = queue_after(step)
    problems = {str(ticket): POSITIONS[ticket] for ticket in queue["open"]}
    return {"queue": queue, "cursor": {"position": CURSORS[step]}, "problems": problems | ({"4": REFUSED} if step == 1 else {})}


def versions_of(step: int) -> list[dict[str, int]]:
    newest = {str(step - 1): 10}
    return [{"0": OLD, "2": 5, "3": 6}, newest] if step == 4 else [newest, newest]


def good() -> Run:
    run = Run([{"kind": "opened", "attempt": 1, "pid": 1, "time": 1.0, "rule": RULE.json()}])

    def session(attempt: int, rl_step: int) -> None:
        run.records.append(
            {"kind": "session", "session": "s", "attempt": attempt, "sft_step": 1, "rl_step": rl_step, "time": float(attempt), "state": {}}
        )
        publish(rl_step)

    def publish(version: int) -> None:
        run.records.append({"kind": "published", "version": version, "digest": f"d{version}"})
        run.records.append({"kind": "live", "version": version, "digest": f"d{version}"})

    def take(step: int) -> None:
        versions = versions_of(step)
        made = {version: [f"d{version}"] for row in versions for version in row}
        taken = {"kind": "taken", "phase": "rl", "step": step, "tickets": list(BATCHES[step]), "versions": versions, "made": made}
        run.records.append(taken | {"positions": packed(BATCHES[step], POSITIONS), "state": state_after(step)})
        publish(step)

    session(1, 0)
    run.records.append({"kind": "taken", "phase": "sft", "step": 1, "draws": 0, "ticket": 0, "state": {}})
    for step in (1, 2, 3, 4):
        take(step)
        if step == 1:
            run.records.append({"kind": "refused", "ticket": 4, "position": REFUSED, "tokens": 20, "rollouts": 2})
    session(2, 2)
    for step in (3, 4):
        take(step)
    for step in BATCHES:
        ages: dict[str, int] = {}
        for row in versions_of(step):
            for version, tokens in row.items():
                ages[str(step - 1 - int(version))] = ages.get(str(step - 1 - int(version)), 0) + tokens
        old, total = (OLD if step == 4 else 0), sum(ages.values())
        run.rows[step] = {"staleness_hist": ages, "tokens_masked_stale": old, "tokens_trained": total - old, "staleness_max": 1}
    run.served = [("server-0", "server-0@a.1", version, f"d{version}") for version in range(5)]
    run.served += [("server-0", "server-0@b.1", version, f"d{version}") for version in (2, 3, 4)]
    run.saved = {0: queue_after(0), 2: queue_after(2), 4: queue_after(4)}
    return run


def second_trainer(run: Run) -> int:
    return next(i for i, r in enumerate(run.records) if r["kind"] == "session" and r["rl_step"] == 2)


def written(root: Path, hit: bytes = b"", lost: bytes = b"") -> Path:
    """The good run on the disk; its checkpoint has put everything but the last records into the ledger.

    ``hit``: of the record where these bytes are first found one is flipped before that; ``lost``: all before these is zeroed.
    """
    config = small_config(root, train_iters=4, rollout={"groups_per_step": 2}, warmstart={"steps": 1})
    paths = small_paths(config)
    paths.config.write_text(dump(config))
    journal, _ = open_journal(paths.journal, 0.01, 1.0)
    for row in good().records:
        journal.append(payload_of(row["kind"], {key: value for key, value in row.items() if key != "kind"}))
    if hit or lost:
        asyncio.run(journal.durable())
        segment = segments(paths.journal)[0]
        data = bytearray(segment.read_bytes())
        if hit:
            data[data.index(hit)] ^= 1
        data[: data.index(lost)] = bytes(data.index(lost))
        segment.write_bytes(data)
    journal.rotate([payload_of("checkpoint", {"id": 1, "sft_step": 1, "rl_step": 4})])
    journal.close()
    rows = [{"phase": "sft", "step": 1}, *({"phase": "rl", "step": step, **row} for step, row in good().rows.items())]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = paths.checkpoints / "step000004"
    checkpoint.mkdir()
    (checkpoint / "meta.json").write_text(json.dumps({"client_state": {"rl_step": 4, "feed": {"queue": queue_after(4)}}}))
    return paths.root
