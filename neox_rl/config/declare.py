"""How a key of the configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any, doc: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None, own: bool = False
) -> Any:
    """A config key: its default, one line of documentation, and the values it takes (inclusive bounds).

    ``own``: or a part of the user's own, as ``package.module:name`` (docs/EXTENDING.md says what it must be).
    """
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "own": own})
