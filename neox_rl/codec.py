"""Groups as bytes, and back, exactly: for the experience socket, the journal and recorded batches.

A group is encoded once, when it is finished, as one run of bytes; from then on these bytes travel::

    head        ticket uint64; unshown uint64; uint32: characters of problem_id, log-probs, traces, segments, ids, bytes of text;
                uint8: whether the log-probs are wide, whether the ids are
    log-probs   float32, a token, only of segments that a policy sampled in this context (``sampled``); wide: float64
    traces      rows of ``_TRACE``: how many segments and characters are its own, reward, finish, verdict
    segments    rows of ``_SEGMENT``
    ids         uint16, a token; wide: int32
    text        UTF-8 of problem_id, then id, problem_id and extracted of each trace, without anything between

Little-endian, packed; enums are their index in declaration order. A group is wide only where the narrow type would change one of its
numbers, so that a recorded batch replays bit for bit: log-probs of engines are float32 values, and most bytes are those and the ids. There
is one way to write a group. A batch is its groups, one behind the other: it is checked as one, so that it costs a few arrays however many
groups there are. The bytes have no digest of their own: whoever sends or keeps them has one over them (``framing``, ``records``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

import numpy as np

from neox_rl.errors import WireError
from neox_rl.framing import Array, Frame, pack, unpack
from neox_rl.types import NO_VERSION, Finish, Group, Json, Reason, Role, Segment, Trace, Verdict

KIND: Final = "groups"
ARRAY: Final = "groups"
"""The one array of a message with groups."""
_ROLES, _FINISHES, _REASONS, _BOOLS = tuple(Role), tuple(Finish), tuple(Reason), (False, True)
_INT32_MAX, _FLOAT_MAX = 2**31 - 1, float(np.finfo(np.float64).max)
_HEAD: Final = struct.Struct("<2Q6I2B")
_MAX_TICKET = 1 << 63
Column = tuple[memoryview, np.dtype[Any]]
"""The bytes of one group's part, and their type."""
_TRACE: Final = np.dtype(
    [
        *(("reward", "<f8"), ("ms", "<f8"), ("num_segments", "<u4")),
        *(("id", "<u4"), ("problem_id", "<u4"), ("extracted", "<u4")),
        *(("finish", "u1"), ("correct", "u1"), ("reason", "u1")),
    ]
)
_SEGMENT: Final = np.dtype(
    [
        *(("version", "<i8"), ("mask", "<f8"), ("advantage", "<f8")),
        *(("num_ids", "<u4"), ("episode", "<i4")),
        *(("role", "u1"), ("credited", "u1"), ("sampled", "u1")),
    ]
)
"""``credited``: it has an advantage of its own; without one that field is 0. ``sampled``: it has log-probs."""
LOGPROBS: Final = (np.dtype("<f4"), np.dtype("<f8"))
IDS: Final = (np.dtype("<u2"), np.dtype("<i4"))
"""Narrow, wide."""
_TRACE_RANGES: Final = {"reward": (-_FLOAT_MAX, _FLOAT_MAX), "ms": (0, _FLOAT_MAX)}
_SEGMENT_RANGES: Final = {
    "version": (NO_VERSION, 2**63 - 1),
    "mask": (0, 1),
    "advantage": (-_FLOAT_MAX, _FLOAT_MAX),
    "episode": (0, _INT32_MAX),
}


def encode_group(group: Group) -> bytes:
    """Raises WireError for a value that ``decode_group`` would refuse."""
    segments = [segment for trace in group.traces for segment in trace.segments]
    for segment in segments:
        if len(segment.logprobs) not in ((0,) if segment.version == NO_VERSION else (0, len(segment.ids))):
            raise WireError(
                f"segment of {len(segment.ids)} tokens at version {segment.version} has {len(segment.logprobs)} log-probs; "
                f"tokens of a policy have one each, or none has one, and others have none"
            )
    try:
        logprobs = narrowed(np.fromiter(chain.from_iterable(s.logprobs for s in segments), LOGPROBS[1]))
        ids = narrowed(np.fromiter(chain.from_iterable(s.ids for s in segments), IDS[1]))
        traces = np.array([_trace_row(trace) for trace in group.traces], _TRACE)
        parts = [logprobs, traces, np.array([_segment_row(segment) for segment in segments], _SEGMENT), ids]
        _check(*parts)
        texts = (text for t in group.traces for text in (t.id, t.problem_id, t.verdict.extracted))
        text = "".join((group.problem_id, *texts)).encode()
        wide = (logprobs.dtype == LOGPROBS[1], ids.dtype == IDS[1])
        head = _HEAD.pack(group.ticket, group.unshown, len(group.problem_id), *map(len, parts), len(text), *wide)
    except (OverflowError, TypeError, ValueError, struct.error) as error:
        raise WireError(f"a value of the group of ticket {group.ticket} does not fit its place: {error}") from error
    if max(group.ticket, group.unshown) >= _MAX_TICKET:
        raise WireError(f"ticket {group.ticket} or its {group.unshown} other tokens are beyond {_MAX_TICKET}")
    return b"".join((head, *(part.tobytes() for part in parts), text))


