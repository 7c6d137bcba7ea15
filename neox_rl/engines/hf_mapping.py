"""Weights between the HF layout and megatron-core's: pure functions of tensors, no process groups.

megatron-core fuses and interleaves: ``linear_qkv`` holds, for each KV group, [its query heads | its key head | its value head] as
rows; ``linear_fc1`` with SwiGLU holds [gate; up]. A tensor-parallel rank owns a contiguous part of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from neox_rl.engines.model_shape import ModelShape, stage_layers
from neox_rl.errors import WeightError


class Split(Enum):
    """How a parameter is divided over tensor-parallel ranks."""

    NONE = "replicated"
    ROWS = "contiguous rows"
    COLUMNS = "contiguous columns"
    GATED = "contiguous rows of each of the two halves"
    VOCAB = "contiguous rows, padded with zero rows to a multiple"
    SUM = "terms of a sum, all of it on the first rank"


@dataclass(frozen=True)
class Entry:
    """One parameter of the framework (global layer number) and the HF tensors it is made of.

    ``alias``: a copy of another parameter (the output matrix of tied embeddings on the last stage), not exported.
    """

    name: str
    hf: tuple[str, ...]
    split: Split = Split.NONE
    fuse: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    unfuse: Callable[[Tensor], Sequence[Tensor]] = lambda full: (full,)
    alias: bool = False


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def entries(shape: ModelShape) -> tuple[Entry, ...]:
    """Every parameter of the model, in the order of the layers."""
    layers = _llama_layer if shape.llama else _neox_layer
    body = [entry for layer in range(shape.num_layers) for entry in layers(shape, layer)]
    embed, norm, output = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    if shape.llama:
        embed, norm, output = ("model.embed_tokens", "model.norm", "lm_head")
    last = Entry(OUTPUT, (f"{embed if shape.tied else output}.weight",), Split.VOCAB, alias=shape.tied)
    final_norm = _plain("decoder.final_layernorm", norm, bias=not shape.llama)
    return (Entry(EMBEDDING, (f"{embed}.weight",), Split.VOCAB), *body, *final_norm, last)


@dataclass(frozen=True)
class Place:
    """Where an entry's parameter lives: the pipeline stage, and the parameter's name in that stage's model."""

    entry: Entry
    stage: int
    local: str


def places(shape: ModelShape, pp: int) -> tuple[Place, ...]:
    """megatron-core's: it counts the layers of a stage from 0. With tied embeddings a single stage holds one parameter for both."""
    stages = stage_layers(shape.num_layers, pp)

    def place(entry: Entry) -> Place:
        if not entry.name.startswith("decoder.layers."):
            return Place(entry, 0 if entry.name == EMBEDDING else pp - 1, entry.name)
        _, _, layer, rest = entry.name.split(".", 3)
        stage = next(number for number, layers in enumerate(stages) if int(layer) in layers)
        return Place(entry, stage, f"decoder.layers.{int(layer) - stages[stage].start}.{rest}")

    return tuple(place(entry) for entry in entries(shape) if not (entry.alias and pp == 1))


def shard(full: Tensor, split: Split, rank: int, size: int, padded_vocab: int) -> Tensor:
    """Rank ``rank``'s part of a fused parameter in its full shape. The vocabulary is padded with zero rows first."""
    match split:
        case Split.NONE:
            return full
        case Split.ROWS:
            return full.chunk(size, 0)[rank]
        case Split.COLUMNS:
            return full.chunk(size, 1)[rank]
        case Split.GATED:
            return full.view(2, -1, *full.shape[1:]).chunk(size, 1)[rank].reshape(-1, *full.shape[1:])
        case Split.VOCAB:
            padding = full.new_zeros(padded_vocab - full.shape[0], *full.shape[1:])
            return torch.cat([full, padding]).chunk(size, 0)[rank]
        case Split.SUM:
            return full if rank == 0 else torch.zeros_like(full)


