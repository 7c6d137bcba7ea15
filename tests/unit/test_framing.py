"""What a header may be: everything else is refused with the reason, before any of it is used."""

from __future__ import annotations

import numpy as np
import pytest

from neox_rl.errors import WireError
from neox_rl.framing import MAX_DEPTH, MAX_HEADER_BYTES, PROTOCOL, pack, unpack, unpack_any
from tests.unit.wire_headers import resealed

ARRAYS = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.zeros(0, dtype=np.float32)}


def test_a_message_arrives_as_it_was_sent_without_copies() -> None:
    frames = pack("k", {"x": [1, 2.5, None, "é"]}, ARRAYS)
    meta, arrays = unpack(frames, "k")
    assert meta == {"x": [1, 2.5, None, "é"]} and unpack_any(frames, ("j", "k"))[0] == "k"
    assert arrays["a"].tolist() == ARRAYS["a"].tolist() and np.shares_memory(arrays["a"], ARRAYS["a"])


@pytest.mark.parametrize(
    ("json", "reason"),
    [
        (b'{"kind":"k","meta":{"x":NaN},"arrays":[]}', "NaN is no JSON"),
        (b'{"kind":"k","meta":{"x":-Infinity},"arrays":[]}', "-Infinity is no JSON"),
        (b'{"kind":"k","meta":{"x":1e999},"arrays":[]}', "1e999 is beyond the floats"),
        (b'{"kind":"k","meta":{"x":' + b"9" * 400 + b'},"arrays":[]}', "an integer of 400 digits"),
        (b'{"kind":"k","kind":"k","meta":{},"arrays":[]}', "a key twice"),
        (b'{"kind":"k","meta":{"x":"\\ud800"},"arrays":[]}', "surrogates not allowed"),
        (b'{"kind":"k","meta":{"x":"\xff"},"arrays":[]}', "invalid start byte"),
        (b'{"kind":"k","meta":{"x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b'},"arrays":[]}', f"deeper than {MAX_DEPTH} levels"),
        (b"[" * 100_000, "recursion"),
        (b'{"kind":"k","meta":{},"arrays":[["a","int32",[-1]]]}', "do not match the header"),
        (b"7", "not a JSON object"),
    ],
)
def test_json_that_python_reads_but_nobody_sent_is_refused(json: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        unpack(resealed(json, []), "k")


@pytest.mark.parametrize("kind", [b'"l"', b"7", b"null", b"[]", b"{}"])
def test_a_kind_that_nobody_waits_for_is_refused(kind: bytes) -> None:
    with pytest.raises(WireError, match=r"unknown kind.*expected is j, k"):
        unpack_any(resealed(b'{"kind":' + kind + b',"meta":{},"arrays":[]}', []), ("j", "k"))


def test_an_escaped_backslash_before_ud_is_no_surrogate() -> None:
    assert unpack(pack("k", {"x": "\\ud800 \U0001f600"}, {}), "k")[0] == {"x": "\\ud800 \U0001f600"}


@pytest.mark.parametrize(
    "row", [["a", "int32", [-1]], ["a", "object", [1]], ["a", "int32", [2**60]], ["a", "int32", [True]], ["a" * 600, "bool", [4]], "a"]
)
def test_an_array_that_cannot_be_is_refused(row: object) -> None:
    with pytest.raises(WireError, match="is not \\[name, dtype, shape\\]"):
        unpack(resealed({"kind": "k", "meta": {}, "arrays": [row]}, [b"1234"]), "k")


def test_another_release_and_another_protocol_are_told_apart() -> None:
    header = bytearray(pack("k", {}, {})[0])
    header[3] += 1
    with pytest.raises(WireError, match=f"protocol version {PROTOCOL + 1}, this side speaks {PROTOCOL}: run one release on both sides"):
        unpack([bytes(header)], "k")
    with pytest.raises(WireError, match="not a message of this project's protocol"):
        unpack([b'{"v":1,"kind":"k","meta":{},"arrays":[]}'], "k")


def test_every_flipped_bit_of_every_frame_is_found() -> None:
    sent = [bytes(frame) for frame in pack("k", {"x": 1.25}, ARRAYS)]
    for index, frame in enumerate(sent):
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(WireError):
                unpack([*sent[:index], bytes(damaged), *sent[index + 1 :]], "k")


def test_a_header_that_is_too_long_is_not_parsed() -> None:
    with pytest.raises(WireError, match="at most"):
        unpack([bytes(MAX_HEADER_BYTES + 1)], "k")
