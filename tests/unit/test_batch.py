"""Groups of rollouts to packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.batch.advantages import BASELINES, group_advantages
from neox_rl.batch.pack import pack_rl, pack_sft
from neox_rl.batch.packing import Layout, plan
from neox_rl.batch.record import read_batch, record_batch, recorded_steps
from neox_rl.batch.types import PADDING, MicroBatch, StepBatch
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.errors import ConfigError, StalenessError, WireError
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Role, Segment, Trace, Verdict

VERDICT = Verdict(True, "26", Reason.MATCH, 0.1)


def trace(versions: Sequence[int], reward: float = 1.0, prompt: int = 2, index: int = 0) -> Trace:
    """A prompt of ``prompt`` tokens, then one token of each version; token ids count up from 10."""
    segments = [Segment(tuple(range(10, 10 + prompt)), Role.PROMPT)]
    segments += [Segment((10 + prompt + i,), Role.THINK, (-0.25 * (i + 1),), v, 1.0) for i, v in enumerate(versions)]
    return Trace(f"g000000/r{index}", "p", tuple(segments), reward, Finish.STOP, VERDICT)


def group(*traces: Trace, ticket: int = 0) -> Group:
    return Group(ticket, "p", traces)


def pack(
    groups: Sequence[Group],
    step: int = 5,
    mode: str = "token",
    stale_tokens: str = "mask",
    aggregation: str = "token_mean",
    layout: Layout | None = None,
) -> StepBatch:
    return pack_rl(
        groups,
        step,
        staleness=StalenessConfig(mode=mode, admission_slack=1, delivery_slack=1, stale_tokens=stale_tokens),
        objective=ObjectiveConfig(baseline="mean", aggregation=aggregation),
        max_new_tokens=10,
        layout=layout or Layout(pack_tokens=64),
    )


def every(batch: StepBatch) -> list[MicroBatch]:
    return [micro for rank in batch.microbatches for micro in rank]


# Advantages


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [1, 0, 0, 1]),
        ("mean", [0.5, -0.5, -0.5, 0.5]),
        ("rloo", [1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3, 1 - 1 / 3]),
        ("grpo", [1, -1, -1, 1]),
    ],
)
def test_advantages_of_two_right_and_two_wrong(baseline: str, expected: list[float]) -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], baseline) == pytest.approx(expected)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0]), min_size=2, max_size=8), st.sampled_from(["mean", "rloo", "grpo"]))
def test_group_baselines_center_and_keep_the_order(rewards: list[float], baseline: str) -> None:
    advantages = group_advantages(rewards, baseline)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    assert all(a <= b for (r, a) in zip(rewards, advantages, strict=True) for (q, b) in zip(rewards, advantages, strict=True) if r < q)


@pytest.mark.parametrize("baseline", ["mean", "rloo", "grpo"])
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0]])
def test_a_group_without_variance_teaches_exactly_nothing(baseline: str, rewards: list[float]) -> None:
    assert group_advantages(rewards, baseline) == (0.0,) * len(rewards)


def test_every_configured_baseline_exists() -> None:
    assert set(BASELINES) == set(ObjectiveConfig.__dataclass_fields__["baseline"].metadata["choices"])


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([1.0, math.nan], "grpo")


# Packing


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_the_plan_places_every_sequence_once_in_equal_bounded_bins(lengths: list[int], dp: int, tp: int, least: int) -> None:
    layout = Layout(pack_tokens=48, data_parallel=dp, tensor_parallel=tp, min_microbatches=least)
    made = plan(lengths, layout)
    assert sorted(i for rank in made.bins for members in rank for i in members) == list(range(len(lengths)))
    assert len(made.bins) == dp and len({len(rank) for rank in made.bins}) == 1 and len(made.bins[0]) >= least
    loads = [sum(lengths[i] for i in members) for rank in made.bins for members in rank]
    assert max(loads) <= 48 and made.length % math.lcm(8, tp) == 0 and max(loads) <= made.length < max(loads) + math.lcm(8, tp)


def test_ranks_get_level_loads() -> None:
    lengths = list(np.random.default_rng(0).integers(30, 130, size=128))
    made = plan(lengths, Layout(pack_tokens=2048, data_parallel=2))
    assert sum(lengths) / (made.length * sum(len(rank) for rank in made.bins)) > 0.97


def test_bins_that_only_fit_tightly_are_not_leveled_over_the_limit() -> None:
    made = plan([24, 24, 16, 16, 16], Layout(pack_tokens=48))
    assert set(made.bins[0]) == {(0, 1), (2, 3, 4)} and made.length == 48


def test_long_and_short_bins_are_dealt_out_over_the_ranks() -> None:
    made = plan([40, 30, 20, 10], Layout(pack_tokens=40, data_parallel=2, min_microbatches=2))
    assert made.bins == (((0,), (2,)), ((1,), (3,)))


def test_too_long_a_sequence_names_the_key_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"65 tokens .* pack_tokens = 64; raise metarl.pack_tokens"):
        plan([65], Layout(pack_tokens=64))


def test_a_packed_microbatch_looks_like_its_documentation() -> None:
    (micro,) = every(pack([group(trace([4], prompt=2), trace([4], prompt=1))], layout=Layout(64)))
    assert micro.tokens.tolist() == [10, 11, 12, 10, 11, 0, 0, 0]
    assert micro.targets.tolist() == [11, 12, 0, 11, 0, 0, 0, 0]
    assert micro.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert micro.cu_seqlens.tolist() == [0, 3, 5, 8] and micro.max_seqlen == 3
    assert micro.sequence_index.tolist() == [0, 0, 0, 1, 1, PADDING, PADDING, PADDING]
    assert micro.versions.tolist() == [-1, 4, -1, 4, -1, -1, -1, -1]
    assert micro.behavior_logprobs.tolist() == [0, -0.25, 0, -0.25, 0, 0, 0, 0]
    assert micro.loss_weight.tolist() == [0, 0.5, 0, 0.5, 0, 0, 0, 0]
    assert {a.dtype.name for a in (micro.tokens, micro.targets, micro.positions, micro.versions, micro.sequence_index)} == {"int64"}
    floats = (micro.loss_weight, micro.advantages, micro.behavior_logprobs, micro.proximal_logprobs, micro.reference_logprobs)
    assert {a.dtype.name for a in floats} == {"float32"} and micro.cu_seqlens.dtype.name == "int32"


def test_padding_is_never_longer_than_the_longest_sequence() -> None:
    batch = pack([group(trace([4] * 8, prompt=2), trace([4], prompt=1))], layout=Layout(64, data_parallel=2))
    for micro in every(batch):
        assert int(np.diff(micro.cu_seqlens).max()) == micro.max_seqlen <= 10
        assert micro.cu_seqlens[-1] == len(micro) == 16


def test_more_ranks_than_sequences_leaves_empty_but_equal_microbatches() -> None:
    batch = pack([group(trace([4]))], layout=Layout(64, data_parallel=3, min_microbatches=2))
    assert [[len(m) for m in rank] for rank in batch.microbatches] == [[8, 8]] * 3
    assert sum(float(m.loss_weight.sum()) for m in every(batch)) == pytest.approx(1.0)


def test_logprobs_of_other_policies_replace_the_copies() -> None:
    (micro,) = every(pack([group(trace([4]))]))
    assert np.array_equal(micro.proximal_logprobs, micro.behavior_logprobs)
    new = micro.with_logprobs(reference=np.full(len(micro), -3.0, dtype=np.float32))
    assert new.reference_logprobs[0] == -3.0 and np.array_equal(new.proximal_logprobs, micro.behavior_logprobs)
    with pytest.raises(ValueError, match="shape"):
        micro.with_logprobs(proximal=np.zeros(3, dtype=np.float32))


# Loss weights


@pytest.mark.parametrize("layout", [Layout(64), Layout(16, data_parallel=2, min_microbatches=2)])
def test_the_denominator_is_the_whole_batch_whatever_the_split(layout: Layout) -> None:
    long, short = trace([4] * 6, index=0), trace([4] * 2, index=1)
    for aggregation, (of_long, of_short) in {
        "token_mean": (1 / 8, 1 / 8),
        "sequence_mean": (1 / (2 * 6), 1 / (2 * 2)),
        "constant": (1 / (2 * 10), 1 / (2 * 10)),
    }.items():
        for micro in every(pack([group(long, short)], aggregation=aggregation, layout=layout)):
            for index, expected in ((0, of_long), (1, of_short)):
                weights = micro.loss_weight[(micro.sequence_index == index) & (micro.versions != NO_VERSION)]
                assert weights == pytest.approx(np.full(len(weights), expected))


def test_reward_becomes_the_advantage_of_every_token_of_its_rollout() -> None:
    (micro,) = every(pack([group(trace([4], reward=1.0), trace([4, 4], reward=0.0))]))
    assert set(micro.advantages[micro.sequence_index == 0]) == {0.5}
    assert set(micro.advantages[micro.sequence_index == 1]) == {-0.5}
    assert set(micro.advantages[micro.sequence_index == PADDING]) == {0.0}


def test_a_step_with_credit_of_its_own_keeps_it_and_the_rest_of_the_rollout_has_the_rewards() -> None:
    right, wrong = trace([4, 4, 4], reward=1.0), trace([4], reward=0.0)
    prompt, first, second, third = right.segments
    credited = replace(right, segments=(prompt, replace(first, advantage=-0.75), replace(second, advantage=0.0), third))
    (micro,) = every(pack([group(credited, wrong)]))
    (plain,) = every(pack([group(right, wrong)]))
    assert micro.advantages[micro.sequence_index == 0].tolist() == [0.5, -0.75, 0.0, 0.5, 0.5], "entry t speaks of token t + 1"
    assert np.array_equal(micro.loss_weight, plain.loss_weight) and np.array_equal(micro.tokens, plain.tokens)
    assert set(micro.advantages[micro.sequence_index == 1]) == {-0.5}


# Staleness: step 5 trains version 4, S = 2


def test_tokens_beyond_the_bound_lose_their_gradient_and_nothing_else_changes() -> None:
    young = pack([group(trace([4, 4, 4]), trace([4, 4], 0.0))])
    mixed = pack([group(trace([1, 2, 4]), trace([4, 4], 0.0))])
    assert mixed.stats.staleness == {0: 3, 2: 1, 3: 1}
    assert mixed.stats.trained_staleness == {0: 3, 2: 1}
    assert (mixed.stats.loss_tokens, mixed.stats.masked_tokens, mixed.stats.trained_tokens) == (5, 1, 4)
    (a,), (b,) = every(young), every(mixed)
    assert np.array_equal(a.advantages, b.advantages)
    masked = np.flatnonzero(a.loss_weight != b.loss_weight)
    assert b.versions[masked].tolist() == [1] and b.loss_weight[masked].tolist() == [0.0]


def test_truncate_keeps_stale_tokens_and_counts_them() -> None:
    batch = pack([group(trace([1, 4]))], stale_tokens="truncate")
    assert (batch.stats.stale_tokens, batch.stats.masked_tokens, batch.stats.trained_tokens) == (1, 0, 2)
    assert np.count_nonzero(every(batch)[0].loss_weight) == 2 and batch.stats.trained_staleness == {0: 1, 3: 1}


def test_strict_trains_up_to_the_bound_and_stops_beyond_it() -> None:
    assert pack([group(trace([2, 4]))], mode="strict").stats.trained_staleness == {0: 1, 2: 1}
    with pytest.raises(StalenessError, match=r"g000000/r0 .* 3 versions old at step 5, the bound is 2"):
        pack([group(trace([1, 4]))], mode="strict")


@pytest.mark.parametrize("mode", ["token", "strict"])
def test_an_old_token_that_reaches_the_packed_batch_stops_the_run(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The check reads the micro-batches, so that an error anywhere in masking is seen."""
    monkeypatch.setattr("neox_rl.batch.pack.beyond", lambda ages, bound: np.zeros_like(ages, dtype=bool))
    monkeypatch.setattr("neox_rl.batch.pack.token_ages", lambda trace, step: np.zeros(trace.num_tokens, dtype=np.int64))
    with pytest.raises(StalenessError, match=r"step 5 would train 1 of 2 tokens beyond the staleness bound S = 2 \(oldest: 3 steps\)"):
        pack([group(trace([1, 4]))], mode=mode)
    assert pack([group(trace([1, 4]))], stale_tokens="truncate").stats.trained_staleness == {0: 1, 3: 1}


