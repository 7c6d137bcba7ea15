"""Hostile messages, and what a reader may do with them: the parts of ``tools/fuzz.py`` that know no reader and no socket.

A reader of messages may refuse (its own error), or read exactly what was sent. Two kinds of messages come to it:

    damaged   bytes flipped, cut, inserted; frames dropped, doubled, swapped, taken from another message; noise
    forged    a field of the header is junk, an array has another type, shape or content, and the digest is right: whoever means harm and
              has the run's keys, or sits on the same machine without any. What is then well-formed is read; it must not crash or hang.

Anything else is a finding: another exception, a reader that takes longer than ``MAX_READ_S``, a damaged message that was read.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from neox_rl.errors import WireError
from neox_rl.framing import DTYPES, PREFIX_BYTES, seal

MAX_READ_S = 2.0
"""Of processor time. The largest message here is a few kilobytes."""
Message = list[bytes]
JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63),
    0.5,
    1e308,
    "",
    "x",
    "\x00",
    "9" * 5000,
    "/../..",
    [],
    {},
    [[]],
    [None],
    {"": {}},
)
RAW_JUNK = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 6000,
    b'"\\ud800"',
    b"[" * 3000,
    b"[" * 40 + b"]" * 40,
    b'{"a":1,"a":2}',
    b'"\xff"',
    b"\xef\xbb\xbf1",
    b"",
)


class Outcome(StrEnum):
    REFUSED = "refused"
    SAME = "same as sent"
    VALID = "forged, well-formed"


class Finding(AssertionError):
    """A reader did what it must not."""


@dataclass(frozen=True)
class Target:
    """A reader with messages that it accepts. ``forge`` makes a wrong message with a right digest. Without ``digested`` damage may leave a
    message well-formed; ``check`` says what must hold of whatever was read."""

    name: str
    samples: Sequence[Message]
    read: Callable[[Message], Any]
    refusals: tuple[type[Exception], ...] = (WireError,)
    forge: Callable[[random.Random, Message], Message] | None = None
    check: Callable[[Any], None] = lambda value: None
    digested: bool = True
    within: Callable[[Any, Any], bool] = lambda value, sent: bool(value == sent)


@dataclass
class Tally:
    """Outcomes by target."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, target: Target, outcome: Outcome) -> None:
        self.counts.setdefault(target.name, Counter())[outcome] += 1

    def total(self) -> int:
        return sum(sum(found.values()) for found in self.counts.values())


def damaged(rng: random.Random, message: Message, other: Message) -> Message:
    """``message`` after one to three accidents."""
    frames = [bytes(frame) for frame in message]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not frames:
            break
        at = rng.randrange(len(frames))
        frame = bytearray(frames[at])
        where = rng.randrange(len(frame) + 1)
        match rng.randrange(10):
            case 0 | 1 | 2 if frame:
                frame[where % len(frame)] ^= 1 << rng.randrange(8)
                frames[at] = bytes(frame)
            case 3:
                frames[at] = bytes(frame[:where])
            case 4:
                frames[at] = bytes(frame[:where]) + rng.randbytes(rng.choice((1, 8, 100))) + bytes(frame[where:])
            case 5:
                del frames[at]
            case 6:
                frames.insert(rng.randrange(len(frames) + 1), bytes(frame))
            case 7:
                to = rng.randrange(len(frames))
                frames[at], frames[to] = frames[to], frames[at]
            case 8:
                frames[at] = bytes(rng.choice(other))
            case _:
                frames = [rng.randbytes(rng.randrange(80)) for _ in range(rng.randrange(4))]
    return frames


def places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from places(inner)


def spoiled(rng: random.Random, raw: bytes) -> bytes:
    """JSON with junk in one place, or a place lost or doubled."""
    value = json.loads(raw)
    container, key = rng.choice(list(places(value)))
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, container[key])
        case 2 if isinstance(container, dict):
            container["unknown"] = rng.choice(JUNK)
        case 3:
            container[key] = "@junk@"
            return json.dumps(value).encode().replace(b'"@junk@"', rng.choice(RAW_JUNK), 1)
        case 4 if isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 10**6, 10**18))
        case _:
            container[key] = rng.choice(JUNK)
    return json.dumps(value).encode()


def forged(rng: random.Random, message: Message, self_digested: bool = False) -> Message:
    """A wrong message with the right digest."""
    raw, arrays = bytes(message[0])[PREFIX_BYTES:], [bytes(frame) for frame in message[1:]]
    if arrays and rng.random() < 0.5:
        header, at = json.loads(raw), rng.randrange(len(arrays))
        row = header["arrays"][at]
        match rng.randrange(4):
            case 0:
                row[1] = rng.choice([*sorted(DTYPES), "object", "float16", "<U9"])
            case 1:
                row[2] = rng.choice([[2**40], [2**31, 2**31], [-1], [], [0], [1.0], [len(arrays[at]), 1], [1] * 40])
            case 2:
                arrays[at] = arrays[at] + arrays[at]
                row[2] = [2 * n for n in row[2][:1]]
            case _:
                arrays[at] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * len(arrays[at])
        raw = json.dumps(header).encode()
    else:
        raw = spoiled(rng, raw)
    return [seal(raw, [] if self_digested else arrays), *arrays]


def judge(target: Target, message: Message, sent: Message, digest_right: bool) -> Outcome:
    """Reads ``message``, made of the valid message ``sent``. Raises Finding."""
    begin = time.process_time()
    try:
        value = target.read(message)
        target.check(value)
    except target.refusals:
        value = Outcome.REFUSED
    except Exception as error:
        raise Finding(f"{target.name}: {type(error).__name__}: {str(error)[:300]} from {_short(message)}") from error
    if (took := time.process_time() - begin) > MAX_READ_S:
        raise Finding(f"{target.name}: took {took:.1f} s for {_short(message)}")
    if value is Outcome.REFUSED:
        if message == sent:
            raise Finding(f"{target.name}: refused a valid message {_short(message)}")
        return Outcome.REFUSED
    if target.within(value, target.read(sent)):
        return Outcome.SAME
    if not digest_right:
        raise Finding(f"{target.name}: read a damaged message as {str(value)[:300]}: {_short(message)}")
    return Outcome.VALID


def fuzz(targets: Sequence[Target], messages: int, seed: int) -> Tally:
    """``messages`` in turn over all targets. Raises Finding, which names target and message; the seed repeats it."""
    rng, tally = random.Random(seed), Tally()
    for target in targets:
        for sent in target.samples:
            judge(target, sent, sent, digest_right=True)
    for number in range(messages):
        target = targets[number % len(targets)]
        sent = rng.choice(target.samples)
        if target.forge is not None and rng.random() < 0.5:
            tally.add(target, judge(target, target.forge(rng, sent), sent, digest_right=True))
        else:
            message = damaged(rng, sent, rng.choice(target.samples))
            # Two accidents may undo one another, or make another whole message of this kind.
            whole = message in target.samples or not target.digested
            tally.add(target, judge(target, message, sent, digest_right=whole))
    return tally


def _short(message: Message) -> str:
    return f"{len(message)} frames {[bytes(frame)[:400] for frame in message[:3]]}"
