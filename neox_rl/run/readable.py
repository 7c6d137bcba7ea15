"""Which problems of a file the verifier can read the answer of: asked once a run, because it takes minutes for a large file.

The answers are checked one after another by workers with a deadline each. Asked again at every start, an orchestrator that takes over
would keep the trainer waiting, and a check that only a loaded machine made too slow would change the problems in the middle of a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from neox_rl.errors import ConfigError
from neox_rl.problems.split import ProblemSet
from neox_rl.telemetry.jsonl import read_json, write_json
from neox_rl.types import Problem
from neox_rl.verify.verifier import TaskVerifier, readable_gold

logger = logging.getLogger(__name__)
MAX_NAMED = 5


def with_readable_answers(problems: ProblemSet, verifier: TaskVerifier, path: str, memory: Path) -> ProblemSet:
    """Without the problems that no attempt can solve, because their gold answer cannot be read; ``memory`` is the run's file of their ids.

    Raises ConfigError when no training problem of the file ``path`` is left.
    """
    everything = (*problems.train, *problems.heldout)
    known, digest = read_json(memory), _digest(everything)
    if known.get("answers") == digest:
        unreadable = frozenset(known["unreadable"])
    else:
        unreadable = frozenset(readable_gold(verifier, everything)[1])
        write_json(memory, {"answers": digest, "unreadable": sorted(unreadable)})
    train = tuple(p for p in problems.train if p.id not in unreadable)
    heldout = tuple(p for p in problems.heldout if p.id not in unreadable)
    if unreadable:
        named = [problem.id for problem in everything if problem.id in unreadable]
        shown = ", ".join(named[:MAX_NAMED]) + ", ..." * (len(named) > MAX_NAMED)
        no_train, no_heldout = len(problems.train) - len(train), len(problems.heldout) - len(heldout)
        logger.warning("%d training and %d held-out problems are left out, their answers cannot be read: %s", no_train, no_heldout, shown)
    if not train:
        raise ConfigError(f"{path}: the verifier can read the answer of none of its {len(problems.train)} training problems; check them")
    return replace(problems, train=train, heldout=heldout, counts=problems.counts | {"unreadable_answers": len(unreadable)})


def _digest(problems: Iterable[Problem]) -> str:
    rows = [[problem.id, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
