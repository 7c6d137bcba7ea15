"""How recorded rollouts are chosen and laid out for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neox_rl.telemetry.rundata import FIRST, LAST, Row

MAX_DEPTH = 24
GOOD_LENGTH = 20  # lines: long enough to see a search, short enough to read
SHOWN_AS = {"solution": "solution", "more": "more", "step": "dead", "leaf": "dead", "dead_end": "dead", "back": "dead", "goal": "dead"}


@dataclass(frozen=True)
class Line:
    """``look`` is "path", "dead", "wrong", "goal", "solution", "more" or "plain"; ``note`` says what is wrong or repeated."""

    depth: int
    text: str
    look: str
    note: str


@dataclass(frozen=True)
class Pair:
    """One problem attempted after the warm start and at the end."""

    heading: str
    before: Row
    after: Row


def choose_pairs(rollouts: Sequence[Row], limit: int = 3) -> list[Pair]:
    """Problems recorded at both ends: improved ones first, yet always one that is not solved at the end where there is one."""
    first = {row["problem_id"]: row for row in rollouts if row["label"] == FIRST}
    last = {row["problem_id"]: row for row in rollouts if row["label"] == LAST}
    pairs = [Pair(_heading(first[key], last[key]), first[key], last[key]) for key in first if key in last]
    solved = sorted(
        (p for p in pairs if p.after["correct"]), key=lambda p: (p.before["correct"], abs(len(p.before["lines"]) - GOOD_LENGTH))
    )
    unsolved = [p for p in pairs if not p.after["correct"]]
    return solved[: limit - min(len(unsolved), 1)] + unsolved[: max(1, limit - len(solved))]


def _heading(before: Row, after: Row) -> str:
    if after["correct"]:
        return "Solved both times" if before["correct"] else "Solved only after RL"
    return "Solved only before RL" if before["correct"] else "Not solved"


def most_mixed(rollouts: Sequence[Row]) -> Row | None:
    """The training rollout that most policy versions wrote; None unless one was written by at least two."""
    mixed = [row for row in rollouts if row["label"] == "train" and len(row.get("versions") or []) > 1]
    return max(mixed, key=lambda row: len(row["versions"]), default=None)


def lay_out(lines: Sequence[dict[str, Any]], correct: bool) -> list[Line]:
    """Lines of a search with their look: wrong ones, the goal and the steps that lead to it, the solution, and dead ends.

    ``correct`` is the verdict on the attempt: a solution that is not correct looks wrong.
    """
    path = _path(lines)
    looks = [_look(line, i, path, correct) for i, line in enumerate(lines)]
    depths = [min(max(int(line["depth"]), 0), MAX_DEPTH) for line in lines]
    return [Line(depth, _text(line), look, _note(line)) for line, depth, look in zip(lines, depths, looks, strict=True)]


def _text(line: dict[str, Any]) -> str:
    return f"solution  {line['text']}" if line["kind"] == "solution" else str(line["text"])


def _look(line: dict[str, Any], index: int, path: Sequence[int], correct: bool) -> str:
    if line["wrong"] or (line["kind"] == "solution" and not correct):
        return "wrong"
    if index in path:
        return "goal" if index == path[0] else "path"
    return SHOWN_AS.get(line["kind"], "plain")


def _note(line: dict[str, Any]) -> str:
    return str(line.get("note") or ("tried before" if line.get("repeated") else "")).replace("_", " ")


def _path(lines: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the first goal that right steps alone lead to, and of these steps going up; empty where there is none."""
    for goal, line in enumerate(lines):
        if line["kind"] != "goal":
            continue
        path, depth = [goal], line["depth"]
        for i in range(goal - 1, -1, -1):  # going up, the parent is the next step that is less deep
            if lines[i]["depth"] < depth and lines[i]["kind"] == "step":
                path.append(i)
                depth = lines[i]["depth"]
        if not any(lines[i]["wrong"] for i in path):
            return path
    return []
