"""Groups that were made by search, for people: what they cost and taught, and their trees laid out."""

from __future__ import annotations

from collections.abc import Sequence

from neox_rl.ports import Tokenizer
from neox_rl.queue.book import generated_tokens
from neox_rl.telemetry.rows import LineRow
from neox_rl.types import Finish, Group, Reason, Role, Segment, Trace

_END = {Reason.MATCH: "goal", Reason.MISMATCH: "dead_end"}


def books(groups: Sequence[Group]) -> dict[str, float]:
    """Of the groups of one step: see ``MetricsRow.searched``."""
    traces = [trace for group in groups for trace in group.traces]
    paid = sum(map(generated_tokens, groups))
    trained = sum(len(s.ids) for trace in traces for s in trace.segments if s.mask > 0)
    return {
        "solved_frac": sum(any(t.verdict.correct for t in group.traces) for group in groups) / len(groups),
        "failed_frac": sum(any(t.finish is Finish.ABORT for t in group.traces) for group in groups) / len(groups),
        "traces": len(traces),
        "steps": sum(len({path for trace in group.traces for path, _ in _steps(trace)}) for group in groups),
        "tokens_paid": paid,
        "tokens_trained": trained,
    }


def laid_out(group: Group, tokenizer: Tokenizer) -> list[LineRow]:
    """The tree that the group's paths make, depth first: a step a line, with the advantage and the policy version that it is trained by."""
    lines: dict[tuple[int, ...], LineRow] = {}
    for trace in sorted(group.traces, key=lambda trace: [path for path, _ in _steps(trace)]):
        found = list(_steps(trace))
        for depth, (path, segment) in enumerate(found):
            kind = _END.get(trace.verdict.reason, "step") if depth == len(found) - 1 else "step"
            text = tokenizer.decode(segment.ids).strip()
            if path not in lines:
                lines[path] = {"depth": depth, "text": text, "kind": kind, "wrong": False}
            if segment.advantage is not None:
                lines[path]["text"] = f"{text}   {segment.advantage:+.2f} v{segment.version}"
    return list(lines.values())


def written_ids(trace: Trace) -> list[int]:
    """All but the prompt: a path, a search that is told, or one with the solution that it is worth."""
    return [i for segment in trace.segments if segment.role is not Role.PROMPT for i in segment.ids]


def _steps(trace: Trace) -> list[tuple[tuple[int, ...], Segment]]:
    """Each step of a path, by the tokens up to its end."""
    found: list[tuple[tuple[int, ...], Segment]] = []
    path: tuple[int, ...] = ()
    for segment in trace.segments:
        if segment.role is not Role.PROMPT:
            path += segment.ids
            found.append((path, segment))
    return found
