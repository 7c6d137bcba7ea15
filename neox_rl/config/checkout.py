"""The user's GPT-NeoX checkout: where it is and which keys it knows, read from its source. Nothing of it is imported here."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from neox_rl.errors import ConfigError

VARIABLE = "GPT_NEOX_PATH"
ARGUMENTS = ("deepspeed_args.py", "neox_args.py")
WRITTEN_FOR = "ea7aefd8"
"""The commit of GPT-NeoX that this project is tested with."""


def find_checkout(environ: Mapping[str, str]) -> Path:
    """The directory that ``GPT_NEOX_PATH`` names. Raises ConfigError when it is not set, not there, or no GPT-NeoX."""
    text = environ.get(VARIABLE, "")
    fix = f"set {VARIABLE} to a clone of github.com/EleutherAI/gpt-neox (tested: commit {WRITTEN_FOR})"
    if not text:
        raise ConfigError(f"metarl.engine = gpt-neox: needs a GPT-NeoX checkout, and {VARIABLE} is not set; {fix}")
    root = Path(text).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(f"{VARIABLE} = {text}: is no directory; {fix}")
    missing = [name for name in ARGUMENTS if not (root / "megatron" / "neox_arguments" / name).is_file()]
    if missing:
        raise ConfigError(f"{VARIABLE} = {text}: is no GPT-NeoX checkout, megatron/neox_arguments/{missing[0]} is not in it; {fix}")
    return root


def known_keys(checkout: Path) -> frozenset[str]:
    """Every key of the checkout's NeoXArgs. Raises ConfigError where its source cannot be read."""
    return frozenset(default_values(checkout))


@cache
def default_values(checkout: Path) -> Mapping[str, Any]:
    """Every key of the checkout's NeoXArgs and its default, None where that is not written out. Raises ConfigError like ``known_keys``."""
    found: dict[str, Any] = {}
    for name in ARGUMENTS:
        path = checkout / "megatron" / "neox_arguments" / name
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError) as error:
            raise ConfigError(f"{path}: cannot be read as Python ({error}); check out a released version of GPT-NeoX") from error
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found |= {
                    s.target.id: _literal(s.value) for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
                }
    return found


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
