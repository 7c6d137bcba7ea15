"""The symbolic tokenizer: the same ids in the project, in tokenizers and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from neox_rl.config.schema import ProblemsConfig, TokenizerConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import EOS, PAD, UNKNOWN, vocabulary
from neox_rl.problems.tokenizer import DirectoryTokenizer, SymbolicTokenizer, load_tokenizer, save_hf

MAX_VALUE = 30
ALL_WORDS = " ".join(word for word in vocabulary(MAX_VALUE) if word not in (PAD, EOS, UNKNOWN))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    SymbolicTokenizer(vocabulary(MAX_VALUE)).save(path)
    return path


def test_every_word_is_one_token_and_comes_back() -> None:
    tokenizer = SymbolicTokenizer(vocabulary(MAX_VALUE))
    ids = tokenizer.encode(ALL_WORDS)
    assert len(set(ids)) == len(ids) == tokenizer.vocab_size - 3
    assert tokenizer.decode(ids) == ALL_WORDS


def test_words_outside_the_language_and_padded_ids_read_as_unknown() -> None:
    tokenizer = SymbolicTokenizer(vocabulary(MAX_VALUE))
    assert tokenizer.decode(tokenizer.encode("3 hello 31")) == f"3 {UNKNOWN} {UNKNOWN}"
    assert tokenizer.decode((tokenizer.vocab_size + 4,)) == UNKNOWN
    assert tokenizer.decode((tokenizer.pad_id, *tokenizer.encode("3"), tokenizer.eos_id)) == "3"


def test_transformers_loads_the_saved_directory(directory: Path) -> None:
    ours, theirs = SymbolicTokenizer(vocabulary(MAX_VALUE)), AutoTokenizer.from_pretrained(directory)
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    for text in (ALL_WORDS, "3 hello  4"):
        assert tuple(theirs(text).input_ids) == ours.encode(text), "no special token is added, whitespace splits"
    ids = [*ours.encode(ALL_WORDS), ours.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    again = AutoTokenizer.from_pretrained(str(theirs.save_pretrained(directory / "again")[0]).rsplit("/", 1)[0])
    assert again.get_vocab() == theirs.get_vocab()


def test_streaming_decoder_keeps_the_spaces(directory: Path) -> None:
    """vLLM detokenizes one id at a time with this class."""
    hf, stream = HFTokenizer.from_file(str(directory / "tokenizer.json")), DecodeStream()
    pieces = [stream.step(hf, i) or "" for i in SymbolicTokenizer(vocabulary(MAX_VALUE)).encode(ALL_WORDS)]
    assert "".join(pieces) == ALL_WORDS


def test_directory_tokenizer_agrees_with_the_symbolic_one(directory: Path) -> None:
    ours = SymbolicTokenizer(vocabulary(MAX_VALUE))
    loaded = load_tokenizer(TokenizerConfig(path=str(directory)), ProblemsConfig(source="jsonl"))
    assert (loaded.eos_id, loaded.vocab_size) == (ours.eos_id, ours.vocab_size)
    assert loaded.encode(ALL_WORDS) == ours.encode(ALL_WORDS)
    assert loaded.decode([*ours.encode(ALL_WORDS), ours.eos_id]) == ALL_WORDS


def chat_directory(root: Path) -> Path:
    words = {word: i for i, word in enumerate(["<unk>", "<|end|>", "<|user|>", "a", "<", "|end|>", "[BACK]"])}
    hf = HFTokenizer(models.WordLevel(words, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.add_special_tokens(["<unk>", "<|end|>", "<|user|>"])
    hf.add_tokens(["[BACK]"])
    save_hf(hf, {"eos_token": "<|end|>", "unk_token": "<unk>"}, root / "chat")
    return root / "chat"


def test_no_text_spells_a_control_token(directory: Path, tmp_path: Path) -> None:
    hostile = f"3 {EOS} 4 {PAD} {EOS}5"
    for tokenizer in (SymbolicTokenizer(vocabulary(MAX_VALUE)), DirectoryTokenizer(directory)):
        assert not {0, 1} & set(tokenizer.encode(hostile)) and tokenizer.encode("3") == tokenizer.encode(hostile)[:1]
    chat = DirectoryTokenizer(chat_directory(tmp_path))
    assert chat.encode("a <|end|> <|user|>") == (3, 4, 5, 4, 0), "words like any others"
    assert chat.encode_prompt("a <|end|>") == (3, 4, 5), "without a template a prompt is as any text"
    asked = DirectoryTokenizer(chat_directory(tmp_path), "<|user|> {problem} <|end|>")
    assert asked.encode_prompt(" a <|end|> [BACK]\n") == (2, 3, 4, 5, 6, 1), "those of the template, and no others"
    assert asked.encode("<|user|> a") == (4, 0, 3)


def test_load_tokenizer_takes_its_size_from_the_problems() -> None:
    assert load_tokenizer(TokenizerConfig(), ProblemsConfig(max_value=70)).vocab_size == len(vocabulary(70))


def test_tokenizers_that_cannot_work_are_refused(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ConfigError, match="symbolic tokenizer has words for the games only"):
        load_tokenizer(TokenizerConfig(), ProblemsConfig(source="jsonl"))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)), ProblemsConfig())
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    for config in ({}, {"eos_token": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="eos_token"):
            load_tokenizer(TokenizerConfig(path=str(tmp_path)), ProblemsConfig())
    for name, said in (("tokenizer_config.json", "holds no JSON object"), ("tokenizer.json", "is no tokenizer")):
        for broken in ("[]", "version https://git-lfs.github.com/spec/v1"):
            (tmp_path / name).write_text(broken)
            with pytest.raises(ConfigError, match=rf"tokenizer.path: .*{name} {said}.*ownload"):
                load_tokenizer(TokenizerConfig(path=str(tmp_path)), ProblemsConfig())
