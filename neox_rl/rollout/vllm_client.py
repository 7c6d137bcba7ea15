"""``ports.Generator`` over vLLM servers: token ids in; token ids, log-probs and policy versions out, as the engine attests them.

The n completions of a prompt are one request, so that the engine computes the prompt once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Self, TypeAlias, TypeVar

import aiohttp
import msgspec

from neox_rl.bounded import most_bytes, read_bounded
from neox_rl.errors import DeadlineError, ServerFailedError, WeightError, WireError
from neox_rl.rollout.pace import Paces, SlowError
from neox_rl.rollout.refusals import OF_THE_REQUEST, RefusalError, Refusals
from neox_rl.rollout.vllm_control import parse_version
from neox_rl.rollout.vllm_requests import ROUTE, request_body, score_body
from neox_rl.types import NO_VERSION, Completion, Finish, SamplingParams, VersionSpan

logger = logging.getLogger(__name__)
_NAN_LOGPROB = -9999.0
"""What vLLM sends for a log-prob that is NaN or minus infinity."""
_LIVES = itertools.count()
SPARED_S, MAX_DOUBLINGS = 10.0, 3
"""A server that failed comes last for so long, and twice as long each time that it fails again before it answers: a ticket that it failed
is handed on within that time, and having nothing in flight would make it the first choice. Never for good: it may be well again."""


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


class _Chance(msgspec.Struct):
    logprob: float


class _Scored(msgspec.Struct):
    prompt_logprobs: list[dict[int, _Chance] | None]


_DECODER, _SCORED = msgspec.json.Decoder(_Response), msgspec.json.Decoder(_Scored)
T = TypeVar("T")
Parse: TypeAlias = Callable[[bytes, str, float], T]
"""(answer, server, seconds that it took)."""


class NobodyServesError(DeadlineError):
    """No server served when the request's deadline passed: nothing is wrong with it. Who keeps the servers has a deadline for that."""


class _MovedError(Exception):
    """The server was taken out while the request was in flight: nobody's failure."""


class _Asked(NamedTuple):
    body: bytes
    n: int
    budget: int
    most_bytes: int
    scored: bool


@dataclass(slots=True)
class _Server:
    """``calls``: its requests in flight; ``inflight``: the completions that these ask for. ``left``: what is in flight is to move.
    ``failures``: how often it was spared since it last answered; ``spared_until``: when that ends. ``answers``, ``life``: see
    ``refusals.Server``."""

    serving: bool = True
    left: bool = False
    inflight: int = 0
    failures: int = 0
    spared_until: float = 0.0
    answers: bool = False
    life: int = field(default_factory=_LIVES.__next__)
    calls: set[asyncio.Task[tuple[int, bytes]]] = field(default_factory=set)


