"""What breaks each rule between keys, what it says, and the fix it names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from neox_rl.config.machine import Machine

CPU = Machine(cores=(0, 1, 2, 3), exists=lambda path: path.startswith("here"))
GPU = replace(CPU, num_gpus=4)
NEOX = replace(CPU, gpt_neox_path=str(Path(__file__).parent / "checkout_stub"))

LLAMA = "norm=rmsnorm activation=swiglu use_bias_in_attn_linear=false use_bias_in_mlp=false intermediate_size=1536 "
JSONL = "metarl.problems.source=jsonl metarl.problems.path=here.jsonl metarl.tokenizer.path=here "
PAIRS = "metarl.rollout.method=search metarl.search.trains=preferences metarl.objective.loss=dpo metarl.objective.aggregation=sequence_mean"
FP16 = "metarl.engine=gpt-neox precision=fp16 "
FAR = "launcher=slurm hostfile=here master_addr=10.0.0.1 metarl.network.bind_host=10.0.0.1 "


@dataclass(frozen=True)
class Case:
    """``wrong`` settings break ``rule``, whose message holds ``says``; with ``fix`` on top it is silent."""

    rule: str
    wrong: str
    says: str
    fix: str
    machine: Machine = CPU


CASES = (
    Case(
        "heads_divide_width",
        "hidden_size=200",
        "hidden_size = 200: must be a multiple of num_attention_heads = 6; take 198 or 204",
        "hidden_size=204",
    ),
    Case("one_family", "norm=rmsnorm", "activation = gelu: norm rmsnorm makes a LlamaForCausalLM, which needs activation: swiglu", LLAMA),
    Case("one_family", LLAMA + "rotary_pct=0.5", "rotary_pct = 0.5", "rotary_pct=1"),
    Case("one_family", LLAMA + "gpt_j_residual=true", "needs gpt_j_residual: false", "gpt_j_residual=false"),
    Case(
        "one_family",
        "use_bias_in_mlp=false",
        "norm layernorm makes a GPTNeoXForCausalLM, which needs use_bias_in_mlp: true",
        "use_bias_in_mlp=true",
    ),
    Case("one_family", "num_kv_heads=2", "num_kv_heads = 2", "num_kv_heads=0"),
    Case("one_family", "metarl.qkv_bias=true", "GPTNeoXForCausalLM, which needs metarl.qkv_bias: false", LLAMA),
    Case("one_family", LLAMA + "metarl.qkv_bias=true rotary_pct=0.5", "makes a Qwen2ForCausalLM, which needs rotary_pct", "rotary_pct=1"),
    Case("engine_has_the_biases", LLAMA + "metarl.qkv_bias=true metarl.engine=gpt-neox", "has no Qwen2", "metarl.qkv_bias=false"),
    Case("head_size_served", "num_attention_heads=4", "= 48: vLLM on CPU serves head sizes 32, 64", "num_attention_heads=6"),
    Case("rotary_dimensions", "rotary_pct=0.1", "rotates 3 of 32 dimensions", "rotary_pct=0.0625"),
    Case("kv_heads_divide", LLAMA + "num_kv_heads=4", "must divide num_attention_heads = 6; take one of [1, 2, 3, 6]", "num_kv_heads=3"),
    Case(
        "mlp_width_whole",
        LLAMA + "intermediate_size=1001",
        "projections of 668 and 333 columns, which do not fit; take 1002",
        "intermediate_size=1002",
    ),
    Case("mlp_width_whole", "intermediate_size=192 mlp_multiple_of=64", "take 256", "intermediate_size=256"),
    Case(
        "tensor_parallel_divides",
        "model_parallel_size=4",
        "model_parallel_size = 4: must divide num_attention_heads = 6",
        "model_parallel_size=2",
    ),
    Case(
        "tensor_parallel_divides",
        "metarl.servers.tensor_parallel_size=4",
        "tensor_parallel_size = 4: must divide",
        "metarl.servers.tensor_parallel_size=2",
    ),
    Case("stages_hold_layers", "pipe_parallel_size=4", "each stage holds a layer at least, and num_layers = 3", "pipe_parallel_size=3"),
    Case("stages_are_even", "pipe_parallel_size=2", "waits for the longest stage", "num_layers=4"),
    Case("ranks_divide", "model_parallel_size=2 num_gpus=3", "set num_gpus: 4", "num_gpus=4"),
    Case("sequence_parallel_needs_tp", "sequence_parallel=true", "model_parallel_size = 1", "model_parallel_size=2"),
    Case("zero_stage", "zero_optimization.stage=4", "stage = 4: must be 0, 1 (", "zero_optimization.stage=1"),
    Case("zero_stage", "zero_optimization.stage=2 pipe_parallel_size=0", "needs metarl.engine: gpt-neox", "zero_optimization.stage=1"),
    Case(
        "zero_stage",
        "metarl.engine=gpt-neox zero_optimization.stage=2",
        "pipe_parallel_size: 0 and model_parallel_size: 1",
        "pipe_parallel_size=0",
        NEOX,
    ),
    Case(
        "zero_stage",
        "metarl.engine=gpt-neox pipe_parallel_size=0 zero_optimization.stage=3 model_parallel_size=2",
        "stage = 3: needs",
        "model_parallel_size=1",
        NEOX,
    ),
    Case(
        "attention_covers_layers",
        "metarl.engine=gpt-neox attention_config=[[[flash],4]]",
        'names 4 layers, and num_layers = 3; write [[["global"], 3]]',
        "attention_config=[[[flash],all]]",
        NEOX,
    ),
    Case(
        "attention_covers_layers",
        "metarl.engine=gpt-neox attention_config=[[3]]",
        "must be a list of",
        "attention_config=[[[flash],3]]",
        NEOX,
    ),
    Case(
        "attention_covers_layers",
        "metarl.engine=gpt-neox attention_config=[[[flash],3]]",
        "computes in half precision",
        "precision=bfloat16",
        replace(NEOX, num_gpus=4),
    ),
    Case("half_precision_is_scaled", "precision=fp16", "needs metarl.engine: gpt-neox", "metarl.engine=gpt-neox", NEOX),
    Case(
        "half_precision_is_scaled",
        "metarl.engine=gpt-neox precision=fp16 fp16={'min_scale':1}",
        "fp16.min_scale = 1: is no key of loss scaling; did you mean min_loss_scale?",
        "fp16={'min_loss_scale':1}",
        NEOX,
    ),
    *(
        Case("half_precision_is_scaled", FP16 + f"fp16={{'{key}':{value}}}", f"fp16.{key} = {value.title()}: must be {rule}", fix, NEOX)
        for key, value, rule, fix in (
            ("loss_scale", "-1", "a number >= 0", "fp16={'loss_scale':0.5}"),
            ("hysteresis", "0", "an integer from 1 to 32", "fp16={'hysteresis':2}"),
            ("initial_scale_power", "1.5", "an integer from 0 to 32", "fp16={'initial_scale_power':16}"),
            ("loss_scale_window", "0", "an integer >= 1", "fp16={'loss_scale_window':1}"),
            ("min_loss_scale", "0", "an integer >= 1", "fp16={'min_loss_scale':1}"),
            ("min_loss_scale", "true", "an integer >= 1", "fp16={'min_loss_scale':1}"),
            ("consecutive_hysteresis", "1", "true or false", "fp16={'consecutive_hysteresis':true}"),
        )
    ),
    Case("zero_stage", "zero_optimization.stage=true", "stage = True: must be 0, 1 (", "zero_optimization.stage=1"),
    Case("zero_stage", "zero_optimization.stages=1", "stages: is no key", "zero_optimization={}"),
    Case("zero_stage", "zero_optimization.cpu_offload=true", "set cpu_offload: false", "zero_optimization.cpu_offload=false"),
    Case("optimizer_known", "optimizer.type=SGD", "must be Adam or AdamW", "optimizer.type=AdamW"),
    Case("optimizer_known", "optimizer.kind=Adam", "optimizer.kind: is no key", "optimizer={}"),
    Case("optimizer_known", "optimizer.params=3", "must be a block", "optimizer.params={}"),
    Case("optimizer_known", "optimizer.params.lr=1e400", "must be a number > 0", "optimizer.params.lr=1e-3"),
    Case("optimizer_known", "optimizer.params.lr=-1", "optimizer.params.lr = -1: must be a number > 0", "optimizer.params.lr=1e-3"),
    Case("optimizer_known", "optimizer.params.betas=0.9", "must be two numbers in [0, 1)", "optimizer.params.betas=[0.9,0.99]"),
    Case("optimizer_known", "optimizer.params.weight_decay=0.1", "write weight_decay at the top level", "optimizer.params={}"),
    Case("decay_goes_down", "lr_decay_style=cosine min_lr=0.1", "must not be above optimizer.params.lr", "min_lr=1e-5"),
    Case("positions_hold_sequence", "max_position_embeddings=128", "must be >= seq_length = 256", "max_position_embeddings=0"),
    Case("backend_fits_machine", "distributed_backend=nccl", "shows none; set distributed_backend: auto", "distributed_backend=auto"),
    Case(
        "prompt_and_completion_fit",
        "seq_length=134",
        "must hold a prompt of 7 tokens and metarl.rollout.max_new_tokens = 128; set seq_length: 135",
        "seq_length=135",
    ),
    Case("prompt_and_completion_fit", "seq_length=130", "or max_new_tokens: 123", "metarl.rollout.max_new_tokens=123"),
    Case("prompt_and_completion_fit", JSONL + "seq_length=128", "must hold a prompt and", "seq_length=256"),
    Case(
        "engine_knows_prefix_trees",
        "metarl.share_prefixes=always metarl.engine=gpt-neox",
        "no attention over prefix trees; set auto",
        "metarl.share_prefixes=auto",
    ),
    Case("pack_holds_a_sequence", "metarl.pack_tokens=128", "must hold one sequence of seq_length = 256", "metarl.pack_tokens=256"),
    Case(
        "pack_holds_a_sequence",
        "metarl.warmstart.steps=1 metarl.warmstart.tokens_per_step=99",
        "must hold one demonstration",
        "metarl.warmstart.tokens_per_step=256",
    ),
    Case(
        "generated_values_fit",
        "metarl.problems.max_value=30",
        "must reach max_number = 9 and max_target = 40",
        "metarl.problems.max_value=40",
    ),
    Case(
        "generated_values_fit",
        "metarl.problems.source=game24 metarl.problems.max_value=20",
        "must reach the target 24",
        "metarl.problems.max_value=24",
    ),
    Case(
        "game24_has_cards",
        "metarl.problems.source=game24 metarl.problems.num_numbers=5",
        "set num_numbers: 4",
        "metarl.problems.num_numbers=4",
    ),
    Case(
        "game24_has_cards",
        "metarl.problems.source=game24 metarl.problems.max_number=14",
        "set max_number: 13",
        "metarl.problems.max_number=13",
    ),
    Case("heldout_problems_exist", "metarl.problems.heldout_frac=0", "leaves nothing to evaluate on", "metarl.problems.heldout_frac=0.25"),
    Case(
        "demonstrations_have_a_source",
        "metarl.warmstart.sees_earlier=true metarl.warmstart.style=mixed",
        "is of a reward model, and style is mixed",
        "metarl.warmstart.style=values",
    ),
    Case(
        "demonstrations_have_a_source",
        "metarl.warmstart.style=trees metarl.warmstart.steps=9",
        "path is empty: style trees shows what was recorded",
        "metarl.warmstart.path=here.jsonl,here2.jsonl",
    ),
    Case(
        "demonstrations_have_a_source",
        "metarl.warmstart.style=attempts metarl.warmstart.path=here/batches,gone",
        "names 'gone', which does not exist",
        "metarl.warmstart.path=here/batches",
    ),
    Case(
        "demonstrations_have_a_source",
        "metarl.warmstart.path=here.jsonl",
        "is read with style trees, attempts, values only",
        "metarl.warmstart.style=values",
    ),
    Case(
        "demonstrations_have_a_source",
        "metarl.warmstart.from_checkpoint=true",
        "there is no checkpoint to train further",
        "metarl.warmstart.hf_checkpoint=here",
    ),
    Case(
        "demonstrations_are_trained_on",
        "metarl.warmstart.mask=search metarl.warmstart.telling=solution",
        "mask = search: style dfs told as solution shows solutions alone",
        "metarl.warmstart.telling=revision",
    ),
    Case(
        "demonstrations_are_trained_on",
        "metarl.warmstart.style=attempts metarl.warmstart.prune=0.5",
        "prune = 0.5: only searches are told",
        "metarl.warmstart.prune=0",
    ),
    Case(
        "reward_model_is_trained_alone",
        "metarl.warmstart.style=values metarl.warmstart.steps=9",
        "train_iters = 100: metarl.warmstart.style values makes a reward model",
        "train_iters=0",
    ),
    Case(
        "reward_model_is_trained_alone",
        "metarl.warmstart.style=values metarl.warmstart.steps=9 train_iters=0 metarl.warmstart.hf_checkpoint=here",
        "the warm start is all of its training",
        "metarl.warmstart.from_checkpoint=true",
    ),
    Case("jsonl_is_complete", "metarl.problems.source=jsonl", "metarl.tokenizer.path is empty", JSONL),
    Case("jsonl_is_complete", "metarl.problems.path=here", "set source: jsonl or remove path", "metarl.problems.path=''"),
    Case(
        "jsonl_is_complete",
        JSONL + "metarl.warmstart.steps=9",
        "needs a solver for its searches",
        "metarl.warmstart.hf_checkpoint=here",
    ),
    Case(
        "template_has_a_place",
        "metarl.tokenizer.path=here metarl.problems.template=<user>problem",
        "metarl.problems.template = '<user>problem': has no place for the problem; write {problem} where",
        "metarl.problems.template=<user>{problem}",
    ),
    Case(
        "template_has_a_place",
        "metarl.problems.template=<user>{problem}",
        "the symbolic tokenizer cannot spell metarl.problems.template = '<user>{problem}'; set it to the directory",
        "metarl.tokenizer.path=here",
    ),
    Case("one_start", "load=here metarl.warmstart.hf_checkpoint=here", "both give initial weights; keep one", "load=''"),
    Case(
        "samples_are_the_policys",
        "metarl.rollout.temperature=0",
        "no advantage is left; set temperature: 1.0",
        "metarl.rollout.temperature=1",
    ),
    Case("samples_are_the_policys", "metarl.rollout.top_p=0.9", "set top_p: 1.0", "metarl.rollout.top_p=1"),
    Case("group_has_a_baseline", "metarl.rollout.group_size=1", "baseline grpo compares", "metarl.objective.baseline=none"),
    Case(
        "refusals_are_possible",
        "metarl.staleness.dynamic_sampling=true metarl.staleness.max_refusals=0",
        "so dynamic_sampling does nothing",
        "metarl.staleness.max_refusals=8",
    ),
    Case(
        "refusals_are_possible",
        "metarl.staleness.dynamic_sampling=true metarl.rollout.group_size=1 metarl.objective.baseline=none",
        "a group of one always has equal rewards",
        "metarl.rollout.group_size=2",
    ),
    Case(
        "refusals_are_possible",
        "metarl.staleness.dynamic_sampling=true metarl.rollout.group_size=1",
        "a group of one always has equal rewards",
        "metarl.rollout.method=search",
    ),
    Case(
        "strict_waits_at_a_due_ticket",
        "metarl.staleness.mode=strict metarl.staleness.dynamic_sampling=true",
        "waits for up to max_refusals = 8 whole rollouts",
        "metarl.staleness.admission_slack=0 metarl.staleness.delivery_slack=0",
    ),
    Case(
        "truncation_has_a_ratio",
        "metarl.staleness.stale_tokens=truncate metarl.objective.loss=ppo",
        "set loss: tis or cispo",
        "metarl.objective.loss=tis",
    ),
    Case(
        "truncation_has_a_ratio",
        "metarl.staleness.stale_tokens=truncate metarl.staleness.mode=strict",
        "leaves no token beyond the bound",
        "metarl.staleness.mode=token",
    ),
    Case(
        "publishing_keeps_up",
        "metarl.weights.publish_every=3",
        "must be <= staleness.admission_slack + 1 = 2",
        "metarl.staleness.admission_slack=2",
    ),
    Case(
        "clips_are_sensible", "metarl.objective.loss=ppo metarl.objective.clip_low=1", "must stay above 0", "metarl.objective.clip_low=0.2"
    ),
    Case("clips_are_sensible", "metarl.objective.ratio_cap=0.5", "truncates on-policy tokens too", "metarl.objective.ratio_cap=2"),
    Case("stale_samples_are_corrected", "metarl.objective.loss=reinforce", "tokens may be 2 steps old", "metarl.objective.loss=tis"),
    Case(
        "objective_suits_what_is_trained",
        "metarl.rollout.method=search metarl.search.trains=traces",
        "was sampled in another order",
        "metarl.objective.loss=sft",
    ),
    Case("objective_suits_what_is_trained", "metarl.objective.loss=sft", "imitates what it is given, wrong", "metarl.objective.loss=tis"),
    Case(
        "objective_suits_what_is_trained",
        "metarl.rollout.method=search metarl.objective.loss=gspo",
        "clips one ratio of a whole sequence",
        "metarl.objective.loss=ppo",
    ),
    Case(
        "objective_suits_what_is_trained",
        "metarl.rollout.method=search metarl.search.trains=preferences",
        "knows no pairs",
        "metarl.objective.loss=dpo metarl.objective.aggregation=sequence_mean",
    ),
    Case("objective_suits_what_is_trained", f"{PAIRS} metarl.search.trains=steps", "needs pairs", "metarl.search.trains=preferences"),
    Case(
        "pairs_are_whole",
        f"{PAIRS} metarl.objective.aggregation=token_mean",
        "would weigh a pair by the length",
        "metarl.objective.aggregation=sequence_mean",
    ),
    Case("pairs_are_whole", f"{PAIRS} metarl.staleness.stale_tokens=truncate", "no importance ratio", "metarl.staleness.stale_tokens=mask"),
    Case("pairs_are_whole", f"{PAIRS} metarl.pack_tokens=300", "must hold the two sequences of a pair", "metarl.pack_tokens=1024"),
    Case("pairs_are_whole", f"{PAIRS} metarl.search.width=1", "makes no pair", "metarl.search.width=4"),
    Case(
        "searches_have_room",
        "metarl.rollout.method=search metarl.search.max_step_tokens=300",
        "a prompt and one step must fit in seq_length",
        "metarl.search.max_step_tokens=8",
    ),
    Case(
        "searches_have_room",
        "metarl.rollout.method=search metarl.search.tokens=63",
        "does not pay for one step of max_step_tokens = 64",
        "metarl.search.tokens=256",
    ),
    Case(
        "told_steps_are_whole",
        "metarl.rollout.method=search metarl.search.trains=traces metarl.objective.loss=sft metarl.search.cut_steps=true",
        "cut_steps = true: ends a step in the midst of a line",
        "metarl.search.cut_steps=false",
    ),
    Case(
        "reward_model_is_served",
        "metarl.rollout.method=search metarl.search.value=prm metarl.search.prm_server=http://a:1",
        "metarl.search.prm_model is empty",
        "metarl.search.prm_model=classifier",
    ),
    *(
        Case(
            "values_know_the_problems",
            f"{source}{made} metarl.search.value=none",
            f"metarl.search.value = none: no step has a value but the one that ends an answer, and search.trains: {trains}",
            "metarl.search.value=monte-carlo",
        )
        for trains, made in (("steps", "metarl.rollout.method=search"), ("preferences", PAIRS))
        for source in (JSONL, "")
    ),
    Case(
        "values_know_the_problems",
        JSONL + "metarl.rollout.method=search metarl.search.value=oracle",
        "knows arithmetic problems only, and source is jsonl",
        "metarl.search.value=monte-carlo",
    ),
    Case(
        "searches_alone_have_a_start",
        "metarl.warmstart.mask=search metarl.warmstart.steps=9",
        "a policy from random weights never answers; set mask: all",
        "metarl.warmstart.hf_checkpoint=here metarl.warmstart.from_checkpoint=true",
    ),
    Case("policy_has_a_start", "metarl.warmstart.steps=0", "RL starts from random weights", "metarl.warmstart.steps=100"),
)
