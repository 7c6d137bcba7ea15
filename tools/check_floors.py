"""Imports go down the floors of neox_rl/ARCHITECTURE.md, and third parties stay where they belong: ``python tools/check_floors.py [ROOT]``.

Reads the source (``ast``), imports nothing. Imports inside functions and under TYPE_CHECKING count: they couple modules all the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

STAGES = ("problems", "verify", "search", "episodes", "rollout", "queue", "batch", "loss", "weights")
# Parts of one floor may import one another, except the stages and megatron_patches, which stand alone.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        *("types", "config", "framing", "metacot", "arithmetic", "codec"),
        *("guard", "guardian", "ages", "keys", "sockets", "waits", "build_locks", "bounded"),
    ),
    ("ports", "telemetry"),
    (*STAGES, "megatron_patches"),
    ("engines",),
    ("step",),
    ("run",),
)
ALONE = (*STAGES, "megatron_patches")
PROGRAMS = "run"
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

ENGINES = ("neox_rl/engines/*", "megatron_patches/*")
VLLM = ("neox_rl/weights/vllm_*", "neox_rl/rollout/vllm_*")
TORCH = (*(f"neox_rl/{part}/*" for part in ("loss", "batch", "weights", "engines", "step")), "megatron_patches/*")
THIRD_PARTIES: dict[str, tuple[str, ...]] = {
    "megatron": ENGINES,
    "deepspeed": ENGINES,
    "vllm": VLLM,
    "zmq": ("neox_rl/*wire*.py", "neox_rl/sockets.py", "neox_rl/keys.py", "neox_rl/weights/*"),
    "torch": TORCH,
}
PACKAGES = ("neox_rl", "megatron_patches")
WHOLE_TREE = (*PACKAGES, "tools", "tests", "deepy.py", "train.py")


@dataclass(frozen=True)
class Import:
    """One imported module, by its dotted name; ``name`` is what a ``from`` import takes out of it ("" for a plain import)."""

    line: int
    module: str
    name: str = ""
    relative: bool = False


def imports_of(source: str) -> list[Import]:
    """Every import in a module, ``importlib.import_module("literal")`` included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import(node.lineno, node.module or "", alias.name, node.level > 0) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                found.append(Import(node.lineno, target.value))
    return sorted(found, key=lambda i: i.line)


def part_of(module: str, name: str = "") -> str | None:
    """The part that a dotted name lies in: ``neox_rl.queue.wire`` -> ``queue``; None for a third party or the bare package.

    A ``__main__`` is a program, started by name and imported by nobody: it stands on the floor of programs, wherever it lies.
    """
    words = [*module.split("."), name]
    if words[0] == "neox_rl" and "__main__" in words:
        return PROGRAMS
    if words[0] == "megatron_patches":
        return "megatron_patches"
    return words[1] or None if words[0] == "neox_rl" else None


def part_at(path: str) -> str | None:
    """The part that a file lies in, by its path from the root; None outside the packages and for ``neox_rl/__init__.py``."""
    words = path.removesuffix(".py").split("/")
    if words[0] not in PACKAGES or words[1:] == ["__init__"]:
        return "megatron_patches" if words[0] == "megatron_patches" else None
    return part_of(".".join(words))


def floor_violation(path: str, found: Import) -> str | None:
    here, there = part_at(path), part_of(found.module, found.name)
    if here is None or there is None or here == there:
        return None
    for part in (here, there):
        if part not in FLOOR_OF:
            return f"`{part}` has no floor: give it one in neox_rl/ARCHITECTURE.md and in FLOORS"
    if FLOOR_OF[there] > FLOOR_OF[here]:
        return f"{here} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]}): imports go down; pass it in, or move it down"
    if FLOOR_OF[there] == FLOOR_OF[here] and here in ALONE:
        rule = f"parts of floor {FLOOR_OF[here]} never import one another"
        return f"{here} imports {there}: {rule}; move what they share to floor 1, or pass it in"
    return None


def third_party_violation(path: str, found: Import) -> str | None:
    package = found.module.partition(".")[0]
    allowed = THIRD_PARTIES.get(package)
    if allowed is None or any(fnmatch(path, pattern) for pattern in allowed):
        return None
    return f"`{package}` is imported only in {', '.join(allowed)}"


def violations(path: str, source: str) -> Iterator[str]:
    """Lines ``path:line: what is wrong`` for one file; ``path`` is relative to the root, with slashes."""
    for found in imports_of(source):
        problems: list[str | None] = []
        if found.relative:
            problems.append("relative import: write the whole name")
        elif found.name == "*":
            problems.append(f"star import of {found.module}: name what is used")
        elif path.partition("/")[0] in PACKAGES:
            problems += [floor_violation(path, found), third_party_violation(path, found)]
        yield from (f"{path}:{found.line}: {problem}" for problem in problems if problem)


def python_files(root: Path, tops: tuple[str, ...]) -> list[Path]:
    return sorted(p for top in tops for p in ([root / top] if top.endswith(".py") else (root / top).rglob("*.py")) if p.is_file())


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = python_files(root, WHOLE_TREE)
    found = dict.fromkeys(v for f in files for v in violations(f.relative_to(root).as_posix(), f.read_text(encoding="utf-8")))
    print("\n".join(found) or f"floors: {len(files)} files, every import goes down")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
