"""What ``--resume`` needs: a run that is there, has a checkpoint, is not running, and whose config and files still fit it."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from neox_rl.config.derived import keeps_reference, words_around
from neox_rl.config.load import load_resolved
from neox_rl.config.network import curve_on
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import IMITATION, PREFERENCE
from neox_rl.engines.checkpoint_digests import check_digests, check_sizes, num_bytes, read_sealed
from neox_rl.engines.checkpoint_files import find
from neox_rl.errors import ConfigError, WeightError
from neox_rl.keys import RUN_FILE, Keys
from neox_rl.queue.history import fold
from neox_rl.queue.journal import LEDGER, check_format, read_journal, segments
from neox_rl.queue.records import beginning
from neox_rl.telemetry.jsonl import read_json, rewrite_json
from neox_rl.telemetry.paths import RunPaths

FIXED = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "intermediate_size", "mlp_multiple_of", "seq_length"),
    *("max_position_embeddings", "norm", "layernorm_epsilon", "rms_norm_epsilon", "rotary_pct", "rotary_emb_base", "activation"),
    *("gpt_j_residual", "use_bias_in_norms", "use_bias_in_attn_linear", "use_bias_in_mlp", "no_weight_tying"),
    *("make_vocab_size_divisible_by", "precision", "model_parallel_size", "pipe_parallel_size", "zero_optimization", "num_gpus"),
    *("optimizer.type", "save", "metarl.engine", "metarl.qkv_bias", "metarl.seed", "metarl.problems", "metarl.tokenizer"),
    *("metarl.warmstart.steps", "metarl.warmstart.style", "metarl.rollout.groups_per_step", "metarl.rollout.generator"),
    "metarl.debug.mode",
)
"""Keys that a checkpoint, the queue in it or the curves of the run depend on. All others may change between two parts of a run."""

AROUND = ("metarl.rollout.method", "metarl.episodes.count", "metarl.episodes.gammas")
"""Those that ``words_around`` depends on."""
READ_HERE_BYTES = 2 << 30
"""Of a checkpoint: what is read in a moment. Of a larger one the ranks find out, who read all of it anyway, and refuse it alike."""
_READERS = 8
_FIRST_RECORD_BYTES = 4096
_HAVE_ATTEMPT = 2
"""Of these first records of a segment one says the attempt: ``opened`` or ``state``."""


def refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Raises ConfigError with a line for each key that must stay and did not."""
    old, new = _tree(before), _tree(now)
    changed = [(key, _at(old, key), _at(new, key)) for key in FIXED if _at(old, key) != _at(new, key)]
    names = set()
    if keeps_reference(now.metarl.objective) and not keeps_reference(before.metarl.objective):
        names.add("kl_coef" if now.metarl.objective.kl_coef else "loss")  # no reference policy was kept
    if (losses := {before.metarl.objective.loss, now.metarl.objective.loss}) & {IMITATION, PREFERENCE} and len(losses) > 1:
        names.add("loss")  # told searches and pairs that wait in the journal train under no other, nor do others under these
    for name in sorted(names):
        changed.append((f"metarl.objective.{name}", *(getattr(c.metarl.objective, name) for c in (before, now))))
    old_rule, rule = before.metarl.staleness, now.metarl.staleness
    if rule.mode == "strict" and old_rule.mode != "strict":
        changed.append(("metarl.staleness.mode", old_rule.mode, rule.mode))  # more tickets may be due than a step takes
    if rule.mode == "strict" and rule.delivery_slack < old_rule.delivery_slack:
        changed.append(("metarl.staleness.delivery_slack", old_rule.delivery_slack, rule.delivery_slack))
    if not now.metarl.tokenizer.path and words_around(before) != words_around(now):  # the symbolic tokenizer would have other ids
        changed += [(key, _at(old, key), _at(new, key)) for key in AROUND if _at(old, key) != _at(new, key)]
    if changed:
        lines = [f"{key} = {value!r}: the run to resume has {was!r}; set it back, or start another run" for key, was, value in changed]
        raise ConfigError("\n".join(lines))


def has_checkpoint(config: RunConfig, paths: RunPaths) -> bool:
    """Whether the ranks can be resumed. What a killed save left unfinished (``.tmp``) is no checkpoint."""
    directory = _checkpoints(config, paths)
    return directory.is_dir() and any(path.is_dir() and path.suffix != ".tmp" for path in directory.iterdir())


