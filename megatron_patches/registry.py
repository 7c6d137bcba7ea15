"""What a patch is, and the check that the upstream source it leans on has not moved."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neox_rl.config import checkout
from neox_rl.errors import NeoxRLError

Upstream = Literal["megatron-core", "gpt-neox", "deepspeed"]
WRITTEN_FOR: Mapping[Upstream, str] = {
    "megatron-core": "install megatron-core 0.16.1",
    "gpt-neox": f"check out GPT-NeoX {checkout.WRITTEN_FOR}",
    "deepspeed": "install deepspeed 0.19.8",
}


class PatchError(NeoxRLError):
    """Upstream moved under a patch that cannot be trusted any more."""


@dataclass(frozen=True)
class Patch:
    """One seam. ``sources`` maps each upstream symbol (``module:qualified.name``) to the :func:`digest` of its source.

    ``on_change``: ``stop`` where a moved source could give wrong numbers in silence, ``warn`` where it would fail loudly.
    Without sources: it makes the upstream importable, so it stands before the others.
    """

    name: str
    reason: str
    remove_when: str
    on_change: Literal["warn", "stop"]
    cpu_only: bool
    sources: Mapping[str, str]
    apply: Callable[[tuple[Any, ...]], None]
    upstream: Upstream = "megatron-core"


def resolve(symbol: str) -> Any:
    """The object behind ``module:qualified.name``, taken out of static methods and decorators that name what they wrap."""
    module, _, qualified = symbol.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return inspect.unwrap(found.__func__ if isinstance(found, staticmethod | classmethod) else found)


def digest(symbol: str) -> str:
    """The first 16 hexadecimal digits of the sha256 of the symbol's source text."""
    return hashlib.sha256(inspect.getsource(resolve(symbol)).encode()).hexdigest()[:16]


def _where(symbol: str) -> str:
    found = resolve(symbol)
    return f"{inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]}"


def check(patch: Patch) -> None:
    """Raises PatchError, or warns, when an upstream source differs from the one that the patch was written for."""
    for symbol, expected in patch.sources.items():
        try:
            found = digest(symbol)
        except (ImportError, AttributeError) as error:
            raise PatchError(
                f"patch {patch.name!r}: {symbol} is gone ({error}); {WRITTEN_FOR[patch.upstream]} or mend the patch"
            ) from error
        if found == expected:
            continue
        message = (
            f"patch {patch.name!r}: the source of {symbol} is {found}, the patch was written for {expected} "
            f"({patch.reason}); read {_where(symbol)}, mend the patch and its digest, or {WRITTEN_FOR[patch.upstream]}"
        )
        if patch.on_change == "stop":
            raise PatchError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
