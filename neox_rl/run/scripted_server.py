"""A server without a model, for ``rollout.generator: scripted``: it speaks the part of vLLM's HTTP that a run uses, and is up in a second.

    python -m neox_rl.run.scripted_server --config runs/NAME/config.yml --name server-0 --port P

Weights are fetched, verified and staged as in a vLLM worker, and then thrown away; pauses, labels and version spans are those of a real
server. What it writes are depth-first searches in random order, some without their end: right and wrong answers of all lengths. How long
and how fast they are is set by the ``scripted`` block of the config. Where episodes have a tool, half of them call it
(``scripted_calls``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import random
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import words_around
from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ScriptedConfig
from neox_rl.episodes.objectives import tagged, tags_of
from neox_rl.errors import ConfigError, NeoxRLError, WeightError
from neox_rl.guard import with_own_tmp
from neox_rl.keys import Keys
from neox_rl.ports import Tokenizer
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.rollout.scripted import LOGPROB, Scripts, Switches, choice
from neox_rl.rollout.vllm_requests import ROUTE
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run.scripted_calls import last_said, words_with
from neox_rl.search.dfs import dfs
from neox_rl.search.linearize import linearize, text_of
from neox_rl.types import Finish, Problem
from neox_rl.weights.stager import Stager

logger = logging.getLogger(__name__)
UNFINISHED_FRAC = 0.2
MOST_COMPLETIONS = 4096
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def scripted_command(spec: ServerSpec, config: Path, base_env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """As ``vllm_server.server_command``. ``config`` is the resolved one of the run."""
    argv = [sys.executable, "-m", "neox_rl.run.scripted_server", "--config", str(config), "--name", spec.name, "--host", spec.host]
    argv += ["--port", str(spec.port), "--max-num-seqs", str(spec.max_num_seqs), "--seed", str(spec.seed)]
    return argv, with_own_tmp(base_env) | {"OMP_NUM_THREADS": "1"}


class ScriptedServer:
    """``app`` answers; a completion of n tokens takes n * ``token_s``, and ``max_num_seqs`` are written at once."""

    def __init__(self, scripts: Scripts, token_s: float, max_num_seqs: int, seed: str) -> None:
        self._scripts, self._token_s, self._rng = scripts, token_s, random.Random(f"scripted/{seed}")
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._running = asyncio.Event()
        self._running.set()
        self._switches = Switches()
        self._stager: Stager | None = None
        self.app = web.Application()
        posts: dict[str, Handler] = {
            "/init_weight_transfer_engine": self._init,
            "/start_weight_update": self._nothing,
            "/sleep": self._sleep,
            "/reset_prefix_cache": self._reset,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
            "/wake_up": self._wake_up,
            ROUTE: self._generate,
        }
        self.app.add_routes([web.get("/health", self._nothing), web.get("/weight_info", self._info)])
        self.app.add_routes([web.post(route, handler) for route, handler in posts.items()])
        self.app.on_cleanup.append(self._close)

    async def _nothing(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._switches.label})

    async def _init(self, request: web.Request) -> web.Response:
        info = (await request.json())["init_info"]
        await self._close(self.app)
        self._stager = Stager(info["address"], f"{info['server']}/0", keys=Keys.of_environment())
        return web.json_response({})

    async def _sleep(self, _: web.Request) -> web.Response:
        self._running.clear()
        return web.json_response({})

    async def _reset(self, _: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _update(self, request: web.Request) -> web.Response:
        info = (await request.json())["update_info"]
        if self._stager is None:
            raise WeightError("no publisher: POST /init_weight_transfer_engine first")
        staged = await asyncio.to_thread(self._stager.take, info["version"], info["deadline_s"])
        logger.info("v%d (%s) loaded", staged.version, staged.digest)
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        self._switches.add(asyncio.get_running_loop().time(), str((await request.json())["weight_version"]))
        return web.json_response({})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self._running.set()
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling = body["sampling_params"]
        if not 1 <= sampling["n"] <= MOST_COMPLETIONS:
            return web.json_response({"error": f"n must be 1 to {MOST_COMPLETIONS}"}, status=400)
        if sampling.get("prompt_logprobs") is not None:
            return web.json_response(await self._score(body["token_ids"]), dumps=_dumps)
        try:
            greedy = sampling["temperature"] == 0
            written = [self._scripts.go_on(body["token_ids"], self._rng, greedy) for _ in range(sampling["n"])]
        except KeyError as error:
            return web.json_response({"error": str(error)}, status=400)
        stops = frozenset(sampling["stop_token_ids"])
        choices = await asyncio.gather(*(self._complete(i, stopped(ids, stops), sampling["max_tokens"]) for i, ids in enumerate(written)))
        return web.json_response({"choices": choices}, dumps=_dumps)

    async def _score(self, ids: Sequence[int]) -> dict[str, Any]:
        chances = [None, *({str(token): {"logprob": LOGPROB}} for token in ids[1:])]
        return {"choices": [await self._complete(0, ids[-1:], 1)], "prompt_logprobs": chances}

    async def _complete(self, index: int, script: Sequence[int], max_tokens: int) -> dict[str, Any]:
        async with self._slots:
            await self._running.wait()
            start = asyncio.get_running_loop().time()
            ids = script[:max_tokens]
            await asyncio.sleep(len(ids) * self._token_s)
            await self._running.wait()
            finish = Finish.STOP if len(script) <= max_tokens else Finish.LENGTH
            return choice(index, ids, finish, self._switches.spans(len(ids), start, self._token_s))

    async def _close(self, _: web.Application) -> None:
        stager, self._stager = self._stager, None
        if stager is not None:
            await asyncio.to_thread(stager.close)


def stopped(ids: Sequence[int], stops: Collection[int]) -> Sequence[int]:
    """Up to the first of ``stops``, that one included; a script is at its end anyway."""
    return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids)) + 1]


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def scripts_of(config: RunConfig) -> Scripts:
    """The searches of the run's problems; with several episodes one search each."""
    metarl = config.metarl
    problems = load_problems(metarl.problems, metarl.seed)
    tokenizer = load_tokenizer(metarl.tokenizer, metarl.problems, words_around(config))
    several = metarl.rollout.method == "episodes"
    tags = list(tags_of(metarl.episodes.gammas).values()) if several else [""]
    by_prompt = {tokenizer.encode_prompt(tagged(p.prompt, tag)): p for p in (*problems.train, *problems.heldout) for tag in tags}

    def script(prompt: tuple[int, ...], number: int, heard: str) -> tuple[int, ...]:
        problem = by_prompt[prompt]
        rng = random.Random(f"call/{metarl.seed}/{problem.id}/{number}/{heard}")
        if several and (words := words_with(metarl.episodes.tool, problem, number, rng, heard)):
            return (*tokenizer.encode(words), tokenizer.eos_id)
        return _script(problem, number, tokenizer, metarl.scripted, metarl.seed)

    return Scripts(by_prompt.keys(), script, lambda begun: last_said(begun, tokenizer) if several else None)


