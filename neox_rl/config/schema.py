"""Every key of the ``metarl:`` block, typed and frozen. The generated reference in configs/README.md is made from here.

The NeoX keys of the same YAML files stay at the top level and are in ``neox_rl.config.neox``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from neox_rl.config.declare import key
from neox_rl.config.schema_search import EpisodesConfig, SearchConfig

MEGATRON_ENGINE, NEOX_ENGINE = ENGINES = ("megatron-core", "gpt-neox")
"""The trainer engines that come with this project."""
IMITATION = "sft"
"""The objective that reads no behavior log-probs and no advantages: it makes what it is shown more likely."""
PREFERENCE = "dpo"
"""The objective that compares two steps of one place, the better with an advantage above 0, the worse with its opposite."""


PLACE = "{problem}"
"""Where the problem's text goes in ``problems.template``."""


@dataclass(frozen=True)
class ProblemsConfig:
    """Where problems come from."""

    source: str = key("countdown", "problem source", choices=("countdown", "game24", "goal_finding", "jsonl"), own=True)
    path: str = key("", "file of training problems (source jsonl: rows of {problem, answer}, GSM8K or MATH rows)")
    heldout_path: str = key("", "file of held-out problems; empty: a share of the training file, split by cluster")
    task: str = key("math", "checker for source jsonl, and for a source of your own", choices=("math",), own=True)
    num_goals: int = key(6, "N, the doors of goal_finding; an attempt names one, and the goal is behind one", low=2, high=100)
    num_numbers: int = key(3, "numbers in a countdown problem", low=2, high=6)
    max_number: int = key(9, "largest number in a countdown problem", low=2, high=100)
    max_target: int = key(40, "largest countdown target", low=1)
    max_value: int = key(60, "largest intermediate value; steps beyond it are not legal", low=1)
    heldout_frac: float = key(0.25, "share of the clusters (number multisets) that is held out", low=0.0, high=0.9)
    limit: int = key(0, "keep at most this many training problems; 0: all", low=0)
    template: str = key(
        "",
        "text that the policy is asked in, with {problem} where the problem's own goes, as the --template of a search: its special tokens,"
        " and no others, are taken as such; empty: the problem's text, that of a file followed by an instruction to reason and box",
    )

    @property
    def free_text(self) -> bool:
        """Whether problems are any text: the games have a tokenizer and checkers of their own."""
        return self.source not in ("countdown", "game24", "goal_finding")


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to token ids."""

    path: str = key("", "directory of an HF tokenizer; empty: the project's symbolic tokenizer, built for the problems")


@dataclass(frozen=True)
class WarmstartConfig:
    """Supervised training on demonstrations, before RL. Skipped when ``load`` or ``hf_checkpoint`` is given."""

    steps: int = key(0, "optimizer steps; 0: no warm start", low=0)
    tokens_per_step: int = key(2048, "tokens a step, over all ranks; beginnings that are computed once (share_prefixes) count once", low=1)
    lr: float = key(3e-3, "peak learning rate", low=0.0)
    min_lr_frac: float = key(0.05, "final learning rate as a share of the peak (cosine)", low=0.0, high=1.0)
    warmup_frac: float = key(0.03, "share of the steps with linear warm-up", low=0.0, high=1.0)
    style: str = key(
        "dfs",
        "what is shown: depth-first searches in random order, searches of mixed quality, solutions alone; source jsonl: the worked"
        " solutions that the rows bring along (written); of path: recorded searches (trees), recorded rollouts that were right (attempts),"
        " or whether a step is hopeful (values), which makes a process reward model and no policy; or rollouts of several attempts by the"
        " rules of block episodes: guesses, or searches of mixed quality (episodes)",
        choices=("dfs", "mixed", "solution", "written", "trees", "attempts", "values", "episodes"),
    )
    path: str = key(
        "",
        "styles trees and values: a file of trees (python -m neox_rl.search --trees), several with commas between; style attempts: a"
        " directory of batches (debug.record_batches)",
    )
    telling: str = key(
        "stream",
        "how a search is told: as it was, the steps that were gone into, some wrong attempts and the right one, the right one with wrong"
        " steps taken back, the right one alone",
        choices=("stream", "taken", "revision", "backtrack", "solution"),
    )
    mask: str = key(
        "all",
        "what of a told search is trained on: all, the search to the word (line) that ends it, no step off the path",
        choices=("all", "search", "path"),
    )
    prune: float = key(0.0, "each step off the solution path is left out with this chance, and what came of it", low=0.0, high=1.0)
    choice_weight: float = key(1.0, "loss weight of tokens that choose the next step at random", low=0.0, high=1.0)
    sees_earlier: bool = key(False, "style values: the model is told what the search did before, and trained as a meta-critic (8.3.4)")
    from_checkpoint: bool = key(False, "the warm start trains the policy of hf_checkpoint or load further, instead of being skipped")
    hf_checkpoint: str = key("", "HF directory to start from instead of a random model; a relative path is from the working directory")


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy's attempts are made."""

    method: str = key(
        "sample",
        "what a rollout is: a sampled attempt, what a search under the policy found (block search), or several episodes in one context"
        " (block episodes). Held-out problems are attempted by sampling, or in episodes",
        choices=("sample", "search", "episodes"),
    )
    generator: str = key("vllm", "who generates: vllm servers, or the scripted fake", choices=("vllm", "scripted"))
    groups_per_step: int = key(16, "B, groups in one optimizer step", low=1)
    group_size: int = key(8, "rollouts of one problem", low=1)
    temperature: float = key(1.0, "sampling temperature", low=0.0)
    top_p: float = key(1.0, "nucleus sampling mass; the policy's log-probs are exact only at 1", low=0.0, high=1.0)
    max_new_tokens: int = key(128, "token budget of a completion", low=1)
    flush_tokens: int = key(
        512,
        "a longer completion is made by several requests, each of so many tokens at most: finished requests survive a crash; 0: one each",
        low=0,
    )
    max_inflight_groups: int = key(0, "groups generated at once; 0: as many as the admission rule allows", low=0)
    record_every: int = key(50, "write every n-th group to rollouts.jsonl; 0: none", low=0)


