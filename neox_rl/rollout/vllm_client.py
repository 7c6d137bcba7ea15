"""``ports.Generator`` over vLLM servers: token ids in; token ids, log-probs and policy versions out, as the engine attests them.

The n completions of a prompt are one request, so that the engine computes the prompt once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec

from neox_rl.errors import DeadlineError, NeoxRLError, WireError
from neox_rl.rollout.vllm_control import parse_version
from neox_rl.types import NO_VERSION, Completion, Finish, SamplingParams, VersionSpan

ROUTE = "/inference/v1/generate"
_NAN_LOGPROB = -9999.0
"""What vLLM sends for a log-prob that is NaN or minus infinity."""


class _Token(msgspec.Struct):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: Finish
    weight_versions: list[_Span] | None = None


class _Response(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Response)


class ServerFailedError(NeoxRLError):
    """A server that did not answer, answered 5xx, or answered with what no policy made: another one may."""


class NobodyServesError(DeadlineError):
    """No server served when the request's deadline passed: nothing is wrong with it. Who keeps the servers has a deadline for that."""


class _MovedError(Exception):
    """The server was taken out while the request was in flight: nobody's failure."""


@dataclass(slots=True)
class _Server:
    """``calls``: its requests in flight; ``inflight``: the completions that these ask for. ``left``: what is in flight is to move."""

    serving: bool = True
    left: bool = False
    inflight: int = 0
    failures: int = 0
    calls: set[asyncio.Task[tuple[int, bytes]]] = field(default_factory=set)


class VllmGenerator:
    """Samples from whichever serving server has the fewest completions in flight. ``async with VllmGenerator(...) as generator``.

    ``addresses`` as in ``http://127.0.0.1:8000``: those that serve from the start. Others come and go (``serve``, ``suspend``, ``forget``);
    with none serving a request waits for one. A request that fails because its server did is sent to others, at most ``max_attempts`` times
    in all, within the one deadline ``request_timeout_s``. ``on_failure(address)`` is called for each such failure.
    """

    def __init__(self, addresses: Sequence[str] = (), request_timeout_s: float = 120.0, max_attempts: int = 3) -> None:
        self._servers = {address: _Server() for address in addresses}
        self._timeout_s = request_timeout_s
        self._max_attempts = max_attempts
        self._session: aiohttp.ClientSession | None = None
        self._served = asyncio.Event()
        self.on_failure: Callable[[str], None] = lambda _: None

    async def __aenter__(self) -> Self:
        # No connection limit: how many requests run at once is the caller's decision, and the deadline covers queueing in the server.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def serve(self, address: str) -> None:
        """Requests may go there from now on."""
        server = self._servers.setdefault(address, _Server())
        server.serving, server.left = True, False
        self._served.set()
        self._move()

    def suspend(self, address: str) -> None:
        """No new request goes there. Those in flight stay where they are."""
        self._servers.setdefault(address, _Server()).serving = False

    def move(self, address: str) -> None:
        """As ``suspend``, and what is in flight there begins again elsewhere, as soon as anybody else serves."""
        self.suspend(address)
        self._servers[address].left = True
        self._move()

    def _move(self) -> None:
        if any(server.serving for server in self._servers.values()):
            for call in [call for server in self._servers.values() if server.left for call in server.calls]:
                call.cancel()

    def forget(self, address: str) -> None:
        """The server is gone for good."""
        self.suspend(address)
        for call in self._servers.pop(address).calls:
            call.cancel()

    @property
    def num_inflight(self) -> int:
        """Completions that servers are making now."""
        return sum(server.inflight for server in self._servers.values())

    @property
    def inflight(self) -> dict[str, int]:
        """The same by server address."""
        return {address: server.inflight for address, server in self._servers.items()}

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``. Also raises ServerFailedError when every attempt failed, WireError for an answer that cannot be."""
        body = request_body(prompt_ids, params, n, rollout_id)
        tried: list[str] = []
        failures: list[str] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(failures) < self._max_attempts:
                    tried.append(await self._pick(tried))
                    try:
                        return await self._request(tried[-1], body, n)
                    except _MovedError:
                        continue
                    except ServerFailedError as error:
                        failures.append(str(error))
                        self._failed(tried[-1])
        except TimeoutError as error:
            serving = [address for address, server in self._servers.items() if server.serving]
            where = tried[-1] if tried and tried[-1] in serving else "a server that serves"
            idle = "" if serving else f"no requests go to {', '.join(self._servers) or 'anybody'}: see the servers' logs"
            hint = "; ".join(filter(None, [*failures, idle])) or "raise servers.request_timeout_s, or lower max_inflight_groups"
            kind = DeadlineError if serving else NobodyServesError
            raise kind(f"rollout {rollout_id} from {where}", self._timeout_s, hint) from error
        raise ServerFailedError(f"rollout {rollout_id}: {len(failures)} attempts failed: {'; '.join(failures)}")

    async def _pick(self, tried: Sequence[str]) -> str:
        """The least loaded server, those of this rollout's failed attempts last, then those that failed least."""
        while not (serving := {address: server for address, server in self._servers.items() if server.serving}):
            self._served.clear()
            await self._served.wait()
        return min(serving, key=lambda address: (tried.count(address), serving[address].inflight, serving[address].failures))

    def _failed(self, address: str) -> None:
        if server := self._servers.get(address):
            server.failures += 1
        self.on_failure(address)

    async def _request(self, address: str, body: bytes, n: int) -> tuple[Completion, ...]:
        server = self._servers[address]
        call = asyncio.create_task(self._post(address, body))
        server.calls.add(call)
        server.inflight += n
        try:
            await asyncio.wait({call})
        finally:
            server.inflight -= n
            server.calls.discard(call)
            call.cancel()
        if call.cancelled():
            raise _MovedError
        status, raw = call.result()
        if status >= 500:
            raise ServerFailedError(f"{address} answered {status}: {raw[:200]!r}")
        if status != 200:
            raise WireError(f"{address} refused the request with {status}: {raw[:500]!r}")
        completions = parse_response(raw, n, address)
        if any(completion.finish is Finish.ABORT for completion in completions):
            raise ServerFailedError(f"{address} aborted the request: it is being ended, or somebody else uses it")
        return completions

    async def _post(self, address: str, body: bytes) -> tuple[int, bytes]:
        if self._session is None:
            raise WireError("use the generator as `async with VllmGenerator(...)`")
        try:
            async with self._session.post(address + ROUTE, data=body, headers={"Content-Type": "application/json"}) as response:
                return response.status, await response.read()
        except aiohttp.ClientError as error:
            raise ServerFailedError(f"{address}: {type(error).__name__}: {error}") from error