def _checkpoints(config: RunConfig, paths: RunPaths) -> Path:
    return Path(config.neox.save) if config.neox.save else paths.checkpoints


def next_attempt(paths: RunPaths) -> int:
    """Counts the starts of the ranks in this run, resumes included, on the disk (also on a full one): 1, 2, ...

    Durably: the journal knows the attempts of its sessions, and a trainer with the number of one before it is refused. So it is the journal
    that says the last one where the count was lost, and only there: reading all of it takes seconds where the run is long. What
    its segments begin with is read in any case: a count may be of an older copy of the run.
    """
    begun = [int(record.meta.get("attempt", 0)) for path in segments(paths.journal) for record in beginning(path, _HAVE_ATTEMPT)]
    try:
        last = int(read_json(paths.attempt)["attempt"])
    except (ValueError, KeyError, TypeError):
        last = max(0, fold(read_journal(paths.journal).records).attempt)
    last = max(last, *begun, 0)
    rewrite_json(paths.attempt, {"attempt": last + 1}, durably=True)
    return last + 1


def refuse_resume(config: RunConfig, paths: RunPaths) -> None:
    """Raises ConfigError where there is nothing to go on with, or the configuration does not fit it. Touches nothing."""
    if not paths.config.is_file():
        raise ConfigError(f"--resume: there is no run {paths.root}; leave --resume out, or give the --name of a run that is there")
    refuse_changes(load_resolved(paths.config), config)
    refuse_without_checkpoint(config, paths)
    _refuse_another_release(config, paths)


def refuse_damaged(config: RunConfig, paths: RunPaths) -> None:
    """What the ranks would refuse, but once everything is started: of what is too large to be read here only what sizes show."""
    try:
        checkpoint = find(_checkpoints(config, paths))
        meta = read_sealed(checkpoint)
        check_sizes(checkpoint, meta)
        if num_bytes(meta) <= READ_HERE_BYTES:
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda n: check_digests(checkpoint, meta, n, _READERS), range(_READERS)))
    except WeightError as error:
        raise ConfigError(f"--resume: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"--resume: cannot read {error.filename}: {error.strerror}; resume as the user who began the run") from error
    except OSError as error:
        raise ConfigError(f"--resume: cannot read {error.filename}: {error.strerror}; put the run on a disk that is well") from error


def _refuse_another_release(config: RunConfig, paths: RunPaths) -> None:
    """What the orchestrator would refuse once everything is started. A journal is known by its files' first records."""
    try:
        for path in (paths.journal / LEDGER, *segments(paths.journal)):
            with suppress(FileNotFoundError), path.open("rb") as file:
                check_format(path, file.read(_FIRST_RECORD_BYTES))
        if curve_on(config.metarl.network) and (paths.keys / RUN_FILE).exists():
            Keys.load(paths.keys / RUN_FILE)
    except OSError as error:
        raise ConfigError(f"--resume: cannot read {error.filename}: {error.strerror}; resume as the user who began the run") from error


def refuse_without_checkpoint(config: RunConfig, paths: RunPaths) -> None:
    if not has_checkpoint(config, paths):
        where, factor = _checkpoints(config, paths), config.neox.checkpoint_factor
        raise ConfigError(f"--resume: {where} holds no checkpoint (checkpoint_factor = {factor}); start again without --resume")


def refuse_full_directories(config: RunConfig, paths: RunPaths) -> None:
    """Raises ConfigError where a new run would write among files of an earlier one. What lies in the run directory moves aside with it."""
    written = {"save": config.neox.save, "metarl.debug.record_batches": config.metarl.debug.record_batches}
    for key, name in written.items():
        directory = Path(name)
        if name and directory.is_dir() and any(directory.iterdir()) and paths.root.resolve() not in directory.resolve().parents:
            raise ConfigError(
                f"{key} = {name!r}: holds files of an earlier run, and this one would mix its own with them; "
                "give a directory of this run's own, empty it, or continue that run with --resume"
            )


def hold(paths: RunPaths) -> TextIO:
    """Locks the run directory as long as the returned file is open. Raises ConfigError while another launcher holds it."""
    file = paths.lock.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{paths.root} is running; wait for it or stop it, or give this run another --name") from error
    return file


def _tree(config: RunConfig) -> dict[str, Any]:
    return {**asdict(config.neox), "metarl": asdict(config.metarl)}


def _at(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for name in path.split("."):
        value = value[name]
    return value
