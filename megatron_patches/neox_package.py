"""GPT-NeoX's package ``megatron`` and megatron-core in one process."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from megatron_patches.registry import Patch
from neox_rl.config.checkout import find_checkout


def _join(_: tuple[Any, ...]) -> None:
    """Loads the checkout's package by its file, and lets its submodules be found in both places.

    The checkout does not go on ``sys.path``: its ``train``, ``tools`` and ``tests`` would hide ours. A namespace package that an
    import of megatron-core has left is replaced; its submodules stay.
    """
    root = find_checkout(os.environ) / "megatron"
    held = sys.modules.get("megatron")
    if held is not None and getattr(held, "__file__", None) == str(root / "__init__.py"):
        return
    elsewhere = list(getattr(held, "__path__", None) or getattr(importlib.util.find_spec("megatron"), "submodule_search_locations", []))
    spec = importlib.util.spec_from_file_location("megatron", root / "__init__.py", submodule_search_locations=[str(root), *elsewhere])
    assert spec is not None and spec.loader is not None
    package = sys.modules["megatron"] = importlib.util.module_from_spec(spec)
    if core := sys.modules.get("megatron.core"):
        package.core = core  # type: ignore[attr-defined]
    spec.loader.exec_module(package)


PATCH = Patch(
    name="package",
    reason="GPT-NeoX's `megatron` is a package, megatron-core's a namespace of the same name: whichever is found first hides the other",
    remove_when="GPT-NeoX renames its package",
    on_change="warn",
    cpu_only=False,
    sources={},
    apply=_join,
    upstream="gpt-neox",
)
