"""What every engine over torch.distributed does alike; a framework adds how it builds, schedules, steps and saves.

step:  micro-batches -> the framework's schedule -> logits [T, V/tp] on the last stage -> log-probs, entropy [N] -> loss function
       -> gradients summed over micro-batches and DP ranks -> optimizer -> report, equal on every rank
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from neox_rl.batch.types import MicroBatch
from neox_rl.config.derived import hf_config
from neox_rl.config.hf_directory import check_directory
from neox_rl.config.own import own
from neox_rl.config.run import RunConfig
from neox_rl.engines.checkpoint_files import out_of_room, read_meta
from neox_rl.engines.hf_files import hf_reader, write_hf
from neox_rl.engines.hf_layout import HfLayout
from neox_rl.engines.model_shape import ModelShape, model_shape
from neox_rl.engines.packed import Gather
from neox_rl.engines.port import LossFn, Policy, StepReport, Topology
from neox_rl.engines.weight_parts import WeightParts, World
from neox_rl.errors import DamagedError, DiskFullError, NeoxRLError, UnreadableError, WeightError
from neox_rl.loss.metrics import is_max
from neox_rl.loss.vocab_parallel import token_logprobs_and_entropy
from neox_rl.types import Json

Found = TypeVar("Found", bound=Path | None)
_COUNTED = ("loss", "tokens")
MAX_TRIES = 100
"""Of one optimizer step: a loss scale of 2^32 falls to 1 in 32 tries and those that hysteresis grants, 32 at most."""
AS_BEFORE = (
    "the weights are as before: turn the last checkpoint into an HF one (tools/neox_checkpoint.py) and start another run from it"
    " (metarl.warmstart.hf_checkpoint) with precision bfloat16 or fp32"
)
OnLogits = Callable[[Tensor, MicroBatch, Tensor], Tensor]
"""(logits [T, V/tp], micro-batch, targets [Q]) -> a scalar to take the gradient of. Called on the last stage, once a micro-batch."""


class RankEngine(ABC):
    """:class:`neox_rl.engines.port.Engine` but for ``save``, ``load`` and ``close``. A subclass sets ``_world`` and ``_parts``."""

    _world: World
    _parts: WeightParts

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.shape: ModelShape = model_shape(config, vocab_size)
        self._config, self._neox = config, config.neox
        self._dtype = torch.bfloat16 if config.neox.precision == "bfloat16" else torch.float32
        self._steps = 0
        self.on_retry: Callable[[int], None] = lambda tries: None
        self._reference: list[Tensor] | None = None
        layout = config.metarl.hf_layout
        self._hf_names: HfLayout | None = own(layout, "metarl.hf_layout") if layout else None

    @abstractmethod
    def _train(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits, lr: float) -> float | None:
        """One optimizer step on the sum of what ``on_logits`` returns, over micro-batches and DP ranks; the norm before clipping.

        None: the gradient overflowed its precision and no step was taken; the next try has another loss scale.
        """

    @abstractmethod
    def _forward(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits) -> None:
        """The same without gradient: ``on_logits`` is called in the order of the micro-batches, and its value is not used."""

    def _loss_scale(self) -> float | None:
        """Of the next step; None where the precision needs none."""
        return None

    @abstractmethod
    def _weights_changed(self) -> None:
        """Starts the optimizer anew: its main weights and moments are the old model's."""

    @property
    def topology(self) -> Topology:
        return self._world.topology

    @property
    def _last(self) -> bool:
        return self.topology.pp_rank == self.topology.pp - 1

    def step(self, microbatches: Sequence[MicroBatch], loss_fn: LossFn, lr: float, temperature: float = 1.0) -> StepReport:
        sums: dict[str, Tensor] = {}

        def loss(logits: Tensor, batch: MicroBatch, targets: Tensor) -> Tensor:
            value, metrics = loss_fn(*self._logprobs(logits, batch, targets, temperature), batch)
            counted = {
                "loss": value,
                "tokens": torch.tensor(np.count_nonzero(batch.loss_weight)),
                **{f"metric.{k}": v for k, v in metrics.items()},
            }
            for name, term in counted.items():
                found = term.detach().to(self._world.device, torch.float64)
                sums[name] = found if name not in sums else sums[name].maximum(found) if is_max(name) else sums[name] + found
            return value

        self._check_lengths(microbatches)
        grad_norm, tries = None, 0
        while grad_norm is None:
            if tries == MAX_TRIES:
                raise NeoxRLError(f"optimizer step {self._steps + 1}: loss or gradient overflowed in each of {tries} tries; {AS_BEFORE}")
            if tries:
                self.on_retry(tries)
            tries += 1
            sums.clear()
            grad_norm = self._train(microbatches, loss, lr)
        totals = self._reduce(sums)
        if not (math.isfinite(grad_norm) and math.isfinite(totals["loss"])):
            what = f"optimizer step {self._steps + 1}: loss {totals['loss']}, gradient norm {grad_norm}, learning rate {lr}"
            raise NeoxRLError(
                f"{what}; the weights are spoiled: resume from the last checkpoint with a lower learning rate or more clipping"
            )
        self._steps += 1
        metrics = {name.removeprefix("metric."): value for name, value in totals.items() if name not in _COUNTED}
        if (scale := self._loss_scale()) is not None:
            metrics |= {"loss_scale": scale, "overflows": tries - 1}
        return StepReport(totals["loss"], grad_norm, lr, int(totals["tokens"]), metrics)

    def logprobs(
        self, microbatches: Sequence[MicroBatch], which: Policy = "current", temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        found: list[Tensor] = []

        def keep(logits: Tensor, batch: MicroBatch, targets: Tensor) -> Tensor:
            values, _ = self._logprobs(logits, batch, targets, temperature)
            found.append(values.float())
            return values.sum()

        self._check_lengths(microbatches)
        with torch.no_grad(), self._weights(which):
            self._forward(microbatches, keep)
        world = self._world
        sizes = [len(batch.terms) for batch in microbatches]
        result = torch.cat(found) if self._last else torch.empty(sum(sizes), device=world.device)
        if world.topology.pp > 1:
            dist.broadcast(result, group=world.pp, group_src=world.topology.pp - 1)
        return [part.numpy() for part in result.cpu().split(sizes)]

    def _logprobs(self, logits: Tensor, batch: MicroBatch, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy [N] of each term, from the logits [T, V/tp] of the rows."""
        top = self.topology
        if batch.shared:
            logits = _at(logits, batch.rows)
        logprobs, entropy = token_logprobs_and_entropy(
            logits,
            targets,
            vocab_start=top.tp_rank * logits.shape[-1],
            valid_vocab=self.shape.vocab,
            group=self._world.tp if top.tp > 1 else None,
            temperature=temperature,
        )
        return (_at(logprobs, batch.terms), _at(entropy, batch.terms)) if batch.shared else (logprobs, entropy)

    def _check_lengths(self, microbatches: Sequence[MicroBatch]) -> None:
        sizes = sorted({len(batch) for batch in microbatches})
        if len(sizes) != 1 or sizes[0] % self.topology.tp:
            raise ValueError(
                f"micro-batch lengths {sizes}: a step needs at least one, all of one length, a multiple of TP {self.topology.tp}"
            )

    def _reduce(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over data-parallel ranks (maxima of what ``is_max`` says), known to every stage. The names come from the last stage."""
        world, names = self._world, sorted(sums)
        if world.topology.pp > 1:
            names = json.loads(broadcast(json.dumps(names).encode() if self._last else None, world.pp, world.topology.pp - 1, world.device))
        values = (
            torch.stack([sums[name] for name in names]) if self._last else torch.empty(len(names), dtype=torch.float64, device=world.device)
        )
        if self._last:
            largest, most = values.clone(), torch.tensor([is_max(name) for name in names], device=world.device)
            dist.all_reduce(values, group=world.dp)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=world.dp)
            values = torch.where(most, largest, values)
        if world.topology.pp > 1:
            dist.broadcast(values, group=world.pp, group_src=world.topology.pp - 1)
        return dict(zip(names, values.tolist(), strict=True))

    # Weights

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        tensors = self._parts.gathered()
        return tensors if self._hf_names is None else self._hf_names.exported(tensors, self.shape.hf_shapes())

    def hf_config(self) -> dict[str, Json]:
        return hf_config(self._config, self.shape.vocab)

    def load_hf(self, directory: Path) -> None:
        check_directory(directory, self.hf_config())
        with hf_reader(directory) as read:
            self._set_weights(read if self._hf_names is None else self._hf_names.reader(read, self.shape.hf_shapes()))

    def save_hf(self, directory: Path) -> None:
        tensors = dict(self.named_tensors())
        with self._writing(directory):
            if self.topology.rank == 0:
                write_hf(directory, tensors, self.hf_config())

    def _set_weights(self, read: Callable[[str], Tensor]) -> None:
        self._parts.fill(read)
        self._weights_changed()

    def _set_initial_weights(self) -> None:
        self._set_weights(lambda name: self.shape.initial(name, self._config.metarl.seed))

    def _held(self) -> Sequence[Tensor]:
        """What this rank holds of each parameter, in model order: the storage that the reference policy is exchanged with."""
        return self._parts.parameters

    def set_reference(self) -> None:
        self._reference = [tensor.detach().clone() for tensor in self._held()]

    @contextmanager
    def _weights(self, which: Policy) -> Iterator[None]:
        """Exchanges the parameters' storage for the reference policy's while the block runs."""
        if which == "current":
            yield
            return
        if self._reference is None:
            raise NeoxRLError("there is no reference policy: call set_reference() first (dpo keeps one, others with kl_coef > 0)")
        current = [tensor.data for tensor in self._held()]
        try:
            for tensor, frozen in zip(self._held(), self._reference, strict=True):
                tensor.data = frozen
            yield
        finally:
            for tensor, data in zip(self._held(), current, strict=True):
                tensor.data = data

    def _located(self, directory: Path, find: Callable[[Path], Found]) -> Found:
        return located(directory, find, self._world.control)

    def _read_meta(self, checkpoint: Path, layout: Mapping[str, Json]) -> dict[str, Any]:
        """See ``checkpoint_files.read_meta``. What one rank finds wrong is raised on all: the last word of each is then the same.

        Damage that one has read counts before what another could not read: only the latter is worth a new start.
        """
        rank, size, wrong, place = self.topology.rank, self.topology.world_size, "", 2 * self.topology.world_size
        meta: dict[str, Any] = {}
        try:
            meta = read_meta(checkpoint, layout, rank, size)
        except (WeightError, OSError) as error:
            wrong, place = str(error), rank + size * issubclass(_kind(error), UnreadableError)
        first = torch.tensor(place)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self._world.control)
        if int(first) < 2 * size:
            source = int(first) % size
            words = broadcast(wrong.encode() if rank == source else None, self._world.control, source, torch.device("cpu")).decode()
            raise DamagedError(words) if int(first) < size else UnreadableError(words)
        return meta

    # Control

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        return broadcast(data if self.topology.rank == 0 else None, self._world.control, 0, torch.device("cpu"))

    def barrier(self) -> None:
        dist.barrier(group=self._world.control)

    @contextmanager
    def _writing(self, directory: Path) -> Iterator[None]:
        """A barrier behind what each rank writes in the block. Raises DiskFullError on every rank alike where one had no room."""
        full = 0
        try:
            yield
        except Exception as error:
            if not out_of_room(error):
                raise
            full = 1
        without = torch.tensor(full)
        dist.all_reduce(without, group=self._world.control)
        if int(without):
            raise DiskFullError(
                f"no room on the disk of {directory}, for {int(without)} of {self.topology.world_size} ranks: make room there"
            )


