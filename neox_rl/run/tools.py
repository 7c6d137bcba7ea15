"""The tool that episodes may call, by ``metarl.episodes.tool``."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack

from neox_rl.config.run import RunConfig
from neox_rl.episodes.sandbox import Limits, PythonSandbox
from neox_rl.episodes.tools import Tool, calculate, python_tool


def make_tool(config: RunConfig, stack: ExitStack | AsyncExitStack) -> Tool | None:
    """Closed by ``stack``. Raises ConfigError where this machine cannot confine programs."""
    e = config.metarl.episodes
    if config.metarl.rollout.method != "episodes" or e.tool == "none":
        return None
    if e.tool == "calculator":
        return calculate
    sandbox = PythonSandbox(e.tool_workers, Limits(e.tool_deadline_s, e.tool_memory_mib, e.tool_output_chars))
    stack.callback(sandbox.close)
    return python_tool(sandbox)
