"""One real vLLM server on the CPU: what it generates, before and after a switch, is what the published weights say.

The reference is a forward of HF transformers in this process, which vLLM does not patch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neox_rl.errors import DeadlineError, ProcessDiedError, ServerFailedError, WeightError
from neox_rl.guard import GuardedProcess, died, stop
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_control import VllmControl
from neox_rl.rollout.vllm_server import ServerSpec, start, wait_ready
from neox_rl.run.endpoints import free_port
from neox_rl.types import NO_VERSION, Completion, Finish, SamplingParams
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import Snapshot, make_snapshot
from neox_rl.weights.watcher import Watcher

VOCAB, MAX_LEN = 100, 512
TOLERANCE = 1e-4
PROMPT = tuple(range(3, 40))


def model_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=False,
        initializer_range=0.3,  # far from uniform, so that two policies differ visibly
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def policy(version: int) -> LlamaForCausalLM:
    torch.manual_seed(100 + version)
    return LlamaForCausalLM(model_config()).eval()


def snapshot(version: int) -> Snapshot:
    return make_snapshot(version, policy(version).state_dict().items())


@torch.no_grad()
def expected_logprobs(version: int, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float) -> list[float]:
    """Log-probs of ``ids`` after ``prompt`` under the policy, by one HF forward over the whole sequence."""
    logits = policy(version)(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].tolist()


def largest_error(completion: Completion, prompt: tuple[int, ...], temperature: float) -> float:
    """Over all spans, each against the policy that the engine says made it."""
    worst = 0.0
    for span in completion.spans:
        expected = expected_logprobs(span.version, prompt, completion.ids, temperature)
        worst = max([worst, *(abs(expected[i] - completion.logprobs[i]) for i in range(span.start, span.end))])
    return worst


@dataclass
class Server:
    """The server of this module, and the publisher it listens to. ``run`` gives a story fresh clients in an event loop of its own."""

    spec: ServerSpec
    process: GuardedProcess
    publisher: Publisher
    version: int = NO_VERSION

    async def publish(self, control: VllmControl, watcher: Watcher) -> int:
        self.version += 1
        self.publisher.offer(snapshot(self.version))
        assert await watcher.wait_staged(self.version, self.spec.workers, 60.0) == self.version
        await control.switch(self.version, 30.0)
        return self.version


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("vllm")
    model_config().save_pretrained(home / "model")
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2").save_pretrained(home / "model")
    core = str(min(os.sched_getaffinity(0)))
    spec = ServerSpec("server0", home / "model", "127.0.0.1", free_port("127.0.0.1"), "float32", MAX_LEN, max_num_seqs=64, cores=core)
    process = start(spec, home / "logs" / "server0.log", os.environ)
    publisher = Publisher()
    try:
        asyncio.run(wait_ready(spec, process, 240.0))
        yield Server(spec, process, publisher)
    finally:
        publisher.close()
        stop(process, 10.0)


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120.0):
            await story

    asyncio.run(bounded())


def test_nothing_is_sampled_from_dummy_weights(server: Server) -> None:
    async def story() -> None:
        async with VllmControl(server.spec.address) as control, VllmGenerator([server.spec.address]) as generator:
            assert await control.healthy() and await control.live_version() == NO_VERSION
            await control.init_weights(server.publisher.address, server.spec.name)
            with pytest.raises(ServerFailedError, match="dummy weights"):
                await generator.sample(PROMPT, SamplingParams(max_tokens=4), 1, "g000000")

    run(story())


def test_generation_matches_the_published_policy(server: Server) -> None:
    async def story() -> None:
        address = server.spec.address
        async with VllmControl(address) as control, VllmGenerator([address]) as generator, Watcher(server.publisher.address) as watcher:
            version = await server.publish(control, watcher)
            assert await control.live_version() == version
            params = SamplingParams(max_tokens=24, temperature=0.7, stop_token_ids=(2,))
            completions = await generator.sample(PROMPT, params, 8, "g000001")
            assert len({completion.ids for completion in completions}) > 1
            for completion in completions:
                assert completion.finish is (Finish.STOP if completion.ids[-1] == 2 else Finish.LENGTH)
                assert [span.version for span in completion.spans] == [version]
                assert largest_error(completion, PROMPT, 0.7) <= TOLERANCE
            for completion in completions[:3]:  # what it sampled, scored as what somebody gives
                score = await generator.score(PROMPT, completion.ids, "g000001")
                assert score.ids == completion.ids and [(s.version, s.start, s.end) for s in score.spans] == [(version, 0, len(score.ids))]
                assert largest_error(score, PROMPT, 1.0) <= TOLERANCE
            greedy = [await generator.sample(PROMPT, SamplingParams(16, temperature=0.0), 1, "g000002") for _ in range(2)]
            assert greedy[0][0].ids == greedy[1][0].ids

    run(story())


def test_requests_in_flight_carry_over_and_each_span_matches_its_own_policy(server: Server) -> None:
    async def story() -> None:
        address = server.spec.address
        async with VllmControl(address) as control, VllmGenerator([address]) as generator, Watcher(server.publisher.address) as watcher:
            old = await server.publish(control, watcher)
            params = SamplingParams(max_tokens=400, stop_token_ids=(VOCAB - 1,))
            prompts = [tuple((7 * i + j) % 90 + 3 for j in range(20 + i)) for i in range(4)]
            crossed = 0
            given = tuple((11 * i) % 90 + 3 for i in range(300))
            for delay_s in (0.3, 0.15, 0.05, 0.6, 1.2):  # a fast machine has finished them all by a time at which a slow one begins
                tasks = [asyncio.create_task(generator.sample(prompt, params, 4, f"g{i:06d}")) for i, prompt in enumerate(prompts)]
                await asyncio.sleep(delay_s)
                scoring = [asyncio.create_task(generator.score(prompt, given, "g000008")) for prompt in prompts]
                new = await server.publish(control, watcher)
                for prompt, score in zip(prompts, await asyncio.gather(*scoring), strict=True):
                    assert score.spans[0].version in (old, new) and largest_error(score, prompt, 1.0) <= TOLERANCE
                for prompt, task in zip(prompts, tasks, strict=True):
                    for completion in await task:
                        assert completion.finish is not Finish.ABORT
                        assert [span.version for span in completion.spans] in ([old], [old, new], [new])
                        assert largest_error(completion, prompt, 1.0) <= TOLERANCE
                        crossed += len(completion.spans) == 2
                if crossed:
                    break
                old = new
            assert crossed > 0
            (after,) = await generator.sample(prompts[0], SamplingParams(8), 1, "g000009")  # its prompt was cached under the old weights
            assert [span.version for span in after.spans] == [new] and largest_error(after, prompts[0], 1.0) <= TOLERANCE

    run(story())


def test_requests_of_a_client_that_is_gone_end_in_the_server(server: Server) -> None:
    """So an orchestrator that dies leaves nothing behind that its successor would have to wait for."""

    async def story() -> None:
        async with VllmGenerator([server.spec.address]) as generator, aiohttp.ClientSession() as session:
            params, begin = SamplingParams(max_tokens=400, stop_token_ids=(VOCAB - 1,), seed=1), time.monotonic()
            await generator.sample(PROMPT, params, 16, "g000001")
            whole_s, aborted = time.monotonic() - begin, list[int]()
            for n in range(20):  # a loaded machine may stand still while the server is to notice
                request = asyncio.create_task(generator.sample(PROMPT, params, 16, "g000001"))
                await asyncio.sleep(min(0.2, whole_s / 8))
                request.cancel()
                await asyncio.sleep(min(0.3 * 1.5**n, whole_s / 4))  # far from its own end: of one seed it is always as long
                async with session.post(f"{server.spec.address}/abort_requests", json={}) as response:
                    aborted.append((await response.json())["aborted"])
                if not aborted[-1]:
                    break
            assert 0 in aborted, aborted

    run(story())


def test_a_second_init_stages_anew_so_that_versions_may_go_back(server: Server) -> None:
    async def story() -> None:
        address = server.spec.address
        async with VllmControl(address) as control, VllmGenerator([address]) as generator:
            live = await control.live_version()
            assert live > 0
            with closing(Publisher()) as resumed:
                resumed.offer(snapshot(live - 1))
                await control.init_weights(resumed.address, "again")
                async with Watcher(resumed.address) as watcher:
                    assert await watcher.wait_staged(live - 1, {"again/0"}, 60.0) == live - 1
                await control.switch(live - 1, 30.0)
                (completion,) = await generator.sample(PROMPT, SamplingParams(8), 1, "g000001")
                assert completion.spans[0].version == live - 1 and largest_error(completion, PROMPT, 1.0) <= TOLERANCE
            await control.init_weights(server.publisher.address, server.spec.name)
            async with Watcher(server.publisher.address) as watcher:
                await watcher.wait_staged(live, server.spec.workers, 60.0)
            await control.switch(live, 30.0)
            assert await control.live_version() == live

    run(story())


def test_a_version_with_a_bad_digest_is_never_staged_and_never_live(server: Server) -> None:
    async def story() -> None:
        address = server.spec.address
        async with VllmControl(address) as control, VllmGenerator([address]) as generator, Watcher(server.publisher.address) as watcher:
            live = await control.live_version()
            good = snapshot(live + 1)
            frames = [good.frames[0], bytes(len(good.frames[1])), *good.frames[2:]]
            server.version = live + 1
            server.publisher.offer(Snapshot(good.version, good.digest, good.manifest, tuple(frames)))
            with pytest.raises(DeadlineError, match=rf"v{live + 1} to be staged by server0/0"):
                await watcher.wait_staged(live + 1, server.spec.workers, 2.0)
            (completion,) = await generator.sample(PROMPT, SamplingParams(8), 1, "g000001")
            assert [span.version for span in completion.spans] == [live]
            assert await server.publish(control, watcher) == live + 2 == await control.live_version()

    run(story())


def test_a_version_that_lacks_a_tensor_never_becomes_live_and_the_server_stays_paused(server: Server) -> None:
    async def story() -> None:
        async with VllmControl(server.spec.address) as control, Watcher(server.publisher.address) as watcher:
            live = await control.live_version()
            lacking = {
                name: tensor for name, tensor in policy(live + 1).state_dict().items() if name != "model.layers.1.self_attn.k_proj.weight"
            }
            server.publisher.offer(make_snapshot(live + 1, lacking.items()))
            await watcher.wait_staged(live + 1, server.spec.workers, 60.0)
            with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.qkv_proj"):
                await control.switch(live + 1, 30.0)
            assert await control.live_version() == live
            async with VllmGenerator([server.spec.address], 0.5) as generator:
                with pytest.raises(DeadlineError, match="g000001"):
                    await generator.sample(PROMPT, SamplingParams(1), 1, "g000001")

    run(story())


def test_when_its_engine_is_killed_the_server_ends_and_leaves_nothing(server: Server) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [process for process in family if process.name().startswith("VLLM::Engine")]
    assert len(family) >= 3  # the API server, the engine, a resource tracker

    async def story() -> None:
        async with VllmControl(server.spec.address) as control, VllmGenerator([server.spec.address], 20.0) as generator:
            request = asyncio.create_task(generator.sample(PROMPT, SamplingParams(400), 8, "g000001"))
            await asyncio.sleep(0.2)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(Exception, match="g000001"):
                await request
            assert not await control.healthy()

    run(story())
    server.process.wait(240.0)  # with status 0: vLLM calls this a shutdown
    assert isinstance(error := died("server0", server.process), ProcessDiedError) and "server0.log" in str(error)
    _, alive = psutil.wait_procs(family, timeout=30.0)
    assert alive == []