@dataclass(frozen=True)
class ScriptedConfig:
    """The servers of ``rollout.generator: scripted``, which have no model: how fast and how long they write."""

    token_s: float = key(0.002, "seconds that a token takes", low=0.0)
    mean_tokens: int = key(0, "mean of the lengths, which are log-normal; 0: those of the searches that are shown", low=0)
    sigma: float = key(0.8, "standard deviation of the logarithm of the lengths; 0: all alike", low=0.0, high=3.0)


@dataclass(frozen=True)
class QueueConfig:
    """The journal of tickets, groups and unfinished rollouts (``runs/<name>/journal``)."""

    flush_s: float = key(0.1, "the journal reaches the disk this often, and before any batch leaves", low=0.001, high=60.0)
    segment_mib: int = key(
        512,
        "MiB of groups, or 4 times that with unfinished ones, after which the journal forgets what was trained since the last checkpoint:"
        " a resume from there generates it again. Bounds its files, and the memory of who reads them, with checkpoint_factor: 0 too",
        low=1,
    )
    disk_full_s: float = key(
        600.0, "how long a full disk is waited for, by journal and checkpoints; meanwhile nothing is admitted or trained, nor lost", low=0.0
    )


@dataclass(frozen=True)
class RewardConfig:
    """Verdict to reward, or a given solution's likelihood."""

    kind: str = key(
        "verdict",
        "what a rollout is worth: its verdict; or, with no verifier, log pi(S | Z, q) of the problem's own solution S after its search Z"
        " (q-STaR (18)-(20)), or that less log pi(S | q). Held-out problems are verified all the same",
        choices=("verdict", "solution", "gain"),
    )
    solution_weight: float = key(
        1.0, "kinds solution and gain: loss weight of the solution's tokens; 0: the search alone is trained", low=0.0, high=1.0
    )
    correct: float = key(1.0, "reward of a correct answer")
    wrong: float = key(0.0, "reward of any other verdict")
    wrong_step_cost: float = key(
        0.0, "subtracted for each search step that is false or not legal, false claims included, up to five (arithmetic problems)", low=0.0
    )
    token_cost: float = key(0.0, "subtracted from a correct answer's reward per token, as a share of max_new_tokens", low=0.0)


