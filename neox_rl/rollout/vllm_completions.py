"""``ports.Generator`` over the OpenAI completions route: for servers that serve weights of their own, of which no version is known.

Servers of a run are asked through ``vllm_client``, whose route attests which policy version made each token; here ``spans`` is empty.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any, Self

import aiohttp
import msgspec

from neox_rl.bounded import most_bytes, read_bounded
from neox_rl.errors import DeadlineError, ServerFailedError, WireError
from neox_rl.rollout.vllm_requests import sampling_keys
from neox_rl.types import Completion, Finish, SamplingParams

ROUTE = "/v1/completions"
TOP = 20
"""Log-probs a token that a vLLM server gives at most, unless it is told otherwise."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: Finish


class _Response(msgspec.Struct):
    choices: list[_Choice]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: list[_Card]


class _TopLogprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _TopChoice(msgspec.Struct):
    index: int
    logprobs: _TopLogprobs


class _Tops(msgspec.Struct):
    choices: list[_TopChoice]


_TOPS = msgspec.json.Decoder(_Tops)
_RESPONSE, _MODELS = msgspec.json.Decoder(_Response), msgspec.json.Decoder(_Models)


class CompletionsGenerator:
    """``async with CompletionsGenerator(address) as generator``. ``model`` and ``max_model_len``, once entered, are the server's.

    Entering raises ServerFailedError or DeadlineError when the server does not answer, WireError when it is no vLLM server.
    """

    def __init__(self, address: str, request_timeout_s: float = 120.0) -> None:
        self.address, self._timeout_s = address.rstrip("/"), request_timeout_s
        self.model, self.max_model_len = "", 0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))
        try:
            raw = await self._call("GET", "/v1/models", None, "its models", 0)
            cards = msgspec.json.decode(raw, type=_Models).data
            self.model, self.max_model_len = cards[0].id, cards[0].max_model_len
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
            await self._session.close()
            raise WireError(f"{self.address}/v1/models names no model with a max_model_len ({error}): is this a vLLM server?") from error
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``. Also raises ServerFailedError when the server fails, WireError for an answer that cannot be."""
        body = {"model": self.model, "prompt": list(prompt_ids), "return_token_ids": True, **sampling_keys(params, n)}
        raw = await self._call("POST", ROUTE, body, f"rollout {rollout_id}", n * params.max_tokens)
        try:
            choices = sorted(_RESPONSE.decode(raw).choices, key=lambda choice: choice.index)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WireError(f"{self.address}: answer not as expected: {error}") from error
        if len(choices) != n:
            raise WireError(f"{self.address}: {len(choices)} choices where {n} were asked for")
        return tuple(self._completion(choice) for choice in choices)

    async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> list[tuple[float, ...]]:
        """For each prompt the log-probs of the tokens ``ids`` as the next one; -inf for one that is not among the TOP likeliest.

        One request, of which each prompt's answer is one token. Raises as ``sample`` does.
        """
        body = {
            "model": self.model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": TOP,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        raw = await self._call("POST", ROUTE, body, f"the next tokens of {len(prompts)} prompts", (TOP + 1) * len(prompts))
        try:
            choices = sorted(_TOPS.decode(raw).choices, key=lambda choice: choice.index)
            found = [choice.logprobs.top_logprobs[0] for choice in choices]
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
            raise WireError(f"{self.address}: answer not as expected: {error}") from error
        if len(found) != len(prompts):
            raise WireError(f"{self.address}: {len(found)} choices for {len(prompts)} prompts")
        return [tuple(tops.get(f"token_id:{i}", -math.inf) for i in ids) for tops in found]

    def _completion(self, choice: _Choice) -> Completion:
        logprobs = tuple([p for p in choice.logprobs.token_logprobs if p is not None and math.isfinite(p)])
        if len(logprobs) != len(choice.token_ids):
            raise WireError(f"{self.address}: {len(logprobs)} finite log-probs for {len(choice.token_ids)} tokens")
        return Completion(tuple(choice.token_ids), logprobs, (), choice.finish_reason)

    async def _call(self, method: str, route: str, body: dict[str, Any] | None, what: str, num_tokens: int) -> bytes:
        if self._session is None:
            raise WireError("use the generator as `async with CompletionsGenerator(...)`")
        data = b"" if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._session.request(
                    method, self.address + route, data=data or None, headers={"Content-Type": "application/json"}
                ) as response:
                    raw = await read_bounded(response, most_bytes(data, num_tokens), ServerFailedError)
        except TimeoutError as error:
            raise DeadlineError(f"{what} from {self.address}{route}", self._timeout_s) from error
        except aiohttp.ClientError as error:
            raise ServerFailedError(f"{self.address}: {str(error) or type(error).__name__}") from error
        if response.status >= 500:
            raise ServerFailedError(f"{self.address} answered {response.status}: {raw[:200]!r}")
        if response.status != 200:
            raise WireError(f"{self.address} refused {route} with {response.status}: {raw[:500]!r}")
        return raw
