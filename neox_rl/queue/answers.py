"""What servers answered for a group that is not finished, as the body of a ``span`` record, and which request it was the answer to.

    head         rollout int32 (-1: all of the group), request uint64, ordinal, first, start, completions uint32;
                 uint8: whether the log-probs are wide, whether the ids are
    completions  tokens, spans uint32; finish uint8, its index in declaration order
    spans        version int64; start, end uint32
    ids          uint16, a token; wide: int32
    log-probs    float32, a token; wide: float64

Little-endian, packed; the numbers of all completions stand one behind the other. A request is known by what it asks for, not by when: who
makes the group again asks the same, in whatever order its requests come.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
from xxhash import xxh3_64

from neox_rl.codec import IDS, LOGPROBS, narrowed
from neox_rl.errors import JournalError
from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

WHOLE: Final = -1
"""The rollout of a request for all rollouts of a group at once."""
_ASKED: Final = struct.Struct("<iQI")
_HEAD: Final = struct.Struct("<iQ4I2B")
_ROW: Final = struct.Struct("<2IB")
_SPAN: Final = struct.Struct("<q2I")
_FINISHES: Final = tuple(Finish)


class Asked(NamedTuple):
    """One request of a ticket: of which rollout, the digest of what it asks for, and its number among equal ones."""

    rollout: int
    request: int
    ordinal: int


class Answer(NamedTuple):
    """``chunks``: of the request's completions from number ``first`` on, behind the first ``start`` tokens of each."""

    asked: Asked
    first: int
    start: int
    chunks: tuple[Completion, ...]


def request_of(prompt_ids: Sequence[int], params: SamplingParams, n: int) -> int:
    """The digest of a request for ``n`` completions."""
    found = xxh3_64(f"{n}/{len(prompt_ids)}/{replace(params, stop_token_ids=())}".encode())
    found.update(array("i", prompt_ids).tobytes() + array("i", params.stop_token_ids).tobytes())
    return found.intdigest()


def body_of(answer: Answer) -> bytes:
    chunks = answer.chunks
    ids = narrowed(np.fromiter(chain.from_iterable(chunk.ids for chunk in chunks), IDS[1]))
    logprobs = narrowed(np.fromiter(chain.from_iterable(chunk.logprobs for chunk in chunks), LOGPROBS[1]))
    wide = logprobs.dtype == LOGPROBS[1], ids.dtype == IDS[1]
    return b"".join(
        (
            _HEAD.pack(*answer.asked, answer.first, answer.start, len(chunks), *wide),
            *(_ROW.pack(len(chunk.ids), len(chunk.spans), _FINISHES.index(chunk.finish)) for chunk in chunks),
            *(_SPAN.pack(span.version, span.start, span.end) for chunk in chunks for span in chunk.spans),
            ids.tobytes(),
            logprobs.tobytes(),
        )
    )


def asked_of(body: bytes | memoryview) -> Asked:
    """Raises JournalError where the body is none."""
    if len(body) < _HEAD.size:
        raise JournalError(f"an answer of {len(body)} bytes: its head alone has {_HEAD.size}")
    return Asked(*_ASKED.unpack_from(body))


def answer_of(body: bytes | memoryview) -> Answer:
    """Raises JournalError where the body is none."""
    asked = asked_of(body)
    *_, first, start, count, wide_logprobs, wide_ids = _HEAD.unpack_from(body)
    try:
        rows = [_ROW.unpack_from(body, _HEAD.size + i * _ROW.size) for i in range(min(count, len(body)))]
        at = _HEAD.size + count * _ROW.size
        spans = [VersionSpan(*_SPAN.unpack_from(body, at + i * _SPAN.size)) for i in range(min(sum(row[1] for row in rows), len(body)))]
        at += len(spans) * _SPAN.size
        num_tokens, of_ids, of_logprobs = sum(row[0] for row in rows), IDS[wide_ids], LOGPROBS[wide_logprobs]
        ids = np.frombuffer(body, of_ids, num_tokens, at).tolist()
        at += num_tokens * of_ids.itemsize
        logprobs = np.frombuffer(body, of_logprobs, num_tokens, at).tolist()
        finishes = [_FINISHES[row[2]] for row in rows]
    except (struct.error, ValueError, IndexError) as error:
        raise JournalError(f"an answer of {len(body)} bytes is not whole: {error}") from error
    if (left := len(body) - at - num_tokens * of_logprobs.itemsize) > 0:
        raise JournalError(f"an answer of {len(body)} bytes is not whole: {left} are left behind {num_tokens} tokens")
    chunks: list[Completion] = []
    token = span = 0
    for (tokens, num_spans, _), finish in zip(rows, finishes, strict=True):
        part = slice(token, token + tokens)
        chunks.append(Completion(tuple(ids[part]), tuple(logprobs[part]), tuple(spans[span : span + num_spans]), finish))
        token, span = token + tokens, span + num_spans
    return Answer(asked, first, start, tuple(chunks))
