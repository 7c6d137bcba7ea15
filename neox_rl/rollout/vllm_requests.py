"""The JSON of what a vLLM server is asked, most of it on the route that attests versions; answers are read where they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from neox_rl.types import SamplingParams

ROUTE = "/inference/v1/generate"


def sampling_keys(params: SamplingParams, n: int) -> dict[str, Any]:
    """What every route of vLLM calls the same."""
    seed = {} if params.seed is None else {"seed": params.seed}
    return {
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "stop_token_ids": list(params.stop_token_ids),
        "logprobs": 0,
        **seed,
    }


def request_body(prompt_ids: Sequence[int], params: SamplingParams, n: int) -> bytes:
    """The JSON of one request for ``n`` completions."""
    sampling = {**sampling_keys(params, n), "detokenize": False}
    return json.dumps({"token_ids": list(prompt_ids), "sampling_params": sampling}).encode()


def score_body(prompt_ids: Sequence[int], ids: Sequence[int]) -> bytes:
    """The JSON of one request for the log-probs of ``ids`` after ``prompt_ids``: a prompt, of which no more than one token is sampled."""
    sampling = {"n": 1, "max_tokens": 1, "temperature": 1.0, "logprobs": 0, "prompt_logprobs": 0, "detokenize": False}
    return json.dumps({"token_ids": [*prompt_ids, *ids], "sampling_params": sampling}).encode()
