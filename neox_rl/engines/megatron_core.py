"""The trainer engine on megatron-core: TP, PP, DP and sequence parallelism, on CPU with gloo and on CUDA with NCCL.

step:  micro-batches -> mcore's 1F1B schedule -> logits [T, V/tp] on the last stage -> log-probs, entropy -> loss function
       -> gradients summed over micro-batches and DP ranks -> AdamW -> report, equal on every rank
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import megatron_patches
from neox_rl.batch.types import MicroBatch
from neox_rl.config.derived import hf_config
from neox_rl.config.run import RunConfig
from neox_rl.engines import mcore_state
from neox_rl.engines.hf_files import check_config, hf_reader, write_hf
from neox_rl.engines.model_shape import ModelShape, model_shape
from neox_rl.engines.packed import Pack, make_pack
from neox_rl.engines.port import LossFn, Policy, StepReport, Topology
from neox_rl.engines.rank_env import rank_environment
from neox_rl.engines.weight_parts import WeightParts
from neox_rl.errors import NeoxRLError
from neox_rl.loss.metrics import is_max
from neox_rl.loss.vocab_parallel import token_logprobs_and_entropy
from neox_rl.types import Json

_COUNTED = ("loss", "tokens")


class MegatronCoreEngine:
    """:class:`neox_rl.engines.port.Engine` on megatron-core. Joins the world of ranks when built."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        neox = config.neox
        self.shape: ModelShape = model_shape(config, vocab_size)
        self._config, self._neox = config, neox
        self._dtype = torch.bfloat16 if neox.precision == "bfloat16" else torch.float32
        megatron_patches.apply()
        with megatron_patches.quiet():
            # Imported after the patches, and not at all by who only reads this module's names.
            from neox_rl.engines import mcore_setup

            self._setup = mcore_setup
            self._world = mcore_setup.join_world(neox, config.metarl, rank_environment(os.environ, neox.master_addr))
            top = self._world.topology
            self._first, self._last = top.pp_rank == 0, top.pp_rank == top.pp - 1
            self._model = mcore_setup.build_parts(neox, self.shape, self._world, self._first, self._last)
        self._inner: Any = self._model.module
        self._optimizer: Any = None
        self._steps = 0
        self._reference: list[Tensor] | None = None
        self._parts = WeightParts(self._inner, self.shape, self._world)
        self._set_weights(lambda name: self.shape.initial(name, config.metarl.seed))

    @property
    def topology(self) -> Topology:
        return self._world.topology

    def step(self, microbatches: Sequence[MicroBatch], loss_fn: LossFn, lr: float, temperature: float = 1.0) -> StepReport:
        sums: dict[str, Tensor] = {}

        def loss(logits: Tensor, batch: MicroBatch, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value, metrics = loss_fn(*self._logprobs(logits, targets, temperature), batch)
            counted = {
                "loss": value,
                "tokens": torch.tensor(np.count_nonzero(batch.loss_weight)),
                **{f"metric.{k}": v for k, v in metrics.items()},
            }
            for name, term in counted.items():
                found = term.detach().to(self._world.device, torch.float64)
                sums[name] = found if name not in sums else sums[name].maximum(found) if is_max(name) else sums[name] + found
            return value, value.new_zeros((), dtype=torch.int), {}

        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._schedule(microbatches, loss, forward_only=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self._optimizer.step()
        totals = self._reduce(sums)
        if not (math.isfinite(grad_norm) and math.isfinite(totals["loss"])):
            what = f"optimizer step {self._steps + 1}: loss {totals['loss']}, gradient norm {grad_norm}, learning rate {lr}"
            raise NeoxRLError(
                f"{what}; the weights are spoiled: resume from the last checkpoint with a lower learning rate or more clipping"
            )
        self._steps += 1
        metrics = {name.removeprefix("metric."): value for name, value in totals.items() if name not in _COUNTED}
        return StepReport(totals["loss"], float(grad_norm), lr, int(totals["tokens"]), metrics)

    def logprobs(
        self, microbatches: Sequence[MicroBatch], which: Policy = "current", temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        found: list[Tensor] = []

        def keep(logits: Tensor, batch: MicroBatch, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            values, _ = self._logprobs(logits, targets, temperature)
            found.append(values.float())
            return values.sum(), values.new_zeros((), dtype=torch.int), {}

        with torch.no_grad(), self._weights(which):
            self._schedule(microbatches, keep, forward_only=True)
        world = self._world
        result = torch.stack(found) if self._last else torch.empty(len(microbatches), len(microbatches[0]), device=world.device)
        if world.topology.pp > 1:
            dist.broadcast(result, group=world.pp, group_src=world.topology.pp - 1)
        return list(result.cpu().numpy())

    def _logprobs(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        top = self.topology
        return token_logprobs_and_entropy(
            logits,
            targets,
            vocab_start=top.tp_rank * logits.shape[-1],
            valid_vocab=self.shape.vocab,
            group=self._world.tp if top.tp > 1 else None,
            temperature=temperature,
        )

    def _schedule(self, microbatches: Sequence[MicroBatch], loss: Callable[..., Any], forward_only: bool) -> None:
        """Runs megatron-core's schedule; ``loss(logits, micro-batch, targets)`` is called on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        lengths = {len(batch) for batch in microbatches}
        if len(lengths) != 1 or lengths.pop() % self.topology.tp:
            sizes = sorted({len(batch) for batch in microbatches})
            raise ValueError(
                f"micro-batch lengths {sizes}: a step needs at least one, all of one length, a multiple of TP {self.topology.tp}"
            )

        def forward(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(data)
            tokens, targets, pack = self._to_device(batch)
            return model(tokens, pack), lambda logits: loss(logits, batch, targets)

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(microbatches),
            model=[self._model],
            num_microbatches=len(microbatches),
            seq_length=len(microbatches[0]),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _to_device(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Pack]:
        tokens, targets, positions = (torch.from_numpy(x).to(self._world.device) for x in (batch.tokens, batch.targets, batch.positions))
        return tokens, targets, make_pack(batch.cu_seqlens, positions, self.shape.rotary_dim, self.shape.rotary_base, self._dtype)

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

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._parts.gathered()

    def hf_config(self) -> dict[str, Json]:
        return hf_config(self._config, self.shape.vocab)

    def load_hf(self, directory: Path) -> None:
        check_config(directory, self.hf_config())
        with hf_reader(directory) as read:
            self._set_weights(read)

    def save_hf(self, directory: Path) -> None:
        tensors = dict(self.named_tensors())
        if self.topology.rank == 0:
            write_hf(directory, tensors, self.hf_config())
        self.barrier()

    def _set_weights(self, read: Callable[[str], Tensor]) -> None:
        """Fills every parameter from HF tensors and starts the optimizer anew: its main weights and moments are the old model's."""
        self._parts.fill(read)
        self._optimizer = self._setup.build_optimizer(self._neox, self._model)

    def set_reference(self) -> None:
        self._reference = [parameter.detach().clone() for parameter in self._parts.parameters]

    @contextmanager
    def _weights(self, which: Policy) -> Iterator[None]:
        """Exchanges the parameters' storage for the reference policy's while the block runs."""
        if which == "current":
            yield
            return
        if self._reference is None:
            raise NeoxRLError("there is no reference policy: call set_reference() first (objective.kl_coef is 0 where none is kept)")
        current = [parameter.data for parameter in self._parts.parameters]
        try:
            for parameter, frozen in zip(self._parts.parameters, self._reference, strict=True):
                parameter.data = frozen
            yield
        finally:
            for parameter, data in zip(self._parts.parameters, current, strict=True):
                parameter.data = data

    def _layout(self) -> dict[str, Json]:
        sharded = bool(self._model.ddp_config.use_distributed_optimizer)
        return mcore_state.layout_of(self.topology, self.shape, sharded, self._neox.precision)

    def save(self, directory: Path, client_state: Mapping[str, Json]) -> Path:
        final = directory / f"step{self._steps:06d}"
        temporary = directory / f"{final.name}.tmp"
        if self.topology.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.barrier()
        state = mcore_state.collect(self._inner, self._setup.torch_optimizers(self._optimizer), self._reference)
        mcore_state.write_rank(temporary, self.topology.rank, state)
        self.barrier()
        if self.topology.rank == 0:
            meta: dict[str, Json] = {"format": mcore_state.FORMAT, "steps": self._steps, "layout": self._layout()}
            meta["client_state"] = dict(client_state)
            mcore_state.publish(temporary, final, meta)
            mcore_state.tidy(directory)
            mcore_state.prune(final, self._neox.keep_last_n_checkpoints)
        self.barrier()
        return final

    def load(self, directory: Path) -> dict[str, Json]:
        checkpoint = mcore_state.find(directory)
        meta: dict[str, Any] = mcore_state.read_meta(checkpoint, self._layout())
        state = mcore_state.read_rank(checkpoint, self.topology.rank)
        self._reference = mcore_state.restore(state, self._inner, self._setup.torch_optimizers(self._optimizer))
        self._steps = int(meta["steps"])
        self.barrier()
        client: dict[str, Json] = meta["client_state"]
        return client

    # Control

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        return broadcast(data if self.topology.rank == 0 else None, self._world.control, 0, torch.device("cpu"))

    def barrier(self) -> None:
        dist.barrier(group=self._world.control)

    def close(self) -> None:
        self._setup.leave_world()


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
