"""Groups of rollouts of several episodes as a run makes them: credit, discounts in turn, demonstrations, evaluation by episode."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neox_rl.codec import decode_group, encode_group
from neox_rl.config.derived import symbolic_words, words_around
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import TokenizerConfig
from neox_rl.episodes.tools import Tool
from neox_rl.errors import ConfigError
from neox_rl.metacot import TAGS, UNKNOWN
from neox_rl.ports import Tokenizer
from neox_rl.problems.make_tokenizer import EOS, MIN_VOCAB, PAD, train_tokenizer
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer, save_hf
from neox_rl.rollout.groups import Attempts
from neox_rl.run.demonstrating import demonstration_source
from neox_rl.run.episode_demonstrations import AGAIN_FRAC
from neox_rl.run.episode_groups import EpisodeGroups
from neox_rl.run.evaluation import Evaluator
from neox_rl.run.makers import make_maker
from neox_rl.run.tools import make_tool
from neox_rl.types import Completion, Finish, Problem, Role, SamplingParams, VersionSpan
from neox_rl.verify.verifier import make_verifier
from tests.unit.small_run import small_config

DOORS, SIZE = 4, 3
PARAMS = SamplingParams(2)
HASTE, *_, LEISURE = TAGS


def goals(root: Path, source: str = "goal_finding", baseline: str = "mean", **episodes: object) -> RunConfig:
    return small_config(
        root,
        problems={"source": source, "num_goals": DOORS, "max_number": 6, "max_target": 20, "max_value": 36},
        rollout={"method": "episodes", "max_new_tokens": 2 if source == "goal_finding" else 40},
        episodes={"count": 3, **episodes},
        warmstart={"style": "episodes", "steps": 2},
        objective={"baseline": baseline},
    )


class Guesser:
    """Writes ``script``; without one, rollout r<i> names door i + 1 first, and the next one each time. It knows nothing of the goal."""

    def __init__(self, tokenizer: SymbolicTokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[str, str, int | None]] = []
        self.script: list[tuple[int, ...]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        text = self.tokenizer.decode(prompt_ids)
        self.asked.append((rollout_id, text, params.seed))
        door = (int(rollout_id[-1]) + text.count("[EPISODE")) % DOORS + 1
        ids = self.script.pop(0) if self.script else (*self.tokenizer.encode(str(door)), self.tokenizer.eos_id)
        return (Completion(ids, (-0.5,) * len(ids), (VersionSpan(4, 0, len(ids)),), Finish.STOP),)


def maker(config: RunConfig) -> tuple[EpisodeGroups, Guesser]:
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    assert isinstance(tokenizer, SymbolicTokenizer)
    verifier, guesser = make_verifier(config.metarl.verify, config.metarl.problems.source), Guesser(tokenizer)
    made = make_maker(config, Attempts(guesser, verifier, tokenizer, lambda problem, verdict, text, tokens: float(verdict.correct)))
    assert isinstance(made, EpisodeGroups)
    return made, guesser


def hidden_at(config: RunConfig, door: int) -> Problem:
    return next(p for p in load_problems(config.metarl.problems, 1).train if p.answer == str(door))


@pytest.mark.parametrize(
    ("objective", "rewards", "advantages"),
    [
        # Rollouts are -+- (doors 1 2 3), +-- (2 3 4) and --- (3 4 1). Worth of each episode, less its mean over the three rollouts:
        ("sum", (1.0, 1.0, 0.0), ((1 / 3, 2 / 3, 0.0), (1 / 3, -1 / 3, 0.0), (-2 / 3, -1 / 3, 0.0))),
        ("any", (1.0, 1.0, 0.0), ((1 / 3, 2 / 3, 0.0), (1 / 3, -1 / 3, 0.0), (-2 / 3, -1 / 3, 0.0))),
        ("first", (0.0, 1.0, 0.0), ((-1 / 3, 0.0, 0.0), (2 / 3, 0.0, 0.0), (-1 / 3, 0.0, 0.0))),
        ("final", (0.0, 0.0, 0.0), ((None,) * 3,) * 3),
    ],
)
def test_each_episode_is_credited_with_what_it_could_still_bring_about(
    tmp_path: Path, objective: str, rewards: tuple[float, ...], advantages: tuple[tuple[float | None, ...], ...]
) -> None:
    config = goals(tmp_path, objective=objective)
    made, _ = maker(config)
    group = asyncio.run(made.group(hidden_at(config, 2), 7, PARAMS, SIZE))
    assert [trace.verdict.extracted for trace in group.traces] == ["-+-", "+--", "---"]
    assert tuple(trace.reward for trace in group.traces) == rewards
    for trace, expected in zip(group.traces, advantages, strict=True):
        written = [s for s in trace.segments if s.mask]
        assert [s.advantage for s in written] == [None if a is None else pytest.approx(a) for a in expected]
        assert all(s.advantage is None and s.role in (Role.PROMPT, Role.ENV) for s in trace.segments if not s.mask)
    assert decode_group(encode_group(group)) == group


def test_tickets_take_the_discounts_in_turn_and_the_prompt_says_which(tmp_path: Path) -> None:
    config = goals(tmp_path, gammas=(1.0, 0.5))
    made, guesser = maker(config)
    problem = hidden_at(config, 1)
    hasty, patient = (asyncio.run(made.group(problem, ticket, PARAMS, 1)).traces[0] for ticket in (1, 2))
    assert (hasty.reward, patient.reward) == (0.5**2, 1.0)
    (evaluated,) = asyncio.run(made.attempt(problem, "final", PARAMS, 1))
    assert evaluated.reward == 1.0
    tags = [" ".join(text.split("door. ")[1].split(" ")[:3]).strip() for _, text, _ in guesser.asked[::3]]
    assert tags == ["work quickly", "take your time", "take your time"]
    assert not any(UNKNOWN in text for _, text, _ in guesser.asked)


class Hasty(Guesser):
    """Names no door where it is to work quickly."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.script = [(self.tokenizer.eos_id,)] if HASTE in self.tokenizer.decode(prompt_ids) else []
        return await super().sample(prompt_ids, params, n, rollout_id)


