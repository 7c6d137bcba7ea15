"""GPT-NeoX checkpoints to HF and back, in any layout of TP and PP that the keys name. Needs GPT_NEOX_PATH.

    torchrun --nproc_per_node 2 tools/neox_checkpoint.py to-neox model.yml --hf pythia-14m --checkpoint checkpoints
    torchrun --nproc_per_node 2 tools/neox_checkpoint.py to-hf model.yml --checkpoint checkpoints --hf exported --vocab 50277

The YAML files are the model's: NeoX keys as it was trained with, layout included. The model is built by the checkout itself, so what comes
out is what GPT-NeoX computes with: biases that its ranks sum are summed, padding of the vocabulary is cut to ``--vocab`` (the tokenizer's
size; ``to-neox`` takes it from the HF config). Tokenizer files are not copied: lay them into ``--hf`` first, and ``to-hf`` writes their ids
of EOS and padding; those that a ``config.json`` there has come before them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neox_rl.config.hf_directory import CONFIG, special_ids
from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.rules_model import checkout_knows_the_keys
from neox_rl.engines.registry import build_engine
from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.problems.tokenizer import end_ids
from neox_rl.telemetry.jsonl import write_json
from neox_rl.types import Json


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("direction", choices=("to-neox", "to-hf"))
    p.add_argument("configs", nargs="+", help="YAML files with the model's NeoX keys")
    p.add_argument("--hf", required=True, type=Path, help="directory of config.json and safetensors")
    p.add_argument("--checkpoint", required=True, type=Path, help="directory of global_stepN and latest")
    p.add_argument("--vocab", type=int, help="tokens of the tokenizer, without padding")
    return p.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Raises ConfigError and WeightError, before anything is written."""
    vocab = args.vocab
    if vocab is None and args.direction == "to-hf":
        raise ConfigError("--vocab: is needed to cut the padding of the vocabulary; give the size of the tokenizer")
    if vocab is None:
        vocab = int(json.loads((args.hf / CONFIG).read_text())["vocab_size"])
    config = parse(args.configs, ["metarl.engine=gpt-neox"]).config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = replace(config, neox=replace(config.neox, num_gpus=ranks))
    for message in checkout_knows_the_keys(config, Machine.here()):
        raise ConfigError(message)
    ids = token_ids(args.hf) if args.direction == "to-hf" else {}
    engine = build_engine(config, vocab)
    if args.direction == "to-neox":
        engine.load_hf(args.hf)
        print(engine.save(args.checkpoint, {}))
    else:
        engine.load(args.checkpoint)
        engine.save_hf(args.hf)
        if engine.topology.rank == 0:
            write_json(args.hf / CONFIG, json.loads((args.hf / CONFIG).read_text()) | ids, indent=2)
        print(args.hf)
    engine.close()


def token_ids(directory: Path) -> dict[str, Json]:
    """The ids of special tokens as far as the directory tells them."""
    ids: dict[str, Json] = {}
    if (directory / "tokenizer.json").is_file():
        ids["eos_token_id"], ids["pad_token_id"] = end_ids(directory)
    return ids | special_ids(directory)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        convert(arguments(argv))
    except NeoxRLError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
