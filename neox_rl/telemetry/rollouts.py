"""A readable selection of rollouts: enough to see how the policy searches, small enough to open in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from neox_rl.telemetry.jsonl import JsonlWriter
from neox_rl.telemetry.rows import LineRow, RolloutRow, SpanRow
from neox_rl.types import Problem, Trace

MAX_TEXT = 20_000
MAX_LINES = 400
MOST_BYTES = 8 << 20
"""Of rows that wait for room on a full disk; what comes after is dropped."""


class RolloutRecorder:
    """Writes rows to ``rollouts.jsonl``. ``every`` is ``metarl.rollout.record_every``: each n-th group, 0 for none."""

    def __init__(self, path: Path, every: int) -> None:
        self._every = every
        self._writer = JsonlWriter(path, MOST_BYTES)

    def wants(self, ticket: int) -> bool:
        """Whether the group of this ticket is one to record."""
        return self._every > 0 and ticket % self._every == 0

    def record(self, row: RolloutRow) -> None:
        """Write the row, its text cut at MAX_TEXT characters and MAX_LINES lines: a policy that babbles must not fill the disk."""
        lines: list[LineRow] = [{**line, "text": line["text"][:MAX_TEXT]} for line in row["lines"][:MAX_LINES]]
        hidden = len(row["lines"]) - len(lines)
        if hidden > 0:
            lines.append({"depth": 0, "text": f"… {hidden} more lines", "kind": "more", "wrong": False})
        self._writer.write({**row, "text": row["text"][:MAX_TEXT], "lines": lines})

    def close(self) -> None:
        self._writer.flush()


def rollout_row(trace: Trace, problem: Problem, text: str, lines: Sequence[Mapping[str, Any]], *, label: str, step: int) -> RolloutRow:
    """The row of a rollout. ``text`` is what the policy wrote, ``lines`` its search laid out, one mapping a ``LineRow``."""
    return {
        "id": trace.id,
        "label": label,
        "step": step,
        "problem_id": problem.id,
        "prompt": problem.prompt,
        "text": text,
        "correct": trace.verdict.correct,
        "reward": trace.reward,
        "reason": trace.verdict.reason.value,
        "finish": trace.finish.value,
        "num_tokens": sum(len(s.ids) for s in trace.written),
        "versions": version_spans(trace),
        "lines": [cast("LineRow", dict(line)) for line in lines],
    }


def version_spans(trace: Trace) -> list[SpanRow]:
    """Which version sampled which tokens, counted over the sampled tokens alone; neighbors of one version are one span."""
    spans: list[SpanRow] = []
    end = 0
    for segment in trace.written:
        if not segment.ids:
            continue
        start, end = end, end + len(segment.ids)
        if spans and spans[-1]["version"] == segment.version:
            spans[-1]["end"] = end
        else:
            spans.append({"version": segment.version, "start": start, "end": end})
    return spans