@pytest.mark.parametrize("mode", ["token", "strict"])
def test_a_token_from_the_future_stops_the_run(mode: str) -> None:
    with pytest.raises(StalenessError, match="version 5, but version 4 is being trained"):
        pack([group(trace([4, 5]))], mode=mode)


def test_a_ticket_that_comes_twice_stops_the_run() -> None:
    with pytest.raises(StalenessError, match="twice"):
        pack([group(trace([4]), ticket=7), group(trace([4]), ticket=7)])


def test_a_loss_on_tokens_that_no_policy_sampled_is_refused() -> None:
    feedback = Segment((9,), Role.ENV, mask=1.0)
    with pytest.raises(ValueError, match="no policy sampled"):
        pack([group(Trace("g000000/r0", "p", (Segment((1,), Role.PROMPT), feedback), 1.0, Finish.STOP, VERDICT))])


# Demonstrations


def test_demonstrations_weigh_by_their_masks() -> None:
    segments = (Segment((1, 2), Role.PROMPT), Segment((3,), Role.THINK, mask=0.5), Segment((4,), Role.SOLUTION, mask=1.0))
    batch = pack_sft([group(Trace("g000000/r0", "p", segments, 1.0, Finish.STOP, VERDICT))], 1, layout=Layout(64))
    (micro,) = every(batch)
    assert micro.loss_weight[:4] == pytest.approx([0, 1 / 3, 2 / 3, 0]) and micro.advantages[1] == 1.0
    assert batch.stats.staleness == {} and batch.stats.loss_tokens == 2