@dataclass(frozen=True)
class StalenessConfig:
    """The bound S = admission_slack + delivery_slack on how old a trained token may be, in optimizer steps."""

    mode: str = key("token", "token: mask older tokens; strict: wait, so that none is older", choices=("token", "strict"))
    admission_slack: int = key(1, "eta: ticket k is admitted once the live version is >= floor(k/B) - eta", low=0)
    delivery_slack: int = key(1, "rho: how many steps late a group may be trained", low=0)
    stale_tokens: str = key(
        "mask", "tokens beyond the bound in token mode: no gradient, or a truncated ratio", choices=("mask", "truncate")
    )
    dynamic_sampling: bool = key(
        False, "refuse groups whose rewards are all equal (loss sft: that hold nothing to imitate) and hand their ticket on"
    )
    max_refusals: int = key(8, "refusals in a row of one ticket before its group is accepted as it is", low=0)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective = credit x baseline x loss, each chosen by name."""

    loss: str = key("tis", "policy loss", choices=("reinforce", "ppo", "decoupled_ppo", "tis", "cispo", "gspo", "sft", "dpo"), own=True)
    baseline: str = key("grpo", "reward baseline in a group", choices=("none", "mean", "rloo", "grpo"))
    aggregation: str = key("token_mean", "denominator of the loss", choices=("token_mean", "sequence_mean", "constant"))
    clip_low: float = key(0.2, "lower clip: ratio >= 1 - clip_low", low=0.0)
    clip_high: float = key(0.28, "upper clip (clip-higher, DAPO): ratio <= 1 + clip_high", low=0.0)
    ratio_cap: float = key(2.0, "truncation of the importance ratio (tis, cispo, decoupled_ppo)", low=0.0)
    beta: float = key(0.1, "dpo: how much a pair's log-ratios to the reference policy weigh; larger keeps nearer to it", low=1e-6)
    kl_coef: float = key(0.0, "weight of the KL term against the reference policy; with 0, only dpo keeps one", low=0.0)
    kl_estimator: str = key("k3", "KL estimator (Schulman 2020)", choices=("k1", "k2", "k3"))
    entropy_coef: float = key(0.0, "weight of the entropy bonus", low=0.0)


@dataclass(frozen=True)
class ServersConfig:
    """vLLM server processes."""

    num_servers: int = key(1, "servers that the run starts; others may join (neox_rl.run.serve); 0 with network.join_port: all join", low=0)
    tensor_parallel_size: int = key(1, "TP of each server", low=1)
    addresses: tuple[str, ...] = key(
        (),
        "http://host:port of servers that run elsewhere, instead of starting any. Start them with the flags that --prepare prints for"
        " num_servers: 1, --model a copy of runs/<name>/model, and network.bind_host an address that they reach",
    )
    cores: str = key("auto", "CPU cores: auto, or one set a server as in '0;1' or '0|1;2|3' (| between TP ranks)")
    gpus: str = key("auto", "GPU ids: auto (those after the training ranks'), or one set a server as in '4,5;6,7'")
    max_num_seqs: int = key(256, "sequences that one server decodes at once", low=1)
    kv_cache_gib: float = key(1.0, "KV cache on CPU servers, GiB", low=0.1)
    gpu_memory_frac: float = key(0.85, "share of GPU memory on GPU servers", low=0.05, high=1.0)
    dtype: str = key("auto", "weights in the server; auto: the trainer's", choices=("auto", "float32", "bfloat16", "float16"))
    enforce_eager: bool = key(True, "no compilation in the server")
    start_timeout_s: float = key(300.0, "deadline for a server to answer its health route", low=1.0)
    request_timeout_s: float = key(120.0, "deadline of one generation request", low=1.0)
    heartbeat_s: float = key(
        5.0,
        "how long a server may be silent, or behind the others after a new version, before the run goes on without it; it is probed every"
        " half of it, for as long",
        low=0.1,
    )
    max_restarts: int = key(3, "how often a server that died is started again; well for five minutes, it is forgiven", low=0)


@dataclass(frozen=True)
class WeightsConfig:
    """How new weights reach the servers."""

    publish_every: int = key(1, "optimizer steps between publishes", low=1)
    max_mismatch_kl: float = key(
        0.5, "the run stops when trainer and servers differ by more at the same version, in nats a token; 0: not checked", low=0.0
    )
    stage_timeout_s: float = key(120.0, "deadline for a server to stage a published version", low=1.0)
    switch_timeout_s: float = key(60.0, "deadline for pause, load and resume", low=1.0)


@dataclass(frozen=True)
class MathPolicy:
    """What a checker of mathematical answers has to decide, and public graders decide differently."""

    marked_answers: bool = key(
        False, "only a marked answer counts (\\boxed{}, <answer>, ####, 'the answer is'); else also the last formula or number of a text"
    )
    ordered_lists: str = key(
        "unsorted",
        "which bare lists of a gold answer keep their order: none, all, or those of three and more numbers that are in no order by size"
        " (1, -1, 7, -7 is a set of solutions; 2, 4, 3 answers three questions). Tuples always do, sets never",
        choices=("never", "unsorted", "always"),
    )
    percent_sign_optional: bool = key(True, "10% also matches 10, beside 0.1")
    reduced_fractions: bool = key(False, "2/4 is wrong for 1/2")
    interval_as_inequality: bool = key(True, "[0, 1] matches 0 <= x <= 1")
    case_sensitive: bool = key(True, "the variable C differs from c (words never do)")
    units_must_match: bool = key(True, "a unit on both sides must be the same; a missing one is taken from the question")
    rounded_digits: int = key(
        6, "significant digits from which a decimal matches the number that it rounds; an integer is never rounded to", low=1, high=100
    )


@dataclass(frozen=True)
class VerifyConfig:
    """Answer checking in worker processes."""

    workers: int = key(1, "worker processes", low=1)
    deadline_s: float = key(1.0, "hard deadline of one check; the worker is killed when it passes", low=0.05)
    math: MathPolicy = field(default_factory=MathPolicy)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy."""

    num_problems: int = key(400, "held-out problems in the evaluations before and after RL; 0: all", low=0)
    samples: int = key(1, "sampled attempts a problem, beside the greedy one", low=0)
    every_steps: int = key(0, "RL steps between small evaluations during the run; 0: none", low=0)
    small_problems: int = key(128, "held-out problems in the small evaluations", low=1)


