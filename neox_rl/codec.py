"""Groups as one framed message, and back, exactly: for the experience socket and for recorded batches.

Every field is concatenated over the batch into one flat array, so that the cost is a few arrays however many traces there are::

    header meta   {"meta": the caller's, "problem_ids": [a group], "trace_ids", "trace_problem_ids", "extracted": [a trace]}
    a group       ticket int64, num_traces int64
    a trace       num_segments int64, reward float64, finish uint8, correct uint8, reason uint8, ms float64
    a segment     num_ids int64, role uint8, version int64, mask float64, episode int64
    a token       ids int32;  logprobs float64, only of segments that a policy sampled (version != NO_VERSION)

Enums travel as their index in declaration order. Log-probs are float64 so that a recorded batch replays bit for bit.

One group as one run of bytes (a batch on the socket holds one a group, the journal one a record, so that it is encoded once):
number of frames uint32, their sizes uint32 each, then the frames, each at a multiple of 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from neox_rl.errors import WireError
from neox_rl.framing import Array, Frame, pack, unpack
from neox_rl.types import NO_VERSION, Finish, Group, Json, Reason, Role, Segment, Trace, Verdict

KIND = "groups"
_ROLES, _FINISHES, _REASONS = tuple(Role), tuple(Finish), tuple(Reason)
_INT32_MAX = 2**31 - 1
_ALIGN, _MAX_FRAMES = 8, 64

# name -> (dtype, smallest, largest value); floats must be finite besides.
_GROUP = {"ticket": ("int64", 0, None), "num_traces": ("int64", 0, None)}
_TRACE = {
    "num_segments": ("int64", 0, None),
    "reward": ("float64", None, None),
    "finish": ("uint8", 0, len(_FINISHES) - 1),
    "correct": ("uint8", 0, 1),
    "reason": ("uint8", 0, len(_REASONS) - 1),
    "ms": ("float64", 0, None),
}
_SEGMENT = {
    "num_ids": ("int64", 0, None),
    "role": ("uint8", 0, len(_ROLES) - 1),
    "version": ("int64", NO_VERSION, None),
    "mask": ("float64", 0, 1),
    "episode": ("int64", 0, _INT32_MAX),
}
_TOKEN = {"ids": ("int32", 0, _INT32_MAX), "logprobs": ("float64", None, None)}
_HEADER = {"meta", "problem_ids", "trace_ids", "trace_problem_ids", "extracted"}
_ARRAYS: dict[str, tuple[str, int | None, int | None]] = {**_GROUP, **_TRACE, **_SEGMENT, **_TOKEN}

_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)


def encode_groups(groups: Sequence[Group], meta: Mapping[str, Json] | None = None, kind: str = KIND) -> list[Frame]:
    """The frames of ``groups`` and the caller's own ``meta``. Raises WireError for a value that ``decode_groups`` would refuse."""
    traces = [t for g in groups for t in g.traces]
    segments = [s for t in traces for s in t.segments]
    for segment in segments:
        if len(segment.logprobs) != (0 if segment.version == NO_VERSION else len(segment.ids)):
            raise WireError(
                f"{kind}: segment of {len(segment.ids)} tokens at version {segment.version} has {len(segment.logprobs)} log-probs; "
                f"sampled tokens have one each, others none"
            )
    columns: dict[str, Iterable[Any]] = {
        "ticket": [g.ticket for g in groups],
        "num_traces": [len(g.traces) for g in groups],
        "num_segments": [len(t.segments) for t in traces],
        "reward": [t.reward for t in traces],
        "finish": [_FINISHES.index(t.finish) for t in traces],
        "correct": [t.verdict.correct for t in traces],
        "reason": [_REASONS.index(t.verdict.reason) for t in traces],
        "ms": [t.verdict.ms for t in traces],
        "num_ids": [len(s.ids) for s in segments],
        "role": [_ROLES.index(s.role) for s in segments],
        "version": [s.version for s in segments],
        "mask": [s.mask for s in segments],
        "episode": [s.episode for s in segments],
        "ids": chain.from_iterable(s.ids for s in segments),
        "logprobs": chain.from_iterable(s.logprobs for s in segments),
    }
    try:
        arrays: dict[str, Array] = {name: np.fromiter(values, dtype=_ARRAYS[name][0]) for name, values in columns.items()}
    except (OverflowError, TypeError, ValueError) as error:
        raise WireError(f"{kind}: a value does not fit its array: {error}") from error
    _check_arrays(kind, arrays)
    header: dict[str, Json] = {
        "meta": dict(meta or {}),
        "problem_ids": [g.problem_id for g in groups],
        "trace_ids": [t.id for t in traces],
        "trace_problem_ids": [t.problem_id for t in traces],
        "extracted": [t.verdict.extracted for t in traces],
    }
    try:
        return pack(kind, header, arrays)
    except (TypeError, ValueError) as error:
        raise WireError(f"{kind}: meta cannot be written as JSON: {error}") from error


