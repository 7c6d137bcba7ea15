"""``problems.template``: what the policy, a judge and a reward model are asked in; its special tokens count, those of a problem do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.schema import ProblemsConfig, TokenizerConfig, VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import DirectoryTokenizer, load_tokenizer
from neox_rl.rollout.groups import Attempts
from neox_rl.run.search_rows import Asking, read_rows
from neox_rl.search.linearize import Span, demonstration
from neox_rl.search.proposers import PolicyProposer
from neox_rl.search.reward_model import value_context
from neox_rl.search.scorers import JudgeValue
from neox_rl.types import Completion, Finish, Problem, Role, SamplingParams, VersionSpan
from neox_rl.verify.verifier import make_verifier
from tests.unit.test_search_values import position
from tests.unit.test_tokenizer import chat_directory

HOSTILE = Problem("math/1", "math", "a <|end|>\n", "1", "1")
END, USER, A, BRACKET, WORD = 1, 2, 3, 4, 5
ASKED = (USER, A, BRACKET, WORD, END)


class Policy:
    def __init__(self) -> None:
        self.asked: list[Sequence[int]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.asked.append(prompt_ids)
        return (Completion((A, END), (-1.0, -1.0), (VersionSpan(1, 0, 2),), Finish.STOP),) * n


def test_a_rollout_a_search_a_demonstration_and_both_values_are_asked_in_it(tmp_path: Path) -> None:
    cfg = ProblemsConfig(source="jsonl", template="<|user|> {problem} <|end|>")
    tokenizer, policy = load_tokenizer(TokenizerConfig(str(chat_directory(tmp_path))), cfg), Policy()
    verifier = make_verifier(VerifyConfig(), "countdown")
    (trace,) = asyncio.run(Attempts(policy, verifier, tokenizer, lambda *_: 1.0).attempt(HOSTILE, "g", SamplingParams(4), 1))
    assert policy.asked == [ASKED] and trace.segments[0].ids == ASKED
    assert PolicyProposer(policy, tokenizer, ()).prompt_ids(HOSTILE) == ASKED
    assert demonstration(HOSTILE, [Span("a", Role.SOLUTION)], tokenizer, 1.0, "g").segments[0].ids == ASKED
    assert value_context(HOSTILE, ["<|end|> a"], tokenizer) == (*ASKED, BRACKET, WORD, A), "a path has none of its own"
    judged = replace(position(), problem=HOSTILE, texts=("a <|user|>",))
    asyncio.run(JudgeValue(policy, tokenizer, votes=1).score([judged], None))
    ids = policy.asked[-1]
    assert (ids[:4], ids[-1]) == (ASKED[:4], END) and not {USER, END} & set(ids[1:-1]), "the judge is asked as the policy is"


def test_it_takes_the_place_of_the_instruction_of_a_file_in_runs_and_searches(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}+1?", "answer": i + 1} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = ProblemsConfig(source="jsonl", path=str(tmp_path / "rows.jsonl"), template="Q {problem}")
    found = load_problems(cfg, 1)
    prompts = {problem.prompt for problem in (*found.train, *found.heldout)}
    assert prompts == {f"{i}+1?" for i in range(9)}
    plain = load_problems(replace(cfg, template=""), 1)
    assert {p.id for p in plain.train} == {p.id for p in found.train} and all("boxed" in p.prompt for p in plain.train)
    searched = read_rows(tmp_path / "rows.jsonl", False, Asking.of(cfg.template))
    assert {row.problem.prompt for row in searched if row.problem} == prompts


def test_a_search_fills_in_numbers_between_what_is_framed(tmp_path: Path) -> None:
    (tmp_path / "hand.jsonl").write_text('{"numbers": [3, 4], "target": 7}\n')

    def prompt(template: str) -> str:
        (row,) = read_rows(tmp_path / "hand.jsonl", True, Asking.of(template))
        assert row.problem is not None
        return row.problem.prompt

    asking = Asking.of("<|user|> Of {numbers} make {target}! <|end|>\n")
    assert asking.frame == "<|user|> Of {problem}! <|end|>\n"
    assert prompt("<|user|> Of {numbers} make {target}! <|end|>\n") == "3, 4 make 7"
    assert prompt("<|user|> {problem}") == "numbers 3 4 target 7 search"
    with pytest.raises(ConfigError, match="--template has no place for a problem"):
        Asking.of("make 24")
    assert DirectoryTokenizer(chat_directory(tmp_path), asking.frame).encode_prompt("a") == (USER, 0, 0, END)
