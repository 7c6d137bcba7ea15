"""Weights between the HF layout and GPT-NeoX's: which HF tensors each parameter is made of, and where it lives. Pure.

A GPT-NeoX model is a row of modules: 0 the embedding, 2 to L + 1 the layers, L + 3 the final norm, L + 4 the output matrix; 1 and
L + 2 only reshape. Its fused matrices, unlike megatron-core's, stand side by side in the part of each tensor-parallel rank:
``linear1`` with SwiGLU holds [up; gate] of the rank, ``query_key_value`` with grouped-query attention [q; k; v] of the rank; without
grouping it holds [q; k; v] of each head, as HF's GPTNeoX does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neox_rl.engines.hf_mapping import Entry, Place, Split
from neox_rl.engines.model_shape import ModelShape

FIRST_LAYER = 2
TIED = "tied_modules.embed.word_embeddings.weight"


def neox_places(shape: ModelShape, tp: int, stage_of: Callable[[int], int], pipe: bool) -> tuple[Place, ...]:
    """Every parameter. ``stage_of`` a module number is its pipeline stage; ``pipe``: a PipelineModule, else a plain sequence."""
    norm, output = shape.num_layers + FIRST_LAYER + 1, shape.num_layers + FIRST_LAYER + 2
    stem, embed, final, head = ("gpt_neox", "embed_in", "final_layer_norm", "embed_out.weight")
    if shape.llama:
        stem, embed, final, head = ("model", "embed_tokens", "norm", "lm_head.weight")
    words = (f"{stem}.{embed}.weight",)
    numbered = [(0, Entry("word_embeddings.weight", words, Split.VOCAB))]
    for layer in range(shape.num_layers):
        numbered += [(layer + FIRST_LAYER, entry) for entry in _layer(shape, tp, f"{stem}.layers.{layer}")]
    numbered += [(norm, entry) for entry in _norm(shape, "norm", f"{stem}.{final}")]
    if not shape.tied:
        numbered.append((output, Entry("final_linear.weight", (head,), Split.VOCAB)))
    elif pipe and stage_of(output) != stage_of(0):
        numbered.append((output, Entry("word_embeddings.weight", words, Split.VOCAB, alias=True)))

    def local(module: int, entry: Entry) -> str:
        if pipe and shape.tied and module in (0, output):
            return TIED
        return f"{module}.{entry.name}" if pipe else f"sequential.{module}.{entry.name}"

    return tuple(Place(entry, stage_of(module), local(module, entry)) for module, entry in numbered)


def _layer(shape: ModelShape, tp: int, hf: str) -> list[Entry]:
    if not shape.llama:
        # With a parallel residual GPT-NeoX adds the biases of both sublayers on every rank and then sums over the ranks.
        last_bias = Split.SUM if shape.parallel_residual else Split.NONE
        return [
            *_norm(shape, "input_layernorm", f"{hf}.input_layernorm"),
            *_norm(shape, "post_attention_layernorm", f"{hf}.post_attention_layernorm"),
            *_linear("attention.query_key_value", f"{hf}.attention.query_key_value", Split.ROWS, Split.ROWS),
            *_linear("attention.dense", f"{hf}.attention.dense", Split.COLUMNS, last_bias),
            *_linear("mlp.linear1", f"{hf}.mlp.dense_h_to_4h", Split.ROWS, Split.ROWS),
            *_linear("mlp.linear2", f"{hf}.mlp.dense_4h_to_h", Split.COLUMNS, last_bias),
        ]
    kv = shape.num_kv_heads * shape.head_dim
    grouped = shape.num_kv_heads != shape.num_heads
    qkv = _Heads(shape) if not grouped else _ByRank(tp, (shape.hidden, kv, kv))
    up_gate = _ByRank(tp, (shape.ffn, shape.ffn))
    names = tuple(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv")
    return [
        *_norm(shape, "input_layernorm", f"{hf}.input_layernorm"),
        *_norm(shape, "post_attention_layernorm", f"{hf}.post_attention_layernorm"),
        Entry("attention.query_key_value.weight", names, Split.ROWS, qkv.fuse, qkv.unfuse),
        Entry("attention.dense.weight", (f"{hf}.self_attn.o_proj.weight",), Split.COLUMNS),
        Entry("mlp.linear1.weight", (f"{hf}.mlp.up_proj.weight", f"{hf}.mlp.gate_proj.weight"), Split.ROWS, up_gate.fuse, up_gate.unfuse),
        Entry("mlp.linear2.weight", (f"{hf}.mlp.down_proj.weight",), Split.COLUMNS),
    ]


def _norm(shape: ModelShape, name: str, hf: str) -> list[Entry]:
    """GPT-NeoX calls the weight of its RMSNorm ``scale``."""
    if shape.llama:
        return [Entry(f"{name}.scale", (f"{hf}.weight",))]
    return [Entry(f"{name}.weight", (f"{hf}.weight",)), Entry(f"{name}.bias", (f"{hf}.bias",))]


def _linear(name: str, hf: str, split: Split, bias: Split) -> list[Entry]:
    return [Entry(f"{name}.weight", (f"{hf}.weight",), split), Entry(f"{name}.bias", (f"{hf}.bias",), bias)]


class _ByRank:
    """Matrices of ``rows`` rows each, fused so that every rank's contiguous rows are its part of the first, then of the second ..."""

    def __init__(self, tp: int, rows: tuple[int, ...]) -> None:
        self.tp, self.rows = tp, rows

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.chunk(self.tp)[rank] for rank in range(self.tp) for part in parts])

    def unfuse(self, full: Tensor) -> Sequence[Tensor]:
        of_rank = [own.split([rows // self.tp for rows in self.rows]) for own in full.chunk(self.tp)]
        return [torch.cat(parts) for parts in zip(*of_rank, strict=True)]


class _Heads:
    """Query, key and value rows of one head side by side, head after head."""

    def __init__(self, shape: ModelShape) -> None:
        self.heads = shape.num_heads

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        tail = parts[0].shape[1:]
        return torch.cat([part.reshape(self.heads, -1, *tail) for part in parts], 1).reshape(-1, *tail)

    def unfuse(self, full: Tensor) -> Sequence[Tensor]:
        parts = full.view(self.heads, 3, -1, *full.shape[1:]).unbind(1)
        return [part.reshape(-1, *full.shape[1:]) for part in parts]