class VllmGenerator:
    """Samples from whichever serving server has the fewest completions in flight, of those that did not fail just now.
    ``async with VllmGenerator(...) as generator``.

    ``addresses`` as in ``http://127.0.0.1:8000``: those that serve from the start. Others come and go (``serve``, ``suspend``, ``forget``);
    with none serving a request waits for one. A request that fails because its server did is sent to others, at most ``max_attempts`` times
    in all, within the one deadline ``request_timeout_s``; so is one whose answer cannot be, and one that is refused (4xx), which does not
    go there again: where nobody else serves it waits for another server, unless those that refused it, for what it holds and when asked
    twice, are seen to answer other requests. ``on_failure(address, why)`` is called for each such failure. A deadline that passes is no
    such failure: the server may be well and busy. It only comes last for a while. One that has had a request for longer than
    ``patience_s`` and is far slower than another (``rollout/pace.py``) loses that request to it, once a request.
    """

    def __init__(
        self, addresses: Sequence[str] = (), request_timeout_s: float = 120.0, max_attempts: int = 3, patience_s: float = math.inf
    ) -> None:
        self._servers = {address: _Server() for address in addresses}
        self._timeout_s, self._patience_s, self._paces = request_timeout_s, patience_s, Paces()
        self._max_attempts = max_attempts
        self._session: aiohttp.ClientSession | None = None
        self._changed = asyncio.Event()
        self.on_failure: Callable[[str, str], None] = lambda *_: None

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
        if server.left:
            # It was started anew, or is another: what the earlier one answered or refused does not count.
            server.failures, server.spared_until, server.answers, server.life = 0, 0.0, False, next(_LIVES)
        server.serving, server.left = True, False
        self._changed.set()
        self._move()

    def suspend(self, address: str) -> None:
        """No new request goes there. Those in flight stay where they are."""
        self._servers.setdefault(address, _Server()).serving = False

    def move(self, address: str) -> None:
        """As ``suspend``, and what is in flight there begins again elsewhere, as soon as anybody else serves."""
        self.suspend(address)
        self._servers[address].left = True
        self._paces.forget(address)
        self._move()

    def _move(self) -> None:
        if any(server.serving for server in self._servers.values()):
            for call in [call for server in self._servers.values() if server.left for call in server.calls]:
                call.cancel()

    def forget(self, address: str) -> None:
        """The server is gone for good."""
        self.suspend(address)
        self._paces.forget(address)
        for call in self._servers.pop(address).calls:
            call.cancel()
        self._changed.set()

    def standing(self, address: str) -> AbstractContextManager[None]:
        """While the server switches its version: no time in which a request there would be made."""
        return self._paces.standing(address)

    def _serving(self) -> list[str]:
        return [address for address, server in self._servers.items() if server.serving]

    @property
    def num_inflight(self) -> int:
        """Completions that servers are making now."""
        return sum(server.inflight for server in self._servers.values())

    @property
    def inflight(self) -> dict[str, int]:
        """The same by server address."""
        return {address: server.inflight for address, server in self._servers.items()}

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``. Also raises ServerFailedError when every attempt failed, WireError when all servers refuse what the
        request holds; RefusedError, a WireError, when those that refuse it answer other requests and no other serves."""
        body = request_body(prompt_ids, params, n)

        def parsed(raw: bytes, server: str, seconds: float) -> tuple[Completion, ...]:
            found = parse_response(raw, n, server)
            self._paces.answered(server, seconds, max(len(completion.ids) for completion in found))
            return found

        return await self._asked(body, n, rollout_id, parsed, params.max_tokens)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], rollout_id: str) -> Completion:
        """See ``ports.Scorer``. Raises as ``sample`` does.

        All of it is one policy's: the engine computes a prompt whose log-probs are asked for anew, whatever its cache has, and begins again
        with a prompt that a switch of version interrupts; the version is that of the token which it samples in the same pass.
        """
        num_read = len(prompt_ids) + len(ids)

        def parsed(raw: bytes, server: str, seconds: float) -> Completion:
            found = parse_score(raw, ids, server)
            self._paces.answered(server, seconds, num_read, scored=True)
            return found

        return await self._asked(score_body(prompt_ids, ids), 1, rollout_id, parsed, num_read, scored=True)

    async def _asked(self, body: bytes, n: int, rollout_id: str, parse: Parse[T], budget: int, scored: bool = False) -> T:
        """What ``parse`` reads in the answer to a request for ``n`` completions of up to ``budget`` tokens, or to score so many."""
        tried: list[str] = []
        most = most_bytes(body, n * budget)
        failures: list[str] = []
        refusals = Refusals(rollout_id)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(failures) < self._max_attempts:
                    tried.append(await self._pick(tried, refusals))
                    began = time.monotonic()
                    try:
                        return await self._answer(tried[-1], _Asked(body, n, budget, most, scored), parse)
                    except SlowError as error:
                        budget = 0  # it leaves no other
                        if self._spare(tried[-1]):
                            logger.warning("%s: it comes last for a while", error)
                    except _MovedError:
                        continue
                    except (ServerFailedError, RefusalError) as error:
                        failures.append(str(error))
                        self._spare(tried[-1])
                        self.on_failure(tried[-1], str(error))
                        if isinstance(error, RefusalError):
                            refusals.add(error)
                            refusals.judge(self._servers.values())
        except TimeoutError as error:
            serving = self._serving()
            where = tried[-1] if tried and tried[-1] in serving else "a server that serves"
            if time.monotonic() - began > self._timeout_s / 2:  # else it had the little that others had left
                self._spare(where)
            idle = "" if serving else f"no requests go to {', '.join(self._servers) or 'anybody'}: see the servers' logs"
            hint = "; ".join(filter(None, [*failures, idle])) or "raise servers.request_timeout_s, or lower max_inflight_groups"
            kind = DeadlineError if serving else NobodyServesError
            raise kind(f"rollout {rollout_id} from {where}", self._timeout_s, hint) from error
        raise ServerFailedError(f"rollout {rollout_id}: {len(failures)} attempts failed: {'; '.join(failures)}")

    async def _pick(self, tried: Sequence[str], refusals: Refusals) -> str:
        """The least loaded server, those of this rollout's failed attempts last, before them those that failed others just now."""
        while not (serving := {address: server for address, server in self._servers.items() if refusals.may_ask(server)}):
            refusals.judge(self._servers.values())
            self._changed.clear()
            await self._changed.wait()
        now = time.monotonic()
        return min(serving, key=lambda address: (tried.count(address), now < serving[address].spared_until, serving[address].inflight))

    def _spare(self, address: str) -> bool:
        """What was in flight there fails soon after where one does: that is one failure. Whether it is the first."""
        server, now = self._servers.get(address), time.monotonic()
        if server is None:
            return False
        if now < server.spared_until:
            server.spared_until = max(server.spared_until, now + SPARED_S)
            return False
        server.spared_until = now + SPARED_S * 2 ** min(server.failures, MAX_DOUBLINGS)
        server.failures += 1
        return True

    async def _answer(self, address: str, asked: _Asked, parse: Parse[T]) -> T:
        """What an answer does to ``parse``, whatever it is, is that server's failure too: the others and the run go on."""
        began = time.monotonic()
        raw = await self._request(address, asked)
        try:
            found = parse(raw, address, time.monotonic() - began)
        except ServerFailedError:
            raise
        except (WireError, WeightError) as error:
            raise ServerFailedError(str(error)) from error
        except Exception as error:
            raise ServerFailedError(f"{address}: its answer cannot be read: {error!r:.300}") from error
        if server := self._servers.get(address):
            server.failures = 0
            if not server.answers:
                server.answers = True
                self._changed.set()
        return found

    async def _request(self, address: str, asked: _Asked) -> bytes:
        server = self._servers[address]
        life, call = server.life, asyncio.create_task(self._post(address, asked))
        server.calls.add(call)
        server.inflight += asked.n
        try:
            if asked.budget:
                await self._paces.watched(call, address, self._serving, asked.budget, self._patience_s, asked.scored)
            else:
                await asyncio.wait({call})
        finally:
            server.inflight -= asked.n
            server.calls.discard(call)
            call.cancel()
        if call.cancelled():
            raise _MovedError
        status, raw = call.result()
        if status >= 500:
            raise ServerFailedError(f"{address} answered {status}: {raw[:200]!r}")
        if status != 200:
            raise RefusalError(f"{address} refused the request with {status}: {raw[:500]!r}", life, status in OF_THE_REQUEST)
        return raw

    async def _post(self, address: str, asked: _Asked, again: bool = True) -> tuple[int, bytes]:
        """vLLM answers 400 also where its engine stumbles (any ValueError): only who says it twice of a request means it."""
        if self._session is None:
            raise WireError("use the generator as `async with VllmGenerator(...)`")
        try:
            async with self._session.post(address + ROUTE, data=asked.body, headers={"Content-Type": "application/json"}) as response:
                status, raw = response.status, await read_bounded(response, asked.most_bytes, ServerFailedError)
        except aiohttp.ClientError as error:
            raise ServerFailedError(f"{address}: {type(error).__name__}: {error}") from error
        return await self._post(address, asked, again=False) if again and status in OF_THE_REQUEST else (status, raw)


