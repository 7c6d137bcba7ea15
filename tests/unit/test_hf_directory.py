"""A checkpoint that is not this model, or is not whole, is one clear line of the launcher's, before any process starts."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from neox_rl.config.derived import hf_config, symbolic_words, words_around
from neox_rl.config.hf_directory import INDEX
from neox_rl.config.load import parse
from neox_rl.metacot import EOS, PAD, episode_words
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer, refuse_other_tokens, save_hf
from neox_rl.run.cli import main

LLAMA = ("norm=rmsnorm", "activation=swiglu", "use_bias_in_attn_linear=false", "use_bias_in_mlp=false", "intermediate_size=1536")
WORDS = 4096
CONFIGS = Path(__file__).parents[2] / "configs"
PROBLEMS = parse([], ()).config.metarl.problems


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The directory of a model that has the run's sizes, and more rows than its tokenizer needs."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(parse([], LLAMA).config, WORDS)))
    save_file({"model.norm.weight": np.ones(192, np.float32)}, directory / "model.safetensors")
    return directory


def start(model: Path, how: str, *settings: str) -> int:
    (model.parent / "train.py").touch()
    (model.parent / "job.yml").write_text("metarl: {name: job}\n")
    keys = (*LLAMA, f"metarl.runs_dir={model.parent}/runs", f"metarl.warmstart.hf_checkpoint={model}", *settings)
    return main([str(model.parent / "train.py"), str(model.parent / "job.yml"), how, *(word for key in keys for word in ("--set", key))])


def change(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: Path, capsys: pytest.CaptureFixture[str], how: str, *settings: str) -> str:
    assert start(model, how, *settings) == 2
    assert not (model.parent / "runs").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: metarl.warmstart.hf_checkpoint = '{model}': ")
    return line


def test_a_checkpoint_that_fits_is_taken(model: Path) -> None:
    assert start(model, "--prepare") == 0
    (model / "config.json").unlink()
    assert start(model, "--prepare") == 0, "its tensors say the sizes"


@pytest.mark.parametrize("how", ["--dry-run", "--prepare"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' there, 'llama' here (key norm, metarl.qkv_bias or metarl.hf_layout); chan"),
        ({"num_hidden_layers": 24, "hidden_size": 896}, "num_hidden_layers 24 there, 3 here (key num_layers); hidden_size 896 there, 192"),
        ({"intermediate_size": 4864}, "intermediate_size 4864 there, 512 here (key intermediate_size, with swiglu 3 times as much)"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta 1000000.0 there, 10000.0 here (key rotary_emb_base)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "scaled rotary positions"),
        ({"rope_scaling": {"factor": 2.0}}, "scaled rotary positions"),
        ({"rope_parameters": "yarn"}, "has rope_parameters 'yarn', which is no JSON object"),
        ({"attention_bias": True}, "attention_bias True there, False here"),
    ],
)
def test_another_model(model: Path, capsys: pytest.CaptureFixture[str], how: str, changes: dict[str, Any], says: str) -> None:
    change(model, **changes)
    assert says in refusal(model, capsys, how)


def test_biases_that_would_be_left_out(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The matrices of a Qwen2 have a Llama's names and sizes, and without config.json nothing else tells them apart."""
    (model / "config.json").unlink()
    names = ("model.norm.weight", *(f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"))
    save_file(dict.fromkeys(names, np.ones(192, np.float32)), model / "model.safetensors")
    assert "layers.0.self_attn.k_proj.bias and 2 other biases, and a Llama has none: a Qwen2? " in refusal(model, capsys, "--dry-run")
    assert start(model, "--dry-run", "metarl.qkv_bias=true") == 0


def test_a_vocabulary_that_is_too_small(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model, vocab_size=50)
    assert "vocab_size 50 there, " in refusal(model, capsys, "--prepare")


@pytest.mark.parametrize("words", [symbolic_words(PROBLEMS, episode_words(3, True)), symbolic_words(PROBLEMS)[:60]], ids=["more", "fewer"])
def test_tokens_beyond_those_of_the_run_are_no_difference(model: Path, words: tuple[str, ...]) -> None:
    SymbolicTokenizer(words).save(model)
    assert start(model, "--prepare") == 0


def test_another_tokenizer_than_the_runs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = HFTokenizer(models.WordLevel({"!": 0, EOS: 1, "#": 2}, unk_token="!"))
    save_hf(hf, {"eos_token": EOS}, model)
    line = refusal(model, capsys, "--prepare")
    assert f"id 0 is '!' there, {PAD!r} here (2 of 3 differ)" in line and f"set metarl.tokenizer.path: {model}, or" in line


def test_values_of_another_range_move_the_ids_of_the_symbolic_words(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their number alone would pass: the checkpoint has more."""
    largest = PROBLEMS.max_value
    SymbolicTokenizer(symbolic_words(replace(PROBLEMS, max_value=largest + 1))).save(model)
    assert f" is '{largest + 1}' there, '+0' here" in refusal(model, capsys, "--prepare")
    assert start(model, "--prepare", f"metarl.tokenizer.path={model}") == 0, "what the line says"


@pytest.mark.parametrize("name", ["meta_star", "prm", "metarl_mcts", "metarl_neox"])
def test_what_goes_on_from_the_policy_of_the_main_job_has_its_tokens(tmp_path: Path, name: str) -> None:
    main_job, job = (parse([CONFIGS / f"{each}.yml"], ()).config for each in ("metarl", name))
    SymbolicTokenizer(symbolic_words(main_job.metarl.problems, words_around(main_job))).save(tmp_path)
    tokenizer = load_tokenizer(job.metarl.tokenizer, job.metarl.problems, words_around(job))
    refuse_other_tokens(str(tmp_path), tokenizer.ids)
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_tokenizer_that_is_cut(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no tokenizer (" in refusal(model, capsys, "--prepare")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", b"{", "config.json cannot be read as JSON: "),
        ("config.json", b"\xff\xfe", "config.json cannot be read as JSON: "),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("model.safetensors", None, "holds no *.safetensors"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "model.safetensors is no whole safetensors file"),
        (INDEX, b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}', "has not model-2.safetensors, which model.safe"),
        (INDEX, b'{"weight_map": {"a": ["x"]}}', "has not ['x'], which model.safe"),
        ("config.json", b"[" * 200_000, "cannot be read as JSON"),
        (INDEX, b'{"weight_map": 3}', "has weight_map 3, which is no JSON object"),
    ],
)
def test_files_that_are_missing_or_broken(
    model: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None, says: str
) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    assert says in refusal(model, capsys, "--dry-run")


def test_a_directory_that_may_not_be_entered(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent == model:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert f"cannot read {model}/config.json (Permission denied); get the right" in refusal(model, capsys, "--dry-run")


def test_a_path_that_the_system_refuses_to_look_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before Python 3.12 ``Path.exists`` raises for it, as it does below a directory that may not be entered."""
    assert "': does not exist; " in refusal(model.with_name("m" * 300), capsys, "--dry-run")


def test_a_layout_of_ones_own_says_what_the_directory_must_be(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is none is told of once, by its own rule."""
    assert start(model, "--dry-run", "metarl.hf_layout=neox_rl.config.derived:hf_config") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metarl.hf_layout" in line