@dataclass(frozen=True)
class NetworkConfig:
    """Addresses. Loopback unless said otherwise."""

    bind_host: str = key("127.0.0.1", "interface that every socket binds to")
    curve: str = key(
        "auto",
        "CURVE keys on the ZeroMQ sockets, made for the run and kept in runs/<name>/keys/; auto: where bind_host is not loopback. They do"
        " not cover the servers' HTTP",
        choices=("auto", "always", "never"),
    )
    weights_port: int = key(0, "port of the weight publisher; 0: a free one")
    experience_port: int = key(0, "port of the experience queue; 0: a free one")
    join_port: int = key(0, "port at which servers join the running job (neox_rl.run.serve --join); 0: a free one")
    server_port: int = key(0, "port of the first vLLM server, counting up; 0: free ones")
    master_port: int = key(0, "rendezvous port of the training ranks; 0: a free one")


@dataclass(frozen=True)
class DeadlinesConfig:
    """How long each wait may last. Every wait names what it waited for when this passes."""

    batch_s: float = key(900.0, "the trainer waits for a batch, and meanwhile perhaps for room on a full disk", low=1.0)
    evaluate_s: float = key(
        1800.0, "the trainer waits for a whole evaluation, before and after RL; so long for each of several episodes.gammas", low=1.0
    )
    orchestrator_s: float = key(60.0, "the trainer waits for a word from an orchestrator that is down or starts again", low=5.0)
    ranks_start_s: float = key(
        300.0, "the launcher waits for training ranks, loading a checkpoint included, and for an orchestrator, to come up", low=1.0
    )
    step_s: float = key(900.0, "a training rank's one step, publish or save, and each collective operation in it", low=1.0)
    silence_s: float = key(
        30.0,
        "a rank or orchestrator that shows no sign of life for this long is stuck, and is ended; a rank that is built or loads a checkpoint"
        " has ranks_start_s",
        low=1.0,
    )
    publish_s: float = key(180.0, "the orchestrator waits for a version that the trainer promised", low=1.0)
    stop_s: float = key(120.0, "after Ctrl-C the trainer gets this long to finish its step and save", low=1.0)
    shutdown_s: float = key(20.0, "processes get this long to end before they are killed", low=0.1)


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes beside its JSONL files."""

    tensorboard: bool = key(False, "write TensorBoard event files to runs/<name>/tensorboard")
    wandb: bool = key(False, "log to Weights & Biases; WANDB_MODE=offline needs no account")
    wandb_project: str = key("neox-rl", "Weights & Biases project")


@dataclass(frozen=True)
class DebugConfig:
    """Running one half of the system."""

    mode: str = key(
        "run",
        "run everything; everything but the optimizer steps; train on recorded batches",
        choices=("run", "rollout_only", "train_only"),
    )
    record_batches: str = key("", "write every delivered batch to this directory")
    batches: str = key("", "train_only: directory of recorded batches")


@dataclass(frozen=True)
class MetaRLConfig:
    """The ``metarl:`` block."""

    name: str = key("metarl", "run name: everything goes to <runs_dir>/<name>")
    runs_dir: str = key("runs", "parent directory of runs")
    engine: str = key(
        MEGATRON_ENGINE, "trainer engine: megatron-core, or gpt-neox (the checkout at GPT_NEOX_PATH)", choices=ENGINES, own=True
    )
    patches: tuple[str, ...] = key(
        (), "changes of your own to megatron-core, GPT-NeoX or DeepSpeed (megatron_patches.Patch), made before the engine", own=True
    )
    hf_layout: str = key("", "names in HF checkpoints, of an architecture with Llama's or GPT-NeoX's mathematics; empty: theirs", own=True)
    qkv_bias: bool = key(False, "biases in the projections to query, key and value alone: Qwen2 (norm rmsnorm, engine megatron-core)")
    seed: int = key(1234, "seed of problems, demonstrations and sampling", low=0, high=(1 << 32) - 1)
    restarts: int = key(0, "how often a run that lost a training rank goes on from its last checkpoint by itself (--restarts)", low=0)
    orchestrator_restarts: int = key(
        3, "how often an orchestrator that died is started again; well for five minutes, it is forgiven", low=0
    )
    audit: str = key(
        "warn",
        "the orchestrator checks its journal while it writes it (bound, exactly once, digests, versions): a violation is told, or ends the"
        " run. tools/audit.py checks a run afterwards",
        choices=("off", "warn", "stop"),
    )
    pack_tokens: int = key(2048, "most tokens in one packed micro-batch of one rank", low=16)
    share_prefixes: str = key(
        "auto",
        "beginnings that traces of a group have in common are computed once, gradients stay the same; auto: where the engine can"
        " (megatron-core)",
        choices=("auto", "always", "never"),
    )
    trainer_cores: str = key("auto", "CPU cores of the training ranks: auto, or one a rank as in '1' or '0;1'")
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    scripted: ScriptedConfig = field(default_factory=ScriptedConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    servers: ServersConfig = field(default_factory=ServersConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
