"""What an engine writes over the launcher's files: the model's sizes are the engine's, the ids of special tokens the tokenizer's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from neox_rl.config.derived import hf_config
from neox_rl.config.hf_directory import INDEX
from neox_rl.config.load import parse
from neox_rl.engines.hf_files import hf_reader, write_hf
from neox_rl.errors import ConfigError, WeightError
from neox_rl.problems.tokenizer import save_hf
from neox_rl.run.cli import main
from tools import neox_checkpoint
from tools.neox_checkpoint import token_ids

OURS = hf_config(parse([], ()).config, 8)
WEIGHTS = {"gpt_neox.final_layer_norm.weight": torch.ones(4)}


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def tokenizer(directory: Path, **special: str) -> Path:
    """Its EOS is token 2: neither the symbolic tokenizer's nor one that HF takes where none is said."""
    save_hf(HFTokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<pad>": 3}, unk_token="a")), special, directory)
    return directory


@pytest.mark.parametrize(
    ("special", "ids"),
    [({"eos_token": "<end>"}, (2, None)), ({"eos_token": "<end>", "pad_token": "<pad>"}, (2, 3))],
)
def test_the_policy_of_a_run_ends_with_the_tokenizers_eos(tmp_path: Path, special: dict[str, str], ids: tuple[int, int | None]) -> None:
    tokenizer(tmp_path / "tokenizer", **special)
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yml").write_text(f"metarl: {{name: job, runs_dir: {tmp_path}/runs, tokenizer: {{path: {tmp_path}/tokenizer}}}}\n")
    assert main([str(tmp_path / "train.py"), str(tmp_path / "job.yml"), "--prepare"]) == 0
    model = tmp_path / "runs" / "job" / "model"
    assert (config(model)["eos_token_id"], config(model)["pad_token_id"]) == ids
    write_hf(model, WEIGHTS, OURS)
    assert (config(model)["eos_token_id"], config(model)["pad_token_id"]) == ids
    assert config(model)["vocab_size"] == 8 and load_file(model / "model.safetensors").keys() == WEIGHTS.keys()


def test_without_a_tokenizer_no_id_is_made_up(tmp_path: Path) -> None:
    write_hf(tmp_path, WEIGHTS, OURS)
    assert [config(tmp_path)[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


def test_a_full_disk_does_not_take_the_ids(tmp_path: Path) -> None:
    """The write is tried again, over what the first try left."""
    (tmp_path / "config.json").write_text(json.dumps(OURS | {"eos_token_id": [7, 5]}))
    (tmp_path / f"config.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_hf(tmp_path, WEIGHTS, OURS)
    write_hf(tmp_path, WEIGHTS, OURS)
    assert config(tmp_path)["eos_token_id"] == [7, 5]


def test_a_converted_checkpoint_has_the_ids_of_the_tokenizer_beside_it(tmp_path: Path) -> None:
    assert token_ids(tmp_path) == {}
    tokenizer(tmp_path, eos_token="<end>")
    assert token_ids(tmp_path) == {"eos_token_id": 2, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    assert token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}, "what it says comes first"


def test_a_tokenizer_laid_beside_a_converted_checkpoint_gives_it_the_ids_at_the_next_conversion(tmp_path: Path) -> None:
    """The first one, without a tokenizer, wrote that it knows none."""
    write_hf(tmp_path, WEIGHTS, OURS)
    tokenizer(tmp_path, eos_token="<end>", pad_token="<pad>")
    assert token_ids(tmp_path) == {"eos_token_id": 2, "pad_token_id": 3}


def test_a_tokenizer_that_names_no_eos_leaves_it_open(tmp_path: Path) -> None:
    tokenizer(tmp_path, pad_token="<pad>")
    assert token_ids(tmp_path) == {"eos_token_id": None, "pad_token_id": 3}
    tokenizer(tmp_path, eos_token="<other>")
    with pytest.raises(ConfigError, match="eos_token '<other>' is not a token"):
        token_ids(tmp_path)


class Engine:
    """Reads any HF directory, as far as the converter can tell."""

    def __init__(self) -> None:
        self.read: list[Path] = []

    def load_hf(self, directory: Path) -> None:
        self.read.append(directory)

    def save(self, directory: Path, _: dict[str, Any]) -> Path:
        return directory

    def close(self) -> None:
        pass


def test_a_conversion_from_hf_does_not_ask_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer(tmp_path, eos_token="<other>")
    (tmp_path / "model.yml").write_text("{}\n")
    engine = Engine()
    monkeypatch.setattr(neox_checkpoint, "build_engine", lambda *_: engine)
    monkeypatch.setattr(neox_checkpoint, "checkout_knows_the_keys", lambda *_: ())
    command = ["to-neox", f"{tmp_path}/model.yml", "--hf", str(tmp_path), "--checkpoint", f"{tmp_path}/ckpt", "--vocab", "8"]
    assert neox_checkpoint.main(command) == 0
    assert engine.read == [tmp_path]


def test_a_file_left_over_from_another_model_does_not_win(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.safetensors and another file there hold 'a'"), hf_reader(tmp_path):
        pass
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with hf_reader(tmp_path) as read:
        assert read("a").tolist() == [0.0, 0.0]
