"""Every shipped config loads and obeys the rules, the reference is current, and the documents name only keys that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from neox_rl.config.derived import hf_config, num_parameters, staleness_bound
from neox_rl.config.leaves import blocks, leaves
from neox_rl.config.load import load_config, parse
from neox_rl.config.machine import Machine
from neox_rl.config.reference import PAGE, page
from neox_rl.config.rules import warnings
from neox_rl.metacot import vocabulary
from neox_rl.types import Json

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
CHECKOUT = str(ROOT / "tests" / "unit" / "checkout_stub")
LAPTOP = Machine(cores=(0, 1), memory_gib=16, exists=lambda path: path.startswith(("runs/", "data/")), gpt_neox_path=CHECKOUT)
"""Two cores, no GPU; the recorded batches of an earlier run are there, the files that a config says how to make, and a checkout."""
MODELS = sorted((CONFIGS / "models").glob("*.yml"))
JOBS = [CONFIGS / "game24.yml"]
ALONE = sorted(path for path in CONFIGS.rglob("*.yml") if path not in (*MODELS, *JOBS))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "neox_rl").rglob("*.md"), *CONFIGS.rglob("*"), *(ROOT / "docs").rglob("*.md")]


def model_at(directory: Path, config: Mapping[str, Json]) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"norm": np.ones(1, np.float32)}, directory / "model.safetensors")


@pytest.mark.parametrize(
    "files",
    [[path] for path in ALONE] + [[model, job] for model in MODELS for job in JOBS],
    ids=lambda files: "+".join(f.stem for f in files),
)
def test_a_shipped_config_runs_on_a_laptop_without_a_warning(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on from a policy does so from the main job's."""
    monkeypatch.chdir(tmp_path)
    model_at(Path("runs/metarl/model"), hf_config(parse([CONFIGS / "metarl.yml"]).config, 263))
    config = load_config(files, machine=LAPTOP)
    assert warnings(config, LAPTOP) == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "debug").glob("*.yml")), ids=lambda path: path.stem)
def test_debug_configs_are_tiny_and_have_a_directory_of_their_own(path: Path) -> None:
    config = load_config([path], machine=LAPTOP)
    assert num_parameters(config, len(vocabulary(config.metarl.problems.max_value))) < 500_000
    assert config.neox.train_iters <= 20 and config.metarl.name == f"debug-{path.stem.replace('_', '-')}"


def test_debug_configs_are_what_their_names_say() -> None:
    debug = {path.stem: load_config([path], machine=LAPTOP) for path in (CONFIGS / "debug").glob("*.yml")}
    assert staleness_bound(debug["synchronous"]) == 0
    assert debug["fake_generator"].metarl.rollout.generator == "scripted"
    assert debug["rollout_only"].metarl.debug.mode == "rollout_only"
    assert debug["train_only"].metarl.debug.batches == debug["rollout_only"].metarl.debug.record_batches


def test_the_main_job_is_the_same_on_either_engine() -> None:
    ours, neox = (load_config([CONFIGS / name], machine=LAPTOP) for name in ("metarl.yml", "metarl_neox.yml"))
    assert neox.metarl.engine == "gpt-neox"
    assert replace(neox, metarl=replace(neox.metarl, engine=ours.metarl.engine, name=ours.metarl.name)) == ours


def test_the_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m neox_rl.config.reference > configs/README.md"


def test_every_key_of_the_reference_loads_under_the_heading_that_it_stands_below() -> None:
    """A reader writes heading, dot and key: ``metarl.verify.math.rounded_digits``, not ``metarl.verify.rounded_digits``."""
    printed = {}
    for section in page().split("\n## ")[2:]:
        heading = section.partition("\n")[0]
        prefix = "" if heading == "GPT-NeoX keys" else heading + "."
        printed |= {prefix + key: default for key, default in re.findall(r"(?m)^\| `([\w.]+)` \| `(.*?)` \|", section)}
    assert printed.keys() == leaves().keys()
    found = parse([], [f"{path}={default}" for path, default in printed.items()])
    assert found.written >= leaves().keys() and found.config == parse([]).config


def test_the_example_of_a_model_of_your_own_is_that_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the ``config.json`` of SmolLM2-135M-Instruct; what is left out here says nothing of the model's mathematics."""
    monkeypatch.chdir(tmp_path)
    theirs: dict[str, Json] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 64,
        "rope_scaling": None,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    model_at(Path("models/SmolLM2-135M-Instruct"), theirs)
    section = (ROOT / "docs/PROBLEMS.md").read_text(encoding="utf-8").partition("## Your own model")[2]
    Path("job.yml").write_text(section.partition("```yaml\n")[2].partition("```")[0])
    load_config(["job.yml"], machine=replace(LAPTOP, exists=lambda _: True))


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.suffix in (".md", ".yml")], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metarl_key_that_a_document_names_exists(path: Path) -> None:
    named = set(re.findall(r"\bmetarl(?:\.[a-z_0-9]+)+", path.read_text(encoding="utf-8"))) - {"metarl.yml"}
    assert named <= {*leaves(), *blocks()}
