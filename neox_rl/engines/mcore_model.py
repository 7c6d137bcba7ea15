"""The model: megatron-core's GPTModel with layers, norm and attention of our own, through its ModuleSpec extension point."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neox_rl.engines.fused_ops import SwiGLU, rms_norm
from neox_rl.engines.model_shape import ModelShape
from neox_rl.engines.packed import Gather, Pack, Rotate, ToRows, ToSlots

_PROJECTIONS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm without Transformer Engine or Apex.

    Marks its parameters: under sequence parallelism each rank sees a part of the sequence, and megatron-core sums the gradients
    of marked parameters over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.size, self.eps = (hidden_size,), eps
        options: dict[str, Any] = {
            "dtype": config.params_dtype,
            "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        }
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **options)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)


class GatedMLP(MLP):  # type: ignore[misc]
    """SwiGLU without megatron-core's chunk, product and concatenation."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config, submodules=_PROJECTIONS)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        gate_and_up, _bias = self.linear_fc1(hidden_states)
        output, _bias = self.linear_fc2(SwiGLU.apply(gate_and_up))  # type: ignore[no-untyped-call]
        return output, None


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention along each path of a pack, rotary embedding included: one SDPA call a block of similar lengths."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packed_seq_params: Pack, **_: Any) -> Tensor:
        """[T, 1, heads, d] each -> [T, 1, heads x d]. Heads of query and key differ under grouped-query attention."""
        pack = packed_seq_params
        q: Tensor = Rotate.apply(query[:, 0], pack.cos, pack.sin)  # type: ignore[no-untyped-call]
        k: Tensor = Rotate.apply(key[:, 0], pack.cos, pack.sin)  # type: ignore[no-untyped-call]
        v = value[:, 0]
        if not pack.trivial:
            q = ToSlots.apply(q, pack.queries, pack.rows)  # type: ignore[no-untyped-call]
            k, v = (_keys(x, pack) for x in (k, v))
        outputs, q_at, k_at = [], 0, 0
        for block in pack.blocks:
            bq = _block(q, q_at, block.count, block.queries)
            bk, bv = (_block(x, k_at, block.count, block.keys) for x in (k, v))
            causal, grouped = block.mask is None, q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(bq, bk, bv, block.mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).reshape(block.count * block.queries, -1))
            q_at, k_at = q_at + block.count * block.queries, k_at + block.count * block.keys
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if not pack.trivial:
            flat = ToRows.apply(flat, pack.rows)  # type: ignore[no-untyped-call]
        return flat[:, None]


def _keys(x: Tensor, pack: Pack) -> Tensor:
    """Keys or values [T, heads, d] in their slots. Rows of prefixes that nobody shares have one each."""
    slots = Gather.apply(x, pack.keys) if pack.shared else ToSlots.apply(x, pack.keys, pack.rows)  # type: ignore[no-untyped-call]
    return cast(Tensor, slots)


def _block(x: Tensor, at: int, count: int, length: int) -> Tensor:
    """The slots of one block as [count, heads, length, d]."""
    return x[at : at + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)


class Layer(TransformerLayer):  # type: ignore[misc]
    """One layer, without dropout: x + attention(norm1(x)), then x + mlp(norm2(x)); or both from the same x (NeoX, GPT-J).

    Recomputation is torch's checkpoint around the whole layer: the forward pass draws no random numbers to restore.
    """

    parallel_residual = False
    recompute = False

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, packed_seq_params: Pack | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, hidden_states, packed_seq_params, use_reentrant=False, preserve_rng_state=False), None
        return self._layer(hidden_states, packed_seq_params), None

    def _layer(self, x: Tensor, pack: Pack | None) -> Tensor:
        attention = _with_bias(*self.self_attention(self.input_layernorm(x), attention_mask=None, packed_seq_params=pack))
        if self.parallel_residual:
            return x + attention + _with_bias(*self.mlp(self.pre_mlp_layernorm(x)))
        x = x + attention
        return x + _with_bias(*self.mlp(self.pre_mlp_layernorm(x)))


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


class PolicyModel(GPTModel):  # type: ignore[misc]
    """GPTModel over packed tokens: (tokens [T], pack) -> logits [T, padded_vocab / tp] on the last stage, hidden states before."""

    def forward(self, tokens: Tensor, pack: Pack) -> Tensor:
        hidden = None
        if self.pre_process:
            words = self.embedding.word_embeddings
            hidden = words(tokens[None])
            if not words.reduce_scatter_embeddings:
                hidden = hidden.transpose(0, 1)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)
        if not self.post_process:
            return cast(Tensor, hidden)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return cast(Tensor, logits[:, 0])


def build_model(shape: ModelShape, config: TransformerConfig, first: bool, last: bool, recompute: bool) -> PolicyModel:
    """This stage's part of the model, with undefined weights: the caller fills every parameter."""
    layer = ModuleSpec(
        module=type("Layer", (Layer,), {"parallel_residual": shape.parallel_residual, "recompute": recompute}),
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=PackedAttention, linear_proj=RowParallelLinear
                ),
            ),
            pre_mlp_layernorm=Norm,
            mlp=GatedMLP if shape.llama else ModuleSpec(module=MLP, submodules=_PROJECTIONS),
        ),
    )
    return PolicyModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm),
        vocab_size=shape.padded_vocab,
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",
    )
