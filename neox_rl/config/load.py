"""NeoX YAML files and ``--set`` overrides to one ``RunConfig``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from neox_rl.config.leaves import BLOCK, blocks, convert, leaves, nearest
from neox_rl.config.machine import Machine
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.neox_compat import PRECISION_BLOCKS, precision_blocks, sort_out
from neox_rl.config.rules import check
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import NEOX_ENGINE, MetaRLConfig
from neox_rl.config.source import SETTING, Entry, override, reach_into, read_files
from neox_rl.errors import ConfigError

OPTIMIZER_DEFAULTS: Mapping[str, Any] = {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8}


@dataclass(frozen=True)
class Parsed:
    """A typed configuration whose rules are not checked yet, and notes on NeoX keys that the run does not read."""

    config: RunConfig
    notes: tuple[str, ...]
    written: frozenset[str]
    """The paths that a file or a setting gives, the parameters of the optimizer among them."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (), machine: Machine | None = None) -> RunConfig:
    """The configuration of ``paths``, merged, with ``key=value`` overrides on top, obeying every rule on ``machine`` (default: this one).

    Raises ConfigError naming the key, its value and place, the rule and the fix; several broken rules come in one error.
    """
    config = parse(paths, overrides).config
    check(config, machine or Machine.here())
    return config


def load_resolved(path: str | Path) -> RunConfig:
    """The ``config.yml`` that the launcher resolved and checked, for the processes of the run, wherever they are."""
    return parse([path]).config


def parse(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Parsed:
    """Merge, convert and build, without the rules between keys."""
    merged = precision_blocks(_with_settings_within(override(read_files(paths), overrides)))
    gpt_neox = f"{BLOCK}.engine" in merged and merged[f"{BLOCK}.engine"].value == NEOX_ENGINE
    table, extra, notes = sort_out(merged, {*leaves(), *blocks()}, gpt_neox)
    values = {leaf.path: copy.deepcopy(leaf.default) for leaf in leaves().values()}
    mistakes: list[str] = []
    for path, entry in sorted(table.items(), key=lambda item: item[0] not in leaves()):
        try:
            if path in leaves():
                values[path] = convert(leaves()[path], entry.value, entry.where)
            else:
                _reach_into(values, path, entry)
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    written = {path for path, entry in table.items() if entry.value is not None}
    if "optimizer" in written and isinstance(given := values["optimizer"].get("params"), dict):
        written |= {f"optimizer.params.{name}" for name in given}
    values["optimizer"] = _optimizer(values["optimizer"])
    config = RunConfig(_build(NeoXConfig, "", values), _build(MetaRLConfig, BLOCK + ".", values), extra)
    return Parsed(config, tuple(notes), frozenset(written))


def _with_settings_within(table: Mapping[str, Entry]) -> dict[str, Entry]:
    """``--set fp16.hysteresis=1`` put into the block ``fp16``, and so for each block that is GPT-NeoX's and not of this project."""
    result: dict[str, Entry] = {}
    for path, entry in table.items():
        head, _, inner = path.partition(".")
        before = result.get(head, Entry(None, entry.where))
        block = {} if before.value is None and head in PRECISION_BLOCKS else copy.deepcopy(before.value)
        if inner and entry.where == SETTING and head not in leaves() and isinstance(block, dict):
            reach_into(block, path, entry.value)
            result[head] = Entry(block, before.where)
        else:
            result[path] = entry
    return result


def _reach_into(values: dict[str, Any], path: str, entry: Entry) -> None:
    """Apply a setting like ``optimizer.params.lr=...``; any other path that is no leaf is unknown."""
    head, _, inner = path.partition(".")
    target = values.get(head)
    if not inner or not isinstance(target, dict) or entry.where != SETTING:
        raise _unknown(path, entry)
    reach_into(target, path, entry.value)
    values[head] = convert(leaves()[head], values[head], entry.where)


def _unknown(path: str, entry: Entry) -> ConfigError:
    if path in blocks():
        return ConfigError(f"{path} ({entry.where}): is a block of keys, not a key; set one of its keys, as {path}.<key>")
    close = nearest(path)
    hint = f"did you mean {close}?" if close else "see configs/README.md for all keys"
    return ConfigError(f"{path} ({entry.where}): is no key of this project; {hint}")


def _optimizer(given: dict[str, Any]) -> dict[str, Any]:
    """Absent parameters of the optimizer filled with their defaults, so that the resolved file says everything."""
    params = given.get("params", {})
    return {
        "type": "Adam",
        **given,
        "params": {**copy.deepcopy(dict(OPTIMIZER_DEFAULTS)), **params} if isinstance(params, dict) else params,
    }


def _build(cls: type[Any], prefix: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    return cls(
        **{
            f.name: _build(hints[f.name], f"{prefix}{f.name}.", values) if is_dataclass(hints[f.name]) else values[prefix + f.name]
            for f in fields(cls)
        }
    )
