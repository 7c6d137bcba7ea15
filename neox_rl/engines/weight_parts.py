"""This rank's parameters as parts of HF tensors: filled from them, gathered back into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from neox_rl.engines.hf_mapping import EMBEDDING, OUTPUT, Entry, Split, entries, fused, shard, unshard
from neox_rl.engines.model_shape import ModelShape, stage_layers
from neox_rl.engines.port import Topology
from neox_rl.errors import NeoxRLError


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
    """Knows which parameter of which stage holds which part of which HF tensor. ``parameters`` are this rank's, in model order."""

    def __init__(self, model: torch.nn.Module, shape: ModelShape, world: World) -> None:
        self._shape, self._world = shape, world
        self._by_name = dict(model.named_parameters())
        self.parameters = list(self._by_name.values())
        self._stages = stage_layers(shape.num_layers, world.topology.pp)
        # With tied embeddings a single stage holds one parameter for both.
        self._entries = [(entry, self._stage(entry)) for entry in entries(shape) if not (entry.alias and world.topology.pp == 1)]
        mine = {self._local(entry) for entry, stage in self._entries if stage == world.topology.pp_rank}
        if mine != set(self._by_name):
            raise NeoxRLError(f"mapping and model disagree on parameters {sorted(mine ^ set(self._by_name))}: megatron-core's layout moved")

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Sets every parameter of this rank from HF tensors. Raises WeightError naming one that is missing or has another shape."""
        top = self._world.topology
        with torch.no_grad():
            for entry, stage in self._entries:
                if stage == top.pp_rank:
                    full = fused(entry, read, self._shape)
                    self._by_name[self._local(entry)].copy_(shard(full, entry.split, top.tp_rank, top.tp, self._shape.padded_vocab))

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """HF tensors on the CPU, on rank 0; the ranks of its replica take part, the other replicas have nothing to do."""
        top = self._world.topology
        if top.dp_rank != 0:
            return
        for entry, stage in self._entries:
            if entry.alias:
                continue
            full = self._at_origin(entry, stage)
            if full is not None:
                yield from zip(entry.hf, (part.cpu().contiguous() for part in entry.unfuse(full)), strict=True)

    def _at_origin(self, entry: Entry, stage: int) -> Tensor | None:
        """The full parameter on the first rank: gathered over the stage's TP ranks, then sent along the pipeline."""
        top, full = self._world.topology, None
        if stage == top.pp_rank:
            part = self._by_name[self._local(entry)].detach()
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

    def _full_shape(self, entry: Entry) -> tuple[int, ...]:
        shapes = [self._shape.hf_shapes()[name] for name in entry.hf]
        return (sum(size[0] for size in shapes), *shapes[0][1:])

    def _stage(self, entry: Entry) -> int:
        if entry.name == EMBEDDING:
            return 0
        if entry.name == OUTPUT or not entry.name.startswith("decoder.layers."):
            return len(self._stages) - 1
        layer = int(entry.name.split(".")[2])
        return next(number for number, layers in enumerate(self._stages) if layer in layers)

    def _local(self, entry: Entry) -> str:
        """megatron-core counts the layers of a stage from 0."""
        parts = entry.name.split(".")
        if entry.name.startswith("decoder.layers."):
            parts[2] = str(int(parts[2]) - self._stages[self._stage(entry)].start)
        return ".".join(parts)