def decode_groups(frames: Sequence[Frame], kind: str = KIND) -> tuple[tuple[Group, ...], dict[str, Json]]:
    """``(groups, meta)`` of a message made by ``encode_groups``. Raises WireError for anything else, before any of it is used."""
    header, arrays = unpack(frames, kind)
    _check_arrays(kind, arrays)
    meta = header.get("meta")
    if not isinstance(meta, dict) or header.keys() != _HEADER:
        raise WireError(f"{kind}: header fields {str(sorted(header))[:200]} are not {sorted(_HEADER)}")
    segments = _segments(kind, arrays)
    traces = _traces(kind, header, arrays, segments)
    per_group = _split(kind, "num_traces", arrays["num_traces"], traces)
    problem_ids = _strings(kind, header, "problem_ids", len(per_group))
    if arrays["ticket"].size != len(per_group):
        raise WireError(f"{kind}: {arrays['ticket'].size} tickets for {len(per_group)} groups")
    rows = zip(arrays["ticket"].tolist(), problem_ids, per_group, strict=True)
    return tuple(Group(ticket, problem_id, members) for ticket, problem_id, members in rows), meta


def encode_group(group: Group) -> bytes:
    """One group as bytes. Raises WireError like ``encode_groups``."""
    frames = encode_groups((group,))
    at = -(-(4 + 4 * len(frames)) // _ALIGN) * _ALIGN
    parts: list[Frame] = [struct.pack(f"<{1 + len(frames)}I", len(frames), *map(len, frames)).ljust(at, b"\0")]
    for frame in frames:
        parts += (frame, b"\0" * (-len(frame) % _ALIGN))
    return b"".join(parts)


def decode_group(data: Frame) -> Group:
    """The group of ``encode_group``. Raises WireError for anything else."""
    view = memoryview(data)
    if view.ndim != 1 or view.format != "B" or view.nbytes < 4:
        raise WireError(f"a group of {view.nbytes} bytes in {view.ndim} dimensions is none")
    count = int.from_bytes(view[:4], "little")
    if not 1 <= count <= _MAX_FRAMES or len(view) < 4 + 4 * count:
        raise WireError(f"a group of {len(view)} bytes says that it has {count} frames")
    at = -(-(4 + 4 * count) // _ALIGN) * _ALIGN
    frames: list[Frame] = []
    padding = [view[4 + 4 * count : at]]
    for size in struct.unpack_from(f"<{count}I", view, 4):
        frames.append(view[at : at + size])
        at += size + -size % _ALIGN
        padding.append(view[at - -size % _ALIGN : at])
    if at != len(view) or any(map(any, padding)):
        raise WireError(f"a group of {len(view)} bytes has frames of {at}, or something between them")
    groups, _ = decode_groups(frames)
    if len(groups) != 1:
        raise WireError(f"{len(groups)} groups where one was expected")
    return groups[0]


def _traces(kind: str, header: Mapping[str, Json], arrays: Mapping[str, Array], segments: list[Segment]) -> list[Trace]:
    per_trace = _split(kind, "num_segments", arrays["num_segments"], segments)
    count = _same_length(kind, arrays, _TRACE)
    ids, problem_ids, extracted = (_strings(kind, header, name, count) for name in ("trace_ids", "trace_problem_ids", "extracted"))
    verdicts = [
        Verdict(bool(correct), text, reason, ms)
        for correct, text, reason, ms in zip(
            arrays["correct"].tolist(), extracted, _enums(arrays["reason"], _REASONS), arrays["ms"].tolist(), strict=True
        )
    ]
    finishes = _enums(arrays["finish"], _FINISHES)
    rows = zip(ids, problem_ids, per_trace, arrays["reward"].tolist(), finishes, verdicts, strict=True)
    return [Trace(*row) for row in rows]


def _segments(kind: str, arrays: Mapping[str, Array]) -> list[Segment]:
    _same_length(kind, arrays, _SEGMENT)
    versions = arrays["version"]
    ids = _split(kind, "num_ids", arrays["num_ids"], arrays["ids"].tolist())
    logprobs = _split(kind, "log-probs", np.where(versions == NO_VERSION, 0, arrays["num_ids"]), arrays["logprobs"].tolist())
    roles = _enums(arrays["role"], _ROLES)
    rows = zip(ids, roles, logprobs, versions.tolist(), arrays["mask"].tolist(), arrays["episode"].tolist(), strict=True)
    return [Segment(*row) for row in rows]


def _check_arrays(kind: str, arrays: Mapping[str, Array]) -> None:
    """Every array, and no other, one-dimensional, of its dtype, finite and in its range."""
    if arrays.keys() != _ARRAYS.keys():
        raise WireError(f"{kind}: arrays {sorted(arrays.keys() ^ _ARRAYS.keys())} are missing or unknown")
    for name, (dtype, low, high) in _ARRAYS.items():
        array = arrays[name]
        if array.dtype.name != dtype or array.ndim != 1:
            raise WireError(f"{kind}: array {name!r} is {array.dtype.name}{list(array.shape)}, not a flat {dtype}")
        if array.size == 0:
            continue
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError(f"{kind}: array {name!r} holds a value that is not finite")
        if (low is not None and array.min() < low) or (high is not None and array.max() > high):
            raise WireError(f"{kind}: array {name!r} spans {array.min()}..{array.max()}, allowed is {low}..{high}")


def _split(kind: str, name: str, counts: Array, items: list[_T]) -> list[tuple[_T, ...]]:
    """``items`` cut into runs of ``counts``, which must use up all of them."""
    # A count above the number of items is refused first, so that the running sum cannot wrap around.
    if counts.size and int(counts.max()) > len(items):
        raise WireError(f"{kind}: {name} has a run of {int(counts.max())}, there are {len(items)} items")
    ends = np.cumsum(counts).tolist()
    if (ends[-1] if ends else 0) != len(items):
        raise WireError(f"{kind}: {name} adds up to {ends[-1] if ends else 0}, there are {len(items)} items")
    return [tuple(items[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=False)]


def _same_length(kind: str, arrays: Mapping[str, Array], names: Iterable[str]) -> int:
    sizes = {name: arrays[name].size for name in names}
    if len(set(sizes.values())) != 1:
        raise WireError(f"{kind}: arrays of one table differ in length: {sizes}")
    return next(iter(sizes.values()))


def _enums(array: Array, members: tuple[_E, ...]) -> list[_E]:
    return [members[index] for index in array.tolist()]


def _strings(kind: str, header: Mapping[str, Json], name: str, count: int) -> list[str]:
    values = header.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise WireError(f"{kind}: header field {name!r} is not a list of {count} strings")
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) != count:
        raise WireError(f"{kind}: header field {name!r} holds something other than strings")
    return strings
