"""q-STaR: a search is worth the likelihood of a given solution after it, as a server says it; nobody verifies anything."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neox_rl.batch.advantages import teaches
from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.codec import decode_group, encode_group
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig, VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.sources import load_problems
from neox_rl.problems.split import ProblemSet
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer
from neox_rl.queue.book import generated_tokens, version_tokens
from neox_rl.rollout.groups import Attempts, sampled_ids
from neox_rl.rollout.scripted import LOGPROB
from neox_rl.rollout.vllm_client import NobodyServesError, VllmGenerator
from neox_rl.run.endpoints import free_port
from neox_rl.run.makers import make_maker
from neox_rl.run.parts import solution_id
from neox_rl.run.solution_groups import SolutionGroups, reference, searched, with_references
from neox_rl.search.domain import SOLUTION_LINE
from neox_rl.telemetry.rollouts import rollout_row
from neox_rl.types import Completion, Finish, Problem, Reason, Role, SamplingParams, VersionSpan
from neox_rl.verify.verifier import make_verifier
from tests.unit.small_run import scripted_server, small_config
from tests.unit.test_episodes import Letters

PARAMS = SamplingParams(96, stop_token_ids=(1,))


def config_of(root: Path, kind: str = "gain", **blocks: dict[str, object]) -> RunConfig:
    return small_config(root, **{"reward": {"kind": kind}, **blocks})


class Policy:
    """Writes ``script`` as v4, and as v5 says that each token of a solution has log-prob -1, or -3 straight after the prompt.
    ``later``: the versions that score, a request each, before it is v5 again."""

    def __init__(self, tokenizer: SymbolicTokenizer, prompt: str, script: Sequence[str]) -> None:
        self.tokenizer, self.prompt, self.script = tokenizer, tokenizer.encode(prompt), script
        self.stops: tuple[int, ...] = ()
        self.asked: list[str] = []
        self.absent = 2
        self.later: list[int] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.stops = params.stop_token_ids
        found = []
        for text in self.script[:n]:
            ids = self.tokenizer.encode(text)
            found.append(Completion(ids, (-0.5,) * len(ids), (VersionSpan(4, 0, len(ids)),), Finish.STOP))
        return tuple(found)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], rollout_id: str) -> Completion:
        if self.absent:
            self.absent -= 1
            raise NobodyServesError(f"rollout {rollout_id}", 0.1)
        self.asked.append(self.tokenizer.decode([*prompt_ids, *ids]))
        bare = len(prompt_ids) == len(self.prompt) + 1
        return Completion(
            tuple(ids),
            (-3.0 if bare else -1.0,) * len(ids),
            (VersionSpan(self.later.pop(0) if self.later else 5, 0, len(ids)),),
            Finish.STOP,
        )


def story(config: RunConfig, script: Sequence[str]) -> tuple[SolutionGroups, Policy, Problem]:
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    assert isinstance(tokenizer, SymbolicTokenizer)
    problem = load_problems(config.metarl.problems, 1).train[0]
    policy = Policy(tokenizer, problem.prompt, script)
    verifier = make_verifier(config.metarl.verify, problem.task)
    attempts = Attempts(policy, verifier, tokenizer, lambda *_: pytest.fail("a verdict's reward"), solution_id(tokenizer))
    made = make_maker(config, attempts, scorer=policy)
    assert isinstance(made, SolutionGroups)
    return made, policy, problem


def test_a_search_is_worth_the_log_probs_of_the_solution_after_it(tmp_path: Path) -> None:
    made, policy, problem = story(config_of(tmp_path), ("1 +2 =3 low solution", "1 +2 =3 low"))
    group = asyncio.run(made.group(problem, 7, PARAMS, 2))
    given = reference(problem, policy.tokenizer)
    assert given is not None and policy.tokenizer.decode(given.begin) == "solution"
    solution = policy.tokenizer.decode(given.ids)
    assert policy.stops == (1, *given.begin), "a search ends where its solution begins"
    search = f"{problem.prompt} 1 +2 =3 low solution {solution}".split()
    assert sorted(text.split() for text in policy.asked) == sorted([search, search, f"{problem.prompt} solution {solution}".split()])
    verdict = asyncio.run(make_verifier(VerifyConfig(), problem.task).check(problem, f"solution {solution}"))
    assert verdict.correct, "the solver's solution is right"
    size = len(given.ids)
    for trace, said in zip(group.traces, ([Role.THINK], [Role.THINK, Role.ENV]), strict=True):
        assert trace.reward == pytest.approx(-size + 3 * size) and [s.role for s in trace.segments] == [Role.PROMPT, *said, Role.SOLUTION]
        last = trace.segments[-1]
        assert (last.ids, last.version, last.mask, last.advantage) == (given.ids, 5, 1.0, 1.0) and last.logprobs == (-1.0,) * size
        assert trace.segments[1].advantage is None and trace.segments[1].version == 4
        row = rollout_row(trace, problem, "", (), label="", step=1)
        assert row["num_tokens"] == len(trace.segments[1].ids) and {span["version"] for span in row["versions"]} == {4}, "v5 wrote nothing"
    assert generated_tokens(group) == sum(len(policy.tokenizer.encode(text)) for text in policy.script), "the solution was only scored"
    assert version_tokens(group)[5] == 2 * size, "but has an age"
    assert decode_group(encode_group(group)) == group


def test_a_gain_is_between_log_probs_of_one_version(tmp_path: Path) -> None:
    made, policy, problem = story(config_of(tmp_path), ("1 +2 =3 low solution", "1 +2 =3 low"))
    policy.later = [5, 6, 5, 6, 6]
    group = asyncio.run(made.group(problem, 7, PARAMS, 2))
    assert [trace.segments[-1].version for trace in group.traces] == [6, 6] and len(policy.asked) == 5, "the older two were asked again"
    policy.later = [5, 6, 7, 8, 9, 9, 9]
    again = asyncio.run(made.group(problem, 8, PARAMS, 2))
    assert {trace.segments[-1].version for trace in again.traces} == {9} and not policy.later
    alone, policy, _ = story(config_of(tmp_path, "solution"), ("1 +2 =3 low", "solution"))
    policy.later = [5, 6]
    mixed = asyncio.run(alone.group(problem, 7, PARAMS, 2))
    assert sorted(trace.segments[-1].version for trace in mixed.traces) == [5, 6], "a likelihood is of its own version"


def test_without_the_second_term_the_reward_is_the_likelihood_alone(tmp_path: Path) -> None:
    made, policy, problem = story(config_of(tmp_path, "solution"), ("1 +2 =3 low solution",))
    group = asyncio.run(made.group(problem, 7, PARAMS, 1))
    assert group.traces[0].reward == -float(len(group.traces[0].segments[-1].ids)) and len(policy.asked) == 1


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_search_gets_its_advantage_and_the_solution_the_gradient_of_its_likelihood(tmp_path: Path, weight: float) -> None:
    """The two terms of the gradient of E_Z[log pi(S | Z, q)]: (r - mean r) grad log pi(Z | q), and grad log pi(S | Z, q)."""
    made, _, problem = story(config_of(tmp_path, reward={"kind": "solution", "solution_weight": weight}), ("1 +2 =3 low", "solution"))
    group = asyncio.run(made.group(problem, 0, PARAMS, 2))
    assert teaches(group.traces)
    layout = Layout(pack_tokens=256, data_parallel=1)
    objective = ObjectiveConfig(baseline="mean")
    batch = pack_rl([group], 6, staleness=StalenessConfig(), objective=objective, max_new_tokens=96, layout=layout)
    (micro,) = batch.microbatches[0]
    trained = micro.loss_weight != 0
    first, second = (trace.reward for trace in group.traces)
    own = (first - second) / 2
    size = len(group.traces[0].segments[-1].ids)
    # A search of 5 tokens and one of 1, and twice the solution.
    expected = sorted([own] * 4 + [-own] + [1.0] * (2 * size if weight else 0))
    assert sorted(micro.advantages[trained].tolist()) == pytest.approx(expected)
    assert set(np.unique(micro.versions[trained]).tolist()) == ({4, 5} if weight else {4})
    stats = batch.stats
    assert (stats.length_mean, stats.length_max, stats.loss_tokens) == (2.5, 4, 5 + (2 * size if weight else 0)), "lengths are of searches"
    assert stats.correct_frac is None and stats.reasons == {"unverified": 2}


def test_a_search_is_counted_without_the_solution_that_it_is_worth(tmp_path: Path) -> None:
    made, policy, problem = story(config_of(tmp_path), ("1 +2 =3 low",))
    (trace,) = asyncio.run(made.group(problem, 7, PARAMS, 1)).traces
    assert policy.tokenizer.decode(sampled_ids(trace)) == "1 +2 =3 low" and trace.given == trace.segments[-1:]
    attempted = replace(trace, verdict=replace(trace.verdict, reason=Reason.MISMATCH))
    assert attempted.given == () and len(sampled_ids(attempted)) == 4 + len(trace.segments[-1].ids)


TEXT = Problem("math/1", "math", "1 + 1?", "2", "1", {"solution": "1 + 1 is \\boxed{2}"})


def written_by(tokenizer: Letters | SymbolicTokenizer, text: str) -> Completion:
    """As v4 to its second token, then as v5, with EOS."""
    ids = (*tokenizer.encode(text), tokenizer.eos_id)
    return Completion(ids, (-1.0,) * len(ids), (VersionSpan(4, 0, 2), VersionSpan(5, 2, len(ids))), Finish.STOP)


@pytest.mark.parametrize(
    ("text", "search", "between"),
    [
        ("1+1=2\n[SOLUTION]\nthe answer is \\boxed{4}\n", "1+1=2\n[SOLUTION]\n", ""),
        ("1+1=2\n [SOLUTION]", "1+1=2\n [SOLUTION]", "\n"),
        ("[SOLUTION]\n2\n[SOLUTION]\n", "[SOLUTION]\n", ""),
        ("1+1=2\n", "1+1=2\n", "[SOLUTION]\n"),
        ("no [SOLUTION] line", "no [SOLUTION] line", "[SOLUTION]\n"),
        ("", "", "[SOLUTION]\n"),
    ],
)
def test_a_solution_of_the_policys_own_is_no_part_of_its_search(text: str, search: str, between: str) -> None:
    letters = Letters()
    given = reference(TEXT, letters)
    assert given is not None
    written = written_by(letters, text)
    found = searched(written, given, letters)
    assert (letters.decode(found.search.ids), letters.decode(found.between)) == (search, between)
    assert found.search.ids == written.ids[: len(search)] and max((s.end for s in found.search.spans), default=0) == len(search)


def test_a_token_that_goes_on_behind_the_line_is_no_part_of_the_search_either() -> None:
    class Pairs(Letters):
        """Two characters a token where it decodes: as a tokenizer with merges across a line's end."""

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(chr(i >> 8) + chr(i & 255) for i in ids if i)

    pairs, text = Pairs(), "1+1=2.\n\n[SOLUTION]\n4"
    given = reference(TEXT, pairs)
    assert given is not None
    ids = (*(ord(a) << 8 | ord(b) for a, b in zip(text[::2], text[1::2], strict=True)), 0)
    found = searched(Completion(ids, (-1.0,) * len(ids), (VersionSpan(4, 0, len(ids)),), Finish.STOP), given, pairs)
    assert (pairs.decode(found.search.ids), found.between) == (text[:8], given.begin)


