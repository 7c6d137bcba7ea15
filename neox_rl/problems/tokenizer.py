"""Tokenizers: the project's symbolic one, one token a word of the trace language, and any HF tokenizer from its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from neox_rl.config.derived import symbolic_words
from neox_rl.config.schema import ProblemsConfig, TokenizerConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import EOS, PAD, UNKNOWN
from neox_rl.ports import Tokenizer


class SymbolicTokenizer:
    """Word-level tokenizer over ``derived.symbolic_words``: a dict look-up a word, with the ids of the saved HF form."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._unknown = self._ids[UNKNOWN]
        self._silent = frozenset((self._ids[PAD], self._ids[EOS]))

    @property
    def eos_id(self) -> int:
        return self._ids[EOS]

    @property
    def pad_id(self) -> int:
        return self._ids[PAD]

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> tuple[int, ...]:
        """One id a whitespace-separated word; words outside the language become the unknown token. No EOS is added."""
        get, unknown = self._ids.get, self._unknown
        return tuple([get(word, unknown) for word in text.split()])

    def decode(self, ids: Sequence[int]) -> str:
        """The words joined by spaces, padding and EOS left out; an id of the model's padded vocabulary reads as unknown."""
        size = len(self.words)
        return " ".join([self.words[i] if i < size else UNKNOWN for i in ids if i not in self._silent])

    def save(self, directory: Path) -> None:
        """Write the files that ``transformers.AutoTokenizer`` and vLLM load."""
        hf = HFTokenizer(models.WordLevel(dict(self._ids), unk_token=UNKNOWN))
        hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
        hf.add_special_tokens(list(special.values()))
        save_hf(hf, special, directory)


def save_hf(hf: HFTokenizer, special: Mapping[str, str], directory: Path) -> None:
    """The files of an HF tokenizer directory. ``special``: the tokens by their HF names (``eos_token`` ...), already added."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    directory.mkdir(parents=True, exist_ok=True)
    hf.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


class DirectoryTokenizer:
    """The ``tokenizer.json`` of an HF directory, without transformers. Nothing is added around the text."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"tokenizer.path {directory}: no tokenizer.json there; save it with a fast HF tokenizer (save_pretrained)")
        self._hf = HFTokenizer.from_file(str(path))
        self._size = max(self._hf.get_vocab(with_added_tokens=True).values()) + 1
        self._eos_id = _eos_id(directory, self._hf)

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def vocab_size(self) -> int:
        """Ids in use; a model's embedding may be larger."""
        return self._size

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._hf.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return str(self._hf.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(cfg: TokenizerConfig, problems: ProblemsConfig, episodes: int = 1) -> Tokenizer:
    """The tokenizer of ``tokenizer.path``; when that is empty the symbolic one, which knows the games alone, and the words around
    at most so many ``episodes`` of a rollout."""
    if cfg.path:
        return DirectoryTokenizer(Path(cfg.path))
    if problems.free_text:
        raise ConfigError(f"problems.source {problems.source} needs tokenizer.path: the symbolic tokenizer has words for the games only")
    return SymbolicTokenizer(symbolic_words(problems, episodes))


def _eos_id(directory: Path, hf: HFTokenizer) -> int:
    path = directory / "tokenizer_config.json"
    token = json.loads(path.read_text()).get("eos_token") if path.is_file() else None
    word = token.get("content") if isinstance(token, dict) else token
    found = hf.token_to_id(word) if isinstance(word, str) else None
    if found is None:
        raise ConfigError(f"{path}: eos_token {word!r} is not a token of tokenizer.json; a completion must be able to end")
    return int(found)
