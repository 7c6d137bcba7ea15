"""The rules between keys, checked before any process starts: each a pure function of the configuration and the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from neox_rl.config.machine import Machine
from neox_rl.config.rules_episodes import EPISODE_RULES
from neox_rl.config.rules_model import MODEL_RULES, MODEL_WARNINGS
from neox_rl.config.rules_own import OWN_RULES
from neox_rl.config.rules_rl import RL_RULES, RL_WARNINGS
from neox_rl.config.rules_run import RUN_RULES, RUN_WARNINGS
from neox_rl.config.rules_search import SEARCH_RULES, SEARCH_WARNINGS
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError

Rule: TypeAlias = Callable[[RunConfig, Machine], Iterator[str]]
"""Yields one message a broken value: the value, the rule, the fix. Yields nothing when all is well."""

RULES: tuple[Rule, ...] = (*MODEL_RULES, *RL_RULES, *RUN_RULES, *SEARCH_RULES, *EPISODE_RULES, *OWN_RULES)
WARNINGS: tuple[Rule, ...] = (*MODEL_WARNINGS, *RL_WARNINGS, *RUN_WARNINGS, *SEARCH_WARNINGS)


def broken(config: RunConfig, machine: Machine) -> list[str]:
    """What keeps this configuration from running here, in the order of the rules."""
    return [message for rule in RULES for message in rule(config, machine)]


def warnings(config: RunConfig, machine: Machine) -> list[str]:
    """What runs, but most likely not as meant."""
    return [message for rule in WARNINGS for message in rule(config, machine)]


def check(config: RunConfig, machine: Machine) -> None:
    """Raises ConfigError with every broken rule, one a line."""
    if messages := broken(config, machine):
        raise ConfigError("\n".join(messages))
