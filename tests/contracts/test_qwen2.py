"""A Qwen2 of transformers, random in every tensor, is read, computed, trained and written as the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from neox_rl.config.hf_directory import check_directory
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.base import RankEngine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import WeightError
from tests.contracts.one_rank import one_rank
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split


@contextmanager
def built(tied: bool, qkv_bias: bool = True) -> Iterator[RankEngine]:
    neox = NeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=2,
        num_layers=2,
        seq_length=64,
        intermediate_size=288,
        norm="rmsnorm",
        activation="swiglu",
        rms_norm_epsilon=1e-5,
        rotary_emb_base=1000000,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
        no_weight_tying=not tied,
    )
    engine = build_engine(RunConfig(neox, MetaRLConfig(qkv_bias=qkv_bias)), VOCAB)
    assert isinstance(engine, RankEngine)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one_rank(monkeypatch)


def published(directory: Path, tied: bool) -> Qwen2ForCausalLM:
    """As transformers saves it, with rows of the vocabulary to spare, as those on the Hub have."""
    torch.manual_seed(5)
    config = Qwen2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        max_position_embeddings=64,
        vocab_size=VOCAB + 27,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3).add_(parameter.dim() == 1)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_published_qwen2(tmp_path: Path, tied: bool) -> None:
    model, tokens = published(tmp_path / "there", tied), torch.from_numpy(sequences()[0])
    given = {name: tensor[:VOCAB] for name, tensor in load_file(tmp_path / "there" / "model.safetensors").items()}
    with built(tied) as engine:
        check_directory(tmp_path / "there", engine.hf_config())
        engine.load_hf(tmp_path / "there")
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1, :VOCAB]
        theirs = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(engine.logprobs(split(sequences(), 1))[0][: len(theirs)], theirs.numpy(), atol=2e-5, rtol=0)

        engine.save_hf(tmp_path / "here")
        back = load_file(tmp_path / "here" / "model.safetensors")
        assert back.keys() == given.keys() and all(torch.equal(tensor, given[name]) for name, tensor in back.items())
        config = AutoConfig.from_pretrained(tmp_path / "here")
        assert isinstance(config, Qwen2Config) and set(config.layer_types) == {"full_attention"}
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "here")) is Qwen2ForCausalLM

        engine.step(split(sequences(), 1), loss_fn, 1e-2)
        biases = {name: tensor for name, tensor in engine.named_tensors() if name.endswith(".bias")}
        assert len(biases) == 2 * 3 and all((tensor - given[name]).abs().min() > 0 for name, tensor in biases.items())


def test_a_qwen2_is_no_llama(tmp_path: Path) -> None:
    """Its matrices have a Llama's names and sizes: read as one it would lose its biases without a word."""
    published(tmp_path, tied=True)
    with built(tied=True, qkv_bias=False) as engine, pytest.raises(WeightError, match=r"'qwen2' there, 'llama' here .*metarl\.qkv_bias"):
        engine.load_hf(tmp_path)