def unshard(parts: Sequence[Tensor], split: Split, vocab: int) -> Tensor:
    """Inverse of :func:`shard`: the full parameter, the vocabulary cut to its true size."""
    match split:
        case Split.NONE:
            return parts[0]
        case Split.ROWS:
            return torch.cat(list(parts), 0)
        case Split.COLUMNS:
            return torch.cat(list(parts), 1)
        case Split.GATED:
            tail = parts[0].shape[1:]
            return torch.cat([part.view(2, -1, *tail) for part in parts], 1).reshape(-1, *tail)
        case Split.VOCAB:
            return torch.cat(list(parts), 0)[:vocab]
        case Split.SUM:
            return torch.stack(list(parts)).sum(0)


def fused(entry: Entry, read: Callable[[str], Tensor], shape: ModelShape) -> Tensor:
    """The entry's full parameter from HF tensors that ``read`` fetches. Raises WeightError naming a tensor of the wrong shape.

    A vocabulary with rows to spare, as many published checkpoints have, is cut to the tokenizer's size.
    """
    expected, parts = shape.hf_shapes(), []
    for name in entry.hf:
        tensor = read(name)
        if entry.split is Split.VOCAB:
            tensor = tensor[: shape.vocab]
        if tuple(tensor.shape) != expected[name]:
            raise WeightError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the config says {expected[name]}: another model?")
        parts.append(tensor)
    return entry.fuse(parts)


def _plain(name: str, hf: str, split: Split = Split.NONE, bias: bool = False) -> list[Entry]:
    """A weight, and a bias that is divided where the rows are."""
    bias_split = Split.ROWS if split is Split.ROWS else Split.NONE
    return [Entry(f"{name}.weight", (f"{hf}.weight",), split)] + ([Entry(f"{name}.bias", (f"{hf}.bias",), bias_split)] if bias else [])


def _neox_layer(shape: ModelShape, layer: int) -> list[Entry]:
    """HF's ``query_key_value`` has the interleaved layout already, with one head a group."""
    ours, hf = f"decoder.layers.{layer}", f"gpt_neox.layers.{layer}"
    return [
        *_plain(f"{ours}.input_layernorm", f"{hf}.input_layernorm", bias=True),
        *_plain(f"{ours}.self_attention.linear_qkv", f"{hf}.attention.query_key_value", Split.ROWS, bias=True),
        *_plain(f"{ours}.self_attention.linear_proj", f"{hf}.attention.dense", Split.COLUMNS, bias=True),
        *_plain(f"{ours}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", bias=True),
        *_plain(f"{ours}.mlp.linear_fc1", f"{hf}.mlp.dense_h_to_4h", Split.ROWS, bias=True),
        *_plain(f"{ours}.mlp.linear_fc2", f"{hf}.mlp.dense_4h_to_h", Split.COLUMNS, bias=True),
    ]


def _llama_layer(shape: ModelShape, layer: int) -> list[Entry]:
    ours, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    groups, dim = shape.num_kv_heads, shape.head_dim

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        """Matrices, or biases."""
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], 1).reshape(-1, *tail)

    def separate(full: Tensor) -> Sequence[Tensor]:
        tail = full.shape[1:]
        parts = full.view(groups, -1, *tail).split([shape.num_heads // groups * dim, dim, dim], 1)
        return [part.reshape(-1, *tail) for part in parts]

    def qkv(kind: str) -> Entry:
        names = tuple(f"{hf}.self_attn.{part}_proj.{kind}" for part in "qkv")
        return Entry(f"{ours}.self_attention.linear_qkv.{kind}", names, Split.ROWS, interleave, separate)

    gated = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
    return [
        *_plain(f"{ours}.input_layernorm", f"{hf}.input_layernorm"),
        *map(qkv, ("weight", "bias") if shape.qkv_bias else ("weight",)),
        *_plain(f"{ours}.self_attention.linear_proj", f"{hf}.self_attn.o_proj", Split.COLUMNS),
        *_plain(f"{ours}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm"),
        Entry(f"{ours}.mlp.linear_fc1.weight", gated, Split.GATED, lambda parts: torch.cat(list(parts)), lambda full: full.chunk(2)),
        *_plain(f"{ours}.mlp.linear_fc2", f"{hf}.mlp.down_proj", Split.COLUMNS),
    ]
