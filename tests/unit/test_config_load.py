"""Reading NeoX YAML: what composes, what is refused and what the error says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.config.dump import dump
from neox_rl.config.leaves import BLOCK, Leaf, leaves
from neox_rl.config.load import Parsed, load_config, load_resolved, parse
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError

MACHINE = Machine(cores=(0, 1))


def written(directory: Path, **files: str) -> list[Path]:
    for name, text in files.items():
        (directory / f"{name}.yml").write_text(text)
    return [directory / f"{name}.yml" for name in files]


def of(directory: Path, text: str, *sets: str) -> Parsed:
    return parse(written(directory, a=text), sets)


def refusal(directory: Path, text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as error:
        of(directory, text, *sets)
    return str(error.value)


def test_files_merge_and_the_blocks_of_metarl_may_be_spread_over_them(tmp_path: Path) -> None:
    model = "num-layers: 4  # NeoX writes - and _ alike\nmetarl:\n  rollout: {group_size: 4}\n"
    job = "seq_length: 192\nmetarl:\n  name: job\n  rollout:\n    max_new_tokens: 64\n"
    config = load_config(written(tmp_path, model=model, job=job), machine=MACHINE)
    assert (config.neox.num_layers, config.neox.seq_length) == (4, 192)
    assert (config.metarl.name, config.metarl.rollout.group_size, config.metarl.rollout.max_new_tokens) == ("job", 4, 64)
    assert load_config(written(tmp_path, job=job, model=model), machine=MACHINE) == config


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ("num_layers: 2\n", "num-layers: 2\n", "num_layers"),
        ("metarl:\n  rollout: {group_size: 4}\n", "\nmetarl:\n  rollout: {group_size: 8}\n", "metarl.rollout.group_size"),
    ],
)
def test_a_key_in_two_files_is_refused_naming_both(tmp_path: Path, first: str, second: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(written(tmp_path, one=first, two=second))
    assert key in str(error.value) and "one.yml:" in str(error.value) and "two.yml:" in str(error.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("num_layers: 2\nnum-layers: 3\n", "num_layers"),
        ("metarl:\n  seed: 1\nmetarl:\n  name: x\n", "metarl"),
        ("metarl:\n  rollout: {top_p: 1}\n  rollout: {group_size: 4}\n", "metarl.rollout"),
        ("optimizer: {type: Adam, params: {lr: 1, lr: 2}}\n", "optimizer.params.lr"),
    ],
)
def test_a_key_twice_in_one_file_is_refused_although_yaml_would_keep_the_last(tmp_path: Path, text: str, key: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"{key} is written twice") and "a.yml:" in message


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("num_layer: 2\n", "num_layer", "num_layers"),
        ("metarl:\n  rollout: {grup_size: 4}\n", "metarl.rollout.grup_size", "metarl.rollout.group_size"),
        ("metarl:\n  roll_out: {group_size: 4}\n", "metarl.roll_out", "metarl.rollout"),
        ("group_size: 4\n", "group_size", "metarl.rollout.group_size"),
        ("metarl:\n  train_iters: 4\n", "metarl.train_iters", "train_iters"),
        ("metarl:\n  tempratur: 1\n", "metarl.tempratur", "metarl.rollout.temperature"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_key_that_was_meant(tmp_path: Path, text: str, key: str, meant: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"{key} (") and "a.yml:" in message and message.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metarl: {rollout: {group_size: eight}}", "metarl.rollout.group_size = 'eight'|must be an integer >= 1"),
        ("metarl: {rollout: {group_size: 0}}", "= 0|must be an integer >= 1"),
        ("metarl: {rollout: {group_size: true}}", "= True|must be an integer"),
        ("metarl: {rollout: {group_size: 4.0}}", "= 4.0|must be an integer"),
        ("metarl: {rollout: {top_p: 1.5}}", "= 1.5|must be a number >= 0 and <= 1"),
        ("metarl: {rollout: {top_p: .nan}}", "= nan|must be a number"),
        (f"min_lr: 1{'0' * 400}", "= 1000|must be a number"),
        ("min_lr: 1e400", "= '1e400'|must be a number"),
        ("metarl: {rollout: {top_p: high}}", "= 'high'|must be a number"),
        ("metarl: {rollout: {generator: vlm}}", "= 'vlm'|one of vllm, scripted|did you mean vllm?"),
        ("metarl: {logging: {wandb: 1}}", "= 1|must be true or false"),
        ("metarl: {name: 1.5}", "= 1.5|must be text|put it in quotes"),
        ("metarl: {servers: {addresses: [1]}}", "= [1]|a list of texts"),
        ("optimizer: Adam", "= 'Adam'|must be a mapping"),
        ("metarl: {rollout: 8}", "metarl.rollout = '8'|is a block of keys"),
        ("metarl: 8", "metarl = '8'|is a block of keys"),
        ("- a\n- b", "must hold keys and values"),
        ("a: [1", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "is not valid YAML"),
    ],
)
def test_a_wrong_value_is_refused_naming_key_value_place_and_rule(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert all(part in message for part in says.split("|")), message
    assert "a.yml" in message


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text; an integer is a number; ``cores: 1`` means the core 1."""
    text = "min_lr: 1e-5\nrotary_pct: 1\noptimizer: {params: {lr: 1e-3}}\nmetarl: {servers: {cores: 1}}\n"
    config = of(tmp_path, text).config
    assert (config.neox.min_lr, config.neox.rotary_pct, config.metarl.servers.cores) == (1e-5, 1.0, "1")
    assert isinstance(config.neox.rotary_pct, float)
    assert config.neox.optimizer == {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}}


