"""A readable selection of rollouts: enough to see how the policy searches, small enough to open in a report."""

from __future__ import annotations

from pathlib import Path

from neox_rl.telemetry.jsonl import JsonlWriter
from neox_rl.telemetry.rows import LineRow, RolloutRow

MAX_TEXT = 20_000
MAX_LINES = 400


class RolloutRecorder:
    """Writes rows to ``rollouts.jsonl``. ``every`` is ``metarl.rollout.record_every``: each n-th group, 0 for none."""

    def __init__(self, path: Path, every: int) -> None:
        self._every = every
        self._writer = JsonlWriter(path)

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
        self._writer.close()
