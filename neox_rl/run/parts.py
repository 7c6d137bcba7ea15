"""Builds the orchestrator's parts from the config: who generates, who verifies, who switches versions."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.keys import Keys
from neox_rl.metacot import SOLUTION
from neox_rl.ports import Generator, Tokenizer
from neox_rl.problems.sources import load_problems
from neox_rl.problems.split import ProblemSet
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer
from neox_rl.rollout.groups import Attempts
from neox_rl.rollout.scripted import Script, ScriptedGenerator
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.run.activity import ServerActivity
from neox_rl.run.endpoints import Endpoints, read_endpoints, server_specs
from neox_rl.run.versions import Deadlines, Keeper, ScriptedKeeper, ServerKeeper
from neox_rl.search.dfs import dfs
from neox_rl.search.linearize import linearize, text_of
from neox_rl.search.replay import num_wrong_steps
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Problem, Verdict
from neox_rl.verify.reward import reward
from neox_rl.verify.verifier import TaskVerifier, make_verifier, readable_gold

logger = logging.getLogger(__name__)
MAX_NAMED = 5


@dataclass(frozen=True)
class Parts:
    """What the orchestrator is made of. ``activity`` watches the servers where there are any; ``keys`` are those of its sockets."""

    endpoints: Endpoints
    problems: ProblemSet
    attempts: Attempts
    keeper: Keeper
    activity: ServerActivity | None
    events: EventLog
    keys: Keys | None


async def build_parts(config: RunConfig, paths: RunPaths, stack: AsyncExitStack) -> Parts:
    """Everything that holds a process or a socket is closed by ``stack``."""
    metarl = config.metarl
    endpoints = read_endpoints(paths.endpoints)
    keys = Keys.of_run(curve_on(metarl.network), paths.keys)
    events = EventLog(paths.event_log("orchestrator"), "orchestrator")
    stack.callback(events.close)
    tokenizer = load_tokenizer(metarl.tokenizer, metarl.problems)
    task = metarl.problems.task if metarl.problems.source == "jsonl" else metarl.problems.source
    verifier = make_verifier(metarl.verify, task)
    stack.callback(verifier.close)
    problems = load_problems(metarl.problems, metarl.seed)
    if metarl.problems.source == "jsonl":
        problems = with_readable_answers(problems, verifier, metarl.problems.path)
    generator, keeper, activity = await _generation(config, paths, endpoints, tokenizer, problems, events, keys, stack)
    attempts = Attempts(generator, verifier, tokenizer, partial(_reward, config), solution_id(tokenizer))
    return Parts(endpoints, problems, attempts, keeper, activity, events, keys)


def with_readable_answers(problems: ProblemSet, verifier: TaskVerifier, path: str) -> ProblemSet:
    """Without the problems that no attempt can solve, because their gold answer cannot be read. Raises ConfigError when none is left."""
    train, no_train = readable_gold(verifier, problems.train)
    heldout, no_heldout = readable_gold(verifier, problems.heldout)
    if dropped := (*no_train, *no_heldout):
        named = ", ".join(dropped[:MAX_NAMED]) + ", ..." * (len(dropped) > MAX_NAMED)
        logger.warning(
            "%d training and %d held-out problems are left out, their answers cannot be read: %s", len(no_train), len(no_heldout), named
        )
    if not train:
        raise ConfigError(f"{path}: the verifier can read the answer of none of its {len(no_train)} training problems; check the answers")
    return replace(problems, train=train, heldout=heldout, counts=problems.counts | {"unreadable_answers": len(dropped)})


def _reward(config: RunConfig, problem: Problem, verdict: Verdict, text: str, num_tokens: int) -> float:
    charged = config.metarl.reward.wrong_step_cost > 0 and problem.task in ARITHMETIC_TASKS
    wrong_steps = num_wrong_steps(problem, text) if charged else 0
    return reward(verdict, num_tokens, config.metarl.rollout.max_new_tokens, config.metarl.reward, wrong_steps)


def solution_id(tokenizer: Tokenizer) -> int | None:
    """The token that begins the solution, where the vocabulary has one word for it."""
    ids = tokenizer.encode(SOLUTION)
    return ids[0] if isinstance(tokenizer, SymbolicTokenizer) and len(ids) == 1 else None


async def _generation(
    config: RunConfig,
    paths: RunPaths,
    endpoints: Endpoints,
    tokenizer: Tokenizer,
    problems: ProblemSet,
    events: EventLog,
    keys: Keys | None,
    stack: AsyncExitStack,
) -> tuple[Generator, Keeper, ServerActivity | None]:
    metarl = config.metarl
    if metarl.rollout.generator == "scripted":
        scripted = ScriptedGenerator(_search_script(problems, tokenizer), metarl.seed)
        return scripted, ScriptedKeeper(scripted), None
    specs = server_specs(config, endpoints, paths.root / "model", Machine.here())
    generator = await stack.enter_async_context(VllmGenerator([spec.address for spec in specs], metarl.servers.request_timeout_s))
    logs = [EventLog(paths.event_log(spec.name), spec.name) for spec in specs]
    for log in logs:
        stack.callback(log.close)
    deadlines = Deadlines.of(metarl.servers, metarl.weights, metarl.deadlines)
    activity = ServerActivity(lambda: generator.inflight, [spec.address for spec in specs], logs)
    return generator, ServerKeeper(specs, endpoints.weights, deadlines, events, logs, keys), activity


def _search_script(problems: ProblemSet, tokenizer: Tokenizer) -> Script:
    """Depth-first searches in random order, a fifth of them cut short: right and wrong answers of all lengths."""
    by_prompt = {tokenizer.encode(p.prompt): p for p in (*problems.train, *problems.heldout)}

    def script(prompt_ids: Sequence[int], rng: random.Random) -> Sequence[int]:
        problem = by_prompt.get(tuple(prompt_ids))
        if problem is None:
            raise ConfigError("the scripted generator knows only the run's own problems")
        ids = tokenizer.encode(text_of(linearize(dfs(problem, rng), problem)))
        return (*ids[: rng.randrange(len(ids))], tokenizer.eos_id) if rng.random() < 0.2 else (*ids, tokenizer.eos_id)

    return script