def test_an_evaluation_at_the_ends_of_a_run_asks_under_every_discount(tmp_path: Path) -> None:
    """Whether the tag for haste makes answers shorter is what it is there for."""
    config = goals(tmp_path, gammas=(1.0, 0.5))
    made, guesser = maker(config)
    guesser = Hasty(guesser.tokenizer)
    made = replace(made, attempts=replace(made.attempts, generator=guesser))
    evaluator = Evaluator(config, [hidden_at(config, 2)], made, PARAMS, retry_s=0.0)
    assert "by_tag" not in asyncio.run(evaluator.small("step 1", 1, 4))
    assert all(LEISURE in text for _, text, _ in guesser.asked)
    guesser.asked.clear()
    rows, attempts = asyncio.run(evaluator.full("final", 1, 4))
    hasty, patient = ({name for name, text, _ in guesser.asked if tag in text} for tag in (HASTE, LEISURE))
    assert hasty and patient and not hasty & patient, "both, by names of their own"
    for row in rows:
        by_tag = [(tag, found["accuracy"]["mean"], found["tokens"]["mean"]) for tag, found in row["by_tag"].items()]
        assert by_tag == [(HASTE, 0.0, 3.0), (LEISURE, 1.0, 6.0)] and row["accuracy"]["mean"] == 1.0
    assert [attempt.num_tokens for attempt in attempts] == [6]


def test_tags_are_words_of_the_vocabulary_also_where_a_rollout_has_one_episode(tmp_path: Path) -> None:
    config = goals(tmp_path, source="countdown", count=1, gammas=(0.5, 0.9, 1.0))
    made, guesser = maker(config)
    problem = load_problems(config.metarl.problems, 1).train[0]
    for ticket in range(3):
        asyncio.run(made.group(problem, ticket, SamplingParams(40), 1))
    assert [text.split("search ")[1] for _, text, _ in guesser.asked] == ["work quickly", "take a moment", "take your time"]


@pytest.mark.parametrize("feedback", ["none", "binary", "text"])
@pytest.mark.parametrize("source", ["goal_finding", "countdown", "game24"])
def test_demonstrations_show_the_forms_in_words_that_the_vocabulary_has(tmp_path: Path, source: str, feedback: str) -> None:
    config = goals(tmp_path, source=source, feedback=feedback, count=4, gammas=(0.9, 1.0))
    if source == "game24":
        config = goals(tmp_path, source="countdown", feedback=feedback, count=4)
    problems = load_problems(config.metarl.problems, 1).train
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    draw, rng = demonstration_source(config, problems, tokenizer), random.Random(3)
    traces = [draw(rng, f"g{i:06d}")[0] for i in range(200)]
    texts = [tokenizer.decode([i for s in trace.segments for i in s.ids]) for trace in traces]
    assert not any(UNKNOWN in text for text in texts)
    assert all((s.mask == 1.0) == (s.role is Role.THINK) for trace in traces for s in trace.segments)
    most = max(s.episode for trace in traces for s in trace.segments)
    written = [s for trace in traces for s in trace.segments if s.mask]
    assert most == 3 and all(s.ids[-1] == tokenizer.eos_id and len(s.ids) <= config.metarl.rollout.max_new_tokens for s in written)
    if source == "goal_finding":
        doors = [text.split("[EPISODE 3]")[1].split("[EPISODE")[0].split()[-1] for text in texts]
        assert {*doors} == {str(door) for door in range(1, DOORS + 1)}
    else:
        assert any("[RESET s" in text and " from s" in text for text in texts) and any(text.endswith("[STOP]") for text in texts)


