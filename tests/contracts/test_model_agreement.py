"""The launcher counts parameters and refuses models before a rank exists; the engine builds them: both must mean one model."""

from __future__ import annotations

import pytest

from neox_rl.config.derived import num_parameters
from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.rules_model import one_family
from neox_rl.engines.model_shape import model_shape
from neox_rl.errors import ConfigError

LLAMA = "norm=rmsnorm activation=swiglu use_bias_in_attn_linear=false use_bias_in_mlp=false"
VOCAB = 383


@pytest.mark.parametrize(
    "settings",
    [
        LLAMA + " num_kv_heads=3 no_weight_tying=false",
        LLAMA + " num_kv_heads=3 metarl.qkv_bias=true",
        "rotary_pct=0.25 gpt_j_residual=true",
        "intermediate_size=512 model_parallel_size=2",
    ],
)
def test_config_and_engine_describe_one_model(settings: str) -> None:
    config = parse([], settings.split()).config
    shape = model_shape(config, VOCAB)
    sizes = shape.hf_shapes().values()
    assert sum(size[0] * (size[1] if len(size) == 2 else 1) for size in sizes) == num_parameters(config, VOCAB)


@pytest.mark.parametrize(
    "settings",
    [
        "norm=rmsnorm",
        "activation=swiglu",
        LLAMA + " rotary_pct=0.5",
        LLAMA + " gpt_j_residual=true",
        "num_kv_heads=2",
        "metarl.qkv_bias=true",
    ],
)
def test_what_the_rules_refuse_the_engine_refuses_too(settings: str) -> None:
    config = parse([], settings.split()).config
    assert list(one_family(config, Machine((0,))))
    with pytest.raises(ConfigError):
        model_shape(config, VOCAB)
