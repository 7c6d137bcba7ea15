"""What is wrong with a search that a policy wrote as lines of text: moves that cannot be, false arithmetic, repetition. Never raises."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from neox_rl.search.domain import BACK_LINE, MARKER_LINES, RIGHT_LINE, SOLUTION_LINE, WRONG_LINE

_NUMBER = r"(-?[0-9]{1,12}(?:\.[0-9]{1,6})?)"
_EQUATION = re.compile(rf"(?<![\w.*/+-])(?<![-+*/×÷] ){_NUMBER}\s*([-+*/×÷])\s*{_NUMBER}\s*=\s*{_NUMBER}(?![\w*/]|\.[0-9])")


@dataclass(frozen=True, slots=True)
class LinesAnalysis:
    """Counts of one output.

    ``num_illegal_backtracks``: back from the root. ``num_misplaced``: a mark right or wrong where no step was taken.
    ``num_equations``, ``num_false_equations``: ``a op b = c`` in the steps, which is exact arithmetic or not. ``num_repeated``: steps
    told before from the same place. ``search_frac``: characters before the solution over all.
    """

    num_steps: int
    num_backtracks: int
    num_illegal_backtracks: int
    num_misplaced: int
    num_equations: int
    num_false_equations: int
    num_repeated: int
    search_frac: float


def analyze_lines(text: str) -> LinesAnalysis:
    """A step that came to an end is left by itself, as in ``linearize``."""
    search, _, _ = f"{text}\n".partition(f"{SOLUTION_LINE}\n")
    stripped = [line.strip() for line in search.split("\n")]
    # An empty line that is marked is an end without more words.
    lines = [line for line, after in itertools.pairwise((*stripped, "")) if line or after in (RIGHT_LINE, WRONG_LINE)]
    path: list[str] = []
    told: set[tuple[str, ...]] = set()
    backtracks = illegal = misplaced = repeated = 0
    fresh = False
    for line in lines:
        if line == BACK_LINE:
            backtracks += 1
            illegal += not path
            path = path[:-1]
        elif line in (RIGHT_LINE, WRONG_LINE):
            misplaced += not fresh
            path = path[:-1] if fresh else path
        else:
            path = [*path, line]
            repeated += tuple(path) in told
            told.add(tuple(path))
        fresh = line not in MARKER_LINES
    steps = [line for line in lines if line not in MARKER_LINES]
    equations = [is_true for line in steps for is_true in equations_of(line)]
    return LinesAnalysis(
        num_steps=len(steps),
        num_backtracks=backtracks,
        num_illegal_backtracks=illegal,
        num_misplaced=misplaced,
        num_equations=len(equations),
        num_false_equations=equations.count(False),
        num_repeated=repeated,
        search_frac=min(1.0, len(search) / len(text)) if text else 0.0,
    )


def summarize_lines(analyses: Sequence[LinesAnalysis]) -> dict[str, float]:
    """Rates over many outputs, by the names of ``analyze.summarize``: a wrong step is an equation that is false. What speaks of moves is
    left out where no output makes one, and a share of nothing too."""
    outputs, steps, equations = len(analyses), sum(a.num_steps for a in analyses), sum(a.num_equations for a in analyses)
    false = sum(a.num_false_equations for a in analyses)
    rates = {"outputs": float(outputs), "wrong_nodes_per_output": false / outputs, "mean_nodes": steps / outputs}
    if equations:
        rates["wrong_nodes_frac"] = false / equations
    if steps:
        rates["repeated_nodes_frac"] = sum(a.num_repeated for a in analyses) / steps
    if any(a.num_backtracks or a.num_misplaced or a.search_frac < 1.0 for a in analyses):
        rates["illegal_backtracks_per_output"] = sum(a.num_illegal_backtracks for a in analyses) / outputs
        rates["misplaced_per_output"] = sum(a.num_misplaced for a in analyses) / outputs
        rates["search_words_frac"] = sum(a.search_frac for a in analyses) / outputs
    return rates


def equations_of(line: str) -> list[bool]:
    """For each ``a op b = c`` in the line that stands alone, whether it is exactly true. Longer expressions are left out, not guessed."""
    found = []
    for left, operator, right, result in _EQUATION.findall(line):
        a, b, c = Fraction(left), Fraction(right), Fraction(result)
        match operator:
            case "+":
                found.append(a + b == c)
            case "-":
                found.append(a - b == c)
            case "/" | "÷":
                found.append(b != 0 and a == b * c)
            case _:
                found.append(a * b == c)
    return found