def _at(x: Tensor, index: NDArray[np.int64]) -> Tensor:
    return cast(Tensor, Gather.apply(x, torch.from_numpy(index).to(x.device)))  # type: ignore[no-untyped-call]


def broadcast(data: bytes | None, group: dist.ProcessGroup, source: int, device: torch.device) -> bytes:
    """The bytes of the group's rank ``source`` (``data`` is None on the others) on every rank: their number, then themselves."""
    size = torch.tensor([0 if data is None else len(data)], device=device)
    dist.broadcast(size, group=group, group_src=source)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if buffer.numel():
        dist.broadcast(buffer, group=group, group_src=source)
    return buffer.cpu().numpy().tobytes()


def located(directory: Path, find: Callable[[Path], Found], group: dist.ProcessGroup) -> Found:
    """What ``find`` finds in ``directory`` on the group's rank 0, on every rank. A network file system may show another rank what was there
    before the last save, and weights of two steps would be trained together without a word.

    Raises on all ranks what rank 0 finds wrong, and UnreadableError where one does not see what rank 0 found.
    """
    rank, word = dist.get_rank(group), b""
    if rank == 0:
        try:
            found = find(directory)
            word = json.dumps({"found": None if found is None else _below(found, directory)}).encode()
        except (WeightError, OSError) as error:
            word = json.dumps({"kind": _kind(error).__name__, "wrong": str(error)}).encode()
    said = json.loads(broadcast(word if rank == 0 else None, group, 0, torch.device("cpu")))
    if "wrong" in said:
        raise {DamagedError.__name__: DamagedError, UnreadableError.__name__: UnreadableError}.get(said["kind"], WeightError)(said["wrong"])
    if said["found"] is None:
        return cast(Found, None)
    checkpoint = directory / said["found"]
    blind = torch.tensor(int(not _seen(checkpoint, find)))
    dist.all_reduce(blind, group=group)
    if int(blind):
        raise UnreadableError(
            f"{checkpoint}: {int(blind)} of {dist.get_world_size(group)} ranks do not see this checkpoint, which rank 0 found: try again;"
            " if it stays so, give all machines one file system for checkpoints"
        )
    return cast(Found, checkpoint)


def _kind(error: WeightError | OSError) -> type[WeightError]:
    """What may not be read stays so; what cannot be read now may be read later."""
    if isinstance(error, PermissionError):
        return DamagedError
    return UnreadableError if isinstance(error, OSError) else type(error)


def _below(found: Path, directory: Path) -> str:
    return str(found.relative_to(directory) if found.is_relative_to(directory) else found)


def _seen(checkpoint: Path, find: Callable[[Path], Path | None]) -> bool:
    try:
        return find(checkpoint) == checkpoint
    except (WeightError, OSError):
        return False
