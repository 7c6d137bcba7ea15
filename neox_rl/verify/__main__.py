"""``python -m neox_rl.verify --task math|game24|countdown FILE.jsonl``: checks recorded answers.

Rows of ``math`` are ``{gold, pred}``; of ``game24`` and ``countdown`` ``{numbers, target, pred}`` (``nums`` is read too; the
target of game24 is 24 unless given). ``id`` and ``expected`` (true or false) are optional. Prints one JSON line a row, in order:
``id`` if given, ``correct``, ``reason``, ``ms``; a row that cannot be read has the reason ``malformed`` and an ``error``. The last
line is ``{"summary": {...}}``. Exit status: 0, or 2 when the file or the arguments cannot be used.
``--policy KEY=VALUE`` sets a key of ``metarl.verify.math``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from neox_rl.config.leaves import convert, leaves, nearest
from neox_rl.config.schema import MathPolicy, VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.types import Problem, Verdict
from neox_rl.verify.verifier import TASKS, TaskVerifier, make_verifier

_AHEAD = 64


class Row(NamedTuple):
    """One line of the file; ``error`` says why it cannot be checked, empty when it can."""

    number: int
    id: Any = None
    problem: Problem | None = None
    pred: str = ""
    expected: bool | None = None
    error: str = ""


def read_row(task: str, number: int, line: str) -> Row:
    """The row in a line, with ``error`` set when a key is missing or has the wrong type."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, error=f"line {number} is not JSON: {error}")
    if not isinstance(data, dict):
        return Row(number, error=f"line {number} is {type(data).__name__}, an object is needed")
    row_id, pred, expected = data.get("id"), data.get("pred"), data.get("expected")
    if not isinstance(pred, str):
        return Row(number, row_id, error=f"line {number}: pred is {type(pred).__name__}, a string is needed")
    if expected is not None and not isinstance(expected, bool):
        return Row(number, row_id, error=f"line {number}: expected is {expected!r}, true or false is needed")
    if task == "math":
        gold = data.get("gold")
        if isinstance(gold, bool) or not isinstance(gold, str | int | float):
            return Row(number, row_id, error=f"line {number}: gold is {type(gold).__name__}, a string or number is needed")
        return Row(number, row_id, Problem(str(number), task, "", str(gold), ""), pred, expected)
    numbers = data.get("numbers", data.get("nums"))
    meta = {"numbers": numbers, **({"target": data["target"]} if data.get("target") is not None else {})}
    if not isinstance(numbers, list) or (task == "countdown" and "target" not in meta):
        return Row(number, row_id, error=f"line {number}: needs numbers (a list of integers){' and target' * (task == 'countdown')}")
    return Row(number, row_id, Problem(str(number), task, "", "", "", meta), pred, expected)


def check_rows(verifier: TaskVerifier, rows: Iterator[Row], workers: int) -> Iterator[tuple[Row, Verdict | None]]:
    """Rows and their verdicts in order, ``workers`` checked at once and a bounded number read ahead."""
    with ThreadPoolExecutor(workers) as executor:
        pending: deque[tuple[Row, Future[Verdict] | None]] = deque()
        for row in rows:
            pending.append((row, executor.submit(verifier.check_sync, row.problem, row.pred) if row.problem else None))
            if len(pending) > _AHEAD:
                done, future = pending.popleft()
                yield done, future.result() if future else None
        for done, future in pending:
            yield done, future.result() if future else None


class Tally:
    """What the summary counts. Rates are shares of the rows with that label."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.labels: Counter[tuple[bool, bool]] = Counter()

    def add(self, row: Row, verdict: Verdict | None) -> None:
        self.reasons[verdict.reason.value if verdict else "malformed"] += 1
        if verdict and row.expected is not None:
            self.labels[row.expected, verdict.correct] += 1

    def summary(self, wall_s: float) -> dict[str, Any]:
        rows, labeled = self.reasons.total(), self.labels.total()
        missed, fooled = self.labels[True, False], self.labels[False, True]
        positives, negatives = missed + self.labels[True, True], fooled + self.labels[False, False]
        return {
            "rows": rows,
            "correct": self.reasons["match"],
            "correct_frac": _share(self.reasons["match"], rows),
            "malformed": self.reasons["malformed"],
            "reasons": dict(sorted(self.reasons.items())),
            "labeled": labeled,
            "accuracy": _share(labeled - missed - fooled, labeled),
            "false_negatives": missed,
            "false_negative_rate": _share(missed, positives),
            "false_positives": fooled,
            "false_positive_rate": _share(fooled, negatives),
            "wall_s": round(wall_s, 3),
            "rows_per_s": round(rows / wall_s, 1) if wall_s > 0 else None,
        }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def read_policy(settings: Sequence[str]) -> MathPolicy:
    """``KEY=VALUE`` each, as keys of ``metarl.verify.math``. Raises ConfigError."""
    prefix = "metarl.verify.math."
    chosen: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        leaf = leaves().get(prefix + name)
        if leaf is None:
            near = nearest(prefix + name)
            hint = f"; did you mean {near.removeprefix(prefix)}?" if near.startswith(prefix) else "; configs/README.md has them"
            raise ConfigError(f"--policy {setting}: no key {name!r} in {prefix[:-1]}{hint}")
        chosen[name] = convert(leaf, yaml.safe_load(value), "--policy")
    return MathPolicy(**chosen)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.verify", description="Checks recorded answers against gold answers.")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--workers", type=int, default=VerifyConfig().workers, help="worker processes (math)")
    parser.add_argument("--deadline-s", type=float, default=VerifyConfig().deadline_s, help="hard deadline of one check (math)")
    parser.add_argument("--policy", action="append", default=[], metavar="KEY=VALUE", help="a key of metarl.verify.math (math)")
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    if args.workers < 1 or args.deadline_s <= 0:
        parser.error(f"--workers {args.workers} must be at least 1 and --deadline-s {args.deadline_s} above 0")
    try:
        policy = read_policy(args.policy)
        lines = args.file.open(encoding="utf-8", errors="surrogateescape", newline="\n")
    except ConfigError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot read {args.file}: {error.strerror}")
    verifier = make_verifier(VerifyConfig(workers=args.workers, deadline_s=args.deadline_s, math=policy), args.task)
    tally = Tally()
    started = time.perf_counter()
    try:
        with lines:
            rows = (read_row(args.task, n, line) for n, line in enumerate(lines, 1) if line.strip())
            for row, verdict in check_rows(verifier, rows, args.workers):
                tally.add(row, verdict)
                print(json.dumps(_shown(row, verdict)))
    finally:
        verifier.close()
    print(json.dumps({"summary": tally.summary(time.perf_counter() - started)}))
    return 0


def _shown(row: Row, verdict: Verdict | None) -> dict[str, Any]:
    head = {} if row.id is None else {"id": row.id}
    if verdict is None:
        return {**head, "correct": False, "reason": "malformed", "ms": 0.0, "error": row.error}
    return {**head, "correct": verdict.correct, "reason": verdict.reason.value, "ms": round(verdict.ms, 3), "extracted": verdict.extracted}


if __name__ == "__main__":
    sys.exit(main())
