"""setup.py declares what the code imports, ships what it reads, and the plugin's entry point leads somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"neox_rl", "megatron_patches", "tests"} | {path.stem for path in (ROOT / "tools").rglob("*.py")}
OTHER_ENVIRONMENT = ROOT / "tools/bench_trl_worker.py"
"""Run by the Python of another environment, which the benchmark's user makes."""


def setup_arguments() -> dict[str, ast.expr]:
    """Keyword arguments of the call of ``setup``, and the assignments above it, unevaluated."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "setup"]
    return {k.arg: k.value for k in call.keywords if k.arg}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """Distributions that setup.py names, extras included."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    block = text[text.index("REQUIRED = [") : text.index("setup(\n")]
    return {canonical(m) for m in re.findall(r'^\s+(?:"\w+": \[)?f?"([A-Za-z][\w.-]*)', block, re.MULTILINE)}


def third_party_imports() -> dict[str, str]:
    """Top-level module -> a file that imports it, over the code that users run."""
    found: dict[str, str] = {}
    for path in [p for top in ("neox_rl", "megatron_patches", "tools") for p in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path != OTHER_ENVIRONMENT else ():
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS:
                found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared() -> None:
    distributions = metadata.packages_distributions()
    undeclared = {
        module: path
        for module, path in third_party_imports().items()
        if not {canonical(d) for d in distributions.get(module, [])} & declared()
    }
    assert undeclared == {}


@pytest.mark.parametrize("name", ["REQUIRED", "EXTRAS"])
def test_the_lists_are_the_ones_that_setup_uses(name: str) -> None:
    assert name in {node.id for node in setup_arguments().values() if isinstance(node, ast.Name)}


def test_the_plugin_entry_point_leads_to_a_function() -> None:
    points = ast.literal_eval(setup_arguments()["entry_points"])
    (point,) = points["vllm.general_plugins"]
    name, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", point).groups()  # type: ignore[union-attr]
    assert name == "neox_rl" and callable(getattr(importlib.import_module(module), function))


def test_every_file_that_is_not_code_is_shipped() -> None:
    data = ast.literal_eval(setup_arguments()["package_data"])
    for package, patterns in data.items():
        folder = ROOT / package
        shipped = {p for pattern in patterns for p in folder.glob(pattern)}
        there = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".md")}
        assert there == shipped, package


def test_the_answer_checker_runs_on_the_grammar_that_was_chosen() -> None:
    """Its parser picks a grammar by the runtime that it finds; another one parses some answers otherwise."""
    assert metadata.version("antlr4-python3-runtime") == "4.11.0"
