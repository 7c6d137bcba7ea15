"""HF checkpoints of an architecture that computes what Llama or GPT-NeoX computes, under other names.

A model's tensors have the names of its family everywhere but in HF files and on the way to the servers. There an ``HfLayout``, which
``metarl.hf_layout`` names, says what they are called and which of them are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_rl.types import Json

Read = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def rows(full: Tensor, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    """Tensors of these shapes that stand below one another."""
    return torch.split(full, [shape[0] for shape in shapes])


@dataclass(frozen=True)
class Named:
    """One tensor of the architecture, made of those of the family. ``{n}`` in the names is the number of the layer.

    ``join`` gets the family's tensors and ``split`` takes them apart again, given their shapes; rows below one another unless said.
    """

    theirs: str
    family: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0] if len(parts) == 1 else torch.cat(list(parts))
    split: Callable[[Tensor, Sequence[tuple[int, ...]]], Sequence[Tensor]] = rows


@dataclass(frozen=True)
class HfLayout:
    """``config`` turns the family's ``config.json`` into the architecture's. Tensors that ``tensors`` leaves out keep their names."""

    config: Callable[[dict[str, Json]], dict[str, Json]]
    tensors: tuple[Named, ...] = ()

    def exported(self, tensors: Iterable[tuple[str, Tensor]], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
        """The family's tensors under the architecture's names, each as soon as all that it is made of is there."""
        places = self._places(shapes)
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            if name not in places:
                yield name, tensor
                continue
            rule, theirs, family = places[name]
            parts = waiting.setdefault(theirs, {})
            parts[name] = tensor
            if len(parts) == len(family):
                yield theirs, rule.join([waiting[theirs][part] for part in family])
                del waiting[theirs]

    def reader(self, read: Read, shapes: Shapes) -> Read:
        """Reads tensors of the family out of files of the architecture; ``shapes`` are the family's."""
        places = self._places(shapes)

        def family_tensor(name: str) -> Tensor:
            if name not in places:
                return read(name)
            rule, theirs, family = places[name]
            return rule.split(read(theirs), [shapes[part] for part in family])[family.index(name)].contiguous()

        return family_tensor

    def _places(self, shapes: Shapes) -> dict[str, tuple[Named, str, tuple[str, ...]]]:
        """Name in the family -> the rule it falls under, the architecture's tensor and all that this is made of."""
        found: dict[str, tuple[Named, str, tuple[str, ...]]] = {}
        for rule in self.tensors:
            number = 0
            while (family := tuple(name.replace("{n}", str(number)) for name in rule.family))[0] in shapes:
                found |= {name: (rule, rule.theirs.replace("{n}", str(number)), family) for name in family}
                number += 1
                if "{n}" not in rule.theirs:
                    break
        return found
