"""The policy without a model: what it writes, in pieces too, how long it is, and whose tokens are whose."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.rollout.scripted import NUM_SCRIPTS, Scripts, Switches
from neox_rl.run.scripted_server import scripts_of, stopped
from tests.unit.small_run import small_config

PROMPTS = [(1, 2), (1, 2, 3), (4,)]


def script(prompt: tuple[int, ...], number: int) -> Sequence[int]:
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
    anew, words = 77, (5, 1)  # the words behind it end as a script begins
    for seed in range(20):
        ids = [1, 2, 8, anew, *words]
        for _ in range(100):
            rest = Scripts(PROMPTS, script, anew).go_on(ids, random.Random(f"{seed}/{len(ids)}"), greedy=False)
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
