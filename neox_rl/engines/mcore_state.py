"""Checkpoints of the megatron-core engine: one safetensors file a rank, bound to its parallel layout, never unpickled.

    <directory>/step000042/meta.json            layout, sizes, client state; written last
    <directory>/step000042/rank00000.safetensors  weights, optimizer moments, main weights, random state
    <directory>/latest                          name of the newest whole checkpoint

A checkpoint is written to ``<name>.tmp`` and renamed once every rank is done: a reader never sees half of one. One of the same step is
moved to ``<name>.old`` until the new one stands in its place. Every file is on the disk before the rename that makes it count.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neox_rl.engines.model_shape import ModelShape
from neox_rl.engines.port import Topology
from neox_rl.errors import WeightError
from neox_rl.types import Json

logger = logging.getLogger(__name__)
FORMAT = 1
LATEST, META = "latest", "meta.json"
NAME = re.compile(r"step(\d{6,})")
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
    _to_disk(path)


def publish(temporary: Path, final: Path, meta: Mapping[str, Json]) -> None:
    """Makes a whole checkpoint visible: meta last, then the rename, then the pointer."""
    _write(temporary / META, json.dumps(dict(meta), indent=1, allow_nan=False) + "\n")
    _to_disk(temporary)
    replaced = _replaced(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _to_disk(final.parent)
    pointer = final.parent / f"{LATEST}.tmp"
    _write(pointer, final.name + "\n")
    pointer.rename(final.parent / LATEST)
    _to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(newest: Path, keep: int) -> None:
    """Removes all checkpoints beside ``newest`` but the ``keep`` - 1 of the highest steps; 0 keeps all."""
    if keep:
        others = [path for path in _whole(newest.parent) if path != newest]
        for path in others[keep - 1 :]:
            # Without its meta data it is no checkpoint: a removal that is cut short leaves none that looks whole.
            (path / META).unlink()
            shutil.rmtree(path, ignore_errors=True)


def find(directory: Path) -> Path:
    """The checkpoint that ``directory`` is or points to. Raises WeightError when there is none.

    A crash can leave the one that the pointer names under its ``.old`` name, or no pointer: then the newest whole checkpoint counts.
    """
    if (directory / META).is_file():
        return directory
    pointer = directory / LATEST
    name = pointer.read_text().strip() if pointer.is_file() else ""
    named = [directory / name, _replaced(directory / name)] if name else []
    for found in (*named, *_whole(directory), *_whole(directory, ".old")):
        if (found / META).is_file():
            if found not in named[:1]:
                logger.warning("%s names %r, which is no whole checkpoint; %s is taken", pointer, name, found)
            return found
    if name:
        raise WeightError(f"{pointer} names {name}, which is no checkpoint: it has no {META}; nor is there another")
    raise WeightError(f"{directory} holds neither a checkpoint ({META}) nor a file {LATEST!r} that names one")


def tidy(directory: Path) -> None:
    """Removes what killed saves left, once a newer checkpoint is whole: nobody else works in ``directory``."""
    for path in (*directory.glob("step*.tmp"), *directory.glob("step*.old")):
        shutil.rmtree(path, ignore_errors=True)


def _whole(directory: Path, suffix: str = "") -> list[Path]:
    """The whole checkpoints in ``directory``, of the highest step first. What was cut short in writing is none."""
    paths = [path for path in (directory.iterdir() if directory.is_dir() else ()) if path.name.endswith(suffix)]
    steps = {path: NAME.fullmatch(path.name.removesuffix(suffix)) for path in paths}
    found = {path: int(step[1]) for path, step in steps.items() if step and (path / META).is_file()}
    return sorted(found, key=found.__getitem__, reverse=True)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _to_disk(path)


def _to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_meta(checkpoint: Path, layout: Mapping[str, Json]) -> dict[str, Json]:
    """The meta data, after checking that the layout fits. Raises WeightError naming every difference."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    if meta.get("format") != FORMAT:
        raise WeightError(f"{checkpoint} has format {meta.get('format')!r}, this engine reads {FORMAT}")
    saved = meta["layout"]
    different = [f"{key} {saved.get(key)!r} there, {value!r} here" for key, value in layout.items() if saved.get(key) != value]
    if different:
        raise WeightError(
            f"{checkpoint} is bound to another layout: {'; '.join(different)}; "
            "start with the same layout, or export HF weights and use warmstart.hf_checkpoint"
        )
    return meta


def read_rank(checkpoint: Path, rank: int) -> dict[str, Tensor]:
    return load_file(rank_file(checkpoint, rank))
