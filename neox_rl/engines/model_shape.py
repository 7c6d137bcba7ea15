"""The model that NeoX keys describe: its HF family, its sizes, its HF config and its initial weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_rl.config.neox import NeoXConfig
from neox_rl.errors import ConfigError
from neox_rl.types import Json


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
    norm: str
    norm_eps: float
    rotary_pct: float
    rotary_base: int
    parallel_residual: bool
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    init_std: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor and its shape, in the order of the layers."""
        h, f, kv = self.hidden, self.ffn, self.num_kv_heads * self.head_dim
        neox = self.family == "gpt_neox"
        shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight" if neox else "model.embed_tokens.weight": (self.vocab, h)}
        if neox:
            attention = {"attention.query_key_value": (3 * h, h), "attention.dense": (h, h)}
            mlp = {"mlp.dense_h_to_4h": (f, h), "mlp.dense_4h_to_h": (h, f)}
        else:
            attention = {f"self_attn.{part}_proj": (h if part in "qo" else kv, h) for part in "qkvo"}
            mlp = {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        for layer in range(self.num_layers):
            prefix = f"{'gpt_neox' if neox else 'model'}.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                _with_bias(shapes, prefix + norm, (h,), bias=neox)
            for matrices, bias in ((attention, self.attention_bias), (mlp, self.mlp_bias)):
                for name, size in matrices.items():
                    _with_bias(shapes, prefix + name, size, bias)
        _with_bias(shapes, "gpt_neox.final_layer_norm" if neox else "model.norm", (h,), bias=neox)
        if not self.tied:
            shapes["embed_out.weight" if neox else "lm_head.weight"] = (self.vocab, h)
        return shapes

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

    def hf_config(self, dtype: str) -> dict[str, Json]:
        """``config.json``: transformers' LlamaConfig or GPTNeoXConfig."""
        rope: dict[str, Json] = {"rope_type": "default", "rope_theta": float(self.rotary_base)}
        common: dict[str, Json] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.max_positions,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.init_std,
            "bos_token_id": None,
            "eos_token_id": None,
            "use_cache": True,
            "torch_dtype": dtype,
        }
        if self.family == "llama":
            return common | {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "mlp_bias": self.mlp_bias,
                "rms_norm_eps": self.norm_eps,
                "rope_theta": float(self.rotary_base),
                "rope_parameters": rope,
            }
        return common | {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "layer_norm_eps": self.norm_eps,
            "rotary_pct": self.rotary_pct,
            "rotary_emb_base": self.rotary_base,
            "rope_parameters": rope | {"partial_rotary_factor": self.rotary_pct},
            "use_parallel_residual": self.parallel_residual,
        }


def _with_bias(shapes: dict[str, tuple[int, ...]], name: str, size: tuple[int, ...], bias: bool) -> None:
    shapes[f"{name}.weight"] = size
    if bias:
        shapes[f"{name}.bias"] = size[:1]


def model_shape(neox: NeoXConfig, vocab_size: int) -> ModelShape:
    """The model of these keys. Raises ConfigError where no HF architecture has the combination: vLLM could not serve it."""
    llama = (neox.norm, neox.activation) == ("rmsnorm", "swiglu")
    if not llama and (neox.norm, neox.activation) != ("layernorm", "gelu"):
        raise ConfigError(
            f"norm {neox.norm!r} with activation {neox.activation!r} is neither Llama (rmsnorm, swiglu) nor GPT-NeoX (layernorm, gelu); "
            "set one of these pairs"
        )
    kv_heads = neox.num_kv_heads or neox.num_attention_heads
    _check_family(neox, llama, kv_heads)
    _check_sizes(neox, kv_heads)
    multiple = neox.make_vocab_size_divisible_by * neox.model_parallel_size
    return ModelShape(
        family="llama" if llama else "gpt_neox",
        num_layers=neox.num_layers,
        hidden=neox.hidden_size,
        num_heads=neox.num_attention_heads,
        num_kv_heads=kv_heads,
        ffn=neox.mlp_width,
        vocab=vocab_size,
        padded_vocab=-(-vocab_size // multiple) * multiple,
        max_positions=neox.max_position_embeddings or neox.seq_length,
        norm=neox.norm,
        norm_eps=neox.rms_norm_epsilon if llama else neox.layernorm_epsilon,
        rotary_pct=neox.rotary_pct,
        rotary_base=neox.rotary_emb_base,
        parallel_residual=neox.gpt_j_residual,
        attention_bias=neox.use_bias_in_attn_linear,
        mlp_bias=neox.use_bias_in_mlp,
        tied=not neox.no_weight_tying,
        init_std=neox.init_std,
    )


def stage_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """The layers of each pipeline stage. Where they do not divide evenly the first stage differs from the others, as little as can be."""
    share = min(range(1, (num_layers - 1) // max(pp - 1, 1) + 1), key=lambda s: (max(s, num_layers - (pp - 1) * s), s), default=num_layers)
    first = num_layers - (pp - 1) * share
    return (range(first), *(range(first + stage * share, first + (stage + 1) * share) for stage in range(pp - 1)))


def _check_family(neox: NeoXConfig, llama: bool, kv_heads: int) -> None:
    refused = {
        "gpt_j_residual true": llama and neox.gpt_j_residual,
        "rotary_pct below 1": llama and neox.rotary_pct != 1.0,
        "use_bias_in_norms false": not llama and not neox.use_bias_in_norms,
        "use_bias_in_mlp false": not llama and not neox.use_bias_in_mlp,
        "use_bias_in_attn_linear false": not llama and not neox.use_bias_in_attn_linear,
        "num_kv_heads other than num_attention_heads": not llama and kv_heads != neox.num_attention_heads,
        "use_bias_in_attn_linear other than use_bias_in_mlp": neox.use_bias_in_attn_linear != neox.use_bias_in_mlp,
    }
    for what, wrong in refused.items():
        if wrong:
            raise ConfigError(
                f"{what}: HF's {'Llama' if llama else 'GPT-NeoX'} has no such model, so vLLM could not serve it; change the key"
            )


def _check_sizes(neox: NeoXConfig, kv_heads: int) -> None:
    tp = neox.model_parallel_size
    for name, value, divisor, why in (
        ("hidden_size", neox.hidden_size, neox.num_attention_heads, "num_attention_heads"),
        ("num_attention_heads", neox.num_attention_heads, kv_heads, "num_kv_heads"),
        ("num_kv_heads", kv_heads, tp, "model_parallel_size"),
        ("the MLP width", neox.mlp_width, tp, "model_parallel_size"),
    ):
        if value % divisor:
            raise ConfigError(f"{name} {value} is not a multiple of {why} {divisor}; change one of them")
    rotary = int(neox.hidden_size // neox.num_attention_heads * neox.rotary_pct)
    if rotary % 2 or rotary < 2:
        raise ConfigError(f"rotary_pct {neox.rotary_pct} rotates {rotary} dimensions of a head; the number must be even and at least 2")
    if max(neox.pipe_parallel_size, 1) > neox.num_layers:
        raise ConfigError(f"pipe_parallel_size {neox.pipe_parallel_size} exceeds num_layers {neox.num_layers}; lower it")
