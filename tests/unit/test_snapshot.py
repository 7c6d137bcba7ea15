"""A snapshot arrives bit for bit, or not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.errors import WeightError
from neox_rl.framing import Frame
from neox_rl.weights.manifest import verify
from neox_rl.weights.snapshot import Snapshot, make_snapshot, tensors_of
from tests.unit.wire_headers import header_of, resealed


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(7, 5),
        "norm": torch.tensor([1.0, float("nan"), float("-inf"), -0.0]).to(torch.bfloat16),
        "half": torch.randn(3, 1, 2).to(torch.float16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


def received(snapshot: Snapshot) -> list[Frame]:
    return [bytearray(frame) for frame in snapshot.frames]  # type: ignore[misc]


def test_every_dtype_and_shape_arrives_bit_for_bit() -> None:
    found = verify(received(snapshot := make_snapshot(12, weights().items())))
    version, digest, tensors = found.version, found.digest, tensors_of(found)
    assert (version, digest) == (12, snapshot.digest)
    assert list(tensors) == list(weights())
    for name, sent in weights().items():
        assert tensors[name].dtype == sent.dtype and tensors[name].shape == sent.shape
        assert tensors[name].reshape(-1).view(torch.uint8).tolist() == sent.reshape(-1).view(torch.uint8).tolist()


def test_the_trainer_may_change_its_weights_afterwards() -> None:
    source = weights()
    before = source["embed"].clone()
    snapshot = make_snapshot(0, source.items())
    source["embed"].zero_()
    assert torch.equal(tensors_of(verify(snapshot.frames))["embed"], before)


def test_a_tensor_that_is_not_contiguous_is_sent_in_its_logical_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensors_of(verify(make_snapshot(0, [("m", matrix.T)]).frames))["m"].tolist() == matrix.T.tolist()


def test_equal_weights_have_equal_digests_whatever_the_version() -> None:
    assert make_snapshot(1, weights().items()).digest == make_snapshot(2, weights().items()).digest
    other = weights()
    other["embed"][0, 0] += 1e-6
    assert make_snapshot(1, other.items()).digest != make_snapshot(1, weights().items()).digest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_tensor_is_found_and_named(data: st.DataObject) -> None:
    snapshot = make_snapshot(3, weights().items())
    frames = received(snapshot)
    index = data.draw(st.sampled_from([i for i, frame in enumerate(frames) if i and len(frame)]))
    position = data.draw(st.integers(0, len(frames[index]) - 1))
    frames[index][position] ^= 1 << data.draw(st.integers(0, 7))  # type: ignore[index]
    with pytest.raises(WeightError, match=f"v3.*{snapshot.manifest[index - 1].name}"):
        verify(frames)


def test_a_truncated_a_missing_and_a_swapped_tensor_are_refused() -> None:
    frames = received(make_snapshot(3, [("a", torch.ones(4)), ("b", torch.zeros(4))]))
    for bad in ([frames[0], frames[1][:-4], frames[2]], frames[:2], [frames[0], frames[2], frames[1]], [], [b"{}"], [b"\xff"]):
        with pytest.raises(WeightError):
            verify(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "3"),
        ("version", True),
        ("digest", "0" * 32),
        ("manifest", []),
        ("manifest", [["a", "int8", [4], "x"]]),
        ("manifest", [7]),
    ],
)
def test_a_manifest_that_lies_is_refused(field: str, value: object) -> None:
    frames = received(make_snapshot(3, [("a", torch.ones(4))]))
    header = header_of(frames)
    header["meta"][field] = value
    with pytest.raises(WeightError):
        verify(resealed(header, frames[1:], self_digested=True))


def test_weights_that_cannot_be_sent_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match=r"'ids' has dtype torch\.int64"):
        make_snapshot(0, [("ids", torch.arange(3))])
    with pytest.raises(WeightError, match=r"twice.*'w'"):
        make_snapshot(0, [("w", torch.ones(1)), ("w", torch.ones(1))])
    with pytest.raises(WeightError, match="without tensors"):
        make_snapshot(0, [])
