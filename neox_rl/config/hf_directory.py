"""Whether an HF directory holds the model of a run: read by the launcher, before anything starts, and by the ranks. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from neox_rl.config.rules_model import LLAMA
from neox_rl.errors import WeightError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
KEYS: Mapping[str, str] = {
    "model_type": "norm, metarl.qkv_bias or metarl.hf_layout",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "intermediate_size": "intermediate_size, with swiglu 3 times as much",
    "hidden_act": "activation",
    "rms_norm_eps": "rms_norm_epsilon",
    "layer_norm_eps": "layernorm_epsilon",
    "use_parallel_residual": "gpt_j_residual",
    "attention_bias": "use_bias_in_attn_linear",
    "mlp_bias": "use_bias_in_mlp",
    "use_sliding_window": "none: every layer sees all",
    "tie_word_embeddings": "no_weight_tying",
    "rope_theta": "rotary_emb_base",
    "rotary_pct": "rotary_pct",
}
"""What two descriptions of one model have alike, and the keys of the run that say it."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_config(directory: Path, ours: Mapping[str, Any]) -> None:
    """Compares the directory's ``config.json``, where there is one, with ours: also what no tensor's shape tells, as a wrong rotary base or
    epsilon, which would load in silence and compute another model. More rows of the vocabulary than ours are fine.

    Raises WeightError naming every difference.
    """
    path = directory / CONFIG
    if not path.is_file():
        return
    theirs = _read_object(path)
    rope = _block(theirs, "rope_parameters", path)
    found = {
        **theirs,
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", theirs.get("rotary_emb_base"))),
        "rotary_pct": rope.get("partial_rotary_factor", theirs.get("rotary_pct", 1.0)),
    }
    wanted = {**ours, "rope_theta": ours.get("rope_theta", ours.get("rotary_emb_base")), "rotary_pct": ours.get("rotary_pct", 1.0)}
    different = [
        f"{name} {found[name]!r} there, {wanted[name]!r} here (key {key})"
        for name, key in KEYS.items()
        if name in wanted and found.get(name) not in (None, wanted[name])
    ]
    if isinstance(rows := theirs.get("vocab_size"), int) and rows < (needed := ours.get("vocab_size", 0)):
        different.append(f"vocab_size {rows} there, {needed} here (of the tokenizer, metarl.tokenizer.path)")
    if rope.get("rope_type", "default") != "default" or theirs.get("rope_scaling"):
        different.append(f"scaled rotary positions {rope or theirs['rope_scaling']} there, none here")
    if different:
        raise WeightError(f"{path} describes another model: {'; '.join(different)}; change the keys of the run, or take another checkpoint")


def special_ids(directory: Path) -> dict[str, Any]:
    """The special tokens that the directory's ``config.json``, where there is one, names: null names none. Raises WeightError where it
    cannot be read."""
    path = directory / CONFIG
    found = _read_object(path) if path.is_file() else {}
    return {name: found[name] for name in SPECIAL_IDS if found.get(name) is not None}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the directory: where there is an index those that it names, since one left over from another model may hold
    tensors of the same names. Raises WeightError when there is none, or one that the index names is missing."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise WeightError(f"{directory} holds no *.safetensors; convert other formats with transformers' save_pretrained first")
    if (index := directory / INDEX).is_file():
        named = {str(name) for name in _block(_read_object(index), "weight_map", index).values()}
        if missing := sorted(named - {path.name for path in paths}):
            raise WeightError(f"{directory} has not {missing[0]}, which {INDEX} names ({len(missing)} missing in all): download it again")
        return [path for path in paths if path.name in named]
    return paths


def open_weights(path: Path, framework: str) -> Any:
    """safetensors' reader of one file; framework ``pt`` or ``np``. Raises WeightError where the file is cut, or something else."""
    try:
        return safe_open(path, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path} is no whole safetensors file ({error}): cut, or a pointer of Git LFS? Download it again") from error


def check_directory(directory: Path, ours: Mapping[str, Any]) -> None:
    """All that can be known without reading a tensor. Raises WeightError.

    Without a ``config.json`` the names alone tell a Llama from a Qwen2, whose biases it would leave out without a word.
    """
    check_config(directory, ours)
    for path in weight_files(directory):
        with open_weights(path, "np") as weights:
            names: list[str] = weights.keys()
        biases = [name for name in names if name.endswith(".bias")]
        if biases and ours.get("model_type") == LLAMA:
            raise WeightError(
                f"{path} has {min(biases)} and {len(biases) - 1} other biases, and a Llama has none: a Qwen2? Set metarl.qkv_bias: true, or"
                " take another checkpoint"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path} cannot be read as JSON: {error}; download or write it again") from error
    if not isinstance(found, dict):
        raise WeightError(f"{path} holds no JSON object; download or write it again")
    return found


def _block(found: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = found.get(name) or {}
    if not isinstance(block, dict):
        raise WeightError(f"{path} has {name} {block!r}, which is no JSON object; download or write it again")
    return block
