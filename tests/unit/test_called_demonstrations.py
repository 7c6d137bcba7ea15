"""Worked solutions that call the calculator: shown word for word as a rollout of the run with that tool has them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from neox_rl.config.schema import TokenizerConfig
from neox_rl.problems import make_tokenizer, make_word_problems
from neox_rl.problems.sources import problems_of_run
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.rollout.groups import Attempts
from neox_rl.run.called_demonstrations import turns
from neox_rl.run.demonstrating import demonstration_source
from neox_rl.run.makers import make_maker
from neox_rl.run.tools import make_tool
from neox_rl.types import Completion, Finish, Role, SamplingParams, VersionSpan
from neox_rl.verify.verifier import make_verifier
from tests.unit.small_run import small_config


def test_each_call_ends_a_turn_and_the_answer_is_the_calculator_s() -> None:
    told = list(turns("First [CALC 9 + 4] [CALC 13 / 0] The answer is \\boxed{13}."))
    assert told == [
        ("First [CALC 9 + 4]", "\n= 13\n"),
        ("[CALC 13 / 0]", "\n= error: division by zero\n"),
        ("The answer is \\boxed{13}.", ""),
    ]
    assert list(turns("[CALC 1 + 1]")) == [("[CALC 1 + 1]", "\n= 2\n")] and list(turns("No call.")) == [("No call.", "")]


@dataclass
class Replayed:
    """Writes what it is given, whatever it is asked."""

    script: list[tuple[int, ...]]

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        ids = self.script.pop(0)
        return (Completion(ids, (-0.5,) * len(ids), (VersionSpan(0, 0, len(ids)),), Finish.STOP),)


def test_a_policy_that_writes_what_it_was_shown_has_the_same_context_and_is_right(tmp_path: Path) -> None:
    path, directory = tmp_path / "problems.jsonl", tmp_path / "tokenizer"
    assert make_word_problems.main(["--num", "60", "--max-value", "99", "--calls", "--out", str(path)]) == 0
    assert make_tokenizer.main([str(path), "--vocab", "300", "--out", str(directory)]) == 0
    config = small_config(
        tmp_path,
        problems={"source": "jsonl", "path": str(path)},
        rollout={"method": "episodes", "max_new_tokens": 150},
        episodes={"count": 1, "tool": "calculator"},
        warmstart={"style": "written", "steps": 2},
    )
    neox, metarl = replace(config.neox, seq_length=400), replace(config.metarl, tokenizer=TokenizerConfig(str(directory)))
    config = replace(config, neox=neox, metarl=metarl)
    tokenizer = load_tokenizer(metarl.tokenizer, metarl.problems)
    problems = problems_of_run(config, tokenizer).train
    draw, by_id, rng = demonstration_source(config, problems, tokenizer), {p.id: p for p in problems}, random.Random(3)
    policy, called = Replayed([]), 0
    with ExitStack() as stack:
        verifier = make_verifier(metarl.verify, "math")
        stack.callback(verifier.close)
        attempts = Attempts(policy, verifier, tokenizer, lambda problem, verdict, text, tokens: float(verdict.correct))
        made = make_maker(config, attempts, make_tool(config, stack))

        async def played() -> None:
            nonlocal called
            for i in range(20):
                (shown,) = draw(rng, f"g{i:06d}")
                policy.script = [s.ids for s in shown.segments if s.role is Role.THINK]
                (trace,) = (await made.group(by_id[shown.problem_id], i, SamplingParams(150), 1)).traces
                assert trace.verdict.correct and not policy.script
                assert [(s.ids, s.role, s.mask) for s in trace.segments] == [(s.ids, s.role, s.mask) for s in shown.segments]
                called += sum(s.role is Role.ENV for s in trace.segments)

        asyncio.run(played())
    assert called >= 10
