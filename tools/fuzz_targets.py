"""Every reader of messages of a run, each with messages that it accepts (``fuzzing.Target``)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from fuzzing import RAW_JUNK, Finding, Message, Target, forged, spoiled

from neox_rl.codec import decode_batch, decode_groups, encode_group, encode_groups, groups_of, joined
from neox_rl.errors import NeoxRLError, WeightError, WireError
from neox_rl.framing import PREFIX_BYTES, Array, Frame, pack, unpack
from neox_rl.queue.records import Damage, payload_of, scan, to_bytes
from neox_rl.queue.wire_messages import parse_answer, parse_request
from neox_rl.rollout.vllm_client import parse_response
from neox_rl.run import join_wire
from neox_rl.types import Completion, Finish, Group, Reason, Role, Segment, Trace, Verdict
from neox_rl.weights.manifest import verify
from neox_rl.weights.wire import FETCH, OFFERED, STAGED, WATCH, control, read_control

DIGEST = "0123456789abcdef" * 2


def _bytes(frames: Iterable[Frame]) -> Message:
    return [bytes(frame) for frame in frames]


def example_groups() -> list[Group]:
    """Two groups with every kind of segment."""
    prompt = Segment((1, 2, 3), Role.PROMPT)
    think = Segment((4, 5), Role.THINK, (-0.1, -0.2), version=3, mask=1.0, advantage=-0.25)
    solution = Segment((6,), Role.SOLUTION, (-0.3,), version=4, mask=1.0, episode=1)
    trace = Trace("g000001/r0", "p", (prompt, think, solution), 1.0, Finish.STOP, Verdict(True, "26 é", Reason.MATCH, 0.5))
    return [Group(ticket, "p", (trace, trace)) for ticket in range(2)]


def example_requests(session: str = "5e55", first: int = 1, since: int = 1) -> list[Message]:
    """One message of each kind that a trainer sends, numbered from ``first`` on; the first that it could repeat is ``since``."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("hello", {"world": 2, "pid": 77, "attempt": 1, "state": {"sft_step": 3, "rl_step": 0, "queue": {"open": [1, 2]}}}),
        ("next", {"phase": "rl", "step": 1}),
        ("report", {"phase": "sft", "step": 2, "metrics": {"loss": 0.25, "none": None}}),
        ("published", {"version": 3, "digest": DIGEST}),
        ("checkpoint", {"sft_step": 3, "rl_step": 1}),
        ("evaluate", {"label": "final", "version": 3}),
        ("done", {"reason": "finished"}),
    ]
    return [_bytes(pack(kind, {"session": session, "id": first + i, "since": since, **body}, {})) for i, (kind, body) in enumerate(bodies)]


def example_answers() -> list[Message]:
    """One message of each kind that the orchestrator sends."""
    plain: list[tuple[str, dict[str, Any]]] = [
        ("ok", {}),
        ("result", {"metrics": {"accuracy": 0.5}}),
        ("heartbeat", {"waiting_for": "g000003"}),
        ("error", {"message": "no"}),
    ]
    groups = joined([encode_group(group) for group in example_groups()])
    bodies: list[tuple[str, dict[str, Any], dict[str, Array]]] = [
        ("batch", {"state": {"draws": 3}}, groups),
        *((kind, body, {}) for kind, body in plain),
    ]
    return [_bytes(pack(kind, {"id": 4, "acked": 4, **body}, arrays)) for kind, body, arrays in bodies]


def example_joins() -> list[Message]:
    """One message of each kind of the join socket."""
    who = {"token": "70ce", "name": "guest"}
    server: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "tensor_parallel_size": 1,
        "enforce_eager": True,
        "seed": 7,
    }
    server |= {"kv_cache_gib": 1.0, "gpu_memory_frac": 0.85, "stats": False}
    welcome: dict[str, Any] = {"name": "guest", "generator": "vllm", "publisher": "tcp://127.0.0.1:5", "drain_s": 9.0, "server": server}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (join_wire.JOIN, {**who, "host": "127.0.0.1", "port": 8000}),
        (join_wire.BEAT, who),
        (join_wire.LEAVE, {**who, "reason": "SIGTERM"}),
        (join_wire.REFUSED, {"message": "no"}),
        (join_wire.BEATEN, {"state": "serving", "version": 3, "restarts": 0}),
        (join_wire.UNKNOWN, {}),
        (join_wire.GONE, {}),
        (join_wire.OVER, {"reason": "done"}),
    ]
    files = {"config.json": b"{}", "tokenizer.json": b"[1, 2]"}
    return [
        _bytes(join_wire.message(join_wire.WELCOME, files, **welcome)),
        *(_bytes(join_wire.message(kind, **body)) for kind, body in bodies),
    ]


def example_controls() -> list[Message]:
    """One message of each kind without arrays of the weights socket."""
    said: list[tuple[str, dict[str, Any]]] = [
        (FETCH, {"have": -1, "who": "a/0"}),
        (STAGED, {"version": 2, "who": "a/0", "digest": DIGEST}),
        (WATCH, {}),
    ]
    return [_bytes(control(kind, **fields)) for kind, fields in [*said, (OFFERED, {"version": 2, "digest": DIGEST})]]


