"""No file over 400 lines, no function over 60: ``python tools/check_sizes.py [ROOT]``. Decorators are not counted, docstrings are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
TOPS = ("neox_rl", "megatron_patches", "tools", "tests")


def violations(path: str, source: str) -> Iterator[str]:
    """Lines ``path:line: what is too long`` for one file."""
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{path}:1: {num_lines} lines, at most {MAX_FILE_LINES}: split it by what it does"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}: give its steps names"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = sorted(p for top in TOPS for p in (root / top).rglob("*.py"))
    found = [v for f in files for v in violations(f.relative_to(root).as_posix(), f.read_text(encoding="utf-8"))]
    print("\n".join(found) or f"sizes: {len(files)} files within {MAX_FILE_LINES} lines, every function within {MAX_FUNCTION_LINES}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
