"""The engine on a user's checkout: what is wrong with it is said before any process starts, and its own keys reach it as written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.checkout import VARIABLE, find_checkout, known_keys
from neox_rl.config.dump import dump
from neox_rl.config.load import load_resolved, parse
from neox_rl.config.machine import Machine
from neox_rl.config.neox_defaults import other_defaults
from neox_rl.config.rules import broken
from neox_rl.engines.gpt_neox_args import neox_arguments
from neox_rl.errors import ConfigError

STUB = Path(__file__).parent / "checkout_stub"
MACHINE = Machine(cores=(0, 1), gpt_neox_path=str(STUB))
ENGINE = "metarl.engine=gpt-neox"


def test_keys_are_read_from_the_source_of_the_checkout() -> None:
    assert known_keys(STUB) == {
        "char_level_ppl",
        "tokenizer_type",
        "pos_emb",
        "wall_clock_breakdown",
        "sparse_gradients",
        "fp16",
        "attention_config",
    }


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "is not set"),
        ("/no/such/place", "is no directory"),
        (str(STUB.parent), r"megatron/neox_arguments/deepspeed_args\.py is not in it"),
    ],
)
def test_a_checkout_that_is_missing_or_wrong(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_checkout({VARIABLE: path})
    (message,) = broken(parse([], [ENGINE]).config, replace(MACHINE, gpt_neox_path=path))
    assert "clone of github.com/EleutherAI/gpt-neox" in message


def test_keys_of_the_checkout_reach_it_and_survive_the_resolved_file(tmp_path: Path) -> None:
    written = tmp_path / "neox.yml"
    written.write_text(
        "sparse-gradients: true\ntokenizer_type: HFTokenizer\ntrain_batch_size: 64\nlog_interval: 3\nmetarl: {engine: gpt-neox}\n"
    )
    parsed = parse([written])
    assert parsed.config.extra == {"sparse_gradients": True, "tokenizer_type": "HFTokenizer"}
    assert sorted(note.split()[0] for note in parsed.notes) == ["log_interval", "train_batch_size"]
    assert broken(parsed.config, MACHINE) == []
    (tmp_path / "config.yml").write_text(dump(parsed.config))
    assert load_resolved(tmp_path / "config.yml") == parsed.config
    arguments = neox_arguments(parsed.config.neox, parsed.config.extra, world_size=1, padded_vocab=8, backend="gloo", cuda=False)
    assert arguments["sparse_gradients"] is True and arguments["tokenizer_type"] == "HFTokenizer"


def test_what_a_file_says_of_loss_scaling_reaches_deepspeed_without_the_words_it_does_not_know(tmp_path: Path) -> None:
    """The files that come with GPT-NeoX have ``fp16: {fp16: true, ...}``, which DeepSpeed refuses."""
    written = tmp_path / "neox.yml"
    written.write_text("fp16: {enabled: true, fp16: true, type: fp16, loss_scale: 0, hysteresis: 2}\nmetarl: {engine: gpt-neox}\n")
    config = parse([written]).config
    (tmp_path / "config.yml").write_text(dump(config))
    assert load_resolved(tmp_path / "config.yml") == config and broken(config, MACHINE) == []
    arguments = neox_arguments(config.neox, config.extra, world_size=1, padded_vocab=8, backend="gloo", cuda=False)
    assert arguments["fp16"] == {"enabled": True, "loss_scale": 0, "hysteresis": 2} and arguments["precision"] == "fp16"
    assert (arguments["zero_optimization"]["stage"], arguments["data_types"]) == (1, {"grad_accum_dtype": "fp32"})
    written.write_text("fp16: {enabled: true, hysteresis: 2}")
    assert parse([written]).config.extra == {}


def test_data_of_pretraining_are_handed_on_with_a_note() -> None:
    parsed = parse([], [ENGINE, "data_path=somewhere", "vocab_file=tokenizer.json"])
    assert parsed.config.extra == {"data_path": "somewhere", "vocab_file": "tokenizer.json"}
    assert [note.split()[0] for note in parsed.notes] == ["data_path"]


def test_a_key_that_is_left_out_and_has_another_default_there_is_told(tmp_path: Path) -> None:
    checkout = tmp_path / "megatron/neox_arguments"
    checkout.mkdir(parents=True)
    (checkout / "deepspeed_args.py").write_text("class A:\n    gradient_clipping: float = 1.0\n")
    (checkout / "neox_args.py").write_text(
        "class B:\n    weight_decay: float = 0.1\n    warmup: float = 0.01\n    rms_norm_epsilon: float = 1e-8\n"
        "    pos_emb: str = 'learned'\n"
    )
    parsed = parse([], [ENGINE, "warmup=0.5", "optimizer={params: {lr: 1e-4}}"])
    said = other_defaults(parsed.config, parsed.written, tmp_path)
    assert "weight_decay 0 (0.1 there), pos_emb rotary (learned there), optimizer.params.betas [0.9, 0.95] ([0.9, 0.999] there)" in said
    assert not {"warmup", "rms_norm_epsilon", "gradient_clipping", "optimizer.params.lr"} & set(said.split())
    all_written = parse([], [ENGINE, "weight_decay=0", "warmup=0", "pos_emb=rotary", "optimizer={params: {lr: 1, betas: [0, 0]}}"])
    assert other_defaults(all_written.config, all_written.written, tmp_path) == ""


def test_a_key_that_nobody_knows_is_named_with_the_one_that_was_meant() -> None:
    (message,) = broken(parse([], [ENGINE, "char_level_ppI=true"]).config, MACHINE)
    assert message.startswith("char_level_ppI: is neither") and "did you mean char_level_ppl?" in message


def test_the_other_engine_hands_nothing_on() -> None:
    assert parse([], ["tokenizer_type=HFTokenizer"]).config.extra == {}
    with pytest.raises(ConfigError, match="sparse_gradients"):
        parse([], ["sparse_gradients=true"])


@pytest.mark.parametrize("engine", ["gpt-neox", "megatron-core"])
def test_a_value_that_would_make_a_model_nobody_serves_is_refused(engine: str) -> None:
    with pytest.raises(ConfigError, match="pos_emb = 'alibi'"):
        parse([], [f"metarl.engine={engine}", "pos_emb=alibi"])


def test_without_cuda_the_kernels_for_it_are_left_out() -> None:
    config = parse([], [ENGINE, "rope_fusion=true", "layernorm_fusion=true", "attention_config=[[[flash], 3]]"]).config
    cpu, cuda, unbuilt = (
        neox_arguments(config.neox, config.extra, world_size=2, padded_vocab=8, backend="gloo", cuda=cuda, built=built)
        for cuda, built in ((False, True), (True, True), (True, False))
    )
    assert (unbuilt["rope_fusion"], unbuilt["layernorm_fusion"]) == (False, True), "GPT-NeoX would end without a word"
    assert (cpu["rope_fusion"], cpu["attention_config"]) == (False, [[["global"], 3]])
    assert (cuda["rope_fusion"], cuda["attention_config"]) == (True, [[["flash"], 3]])
    assert cuda["train_batch_size"] == 2 and "save" not in cuda and cuda["intermediate_size"] is None


@pytest.mark.parametrize(("keys", "expected"), [((), "HFTokenizer"), (("tokenizer_type=SPMTokenizer",), "SPMTokenizer")])
def test_a_checkpoint_says_the_tokenizer_that_pretraining_goes_on_with(keys: tuple[str, ...], expected: str) -> None:
    """GPT-NeoX loads none that names another type than its own keys; a run writes the tokenizer.json of the type HFTokenizer."""
    config = parse([], [ENGINE, *keys]).config
    assert neox_arguments(config.neox, config.extra, world_size=1, padded_vocab=8, backend="gloo", cuda=False)["tokenizer_type"] == expected
