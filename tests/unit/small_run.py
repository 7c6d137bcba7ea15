"""A run small enough for unit tests: countdown problems, the scripted generator, a verifier without processes."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.run.scripted_server import ScriptedServer, scripts_of
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Finish, Group, Problem, Reason, Role, Segment, Trace, Verdict
from neox_rl.weights.snapshot import Snapshot, make_snapshot


def small_config(root: Path, train_iters: int = 3, **blocks: dict[str, Any]) -> RunConfig:
    """``blocks`` sets keys of the metarl block: ``rollout={"group_size": 2}``."""
    metarl = MetaRLConfig(name="small", runs_dir=str(root))
    defaults: dict[str, dict[str, Any]] = {
        "problems": {"max_number": 6, "max_target": 20, "max_value": 36},
        "rollout": {"generator": "scripted", "groups_per_step": 2, "group_size": 2, "max_new_tokens": 96, "record_every": 2},
        "warmstart": {"steps": 2, "tokens_per_step": 128},
        "evaluation": {"num_problems": 4, "small_problems": 2},
    }
    for name in {*defaults, *blocks}:
        changed = replace(getattr(metarl, name), **(defaults.get(name, {}) | blocks.get(name, {})))
        metarl = replace(metarl, **{name: changed})
    return RunConfig(NeoXConfig(num_layers=2, hidden_size=64, num_attention_heads=2, seq_length=128, train_iters=train_iters), metarl)


def traces_of(demonstrations: Iterator[Group], count: int) -> list[Trace]:
    """The traces of so many demonstrations."""
    return [trace for group in itertools.islice(demonstrations, count) for trace in group.traces]


def small_paths(config: RunConfig) -> RunPaths:
    return RunPaths.of(Path(config.metarl.runs_dir) / config.metarl.name).create()


def demonstration_group(ticket: int, num_tokens: int = 6) -> Group:
    verdict = Verdict(True, "", Reason.MATCH, 0.0)
    segments = (Segment((3, 4), Role.PROMPT), Segment(tuple(range(5, 5 + num_tokens)), Role.THINK, mask=1.0))
    return Group(ticket, "p", (Trace(f"g{ticket:06d}/r0", "p", segments, 1.0, Finish.STOP, verdict),))


def rollout_group(ticket: int, version: int, rewards: tuple[float, ...] = (1.0, 0.0)) -> Group:
    traces = []
    for i, reward in enumerate(rewards):
        verdict = Verdict(reward > 0, "", Reason.MATCH if reward > 0 else Reason.MISMATCH, 0.0)
        segments = (Segment((3, 4), Role.PROMPT), Segment((5, 6, 7), Role.THINK, (-0.5,) * 3, version, mask=1.0))
        traces.append(Trace(f"g{ticket:06d}/r{i}", "p", segments, reward, Finish.STOP, verdict))
    return Group(ticket, "p", tuple(traces))


def small_snapshot(version: int) -> Snapshot:
    """Weights of a policy that nobody computes with."""
    return make_snapshot(version, [("w", torch.full((4, 4), float(version)))])


@asynccontextmanager
async def scripted_server(config: RunConfig, address: str, name: str = "server-0", *middlewares: Any) -> AsyncIterator[ScriptedServer]:
    """The run's scripted server in this event loop, at an address of ``Endpoints.servers``. ``middlewares`` are aiohttp's."""
    server = ScriptedServer(scripts_of(config), config.metarl.scripted.token_s, config.metarl.servers.max_num_seqs, name)
    server.app.middlewares.extend(middlewares)
    runner = web.AppRunner(server.app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    host, _, port = address.removeprefix("http://").rpartition(":")
    try:
        await web.TCPSite(runner, host, int(port)).start()
        yield server
    finally:
        await runner.cleanup()


class EveryOtherVerifier:
    """Right, wrong, right, wrong ... whatever the answer."""

    def __init__(self) -> None:
        self.checked = 0

    async def check(self, problem: Problem, text: str) -> Verdict:
        self.checked += 1
        correct = self.checked % 2 == 1
        return Verdict(correct, text, Reason.MATCH if correct else Reason.MISMATCH, 0.1)
