"""The policy without a model: what it writes, in pieces too, how long it is, and whose tokens are whose."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.schema import TokenizerConfig
from neox_rl.ports import Tokenizer
from neox_rl.problems.make_tokenizer import EOS, MIN_VOCAB, PAD, train_tokenizer
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer, save_hf
from neox_rl.rollout.scripted import NUM_SCRIPTS, Scripts, Switches
from neox_rl.run.scripted_server import scripts_of, stopped
from neox_rl.types import Problem
from tests.unit.small_run import small_config

PROMPTS = [(1, 2), (1, 2, 3), (4,)]


def script(prompt: tuple[int, ...], number: int, heard: str = "") -> Sequence[int]:
    return (*prompt, 100 + number % 2, *range(200, 200 + number), 9)


def test_a_completion_asked_for_in_pieces_is_one_of_the_scripts() -> None:
    for seed in range(20):
        ids = [1, 2]
        for _ in range(100):  # each piece from a server of its own
            rest = Scripts(PROMPTS, script).go_on(ids, random.Random(f"{seed}/{len(ids)}"), greedy=False)
            ids += rest[:5]
            if len(rest) <= 5:
                break
        assert tuple(ids[2:]) in {script((1, 2), number) for number in range(NUM_SCRIPTS)}


def test_a_completion_behind_another_one_is_asked_for_in_pieces_too() -> None:
    marker, words = 77, (5, 1)  # the words behind it end as a script begins

    def said(begun: tuple[int, ...]) -> tuple[tuple[int, ...], str] | None:
        return (begun[begun.index(marker) :], "") if marker in begun else None

    for seed in range(20):
        ids = [1, 2, 8, marker, *words]
        for _ in range(100):
            rest = Scripts(PROMPTS, script, said).go_on(ids, random.Random(f"{seed}/{len(ids)}"), greedy=False)
            ids += rest[:5]
            if len(rest) <= 5:
                break
        assert tuple(ids[6:]) in {script((1, 2), number) for number in range(NUM_SCRIPTS)}


def test_greedy_is_always_the_same_and_what_no_script_says_is_refused() -> None:
    scripts = Scripts(PROMPTS, script)
    assert {scripts.go_on((4,), random.Random(i), greedy=True) for i in range(9)} == {script((4,), 0)}
    for unknown in ((7,), (1,), (), (4, 999), (*(4,), *script((4,), 0), 9)):
        with pytest.raises(KeyError, match="none of the run's, or goes on as no script does"):
            scripts.go_on(unknown, random.Random(0), greedy=False)


def with_tool(root: Path, tool: str, source: str = "goal_finding") -> tuple[Scripts, Tokenizer, Problem]:
    """Of a run whose episodes have the tool, and one of its problems."""
    save_hf(train_tokenizer(["door"], MIN_VOCAB), {"pad_token": PAD, "eos_token": EOS}, root / "tokenizer")
    problems = {"source": source, "max_number": 6, "max_target": 20, "max_value": 36}
    config = small_config(
        root, rollout={"method": "episodes", "max_new_tokens": 40}, episodes={"count": 3, "tool": tool}, problems=problems
    )
    config = replace(config, metarl=replace(config.metarl, tokenizer=TokenizerConfig(str(root / "tokenizer"))))
    problem = load_problems(config.metarl.problems, config.metarl.seed).train[0]
    return scripts_of(config), load_tokenizer(config.metarl.tokenizer, config.metarl.problems), problem


def said(scripts: Scripts, tokenizer: Tokenizer, ids: Sequence[int], seed: int) -> str:
    written = scripts.go_on(ids, random.Random(seed), greedy=False)
    assert written[-1] == tokenizer.eos_id and tokenizer.eos_id not in written[:-1]
    return tokenizer.decode(written)


@pytest.mark.parametrize("tool", ["calculator", "python"])
def test_a_script_calls_the_tool_reads_its_answer_and_calls_again_in_a_later_episode(tmp_path: Path, tool: str) -> None:
    scripts, tokenizer, problem = with_tool(tmp_path, tool)
    prompt, mark = tokenizer.encode_prompt(problem.prompt), "[CALC" if tool == "calculator" else "[PYTHON]"
    first = {said(scripts, tokenizer, prompt, seed) for seed in range(400)}
    calls = {text for text in first if text.startswith(mark)}
    assert first - calls == {str(door) for door in range(1, 7)} and any("1 / 0" in call for call in calls)
    assert any("while True" in call for call in calls) == (tool == "python")
    begun = (*prompt, *tokenizer.encode(calls.pop()), tokenizer.eos_id)
    answered = (*begun, *tokenizer.encode("\n= 5\n" if tool == "calculator" else "\n> 5\n"))
    assert {said(scripts, tokenizer, answered, seed) for seed in range(50)} == {"5"}
    failed = (*begun, *tokenizer.encode("\n= error: division by zero\n"))
    assert {said(scripts, tokenizer, failed, seed) for seed in range(400)} == {str(door) for door in range(1, 7)}
    later = (*answered, *tokenizer.encode("5"), tokenizer.eos_id, *tokenizer.encode("\n[EPISODE 2] wrong\n"))
    assert {said(scripts, tokenizer, later, seed).startswith(mark) for seed in range(50)} == {True, False}
    cut = (*prompt, *tokenizer.encode(first.pop())[:1], *tokenizer.encode("\n[EPISODE 2] wrong\n"))
    assert {said(scripts, tokenizer, cut, seed).startswith(mark) for seed in range(50)} == {True, False}


def test_in_the_arithmetic_games_a_search_follows_a_call(tmp_path: Path) -> None:
    scripts, tokenizer, problem = with_tool(tmp_path, "calculator", "countdown")
    prompt = tokenizer.encode_prompt(problem.prompt)
    calls = {text for seed in range(60) if (text := said(scripts, tokenizer, prompt, seed)).startswith("[CALC")}
    numbers = problem.meta["numbers"]
    assert isinstance(numbers, list) and calls == {f"[CALC {numbers[0]} * {numbers[1]}]", "[CALC 1 / 0]"}
    answered = (*prompt, *tokenizer.encode(calls.pop()), tokenizer.eos_id, *tokenizer.encode("\n= 7\n"))
    searches = {said(scripts, tokenizer, answered, seed) for seed in range(400)}
    assert all(" =" in text for text in searches)
    for seed in range(5):
        ids = list(answered)
        while ids[-1] != tokenizer.eos_id:  # in pieces, each from a server that knows of no other
            ids += scripts.go_on(ids, random.Random(f"{seed}/{len(ids)}"), greedy=False)[:25]
        assert tokenizer.decode(ids[len(answered) :]) in searches


def test_a_completion_ends_with_the_first_stop_token() -> None:
    assert stopped((5, 6, 7, 6), {6}) == (5, 6) and stopped((5, 6), {7}) == (5, 6) and stopped((), {7}) == ()


def test_spans_follow_the_clock() -> None:
    switches = Switches()
    assert switches.spans(2, 10.0, 1.0) == [{"version": "default", "start": 0, "end": 2}]
    switches.add(0.0, "4")
    switches.add(12.5, "5")
    assert switches.spans(4, 10.0, 1.0) == [{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 4}]
    assert switches.spans(0, 10.0, 1.0) == [] and switches.label == "5"


def test_lengths_have_the_law_of_the_config(tmp_path: Path) -> None:
    config = small_config(tmp_path, scripted={"mean_tokens": 40, "sigma": 0.5})
    problems, tokenizer = load_problems(config.metarl.problems, 1), load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    scripts, rng = scripts_of(config), random.Random(0)
    prompts = [tokenizer.encode(problem.prompt) for problem in problems.train]
    lengths = [len(scripts.go_on(rng.choice(prompts), rng, greedy=False)) for _ in range(2000)]
    assert statistics.fmean(lengths) == pytest.approx(40, rel=0.1)
    assert statistics.stdev(map(math.log, lengths)) == pytest.approx(0.5, rel=0.15)
    own = replace(config, metarl=replace(config.metarl, scripted=replace(config.metarl.scripted, mean_tokens=0)))
    assert max(len(scripts_of(own).go_on(prompt, rng, greedy=True)) for prompt in prompts) < 200
