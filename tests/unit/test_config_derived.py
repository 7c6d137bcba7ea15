"""What follows from a configuration: sizes checked against transformers, and who runs on which core."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from neox_rl.config.derived import data_parallel_size, hf_config, num_parameters, padded_vocab_size, prompt_tokens, staleness_bound
from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.placement import parse_core_sets, place, plan
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import EOS, PAD, prompt_text, vocabulary

LLAMA = "norm=rmsnorm activation=swiglu use_bias_in_attn_linear=false use_bias_in_mlp=false intermediate_size=1536"
VOCAB = 383


def of(settings: str = "") -> RunConfig:
    return parse([], settings.split()).config


@pytest.mark.parametrize(
    "settings",
    [
        LLAMA + " no_weight_tying=false",
        LLAMA + " num_kv_heads=2 rotary_emb_base=1000",
        LLAMA + " metarl.qkv_bias=true num_kv_heads=2 rotary_emb_base=1000000",
        "rotary_pct=0.25 gpt_j_residual=true",
        "no_weight_tying=false max_position_embeddings=512",
    ],
)
def test_the_hf_config_builds_the_model_in_transformers_with_as_many_parameters(settings: str) -> None:
    config = of(settings)
    described = hf_config(config, VOCAB, eos_id=1, pad_id=0)
    hf = AutoConfig.for_model(**described)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    assert type(model).__name__ == described["architectures"][0]
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config, VOCAB)
    assert (hf.rope_parameters["rope_theta"], hf.max_position_embeddings) == (config.neox.rotary_emb_base, config.neox.max_positions)
    assert (hf.eos_token_id, hf.pad_token_id) == (vocabulary(60).index(EOS), vocabulary(60).index(PAD))


def test_the_hf_config_carries_the_switches_of_its_family() -> None:
    llama = AutoConfig.for_model(**hf_config(of(LLAMA + " num_kv_heads=3 rms_norm_epsilon=1e-8"), VOCAB))
    assert isinstance(llama, LlamaConfig)
    assert (llama.intermediate_size, llama.num_key_value_heads, llama.rms_norm_eps, llama.attention_bias) == (512, 3, 1e-8, False)
    neox = AutoConfig.for_model(**hf_config(of("rotary_pct=0.25 gpt_j_residual=true"), VOCAB))
    assert isinstance(neox, GPTNeoXConfig)
    assert (neox.use_parallel_residual, neox.to_dict()["rope_parameters"]["partial_rotary_factor"], neox.intermediate_size) == (
        True,
        0.25,
        768,
    )


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ("hidden_size=192", 768),
        ("intermediate_size=512", 512),
        ("hidden_size=4096 intermediate_size=32768 mlp_multiple_of=256 activation=swiglu", 11008),
        ("hidden_size=192 activation=swiglu", 256),
    ],
)
def test_the_mlp_is_as_wide_as_in_gpt_neox(settings: str, width: int) -> None:
    """11008 is Llama 7B's width, which NeoX files write as 32768 before gating."""
    assert of(settings).neox.mlp_width == width


def test_the_staleness_bound_and_the_data_parallel_size() -> None:
    config = of(
        "num_gpus=8 model_parallel_size=2 pipe_parallel_size=2 metarl.staleness.admission_slack=3 metarl.staleness.delivery_slack=2"
    )
    assert (staleness_bound(config), data_parallel_size(config)) == (5, 2)


def test_the_vocabulary_is_padded_to_a_multiple_of_the_factor_times_tp() -> None:
    assert padded_vocab_size(of("make_vocab_size_divisible_by=8 model_parallel_size=2"), 383) == 384
    assert padded_vocab_size(of("make_vocab_size_divisible_by=128"), 129) == 256


@pytest.mark.parametrize("numbers", [(3, 5, 7), (1, 2, 3, 4)])
def test_a_symbolic_prompt_has_the_length_that_the_rule_counts(numbers: tuple[int, ...]) -> None:
    assert prompt_tokens(of(f"metarl.problems.num_numbers={len(numbers)}")) == len(prompt_text(numbers, 24).split())
    assert prompt_tokens(of("metarl.problems.source=jsonl")) is None


def test_two_cores_server_first_rank_last_and_the_orchestrator_where_there_is_room() -> None:
    two = place(of(), Machine((0, 1)))
    assert (two.servers, two.ranks, two.orchestrator) == ((((0,),),), ((1,),), ())
    four = place(of(), Machine((4, 5, 6, 7)))
    assert (four.servers, four.ranks, four.orchestrator) == ((((4,),),), ((7,),), (5, 6))


def test_explicit_cores_are_kept_and_auto_avoids_them() -> None:
    where = place(
        of("metarl.servers.num_servers=2 metarl.servers.tensor_parallel_size=2 metarl.trainer_cores=0-1"), Machine(tuple(range(8)))
    )
    assert where.servers == (((2,), (3,)), ((4,), (5,)))
    assert where.ranks == ((0, 1),)
    assert where.orchestrator == (6, 7)


def test_gpus_go_to_ranks_first_and_nothing_is_pinned() -> None:
    where = place(of("num_gpus=2 metarl.servers.num_servers=2 metarl.servers.tensor_parallel_size=2"), Machine((0, 1), num_gpus=6))
    assert (where.rank_gpus, where.server_gpus) == ((0, 1), ((2, 3), (4, 5)))
    assert where.servers == (((), ()), ((), ())) and where.ranks == ((), ())


@given(cores=st.integers(1, 12), servers=st.integers(0, 4), tp=st.integers(1, 2), ranks=st.integers(1, 4))
def test_no_core_is_shared_unless_there_are_too_few(cores: int, servers: int, tp: int, ranks: int) -> None:
    config = of(f"num_gpus={ranks} metarl.servers.num_servers={servers} metarl.servers.tensor_parallel_size={tp}")
    where = place(config, Machine(tuple(range(cores))))
    used = [core for server in where.servers for rank in server for core in rank] + [core for rank in where.ranks for core in rank]
    assert len(used) == servers * tp + ranks
    assert set(used) <= set(range(cores)) and not set(used) & set(where.orchestrator)
    assert (len(set(used)) == len(used)) == (len(used) <= cores)


def test_core_sets_are_written_as_in_the_reference() -> None:
    assert parse_core_sets("0|1;2|3", "k") == (((0,), (1,)), ((2,), (3,)))
    assert parse_core_sets("0-2,8", "k") == (((0, 1, 2, 8),),)
    for wrong in ("", "3-1", "-1", "0;;1", "99999999"):
        with pytest.raises(ConfigError, match="must be auto, or core sets"):
            parse_core_sets(wrong, "k")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ("", ["vLLM server", "orchestrator", "verifier", "training rank"]),
        ("metarl.rollout.generator=scripted", ["scripted server", "orchestrator", "verifier", "training rank"]),
        ("metarl.debug.mode=rollout_only", ["vLLM server", "orchestrator", "verifier", "training rank"]),
        ("metarl.debug.mode=train_only", ["training rank"]),
        ("metarl.servers.addresses=[http://a:1]", ["orchestrator", "verifier", "training rank"]),
    ],
)
def test_the_plan_lists_what_a_run_starts(settings: str, names: list[str]) -> None:
    assert [process.name for process in plan(of(settings), Machine((0, 1)))] == names