def test_guesses_that_are_shown_look_back_at_those_before_and_use_nothing_of_what_was_said(tmp_path: Path) -> None:
    """Without looking back the warm start would teach a policy that RL cannot teach to remember; with use of it, what RL is to find."""
    config = goals(tmp_path, count=DOORS)
    problems = load_problems(config.metarl.problems, 1).train
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    draw, rng, goal = demonstration_source(config, problems, tokenizer), random.Random(7), {p.id: p.answer for p in problems}
    again: dict[bool, list[bool]] = {True: [], False: []}
    right = list[list[bool]]()
    for i in range(2000):
        trace = draw(rng, f"g{i:06d}")[0]
        doors = [tokenizer.decode(s.ids) for s in trace.segments if s.mask]
        right.append([door == goal[trace.problem_id] for door in doors])
        again[doors[0] == goal[trace.problem_id]].append(doors[1] == doors[0])
    assert np.mean(right, axis=0) == pytest.approx([1 / DOORS] * DOORS, abs=0.05)
    expected = AGAIN_FRAC + (1 - AGAIN_FRAC) / DOORS
    assert [np.mean(again[said]) for said in (True, False)] == pytest.approx([expected] * 2, abs=0.08)


def test_what_is_shown_of_countdown_is_right_at_last_by_the_run_s_own_judgement(tmp_path: Path) -> None:
    """Each demonstration is played again, word for word, as a policy's rollout: all but its last episode are wrong."""
    config = goals(tmp_path, source="countdown", count=3)
    problems = load_problems(config.metarl.problems, 1).train
    made, guesser = maker(config)
    draw, by_id, rng = demonstration_source(config, problems, guesser.tokenizer), {p.id: p for p in problems}, random.Random(5)
    for i in range(60):
        (trace,) = draw(rng, f"g{i:06d}")
        guesser.script = [s.ids for s in trace.segments if s.mask]
        wanted = len(guesser.script)
        played = asyncio.run(made.group(by_id[trace.problem_id], i, PARAMS, 1)).traces[0]
        assert played.verdict.extracted == "-" * (wanted - 1) + "+" and not guesser.script
        assert [s.ids for s in played.segments] == [s.ids for s in trace.segments]


def test_an_evaluation_tells_what_was_found_by_each_episode(tmp_path: Path) -> None:
    config = goals(tmp_path)
    made, _ = maker(config)
    problems = [hidden_at(config, door) for door in (1, 2, 3, 4)]
    rows, attempts = asyncio.run(Evaluator(config, problems, made, PARAMS, retry_s=0.0).full("final", 1, 4))
    assert [a.trace.verdict.extracted for a in attempts] == ["+--", "-+-", "--+", "---"]
    assert [i["mean"] for i in rows[0]["found_by"]] == [0.25, 0.5, 0.75] and [i["mean"] for i in rows[0]["right_in"]] == [0.25] * 3
    assert rows[0]["accuracy"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("objective", "right", "solved_in"),
    [
        ("sum", [1, 1, 1, 0], "one of the episodes"),
        ("any", [1, 1, 1, 0], "one of the episodes"),
        ("final", [0, 0, 1, 0], "the last episode"),
        ("first", [1, 0, 0, 0], "the first episode"),
    ],
)
def test_accuracy_is_of_the_episode_that_the_objective_counts(tmp_path: Path, objective: str, right: list[int], solved_in: str) -> None:
    """One that is right early and wrong at last has earned nothing under ``final``: right it is not either."""
    config = goals(tmp_path, objective=objective)
    made, _ = maker(config)
    problems = [hidden_at(config, door) for door in (1, 2, 3, 4)]
    (row, _), attempts = asyncio.run(Evaluator(config, problems, made, PARAMS, retry_s=0.0).full("final", 1, 4))
    assert [a.trace.verdict.extracted for a in attempts] == ["+--", "-+-", "--+", "---"]
    assert [correct for _, _, correct, _ in row["per_problem"]] == right == [int(a.trace.reward > 0) for a in attempts]
    assert row["accuracy"]["mean"] == sum(right) / 4 and row["solved_in"] == solved_in


