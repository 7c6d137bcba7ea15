"""Completions made chunk by chunk are what one request would have given, and nothing that is finished is made twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.errors import ServerFailedError
from neox_rl.ports import Requests
from neox_rl.rollout.chunks import ChunkedGenerator, merged
from neox_rl.types import NO_VERSION, Completion, Finish, SamplingParams, VersionSpan

STOP = 1


class Greedy:
    """A policy that is a function of the tokens so far: token n is the n-th of ``text``, whoever asks. ``versions``: of each request."""

    def __init__(self, text: Sequence[int], versions: Sequence[int] = (), length_first: bool = False) -> None:
        self.text, self.length_first = tuple(text), length_first
        self.versions = itertools.chain(versions, itertools.repeat(versions[-1] if versions else 0))
        self.requests: list[tuple[int, int, int, str]] = []
        self.seeds: list[int | None] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.requests.append((len(prompt_ids), params.max_tokens, n, rollout_id))
        self.seeds.append(params.seed)
        await asyncio.sleep(0)
        ids: list[int] = []
        finish = Finish.LENGTH
        for token in self.text[len(prompt_ids) - 2 :]:
            ids.append(token)
            if token in params.stop_token_ids and not (self.length_first and len(ids) == params.max_tokens):
                finish = Finish.STOP
                break
            if len(ids) == params.max_tokens:
                break
        version = next(self.versions)
        completion = Completion(tuple(ids), tuple(-0.1 * i for i in ids), (VersionSpan(version, 0, len(ids)),), finish)
        return (completion,) * n


class Kept:
    """A record of one request: what was handed on, and what is there from before."""

    def __init__(self, earlier: Mapping[int, Sequence[Completion]] | None = None, whole: bool = True) -> None:
        self.chunks: list[tuple[int, int, Completion]] = []
        self.before, self.whole, self.reached = earlier or {}, whole, NO_VERSION

    @contextmanager
    def request(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> Iterator[Kept]:
        yield self

    def keep(self, index: int, start: int, chunks: Sequence[Completion]) -> None:
        self.chunks += [(index + i, start, chunk) for i, chunk in enumerate(chunks)]

    def earlier(self) -> Mapping[int, Sequence[Completion]]:
        return self.before


def sample(
    policy: Greedy, flush: int, params: SamplingParams, n: int = 1, kept: Kept | None = None, requests: Requests = Requests.ONE
) -> tuple[Completion, ...]:
    kept = kept or Kept()
    return asyncio.run(ChunkedGenerator(policy, requests, flush, kept).sample((7, 8), params, n, "g000001"))


TEXTS = st.lists(st.integers(2, 9), min_size=1, max_size=25).map(lambda ids: [*ids, STOP])


@given(TEXTS, st.integers(1, 30), st.integers(0, 9), st.integers(1, 3), st.booleans())
def test_the_concatenation_is_what_one_request_gives(text: list[int], budget: int, flush: int, n: int, length_first: bool) -> None:
    params = SamplingParams(budget, 0.0, stop_token_ids=(STOP,))
    whole = asyncio.run(Greedy(text, length_first=False).sample((7, 8), params, n, "g000001"))
    kept = Kept()
    assert sample(Greedy(text, length_first=length_first), flush, params, n, kept) == whole
    for index in range(n):
        pieces = [chunk for i, _, chunk in kept.chunks if i == index]
        assert [start for i, start, _ in kept.chunks if i == index] == [0, *itertools.accumulate(len(c.ids) for c in pieces)][: len(pieces)]
        assert not pieces or merged(pieces) == whole[index], "what was handed on is the whole completion"


@given(TEXTS, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9))
def test_what_is_there_from_before_is_not_made_again(text: list[int], budget: int, flush: int, finished: int, flush_before: int) -> None:
    """Also where chunks had another length before the restart."""
    params = SamplingParams(budget, 0.0, stop_token_ids=(STOP,))
    before = Kept()
    whole = sample(Greedy(text), flush_before, params, 1, before)
    chunks = [chunk for _, _, chunk in before.chunks][:finished]
    policy = Greedy(text)
    assert sample(policy, flush, params, 1, Kept({0: chunks})) == whole
    length = sum(len(chunk.ids) for chunk in chunks)
    assert all(prompt >= 2 + length for prompt, *_ in policy.requests)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8).map(sorted), st.integers(1, 6))
def test_spans_cover_the_tokens_and_rise(versions: list[int], flush: int) -> None:
    (completion,) = sample(Greedy([*range(2, 10), STOP], versions), flush, SamplingParams(20, stop_token_ids=(STOP,)))
    edges = [0, *(span.end for span in completion.spans)]
    assert [span.start for span in completion.spans] == edges[:-1] and edges[-1] == len(completion.ids)
    found = [span.version for span in completion.spans]
    assert found == sorted(set(found)), "spans of one version are one"


def test_a_server_with_older_weights_is_asked_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_rl.rollout.chunks.BEHIND_S", 0.0)
    params = SamplingParams(9, stop_token_ids=(STOP,))
    (completion,) = sample(Greedy([2, 3, 4, STOP], [5, 4, 4, 5]), 2, params)
    assert completion.spans == (VersionSpan(5, 0, 4),)
    with pytest.raises(ServerFailedError, match="g000001/r0: it has tokens of v5, but 9 answers came from older weights, the last from v4"):
        sample(Greedy([2, 3, 4, STOP], [5, 4]), 2, params)


@pytest.mark.parametrize(("requests", "version"), [(Requests.MANY, 4), (Requests.LINE, 5)])
def test_the_first_chunk_behind_another_request_is_no_older_than_its_answer(
    monkeypatch: pytest.MonkeyPatch, requests: Requests, version: int
) -> None:
    """Of a search the requests lie beside one another."""
    monkeypatch.setattr("neox_rl.rollout.chunks.BEHIND_S", 0.0)
    kept = Kept(whole=False)
    kept.reached = 5
    (completion,) = sample(Greedy([2, 3, STOP], [4, 4, 5]), 9, SamplingParams(9, stop_token_ids=(STOP,)), 1, kept, requests)
    assert [span.version for span in completion.spans] == [version] and [chunk for _, _, chunk in kept.chunks] == [completion]


def test_short_completions_are_one_request_and_nothing_is_written_down_for_them() -> None:
    policy, kept = Greedy([2, 3, STOP]), Kept()
    assert [c.ids for c in sample(policy, 512, SamplingParams(1000, stop_token_ids=(STOP,)), 4, kept)] == [(2, 3, STOP)] * 4
    assert policy.requests == [(2, 512, 4, "g000001")] and kept.chunks == []
    for whole in (True, False):
        part = Kept(whole=whole)
        sample(policy, 512, SamplingParams(1000, stop_token_ids=(STOP,)), 4, part, Requests.MANY)
        assert [(index, start) for index, start, _ in part.chunks] == [(i, 0) for i in range(4)], "more is to come"


def test_every_later_chunk_draws_other_numbers_and_repeats_them() -> None:
    runs = []
    for _ in range(2):
        policy = Greedy([2] * 20)
        sample(policy, 4, SamplingParams(12, seed=9), 2)
        runs.append(policy.seeds)
    assert runs[0] == runs[1] and runs[0][0] == 9 and len(set(runs[0])) == len(runs[0]) == 5


def test_one_failure_ends_the_request_and_what_others_had_finished_is_kept() -> None:
    class Breaks(Greedy):
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            if rollout_id.endswith("/r1"):
                raise ServerFailedError("gone")
            return await super().sample(prompt_ids, params, n, rollout_id)

    kept = Kept()
    with pytest.raises(ServerFailedError, match="gone"):
        sample(Breaks([2] * 20), 4, SamplingParams(12), 2, kept)
    chunks = {i: [chunk for index, _, chunk in kept.chunks if index == i] for i in (0, 1)}
    again = Greedy([2] * 20)
    assert [len(c.ids) for c in sample(again, 4, SamplingParams(12), 2, Kept(chunks))] == [12, 12]
    assert all(not name.endswith("r0") or prompt >= 2 + 4 * len(chunks[0]) for prompt, _, _, name in again.requests)
