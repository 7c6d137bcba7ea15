"""A part of the user's own, which a key names as ``package.module:name`` where it would name one of the project's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from neox_rl.errors import ConfigError

T = TypeVar("T")
OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    return OWN.fullmatch(name) is not None


def own(name: str, key: str) -> Any:
    """What ``name`` stands for. Raises ConfigError, which names ``key``, where it cannot be imported."""
    fix = "give package.module:name, of a module that is installed or on PYTHONPATH"
    if not is_own(name):
        raise ConfigError(f"{key} = {name!r}: names nothing that can be imported; {fix}")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module may fail in any way while it is imported
        raise ConfigError(f"{key} = {name!r}: {type(error).__name__}: {error}; {fix}") from error


def found(table: Mapping[str, T], name: str, key: str) -> T:
    """The project's part of that name, or the user's own. Raises ConfigError where there is neither."""
    if name in table:
        return table[name]
    if not is_own(name):
        raise ConfigError(f"{key} = {name!r}: is none of {', '.join(sorted(table))}, nor a part of your own (package.module:name)")
    part: T = own(name, key)
    return part
