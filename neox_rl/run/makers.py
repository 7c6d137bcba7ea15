"""Who makes the groups of a run, by ``metarl.rollout.method``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neox_rl.config.run import RunConfig
from neox_rl.episodes.tools import Tool
from neox_rl.errors import ConfigError
from neox_rl.ports import GroupMaker
from neox_rl.rollout.groups import Attempts
from neox_rl.run.episode_groups import EpisodeGroups
from neox_rl.run.search_groups import search_groups

MAKERS: Mapping[str, Callable[[RunConfig, Attempts, Tool | None], GroupMaker]] = {
    "sample": lambda config, attempts, tool: attempts,
    "search": lambda config, attempts, tool: search_groups(config, attempts),
    "episodes": EpisodeGroups.of,
}
"""The attempts have what a maker needs: the run's generator, verifier, tokenizer and reward."""


def make_maker(config: RunConfig, attempts: Attempts, tool: Tool | None = None) -> GroupMaker:
    """Raises ConfigError for a method that nothing makes groups by."""
    method = config.metarl.rollout.method
    if method not in MAKERS:
        raise ConfigError(f"metarl.rollout.method = {method}: no part makes groups so; set method to one of {sorted(MAKERS)}")
    return MAKERS[method](config, attempts, tool)