def decode_group(data: Frame) -> Group:
    """The group of ``encode_group``. Raises WireError for anything else."""
    groups = decode_batch(data)
    if len(groups) != 1:
        raise WireError(f"{len(groups)} groups where one was expected")
    return groups[0]


def decode_batch(data: Frame) -> tuple[Group, ...]:
    """Any number of groups, one behind the other. Raises WireError for anything else, before any of it is used."""
    view, at = memoryview(data), 0
    heads: list[Sequence[int]] = []
    texts: list[str] = []
    parts: tuple[list[Column], ...] = ([], [], [], [])
    while at < len(view):
        if at + _HEAD.size > len(view):
            raise WireError(f"a batch of {len(view)} bytes ends in the head of group {len(heads)}")
        head = _HEAD.unpack_from(view, at)
        at += _HEAD.size
        if max(head[8:]) > 1:
            raise WireError(f"group {len(heads)} of ticket {head[0]} is {head[8:]} wide: each must be 0 or 1")
        dtypes = (LOGPROBS[head[8]], _TRACE, _SEGMENT, IDS[head[9]])
        sizes = [count * dtype.itemsize for count, dtype in zip(head[3:7], dtypes, strict=True)]
        if (end := at + sum(sizes) + head[7]) > len(view) or max(head[:2]) >= _MAX_TICKET:
            raise WireError(f"group {len(heads)} of ticket {head[0]} ends at byte {end} of {len(view)}")
        for size, dtype, part in zip(sizes, dtypes, parts, strict=True):
            part.append((view[at : at + size], dtype))
            at += size
        try:
            texts.append(str(view[at:end], "utf-8"))
        except UnicodeDecodeError as error:
            raise WireError(f"the text of group {len(heads)} is not UTF-8: {error}") from error
        heads.append(head)
        at = end
    if not heads:
        return ()
    columns = [_column(part) for part in parts]
    _check(*columns)
    for (ticket, *_, wide_logprobs, wide_ids), logprobs, ids in zip(heads, parts[0], parts[3], strict=True):
        if (wide_logprobs and not _is_wide(logprobs)) or (wide_ids and not _is_wide(ids)):
            raise WireError(f"the group of ticket {ticket} is written wider than its numbers are")
    cutter = _Cutter(*columns)
    try:
        return tuple(cutter.group(head, text) for head, text in zip(heads, texts, strict=True))
    except IndexError as error:
        raise WireError("a role, a finish, a verdict or its reason is none of those that there are") from error


def narrowed(array: Array) -> Array:
    """Log-probs (float64) or ids (int32) in their narrow type, where that changes no value; else as they are."""
    narrow, wide = IDS if array.dtype == IDS[1] else LOGPROBS
    with np.errstate(over="ignore"):
        found = array.astype(narrow)
    return found if (found == array).all() else array.astype(wide, copy=False)


def _is_wide(column: Column) -> bool:
    """Whether the narrow type would not do."""
    view, dtype = column
    return bool(narrowed(np.frombuffer(view, dtype)).dtype == dtype)


def _column(parts: Sequence[Column]) -> Array:
    """Of all groups of a batch. They are joined before numpy sees them where they are alike, as they mostly are."""
    first = parts[0][1]
    if all(dtype is first for _, dtype in parts):
        return np.frombuffer(b"".join([view for view, _ in parts]), first)
    return np.concatenate([np.frombuffer(view, dtype) for view, dtype in parts])


def encode_groups(groups: Sequence[Group], meta: Mapping[str, Json] | None = None) -> list[Frame]:
    """A message of ``groups`` and the caller's own ``meta``. Raises WireError for a value that ``decode_groups`` would refuse."""
    try:
        return pack(KIND, meta or {}, joined([encode_group(group) for group in groups]))
    except (TypeError, ValueError) as error:
        raise WireError(f"{KIND}: meta cannot be written as JSON: {error}") from error


def decode_groups(frames: Sequence[Frame]) -> tuple[tuple[Group, ...], dict[str, Json]]:
    """``(groups, meta)`` of a message made by ``encode_groups``. Raises WireError for anything else, before any of it is used."""
    meta, arrays = unpack(frames, KIND)
    return groups_of(arrays), meta


