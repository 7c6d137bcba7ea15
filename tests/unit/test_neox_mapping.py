"""Weights from HF to GPT-NeoX's parts and back, and packs as rows: what needs no checkout."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.gpt_neox_mapping import neox_places
from neox_rl.engines.hf_mapping import Place, fused, shard, unshard
from neox_rl.engines.model_shape import ModelShape, model_shape
from neox_rl.engines.port import Topology
from neox_rl.engines.rows import make_rows, rows_shape
from neox_rl.engines.weight_parts import WeightParts, World
from neox_rl.errors import ConfigError
from tests.invariance.engine_batches import pack, sequences

VOCAB = 101
LLAMA = NeoXConfig(
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=264,
    norm="rmsnorm",
    activation="swiglu",
    use_bias_in_attn_linear=False,
    use_bias_in_mlp=False,
)
PYTHIA = NeoXConfig(hidden_size=64, num_attention_heads=4, rotary_pct=0.25)
MODELS: dict[str, dict[str, object]] = {
    "grouped": {"num_kv_heads": 2},
    "llama": {},
    "pythia": {"gpt_j_residual": True},
    "sequential": {},
    "tied": {"no_weight_tying": False},
}


def shape_of(model: str) -> ModelShape:
    base = LLAMA if model in ("grouped", "llama") else PYTHIA
    return model_shape(RunConfig(NeoXConfig(**{**vars(base), **MODELS[model]})), VOCAB)  # type: ignore[arg-type]


def weights_of(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in shape.hf_shapes().items()}


def parts(place: Place, weights: dict[str, Tensor], shape: ModelShape, tp: int) -> list[Tensor]:
    full = fused(place.entry, weights.__getitem__, shape)
    return [shard(full, place.entry.split, rank, tp, shape.padded_vocab) for rank in range(tp)]


@pytest.mark.parametrize("pipe", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_exact_and_covers_every_tensor_once(model: str, tp: int, pipe: bool) -> None:
    shape = shape_of(model)
    weights, back = weights_of(shape), dict[str, Tensor]()
    places = neox_places(shape, tp, lambda module: int(pipe and module > 3), pipe)
    for place in places:
        full = unshard(parts(place, weights, shape, tp), place.entry.split, VOCAB)
        if not place.entry.alias:
            assert not back.keys() & set(place.entry.hf)
            back |= dict(zip(place.entry.hf, place.entry.unfuse(full), strict=True))
    assert len({(place.stage, place.local) for place in places}) == len(places)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_an_engine_that_has_no_place_for_a_tensor_is_refused_before_it_reads_one() -> None:
    """GPT-NeoX's layers have no biases of query, key and value alone. Whoever builds the engine without the rules of a run hears it too."""
    world = World(Topology(0, 1, 1, 1, 1, 0, 0, 0, "cpu"), torch.device("cpu"), *[cast(dist.ProcessGroup, None)] * 4)

    def parts_of(shape: ModelShape) -> WeightParts:
        places, module = neox_places(shape, 1, lambda _: 0, False), torch.nn.Module()
        parameters = [(place.local, torch.nn.Parameter(torch.zeros(1))) for place in places]
        module.named_parameters = lambda: iter(parameters)  # type: ignore[assignment, misc]
        return WeightParts(module, shape, world, places)

    llama = model_shape(RunConfig(LLAMA), VOCAB)
    assert len(parts_of(llama).parameters) == len(llama.hf_shapes()) - llama.num_layers * 3
    biased = model_shape(RunConfig(LLAMA, MetaRLConfig(qkv_bias=True)), VOCAB)
    with pytest.raises(ConfigError, match=r"not those of a qwen2 .*self_attn\.k_proj\.bias; set metarl\.engine: megatron-core"):
        parts_of(biased)


def test_a_rank_holds_its_own_queries_keys_and_values_side_by_side() -> None:
    """Grouped: rank 1 of 2 has query heads 2 and 3, key head 1, value head 1."""
    shape, dim = shape_of("grouped"), 16
    weights = weights_of(shape)
    place = next(p for p in neox_places(shape, 2, lambda _: 0, True) if p.local == "2.attention.query_key_value.weight")
    q, k, v = (weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    expected = torch.cat([q[2 * dim :], k[dim:], v[dim:]])
    assert torch.equal(parts(place, weights, shape, 2)[1], expected)


def test_without_grouping_each_head_has_its_three_side_by_side() -> None:
    shape, dim = shape_of("llama"), 16
    weights = weights_of(shape)
    place = next(p for p in neox_places(shape, 1, lambda _: 0, False) if p.local == "sequential.2.attention.query_key_value.weight")
    q, k, v = (weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    (full,) = parts(place, weights, shape, 1)
    assert torch.equal(full[3 * dim : 6 * dim], torch.cat([q[dim : 2 * dim], k[dim : 2 * dim], v[dim : 2 * dim]]))


def test_a_bias_that_the_ranks_sum_is_whole_on_the_first_alone() -> None:
    shape = shape_of("pythia")
    weights = weights_of(shape)
    place = next(p for p in neox_places(shape, 2, lambda _: 0, True) if p.local == "2.mlp.linear2.bias")
    first, second = parts(place, weights, shape, 2)
    assert torch.equal(first, weights["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"]) and not second.any()


def test_a_sequence_is_a_row_and_every_token_of_the_pack_has_a_place() -> None:
    seqs = sequences()
    batch = pack(seqs[:3], 136, seqs)
    shape = rows_shape([batch, pack(seqs[3:5], 136, seqs)], multiple=4)
    assert shape[1] == 32, "the longest sequence is 31"
    rows = make_rows(batch, shape)
    assert torch.equal(rows.tokens.flatten()[rows.slots], torch.from_numpy(batch.tokens))
    assert len(set(rows.slots.tolist())) == len(batch)
    for number, sequence in enumerate(seqs[:3]):
        np.testing.assert_array_equal(rows.tokens[number, : len(sequence)], sequence)


def test_a_pack_of_padding_alone_has_rows_too() -> None:
    batch = pack([], 8, sequences())
    assert make_rows(batch, rows_shape([batch])).tokens.shape == (8, 1)
