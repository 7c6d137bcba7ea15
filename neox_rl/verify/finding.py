"""What a pure checker returns; the caller that holds the clock makes a Verdict of it."""

from __future__ import annotations

from typing import NamedTuple

from neox_rl.types import Reason, Verdict

MAX_EXTRACTED_CHARS = 200


class Finding(NamedTuple):
    """The reason and the answer that was read; only ``Reason.MATCH`` is correct."""

    reason: Reason
    extracted: str = ""

    def verdict(self, ms: float) -> Verdict:
        # A verdict is logged and framed as UTF-8, where a lone surrogate would raise.
        shown = self.extracted[:MAX_EXTRACTED_CHARS].encode("utf-8", "replace").decode("utf-8")
        return Verdict(self.reason is Reason.MATCH, shown, self.reason, ms)
