"""What servers answered for a group that is not finished, as the body of a ``span`` record, and which request it was the answer to.

    head         rollout int32 (-1: all of the group), request uint64, ordinal, first, start, completions uint32;
                 uint8: whether the log-probs are wide, whether the ids are
    completions  tokens, spans uint32; finish uint8, its index in declaration order
    spans        version int64; start, end uint32
    ids          uint16, a token; wide: int32
    log-probs    float32, a token; wide: float64

Little-endian, as every machine of a run is, packed; the numbers of all completions stand one behind the other. A request is known by what
it asks for, not by when: who makes the group again asks the same, in whatever order its requests come.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from xxhash import xxh3_64

from neox_rl.errors import JournalError
from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

WHOLE: Final = -1
"""The rollout of a request for all rollouts of a group at once."""
_ASKED: Final = struct.Struct("<iQI")
_HEAD: Final = struct.Struct("<iQ4I2B")
_ROW: Final = struct.Struct("<2IB")
_SPAN: Final = struct.Struct("<q2I")
_FINISHES: Final = tuple(Finish)
_IDS: Final = ("H", "i")
_LOGPROBS: Final = ("f", "d")
"""Narrow, wide, as ``array`` has them."""


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
    words = f"{n}/{len(prompt_ids)}/{params.max_tokens}/{params.temperature}/{params.top_p}/{params.seed}"
    found = xxh3_64(words.encode())
    found.update(array("i", prompt_ids).tobytes())
    found.update(array("i", params.stop_token_ids).tobytes())
    return found.intdigest()


def body_of(answer: Answer) -> bytes:
    """Without numpy: most answers have a handful of tokens, and a search gets thousands of them."""
    chunks = answer.chunks
    ids = _narrowed(_IDS, [i for chunk in chunks for i in chunk.ids])
    logprobs = _narrowed(_LOGPROBS, [p for chunk in chunks for p in chunk.logprobs])
    wide = logprobs.typecode == _LOGPROBS[1], ids.typecode == _IDS[1]
    parts = [_HEAD.pack(*answer.asked, answer.first, answer.start, len(chunks), *wide)]
    parts += [_ROW.pack(len(chunk.ids), len(chunk.spans), _FINISHES.index(chunk.finish)) for chunk in chunks]
    parts += [_SPAN.pack(span.version, span.start, span.end) for chunk in chunks for span in chunk.spans]
    return b"".join((*parts, ids.tobytes(), logprobs.tobytes()))


def _narrowed(codes: tuple[str, str], values: list[Any]) -> array[Any]:
    """In the narrow type where that changes no value."""
    with suppress(OverflowError):
        found = array(codes[0], values)
        if found.tolist() == values:
            return found
    return array(codes[1], values)


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
        num_tokens = sum(row[0] for row in rows)
        ids, at = _read(body, at, num_tokens, _IDS[wide_ids])
        logprobs, at = _read(body, at, num_tokens, _LOGPROBS[wide_logprobs])
        finishes = [_FINISHES[row[2]] for row in rows]
    except (struct.error, ValueError, IndexError) as error:
        raise JournalError(f"an answer of {len(body)} bytes is not whole: {error}") from error
    if (left := len(body) - at) > 0:
        raise JournalError(f"an answer of {len(body)} bytes is not whole: {left} are left behind {num_tokens} tokens")
    chunks: list[Completion] = []
    token = span = 0
    for (tokens, num_spans, _), finish in zip(rows, finishes, strict=True):
        part = slice(token, token + tokens)
        chunks.append(Completion(tuple(ids[part]), tuple(logprobs[part]), tuple(spans[span : span + num_spans]), finish))
        token, span = token + tokens, span + num_spans
    return Answer(asked, first, start, tuple(chunks))


def _read(body: bytes | memoryview, at: int, count: int, code: str) -> tuple[list[Any], int]:
    """Raises ValueError where ``body`` has fewer."""
    found = array(code)
    end = at + count * found.itemsize
    if end > len(body):
        raise ValueError(f"it ends before its {count} tokens")
    found.frombytes(body[at:end])
    return found.tolist(), end
