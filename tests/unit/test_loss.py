"""Every objective against a slow loop over tokens, its gradient by finite differences, and metrics with their expected values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from neox_rl.batch.pack import pack_rl, pack_sft
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import MicroBatch
from neox_rl.config.derived import keeps_reference
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.loss import kl
from neox_rl.loss.metrics import finalize, is_max
from neox_rl.loss.objectives import OBJECTIVES
from neox_rl.loss.policy import LossFn, make_loss_fn, make_sft_loss_fn, needs_proximal
from neox_rl.loss.vocab_parallel import token_logprobs_and_entropy
from neox_rl.types import Finish, Group, Reason, Role, Segment, Trace, Verdict

CHOICES = ObjectiveConfig.__dataclass_fields__["loss"].metadata["choices"]
PER_TOKEN = [name for name in CHOICES if name != "dpo"]
"""The loss of pairs has tests of its own: ``test_preferences``."""
VERSION = 4
VOCAB = 11
Floats = NDArray[np.float64]


def groups(spread: float = 0.4) -> list[Group]:
    """3 groups of 3 rollouts, behavior log-probs around those of a uniform policy, versions 1 to 4, some env tokens."""
    rng = np.random.default_rng(0)

    def trace(group: int, index: int) -> Trace:
        def run(role: Role, count: int, version: int) -> Segment:
            ids = tuple(int(i) for i in rng.integers(0, VOCAB, count))
            if role is not Role.THINK:
                return Segment(ids, role)
            return Segment(ids, role, tuple(float(x) for x in rng.normal(-math.log(VOCAB), spread, count)), version, 1.0)

        lengths = rng.integers(1, 6, 3)
        segments = (
            run(Role.PROMPT, 3, 0),
            run(Role.THINK, lengths[0], 1 + index),
            run(Role.ENV, 2, 0),
            run(Role.THINK, lengths[1] + lengths[2], VERSION),
        )
        reward = float(rng.integers(0, 2)) if index else 1.0 - group % 2
        return Trace(f"g{group:06d}/r{index}", "p", segments, reward, Finish.STOP, Verdict(reward > 0, "", Reason.MATCH, 0.1))

    return [Group(g, "p", tuple(trace(g, i) for i in range(3))) for g in range(3)]


def microbatches(cfg: ObjectiveConfig, layout: Layout, spread: float = 0.4) -> list[MicroBatch]:
    staleness = StalenessConfig(admission_slack=1, delivery_slack=1)
    batch = pack_rl(groups(spread), VERSION + 1, staleness=staleness, objective=cfg, max_new_tokens=16, layout=layout)
    made = [micro for rank in batch.microbatches for micro in rank]
    rng = np.random.default_rng(1)
    shift = {i: rng.normal(0, 0.3, (2, 32)) for i in range(-1, 9)}

    def moved(micro: MicroBatch, row: int) -> NDArray[np.float32]:
        deltas = [shift[int(i)][row, int(p)] for i, p in zip(micro.sequence_index, micro.positions, strict=True)]
        return micro.behavior_logprobs + np.array(deltas, dtype=np.float32)

    return [m.with_logprobs(proximal=moved(m, 0), reference=moved(m, 1)) for m in made]


# The slow reference: one token at a time, plain Python. ``x`` is differentiated, ``x0`` is what stop_gradient holds fixed.


def surrogate(r: float, a: float, cfg: ObjectiveConfig) -> float:
    return -min(r * a, min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high) * a)


def slow_loss(cfg: ObjectiveConfig, m: MicroBatch, x: Floats, x0: Floats) -> float:
    total = 0.0
    for t in range(len(m)):
        a, behavior, proximal = float(m.advantages[t]), float(m.behavior_logprobs[t]), float(m.proximal_logprobs[t])
        match cfg.loss:
            case "reinforce":
                value = -a * x[t]
            case "ppo":
                value = surrogate(math.exp(x[t] - behavior), a, cfg)
            case "decoupled_ppo":
                value = min(math.exp(proximal - behavior), cfg.ratio_cap) * surrogate(math.exp(x[t] - proximal), a, cfg)
            case "sft":
                value = -x[t]
            case "tis":
                value = -min(math.exp(x0[t] - behavior), cfg.ratio_cap) * a * x[t]
            case "cispo":
                value = -max(1 - cfg.clip_low, min(math.exp(x0[t] - behavior), cfg.ratio_cap)) * a * x[t]
            case "gspo":
                mates = [u for u in range(len(m)) if m.sequence_index[u] == m.sequence_index[t] and m.loss_weight[u] > 0]
                mean = sum(x[u] - float(m.behavior_logprobs[u]) for u in mates) / len(mates) if mates else 0.0
                value = surrogate(math.exp(mean), a, cfg)
            case _:
                raise AssertionError(f"no slow reference of {cfg.loss}")
        total += float(m.loss_weight[t]) * value
    return total


def current_logprobs(m: MicroBatch) -> Floats:
    """Far enough from the behavior policy that clips and caps are active on some tokens and idle on others."""
    noise = np.random.default_rng(2).normal(0, 0.5, len(m))
    return m.behavior_logprobs.astype(np.float64) + noise


def run(loss_fn: LossFn, m: MicroBatch, x: Floats) -> tuple[float, Floats, dict[str, float]]:
    logprobs = torch.tensor(x, requires_grad=True)
    loss, sums = loss_fn(logprobs, torch.ones(len(m), dtype=torch.float64), m)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.numpy(), {name: value.item() for name, value in sums.items()}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_objective_equals_the_loop_over_tokens_and_its_finite_differences(name: str) -> None:
    cfg = ObjectiveConfig(loss=name, ratio_cap=1.4, aggregation="sequence_mean")
    (m,) = microbatches(cfg, Layout(256))
    x0 = current_logprobs(m)
    loss, gradient, _ = run(make_loss_fn(cfg, VERSION), m, x0)
    assert loss == pytest.approx(slow_loss(cfg, m, x0, x0), rel=1e-10)
    step = 1e-6 * np.eye(len(m))
    slow = [(slow_loss(cfg, m, x0 + h, x0) - slow_loss(cfg, m, x0 - h, x0)) / 2e-6 for h in step]
    np.testing.assert_allclose(gradient, slow, atol=1e-8)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("name", [n for n in PER_TOKEN if n not in ("reinforce", "sft")])
def test_clips_and_caps_are_active_in_this_data_and_are_counted(name: str) -> None:
    cfg = ObjectiveConfig(loss=name, ratio_cap=1.4, clip_low=0.05, clip_high=0.08)
    (m,) = microbatches(cfg, Layout(256))
    report = finalize(run(make_loss_fn(cfg, VERSION), m, current_logprobs(m))[2])
    counted = [report[metric] for metric in ("clip_frac", "truncated_frac") if metric in report]
    assert counted and all(0.0 < value < 1.0 for value in counted)


def test_every_configured_objective_exists() -> None:
    assert set(OBJECTIVES) == set(CHOICES)
    assert {name for name in CHOICES if needs_proximal(ObjectiveConfig(loss=name))} == {"decoupled_ppo"}
    assert [keeps_reference(ObjectiveConfig(**c)) for c in ({"kl_coef": 0.1}, {"loss": "dpo"}, {})] == [True, True, False]


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_token_without_weight_has_no_part_whatever_its_logprobs(name: str) -> None:
    cfg = ObjectiveConfig(loss=name, kl_coef=0.1)
    (m,) = microbatches(cfg, Layout(256))
    x = current_logprobs(m)
    wild = np.where(m.loss_weight > 0, x, x - 1e4)
    behavior = np.where(m.loss_weight > 0, m.behavior_logprobs, np.float32(-9999))
    other = replace(m, behavior_logprobs=behavior, proximal_logprobs=np.where(m.loss_weight > 0, m.proximal_logprobs, np.float32(-1e5)))
    loss, gradient, sums = run(make_loss_fn(cfg, VERSION), m, x)
    assert run(make_loss_fn(cfg, VERSION), other, wild)[0] == pytest.approx(loss)
    np.testing.assert_allclose(run(make_loss_fn(cfg, VERSION), other, wild)[1], gradient, atol=1e-12)
    assert run(make_loss_fn(cfg, VERSION), other, wild)[2] == pytest.approx(sums)


# Splits


def bigram(microbatch: MicroBatch, table: Tensor) -> tuple[Tensor, Tensor]:
    logits = table[torch.from_numpy(microbatch.tokens)]
    return token_logprobs_and_entropy(logits, torch.from_numpy(microbatch.targets), valid_vocab=VOCAB, chunk=16)


def gradient_of(made: list[MicroBatch], loss_fn: LossFn) -> tuple[Tensor, dict[str, float]]:
    table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul_(0.3).requires_grad_()
    gradient, parts = torch.zeros_like(table), []
    for microbatch in made:
        loss, sums = loss_fn(*bigram(microbatch, table), microbatch)
        gradient += torch.autograd.grad(loss, table)[0]
        parts.append({name: value.item() for name, value in sums.items()})
    totals = {name: (max if is_max(name) else sum)(part[name] for part in parts) for name in parts[0]}
    return gradient, finalize(totals)


SPLITS = [Layout(24), Layout(48, data_parallel=2), Layout(256, data_parallel=3, min_microbatches=4), Layout(64, tensor_parallel=3)]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_every_split_into_microbatches_gives_the_same_gradient_and_metrics(name: str, aggregation: str) -> None:
    cfg = ObjectiveConfig(loss=name, aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01)
    whole, report = gradient_of(microbatches(cfg, Layout(256)), make_loss_fn(cfg, VERSION))
    for layout in SPLITS:
        split, other = gradient_of(microbatches(cfg, layout), make_loss_fn(cfg, VERSION))
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)
        assert other == pytest.approx(report)


def test_sft_is_the_weighted_nll_in_every_split() -> None:
    def made(layout: Layout) -> list[MicroBatch]:
        return [m for rank in pack_sft(groups(), 1, layout=layout).microbatches for m in rank]

    whole, report = gradient_of(made(Layout(256)), make_sft_loss_fn())
    (m,) = made(Layout(256))
    table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul_(0.3)
    nll = -bigram(m, table)[0].numpy()
    assert report["loss"] == pytest.approx(float((m.loss_weight * nll).sum()))
    assert report["loss"] == pytest.approx(float(nll[m.loss_weight > 0].mean()))
    for layout in SPLITS:
        torch.testing.assert_close(gradient_of(made(layout), make_sft_loss_fn())[0], whole, rtol=1e-9, atol=1e-12)


# KL estimators: exact expectations over a small policy


def exact_expectations(estimator: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor, list[Tensor]]:
    """(bias of the expected value, expected gradient, [grad KL(p||q), grad KL(q||p)]) under the policy p, by enumeration."""
    logits = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.tensor([0.1, 0.5, -0.4, 0.2], dtype=torch.float64), 0)
    p = torch.log_softmax(logits, 0)
    estimate = (p.exp().detach() * estimator(p, q)).sum()
    divergences = [(p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()]
    gradient, *exact = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (estimate, *divergences))
    return (estimate - divergences[0]).item(), gradient, exact


@pytest.mark.parametrize(("name", "unbiased", "direction"), [("k1", True, 0), ("k2", False, 0), ("k3", True, 1)])
def test_kl_estimators_have_the_value_and_the_gradient_of_their_table(name: str, unbiased: bool, direction: int) -> None:
    bias, gradient, directions = exact_expectations(kl.ESTIMATORS[name])
    assert (abs(bias) < 1e-12) == unbiased
    torch.testing.assert_close(gradient, directions[direction], rtol=0, atol=1e-12)
    assert (gradient - directions[1 - direction]).abs().max() > 1e-3


def test_k3_is_exact_for_the_smallest_gaps_in_fp32() -> None:
    current = torch.tensor([1e-4], dtype=torch.float32)
    assert kl.k3(current, torch.zeros(1)).item() == pytest.approx(0.5e-8, rel=1e-2)


@pytest.mark.parametrize("estimator", sorted(kl.ESTIMATORS))
def test_kl_and_entropy_enter_with_their_coefficients(estimator: str) -> None:
    plain = ObjectiveConfig(loss="reinforce")
    cfg = replace(plain, kl_coef=0.1, kl_estimator=estimator, entropy_coef=0.01)
    (m,) = microbatches(cfg, Layout(256))
    x = current_logprobs(m)
    d = x - m.reference_logprobs
    value = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
    loss, _, sums = run(make_loss_fn(cfg, VERSION), m, x)
    expected = run(make_loss_fn(plain, VERSION), m, x)[0] + float((m.loss_weight * (0.1 * value - 0.01)).sum())
    assert loss == pytest.approx(expected)
    assert finalize(sums)["reference_kl"] == pytest.approx(value[m.loss_weight > 0].mean())


# Metrics


def test_metrics_of_an_engine_that_agrees_with_the_trainer() -> None:
    cfg = ObjectiveConfig()
    (m,) = microbatches(cfg, Layout(256))
    report = finalize(run(make_loss_fn(cfg, VERSION), m, m.behavior_logprobs.astype(np.float64))[2])
    assert report["mismatch_kl"] == report["mismatch_logp"] == report["mismatch_logp_max"] == report["behavior_kl"] == 0.0
    assert report["ratio"] == report["entropy"] == 1.0 and report["ess"] == pytest.approx(1.0)
    assert report["tokens"] == np.count_nonzero(m.loss_weight) > report["fresh_tokens"] > 0


@pytest.mark.parametrize("name", PER_TOKEN)
def test_clips_and_caps_are_idle_where_all_policies_agree(name: str) -> None:
    (m,) = microbatches(ObjectiveConfig(), Layout(256))
    m = m.with_logprobs(proximal=m.behavior_logprobs)
    report = finalize(run(make_loss_fn(ObjectiveConfig(loss=name), VERSION), m, m.behavior_logprobs.astype(np.float64))[2])
    assert report.get("clip_frac", 0.0) == report.get("truncated_frac", 0.0) == 0.0


def test_staleness_is_not_numerics() -> None:
    cfg = ObjectiveConfig()
    (m,) = microbatches(cfg, Layout(256))
    exact = m.behavior_logprobs.astype(np.float64)
    stale = finalize(run(make_loss_fn(cfg, VERSION), m, exact + 0.1 * (m.versions < VERSION))[2])
    assert stale["mismatch_kl"] == stale["mismatch_logp_max"] == 0.0 and stale["behavior_kl"] > 0 and stale["ess"] < 1
    numerics = finalize(run(make_loss_fn(cfg, VERSION), m, exact + 0.1 * (m.versions == VERSION))[2])
    assert numerics["mismatch_kl"] == pytest.approx(math.exp(0.1) - 1.1) and numerics["mismatch_logp_max"] == pytest.approx(0.1)


def test_means_over_no_tokens_are_left_out() -> None:
    assert finalize({"loss": 0.0, "tokens": 0.0, "entropy/tokens": 0.0}) == {"loss": 0.0, "tokens": 0.0}
