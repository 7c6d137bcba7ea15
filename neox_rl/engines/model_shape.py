"""The model that NeoX keys describe: its HF family, its sizes, its tensors and their initial values."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_rl.config.derived import padded_vocab_size
from neox_rl.config.machine import Machine
from neox_rl.config.rules_model import (
    GPT_NEOX,
    QWEN2,
    heads_divide_width,
    kv_heads_divide,
    model_family,
    one_family,
    rotary_dimensions,
    stages_hold_layers,
    tensor_parallel_divides,
)
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one model. ``vocab`` is the true vocabulary, ``padded_vocab`` the one that the ranks divide."""

    family: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab: int
    padded_vocab: int
    max_positions: int
    norm_eps: float
    rotary_pct: float
    rotary_base: int
    parallel_residual: bool
    tied: bool
    init_std: float

    @property
    def llama(self) -> bool:
        """Llama has RMSNorm, SwiGLU and no bias, and so has Qwen2 but for its ``qkv_bias``; GPT-NeoX has LayerNorm, GELU and a bias in
        every projection and norm."""
        return self.family != GPT_NEOX

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to query, key and value have a bias."""
        return self.family in (GPT_NEOX, QWEN2)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor and its shape, in the order of the layers."""
        h, f, kv = self.hidden, self.ffn, self.num_kv_heads * self.head_dim
        stem, embed, norm, output = "gpt_neox", "embed_in", "final_layer_norm", "embed_out"
        layer = {
            "attention.query_key_value": (3 * h, h),
            "attention.dense": (h, h),
            "mlp.dense_h_to_4h": (f, h),
            "mlp.dense_4h_to_h": (h, f),
        }
        if self.llama:
            stem, embed, norm, output = "model", "embed_tokens", "norm", "lm_head"
            layer = {f"self_attn.{part}_proj": (h if part in "qo" else kv, h) for part in "qkvo"}
            layer |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        sizes: dict[str, tuple[int, ...]] = {f"{stem}.{embed}.weight": (self.vocab, h)}
        blocks: dict[str, tuple[int, ...]] = {"input_layernorm": (h,), "post_attention_layernorm": (h,), **layer}
        for number in range(self.num_layers):
            for name, size in blocks.items():
                sizes |= self._with_bias(f"{stem}.layers.{number}.{name}", size)
        sizes |= self._with_bias(f"{stem}.{norm}", (h,))
        return sizes if self.tied else sizes | {f"{output}.weight": (self.vocab, h)}

    def _with_bias(self, name: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        biased = not self.llama or (self.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")))
        return {f"{name}.weight": size} | ({f"{name}.bias": size[:1]} if biased else {})

    def initial(self, name: str, seed: int) -> Tensor:
        """The initial value of an HF tensor (fp32), a function of the seed and the name alone: equal for every parallel layout.

        Normal with ``init_std``, divided by sqrt(2 x layers) where a matrix writes into the residual stream (GPT-2, section 2.3).
        """
        size = self.hf_shapes()[name]
        if name.endswith(".bias"):
            return torch.zeros(size)
        if len(size) == 1:
            return torch.ones(size)
        std = self.init_std
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight", "o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.num_layers)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(size).normal_(0.0, std, generator=generator)


def model_shape(config: RunConfig, vocab_size: int) -> ModelShape:
    """The model of these keys. Raises ConfigError where no HF architecture has the combination: vLLM could not serve it."""
    here = Machine((0,))
    for rule in (one_family, heads_divide_width, kv_heads_divide, rotary_dimensions, tensor_parallel_divides, stages_hold_layers):
        for message in rule(config, here):
            raise ConfigError(message)
    neox, family = config.neox, model_family(config)
    return ModelShape(
        family=family,
        num_layers=neox.num_layers,
        hidden=neox.hidden_size,
        num_heads=neox.num_attention_heads,
        num_kv_heads=neox.kv_heads,
        ffn=neox.mlp_width,
        vocab=vocab_size,
        padded_vocab=padded_vocab_size(config, vocab_size),
        max_positions=neox.max_positions,
        norm_eps=neox.layernorm_epsilon if family == GPT_NEOX else neox.rms_norm_epsilon,
        rotary_pct=neox.rotary_pct,
        rotary_base=neox.rotary_emb_base,
        parallel_residual=neox.gpt_j_residual,
        tied=not neox.no_weight_tying,
        init_std=neox.init_std,
    )


def stage_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """The layers of each pipeline stage. Where they do not divide evenly the first stage differs from the others, as little as can be."""
    share = min(range(1, (num_layers - 1) // max(pp - 1, 1) + 1), key=lambda s: (max(s, num_layers - (pp - 1) * s), s), default=num_layers)
    first = num_layers - (pp - 1) * share
    return (range(first), *(range(first + stage * share, first + (stage + 1) * share) for stage in range(pp - 1)))