def test_null_is_the_default_and_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert of(tmp_path, "load: null\nnum_kv_heads: ~\nmetarl:\n  rollout:\n").config == of(tmp_path, "").config == RunConfig()


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("precision: bfloat16", "bfloat16"),
        ("fp16: {enabled: true, type: bfloat16}", "bfloat16"),
        ("bf16: {enabled: true}", "bfloat16"),
        ("fp16: {enabled: false}", "fp32"),
        ("fp16: {enabled: true, type: bfloat16}\nprecision: bfloat16", "bfloat16"),
        ("fp16: {enabled: true, type: fp16, fp16: true}", "fp16"),
        ("precision: fp16", "fp16"),
        ("fp16: null", "fp32"),
    ],
)
def test_every_neox_spelling_of_precision(tmp_path: Path, text: str, precision: str) -> None:
    assert of(tmp_path, text).config.neox.precision == precision


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bf16: {enabled: true}\nprecision: fp32", "disagree"),
        ("fp16: {enabled: true}\nprecision: fp32", "disagree"),
        ("fp16: true", "must be a block"),
    ],
)
def test_contradicting_precisions_are_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_a_setting_has_the_last_word_on_precision(tmp_path: Path) -> None:
    assert of(tmp_path, "fp16: {enabled: true}", "precision=fp32").config.neox.precision == "fp32"


@pytest.mark.parametrize("block", ["true", "[1]", "{enabled: 1}"])
def test_a_setting_of_precision_does_not_hide_a_broken_block(tmp_path: Path, block: str) -> None:
    assert "must be a block" in refusal(tmp_path, f"fp16: {block}", "precision=fp16")


def test_a_setting_reaches_into_a_block_of_gpt_neox(tmp_path: Path) -> None:
    engine, block = "metarl: {engine: gpt-neox}\n", {"initial_scale_power": 12}
    for text in ("", "fp16: null", "fp16: {initial_scale_power: 16}"):
        assert of(tmp_path, engine + text, "precision=fp16", "fp16.initial_scale_power=12").config.extra == {"fp16": block}
    parsed = of(tmp_path, engine + "flops_profiler: {enabled: true}", "flops_profiler.profile_step=3", "fp16.enabled=true")
    assert parsed.config.extra == {"flops_profiler": {"enabled": True, "profile_step": 3}} and parsed.config.neox.precision == "fp16"
    assert "enabled in flops_profiler is the value True, not a block" in refusal(
        tmp_path, engine + "flops_profiler: {enabled: true}", "flops_profiler.enabled.x=3"
    )


def test_a_file_of_gpt_neox_is_taken_as_it_is_with_a_note_on_what_is_not_read(tmp_path: Path) -> None:
    text = '{"num-layers": 6, # as in NeoX\n"attention-config": [[["flash"], 6]], "hidden-dropout": 0, "train_micro_batch_size_per_gpu": 4}'
    parsed = of(tmp_path, text)
    assert parsed.config.neox.num_layers == 6
    assert len(parsed.notes) == 1 and parsed.notes[0].startswith("train_micro_batch_size_per_gpu (")


@pytest.mark.parametrize(
    "text",
    [
        "hidden_dropout: 0.1",
        "attention_config: [[[local], 2]]",
        "use_qk_layernorm: true",
        "use_mup: true",
        "train_impl: rm",
        "autotuning: {enabled: true}",
    ],
)
def test_a_neox_key_that_would_change_the_model_is_refused(tmp_path: Path, text: str) -> None:
    assert "supported here" in refusal(tmp_path, text)


