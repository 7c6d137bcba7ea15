"""How far a run is: what a checkpoint keeps beside weights, optimizer and random state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox_rl.errors import ConfigError
from neox_rl.types import Json


@dataclass
class Position:
    """Optimizer steps done in each phase; ``rl_step`` is also the policy version. ``feed_state`` is the feed's after the last batch.

    ``report`` is what the trainer said of its last step: {phase, step, metrics}. Said again after a resume: nobody may have heard it.
    """

    sft_step: int = 0
    rl_step: int = 0
    feed_state: Mapping[str, Json] | None = None
    report: Mapping[str, Json] | None = None

    def to_json(self) -> dict[str, Json]:
        report = dict(self.report) if self.report else None
        return {"sft_step": self.sft_step, "rl_step": self.rl_step, "feed": dict(self.feed_state or {}), "report": report}

    @classmethod
    def from_json(cls, state: Mapping[str, Json]) -> Position:
        """Raises ConfigError for the client state of something else."""
        match state:
            case {"sft_step": int() as sft_step, "rl_step": int() as rl_step, "feed": dict() as feed}:
                report = state.get("report")
                return cls(sft_step, rl_step, feed, report if isinstance(report, dict) else None)
            case _:
                raise ConfigError(f"the checkpoint was not written by a run: its client state is {str(state)[:200]}")
