"""The one thing that GPT-NeoX takes from ``pkg_resources``, which setuptools no longer has."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import packaging.version

from megatron_patches.registry import Patch


def _stand_in(_: tuple[Any, ...]) -> None:
    if importlib.util.find_spec("pkg_resources") is None and "pkg_resources" not in sys.modules:
        module = ModuleType("pkg_resources")
        module.packaging = packaging  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = module


PATCH = Patch(
    name="pkg_resources",
    reason="GPT-NeoX imports `packaging` out of pkg_resources; setuptools 82 dropped that module",
    remove_when="GPT-NeoX imports packaging itself",
    on_change="warn",
    cpu_only=False,
    sources={},
    apply=_stand_in,
    upstream="gpt-neox",
)
