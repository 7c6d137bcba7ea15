"""A policy's search laid out for a reader: one line a step, indented by depth, with what became of it. Data only, no markup."""

from __future__ import annotations

from dataclasses import dataclass, replace

from neox_rl.metacot import GOAL
from neox_rl.search.replay import Kind, Played, replay
from neox_rl.types import Problem

LINE_OF: dict[Kind, str] = {
    Kind.STEP: "step",
    Kind.LEAF: "leaf",
    Kind.COMPARE: "stray",
    Kind.BACK: "back",
    Kind.ANSWER: "solution",
    Kind.JUNK: "junk",
}


@dataclass(frozen=True, slots=True)
class RenderedLine:
    """``kind``: step, leaf (not compared), dead_end, goal, back, solution, junk, or stray (a comparison without a leaf).

    ``wrong`` marks what is false or not legal, and ``note`` says why in one word (a ``replay.Flaw``), empty when right.
    ``repeated`` marks a step tried before from the same state.
    """

    depth: int
    text: str
    kind: str
    wrong: bool
    note: str = ""
    repeated: bool = False


def render(problem: Problem, text: str) -> list[RenderedLine]:
    """The completion ``text`` as lines; a leaf and its comparison share one."""
    lines: list[RenderedLine] = []
    for played in replay(problem, text):
        if played.kind is Kind.COMPARE and lines and lines[-1].kind == LINE_OF[Kind.LEAF]:
            lines[-1] = _compared(lines[-1], played)
        else:
            note = played.flaw.value if played.flaw else ""
            lines.append(RenderedLine(played.depth, played.text, LINE_OF[played.kind], played.flaw is not None, note, played.repeated))
    return lines


def _compared(leaf: RenderedLine, played: Played) -> RenderedLine:
    kind = "goal" if played.text == GOAL else "dead_end"
    note = leaf.note or (played.flaw.value if played.flaw else "")
    return replace(leaf, text=f"{leaf.text} {played.text}", kind=kind, wrong=bool(note), note=note)
