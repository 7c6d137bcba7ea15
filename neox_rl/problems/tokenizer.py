"""Tokenizers: the project's symbolic one, one token a word of the trace language, and any HF tokenizer from its directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from neox_rl.config.derived import symbolic_words
from neox_rl.config.schema import PLACE, ProblemsConfig, TokenizerConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import EOS, PAD, UNKNOWN


class SymbolicTokenizer:
    """Word-level tokenizer over ``derived.symbolic_words``: a dict look-up a word, with the ids of the saved HF form."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._spelled = {word: i for word, i in self._ids.items() if word not in (PAD, EOS)}
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

    @property
    def ids(self) -> Mapping[str, int]:
        return self._ids

    def encode(self, text: str) -> tuple[int, ...]:
        """One id a whitespace-separated word; words outside the language become the unknown token, and so does the name of EOS or padding:
        no text can end a completion. No EOS is added."""
        get, unknown = self._spelled.get, self._unknown
        return tuple([get(word, unknown) for word in text.split()])

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

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
    """The ``tokenizer.json`` of an HF directory, without transformers. Nothing is added around the text.

    A text that spells a special token (``</s>``) is encoded as any other: problems, models and tools write what they like, and none of it
    may end a completion or take another's turn. Those of ``template``, into whose PLACE prompts are put, are taken as such: it is the
    user's.
    """

    def __init__(self, directory: Path, template: str = "") -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"tokenizer.path {directory}: no tokenizer.json there; save it with a fast HF tokenizer (save_pretrained)")
        self._template, self._path, self._hf = template, path, _read(path, "tokenizer.path")
        self._hf.encode_special_tokens = True
        self._size = max(self._hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos_id, self._pad_id = _end_ids(directory, self._hf)
        if eos_id is None:
            raise ConfigError(
                f"{directory / 'tokenizer_config.json'} names no eos_token of tokenizer.json; a completion must be able to end"
            )
        self._eos_id = eos_id
        self._special_ids = frozenset(i for i, token in self._hf.get_added_tokens_decoder().items() if token.special)

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def pad_id(self) -> int | None:
        """None where the tokenizer names no token for padding."""
        return self._pad_id

    @property
    def vocab_size(self) -> int:
        """Ids in use; a model's embedding may be larger."""
        return self._size

    @property
    def ids(self) -> Mapping[str, int]:
        return self._hf.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> tuple[int, ...]:
        ids = self._hf.encode(text, add_special_tokens=False).ids
        if not self._special_ids.isdisjoint(ids):  # a vocabulary of whole words or pieces has the name itself among them
            ids = self._hf.encode(self._plain(text), add_special_tokens=False).ids
        return tuple(ids)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        if not self._template:
            return self.encode(text)
        filled = self._template.replace(PLACE, self._plain(text.strip()))
        return tuple(self._templates.encode(filled, add_special_tokens=False).ids)

    def _plain(self, text: str) -> str:
        """``text`` with a space in each special token that it spells."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) if self._special.pattern else text

    @cached_property
    def _templates(self) -> HFTokenizer:
        return HFTokenizer.from_file(str(self._path))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        words = sorted(filter(None, map(self._hf.id_to_token, self._special_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return str(self._hf.decode(list(ids), skip_special_tokens=True))


RunTokenizer = SymbolicTokenizer | DirectoryTokenizer


def load_tokenizer(cfg: TokenizerConfig, problems: ProblemsConfig, around: Sequence[str] = ()) -> RunTokenizer:
    """The tokenizer of ``tokenizer.path``; when that is empty the symbolic one, which knows the games alone, and the words ``around``
    attempts (``derived.words_around``)."""
    if cfg.path:
        return DirectoryTokenizer(Path(cfg.path), problems.template)
    if problems.free_text:
        raise ConfigError(f"problems.source {problems.source} needs tokenizer.path: the symbolic tokenizer has words for the games only")
    return SymbolicTokenizer(symbolic_words(problems, around))


def refuse_other_tokens(checkpoint: str, ours: Mapping[str, int]) -> None:
    """Compares the ``tokenizer.json`` of the HF directory ``checkpoint``, where there is one, with the run's: a model whose rows stand for
    other tokens loads, and trains on noise. Only ids that both have are compared: either may have more.

    Raises ConfigError naming the first id that differs.
    """
    path, key = Path(checkpoint, "tokenizer.json"), f"metarl.warmstart.hf_checkpoint = {checkpoint!r}"
    if not path.is_file():
        return
    theirs = _read(path, key).get_vocab(with_added_tokens=True)
    tokens = {i: token for token, i in theirs.items()}
    both = sorted((i, token) for token, i in ours.items() if i in tokens)
    if different := [(i, token) for i, token in both if theirs.get(token) != i]:
        i, token = different[0]
        raise ConfigError(
            f"{key}: its tokenizer is not the run's: id {i} is {tokens[i]!r} there, {token!r} here ({len(different)} of {len(both)} differ)"
            f"; set metarl.tokenizer.path: {checkpoint}, or, for the model of a run without that key, metarl.problems and metarl.episodes"
            " as they were there"
        )


def _read(path: Path, key: str) -> HFTokenizer:
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises this class itself
        raise ConfigError(f"{key}: {path} is no tokenizer ({error}): cut, or a pointer of Git LFS? Download it again") from error


def end_ids(directory: Path) -> tuple[int | None, int | None]:
    """The ids of EOS and of padding, as far as the tokenizer of an HF directory names them. Raises ConfigError where it cannot be read, or
    its EOS is no token of it."""
    return _end_ids(directory, _read(directory / "tokenizer.json", "tokenizer.path"))


def _end_ids(directory: Path, hf: HFTokenizer) -> tuple[int | None, int | None]:
    path = directory / "tokenizer_config.json"

    def id_of(token: object) -> int | None:
        word = token.get("content") if isinstance(token, dict) else token
        return hf.token_to_id(word) if isinstance(word, str) else None

    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        eos, pad = config.get("eos_token"), config.get("pad_token")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"tokenizer.path: {path} holds no JSON object ({error}); download or write it again") from error
    if (eos_id := id_of(eos)) is None and eos is not None:
        word = eos.get("content") if isinstance(eos, dict) else eos
        raise ConfigError(f"{path}: eos_token {word!r} is not a token of tokenizer.json; a completion must be able to end")
    return eos_id, id_of(pad)
