"""Answers of servers, read no further than what was asked can take: one that is broken, or hostile, fills nobody's memory."""

from __future__ import annotations

import aiohttp

from neox_rl.errors import NeoxRLError

ANY_BYTES = 1 << 20
"""Of an answer without tokens: a version, an error, the names of models."""
TOKEN_BYTES = 512
"""Of a token with its log-prob, rank and version, as JSON: three times what vLLM writes."""


def most_bytes(request: bytes, num_tokens: int) -> int:
    """Of the answer to a request for so many tokens. It may have those of the prompt again, of which a request has no more than bytes."""
    return ANY_BYTES + TOKEN_BYTES * (len(request) + num_tokens)


async def read_bounded(response: aiohttp.ClientResponse, most: int, failure: type[NeoxRLError]) -> bytes:
    """The body. Raises ``failure`` as soon as there is more than ``most`` bytes of it."""
    found = bytearray()
    async for part in response.content.iter_any():
        found += part
        if len(found) > most:
            response.close()
            raise failure(f"{response.url} answered with more than {most} bytes, which nothing that it was asked takes")
    return bytes(found)