def test_of_one_episode_nobody_says_which_counts(tmp_path: Path) -> None:
    config = goals(tmp_path, count=1)
    (row, _), _ = asyncio.run(Evaluator(config, [hidden_at(config, 1)], maker(config)[0], PARAMS, retry_s=0.0).full("final", 1, 4))
    assert row["found_by"] == row["right_in"] == [row["accuracy"]] and "solved_in" not in row


def test_samples_of_an_evaluation_have_seeds_of_their_own(tmp_path: Path) -> None:
    config = goals(tmp_path)
    made, guesser = maker(config)
    params = SamplingParams(2, seed=100)
    asyncio.run(made.attempt(hidden_at(config, 4), "final", params, SIZE))
    seeds = [seed for _, _, seed in guesser.asked]
    assert None not in seeds and len(set(seeds)) == 3 * SIZE


def test_the_vocabulary_grows_with_the_episodes_alone(tmp_path: Path) -> None:
    problems = goals(tmp_path, source="countdown").metarl.problems
    once, more = symbolic_words(problems), symbolic_words(problems, words_around(goals(tmp_path, source="countdown", count=5)))
    assert more[: len(once)] == once and {"[EPISODE", "5]", "[STOP]", "s9]", "quickly"} <= {*more} - {*once}


def test_a_tool_is_made_for_episodes_alone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert make_tool(goals(tmp_path), stack) is None and make_tool(small_config(tmp_path), stack) is None
        calculator = make_tool(goals(tmp_path, tool="calculator"), stack)
        python = make_tool(goals(tmp_path, tool="python"), stack)
        assert calculator is not None and python is not None

        async def said(tool: Tool, text: str) -> str | None:
            return await tool(text)

        assert asyncio.run(said(calculator, "[CALC 2 * 3]")) == "\n= 6\n"
        assert asyncio.run(said(python, "[PYTHON]\nprint(2 * 3)\n[/PYTHON]")) == "\n> 6\n"


class Counter:
    """Asks the calculator for a door, and names the one that it said: 1 in the first episode, 2 in the second ..."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        first, *later = self.tokenizer.decode(prompt_ids).split("[EPISODE")
        here, number = (later[-1] if later else first), len(later)
        said = here.rpartition("\n= ")[2].split("\n")[0] if "\n= " in here else f"[CALC 1 + {number}]"
        ids = (*self.tokenizer.encode(said), self.tokenizer.eos_id)
        return (Completion(ids, (-0.5,) * len(ids), (VersionSpan(4, 0, len(ids)),), Finish.STOP),)


def test_a_policy_that_asks_the_calculator_in_each_episode_is_judged_by_what_it_says_afterwards(tmp_path: Path) -> None:
    """The run's maker, tool, tokenizer from a directory and verifier."""
    save_hf(train_tokenizer(["door"], MIN_VOCAB), {"pad_token": PAD, "eos_token": EOS}, tmp_path / "tokenizer")
    config = goals(tmp_path, tool="calculator", objective="any")
    blocks = {"tokenizer": TokenizerConfig(str(tmp_path / "tokenizer")), "rollout": replace(config.metarl.rollout, max_new_tokens=40)}
    config = replace(config, neox=replace(config.neox, seq_length=400), metarl=replace(config.metarl, **blocks))
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    verifier = make_verifier(config.metarl.verify, config.metarl.problems.source)
    attempts = Attempts(Counter(tokenizer), verifier, tokenizer, lambda problem, verdict, text, tokens: float(verdict.correct))
    with ExitStack() as stack:
        made = make_maker(config, attempts, make_tool(config, stack))
        group = asyncio.run(made.group(hidden_at(config, 2), 7, SamplingParams(40), 1))
    (trace,) = group.traces
    assert (trace.verdict.extracted, trace.reward) == ("-+-", 1.0)
    told = [(s.role is Role.ENV, tokenizer.decode(s.ids).strip()) for s in trace.segments[1:]]
    assert told[:6] == [
        (False, "[CALC 1 + 0]"),
        (True, "= 1"),
        (False, "1"),
        (True, "[EPISODE 2] wrong"),
        (False, "[CALC 1 + 1]"),
        (True, "= 2"),
    ]
    assert decode_group(encode_group(group)) == group


def test_problems_that_nobody_can_attempt_here_are_refused(tmp_path: Path) -> None:
    problem = Problem("math/1", "math", "1 + 1?", "2", "1")
    config = goals(tmp_path)
    with pytest.raises(ConfigError, match="nobody shows attempts"):
        demonstration_source(config, [problem], load_tokenizer(config.metarl.tokenizer, config.metarl.problems))
