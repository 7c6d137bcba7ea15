"""Held-out problems: so many at once, each with random numbers of its own, and a failed request is no failed evaluation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.errors import NeoxRLError, ServerFailedError
from neox_rl.rollout.groups import Attempts
from neox_rl.run.evaluation import FILL, Evaluator
from neox_rl.run.pump import MAX_FAILURES
from neox_rl.types import Completion, Finish, Problem, SamplingParams, VersionSpan
from tests.unit.small_run import EveryOtherVerifier, small_config
from tests.unit.test_run_pump import Words

PROBLEMS = [Problem(f"p{i}", "math", f"{i}", "1", f"{i}") for i in range(9)]


class Generator:
    """Notes the seeds, and how many completions were asked for at once. The first ``fail`` requests fail."""

    def __init__(self, fail: int = 0) -> None:
        self.fail, self.running, self.most = fail, 0, 0
        self.seeds: list[int | None] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.running += n
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= n
        if self.fail:
            self.fail -= 1
            raise ServerFailedError(f"{rollout_id}: connection refused")
        self.seeds += [None if params.seed is None else params.seed + j for j in range(n)]
        return tuple(Completion((65, 66), (-0.5,) * 2, (VersionSpan(3, 0, 2),), Finish.STOP) for _ in range(n))


def evaluator(root: Path, generator: Generator, samples: int = 2, max_num_seqs: int = 1) -> Evaluator:
    config: RunConfig = small_config(
        root,
        rollout={"generator": "vllm"},
        servers={"max_num_seqs": max_num_seqs, "num_servers": 2},
        evaluation={"num_problems": 0, "samples": samples},
    )
    attempts = Attempts(generator, EveryOtherVerifier(), Words(), lambda problem, verdict, text, length: float(verdict.correct))
    return Evaluator(config, PROBLEMS, attempts, SamplingParams(8), retry_s=0.0)


def test_no_more_at_once_than_keeps_the_servers_busy(tmp_path: Path) -> None:
    generator = Generator()
    rows, _ = asyncio.run(evaluator(tmp_path, generator).full("final", 1, 3))
    assert generator.most == FILL * 1 * 2, "twice the sequences that two servers of one sequence decode"
    assert [(row["mode"], len(row["per_problem"])) for row in rows] == [("greedy", 9), ("sampled", 18)]


def test_no_two_samples_share_a_seed(tmp_path: Path) -> None:
    generator = Generator()
    asyncio.run(evaluator(tmp_path, generator, samples=3).full("final", 1, 3))
    sampled = [seed for seed in generator.seeds if seed is not None]
    assert len(sampled) == len(set(sampled)) == 27


def test_a_request_that_fails_is_tried_again(tmp_path: Path) -> None:
    rows, _ = asyncio.run(evaluator(tmp_path, Generator(fail=MAX_FAILURES - 1), max_num_seqs=8).full("final", 1, 3))
    assert rows[0]["num_problems"] == 9 and rows[0]["versions"] == [3, 3]


def test_a_request_that_always_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(NeoxRLError, match=rf"final/greedy/p\d failed {MAX_FAILURES} times, .*connection refused"):
        asyncio.run(evaluator(tmp_path, Generator(fail=1000)).full("final", 1, 3))
