"""HF checkpoints on disk: safetensors read lazily, one tensor at a time, and written with their config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from neox_rl.config.hf_directory import CONFIG, open_weights, special_ids, weight_files
from neox_rl.errors import WeightError
from neox_rl.telemetry.jsonl import write_json
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
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in weight_files(directory):
            opened = stack.enter_context(open_weights(path, "pt"))
            if twice := files.keys() & set(opened.keys()):
                raise WeightError(f"{path} and another file there hold {min(twice)!r}: which one counts? Take the other away")
            files |= dict.fromkeys(opened.keys(), opened)
        yield HFReader(files, directory)


def write_hf(directory: Path, tensors: dict[str, Tensor], config: dict[str, Json]) -> None:
    """Writes ``config.json`` and the tensors, sharded where they are large.

    The ids of special tokens that a ``config.json`` there has stay, also on a full disk: whoever laid the tokenizer beside it knows them,
    and an engine does not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, {**config, **special_ids(directory)}, indent=2)
    save_torch_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, directory)
