"""The GPT-NeoX keys that the run reads, under their NeoX names and with their NeoX meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neox_rl.config.declare import key


@dataclass(frozen=True)
class NeoXConfig:
    """Top-level keys of the YAML files."""

    # model
    num_layers: int = key(3, "transformer layers", low=1)
    hidden_size: int = key(192, "width of the residual stream", low=1)
    num_attention_heads: int = key(6, "query heads", low=1)
    num_kv_heads: int = key(0, "key/value heads (grouped-query attention); 0: as many as query heads", low=0)
    intermediate_size: int = key(
        0, "MLP size before NeoX's gating rule, with swiglu 3 x the intermediate_size of an HF config; 0: 4 x hidden_size", low=0
    )
    mlp_multiple_of: int = key(1, "the MLP width is rounded up to a multiple of this", low=1)
    seq_length: int = key(256, "longest sequence (prompt and completion)", low=2)
    max_position_embeddings: int = key(0, "largest position; 0: seq_length", low=0)
    norm: str = key("layernorm", "normalization", choices=("layernorm", "rmsnorm"))
    layernorm_epsilon: float = key(1e-5, "epsilon of layernorm", low=0.0)
    rms_norm_epsilon: float = key(1e-6, "epsilon of rmsnorm", low=0.0)
    rotary_pct: float = key(1.0, "share of each head's dimensions that rotates", low=0.0, high=1.0)
    rotary_emb_base: int = key(10000, "base of the rotary frequencies", low=1)
    activation: str = key("gelu", "MLP activation", choices=("gelu", "swiglu"))
    gpt_j_residual: bool = key(False, "parallel residual: x + attn(ln1(x)) + mlp(ln2(x))")
    use_bias_in_norms: bool = key(True, "biases in layernorm")
    use_bias_in_attn_linear: bool = key(True, "biases in attention projections")
    use_bias_in_mlp: bool = key(True, "biases in the MLP")
    no_weight_tying: bool = key(True, "separate output matrix; false ties it to the embedding")
    make_vocab_size_divisible_by: int = key(8, "the vocabulary is padded to a multiple of this times TP", low=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", low=0.0)
    # precision
    precision: str = key(
        "fp32",
        "training precision, fp16 with engine gpt-neox; the blocks fp16: {enabled, ...} and bf16: {enabled} of NeoX files set it too",
        choices=("fp32", "bfloat16", "fp16"),
    )
    # parallelism
    model_parallel_size: int = key(1, "tensor parallel ranks (TP)", low=1)
    pipe_parallel_size: int = key(1, "pipeline stages (PP)", low=0)
    sequence_parallel: bool = key(False, "split norms and residuals along the sequence over the TP ranks")
    zero_optimization: dict[str, Any] = field(
        default_factory=dict,
        metadata={"doc": "ZeRO: {stage: 0 to 3}; 1 shards optimizer states over DP, 2 gradients and 3 parameters too (engine gpt-neox)"},
    )
    num_gpus: int = key(1, "training ranks on this node (processes; on a CPU machine too)", low=1)
    checkpoint_activations: bool = key(False, "recompute activations in the backward pass")
    distributed_backend: str = key("auto", "gloo on CPU, nccl on CUDA", choices=("auto", "gloo", "nccl"))
    # optimization
    train_iters: int = key(100, "RL optimizer steps", low=0)
    gradient_accumulation_steps: int = key(
        1, "least number of micro-batches a rank and step; packing adds more where tokens need it", low=1
    )
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"type": "Adam", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
        metadata={"doc": "{type: Adam, params: {lr, betas, eps}}; AdamW with weight_decay"},
    )
    weight_decay: float = key(0.0, "decoupled weight decay", low=0.0)
    gradient_clipping: float = key(1.0, "largest gradient norm; 0: no clipping", low=0.0)
    lr_decay_style: str = key("constant", "learning rate schedule of RL", choices=("constant", "linear", "cosine"))
    warmup: float = key(0.0, "share of train_iters with linear warm-up", low=0.0, high=1.0)
    min_lr: float = key(0.0, "final learning rate of a decaying schedule", low=0.0)
    # checkpoints
    save: str = key("", "directory for checkpoints; empty: runs/<name>/checkpoints")
    load: str = key("", "checkpoint directory of another run: start from its weights and optimizer, without a warm start")
    checkpoint_factor: int = key(0, "steps between checkpoints; 0: only at the end", low=0)
    keep_last_n_checkpoints: int = key(0, "newest checkpoints that are kept; 0 or null: all", low=0)
    # launch
    launcher: str = key("local", "how the ranks start", choices=("local", "pdsh", "openmpi", "slurm"))
    hostfile: str = key("", "DeepSpeed host file; empty: this node")
    master_addr: str = key("127.0.0.1", "rendezvous address of the ranks")

    @property
    def mlp_width(self) -> int:
        """Width between the MLP's projections (``intermediate_size`` of an HF config): what a model is built with.

        GPT-NeoX shrinks a gated MLP so that swiglu has as many parameters as gelu: its width is int(2/3 size) // 2.
        """
        size = self.intermediate_size or 4 * self.hidden_size
        width = int(size * 2 / 3) // 2 if self.activation == "swiglu" else size
        return -(-width // self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    @property
    def pipe_stages(self) -> int:
        """PP. GPT-NeoX's 0 (no pipeline module) is one stage."""
        return max(1, self.pipe_parallel_size)