def parse_score(raw: bytes, ids: Sequence[int], server: str) -> Completion:
    """``ids`` as a completion, with the log-probs that the answer to ``score_body`` gives its last tokens. Raises as ``parse_response``."""
    (sampled,) = parse_response(raw, 1, server)
    try:
        last = _SCORED.decode(raw).prompt_logprobs[-len(ids) :]
    except msgspec.ValidationError as error:
        raise WireError(f"{server}: answer not as expected: {error}") from error
    logprobs = tuple([chances[i].logprob for i, chances in zip(ids, last, strict=False) if chances and i in chances])
    if len(logprobs) != len(ids):
        raise WireError(f"{server}: {len(logprobs)} log-probs that belong to the {len(ids)} tokens which it was to score")
    if not sampled.spans:
        raise WireError(f"{server}: scored {len(ids)} tokens and does not say by which version")
    _check_finite(logprobs, server, "scored")
    return Completion(tuple(ids), logprobs, (VersionSpan(sampled.spans[0].version, 0, len(ids)),), Finish.STOP)


def parse_response(raw: bytes, n: int, server: str) -> tuple[Completion, ...]:
    """The ``n`` completions, in order of their index. Raises WireError naming ``server`` and what is wrong with its answer, and
    ServerFailedError for what is no policy's."""
    try:
        choices = sorted(_DECODER.decode(raw).choices, key=lambda choice: choice.index)
    except msgspec.ValidationError as error:
        raise WireError(f"{server}: answer not as expected: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"{server}: answer of {len(raw)} bytes is not JSON: {error}") from error
    if [choice.index for choice in choices] != list(range(n)):
        raise WireError(f"{server}: {len(choices)} choices where {n} were asked for")
    if any(choice.finish_reason is Finish.ABORT for choice in choices):
        raise ServerFailedError(f"{server} aborted the request: it is being ended, or somebody else uses it")
    return tuple(_completion(choice, server) for choice in choices)


def _check_finite(logprobs: Sequence[float], server: str, what: str) -> None:
    if not all(map(math.isfinite, logprobs)) or _NAN_LOGPROB in logprobs:
        raise WireError(f"{server}: a {what} token with a log-prob that is not finite: the weights or the engine are broken")


def _completion(choice: _Choice, server: str) -> Completion:
    ids = tuple(choice.token_ids)
    logprobs = tuple([token.logprob for token in choice.logprobs.content])
    if [token.token_id for token in choice.logprobs.content] != choice.token_ids:
        raise WireError(f"{server}: {len(logprobs)} log-probs that do not belong to the {len(ids)} tokens")
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
        raise WireError(f"{server}: tokens {min(ids)}..{max(ids)}, which no vocabulary has")
    _check_finite(logprobs, server, "sampled")
    spans = tuple(VersionSpan(parse_version(span.version, server), span.start, span.end) for span in choice.weight_versions or ())
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != len(ids) or any(s.start >= s.end for s in spans):
        raise WireError(f"{server}: version spans {spans} do not cover {len(ids)} tokens")
    if any(span.version == NO_VERSION for span in spans):
        raise ServerFailedError(f"{server} generated with dummy weights: it was started again, and is not switched to a version yet")
    if any(a.version > b.version for a, b in itertools.pairwise(spans)):
        raise WireError(f"{server}: policy versions fall within one completion: {spans}")
    return Completion(ids, logprobs, spans, choice.finish_reason)