@pytest.mark.parametrize("engine", ["megatron-core", "gpt-neox"])
@pytest.mark.parametrize(
    ("text", "fix"), [("include: 'n1:0,1'", "hostfile"), ("num_nodes: 2", "hostfile"), ("master_port: 29500", "metarl.network.master_port")]
)
def test_a_neox_key_that_has_another_name_here_is_not_passed_over(tmp_path: Path, engine: str, text: str, fix: str) -> None:
    said = refusal(tmp_path, f"{text}\nmetarl: {{engine: {engine}}}")
    assert text.partition(":")[0] in said and fix in said


def test_how_neox_files_for_slurm_start_is_said_by_launcher_alone(tmp_path: Path) -> None:
    parsed = of(tmp_path, "{launcher: slurm, deepspeed_slurm: true, include: null}")
    assert parsed.config.neox.launcher == "slurm"
    assert [note.split(" ")[0] for note in parsed.notes] == ["deepspeed_slurm"]


def test_set_overrides_any_key_and_reaches_into_mappings(tmp_path: Path) -> None:
    sets = ("num-layers=5", "metarl.rollout.group_size=4", "optimizer.params.lr=1e-4", "metarl.servers.addresses=[http://a:1, http://b:2]")
    config = of(tmp_path, "num_layers: 2\noptimizer: {params: {lr: 1}}", *sets).config
    assert (config.neox.num_layers, config.metarl.rollout.group_size, config.neox.optimizer["params"]["lr"]) == (5, 4, 1e-4)
    assert config.metarl.servers.addresses == ("http://a:1", "http://b:2")
    assert of(tmp_path, "", "optimizer.params.lr=3").config != RunConfig(), "the override took effect"
    assert RunConfig().neox.optimizer["params"]["lr"] == 2e-4, "and left the schema's default alone"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("num_layers", "must be key=value"),
        ("num_layer=3", "did you mean num_layers?"),
        ("metarl.rollout=3", "is a block of keys"),
        ("num_layers.x=3", "is no key of this project"),
        ("optimizer.type.x=3", "not a block of keys"),
        ("num_layers=[", "is not a YAML value"),
        ("num_layers=two", "num_layers = 'two' (--set)"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, setting: str, says: str) -> None:
    assert says in refusal(tmp_path, "", setting)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, metarl="")
    with pytest.raises(ConfigError, match=r"metarll.yml: cannot be read .*metarl\.yml"):
        parse([tmp_path / "metarll.yml"])


def test_wrong_keys_and_values_come_in_one_error_too(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "num_layer: 2\nhidden_size: wide\nmetarl: {rollout: {top_p: 2}}").splitlines()) == 3


def test_rules_are_checked_together_so_that_one_try_shows_every_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(written(tmp_path, a="sequence_parallel: true\nmetarl: {name: a/b}"), machine=MACHINE)
    assert len(str(error.value).splitlines()) == 2


def values(leaf: Leaf) -> st.SearchStrategy[Any]:
    """Values that the key takes."""
    if leaf.choices:
        return st.sampled_from(leaf.choices)
    if leaf.type is bool:
        return st.booleans()
    if leaf.type is int:
        return st.integers(int(leaf.low or 0), int(leaf.high or 10**9))
    if leaf.type is float:
        return st.floats(leaf.low if leaf.low is not None else -1e9, leaf.high if leaf.high is not None else 1e9, allow_subnormal=False)
    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
    if leaf.type is str:
        return text
    return st.lists(text, max_size=3).map(tuple) if leaf.type == tuple[str, ...] else st.just(leaf.default)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_dumped_config_loads_back_equal_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    config = RunConfig()
    for path in data.draw(st.lists(st.sampled_from(sorted(leaves())), max_size=8, unique=True)):
        value = data.draw(values(leaves()[path]), label=path)
        *blocks, name = path.split(".")
        match blocks:
            case []:
                config = replace(config, neox=replace(config.neox, **{name: value}))
            case [_]:
                config = replace(config, metarl=replace(config.metarl, **{name: value}))
            case [_, block]:
                inner = replace(getattr(config.metarl, block), **{name: value})
                config = replace(config, metarl=replace(config.metarl, **{block: inner}))
    file = tmp_path_factory.getbasetemp() / "dumped.yml"
    file.write_text(dump(config), encoding="utf-8")
    assert load_resolved(file) == config


def test_a_dump_holds_every_key(tmp_path: Path) -> None:
    text = dump(RunConfig())
    assert all(f"{path.rsplit('.', 1)[-1]}:" in text for path in leaves())
    assert f"\n{BLOCK}:\n" in text
