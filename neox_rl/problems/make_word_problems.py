"""``python -m neox_rl.problems.make_word_problems --num N --out FILE``: word problems with worked solutions, to try a run on.

Seeded and made from templates: a story of ``--steps`` changes to a number of things, each a step of the solution. All numbers stay in
0..``--max-value``. They ask for reading and for exact arithmetic, which a model of a million parameters can learn in minutes. As in
collections from many hands, a share of the solutions (``--terse-frac``) only states the answer: a small model that imitates those
guesses, and RL can find out that working it out pays.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from neox_rl.types import MAX_CALLS

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps")


class Change(NamedTuple):
    """A sentence about ``{name}``, ``{n}`` and ``{things}``, and the operator that it stands for."""

    sentence: str
    operator: str


CHANGES = (
    Change("{name} finds {n} more.", "+"),
    Change("Then {name} buys {n} {things}.", "+"),
    Change("A friend adds {n} {things}.", "+"),
    Change("{name} loses {n} of them.", "-"),
    Change("Then {name} gives away {n}.", "-"),
    Change("{name} sells {n} {things}.", "-"),
    Change("Now the number grows to {n} times as many.", "*"),
    Change("{name} splits them into {n} equal parts and keeps one.", "/"),
)


def word_problem(rng: random.Random, steps: int, max_value: int, terse_frac: float, calls: bool) -> dict[str, str]:
    """A row ``{problem, solution, answer}``."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, max_value)
    story, lines = [f"{name} has {total} {things}."], list[str]()
    while len(lines) < steps:
        change = rng.choice(CHANGES)
        n = rng.randint(2, 9) if change.operator in "*/" else rng.randint(1, max_value)
        result = {"+": total + n, "-": total - n, "*": total * n, "/": total // n if total % n == 0 else -1}[change.operator]
        if 0 <= result <= max_value:
            story.append(change.sentence.format(name=name, n=n, things=things))
            lines.append(f"[CALC {total} {change.operator} {n}]" if calls else f"{total} {change.operator} {n} = {result}.")
            total = result
    question = f"How many {things} does {name} have now?"
    return {
        "problem": " ".join([*story, question]),
        "solution": " ".join([*([] if rng.random() < terse_frac else lines), f"The answer is \\boxed{{{total}}}."]),
        "answer": str(total),
    }


def word_problems(num: int, steps: int, max_value: int, terse_frac: float, seed: int, calls: bool = False) -> list[dict[str, str]]:
    """``num`` different problems; ``calls``: each step of a solution asks the calculator."""
    rng = random.Random(f"word problems/{seed}/{steps}/{max_value}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num:
        row = word_problem(rng, steps, max_value, terse_frac, calls)
        rows.setdefault(row["problem"], row)
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.problems.make_word_problems", description="Word problems with solutions.")
    parser.add_argument("--num", type=int, default=20_000, help="problems (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="changes in a story (default %(default)s)")
    parser.add_argument("--max-value", type=int, default=10, help="largest number (default %(default)s)")
    parser.add_argument("--terse-frac", type=float, default=0.5, help="share of solutions without steps (default %(default)s)")
    parser.add_argument("--calls", action="store_true", help="solutions call the calculator: [CALC 9 + 4] (metarl.episodes.tool)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write, for metarl.problems.path")
    args = parser.parse_args(argv)
    if not (0 < args.num <= 100_000 and 1 <= args.steps <= 20 and 10 <= args.max_value <= 10_000):
        parser.error(f"--num {args.num} must be 1 to 100000, --steps {args.steps} 1 to 20, --max-value {args.max_value} 10 to 10000")
    if args.calls and args.steps > MAX_CALLS:
        parser.error(f"--steps {args.steps} with --calls must be at most {MAX_CALLS}, the calls that an episode may make")
    if not 0 <= args.terse_frac <= 1:
        parser.error(f"--terse-frac {args.terse_frac} must be 0 to 1")
    rows = word_problems(args.num, args.steps, args.max_value, args.terse_frac, args.seed, args.calls)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written ({error.strerror}); give a file in a directory that you may write to")
    print(f"{args.out}: {len(rows)} problems, for example: {rows[0]['problem']}\n  {rows[0]['solution']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
