"""Trainer engines by name, the project's and a user's own. The user's patches are applied before any is built."""

from __future__ import annotations

from collections.abc import Callable

import megatron_patches
from neox_rl.config.own import found, own
from neox_rl.config.run import RunConfig
from neox_rl.engines.port import Engine

Builder = Callable[[RunConfig, int], Engine]
"""(configuration, true vocabulary size) -> engine. Builders import their engine when called, not before."""


def _megatron_core(config: RunConfig, vocab_size: int) -> Engine:
    from neox_rl.engines.megatron_core import MegatronCoreEngine

    return MegatronCoreEngine(config, vocab_size)


def _gpt_neox(config: RunConfig, vocab_size: int) -> Engine:
    from neox_rl.engines.gpt_neox import GptNeoXEngine

    return GptNeoXEngine(config, vocab_size)


ENGINES: dict[str, Builder] = {"megatron-core": _megatron_core, "gpt-neox": _gpt_neox}


def build_engine(config: RunConfig, vocab_size: int) -> Engine:
    """The engine that ``metarl.engine`` names, with its ranks joined and initial weights set. Raises ConfigError and PatchError."""
    builder = found(ENGINES, config.metarl.engine, "metarl.engine")
    megatron_patches.add_own(tuple(own(name, "metarl.patches") for name in config.metarl.patches))
    return builder(config, vocab_size)
