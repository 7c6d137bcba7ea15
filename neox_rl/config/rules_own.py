"""The rule on parts of the user's own: what a key names can be imported, and is what the key takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter

from neox_rl.config.leaves import leaves
from neox_rl.config.machine import Machine
from neox_rl.config.own import is_own, own
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError

NOT_CALLED: Mapping[str, tuple[str, str]] = {
    "metarl.patches": ("sources", "a megatron_patches.Patch"),
    "metarl.hf_layout": ("exported", "a neox_rl.engines.hf_layout.HfLayout"),
}
"""Keys that take an object, one attribute of it, and what it is; any other takes something that is called."""


def own_parts_exist(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The ranks or the orchestrator would import it minutes later, and end."""
    for path in (path for path, leaf in leaves().items() if leaf.own):
        value = attrgetter(path)(config)
        for name in value if isinstance(value, tuple) else [value]:
            if is_own(name) or (name and path in NOT_CALLED):
                yield from _mistake(path, name)


def _mistake(path: str, name: str) -> Iterator[str]:
    attribute, kind = NOT_CALLED.get(path, ("__call__", "a function or a class"))
    try:
        if not hasattr(own(name, path), attribute):
            yield f"{path} = {name!r}: is no {kind.removeprefix('a ')}; docs/EXTENDING.md shows one"
    except ConfigError as error:
        yield str(error)


OWN_RULES = (own_parts_exist,)
