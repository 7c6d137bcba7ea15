"""A policy without a model: of each prompt it knows a number of scripts, and writes one of them, at the pace of a real server.

For debugging everything else. Log-probs are those of a coin that knew each token with probability 1/2: they are finite and mean nothing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

from neox_rl.rollout.vllm_control import UNLABELED
from neox_rl.types import Finish

LOGPROB = math.log(0.5)
NUM_SCRIPTS = 64
MIN_BEGUN = 4
_CACHED = 8192


class Scripts:
    """``script(prompt, number, heard)`` is the ``number``-th of the ``NUM_SCRIPTS`` completions of a prompt, always the same one.

    A completion may be asked for in pieces, each request with the tokens so far behind the prompt, and from another server than before: it
    goes on with one of the scripts that begin so. ``said`` finds in those tokens what others said last: they and all that follows, and
    what the next script is to know of it (``heard``); None where the policy alone has spoken. Behind such words another script begins: it
    is told from them by MIN_BEGUN tokens that a script begins with.
    """

    def __init__(
        self,
        prompts: Collection[tuple[int, ...]],
        script: Callable[[tuple[int, ...], int, str], Sequence[int]],
        said: Callable[[tuple[int, ...]], tuple[tuple[int, ...], str] | None] = lambda begun: None,
    ) -> None:
        self._said = said
        self._prompts = frozenset(prompts)
        self._lengths = sorted({len(prompt) for prompt in prompts})
        self._script = lru_cache(_CACHED)(lambda prompt, number, heard: tuple(script(prompt, number, heard)))

    def go_on(self, ids: Sequence[int], rng: random.Random, greedy: bool) -> tuple[int, ...]:
        """What follows ``ids``: a prompt and, maybe, what was written and said so far. Raises KeyError for anything else."""
        whole = tuple(ids)
        for length in self._lengths:
            prompt, begun = whole[:length], whole[length:]
            if prompt in self._prompts:
                begun, heard = self._newest(prompt, begun)
                numbers = [0] if greedy else [rng.randrange(NUM_SCRIPTS)]
                if begun:
                    numbers = [n for n in range(NUM_SCRIPTS) if self._script(prompt, n, heard)[: len(begun)] == begun]
                if numbers:
                    return self._script(prompt, numbers[0] if greedy else rng.choice(numbers), heard)[len(begun) :]
        raise KeyError(f"a prompt of {len(whole)} tokens that is none of the run's, or goes on as no script does")

    def _newest(self, prompt: tuple[int, ...], begun: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """What there is of the last script, and what it heard."""
        said = self._said(begun)
        if said is None:
            return begun, ""
        words, heard = said
        scripts = [self._script(prompt, n, heard) for n in range(NUM_SCRIPTS)]
        tails = (words[start:] for start in range(len(words) - MIN_BEGUN + 1))
        return next((tail for tail in tails if any(script[: len(tail)] == tail for script in scripts)), ()), heard


class Switches:
    """Which weights were loaded when: (seconds, label), times rising."""

    def __init__(self) -> None:
        self._times: list[float] = [-math.inf]
        self._labels: list[str] = [UNLABELED]

    @property
    def label(self) -> str:
        return self._labels[-1]

    def add(self, now: float, label: str) -> None:
        self._times.append(now)
        self._labels.append(label)

    def spans(self, num_tokens: int, start: float, token_s: float) -> list[dict[str, Any]]:
        """vLLM's ``weight_versions`` of tokens made at ``start + token_s``, ``start + 2 * token_s``, ..."""
        found: list[dict[str, Any]] = []
        for i in range(num_tokens):
            label = self._labels[bisect_right(self._times, start + (i + 1) * token_s) - 1]
            if not found or found[-1]["version"] != label:
                found.append({"version": label, "start": i, "end": i})
            found[-1]["end"] = i + 1
        return found


def choice(index: int, ids: Sequence[int], finish: Finish, spans: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice of vLLM's answer to ``/inference/v1/generate``."""
    content = [{"token_id": token, "logprob": LOGPROB, "rank": 1, "top_logprobs": []} for token in ids]
    return {
        "index": index,
        "token_ids": list(ids),
        "logprobs": {"content": content},
        "finish_reason": str(finish),
        "weight_versions": spans or None,
    }
