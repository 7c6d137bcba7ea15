"""YAML files and ``--set`` overrides as one flat table: dotted path -> value and the place it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neox_rl.config.leaves import blocks
from neox_rl.errors import ConfigError

SETTING = "--set"


@dataclass(frozen=True)
class Entry:
    """One value and where a person can find it: ``configs/metarl.yml:14`` or ``--set``."""

    value: Any
    where: str


def read_files(paths: Sequence[str | Path]) -> dict[str, Entry]:
    """The leaves of all files. ``-`` in a key is ``_``. A leaf written twice, in one file or in two, is refused.

    The blocks inside ``metarl:`` may be spread over files (a model file, a job file, a site file); their leaves may not repeat, so
    the order of the files never matters.
    """
    table: dict[str, Entry] = {}
    for path in paths:
        for key, entry in _leaves_of(Path(path)):
            if key in table:
                raise ConfigError(
                    f"{key} is written twice: {table[key].where} and {entry.where}; keep one of them, or change a value with --set"
                    f" {key}=..."
                )
            table[key] = entry
    return table


def override(table: Mapping[str, Entry], settings: Sequence[str]) -> dict[str, Entry]:
    """``table`` with ``key=value`` settings applied in order. ``optimizer.params.lr=1e-4`` reaches into a mapping."""
    result = dict(table)
    for setting in settings:
        name, equals, text = setting.partition("=")
        path = name.strip().replace("-", "_")
        if not equals or not path:
            raise ConfigError(f"--set {setting}: must be key=value, for example --set metarl.rollout.group_size=4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: {text!r} is not a YAML value; quote it") from error
        result = {key: entry for key, entry in result.items() if not key.startswith(path + ".") or entry.where != SETTING}
        result[path] = Entry(value, SETTING)
    return result


def reach_into(block: dict[str, Any], path: str, value: Any) -> None:
    """Sets ``path``, as ``optimizer.params.lr``, in the block that its first name stands for. Raises ConfigError."""
    head, *inner, last = path.split(".")
    for name in inner:
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise ConfigError(f"--set {path}: {name} in {head} is the value {block!r}, not a block of keys; set {name} itself")
    block[last] = value


def _leaves_of(path: Path) -> Iterator[tuple[str, Entry]]:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_neighbours(path)}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not a text file in UTF-8; give a YAML file") from error
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}: must hold keys and values (num_layers: 3), not {kind}")
        yield from _mapping(loader, root, "", path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: is not valid YAML ({getattr(error, 'problem', None) or error}); check indentation, quotes and colons"
        ) from error
    finally:
        loader.dispose()


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[tuple[str, Entry]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value).replace("-", "_")
        line = key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{key} is written twice: {path}:{seen[key]} and {path}:{line}; keep one of them")
        seen[key] = line
        if key not in blocks():
            _refuse_repeats(value_node, key, path)
            yield key, Entry(loader.construct_object(value_node, deep=True), f"{path}:{line}")
        elif isinstance(value_node, yaml.MappingNode):
            yield from _mapping(loader, value_node, key + ".", path)
        elif value_node.value:
            raise ConfigError(f"{key} = {value_node.value!r} ({path}:{line}): is a block of keys; indent its keys below it")


def _refuse_repeats(node: yaml.Node, key: str, path: Path) -> None:
    """PyYAML keeps the last of two equal keys without a word, so ``optimizer: {lr: 1, lr: 2}`` would pass."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{key}.{name} is written twice: {path}:{seen[name]} and {path}:{line}; keep one of them")
        seen[name] = line
        _refuse_repeats(value_node, f"{key}.{name}", path)


def _neighbours(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.yml"))[:12] if path.parent.is_dir() else []
    return f"files in {path.parent}: {', '.join(names)}" if names else f"there is no YAML file in {path.parent}"
