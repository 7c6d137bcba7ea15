"""The trainer engine on the user's GPT-NeoX checkout: its model and arguments, DeepSpeed's engine and pipeline schedule, its checkpoints.

    pipe_parallel_size 0     a plain sequence of modules: forward, backward and step of DeepSpeed's engine
    pipe_parallel_size >= 1  DeepSpeed's pipeline engine; the last stage computes the run's loss, never GPT-NeoX's cross entropy

DeepSpeed divides the gradient by micro-batches and data-parallel ranks; the loss is multiplied by both before, so that it is a sum.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_patches
from neox_rl.batch.types import MicroBatch
from neox_rl.config.run import RunConfig
from neox_rl.engines import checkpoint_files
from neox_rl.engines.base import AS_BEFORE, OnLogits, RankEngine
from neox_rl.engines.checkpoint_digests import note, saved_files
from neox_rl.engines.gpt_neox_mapping import neox_places
from neox_rl.engines.mcore_state import layout_of
from neox_rl.engines.packed import ToRows
from neox_rl.engines.rank_env import rank_environment
from neox_rl.engines.rows import make_rows, rows_shape
from neox_rl.engines.weight_parts import WeightParts
from neox_rl.engines.world import device_index
from neox_rl.errors import NeoxRLError, WeightError
from neox_rl.telemetry.jsonl import to_disk
from neox_rl.types import Json

_CONFIGURED = ("loss_scaler", "dynamic_loss_scale", "clip_grad")
"""What DeepSpeed's ZeRO optimizers take from a checkpoint although the run's keys say it, and these may change on a resume."""


class GptNeoXEngine(RankEngine):
    """:class:`neox_rl.engines.port.Engine` on GPT-NeoX. Joins the world of ranks when built. Raises ConfigError without a checkout."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        neox = config.neox
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        env = rank_environment(os.environ, neox.master_addr)
        # DeepSpeed takes its device from it, and srun and mpirun do not set it.
        os.environ["LOCAL_RANK"] = str(device_index(env, torch.cuda.device_count()))
        megatron_patches.apply(megatron_patches.GPT_NEOX)
        with megatron_patches.quiet():
            # Imported after the patches, and not at all by who only reads this module's names.
            from neox_rl.engines import gpt_neox_setup

            self._setup = gpt_neox_setup
            self._world, self._args = gpt_neox_setup.join_world(neox, config.metarl, self.shape, env, config.extra)
            self._engine, self._files = gpt_neox_setup.build_engine(self._args)
        self._pipe = bool(self._args.is_pipe_parallel)
        top = self.topology
        places = neox_places(self.shape, top.tp, self._stage_of, self._pipe)
        self._sharded = int(neox.zero_optimization.get("stage", 0)) == 3
        whole = self._setup.gathered if self._sharded else None
        self._parts = WeightParts(self._engine.module, self.shape, self._world, places, whole)
        self._norm = 0.0
        if scaler := getattr(self._engine.optimizer, "loss_scaler", None):
            scaler.raise_error_at_min_scale = False  # _refuse_overflow says more
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            # Without a wrapper of DeepSpeed's around it: that keeps no norm, and leaves out norms and biases of later stages.
            self._engine.clip_fp32_gradients = lambda: None
            self._engine.optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._set_initial_weights()

    def _stage_of(self, module: int) -> int:
        return int(self._engine.module.stage_owner(module)) if self._pipe else 0

    def _held(self) -> Sequence[Tensor]:
        """Under ZeRO 3 this rank's share; what it had gathered of others is of the weights before, so it is let go."""
        if not self._sharded:
            return super()._held()
        self._engine.optimizer.parameter_offload.partition_all_parameters()
        return [parameter.ds_tensor for parameter in self._parts.parameters]  # type: ignore[attr-defined]

    def _weights_changed(self) -> None:
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "refresh_fp32_params"):
            optimizer.refresh_fp32_params()
        getattr(optimizer, "optimizer", optimizer).state.clear()

    # Steps

    def _train(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits, lr: float) -> float | None:
        count, engine = len(microbatches), self._engine
        engine.set_train_batch_size(count * self.topology.dp)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        factor, scale = float(count * self.topology.dp), float(getattr(engine.optimizer, "loss_scale", 1.0))
        if self._pipe:
            self._run_pipe(microbatches, lambda *args: on_logits(*args) * factor, train=True)
        else:
            engine.train()
            for number, (inputs, finish) in enumerate(self._inputs(microbatches)):
                engine.set_gradient_accumulation_boundary(number == count - 1)
                engine.backward(on_logits(*finish(engine(inputs))) * factor)
            engine.step()
        if self._neox.precision == "fp16" and engine.optimizer.overflow:
            self._refuse_overflow(scale)
            return None
        return float(getattr(engine.optimizer, "_global_grad_norm", self._norm))

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self._neox.precision == "fp16" else None

    def _refuse_overflow(self, scale: float) -> None:
        """Another try helps where the scale can be lowered: every step here makes a version, so none is left out."""
        scaler = self._engine.optimizer.loss_scaler
        if not scaler.dynamic or scale <= scaler.min_scale:
            lower = "fp16.min_loss_scale: 1" if scaler.dynamic else "fp16.loss_scale: 0 (dynamic)"
            raise NeoxRLError(
                f"optimizer step {self._steps + 1}: loss or gradient overflow fp16 at loss scale {scale:g}, the lowest that the block fp16"
                f" allows; {AS_BEFORE}" + (f"; or resume with {lower}" if scale > 1 else "")
            )

    def _forward(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits) -> None:
        if self._pipe:
            self._run_pipe(microbatches, on_logits, train=False)
            return
        self._engine.eval()
        for inputs, finish in self._inputs(microbatches):
            on_logits(*finish(self._engine(inputs)))

    def _run_pipe(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits, train: bool) -> None:
        """DeepSpeed's schedule. A label is the number of its micro-batch: whatever the order, each loss meets its own data."""
        prepared = self._inputs(microbatches)

        def loss(logits: Tensor, label: Tensor) -> Tensor:
            return on_logits(*prepared[int(label)][1](logits))

        engine = self._engine
        engine.module.loss_fn = loss
        engine.reset_activation_shape()
        data = iter([(inputs, torch.tensor(number)) for number, (inputs, _) in enumerate(prepared)])
        if train:
            engine.train_batch(data_iter=data)
        else:
            engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=len(microbatches))

    def _inputs(self, microbatches: Sequence[MicroBatch]) -> list[tuple[tuple[Tensor, Tensor, Tensor], Any]]:
        """For each micro-batch what the model reads, and a function from its logits [B, L, V/tp] to the arguments of ``OnLogits``.

        All have one shape: the stages of a pipeline agree on it once a step.
        """
        device, shape = self._world.device, rows_shape(microbatches, self.topology.tp if self._neox.sequence_parallel else 1)
        mask = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).triu(1)[None, None]

        def prepare(batch: MicroBatch) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
            rows = make_rows(batch, shape)
            slots, targets = rows.slots.to(device), torch.from_numpy(batch.targets).to(device)

            def finish(logits: Tensor) -> tuple[Tensor, MicroBatch, Tensor]:
                return ToRows.apply(logits.flatten(0, 1), slots), batch, targets  # type: ignore[no-untyped-call]

            return (rows.tokens.to(device), rows.positions.to(device), mask), finish

        return [prepare(batch) for batch in microbatches]

    @torch.no_grad()
    def _clip(self) -> None:
        """Clips the gradient by its norm over all ranks, each parameter counted once however many ranks hold it."""
        world, top = self._world, self.topology
        square = torch.zeros((), device=world.device)
        gradients = [p.grad for p in self._parts.parameters if p.grad is not None]
        for parameter in self._parts.parameters:
            mine = getattr(parameter, "model_parallel", False) or top.tp_rank == 0
            if parameter.grad is not None and mine and not getattr(parameter, "ds_pipe_replicated", False):
                square += parameter.grad.float().square().sum()
        for group, size in ((world.tp, top.tp), (world.pp, top.pp)):
            if size > 1:
                dist.all_reduce(square, group=group)
        self._norm = float(square.sqrt())
        limit = self._neox.gradient_clipping
        if limit and self._norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / (self._norm + 1e-6))

    # Checkpoints

    def _layout(self) -> dict[str, Json]:
        zero = int(self._neox.zero_optimization.get("stage", 0))
        return (
            layout_of(self.topology, self.shape, bool(zero), self._neox.precision)
            | {"pipe": self._pipe}
            | ({"zero": 3} if self._sharded else {})
        )

    def save(self, directory: Path, client_state: Mapping[str, Json]) -> Path:
        final = directory / f"global_step{self._steps}"
        temporary = final.with_name(f"{final.name}.tmp")
        with self._writing(directory):
            if self.topology.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                directory.mkdir(parents=True, exist_ok=True)
        for group in self._engine.optimizer.param_groups:
            group["step"] = self._steps  # where Apex's and DeepSpeed's Adam count; torch's counts in the state of each parameter
        with self._writing(directory):
            self._engine.save_checkpoint(str(directory), tag=temporary.name, client_state=self._neox_state(), save_latest=False)
            if self._files is not None:
                self._files.raise_if_full()
            if self._reference is not None:
                names = [name for name, _ in self._engine.module.named_parameters()]
                save_file(dict(zip(names, (t.cpu().contiguous() for t in self._reference), strict=True)), self._reference_file(temporary))
        with self._writing(directory):
            note(temporary, self.topology.rank, saved_files(temporary)[self.topology.rank :: self.topology.world_size])
        with self._writing(directory):
            if self.topology.rank == 0:
                for path in temporary.iterdir():
                    to_disk(path)
                meta: dict[str, Json] = {"format": checkpoint_files.FORMAT, "steps": self._steps, "layout": self._layout()}
                meta["client_state"] = dict(client_state)
                checkpoint_files.publish(temporary, final, meta)
                checkpoint_files.tidy(directory)
                checkpoint_files.prune(final, self._neox.keep_last_n_checkpoints)
        return final

    def _reference_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"reference-rank{self.topology.rank:05d}.safetensors"

    def _neox_state(self) -> dict[str, Any]:
        """What GPT-NeoX looks for when it loads a checkpoint: so its own pretraining can go on from one of ours."""
        return self._setup.client_state(self._args, self._steps)

    def load(self, directory: Path) -> dict[str, Json]:
        """Also a checkpoint of GPT-NeoX's own training: its weights, with an optimizer that starts anew; nothing of the client's."""
        stock = self._located(directory, checkpoint_files.find_foreign)
        if stock is not None:
            self._load_stock(stock)
            return {}
        checkpoint = self._located(directory, checkpoint_files.find)
        meta = self._read_meta(checkpoint, self._layout())
        # The learning rate is given with each step; GPT-NeoX's schedule refuses a run that asks for more steps than it was saved with.
        optimizer = self._engine.optimizer
        configured = {name: getattr(optimizer, name) for name in _CONFIGURED if hasattr(optimizer, name)}
        path, _ = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
        if path is None:
            raise WeightError(f"{checkpoint} was not loaded by DeepSpeed: see the log of rank {self.topology.rank}")
        if "loss_scaler" in configured:
            _go_on(configured["loss_scaler"], optimizer.loss_scaler)
        for name, value in configured.items():
            setattr(optimizer, name, value)
        reference = self._reference_file(checkpoint)
        self._reference = None
        if reference.is_file():
            tensors = load_file(reference, device=self.topology.device)
            self._reference = [tensors[name] for name, _ in self._engine.module.named_parameters()]
        self._steps = int(meta["steps"])
        self.barrier()
        client: dict[str, Json] = meta["client_state"]
        return client

    def _load_stock(self, checkpoint: Path) -> None:
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        only_weights = {"load_module_only": True}
        if self._sharded:
            # DeepSpeed leaves the weights as they are then, without a word: they are with the optimizer's states.
            only_weights = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
            if not any(checkpoint.glob("zero_pp_rank_*_model_states.pt")):
                raise WeightError(
                    f"{checkpoint} was not written under ZeRO 3 and cannot be read under it; set zero_optimization.stage: 1, or turn it"
                    " into an HF checkpoint with tools/neox_checkpoint.py and set metarl.warmstart.hf_checkpoint"
                )
        try:
            path, state = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, **only_weights)
        except (RuntimeError, KeyError, OSError, AssertionError, ZeRORuntimeException) as error:
            raise WeightError(
                f"{checkpoint} does not fit the model of this run ({type(error).__name__}: {error}); use the keys that it was trained with"
            ) from error
        if path is None:
            raise WeightError(f"{checkpoint} holds no files of TP {self.topology.tp}, pipe_parallel_size {self._neox.pipe_parallel_size}")
        different = self._setup.differences(state.get("args", {}), self._args)
        if different:
            raise WeightError(f"{checkpoint} is of another model: {'; '.join(different)}; use the keys that it was trained with")
        self._weights_changed()
        self._steps, self._reference = 0, None
        self.barrier()

    def close(self) -> None:
        self._setup.leave_world()


def _go_on(scaler: Any, saved: Any) -> None:
    """``scaler``, with the limits of the run's block fp16, goes on where the ``saved`` one was. A static scale has only the block's."""
    if not (scaler.dynamic and saved.dynamic):
        return
    scaler.cur_scale = max(saved.cur_scale, scaler.min_scale)
    scaler.cur_iter, scaler.last_overflow_iter = saved.cur_iter, saved.last_overflow_iter
    scaler.cur_hysteresis = min(saved.cur_hysteresis, scaler.delayed_shift)
