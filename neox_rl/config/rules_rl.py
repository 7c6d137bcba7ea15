"""Rules on problems, sampling, staleness and the objective. Each yields one message a broken value: value, rule, fix."""

from __future__ import annotations

from collections.abc import Iterator

from neox_rl.config.derived import prompt_tokens, staleness_bound, starts_from_checkpoint, warmstart_skipped
from neox_rl.config.machine import Machine
from neox_rl.config.own import is_own
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import IMITATION, NEOX_ENGINE, PLACE, RewardConfig

RECORDED = ("trees", "attempts", "values")
"""Styles of demonstrations that are read from ``warmstart.path``."""
TOLD = ("dfs", "mixed", "trees", "solution")
"""Styles whose demonstrations are searches, or a path of one, and are linearized."""
RATIO_CAPPED = ("tis", "cispo", "decoupled_ppo")


def prompt_and_completion_fit(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A rollout cut by the context length ends without an answer and teaches the policy that its search was wrong."""
    seq, new = config.neox.seq_length, config.metarl.rollout.max_new_tokens
    prompt = prompt_tokens(config)
    need = new + (1 if prompt is None else prompt)
    if seq < need:
        prompt_text = "a prompt" if prompt is None else f"a prompt of {prompt} tokens"
        yield (
            f"seq_length = {seq}: must hold {prompt_text} and metarl.rollout.max_new_tokens = {new}; set seq_length: {need} or"
            f" max_new_tokens: {max(1, seq - need + new)}"
        )


def pack_holds_a_sequence(config: RunConfig, machine: Machine) -> Iterator[str]:
    seq, m = config.neox.seq_length, config.metarl
    if m.pack_tokens < seq:
        yield f"metarl.pack_tokens = {m.pack_tokens}: must hold one sequence of seq_length = {seq}; set pack_tokens: {seq} or more"
    if m.warmstart.steps and m.warmstart.tokens_per_step < seq:
        yield (
            f"metarl.warmstart.tokens_per_step = {m.warmstart.tokens_per_step}: must hold one demonstration of seq_length = {seq}; set it"
            f" to {seq} or more"
        )


def engine_knows_prefix_trees(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The attention of GPT-NeoX takes a sequence a row, and masks it causally."""
    m = config.metarl
    if m.share_prefixes == "always" and m.engine == NEOX_ENGINE:
        yield "metarl.share_prefixes = always: the engine gpt-neox has no attention over prefix trees; set auto, or engine: megatron-core"


def generated_values_fit(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The symbolic vocabulary has a word for each value up to max_value, so every number and target must be among them."""
    p = config.metarl.problems
    largest = {"countdown": max(p.max_number, p.max_target), "game24": 24}.get(p.source, 0)
    if p.max_value < largest:
        name = "the target 24" if p.source == "game24" else f"max_number = {p.max_number} and max_target = {p.max_target}"
        yield f"metarl.problems.max_value = {p.max_value}: must reach {name}; set max_value: {largest} or more"


def game24_has_cards(config: RunConfig, machine: Machine) -> Iterator[str]:
    p = config.metarl.problems
    if p.source == "game24" and p.num_numbers not in (3, 4):
        yield f"metarl.problems.num_numbers = {p.num_numbers}: Game of 24 is played with 4 cards, or 3; set num_numbers: 4"
    if p.source == "game24" and p.max_number > 13:
        yield f"metarl.problems.max_number = {p.max_number}: Game of 24 has cards 1 to 13; set max_number: 13"


def heldout_problems_exist(config: RunConfig, machine: Machine) -> Iterator[str]:
    p = config.metarl.problems
    if p.heldout_frac == 0 and not p.heldout_path and config.metarl.debug.mode == "run":
        yield "metarl.problems.heldout_frac = 0: leaves nothing to evaluate on; set it to 0.25, or give metarl.problems.heldout_path"


def jsonl_is_complete(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Rows of a file are free text and come without a solver."""
    m = config.metarl
    if not m.problems.free_text:
        for key in ("path", "heldout_path"):
            if value := getattr(m.problems, key):
                yield (
                    f"metarl.problems.{key} = {value!r}: is read with source jsonl only, and source is {m.problems.source}; set source:"
                    f" jsonl or remove {key}"
                )
        if m.warmstart.style == "written":
            yield f"metarl.warmstart.style = written: {m.problems.source} problems come without worked solutions; set style: dfs"
        return
    if m.problems.source == "jsonl" and not m.problems.path:
        yield "metarl.problems.path is empty: source jsonl reads its problems from it; set path to a JSONL file of {problem, answer} rows"
    if not m.tokenizer.path:
        yield (
            "metarl.tokenizer.path is empty: the symbolic tokenizer cannot spell free text; set it to the directory of an HF tokenizer,"
            " such as one that python -m neox_rl.problems.make_tokenizer has made"
        )
    if m.warmstart.steps and m.warmstart.style not in ("written", *RECORDED) and not warmstart_skipped(config):
        yield (
            f"metarl.warmstart.style = {m.warmstart.style}: needs a solver for its searches, and source"
            f" {m.problems.source} has none; set style: written (the rows' own"
            " solutions), or steps: 0 and start from metarl.warmstart.hf_checkpoint or load"
        )


def template_has_a_place(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Without one every problem would be the same question; and the games' own words are the only ones that the symbolic tokenizer has."""
    m = config.metarl
    if m.problems.template and PLACE not in m.problems.template:
        yield f"metarl.problems.template = {m.problems.template!r}: has no place for the problem; write {PLACE} where its text goes"
    if m.problems.template and not m.tokenizer.path:
        yield (
            "metarl.tokenizer.path is empty: the symbolic tokenizer cannot spell metarl.problems.template ="
            f" {m.problems.template!r}; set it to the directory of an HF tokenizer, or remove template"
        )


def one_start(config: RunConfig, machine: Machine) -> Iterator[str]:
    checkpoint = config.metarl.warmstart.hf_checkpoint
    if config.neox.load and checkpoint:
        yield f"load = {config.neox.load!r}: and metarl.warmstart.hf_checkpoint = {checkpoint!r} both give initial weights; keep one"


def samples_are_the_policys(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Policy gradients need log-probs of the distribution that was sampled from."""
    r = config.metarl.rollout
    if r.temperature == 0:
        yield "metarl.rollout.temperature = 0: greedy rollouts of a group are all equal, so no advantage is left; set temperature: 1.0"
    if r.top_p != 1:
        yield (
            f"metarl.rollout.top_p = {r.top_p:g}: tokens outside the nucleus have probability 0 under the sampler but not under the"
            " trainer; set top_p: 1.0"
        )


def group_has_a_baseline(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.objective.baseline != "none" and m.rollout.group_size < 2 and m.rollout.method != "search":
        yield (
            f"metarl.rollout.group_size = {m.rollout.group_size}: baseline {m.objective.baseline} compares the rollouts of a group with one"
            " another; set group_size: 8, or objective.baseline: none"
        )


def refusals_are_possible(config: RunConfig, machine: Machine) -> Iterator[str]:
    s, r = config.metarl.staleness, config.metarl.rollout
    if s.dynamic_sampling and s.max_refusals == 0:
        yield (
            "metarl.staleness.max_refusals = 0: accepts every group, so dynamic_sampling does nothing; set max_refusals: 8 or"
            " dynamic_sampling: false"
        )
    if s.dynamic_sampling and r.group_size < 2 and r.method != "search":
        yield (
            "metarl.rollout.group_size = 1: a group of one always has equal rewards, and dynamic_sampling refuses those; set group_size: 8"
        )


def strict_waits_at_a_due_ticket(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A refused ticket starts over, so a run that paid for asynchrony with slack would still wait whole rollouts for due tickets."""
    s = config.metarl.staleness
    if s.mode == "strict" and s.dynamic_sampling and staleness_bound(config) > 0:
        yield (
            "metarl.staleness.dynamic_sampling = true: with mode strict a step waits for up to max_refusals "
            f"= {s.max_refusals} whole rollouts of a due ticket; use mode: token, or admission_slack: 0 and delivery_slack: 0"
        )


def truncation_has_a_ratio(config: RunConfig, machine: Machine) -> Iterator[str]:
    s, loss = config.metarl.staleness, config.metarl.objective.loss
    if s.stale_tokens != "truncate":
        return
    if s.mode == "strict":
        yield (
            "metarl.staleness.stale_tokens = truncate: mode strict leaves no token beyond the bound; set stale_tokens: mask or mode: token"
        )
    if loss not in ("tis", "cispo") and not is_own(loss):
        yield (
            f"metarl.objective.loss = {loss}: has no truncated ratio for tokens beyond the bound; set loss: tis or cispo, or"
            " staleness.stale_tokens: mask"
        )


def publishing_keeps_up(config: RunConfig, machine: Machine) -> Iterator[str]:
    """After step s the live version is at least s - (publish_every - 1); the tickets of step s+1 wait for s - eta. Beyond: a deadlock."""
    every, slack = config.metarl.weights.publish_every, config.metarl.staleness.admission_slack
    if every > slack + 1:
        yield (
            f"metarl.weights.publish_every = {every}: tickets of a step would wait for a version that is not published before that step; "
            f"must be <= staleness.admission_slack + 1 = {slack + 1}; set publish_every: {slack + 1} or admission_slack: {every - 1}"
        )


def clips_are_sensible(config: RunConfig, machine: Machine) -> Iterator[str]:
    o = config.metarl.objective
    if o.clip_low >= 1 and o.loss in ("ppo", "decoupled_ppo", "gspo"):
        yield f"metarl.objective.clip_low = {o.clip_low:g}: the lower clip 1 - clip_low must stay above 0; set clip_low: 0.2"
    if o.ratio_cap < 1 and o.loss in RATIO_CAPPED:
        yield (
            f"metarl.objective.ratio_cap = {o.ratio_cap:g}: below 1 it truncates on-policy tokens too, whose ratio is 1; set ratio_cap: 2.0"
        )


def stale_samples_are_corrected(config: RunConfig, machine: Machine) -> Iterator[str]:
    if config.metarl.objective.loss == "reinforce" and (bound := staleness_bound(config)) > 0:
        yield (
            f"metarl.objective.loss = reinforce: has no importance ratio, and tokens may be {bound} steps old, so its gradient is biased;"
            " use loss: tis"
        )


def policy_has_a_start(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if not m.warmstart.steps and not warmstart_skipped(config) and m.debug.mode == "run" and m.rollout.generator == "vllm":
        yield (
            "metarl.warmstart.steps = 0: RL starts from random weights, which never find an answer to learn from; "
            "set steps, or start from metarl.warmstart.hf_checkpoint or load"
        )


def demonstrations_have_a_source(config: RunConfig, machine: Machine) -> Iterator[str]:
    w = config.metarl.warmstart
    recorded = w.style in RECORDED
    if recorded and w.steps and not w.path:
        source = "a directory that debug.record_batches filled" if w.style == "attempts" else "trees of python -m neox_rl.search --trees"
        yield f"metarl.warmstart.path is empty: style {w.style} shows what was recorded; set path to {source}"
    if w.path and not recorded:
        yield f"metarl.warmstart.path = {w.path!r}: is read with style {', '.join(RECORDED)} only, and style is {w.style}; remove it"
    if w.sees_earlier and w.style != "values":
        yield f"metarl.warmstart.sees_earlier = true: is of a reward model, and style is {w.style}; set style: values, or remove it"
    for path in w.path.split(",") if w.path else ():
        if not machine.exists(path):
            yield f"metarl.warmstart.path names {path!r}, which does not exist; relative paths are from the working directory"
    if w.from_checkpoint and not starts_from_checkpoint(config):
        yield (
            "metarl.warmstart.from_checkpoint = true: there is no checkpoint to train further; set metarl.warmstart.hf_checkpoint or load,"
            " or remove it"
        )


def demonstrations_are_trained_on(config: RunConfig, machine: Machine) -> Iterator[str]:
    w = config.metarl.warmstart
    alone = w.style in ("solution", "written") or w.telling == "solution"
    if w.mask == "search" and alone:
        yield (
            f"metarl.warmstart.mask = search: style {w.style} told as {w.telling} shows solutions alone, and their tokens would all be left"
            " out; set mask: all"
        )
    if w.style not in TOLD and (w.telling, w.mask, w.prune) != ("stream", "all", 0.0):
        yield (
            f"metarl.warmstart.telling = {w.telling}, mask = {w.mask}, prune = {w.prune:g}: only searches are told"
            f" ({', '.join(TOLD)}), and style is {w.style}; remove them"
        )


def searches_alone_have_a_start(config: RunConfig, machine: Machine) -> Iterator[str]:
    w = config.metarl.warmstart
    if w.mask == "search" and w.style in TOLD and w.steps and not starts_from_checkpoint(config):
        yield (
            "metarl.warmstart.mask = search: trains no solution, nor EOS behind it, so a policy from random weights never answers; set"
            " mask: all, or start from one that answers already: metarl.warmstart.hf_checkpoint or load, with from_checkpoint: true"
        )


def solutions_are_scored(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A likelihood is that of the policy itself, of a solution that somebody gives, after a search that is a rollout of its own."""
    m, r = config.metarl, config.metarl.reward
    if r.kind == "verdict":
        return
    name = f"metarl.reward.kind = {r.kind}"
    if m.problems.source == "goal_finding":
        yield f"{name}: goal_finding has no worked solutions; set source: countdown, game24 or jsonl, or kind: verdict"
    if m.rollout.method != "sample":
        yield f"{name}: is of one sampled search, and rollout.method is {m.rollout.method}; set method: sample, or kind: verdict"
    if m.rollout.temperature != 1:
        yield (
            f"metarl.rollout.temperature = {m.rollout.temperature:g}: {name} scores a solution by the policy as it is trained, at"
            " temperature 1; set temperature: 1.0"
        )
    if r.wrong_step_cost or r.token_cost:
        costs = f"metarl.reward.wrong_step_cost = {r.wrong_step_cost:g}, token_cost = {r.token_cost:g}"
        yield f"{costs}: are taken off a verdict's reward, and kind is {r.kind}; set them to 0"
    if (r.correct, r.wrong) != (RewardConfig.correct, RewardConfig.wrong):
        worth = f"metarl.reward.correct = {r.correct:g}, wrong = {r.wrong:g}"
        yield f"{worth}: are a verdict's reward, and kind is {r.kind}; remove them, or set kind: verdict"
    if m.objective.baseline == "grpo" and r.solution_weight:
        yield (
            f"metarl.objective.baseline = grpo: divides the search's advantage by the group's standard deviation, and with {name} the"
            " solution's stays 1, so the two terms of the gradient are out of proportion; set baseline: mean, or"
            " metarl.reward.solution_weight: 0"
        )
    if m.objective.loss in ("gspo", IMITATION):
        yield (
            f"metarl.objective.loss = {m.objective.loss}: has one advantage a sequence or none, and with {name} the search and the solution"
            " have each their own; set loss: tis"
        )


def gains_bring_their_baseline(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.reward.kind == "gain" and m.objective.baseline != "none":
        yield (
            f"metarl.objective.baseline = {m.objective.baseline}: log pi(S | q) is the same for all of a group, so reward.kind: gain trains"
            " what kind: solution trains, which asks once less a group; set baseline: none, or reward.kind: solution"
        )


def reward_model_is_trained_alone(config: RunConfig, machine: Machine) -> Iterator[str]:
    w, n = config.metarl.warmstart, config.neox
    if w.style != "values":
        return
    if n.train_iters:
        yield f"train_iters = {n.train_iters}: metarl.warmstart.style values makes a reward model, which no RL improves; set it to 0"
    if not w.steps or warmstart_skipped(config):
        yield (
            "metarl.warmstart.style = values: the warm start is all of its training; set metarl.warmstart.steps, and with a checkpoint"
            " from_checkpoint: true"
        )


RL_RULES = (
    prompt_and_completion_fit,
    pack_holds_a_sequence,
    engine_knows_prefix_trees,
    generated_values_fit,
    game24_has_cards,
    heldout_problems_exist,
    jsonl_is_complete,
    template_has_a_place,
    demonstrations_have_a_source,
    demonstrations_are_trained_on,
    reward_model_is_trained_alone,
    solutions_are_scored,
    one_start,
    samples_are_the_policys,
    group_has_a_baseline,
    refusals_are_possible,
    strict_waits_at_a_due_ticket,
    truncation_has_a_ratio,
    publishing_keeps_up,
    clips_are_sensible,
)
RL_WARNINGS = (stale_samples_are_corrected, policy_has_a_start, searches_alone_have_a_start, gains_bring_their_baseline)
