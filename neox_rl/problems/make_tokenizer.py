"""``python -m neox_rl.problems.make_tokenizer FILE... --vocab N --out DIR``: an HF tokenizer for files of problems.

Byte-level BPE (Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2) trained on the prompts and worked solutions, for a model
that starts from random weights; one that starts from an HF checkpoint needs that checkpoint's own tokenizer. Every digit is a token
of its own, so that a number is read the same way wherever it stands, and any text at all can be encoded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from neox_rl.errors import ConfigError
from neox_rl.problems.files import read_problems
from neox_rl.problems.tokenizer import save_hf

PAD, EOS = "<|pad|>", "<|endoftext|>"
MIN_VOCAB = 256 + 2
"""One token a byte, and the two special ones."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """At most ``vocab_size`` tokens, fewer where the texts have no more pairs to merge. Raises ConfigError below MIN_VOCAB."""
    if vocab_size < MIN_VOCAB:
        raise ConfigError(f"--vocab {vocab_size}: byte-level BPE needs {MIN_VOCAB} tokens to spell any text; give {MIN_VOCAB} or more")
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    hf.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(texts, trainer)
    return hf


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.problems.make_tokenizer", description="An HF tokenizer for files of problems.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="problems, as problems.path takes them; not the held-out ones")
    parser.add_argument("--vocab", type=int, default=2048, help="most tokens (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, for metarl.tokenizer.path")
    args = parser.parse_args(argv)
    try:
        problems = [problem for file in args.files for problem in read_problems(file, "math")[0]]
        texts = [f"{problem.prompt} {problem.meta.get('solution', problem.answer)}" for problem in problems]
        hf = train_tokenizer(texts, args.vocab)
    except ConfigError as error:
        parser.error(str(error))
    try:
        save_hf(hf, {"pad_token": PAD, "eos_token": EOS}, args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written ({error.strerror}); give a directory that you may write to")
    lengths = sorted(len(hf.encode(text).ids) for text in texts)
    print(
        f"{args.out}: {hf.get_vocab_size()} tokens. The {len(texts)} problems with their solutions have {lengths[len(lengths) // 2]} tokens"
        f" in the median, {lengths[len(lengths) * 99 // 100]} at the 99th percentile, {lengths[-1]} at most: choose seq_length by these"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
