"""Builds the orchestrator's parts from the config: who generates, who verifies, who switches versions."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import words_around
from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on
from neox_rl.config.placement import num_servers
from neox_rl.config.run import RunConfig
from neox_rl.keys import Keys
from neox_rl.metacot import SOLUTION
from neox_rl.ports import GroupMaker, Tokenizer
from neox_rl.problems.sources import problems_of_run
from neox_rl.problems.split import ProblemSet
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer
from neox_rl.rollout.gathered import Gathered
from neox_rl.rollout.groups import Attempts
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.run.activity import ServerActivity
from neox_rl.run.endpoints import Endpoints, offered_spec, read_endpoints, server_specs
from neox_rl.run.episode_groups import EpisodeGroups
from neox_rl.run.evaluation import Attempting
from neox_rl.run.join_wire import JoinSocket
from neox_rl.run.joining import JoinDesk, Offer
from neox_rl.run.makers import make_maker
from neox_rl.run.prefix_hits import PrefixHits
from neox_rl.run.readable import with_readable_answers
from neox_rl.run.search_groups import reward_model
from neox_rl.run.solution_groups import with_references
from neox_rl.run.tools import make_tool
from neox_rl.run.versions import Deadlines, ServerKeeper
from neox_rl.search.replay import num_wrong_steps
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.heartbeat import Heartbeat, interval_s
from neox_rl.telemetry.jsonl import unless_full
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Problem, Verdict
from neox_rl.verify.reward import reward
from neox_rl.verify.verifier import make_verifier

logger = logging.getLogger(__name__)
MIN_SILENCE_S = 5.0


@dataclass(frozen=True)
class Parts:
    """What the orchestrator is made of.

    ``attempts`` samples the policy; ``evaluated`` attempts held-out problems; ``maker`` makes the groups to train. ``activity`` and
    ``hits`` watch the servers; ``keys`` are those of its sockets.
    """

    endpoints: Endpoints
    problems: ProblemSet
    attempts: Attempts
    evaluated: Attempting
    maker: GroupMaker
    keeper: ServerKeeper
    joins: JoinDesk
    activity: ServerActivity
    hits: PrefixHits
    events: EventLog
    keys: Keys | None


def signs_of_life(config: RunConfig, paths: RunPaths, stack: AsyncExitStack) -> tuple[EventLog, Heartbeat]:
    """The orchestrator's events, and beats that tell them, from its first moment on: who hears none of it knows who is late."""
    events = EventLog(paths.event_log("orchestrator"), "orchestrator")
    stack.callback(events.close)
    heartbeat = Heartbeat(paths.beats, "orchestrator", events, interval_s(config.metarl.deadlines.silence_s))
    stack.callback(asyncio.ensure_future(heartbeat.forever()).cancel)
    return events, heartbeat


async def build_parts(config: RunConfig, paths: RunPaths, events: EventLog, stack: AsyncExitStack) -> Parts:
    """Everything that holds a process or a socket is closed by ``stack``."""
    metarl = config.metarl
    endpoints = read_endpoints(paths.endpoints)
    keys = Keys.of_run(curve_on(metarl.network), paths.keys)
    tokenizer = load_tokenizer(metarl.tokenizer, metarl.problems, words_around(config))
    task = metarl.problems.task if metarl.problems.free_text else metarl.problems.source
    verifier = make_verifier(metarl.verify, task)
    stack.callback(verifier.close)
    problems = with_references(config, problems_of_run(config, tokenizer), tokenizer)
    logger.info("%d training and %d held-out problems: %s", len(problems.train), len(problems.heldout), problems.counts)
    if metarl.problems.free_text:
        origin = metarl.problems.path or metarl.problems.source
        problems = with_readable_answers(problems, verifier, origin, paths.unreadable)
    generator, keeper, activity = await _generation(config, paths, endpoints, events, keys, stack)
    joins = _join_desk(config, paths, endpoints, keeper, keys, stack)
    asked = Gathered(generator) if metarl.rollout.method == "episodes" else generator
    attempts = Attempts(asked, verifier, tokenizer, partial(_reward, config), solution_id(tokenizer))
    maker = make_maker(config, attempts, make_tool(config, stack), await reward_model(config, stack), generator)
    evaluated: Attempting = maker if isinstance(maker, EpisodeGroups) else attempts
    hits = PrefixHits(lambda: generator.inflight if metarl.rollout.method == "search" else ())
    return Parts(endpoints, problems, attempts, evaluated, maker, keeper, joins, activity, hits, events, keys)


def _reward(config: RunConfig, problem: Problem, verdict: Verdict, text: str, num_tokens: int) -> float:
    charged = config.metarl.reward.wrong_step_cost > 0 and problem.task in ARITHMETIC_TASKS
    wrong_steps = num_wrong_steps(problem, text) if charged else 0
    return reward(verdict, num_tokens, config.metarl.rollout.max_new_tokens, config.metarl.reward, wrong_steps)


def solution_id(tokenizer: Tokenizer) -> int | None:
    """The token that begins the solution, where the vocabulary has one word for it."""
    ids = tokenizer.encode(SOLUTION)
    return ids[0] if isinstance(tokenizer, SymbolicTokenizer) and len(ids) == 1 else None


async def _generation(
    config: RunConfig, paths: RunPaths, endpoints: Endpoints, events: EventLog, keys: Keys | None, stack: AsyncExitStack
) -> tuple[VllmGenerator, ServerKeeper, ServerActivity]:
    metarl = config.metarl
    generator = await stack.enter_async_context(VllmGenerator((), metarl.servers.request_timeout_s, patience_s=metarl.servers.heartbeat_s))
    logs: dict[str, EventLog] = {}

    def log_of(name: str, address: str) -> EventLog:
        """One a server, under its address: whoever joins at an address that was another's gets a log of its own."""
        if address not in logs or logs[address].process != name:
            if address in logs:
                logs[address].close()
            logs[address] = EventLog(paths.event_log(name), name)
        return logs[address]

    def close() -> None:
        for log in logs.values():
            log.close()

    stack.callback(close)
    keeper = ServerKeeper(
        generator, endpoints.weights, Deadlines.of(metarl.servers, metarl.weights, metarl.deadlines), events, log_of, keys
    )
    restart = _ask_launcher if num_servers(config) else _ask_user
    for spec in server_specs(config, endpoints, paths.root / "model", Machine.here()):
        keeper.add(spec, partial(restart, paths.restart / spec.name))
    return generator, keeper, ServerActivity(lambda: generator.inflight, logs)


def _join_desk(
    config: RunConfig, paths: RunPaths, endpoints: Endpoints, keeper: ServerKeeper, keys: Keys | None, stack: AsyncExitStack
) -> JoinDesk:
    """Where servers join; it works beside the keeper."""
    socket = JoinSocket(config.metarl.network.bind_host, endpoints.join_port, keys)
    stack.callback(socket.close)
    offer = Offer.of(config, paths, endpoints, offered_spec(config, paths.root / "model"))
    desk = JoinDesk(socket, keeper, offer, max(MIN_SILENCE_S, config.metarl.servers.heartbeat_s))
    keeper.beside(desk.run())
    return desk


def _ask_launcher(request: Path, why: str) -> None:
    """Has the launcher end the server of this name and start it again."""
    with unless_full():  # an empty one says so too, and finds room
        request.write_text(why)


def _ask_user(request: Path, why: str) -> None:
    logger.error("%s: start it again by hand, %s", request.name, why)
