"""Every declared key is read by the program. A key that nobody reads is a promise to the user that nobody keeps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from neox_rl.config.leaves import BLOCK, leaves
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import MetaRLConfig

ROOT = Path(__file__).resolve().parents[2]
DECIDING = {"derived.py": (), "placement.py": (), "neox.py": (), "network.py": (), "rules_model.py": ("model_family", "one_family")}
"""Modules of the config package that compute what the run does, and the functions if not all; everything else there, and the command line,
only looks at a key. The engine builds the family that the two functions name."""


@dataclass(frozen=True)
class Module:
    """What one module reads (``x.attribute``) and which names it mentions."""

    attributes: frozenset[str]
    names: frozenset[str]


@cache
def modules() -> tuple[Module, ...]:
    return tuple(_module(path) for path in _files())


def _files() -> Iterator[Path]:
    for path in sorted((ROOT / "neox_rl").rglob("*.py")):
        if (path.parent.name != "config" or path.name in DECIDING) and path.name != "cli.py":
            yield path


def _module(path: Path) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.parent.name == "config" and (chosen := DECIDING[path.name]):
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in chosen]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    defined = {"NeoXConfig", "neox"} if path.name == "neox.py" else set()
    return Module(frozenset(read), frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)) | frozenset(defined))


def owners(path: str) -> set[str]:
    """Names by which a module gets hold of the key's block: its class or the attribute that leads to it."""
    match path.split("."):
        case [_]:
            return {"neox", NeoXConfig.__name__}
        case [_, _]:
            return {BLOCK, MetaRLConfig.__name__}
        case [_, *blocks, _]:
            owner: type = MetaRLConfig
            for block in blocks:
                owner = get_type_hints(owner)[block]
            return {blocks[-1], owner.__name__}
    raise AssertionError(path)


@pytest.mark.parametrize("path", leaves())
def test_a_declared_key_is_read(path: str) -> None:
    """By attribute name, in a module that also mentions the key's block. Covers no key that is read and then ignored."""
    name = path.rsplit(".", 1)[-1]
    assert any(name in module.attributes and owners(path) & (module.names | module.attributes) for module in modules()), (
        f"{path} is declared, and nothing reads it: use it or remove it from the schema"
    )
