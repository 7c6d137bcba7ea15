"""The command line of ``deepy.py``: ``python deepy.py train.py configs/metarl.yml [more.yml ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from neox_rl.config.checkout import VARIABLE, find_checkout
from neox_rl.config.derived import num_parameters, staleness_bound, symbolic_words, warmstart_skipped, words_around
from neox_rl.config.dump import dump
from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.neox_defaults import other_defaults
from neox_rl.config.placement import plan
from neox_rl.config.rules import check, warnings
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import NEOX_ENGINE
from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.run.resume import refuse_damaged, refuse_resume
from neox_rl.telemetry.paths import RunPaths

BAD_INPUT = 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="deepy.py", description="Asynchronous online RL of reasoning models.", epilog="All keys: configs/README.md", allow_abbrev=False
    )
    p.add_argument("script", help="script that every training rank runs, as in GPT-NeoX: train.py")
    p.add_argument("configs", nargs="+", help="YAML files; their keys are merged, and a key may be written once (.yml may be left out)")
    p.add_argument("-d", "--conf_dir", "--conf-dir", default="", help="directory of the YAML files")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: --set metarl.rollout.group_size=4 (repeatable)"
    )
    p.add_argument("--name", help="run name: shorthand for --set metarl.name=NAME")
    p.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the processes, and start nothing")
    p.add_argument("--prepare", action="store_true", help="make the run directory, print the command of each part, and start nothing")
    p.add_argument("--restarts", type=int, metavar="N", help="go on from the last checkpoint up to N times when a training rank is lost")
    p.add_argument("--resume", action="store_true", help="continue runs/<name> from its last checkpoint")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one clear line a mistake on stderr. Any other status is the run's own."""
    args = parser().parse_intermixed_args(arguments)
    try:
        config, remarks = _configuration(args)
        if args.dry_run and args.resume:
            paths = RunPaths.of(Path(config.metarl.runs_dir) / config.metarl.name)
            refuse_resume(config, paths)
            refuse_damaged(config, paths)
    except ConfigError as error:
        lines = str(error).splitlines()
        sys.stderr.write("".join(f"error: {line}\n" for line in lines))
        return BAD_INPUT
    sys.stderr.write("".join(f"{line}\n" for line in remarks))
    if args.dry_run:
        sys.stdout.write(describe(config, Machine.here(), args.script))
        return 0
    from neox_rl.run.launch import commands, launch, prepared

    try:
        if args.prepare:
            with prepared(config, args.script, args.resume) as (_, parts):
                sys.stdout.write(commands(config, parts, os.environ))
            return 0
        return launch(config, args.script, args.resume)
    except ConfigError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return BAD_INPUT
    except NeoxRLError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _configuration(args: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The checked configuration, and the notes and warnings that a person should see."""
    if not Path(args.script).is_file():
        raise ConfigError(
            f"{args.script}: is no file; the first argument is the script of the training ranks: python deepy.py train.py CONFIG.yml"
        )
    paths = [Path(args.conf_dir, name if name.endswith((".yml", ".yaml", ".json")) else name + ".yml") for name in args.configs]
    settings = [*args.set, *([f"metarl.name={args.name!r}"] if args.name is not None else [])]
    settings += [f"metarl.restarts={args.restarts}"] if args.restarts is not None else []
    machine = Machine.here()
    parsed = parse(paths, settings)
    check(parsed.config, machine)
    notes = [*parsed.notes]
    if parsed.config.metarl.engine == NEOX_ENGINE:
        notes.append(other_defaults(parsed.config, parsed.written, find_checkout({VARIABLE: machine.gpt_neox_path})))
    return parsed.config, [*(f"note: {n}" for n in notes if n), *(f"warning: {w}" for w in warnings(parsed.config, machine))]


def describe(config: RunConfig, machine: Machine, script: str) -> str:
    """What a run would be: configuration, model, staleness bound and processes. A YAML document followed by YAML comments."""
    m, s, n = config.metarl, config.metarl.staleness, config.neox
    lines = [f"run        {m.runs_dir}/{m.name}, mode {m.debug.mode}", f"model      {_model(config)}"]
    lines.append(f"machine    {len(machine.cores)} cores, {machine.memory_gib:.0f} GiB, {machine.num_gpus} GPUs")
    steps = [f"{m.warmstart.steps} warm start steps"] * bool(m.warmstart.steps and not warmstart_skipped(config))
    steps.append(f"{n.train_iters} RL steps of {m.rollout.groups_per_step} groups x {m.rollout.group_size} rollouts")
    lines.append(f"training   {', then '.join(steps)}")
    bound = staleness_bound(config)
    kind = "synchronous: every token is from the version that is trained" if bound == 0 else f"mode {s.mode}"
    lines.append(
        f"staleness  S = admission_slack {s.admission_slack} + delivery_slack {s.delivery_slack} = {bound} optimizer steps; {kind}"
    )
    lines.append("processes")
    for process in plan(config, machine, script):
        lines.append(f"  {process.count} x {process.name:<14} {process.command}; {'; '.join(dict.fromkeys(process.cores))}")
    return dump(config) + "".join(f"# {line}\n" for line in lines)


def _model(config: RunConfig) -> str:
    n = config.neox
    shape = (
        f"{n.num_layers} layers, hidden {n.hidden_size}, {n.num_attention_heads} heads of {n.head_dim}, MLP {n.mlp_width}, {n.precision}"
    )
    if config.metarl.tokenizer.path:
        return f"{shape}, and the embeddings of the tokenizer in {config.metarl.tokenizer.path}"
    words = len(symbolic_words(config.metarl.problems, words_around(config)))
    return f"{num_parameters(config, words) / 1e6:.2f} M parameters: {shape}, vocabulary of {words}"