def test_a_word_of_the_policys_own_solution_ends_the_search_with_any_tokenizer(tmp_path: Path) -> None:
    problem = load_problems(config_of(tmp_path).metarl.problems, 1).train[0]
    letters = Letters()
    given = reference(problem, letters)
    assert given is not None
    found = searched(written_by(letters, "1 +2 =3 low solution ( 1 + 2 )"), given, letters)
    assert letters.decode(found.search.ids) == "1 +2 =3 low solution" and found.between == ()
    assert letters.decode(given.ids).startswith(" "), "S goes on as the policy would"


def test_problems_without_a_solution_or_room_for_it_are_not_trained_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    problem = load_problems(config.metarl.problems, 1).train[0]
    text = Problem("math/1", "math", "1 + 1?", "2", "1", {"solution": "1 + 1 is \\boxed{2}"})
    given = reference(text, tokenizer)
    assert given is not None and given.begin == tokenizer.encode(SOLUTION_LINE)
    bare = replace(text, meta={})
    assert reference(bare, tokenizer) is None
    kept = with_references(config, ProblemSet((problem, bare), (), {}), tokenizer)
    assert kept.train == (problem,) and kept.counts == {"without_solution": 1}
    full = replace(config, neox=replace(config.neox, seq_length=96 + len(tokenizer.encode(problem.prompt)) + 4))
    for some, settings in (((bare,), config), ((problem,), full)):
        with pytest.raises(ConfigError, match=r"metarl\.reward\.kind = gain: none of 1 training problems has a worked solution"):
            with_references(settings, ProblemSet(some, (), {}), tokenizer)
    assert with_references(small_config(tmp_path), ProblemSet((bare,), (), {}), tokenizer).train == (bare,)


def test_the_scripted_server_scores_what_it_is_given(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"

    async def told() -> Completion:
        async with scripted_server(config, address) as server, VllmGenerator([address]) as generator:
            server._switches.add(0.0, "3")
            return await generator.score((4, 5), (6, 7, 8), "g000000")

    assert asyncio.run(told()) == Completion((6, 7, 8), (LOGPROB,) * 3, (VersionSpan(3, 0, 3),), Finish.STOP)