def example_snapshot(version: int = 3) -> Message:
    import torch

    from neox_rl.weights.snapshot import make_snapshot

    return _bytes(make_snapshot(version, [("w", torch.arange(12.0).reshape(3, 4)), ("b", torch.ones(2).to(torch.bfloat16))]).frames)


def _read_answer(message: Message) -> Any:
    answer = parse_answer(message)
    return answer.kind, answer.id, answer.acked, answer.body, groups_of(answer.arrays) if answer.kind == "batch" else answer.arrays


def _read_framed(message: Message) -> Any:
    meta, arrays = unpack(message, "groups")
    return meta, [(name, array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()]


def _response() -> Message:
    def choice(index: int, ids: list[int]) -> dict[str, Any]:
        spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": len(ids)}]
        tokens = {"content": [{"token_id": i, "logprob": -0.5} for i in ids]}
        return {"index": index, "token_ids": ids, "logprobs": tokens, "finish_reason": "stop", "weight_versions": spans}

    return [json.dumps({"choices": [choice(0, [5, 6, 7]), choice(1, [8, 9])]}).encode()]


def _spoiled_response(rng: random.Random, message: Message) -> Message:
    return [spoiled(rng, message[0])]


def _trainable(completions: tuple[Completion, ...]) -> None:
    """What was read of a server can be sent to the trainer; WireError here would end the orchestrator, not the request."""
    for completion in completions:
        cut = [(c.version, completion.ids[c.start : c.end], completion.logprobs[c.start : c.end]) for c in completion.spans]
        segments = tuple(Segment(ids, Role.THINK, logprobs, version) for version, ids, logprobs in cut)
        trace = Trace("t", "p", segments, 0.0, completion.finish, Verdict(False, "", Reason.MISMATCH, 0.0))
        try:
            decode_groups(encode_groups([Group(0, "p", (trace,))]))
        except NeoxRLError as error:
            raise Finding(f"a completion that no group can hold: {error}") from error


def _read_bare(message: Message) -> tuple[bytes, tuple[Group, ...]]:
    data = b"".join(message)
    return data, decode_batch(data)


def _as_written(read: tuple[bytes, tuple[Group, ...]]) -> None:
    """There is one way to write a group: what was read of damaged bytes is what they say."""
    data, groups = read
    try:
        again = b"".join(map(encode_group, groups))
    except WireError as error:
        raise Finding(f"a group was read that cannot be written: {error}") from error
    if again != data:
        raise Finding("groups were read of bytes that do not stand for them")


_SEGMENT_FILE = "000000000001.journal"


def _journal() -> Message:
    bodies: list[tuple[int, str, dict[str, Any], bytes]] = [
        (1, "segment", {"format": 1}, b""),
        (2, "taken", {"step": 1, "tickets": [1, 2]}, b""),
        (3, "group", {"ticket": 5}, b"\x00" * 90),
    ]
    return [b"".join(to_bytes(_SEGMENT_FILE, seq, payload_of(kind, meta, body)) for seq, kind, meta, body in bodies)]


def _forged_journal(rng: random.Random, message: Message) -> Message:
    payload = bytearray(payload_of("taken", {"step": 1}, b"body"))
    payload[rng.randrange(len(payload))] = rng.randrange(256)
    junk = rng.choice((bytes(payload), rng.choice(RAW_JUNK), rng.randbytes(9), len(payload).to_bytes(4, "little") + rng.choice(RAW_JUNK)))
    return [message[0] + to_bytes(_SEGMENT_FILE, 4, junk)]


def _read_journal(message: Message) -> Any:
    found = [item for frame in message for item in scan(_SEGMENT_FILE, frame)]
    return [(r.seq, r.kind, json.dumps(dict(r.meta)), bytes(r.body)) for r in found if not isinstance(r, Damage)]


def targets() -> list[Target]:
    """Every reader of messages of a run."""
    refused = (WireError, WeightError)

    def read_response(message: Message) -> tuple[Completion, ...]:
        return parse_response(b"".join(message), 2, "server")

    groups = [_bytes(encode_groups(example_groups(), {"step": 1})), _bytes(encode_groups([]))]
    every = (FETCH, STAGED, WATCH, OFFERED)
    kinds = [json.loads(message[0][PREFIX_BYTES:])["kind"] for message in example_joins()]
    return [
        Target("framing", groups, _read_framed, forge=forged),
        Target("codec", groups, decode_groups, forge=forged),
        Target("codec, bare", [[encode_group(g)] for g in example_groups()], _read_bare, check=_as_written, digested=False),
        Target("experience, requests", example_requests(), parse_request, forge=forged),
        Target("experience, answers", example_answers(), _read_answer, forge=forged),
        Target("join", example_joins(), lambda m: join_wire.read_message(m, kinds), forge=forged),
        Target("weights, control", example_controls(), lambda m: read_control(m, every), forge=forged),
        Target(
            "weights, snapshot",
            [example_snapshot()],
            lambda m: ((v := verify(m)).version, v.digest),
            (WeightError,),
            lambda rng, m: forged(rng, m, self_digested=True),
        ),
        Target("journal", [_journal()], _read_journal, (), _forged_journal, within=lambda value, sent: all(r in sent for r in value)),
        Target("vLLM, damaged", [_response()], read_response, refused, check=_trainable, digested=False),
        Target("vLLM, forged", [_response()], read_response, refused, _spoiled_response, _trainable, digested=False),
    ]
