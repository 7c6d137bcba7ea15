"""How sound the searches are that a policy wrote, by whatever language they are in: the numbers of a row's ``search``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.search.analyze import SearchAnalysis, analyze, summarize
from neox_rl.search.analyze_lines import LinesAnalysis, analyze_lines, summarize_lines
from neox_rl.types import Problem

Analysis: TypeAlias = SearchAnalysis | LinesAnalysis
TEXT_TASK = "math"


def analysis_of(problem: Problem, text: str, num_tokens: int) -> Analysis | None:
    """Of the completion ``text``; None for a task whose answers are no search."""
    if problem.task in ARITHMETIC_TASKS:
        return analyze(problem, text, num_tokens)
    return analyze_lines(text) if problem.task == TEXT_TASK else None


def summary(analyses: Sequence[Analysis]) -> dict[str, float]:
    """Rates over them, by the names of ``telemetry.rows.SEARCH_METRICS``; empty where there is nothing."""
    games = [a for a in analyses if isinstance(a, SearchAnalysis)]
    if games:
        return summarize(games)
    lines = [a for a in analyses if isinstance(a, LinesAnalysis)]
    return summarize_lines(lines) if lines else {}
