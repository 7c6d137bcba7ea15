"""What an audit found, by check, and how it is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from neox_rl.queue.state import name

MAX_NAMED = 8


@dataclass(slots=True)
class Result:
    """Of one check: how many things were checked, what is wrong with which, and what could not be checked, and why."""

    checked: int = 0
    violations: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def names(tickets: Iterable[int]) -> str:
    """``g000001, g000002 and 3 more``."""
    ordered = sorted(tickets)
    more = len(ordered) - MAX_NAMED
    return ", ".join(name(ticket) for ticket in ordered[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def table(results: Mapping[str, Result]) -> Sequence[str]:
    """One line a check."""
    return [f"{check:<12} {result.checked:>9}  {_verdict(result)}" for check, result in results.items()]


def _verdict(result: Result) -> str:
    if result.violations:
        return f"{len(result.violations)} VIOLATED"
    if result.gaps:
        return f"holds; {len(result.gaps)} could not be checked" if result.checked else "could not be checked"
    return "holds" if result.checked else "nothing to check"
