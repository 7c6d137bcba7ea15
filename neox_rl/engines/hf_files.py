"""HF checkpoints on disk: safetensors read lazily, one tensor at a time, and written with their config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox_rl.errors import WeightError
from neox_rl.types import Json


class HFReader:
    """The tensors of a checkpoint by name. Accepts ``lm_head`` and ``embed_out`` for one another: transformers renamed it."""

    def __init__(self, files: dict[str, Any], directory: Path) -> None:
        self.files, self.directory = files, directory

    def __call__(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises WeightError when the checkpoint has no such name."""
        for candidate in (name, name.replace("embed_out.", "lm_head."), name.replace("lm_head.", "embed_out.")):
            if candidate in self.files:
                tensor: Tensor = self.files[candidate].get_tensor(candidate)
                return tensor
        raise WeightError(f"{self.directory} has no tensor {name!r} among its {len(self.files)}: another model's checkpoint?")


@contextmanager
def hf_reader(directory: Path) -> Iterator[HFReader]:
    """Opens every safetensors file of an HF directory. Raises WeightError when there is none, or one cannot be read."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise WeightError(f"{directory} holds no *.safetensors; convert other formats with transformers' save_pretrained first")
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in paths:
            try:
                opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise WeightError(f"{path} is no whole safetensors file: {error}") from error
            files |= dict.fromkeys(opened.keys(), opened)
        yield HFReader(files, directory)


def check_config(directory: Path, ours: Mapping[str, Json]) -> None:
    """Compares what no tensor's shape tells: a wrong rotary base or epsilon loads in silence and computes another model.

    Raises WeightError naming every difference between the directory's ``config.json``, where there is one, and ours.
    """
    path = directory / "config.json"
    if not path.is_file():
        return
    theirs: dict[str, Any] = json.loads(path.read_text())
    rope = theirs.get("rope_parameters") or {}
    found = {
        **theirs,
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", theirs.get("rotary_emb_base"))),
        "rotary_pct": rope.get("partial_rotary_factor", theirs.get("rotary_pct", 1.0)),
    }
    wanted = {**ours, "rope_theta": ours.get("rope_theta", ours.get("rotary_emb_base")), "rotary_pct": ours.get("rotary_pct", 1.0)}
    different = [
        f"{key} {found[key]!r} there, {wanted[key]!r} here"
        for key in _COMPARED
        if key in wanted and found.get(key) not in (None, wanted[key])
    ]
    if rope.get("rope_type", "default") != "default" or theirs.get("rope_scaling"):
        different.append(f"scaled rotary positions {rope or theirs['rope_scaling']} there, none here")
    if different:
        raise WeightError(f"{path} describes another model: {'; '.join(different)}; change the keys of the run")


_COMPARED = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "use_parallel_residual",
    "tie_word_embeddings",
    "rope_theta",
    "rotary_pct",
)


def write_hf(directory: Path, tensors: dict[str, Tensor], config: dict[str, Json]) -> None:
    """Writes ``config.json`` and the tensors, sharded where they are large."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_torch_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, directory)
