"""What follows from a configuration: pure functions of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from neox_rl.config.own import own
from neox_rl.config.rules_model import GPT_NEOX, LLAMA, QWEN2, model_family
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MEGATRON_ENGINE, PREFERENCE, MetaRLConfig, ObjectiveConfig, ProblemsConfig
from neox_rl.metacot import episode_words, goal_prompt, goal_words, vocabulary

PROMPT_MARKERS = 4
"""Words of a symbolic prompt beside the numbers: ``numbers ... target t search``."""
HF_DTYPES = {"fp32": "float32", "bfloat16": "bfloat16", "fp16": "float16"}


def starts_from_checkpoint(config: RunConfig) -> bool:
    return bool(config.neox.load or config.metarl.warmstart.hf_checkpoint)


def warmstart_skipped(config: RunConfig) -> bool:
    """Whether initial weights come from a checkpoint, and RL begins with them as they are."""
    return starts_from_checkpoint(config) and not config.metarl.warmstart.from_checkpoint


def makes_policy(config: RunConfig) -> bool:
    """Whether the run trains a policy; a process reward model writes nothing, so nothing is served, published or evaluated."""
    return config.metarl.warmstart.style != "values"


def keeps_reference(objective: ObjectiveConfig) -> bool:
    """Whether the policy that RL begins with is kept, and its log-probs are computed."""
    return objective.kl_coef > 0.0 or objective.loss == PREFERENCE


def staleness_bound(config: RunConfig) -> int:
    """S = eta + rho, in optimizer steps: no token older than this gets a gradient (strict: none older exists)."""
    return config.metarl.staleness.admission_slack + config.metarl.staleness.delivery_slack


def data_parallel_size(config: RunConfig) -> int:
    """DP of one node: num_gpus / (TP x PP)."""
    n = config.neox
    return n.num_gpus // (n.model_parallel_size * n.pipe_stages)


def prompt_tokens(config: RunConfig) -> int | None:
    """Tokens of a prompt under the symbolic tokenizer; None where another tokenizer makes them differ from problem to problem."""
    problems = config.metarl.problems
    if problems.free_text or config.metarl.tokenizer.path:
        return None
    if problems.source == "goal_finding":
        return len(goal_prompt(problems.num_goals).split())
    return PROMPT_MARKERS + problems.num_numbers


def symbolic_words(problems: ProblemsConfig, around: Sequence[str] = ()) -> tuple[str, ...]:
    """The vocabulary of the symbolic tokenizer, with the words ``around`` attempts."""
    words = vocabulary(problems.max_value)
    if problems.source == "goal_finding":
        words = vocabulary(problems.num_goals) + goal_words(problems.num_goals)
    return tuple(dict.fromkeys((*words, *around)))


def words_around(config: RunConfig) -> tuple[str, ...]:
    """What stands around the attempts of a run's rollouts: the words of episodes, and of the tags of several discounts."""
    e = config.metarl.episodes
    return episode_words(e.count, len(e.gammas) > 1) if config.metarl.rollout.method == "episodes" else ()


def evaluation_s(metarl: MetaRLConfig) -> float:
    """How long the trainer waits for a whole evaluation: the problems are attempted under each discount, one after the other."""
    return metarl.deadlines.evaluate_s * (len(metarl.episodes.gammas) if metarl.rollout.method == "episodes" else 1)


def num_episodes(config: RunConfig) -> int:
    """Most episodes of a rollout."""
    return config.metarl.episodes.count if config.metarl.rollout.method == "episodes" else 1


def max_policy_tokens(config: RunConfig) -> int:
    """Most tokens that the policy writes in one rollout."""
    whole = config.metarl.rollout.max_new_tokens * num_episodes(config)
    return min(whole, config.metarl.episodes.max_tokens or whole) if config.metarl.rollout.method == "episodes" else whole


def padded_vocab_size(config: RunConfig, vocab_size: int) -> int:
    """Rows of the training ranks' embedding: a multiple of make_vocab_size_divisible_by x TP, as in GPT-NeoX."""
    multiple = config.neox.make_vocab_size_divisible_by * config.neox.model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def num_parameters(config: RunConfig, vocab_size: int) -> int:
    """Parameters of the HF model, without the padding of the vocabulary."""
    n = config.neox
    h, kv, width, vocab = n.hidden_size, n.kv_heads * n.head_dim, n.mlp_width, vocab_size * n.hidden_size
    embeddings = vocab * (2 if n.no_weight_tying else 1)
    if model_family(config) != GPT_NEOX:
        biases = h + 2 * kv if config.metarl.qkv_bias else 0
        return embeddings + h + n.num_layers * (2 * h * h + 2 * h * kv + biases + 3 * h * width + 2 * h)
    attention, mlp, norms = 4 * h * h + 4 * h, 2 * h * width + width + h, 4 * h
    return embeddings + 2 * h + n.num_layers * (attention + mlp + norms)


def hf_config(config: RunConfig, vocab_size: int, *, eos_id: int | None = None, pad_id: int | None = None) -> dict[str, Any]:
    """The ``config.json`` of the model for transformers and vLLM. ``vocab_size`` is the tokenizer's, not the padded one, and so are the ids
    of special tokens, left open where whoever asks does not know it: a wrong one would end texts at another word.

    Rotary settings stand both as ``rope_parameters`` (transformers 5) and under the older names, which a reader of either kind needs:
    one that finds neither falls back to its own base without a word.
    """
    described = _family_config(config, vocab_size, eos_id, pad_id)
    if layout := config.metarl.hf_layout:
        described = own(layout, "metarl.hf_layout").config(described)
    return described


def _family_config(config: RunConfig, vocab_size: int, eos_id: int | None, pad_id: int | None) -> dict[str, Any]:
    n, family = config.neox, model_family(config)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": n.hidden_size,
        "num_hidden_layers": n.num_layers,
        "num_attention_heads": n.num_attention_heads,
        "intermediate_size": n.mlp_width,
        "max_position_embeddings": n.max_positions,
        "initializer_range": n.init_std,
        "tie_word_embeddings": not n.no_weight_tying,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": HF_DTYPES[n.precision],
        "use_cache": True,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(n.rotary_emb_base)}
    own_words: dict[str, dict[str, Any]] = {
        LLAMA: {"architectures": ["LlamaForCausalLM"], "head_dim": n.head_dim, "attention_bias": False, "mlp_bias": False},
        QWEN2: {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    }
    if family in own_words:
        return common | {
            "model_type": family,
            **own_words[family],
            "num_key_value_heads": n.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": n.rms_norm_epsilon,
            "rope_theta": rope["rope_theta"],
            "rope_parameters": rope,
        }
    return common | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": n.layernorm_epsilon,
        "use_parallel_residual": n.gpt_j_residual,
        "attention_bias": True,
        "rotary_pct": n.rotary_pct,
        "rotary_emb_base": n.rotary_emb_base,
        "rope_parameters": rope | {"partial_rotary_factor": n.rotary_pct},
    }


def trains_steps(config: RunConfig) -> bool:
    """Whether a trace of RL is a path through a search's tree, or half of a pair of steps: no rollout, of which a group has fewer."""
    return config.metarl.rollout.method == "search" and config.metarl.search.trains != "traces"


def shares_prefixes(config: RunConfig) -> bool:
    """Whether groups are laid out as prefix trees: ``metarl.share_prefixes``, resolved."""
    choice = config.metarl.share_prefixes
    return choice == "always" or (choice == "auto" and config.metarl.engine == MEGATRON_ENGINE)
