"""Answers of servers as bytes in the journal, and the requests that they are known by."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.errors import JournalError
from neox_rl.queue.answers import Answer, Asked, answer_of, asked_of, body_of, request_of
from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

COMPLETIONS = st.builds(
    lambda ids, cut, finish: Completion(
        tuple(ids),
        tuple(-i / 7 for i in ids) if cut % 2 else (-0.5,) * len(ids),
        (VersionSpan(3, 0, cut), VersionSpan(4, cut, len(ids))) if 0 < cut < len(ids) else (VersionSpan(3, 0, len(ids)),) * bool(ids),
        finish,
    ),
    st.lists(st.integers(0, 200_000), max_size=5),
    st.integers(0, 5),
    st.sampled_from(Finish),
)


@given(st.lists(COMPLETIONS, max_size=4), st.integers(-1, 9), st.integers(0, 5), st.data())
def test_an_answer_comes_back_as_it_was_or_says_what_is_wrong_with_it(chunks: list[Completion], rollout: int, n: int, data: Any) -> None:
    answer = Answer(Asked(rollout, request_of((1, 2), SamplingParams(8), n), n), n, 2 * n, tuple(chunks))
    body = body_of(answer)
    assert answer_of(body) == answer_of(memoryview(body)) == answer and asked_of(body) == answer.asked
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(JournalError, match=r"an answer of \d+ bytes"):
        answer_of(body[:cut])
    with pytest.raises(JournalError, match=rf"an answer of {len(body) + 1} bytes is not whole: 1 are left behind \d+ tokens"):
        answer_of(body + b"x")
    with suppress(JournalError):
        at = data.draw(st.integers(0, len(body) - 1))
        answer_of(body[:at] + data.draw(st.binary(min_size=1, max_size=4)) + body[at:])


def test_requests_are_told_apart_by_all_that_they_ask_for() -> None:
    params = SamplingParams(8, 1.0, 1.0, (3, 4))
    asked = [
        ((1, 2), params, 2),
        ((1, 2, 3), params, 2),
        ((1,), params, 2),
        ((1, 2), params, 3),
        *(((1, 2), replace(params, **other), 2) for other in ({"max_tokens": 9}, {"temperature": 0.5}, {"top_p": 0.9}, {"seed": 0})),
        *(((1, 2), replace(params, stop_token_ids=stops), 2) for stops in ((3,), (4, 3), ())),
    ]
    assert {field.name for field in fields(params)} == {"max_tokens", "temperature", "top_p", "seed", "stop_token_ids"}
    assert len({request_of(*each) for each in asked}) == len(asked)
    assert request_of([1, 2], SamplingParams(8, 1.0, 1.0, (3, 4)), 2) == request_of((1, 2), params, 2)