def _script(problem: Problem, number: int, tokenizer: Tokenizer, config: ScriptedConfig, seed: int) -> tuple[int, ...]:
    rng = random.Random(f"scripted/{seed}/{problem.id}/{number}")
    if problem.task not in ARITHMETIC_TASKS:
        return (*tokenizer.encode(str(rng.randint(1, int(str(problem.meta["num_goals"]))))), tokenizer.eos_id)
    ids = tokenizer.encode(text_of(linearize(dfs(problem, rng), problem)))
    if not config.mean_tokens:
        return (*(ids[: rng.randrange(len(ids))] if rng.random() < UNFINISHED_FRAC else ids), tokenizer.eos_id)
    length = max(1, round(rng.lognormvariate(math.log(config.mean_tokens) - config.sigma**2 / 2, config.sigma)))
    while len(ids) < length:  # one search after another
        ids = (*tokenizer.encode(text_of(linearize(dfs(problem, rng), problem))), *ids)
    return (*ids[len(ids) - length + 1 :], tokenizer.eos_id)


@web.middleware
async def _say_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What goes wrong is told in words, as vLLM does, with status 500."""
    try:
        return await handler(request)
    except (NeoxRLError, KeyError, TypeError, ValueError) as error:
        logger.exception("%s failed", request.path)
        return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.run.scripted_server", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--config", required=True, type=Path, help="resolved config of the run")
    parser.add_argument("--name", default="server-0")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--max-num-seqs", default=256, type=int)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = load_resolved(args.config)
        scripts = scripts_of(config)
    except ConfigError as error:
        logger.error("%s", error)
        return 2

    async def application() -> web.Application:
        server = ScriptedServer(scripts, config.metarl.scripted.token_s, args.max_num_seqs, f"{args.seed}/{args.name}")
        server.app.middlewares.append(_say_errors)
        return server.app

    # With handler_cancellation a request whose client is gone ends, as in vLLM.
    web.run_app(application(), host=args.host, port=args.port, print=None, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
