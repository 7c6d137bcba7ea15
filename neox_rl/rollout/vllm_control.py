"""Driving one vLLM server: which weights it serves, and the switch to a staged version.

    start -> sleep (level 0, keep) -> update, reset the KV of requests in flight -> finish (label) -> wake up

Requests in flight stay: their KV is computed again under the new weights, and the engine's version spans say which policy made which token.
The engine labels a step's tokens in that step, and answers ``sleep`` when no step is under way: no token gets the label of other weights.
vLLM's ``pause`` does the same and then sleeps for 20 ms, in which the API server hands on outputs: here requests get them a moment later.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from neox_rl.bounded import ANY_BYTES, read_bounded
from neox_rl.errors import DeadlineError, WeightError
from neox_rl.types import NO_VERSION

_VERSION = re.compile(r"[0-9]{1,15}")
UNLABELED = "default"
"""vLLM's label for weights that nobody published: dummy ones, here."""


class ServerGoneError(WeightError):
    """Nobody listens at the server's address, or the connection broke."""


@dataclass(frozen=True, slots=True)
class SwitchTimes:
    """Seconds before the pause, in which the server still generated; in which it generated nothing; of these, those of the load."""

    lead_s: float
    pause_s: float
    load_s: float


class VllmControl:
    """``async with VllmControl(address) as control``. Every call has a deadline and names the server when it passes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._session = aiohttp.ClientSession(address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def healthy(self, deadline_s: float = 5.0) -> bool:
        """Whether the health route answers 200 in time. Never raises."""
        try:
            await self._call("GET", "/health", deadline_s)
        except (WeightError, DeadlineError):
            return False
        return True

    async def probe(self, deadline_s: float) -> int:
        """The version that a healthy server attests, as in ``live_version``. Raises ServerGoneError, WeightError or DeadlineError."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._call("GET", "/health", deadline_s)
                return await self.live_version(deadline_s)
        except TimeoutError as error:
            raise DeadlineError(f"{self.address} to say that it is well", deadline_s, "see the server's log") from error

    async def live_version(self, deadline_s: float = 10.0) -> int:
        """The policy version that the server attests; NO_VERSION while it has only dummy weights."""
        label = (await self._call("GET", "/weight_info", deadline_s)).get("weight_version")
        return parse_version(label, self.address)

    async def init_weights(self, publisher_address: str, server: str, deadline_s: float = 30.0) -> None:
        """Has every rank of the server stage from this publisher, in the background, and ack as ``<server>/<rank>``."""
        info = {"address": publisher_address, "server": server}
        await self._call("POST", "/init_weight_transfer_engine", deadline_s, json={"init_info": info})

    async def switch(self, version: int, deadline_s: float) -> SwitchTimes:
        """Makes the staged ``version`` live; requests in flight go on with it.

        Raises WeightError or DeadlineError when it fails. The server is lost then: it stays paused, because its ranks may hold a mixture of
        two policies, and must be stopped.
        """
        called = time.perf_counter()
        end = called + deadline_s

        def left() -> float:
            return max(0.001, end - time.perf_counter())

        await self._call("POST", "/start_weight_update", left())
        begin = time.perf_counter()
        await self._call("POST", "/sleep", left(), params={"level": "0", "mode": "keep"})
        asleep = time.perf_counter()
        info = {"version": version, "deadline_s": 0.5 * left()}
        answers = await asyncio.gather(
            self._call("POST", "/reset_prefix_cache", left(), params={"reset_running_requests": "true"}),
            self._call("POST", "/update_weights", left(), json={"update_info": info}),
        )
        if answers[0].get("success") is not True:
            raise WeightError(f"{self.address} still holds keys and values of the old weights; the server's log has the cause")
        await self._call("POST", "/finish_weight_update", left(), json={"weight_version": str(version)})
        loaded = time.perf_counter()
        await self._call("POST", "/wake_up", left(), params={"tags": "scheduling"})
        return SwitchTimes(begin - called, time.perf_counter() - begin, loaded - asleep)

    async def _call(self, method: str, route: str, deadline_s: float, **request: Any) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._session.request(method, route, timeout=timeout, **request) as response:
                raw = await read_bounded(response, ANY_BYTES, WeightError)
                if response.status != 200:
                    text = raw[:500].decode(errors="replace")
                    raise WeightError(f"{self.address}{route} answered {response.status}: {text}; the server's log has the cause")
                return dict(json.loads(raw)) if response.content_type == "application/json" else {}
        except TimeoutError as error:
            raise DeadlineError(f"{self.address}{route}", deadline_s, "see the server's log") from error
        except (ValueError, TypeError) as error:
            raise WeightError(f"{self.address}{route} answered what is no JSON object: {error}: is it a server of this run?") from error
        except aiohttp.ClientError as error:
            raise ServerGoneError(f"{self.address}{route}: {type(error).__name__}: {error}: the server is gone") from error


def parse_version(label: object, server: str) -> int:
    """vLLM's weight label as a policy version; NO_VERSION for dummy weights. Raises WeightError for a label this project did not set."""
    if label == UNLABELED:
        return NO_VERSION
    if isinstance(label, str) and _VERSION.fullmatch(label):
        return int(label)
    raise WeightError(f"{server} serves weights labeled {str(label)[:40]!r}, not a policy version: somebody else updates this server")