def request_body(prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> bytes:
    """The JSON of one request for ``n`` completions."""
    sampling: dict[str, Any] = {
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "stop_token_ids": list(params.stop_token_ids),
        "logprobs": 0,
        "detokenize": False,
    }
    if params.seed is not None:
        sampling["seed"] = params.seed
    return json.dumps({"token_ids": list(prompt_ids), "sampling_params": sampling}).encode()


def parse_response(raw: bytes, n: int, server: str) -> tuple[Completion, ...]:
    """The ``n`` completions, in order of their index. Raises WireError naming ``server`` and what is wrong with its answer."""
    try:
        choices = sorted(_DECODER.decode(raw).choices, key=lambda choice: choice.index)
    except msgspec.ValidationError as error:
        raise WireError(f"{server}: answer not as expected: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"{server}: answer of {len(raw)} bytes is not JSON: {error}") from error
    if [choice.index for choice in choices] != list(range(n)):
        raise WireError(f"{server}: {len(choices)} choices where {n} were asked for")
    return tuple(_completion(choice, server) for choice in choices)


def _completion(choice: _Choice, server: str) -> Completion:
    ids = tuple(choice.token_ids)
    logprobs = tuple([token.logprob for token in choice.logprobs.content])
    if len(logprobs) != len(ids) or any(token.token_id != id_ for token, id_ in zip(choice.logprobs.content, ids, strict=False)):
        raise WireError(f"{server}: {len(logprobs)} log-probs that do not belong to the {len(ids)} tokens")
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
        raise WireError(f"{server}: tokens {min(ids)}..{max(ids)}, which no vocabulary has")
    if not all(map(math.isfinite, logprobs)) or _NAN_LOGPROB in logprobs:
        raise WireError(f"{server}: a sampled token with a log-prob that is not finite: the weights or the engine are broken")
    spans = tuple(VersionSpan(parse_version(span.version, server), span.start, span.end) for span in choice.weight_versions or ())
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != len(ids) or any(s.start >= s.end for s in spans):
        raise WireError(f"{server}: version spans {spans} do not cover {len(ids)} tokens")
    if any(span.version == NO_VERSION for span in spans):
        raise ServerFailedError(f"{server} generated with dummy weights: it was started again, and is not switched to a version yet")
    if any(a.version > b.version for a, b in itertools.pairwise(spans)):
        raise WireError(f"{server}: policy versions fall within one completion: {spans}")
    return Completion(ids, logprobs, spans, choice.finish_reason)
