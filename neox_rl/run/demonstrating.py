"""What a run shows in its warm start: the source of demonstrations that the config names, with the files that it reads."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from neox_rl.batch.record import read_batch, recorded_steps
from neox_rl.config.derived import warmstart_skipped
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, WireError
from neox_rl.ports import Tokenizer
from neox_rl.queue.wire_messages import Phase
from neox_rl.run.called_demonstrations import with_calls
from neox_rl.run.episode_demonstrations import episode_demonstrations
from neox_rl.search.demonstrations import WRITTEN, Source, TraceStyle, attempts, of_problems, searches, trees, values, written
from neox_rl.search.linearize import Mask
from neox_rl.search.trees import read_trees
from neox_rl.types import Problem, Trace, Tree


def demonstration_source(config: RunConfig, problems: Sequence[Problem], tokenizer: Tokenizer) -> Source:
    """Of training ``problems`` alone, whatever the files hold. Raises ConfigError when there is nothing to show."""
    w = config.metarl.warmstart
    if not w.steps or warmstart_skipped(config):
        return _nothing
    style = TraceStyle(w.telling, Mask(w.mask), w.prune, w.choice_weight)
    match w.style:
        case "trees":
            return trees(of_problems(_trees(w.path), problems), style, tokenizer)
        case "values":
            return values(of_problems(_trees(w.path), problems), tokenizer, w.sees_earlier, config.neox.seq_length)
        case "episodes":
            return episode_demonstrations(config, problems, tokenizer)
        case "attempts":
            return attempts(_attempts(Path(w.path)), problems)
        case name if name == WRITTEN:
            as_they_are = written(problems, style, tokenizer)
            called = config.metarl.rollout.method == "episodes" and config.metarl.episodes.tool == "calculator"
            return with_calls(config, [p for p in problems if "solution" in p.meta], tokenizer) if called else as_they_are
    return searches(problems, w.style, style, tokenizer)


def _nothing(rng: random.Random, name: str) -> tuple[Trace, ...]:
    raise ConfigError("this run has no warm start, so it has nothing to demonstrate")


def _trees(paths: str) -> Iterator[Tree]:
    try:
        for path in paths.split(","):
            yield from read_trees(Path(path))
    except (OSError, WireError) as error:
        raise ConfigError(f"metarl.warmstart.path = {paths!r}: {error}; give files that python -m neox_rl.search --trees wrote") from error


def refuse_unrecorded(config: RunConfig) -> None:
    """For ``debug.mode: train_only``, which would else train nothing and call that a success. Raises ConfigError."""
    directory, warm = Path(config.metarl.debug.batches), 0 if warmstart_skipped(config) else config.metarl.warmstart.steps
    for phase, steps in ((Phase.SFT, warm), (Phase.RL, config.neox.train_iters)):
        if steps and not recorded_steps(directory, phase.value):
            raise ConfigError(
                f"metarl.debug.batches = '{directory}': holds no batch of phase {phase.value}, and {steps} such steps are to be trained;"
                " give a directory that a run with debug.record_batches filled"
            )


def _attempts(directory: Path) -> Iterator[Trace]:
    if not recorded_steps(directory, Phase.RL.value):
        raise ConfigError(
            f"metarl.warmstart.path = '{directory}': holds no batch of phase {Phase.RL.value}; give a directory that a run with"
            " debug.record_batches filled"
        )
    try:
        for step in recorded_steps(directory, Phase.RL.value):
            for group in read_batch(directory, Phase.RL.value, step)[0]:
                yield from group.traces
    except (OSError, WireError) as error:
        raise ConfigError(f"metarl.warmstart.path = '{directory}': {error}; give a directory that debug.record_batches filled") from error
