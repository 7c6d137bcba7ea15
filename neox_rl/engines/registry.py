"""Trainer engines by name. A new one registers a builder; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

from neox_rl.config.run import RunConfig
from neox_rl.engines.port import Engine
from neox_rl.errors import ConfigError

Builder = Callable[[RunConfig, int], Engine]
"""(configuration, true vocabulary size) -> engine. Builders import their engine when called, not before."""


def _megatron_core(config: RunConfig, vocab_size: int) -> Engine:
    from neox_rl.engines.megatron_core import MegatronCoreEngine

    return MegatronCoreEngine(config, vocab_size)


def _gpt_neox(config: RunConfig, vocab_size: int) -> Engine:
    from neox_rl.engines.gpt_neox import GptNeoXEngine

    return GptNeoXEngine(config, vocab_size)


ENGINES: dict[str, Builder] = {"megatron-core": _megatron_core, "gpt-neox": _gpt_neox}


def register_engine(name: str, builder: Builder) -> None:
    """Makes an engine known. Raises ConfigError for a name that is taken."""
    if name in ENGINES:
        raise ConfigError(f"engine {name!r} is registered already; choose another name")
    ENGINES[name] = builder


def build_engine(config: RunConfig, vocab_size: int) -> Engine:
    """The engine that ``metarl.engine`` names, with its ranks joined and initial weights set. Raises ConfigError."""
    if config.metarl.engine not in ENGINES:
        raise ConfigError(f"engine {config.metarl.engine!r} is not registered; choose one of {sorted(ENGINES)}")
    return ENGINES[config.metarl.engine](config, vocab_size)
