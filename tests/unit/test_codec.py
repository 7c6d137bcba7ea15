"""Groups cross a process unchanged, and nothing but a WireError comes of a message that is off."""

from __future__ import annotations

import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.codec import ARRAY, decode_batch, decode_group, decode_groups, encode_group, encode_groups
from neox_rl.errors import WireError
from neox_rl.framing import pack
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Role, Segment, Trace, Verdict

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
FLOATS32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    ids = draw(st.lists(st.integers(0, draw(st.sampled_from([2**16, 2**31])) - 1), max_size=6))
    version = draw(st.sampled_from([NO_VERSION, 0, 7, 2**40]))
    sampled = version != NO_VERSION and draw(st.booleans())
    logprobs = draw(st.lists(draw(st.sampled_from([FLOATS, FLOATS32])), min_size=len(ids), max_size=len(ids))) if sampled else []
    mask = draw(st.floats(0, 1))
    advantage = draw(st.none() | FLOATS)
    return Segment(tuple(ids), draw(st.sampled_from(Role)), tuple(logprobs), version, mask, draw(st.integers(0, 3)), advantage)


VERDICTS = st.builds(Verdict, st.booleans(), st.text(max_size=5), st.sampled_from(Reason), st.floats(0, 1e6))
TEXT = st.text(max_size=5)
TRACES = st.builds(Trace, TEXT, TEXT, st.lists(segments(), max_size=3).map(tuple), FLOATS, st.sampled_from(Finish), VERDICTS)
GROUPS = st.lists(st.builds(Group, st.integers(0, 2**50), TEXT, st.lists(TRACES, max_size=3).map(tuple), st.integers(0, 9)), max_size=3)


def example(traces: int = 2, groups: int = 2) -> list[Group]:
    prompt = Segment((1, 2, 3), Role.PROMPT)
    think = Segment((4, 5), Role.THINK, (-0.1, -0.2), version=3, mask=1.0, advantage=-0.25)
    solution = Segment((6,), Role.SOLUTION, (-0.3,), version=4, mask=1.0, episode=1)
    trace = Trace("g000001/r0", "p", (prompt, think, solution), 1.0, Finish.STOP, Verdict(True, "26", Reason.MATCH, 0.5))
    return [Group(k, "p", (trace,) * traces, unshown=k) for k in range(groups)]


@given(GROUPS, st.dictionaries(st.text(max_size=4), st.integers(-(2**63), 2**63) | st.text(max_size=3)))
@settings(max_examples=100, deadline=None)
def test_round_trip_is_exact(groups: list[Group], meta: dict[str, int | str]) -> None:
    frames = [bytes(frame) for frame in encode_groups(groups, meta)]
    assert decode_groups(frames) == (tuple(groups), meta)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_message_is_refused_whatever_was_mutated(data: st.DataObject) -> None:
    sent = [bytes(frame) for frame in encode_groups(example(), {"step": 1})]
    frames = list(sent)
    index = data.draw(st.integers(0, len(frames) - 1))
    frame = bytearray(frames[index])
    position = data.draw(st.integers(0, len(frame) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "swap"])):
        case "flip":
            frame[position] ^= data.draw(st.integers(1, 255))
            frames[index] = bytes(frame)
        case "cut":
            frames[index] = bytes(frame[:position])
        case "insert":
            frames[index] = bytes(frame[:position]) + data.draw(st.binary(min_size=1, max_size=8)) + bytes(frame[position:])
        case "drop":
            del frames[index]
        case _:
            frames[index], frames[-1] = frames[-1], frames[index]
    if frames != sent:  # the last two frames may be swapped with themselves
        with pytest.raises(WireError):
            decode_groups(frames)


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_bytes_without_a_digest_are_refused_or_say_what_is_read(data: st.DataObject) -> None:
    """As a journal of another release or a hostile peer has them: no error but WireError, and there is one way to write a group."""
    sent = b"".join(map(encode_group, example()))
    at = data.draw(st.integers(0, len(sent) - 1))
    count = data.draw(st.sampled_from([1, 4, 8]))
    with_ = data.draw(st.sampled_from([b"", b"\0" * count, b"\xff" * count]) | st.binary(min_size=1, max_size=9))
    mutated = sent[:at] + with_ + sent[at + count :]
    try:
        read = decode_batch(mutated)
    except WireError:
        return
    assert b"".join(map(encode_group, read)) == mutated


