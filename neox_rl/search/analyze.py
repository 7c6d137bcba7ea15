"""What a policy's search is worth, beside being right: wrong nodes, false claims, repetition, order and length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from neox_rl.arithmetic import State, legal_moves, solvable
from neox_rl.metacot import GOAL, SOLUTION
from neox_rl.search.dfs import expected_nodes, rules
from neox_rl.search.replay import SILENT, STEP_FLAWS, Flaw, Kind, Played, replay
from neox_rl.types import Problem

CACHED_GAMES = 1 << 14
_STEP, _LEAF, _COMPARE, _BACK, _ANSWER, _JUNK = Kind  # to look a member up in its enum costs more than to compare it
_COMPARISON, _FALSE_GOAL, _MISPLACED, _BACKTRACK = Flaw.COMPARISON, Flaw.FALSE_GOAL, Flaw.MISPLACED, Flaw.BACKTRACK


class SearchAnalysis(msgspec.Struct, frozen=True):
    """Counts of one output. ``num_`` fields count events.

    ``reached_goal``: a true goal at the end of a path without a wrong step. ``nodes_to_goal``: steps up to the first
    of them, None without one. ``expected_nodes``: their mean for a depth-first search of this problem in random
    order. ``num_search_words``: words of the search, the solution left out. ``first_on_path``: the first root step is
    right and leads to a state that still holds a solution; ``first_on_path_chance``: the probability of that for a
    step drawn evenly from the legal ones.
    """

    num_nodes: int
    num_wrong: int
    num_repeated: int
    num_leaves: int
    num_dead_ends: int
    num_wrong_comparisons: int
    num_false_goals: int
    num_misplaced: int
    num_illegal_backtracks: int
    num_early_backtracks: int
    num_junk_words: int
    num_tokens: int
    num_words: int
    num_search_words: int
    has_answer: bool
    reached_goal: bool
    nodes_to_goal: int | None
    expected_nodes: float
    first_on_path: bool
    first_on_path_chance: float


def analyze(problem: Problem, text: str, num_tokens: int | None = None) -> SearchAnalysis:
    """Analyze the completion ``text`` of an arithmetic problem. ``num_tokens``: its length, the number of words when None.

    A back is early when a legal step of the state it leaves was not tried; the root's is not counted among them.
    """
    _, target, max_value = game = rules(problem)
    played = replay(problem, text)
    kinds, flaws = [p.kind for p in played], [p.flaw for p in played if p.flaw is not None]
    nodes = [p for p in played if p.kind is _STEP or p.kind is _LEAF]
    goal = _first_goal(played)
    written = text.split()
    words = [word for word in written if word not in SILENT]
    hopeful, chance, expected = _outlook(game)
    return SearchAnalysis(
        num_nodes=len(nodes),
        num_wrong=sum([flaw in STEP_FLAWS for flaw in flaws]),
        num_repeated=sum([p.repeated for p in nodes]),
        num_leaves=kinds.count(_LEAF),
        num_dead_ends=sum([p.kind is _LEAF and p.after != (target,) for p in nodes]),
        num_wrong_comparisons=flaws.count(_COMPARISON),
        num_false_goals=flaws.count(_FALSE_GOAL),
        num_misplaced=flaws.count(_MISPLACED),
        num_illegal_backtracks=flaws.count(_BACKTRACK),
        num_early_backtracks=_early_backtracks(played, max_value) if _BACK in kinds else 0,
        num_junk_words=sum([len(p.text.split()) for p in played if p.kind is _JUNK]) if _JUNK in kinds else 0,
        num_tokens=len(written) if num_tokens is None else num_tokens,
        num_words=len(words),
        num_search_words=words.index(SOLUTION) if SOLUTION in words else len(words),
        has_answer=bool(kinds) and kinds[-1] is _ANSWER and played[-1].text != "",
        reached_goal=goal is not None,
        nodes_to_goal=None if goal is None else kinds[:goal].count(_STEP) + kinds[:goal].count(_LEAF),
        expected_nodes=expected,
        first_on_path=bool(nodes) and nodes[0].sound and nodes[0].after in hopeful,
        first_on_path_chance=chance,
    )


@lru_cache(CACHED_GAMES)
def _outlook(game: tuple[State, int, int]) -> tuple[frozenset[State], float, float]:
    """Of a game: the states after a first step that still hold a solution, the chance of one, ``expected_nodes``."""
    root, target, max_value = game
    moves = legal_moves(root, max_value)
    hopeful = frozenset(move.after for move in moves if solvable(move.after, target, max_value))
    return hopeful, len(hopeful) / len(moves), expected_nodes(root, target, max_value)


def summarize(analyses: Sequence[SearchAnalysis]) -> dict[str, float]:
    """Rates over many outputs; a rate with nothing to count over is left out.

    ``search_effort``: steps to the goal over the expected number, summed over the outputs that reached it. Below 1
    may mean better order or only that hard problems fail; compare it between policies on the same problems.
    """
    total = {name: sum(getattr(a, name) for a in analyses) for name in SearchAnalysis.__struct_fields__ if name.startswith("num_")}
    reached = [a for a in analyses if a.nodes_to_goal is not None]
    outputs, nodes = len(analyses), total["num_nodes"]
    rates = {
        "outputs": float(outputs),
        "wrong_nodes_per_output": _ratio(total["num_wrong"], outputs),
        "wrong_nodes_frac": _ratio(total["num_wrong"], nodes),
        "repeated_nodes_frac": _ratio(total["num_repeated"], nodes),
        "wrong_comparisons_frac": _ratio(total["num_wrong_comparisons"], total["num_leaves"]),
        "false_goals_per_output": _ratio(total["num_false_goals"], outputs),
        "illegal_backtracks_per_output": _ratio(total["num_illegal_backtracks"], outputs),
        "early_backtracks_per_output": _ratio(total["num_early_backtracks"], outputs),
        "misplaced_per_output": _ratio(total["num_misplaced"], outputs),
        "junk_words_per_output": _ratio(total["num_junk_words"], outputs),
        "search_words_frac": _ratio(total["num_search_words"], total["num_words"]),
        "answer_frac": _ratio(sum(a.has_answer for a in analyses), outputs),
        "reached_goal_frac": _ratio(len(reached), outputs),
        "first_on_path_frac": _ratio(sum(a.first_on_path for a in analyses), outputs),
        "first_on_path_chance": _ratio(sum(a.first_on_path_chance for a in analyses), outputs),
        "mean_nodes": _ratio(nodes, outputs),
        "mean_dead_ends": _ratio(total["num_dead_ends"], outputs),
        "mean_tokens": _ratio(total["num_tokens"], outputs),
        "mean_nodes_to_goal": _ratio(sum(a.nodes_to_goal or 0 for a in reached), len(reached)),
        "search_effort": _ratio(sum(a.nodes_to_goal or 0 for a in reached), sum(a.expected_nodes for a in reached)),
    }
    return {name: rate for name, rate in rates.items() if not math.isnan(rate)}


def _first_goal(played: Sequence[Played]) -> int | None:
    """Index of the first true claim of a goal on a sound path."""
    for i, p in enumerate(played):
        if p.kind is _COMPARE and p.text == GOAL and p.flaw is None and p.sound:
            return i
    return None


def _early_backtracks(played: Sequence[Played], max_value: int) -> int:
    tried: dict[State, set[State]] = {}
    early = 0
    for p in played:
        if p.kind is _STEP or p.kind is _LEAF:
            tried.setdefault(p.before, set()).add(p.after)
        elif p.kind is _BACK and p.flaw is None:
            early += not tried.get(p.before, set()) >= _after(p.before, max_value)
    return early


@lru_cache(CACHED_GAMES)
def _after(state: State, max_value: int) -> frozenset[State]:
    """The states that legal steps lead to."""
    return frozenset(move.after for move in legal_moves(state, max_value))


def _ratio(count: float, base: float) -> float:
    return count / base if base else math.nan  # left out of the summary
