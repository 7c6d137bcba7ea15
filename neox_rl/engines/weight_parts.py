"""This rank's parameters as parts of HF tensors: filled from them, gathered back into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from neox_rl.config.schema import MEGATRON_ENGINE
from neox_rl.engines.hf_mapping import Entry, Place, Split, fused, shard, unshard
from neox_rl.engines.model_shape import ModelShape
from neox_rl.engines.port import Topology
from neox_rl.errors import ConfigError, NeoxRLError

Gathering = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class World:
    """This process's place and the groups that the engine talks over. ``control`` is gloo: it may wait for a batch for long."""

    topology: Topology
    device: torch.device
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    control: dist.ProcessGroup


class WeightParts:
    """Knows which parameter of which stage holds which part of which HF tensor. ``parameters`` are this rank's, in model order.

    ``whole``: None where each data-parallel rank holds its parameters whole; else a context that gathers one over those ranks, and on
    leaving keeps what the first of them made of it.
    """

    def __init__(
        self, model: torch.nn.Module, shape: ModelShape, world: World, places: Sequence[Place], whole: Gathering | None = None
    ) -> None:
        self._refuse_other_tensors(shape, places)
        self._shape, self._world, self._places, self._whole = shape, world, places, whole
        self._by_name = dict(model.named_parameters())
        self.parameters = list(self._by_name.values())
        mine = {place.local for place in places if place.stage == world.topology.pp_rank}
        if mine != set(self._by_name):
            raise NeoxRLError(f"mapping and model disagree on parameters {sorted(mine ^ set(self._by_name))}: the framework's layout moved")

    @staticmethod
    def _refuse_other_tensors(shape: ModelShape, places: Sequence[Place]) -> None:
        """A tensor without a place would be dropped when weights are read, and missing in those that are written: a Qwen2 would lose its
        biases without a word."""
        made, needed = {name for place in places for name in place.entry.hf}, set(shape.hf_shapes())
        if made != needed:
            raise ConfigError(
                f"this engine's weights are not those of a {shape.family} model: {len(made ^ needed)} tensors differ, among them"
                f" {min(made ^ needed)}; set metarl.engine: {MEGATRON_ENGINE}, which has them all, or the keys of another model"
            )

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Sets every parameter of this rank from HF tensors. Raises WeightError naming one that is missing or has another shape."""
        top = self._world.topology
        with torch.no_grad():
            for place in self._places:
                if place.stage == top.pp_rank:
                    full, split = fused(place.entry, read, self._shape), place.entry.split
                    with self._gathered(place) as parameter:
                        parameter.copy_(shard(full, split, top.tp_rank, top.tp, self._shape.padded_vocab))

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """HF tensors on the CPU, on rank 0; the ranks of its replica take part, the other replicas have nothing to do."""
        top = self._world.topology
        if top.dp_rank != 0 and self._whole is None:
            return
        for place in self._places:
            if place.entry.alias:
                continue
            full = self._at_origin(place)
            if full is not None and top.dp_rank == 0:
                yield from zip(place.entry.hf, (part.cpu().contiguous() for part in place.entry.unfuse(full)), strict=True)

    def _at_origin(self, place: Place) -> Tensor | None:
        """The full parameter on the first rank: gathered over the stage's TP ranks, then sent along the pipeline."""
        top, entry, stage = self._world.topology, place.entry, place.stage
        full = None
        if stage == top.pp_rank:
            with self._gathered(place) as parameter:
                part = parameter.detach().clone() if self._whole else parameter.detach()
            parts = [part]
            if top.tp > 1 and entry.split is not Split.NONE:
                parts = [torch.empty_like(part) for _ in range(top.tp)]
                dist.all_gather(parts, part.contiguous(), group=self._world.tp)
            full = unshard(parts, entry.split, self._shape.vocab)
        if stage == 0 or top.tp_rank != 0:
            return full if top.tp_rank == 0 and top.pp_rank == 0 else None
        if full is not None:
            dist.send(full.contiguous(), group=self._world.pp, group_dst=0)
        if top.pp_rank != 0:
            return None
        received = torch.empty(self._full_shape(entry), dtype=self.parameters[0].dtype, device=self._world.device)
        dist.recv(received, group=self._world.pp, group_src=stage)
        return received

    @contextmanager
    def _gathered(self, place: Place) -> Iterator[Tensor]:
        parameter = self._by_name[place.local]
        with self._whole(parameter) if self._whole else nullcontext():
            yield parameter

    def _full_shape(self, entry: Entry) -> tuple[int, ...]:
        shapes = [self._shape.hf_shapes()[name] for name in entry.hf]
        return (sum(size[0] for size in shapes), *shapes[0][1:])