@pytest.mark.parametrize(
    ("logprob", "token", "a_token"), [(-0.5, 7, 6), (-0.5, 1 << 16, 8), (-0.1, 7, 10), (-0.1, 1 << 16, 12), (1e300, 7, 10)]
)
def test_a_token_takes_the_bytes_that_its_numbers_need(logprob: float, token: int, a_token: int) -> None:
    """An engine's log-probs are float32 values, and a small vocabulary's ids fit two bytes."""

    def size(count: int) -> int:
        segment = Segment((token,) * count, Role.THINK, (logprob,) * count, 0, 1.0)
        group = Group(0, "p", (replace(example()[0].traces[0], segments=(segment,)),))
        encoded = encode_group(group)
        assert decode_group(encoded) == group
        return len(encoded)

    assert size(101) - size(1) == 100 * a_token


def test_a_group_that_is_wider_than_its_numbers_is_refused() -> None:
    segment = Segment((7,), Role.THINK, (-0.5,), 0, 1.0)
    sent = encode_group(Group(0, "p", (replace(example()[0].traces[0], segments=(segment,)),)))
    for field, narrow, wide in ((-2, struct.pack("<f", -0.5), struct.pack("<d", -0.5)), (-1, struct.pack("<H", 7), struct.pack("<i", 7))):
        head = bytearray(sent[:42])
        head[field] = 1
        rest = sent[42:].replace(narrow, wide, 1) if field == -2 else wide.join(sent[42:].rsplit(narrow, 1))
        with pytest.raises(WireError, match="wider"):
            decode_group(bytes(head) + rest)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_is_no_group(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode_group(noise)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"group": np.zeros(0, np.uint8)},
        {ARRAY: np.zeros(0, np.int32)},
        {ARRAY: np.zeros((0, 1), np.uint8)},
        {ARRAY: np.zeros(0, np.uint8), "more": np.zeros(0, np.uint8)},
        {ARRAY: np.zeros(8, np.uint8)},
    ],
)
def test_arrays_that_are_no_groups_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(WireError):
        decode_groups(pack("groups", {}, arrays))


BAD = {
    "an id beyond int32": replace(example()[0].traces[0].segments[0], ids=(2**31,)),
    "a negative id": replace(example()[0].traces[0].segments[0], ids=(-1,)),
    "a log-prob that is not finite": Segment((1,), Role.THINK, (float("-inf"),), 0, 1.0),
    "a sampled token without log-prob": Segment((1, 2), Role.THINK, (-0.5,), 0, 1.0),
    "a log-prob that no policy gave": Segment((1,), Role.ENV, (-0.5,)),
    "a version before v0": Segment((), Role.ENV, (), -2),
    "an advantage that is not finite": Segment((1,), Role.THINK, (-0.5,), 0, 1.0, advantage=float("nan")),
    "a mask above 1": Segment((1,), Role.THINK, (-0.5,), 0, 1.5),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_receiver_would_refuse_is_refused_by_the_sender(name: str) -> None:
    group = example(traces=1, groups=1)[0]
    with pytest.raises(WireError):
        encode_groups([replace(group, traces=(replace(group.traces[0], segments=(BAD[name],)),))])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(WireError):
        encode_group(replace(example()[0], problem_id="\ud800"))


@pytest.mark.parametrize("field", range(10))
def test_a_head_that_says_another_number_is_refused(field: int) -> None:
    """Ticket, unshown tokens, characters of problem id, log-probs, traces, segments, ids, bytes of text, both widths: one more, and as many
    as fit."""
    sent, form = encode_group(example()[0]), "<2Q6I2B"
    head = struct.unpack_from(form, sent)
    for value in (head[field] + 1, 2**63 if field < 2 else 2**32 - 1 if field < 8 else 255):
        changed = struct.pack(form, *head[:field], value, *head[field + 1 :]) + sent[struct.calcsize(form) :]
        if field < 2 and value < 2**63:
            group = decode_group(changed)
            assert (group.ticket, group.unshown)[field] == value
        else:
            with pytest.raises(WireError):
                decode_group(changed)


def test_meta_that_is_not_json_is_refused() -> None:
    with pytest.raises(WireError, match="meta"):
        encode_groups([], {"x": float("nan")})


def test_a_batch_of_128_traces_takes_milliseconds_of_its_core() -> None:
    think = Segment(tuple(range(80)), Role.THINK, tuple(-0.01 * i for i in range(80)), 1, 1.0)
    groups = [replace(g, traces=tuple(replace(t, segments=(think,)) for t in g.traces)) for g in example(traces=8, groups=16)]
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        decode_groups(encode_groups(groups))
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.02
