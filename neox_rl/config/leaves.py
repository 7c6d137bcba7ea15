"""The declared keys as a flat table of dotted paths, and the conversion of one YAML value to a key's type."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.own import is_own
from neox_rl.config.schema import MetaRLConfig
from neox_rl.errors import ConfigError

BLOCK = "metarl"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
OWN_PART = "package.module:name"
LARGEST = sys.float_info.max
"""NaN is not below it, nor is an integer that no float holds."""


@dataclass(frozen=True)
class Leaf:
    """One key: ``path`` as a user writes it (``num_layers``, ``metarl.rollout.group_size``), its type, default and bounds."""

    path: str
    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    own: bool

    def expects(self) -> str:
        """The values that this key takes, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices) + (f", or {OWN_PART}" if self.own else "")
        if self.own:
            return OWN_PART if self.type is str else f"a list of {OWN_PART}"
        kind = {
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "text",
            tuple[str, ...]: "a list of texts",
            tuple[float, ...]: "a list of numbers",
        }
        words = kind.get(self.type, "a mapping")
        bounds = [f"{sign} {bound:.12g}" for sign, bound in ((">=", self.low), ("<=", self.high)) if bound is not None]
        return " ".join([words, " and ".join(bounds)]).strip()


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Leaf | None]]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        path = prefix + f.name
        if is_dataclass(hints[f.name]):
            yield path, None
            yield from _walk(hints[f.name], path + ".")
        else:
            yield path, _leaf(path, hints[f.name], f)


def _leaf(path: str, kind: Any, f: Field[Any]) -> Leaf:
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    meta = f.metadata
    return Leaf(path, kind, default, meta["doc"], meta.get("choices", ()), meta.get("low"), meta.get("high"), meta.get("own", False))


@cache
def leaves() -> Mapping[str, Leaf]:
    """Every key by path, in the order of the schema: NeoX keys first."""
    found = [*_walk(NeoXConfig, ""), *_walk(MetaRLConfig, BLOCK + ".")]
    return {path: leaf for path, leaf in found if leaf is not None}


@cache
def blocks() -> frozenset[str]:
    """Paths that hold other keys: ``metarl`` and ``metarl.<block>``."""
    return frozenset({BLOCK, *(path for path, leaf in _walk(MetaRLConfig, BLOCK + ".") if leaf is None)})


def nearest(path: str) -> str:
    """The declared path that a person most likely meant, or an empty string."""
    known = [*leaves(), *sorted(blocks())]
    last = path.rsplit(".", 1)[-1]
    same_name = [p for p in known if p.rsplit(".", 1)[-1] == last]
    return next(iter(same_name or difflib.get_close_matches(path, known, n=1, cutoff=0.6)), "") or _by_last_name(last, known)


def _by_last_name(last: str, known: list[str]) -> str:
    names = {p.rsplit(".", 1)[-1]: p for p in known}
    return next((names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.7)), "")


def convert(leaf: Leaf, value: object, where: str) -> Any:
    """``value`` as the key's type. ``null`` is the default, as in GPT-NeoX. Raises ConfigError naming key, value, place and rule."""
    if value is None:
        return leaf.default
    result = _typed(leaf, value)
    if result is MISSING or not _in_bounds(leaf, result):
        raise ConfigError(f"{leaf.path} = {value!r} ({where}): must be {leaf.expects()}; it means: {leaf.doc}{_hint(leaf, value)}")
    return result


def _typed(leaf: Leaf, value: object) -> Any:
    """The converted value; MISSING where it is of another type. A bool is no integer, an integer is a number."""
    match leaf.type, value:
        case type() as kind, bool():
            return value if kind is bool else MISSING
        case type() as kind, int() if kind in (int, str):
            return kind(value)
        case type() as kind, int() | float() if kind is float:
            return float(value) if abs(value) <= LARGEST else MISSING
        case type() as kind, str() if kind is float:
            return float(value) if NUMBER.fullmatch(value) and abs(float(value)) <= LARGEST else MISSING
        case type() as kind, str() if kind is str:
            return value
        case kind, str() if kind == tuple[str, ...]:
            return (value,)
        case kind, list() | tuple() if kind == tuple[str, ...]:
            return tuple(value) if all(isinstance(v, str) for v in value) else MISSING
        case kind, int() | float() if kind == tuple[float, ...]:
            return (float(value),)
        case kind, list() | tuple() if kind == tuple[float, ...]:
            found = numbers(list(value))
            return tuple(map(float, found)) if all(type(v) in (int, float) for v in found) else MISSING
        case kind, dict() if kind == dict[str, Any]:
            return numbers(value)
    return MISSING


def _in_bounds(leaf: Leaf, value: Any) -> bool:
    if leaf.choices:
        return value in leaf.choices or (leaf.own and is_own(value))
    return (leaf.low is None or value >= leaf.low) and (leaf.high is None or value <= leaf.high)


def _hint(leaf: Leaf, value: object) -> str:
    if leaf.choices and isinstance(value, str):
        close = difflib.get_close_matches(value, leaf.choices, n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if leaf.type is str and not isinstance(value, str):
        return f"; put it in quotes if you mean the text '{value}'"
    return ""


def numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text (it wants ``1.0e-3``); a person means the number. Mappings and lists are walked."""
    match value:
        case str() if NUMBER.fullmatch(value):
            return float(value)
        case dict():
            return {str(k): numbers(v) for k, v in value.items()}
        case list():
            return [numbers(v) for v in value]
    return value
