"""Weights from HF to megatron-core's parts and back, and initial weights that no layout changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.hf_mapping import entries, fused, shard, unshard
from neox_rl.engines.model_shape import ModelShape, model_shape, stage_layers
from neox_rl.errors import ConfigError, WeightError

VOCAB = 101
MODELS: dict[str, NeoXConfig] = {
    "llama": NeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=2,
        intermediate_size=288,
        norm="rmsnorm",
        activation="swiglu",
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
    ),
    "pythia": NeoXConfig(hidden_size=64, num_attention_heads=4, rotary_pct=0.25, gpt_j_residual=True, no_weight_tying=False),
}
MODELS["qwen2"] = MODELS["llama"]


def shape_of(model: str) -> ModelShape:
    return model_shape(RunConfig(MODELS[model], MetaRLConfig(qkv_bias=model == "qwen2")), VOCAB)


def checkpoint(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in shape.hf_shapes().items()}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_exact_and_covers_every_tensor_once(model: str, tp: int) -> None:
    shape = shape_of(model)
    weights, back = checkpoint(shape), dict[str, Tensor]()
    for entry in entries(shape):
        full = fused(entry, weights.__getitem__, shape)
        parts = [shard(full, entry.split, rank, tp, shape.padded_vocab) for rank in range(tp)]
        assert len({part.shape for part in parts}) == 1
        if not entry.alias:
            back |= dict(zip(entry.hf, entry.unfuse(unshard(parts, entry.split, VOCAB)), strict=True))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_rank_holds_whole_groups_of_queries_key_and_value(kind: str) -> None:
    """GQA with 2 groups at TP 2: rank 1 has query heads 2 and 3, and key and value head 1."""
    shape = shape_of("qwen2")
    weights = checkpoint(shape)
    entry = next(e for e in entries(shape) if e.name == f"decoder.layers.0.self_attention.linear_qkv.{kind}")
    part = shard(fused(entry, weights.__getitem__, shape), entry.split, 1, 2, shape.padded_vocab)
    q, k, v = (weights[name] for name in entry.hf)
    assert torch.equal(part, torch.cat([q[32:], k[16:], v[16:]]))


def test_swiglu_gives_each_rank_its_half_of_gate_and_of_up() -> None:
    shape = shape_of("llama")
    weights = checkpoint(shape)
    entry = next(e for e in entries(shape) if e.name == "decoder.layers.0.mlp.linear_fc1.weight")
    part = shard(fused(entry, weights.__getitem__, shape), entry.split, 0, 2, shape.padded_vocab)
    gate, up = (weights[name] for name in entry.hf)
    assert torch.equal(part, torch.cat([gate[:48], up[:48]]))


def test_padding_of_the_vocabulary_is_zero() -> None:
    shape = shape_of("pythia")
    assert shape.padded_vocab == 104
    entry = entries(shape)[0]
    part = shard(fused(entry, checkpoint(shape).__getitem__, shape), entry.split, 1, 2, shape.padded_vocab)
    assert part.shape == (52, 64)
    assert not part[VOCAB - 52 :].any() and part[: VOCAB - 52].any(dim=1).all()


def test_a_tensor_of_another_model_is_named() -> None:
    shape = shape_of("pythia")
    weights = checkpoint(shape) | {"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": torch.zeros(128, 64)}
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.dense_h_to_4h.*\(128, 64\).*\(256, 64\)"):
        [fused(entry, weights.__getitem__, shape) for entry in entries(shape)]


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    shape = shape_of("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(shape.initial(name, 1), shape.initial(name, 1))
    assert not torch.equal(shape.initial(name, 1), shape.initial(name, 2))
    assert not torch.equal(shape.initial(name, 1), shape.initial("model.layers.0.self_attn.q_proj.weight", 1))
    assert shape.initial(name, 1).std().item() == pytest.approx(0.02, rel=0.05)
    assert shape.initial("model.layers.1.mlp.down_proj.weight", 1).std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert (shape.initial("model.norm.weight", 1) == 1).all()


@pytest.mark.parametrize(("layers", "pp", "sizes"), [(4, 2, [2, 2]), (3, 2, [2, 1]), (7, 4, [1, 2, 2, 2]), (5, 1, [5]), (4, 4, [1] * 4)])
def test_layers_of_the_stages(layers: int, pp: int, sizes: list[int]) -> None:
    stages = stage_layers(layers, pp)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(layers))


def test_a_model_that_no_server_could_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation"):
        model_shape(RunConfig(NeoXConfig(norm="rmsnorm")), VOCAB)
