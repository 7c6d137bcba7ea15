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

from neox_rl.engines.model_shape import ModelShape
from neox_rl.errors import WeightError


class Split(Enum):
    """How a parameter is divided over tensor-parallel ranks."""

    NONE = "replicated"
    ROWS = "contiguous rows"
    COLUMNS = "contiguous columns"
    GATED = "contiguous rows of each of the two halves"
    VOCAB = "contiguous rows, padded with zero rows to a multiple"


@dataclass(frozen=True)
class Entry:
    """One megatron-core parameter (global layer number) and the HF tensors it is made of.

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
    body = [entry for layer in range(shape.num_layers) for entry in _LAYERS[shape.family](shape, layer)]
    embed, norm, output = {
        "gpt_neox": ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight"),
        "llama": ("model.embed_tokens.weight", "model.norm", "lm_head.weight"),
    }[shape.family]
    last = Entry(OUTPUT, (embed if shape.tied else output,), Split.VOCAB, alias=shape.tied)
    return (Entry(EMBEDDING, (embed,), Split.VOCAB), *body, *_plain("decoder.final_layernorm", norm, bias=shape.norm == "layernorm"), last)


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


def fused(entry: Entry, read: Callable[[str], Tensor], shape: ModelShape) -> Tensor:
    """The entry's full parameter from HF tensors that ``read`` fetches. Raises WeightError naming a tensor of the wrong shape."""
    expected, parts = shape.hf_shapes(), []
    for name in entry.hf:
        tensor = read(name)
        if tuple(tensor.shape) != expected[name]:
            raise WeightError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the config says {expected[name]}: another model?")
        parts.append(tensor)
    return entry.fuse(parts)


def _plain(name: str, hf: str, split: Split = Split.NONE, bias: bool = False, bias_split: Split = Split.NONE) -> list[Entry]:
    entries = [Entry(f"{name}.weight", (f"{hf}.weight",), split)]
    return entries + ([Entry(f"{name}.bias", (f"{hf}.bias",), bias_split)] if bias else [])


def _neox_layer(shape: ModelShape, layer: int) -> list[Entry]:
    """HF's ``query_key_value`` has the interleaved layout already, with one head a group."""
    ours, hf = f"decoder.layers.{layer}", f"gpt_neox.layers.{layer}"
    attention, mlp = shape.attention_bias, shape.mlp_bias
    return [
        *_plain(f"{ours}.input_layernorm", f"{hf}.input_layernorm", bias=True),
        *_plain(f"{ours}.self_attention.linear_qkv", f"{hf}.attention.query_key_value", Split.ROWS, attention, Split.ROWS),
        *_plain(f"{ours}.self_attention.linear_proj", f"{hf}.attention.dense", Split.COLUMNS, attention),
        *_plain(f"{ours}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", bias=True),
        *_plain(f"{ours}.mlp.linear_fc1", f"{hf}.mlp.dense_h_to_4h", Split.ROWS, mlp, Split.ROWS),
        *_plain(f"{ours}.mlp.linear_fc2", f"{hf}.mlp.dense_4h_to_h", Split.COLUMNS, mlp),
    ]


def _llama_layer(shape: ModelShape, layer: int) -> list[Entry]:
    ours, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    groups, dim = shape.num_kv_heads, shape.head_dim
    per_group = shape.num_heads // groups

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *tail) for part in parts], 1).reshape(-1, *tail)

    def separate(full: Tensor) -> Sequence[Tensor]:
        tail = full.shape[1:]
        return [part.reshape(-1, *tail) for part in full.view(groups, -1, *tail).split([per_group * dim, dim, dim], 1)]

    result = [
        *_plain(f"{ours}.input_layernorm", f"{hf}.input_layernorm"),
        *_plain(f"{ours}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm"),
    ]
    for kind in ("weight", "bias"):
        if kind == "weight" or shape.attention_bias:
            sources = tuple(f"{hf}.self_attn.{part}_proj.{kind}" for part in "qkv")
            result.append(Entry(f"{ours}.self_attention.linear_qkv.{kind}", sources, Split.ROWS, interleave, separate))
        if kind == "weight" or shape.mlp_bias:
            sources = tuple(f"{hf}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
            result.append(Entry(f"{ours}.mlp.linear_fc1.{kind}", sources, Split.GATED, torch.cat, lambda full: full.chunk(2)))
    result += _plain(f"{ours}.self_attention.linear_proj", f"{hf}.self_attn.o_proj", Split.COLUMNS, shape.attention_bias)
    result += _plain(f"{ours}.mlp.linear_fc2", f"{hf}.mlp.down_proj", Split.COLUMNS, shape.mlp_bias)
    return result


_LAYERS: dict[str, Callable[[ModelShape, int], list[Entry]]] = {"gpt_neox": _neox_layer, "llama": _llama_layer}
