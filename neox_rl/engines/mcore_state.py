"""What a checkpoint of the megatron-core engine holds: one safetensors file a rank, bound to its parallel layout, never unpickled.

``rank00000.safetensors``: weights, optimizer moments, main weights, random state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neox_rl.engines.model_shape import ModelShape
from neox_rl.engines.port import Topology
from neox_rl.telemetry.jsonl import to_disk
from neox_rl.types import Json

_OPTIMIZER, _GROUP, _MAIN, _MODEL, _REFERENCE, _RNG = "optimizer.", "group.", "main.", "model.", "reference.", "rng."


def layout_of(topology: Topology, shape: ModelShape, sharded_optimizer: bool, precision: str) -> dict[str, Json]:
    """What must be equal for a checkpoint to fit."""
    sizes = {key: value for key, value in asdict(shape).items() if key != "init_std"}
    return {"tp": topology.tp, "pp": topology.pp, "dp": topology.dp, "zero": sharded_optimizer, "precision": precision, **sizes}


def rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank:05d}.safetensors"


def collect(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], reference: list[Tensor] | None) -> dict[str, Tensor]:
    """This rank's state as named tensors, every one with storage of its own."""
    state: dict[str, Tensor] = {f"{_MODEL}{name}": parameter for name, parameter in model.named_parameters()}
    for number, (name, _) in enumerate(model.named_parameters()):
        if reference is not None:
            state[f"{_REFERENCE}{name}"] = reference[number]
    for slot, parameter, values in _optimizer_slots(optimizers):
        state[f"{_MAIN}{slot}"] = parameter
        state |= {f"{_OPTIMIZER}{slot}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    for slot, group in _groups(optimizers):
        # Apex and Transformer Engine count the steps of Adam here, torch for each parameter.
        if "step" in group:
            state[f"{_GROUP}{slot}"] = torch.as_tensor(group["step"])
    state[f"{_RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state[f"{_RNG}cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def restore(state: Mapping[str, Tensor], model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Tensor] | None:
    """Puts :func:`collect`'s tensors back in place; returns the reference weights, None where the checkpoint has none.

    Every parameter gets an optimizer step counter of its own: one shared by several is advanced once for each of them, and the
    bias correction of Adam goes wrong without a sign.
    """
    parameters = dict(model.named_parameters())
    reference: list[Tensor] = []
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"{_MODEL}{name}"])
            if f"{_REFERENCE}{name}" in state:
                reference.append(state[f"{_REFERENCE}{name}"].to(parameter.device))
        for slot, main, values in _optimizer_slots(optimizers):
            main.copy_(state[f"{_MAIN}{slot}"])
            prefix = f"{_OPTIMIZER}{slot}."
            values.clear()
            values |= {key[len(prefix) :]: tensor.to(main.device) for key, tensor in state.items() if key.startswith(prefix)}
    for slot, group in _groups(optimizers):
        if f"{_GROUP}{slot}" in state:
            group["step"] = int(state[f"{_GROUP}{slot}"])
    torch.set_rng_state(state[f"{_RNG}cpu"])
    if torch.cuda.is_available() and f"{_RNG}cuda" in state:
        torch.cuda.set_rng_state(state[f"{_RNG}cuda"])
    return reference or None


def _optimizer_slots(optimizers: list[torch.optim.Optimizer]) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(stable name, parameter or main shard, its mutable state) of each optimized tensor."""
    return [
        (f"{slot}.{p}", parameter, optimizers[int(slot.split(".")[0])].state[parameter])
        for slot, group in _groups(optimizers)
        for p, parameter in enumerate(group["params"])
    ]


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{o}.{g}", group) for o, optimizer in enumerate(optimizers) for g, group in enumerate(optimizer.param_groups)]


def write_rank(directory: Path, rank: int, state: dict[str, Tensor]) -> None:
    path = rank_file(directory, rank)
    save_file(state, path)
    to_disk(path)


def read_rank(checkpoint: Path, rank: int) -> dict[str, Tensor]:
    return load_file(rank_file(checkpoint, rank))
