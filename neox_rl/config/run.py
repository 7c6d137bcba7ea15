"""The whole configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import MetaRLConfig


@dataclass(frozen=True)
class RunConfig:
    """The NeoX keys and the ``metarl:`` block of one run. Made by ``load_config``; never built from an untyped dictionary."""

    neox: NeoXConfig = field(default_factory=NeoXConfig)
    metarl: MetaRLConfig = field(default_factory=MetaRLConfig)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys that only GPT-NeoX knows, as they were written: for the engine ``gpt-neox`` alone, empty with any other."""