def test_stats_of_a_batch() -> None:
    stats = pack([group(trace([4]), trace([4, 4, 4], 0.0), ticket=0), group(trace([4]), trace([4]), ticket=1)]).stats
    assert (stats.num_groups, stats.num_sequences, stats.num_tokens, stats.loss_tokens) == (2, 4, 14, 6)
    assert (stats.reward_mean, stats.zero_variance_groups, stats.length_mean, stats.length_max) == (0.75, 1, 1.5, 3)
    assert stats.packing_efficiency == pytest.approx(14 / 16)


def test_groups_that_teach_nothing_are_counted_by_their_credit_where_they_have_some() -> None:
    def credited(*advantages: float) -> Trace:
        """Equal rewards, as of a search whose ends are not what is trained."""
        whole = trace([4] * len(advantages), 0.0)
        prompt, step = whole.segments[0], whole.segments[-1]
        steps = (replace(step, ids=step.ids[:1], logprobs=step.logprobs[:1], advantage=a) for a in advantages)
        return replace(whole, segments=(prompt, *steps))

    taught, flat = group(credited(0.5), credited(-0.5), ticket=0), group(credited(0.0), credited(0.0), ticket=1)
    assert pack([taught, flat]).stats.zero_variance_groups == 1
    assert pack([group(credited(0.0), replace(credited(0.0), reward=1.0))]).stats.zero_variance_groups == 1


# Recording


def test_a_recorded_batch_is_read_back_exactly(tmp_path: Path) -> None:
    groups = (group(trace([3, 4]), trace([4], 0.0)),)
    record_batch(tmp_path / "batches", "rl", 12, groups, {"live": 4})
    record_batch(tmp_path / "batches", "rl", 3, groups)
    record_batch(tmp_path / "batches", "sft", 1, groups)
    assert read_batch(tmp_path / "batches", "rl", 12) == (groups, {"live": 4})
    assert recorded_steps(tmp_path / "batches", "rl") == [3, 12]


def test_a_missing_batch_says_which_there_are(tmp_path: Path) -> None:
    record_batch(tmp_path, "rl", 3, [group(trace([4]))])
    with pytest.raises(ConfigError, match=r"rl-000004.batch; .* steps \[3\]"):
        read_batch(tmp_path, "rl", 4)


def test_a_recorded_batch_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = record_batch(tmp_path, "rl", 1, [group(trace([4]))])
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(WireError):
            read_batch(tmp_path, "rl", 1)
    path.write_bytes(whole + b"\0")
    with pytest.raises(WireError):
        read_batch(tmp_path, "rl", 1)
