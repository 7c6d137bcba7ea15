"""Who makes the groups of a run, by ``metarl.rollout.method``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neox_rl.config.run import RunConfig
from neox_rl.episodes.tools import Tool
from neox_rl.errors import ConfigError
from neox_rl.ports import GroupMaker, Scorer
from neox_rl.rollout.groups import Attempts
from neox_rl.run.episode_groups import EpisodeGroups
from neox_rl.run.search_groups import search_groups
from neox_rl.run.solution_groups import rewards_solutions, solution_groups
from neox_rl.search.values import Value

Maker = Callable[[RunConfig, Attempts, Tool | None, Value | None], GroupMaker]
MAKERS: Mapping[str, Maker] = {
    "sample": lambda config, attempts, tool, prm: attempts,
    "search": lambda config, attempts, tool, prm: search_groups(config, attempts, prm),
    "episodes": lambda config, attempts, tool, prm: EpisodeGroups.of(config, attempts, tool),
}
"""The attempts have what a maker needs: the run's generator, verifier, tokenizer and reward; episodes may have a tool, searches a reward
model."""


def make_maker(
    config: RunConfig, attempts: Attempts, tool: Tool | None = None, prm: Value | None = None, scorer: Scorer | None = None
) -> GroupMaker:
    """``scorer``: of the same policy, for rewards that are likelihoods. Raises ConfigError for a method that nothing makes groups by."""
    if rewards_solutions(config) and scorer is not None:
        return solution_groups(config, attempts, scorer)
    method = config.metarl.rollout.method
    if method not in MAKERS:
        raise ConfigError(f"metarl.rollout.method = {method}: no part makes groups so; set method to one of {sorted(MAKERS)}")
    return MAKERS[method](config, attempts, tool, prm)