def joined(bodies: Sequence[Frame]) -> dict[str, Array]:
    """Groups, each as ``encode_group`` makes it, as the arrays of a message."""
    return {ARRAY: np.frombuffer(b"".join(bodies), np.uint8)}


def groups_of(arrays: Mapping[str, Array]) -> tuple[Group, ...]:
    """The groups in the arrays of a message. Raises WireError."""
    array = arrays.get(ARRAY)
    if array is None or len(arrays) != 1 or array.dtype != np.uint8 or array.ndim != 1:
        raise WireError(f"arrays {[(name[:64], str(a.dtype), a.shape) for name, a in arrays.items()][:3]} are not the bytes of groups")
    return decode_batch(array.data)


def _trace_row(trace: Trace) -> tuple[float | int, ...]:
    verdict = trace.verdict
    lengths = (len(trace.segments), len(trace.id), len(trace.problem_id), len(verdict.extracted))
    return (trace.reward, verdict.ms, *lengths, _FINISHES.index(trace.finish), verdict.correct, _REASONS.index(verdict.reason))


def _segment_row(segment: Segment) -> tuple[float | int, ...]:
    credit = segment.advantage
    own = (segment.version, segment.mask, 0.0 if credit is None else credit, len(segment.ids), segment.episode)
    return (*own, _ROLES.index(segment.role), credit is not None, bool(segment.logprobs))


def _check(logprobs: Array, traces: Array, segments: Array, ids: Array) -> None:
    """Every number in its range; nothing that is not finite. Counts and enums are checked where they are used."""
    _check_range("log-probs", logprobs, -_FLOAT_MAX, _FLOAT_MAX)
    _check_range("ids", ids, 0, _INT32_MAX)
    for table, ranges in ((traces, _TRACE_RANGES), (segments, _SEGMENT_RANGES)):
        for name, (low, high) in ranges.items():
            _check_range(name, table[name], low, high)
    if segments[(segments["credited"] == 0) & (segments["advantage"].view(np.int64) != 0)].size:
        raise WireError("an advantage of a segment that has none of its own")
    if segments[(segments["sampled"] != 0) & ((segments["version"] == NO_VERSION) | (segments["num_ids"] == 0))].size:
        raise WireError("log-probs of a segment that no policy made, or that is empty")


def _check_range(name: str, array: Array, low: float, high: float) -> None:
    # The least of values with a nan is nan, which no comparison holds for.
    if array.size and not (low <= array.min().item() and array.max().item() <= high):
        raise WireError(f"{name} span {array.min()}..{array.max()}, allowed is {low}..{high}, and nothing that is not finite")


class _Cutter:
    """Cuts the columns of a batch up again, group by group; each must use up exactly what its head says."""

    def __init__(self, logprobs: Array, traces: Array, segments: Array, ids: Array) -> None:
        self._traces, self._segments = iter(traces.tolist()), iter(segments.tolist())
        self._ids, self._logprobs = tuple(ids.tolist()), tuple(logprobs.tolist())
        self._id = self._logprob = 0

    def group(self, head: Sequence[int], text: str) -> Group:
        ticket, unshown, at, num_logprobs, num_traces, num_segments, num_ids, *_ = head
        ends = (self._id + num_ids, self._logprob + num_logprobs, num_segments, len(text))
        problem_id, segments, traces, first = text[:at], self._cut_segments(num_segments), [], 0
        for reward, ms, count, size, problem_size, extracted_size, finish, correct, reason in islice(self._traces, num_traces):
            problem_at = at + size
            extracted_at = problem_at + problem_size
            end = extracted_at + extracted_size
            verdict = Verdict(_BOOLS[correct], text[extracted_at:end], _REASONS[reason], ms)
            own = tuple(segments[first : first + count])
            traces.append(Trace(text[at:problem_at], text[problem_at:extracted_at], own, reward, _FINISHES[finish], verdict))
            at, first = end, first + count
        if (found := (self._id, self._logprob, first, at)) != ends:
            raise WireError(f"group of ticket {ticket}: ids, log-probs, segments, characters end at {found}, its head says {ends}")
        return Group(ticket, problem_id, tuple(traces), unshown)

    def _cut_segments(self, count: int) -> list[Segment]:
        ids, logprobs, at, logprob = self._ids, self._logprobs, self._id, self._logprob
        segments = []
        for version, mask, advantage, size, episode, role, credited, sampled in islice(self._segments, count):
            end, logprob_end = at + size, logprob + size if _BOOLS[sampled] else logprob
            credit = advantage if _BOOLS[credited] else None
            segments.append(Segment(ids[at:end], _ROLES[role], logprobs[logprob:logprob_end], version, mask, episode, credit))
            at, logprob = end, logprob_end
        self._id, self._logprob = at, logprob
        return segments
