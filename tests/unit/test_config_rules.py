"""Every rule between keys, as a table: what breaks it, what it says, and that the fix it names satisfies it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.load import parse
from neox_rl.config.machine import Machine, visible_gpus
from neox_rl.config.rules import RULES, WARNINGS, Rule, broken, warnings
from neox_rl.config.run import RunConfig
from tests.unit.rule_cases import CASES, CPU, FAR, GPU, Case
from tests.unit.rule_cases_run import RUN_CASES

ALL_CASES = (*CASES, *RUN_CASES)
RULE = {rule.__name__: rule for rule in (*RULES, *WARNINGS)}


def of(settings: str) -> RunConfig:
    return parse([], settings.split()).config


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: f"{case.rule}: {case.wrong[-60:]}")
def test_a_rule_names_value_rule_and_fix_and_the_fix_satisfies_it(case: Case) -> None:
    rule: Rule = RULE[case.rule]
    messages = list(rule(of(case.wrong), case.machine))
    assert any(case.says in message for message in messages), messages
    assert list(rule(of(f"{case.wrong} {case.fix}"), case.machine)) == []


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in ALL_CASES} == set(RULE)


def test_the_defaults_break_no_rule() -> None:
    assert broken(RunConfig(), CPU) == []
    assert warnings(of("metarl.warmstart.steps=10"), CPU) == []


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 4096])
@pytest.mark.parametrize("heads", [1, 3, 64])
def test_rules_report_absurd_sizes_instead_of_raising(size: int, heads: int) -> None:
    config = of(
        f"hidden_size={size} num_attention_heads={heads} num_kv_heads=5 model_parallel_size=7 pipe_parallel_size=9 optimizer.params=3"
    )
    assert broken(config, CPU)
    warnings(config, CPU)


@pytest.mark.parametrize(
    ("settings", "machine"), [("", GPU), ("metarl.servers.num_servers=0 metarl.servers.addresses=[http://a:1]", CPU), (FAR, CPU)]
)
def test_any_head_size_goes_where_servers_are_not_on_this_cpu(settings: str, machine: Machine) -> None:
    assert list(RULE["head_size_served"](of(f"num_attention_heads=4 {settings}"), machine)) == []


def test_gpus_that_the_launcher_of_the_ranks_cannot_name_are_refused() -> None:
    (message,) = RULE["gpus_fit"](of(""), replace(GPU, gpu_ids=("0", "GPU-8d2c", "2", "3")))
    assert message.startswith("CUDA_VISIBLE_DEVICES names GPU-8d2c: ") and "give numbers, as in 0,1" in message
    assert list(RULE["gpus_fit"](of(""), replace(GPU, gpu_ids=("7", "6", "5", "4")))) == []


def test_with_one_gpu_the_advice_is_the_cpu_and_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``num_gpus: 1`` is the least there is, and needs a second GPU for the server."""
    (message,) = RULE["gpus_fit"](of("num_gpus=1"), replace(GPU, num_gpus=1))
    assert "need 2 GPUs, and this machine has 1; with one GPU a run is on the CPU: CUDA_VISIBLE_DEVICES= before its command" in message
    assert "lower" not in message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    count, _ = visible_gpus(1, os.environ)
    assert count == 0 and list(RULE["gpus_fit"](of("num_gpus=1"), replace(GPU, num_gpus=count))) == []


def test_one_gpu_is_enough_for_one_rank_whose_servers_are_elsewhere() -> None:
    one, elsewhere = replace(GPU, num_gpus=1), "metarl.servers.num_servers=0 metarl.servers.addresses=[http://a:1]"
    (message,) = RULE["gpus_fit"](of(f"num_gpus=2 {elsewhere}"), one)
    assert message == "num_gpus = 2: training ranks need 2 GPUs, and this machine has 1; lower num_gpus"
    assert list(RULE["gpus_fit"](of(f"num_gpus=1 {elsewhere}"), one)) == []


def test_the_machine_is_read_without_starting_anything(tmp_path: Path) -> None:
    here = Machine.here()
    assert here.cores and here.memory_gib > 0 and here.exists(str(tmp_path)) and not here.exists(str(tmp_path / "gone"))
