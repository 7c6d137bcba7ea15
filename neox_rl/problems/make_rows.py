"""The problems of a config as rows that ``python -m neox_rl.search --problems`` reads, under the ids by which the run knows them.

``python -m neox_rl.problems.make_rows CONFIG.yml [MORE.yml] --part train --out rows.jsonl``: trees searched over these rows are what
``metarl.warmstart.style: trees`` and ``values`` of the same config show. ``--part heldout`` gives those that are never trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.load import load_config
from neox_rl.errors import ConfigError
from neox_rl.metacot import NUMBERS, TARGET
from neox_rl.problems.sources import problems_of_run
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.types import Json, Problem


def row(problem: Problem) -> dict[str, Json]:
    """The search asks in the words of the run: the numbers are in the order of the problem's prompt, and the prompt of a text is whole."""
    if problem.task not in ARITHMETIC_TASKS:
        return {"id": problem.id, "prompt": problem.prompt, "answer": problem.answer}
    words = problem.prompt.split()
    numbers: list[Json] = [int(word) for word in words[words.index(NUMBERS) + 1 : words.index(TARGET)]]
    return {"id": problem.id, "numbers": numbers, "target": problem.meta["target"], "max_value": problem.meta["max_value"]}


def write_rows(path: Path, problems: Iterable[Problem]) -> int:
    """How many were written."""
    lines = [json.dumps(row(problem)) + "\n" for problem in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m neox_rl.problems.make_rows", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for deepy.py")
    parser.add_argument("--part", choices=("train", "heldout"), default="train")
    parser.add_argument("--limit", type=int, help="the first so many; held-out problems come in a fair order")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    try:
        config = load_config(args.configs, args.set)
        problems = problems_of_run(config, load_tokenizer(config.metarl.tokenizer, config.metarl.problems))
        part = problems.train if args.part == "train" else problems.heldout
        print(f"{write_rows(args.out, part[: args.limit])} rows in {args.out}", file=sys.stderr)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
