"""The resolved configuration as YAML: every key with its value, in the order of the schema."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from neox_rl.config.leaves import BLOCK
from neox_rl.config.run import RunConfig


def dump(config: RunConfig) -> str:
    """YAML text that ``load_resolved`` reads back into an equal RunConfig."""
    tree = {**asdict(config.neox), **config.extra, BLOCK: asdict(config.metarl)}
    return str(yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True, width=120))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(v) for key, v in value.items()}
        case tuple() | list():
            return [_plain(v) for v in value]
    return value
