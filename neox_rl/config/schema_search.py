"""The keys of rollouts that are more than a sampled attempt: searches, and several episodes in one context."""

from __future__ import annotations

from dataclasses import dataclass

from neox_rl.config.declare import key


@dataclass(frozen=True)
class SearchConfig:
    """Rollouts made by search under the current policy (``rollout.method: search``), ``rollout.group_size`` searches of a problem."""

    strategy: str = key("mcts", "who goes where", choices=("best-of-n", "beam", "bfs", "dfs", "best-first", "astar", "mcts"), own=True)
    value: str = key(
        "monte-carlo",
        "how hopeful a step is: the mean of completions (11), the exact solver, the domain's guess, votes of the policy, or a served"
        " process reward model",
        choices=("none", "oracle", "heuristic", "monte-carlo", "judge", "prm"),
    )
    prm_server: str = key("", "value prm: http://host:port of a server that you started for the reward model")
    prm_model: str = key("", "value prm: directory with its tokenizer.json (configs/prm.yml), or the name of a served sequence classifier")
    sees_earlier: bool = key(
        False,
        "the value sees what the search did before: a judge or reward model is told it (the meta-critic, 8.3.4); with others the search"
        " turns to steps that were not tried, which are worth what they were",
    )
    nodes: int = key(32, "most nodes of a tree, its root left out", low=1)
    tokens: int = key(0, "most tokens of a search, refused steps and those of its value included; 0: what its nodes take", low=0)
    width: int = key(4, "steps sampled at a node; best-of-n: attempts", low=1)
    batch: int = key(1, "nodes expanded together; mcts spreads them by virtual loss", low=1)
    beam: int = key(5, "nodes that beam keeps at a level", low=1)
    prune: bool = key(True, "a node that the oracle knows to be hopeless is not expanded")
    exploration: float = key(1.0, "c of UCT", low=0.0)
    max_step_tokens: int = key(64, "most tokens of a step", low=1)
    cut_steps: bool = key(False, "a step without an end within max_step_tokens ends there, for text; else it is refused")
    playouts: int = key(4, "completions of a Monte-Carlo value", low=1)
    playout_tokens: int = key(64, "most tokens of one of them", low=1)
    votes: int = key(3, "votes of a judge", low=1)
    trains: str = key(
        "steps",
        "what is trained: sampled steps, each with the advantage v(step) - v(before it) (VinePPO); searches that came to a right end,"
        " told as a Meta-CoT and imitated (Meta-STaR (3), objective.loss: sft); or of the steps sampled at a node the best against the"
        " worst (Step-DPO, objective.loss: dpo)",
        choices=("steps", "traces", "preferences"),
    )
    samples: str = key(
        "all",
        "steps, preferences: all that were sampled, refused ones as of value 0 and repeated ones as often as they came; or the nodes of"
        " the tree, once",
        choices=("all", "nodes"),
    )
    margin: float = key(0.2, "preferences: least by which the values of a pair's two steps differ", low=1e-6, high=1.0)
    baseline: str = key("parent", "steps: what the value of a step is compared with", choices=("parent", "siblings"))
    telling: str = key("stream", "traces: how a search is told", choices=("stream", "taken", "revision", "backtrack", "solution"))
    mask: str = key(
        "all", "traces: what has a loss: all (22), the search (23), no step off the path (24)", choices=("all", "search", "path")
    )
    thin: float = key(0.0, "traces: each step off the solution path is left out with this chance, and what came of it", low=0.0, high=1.0)


@dataclass(frozen=True)
class EpisodesConfig:
    """Meta-RL rollouts of several episodes in one context (``rollout.method: episodes``); held-out problems are attempted so too."""

    count: int = key(4, "K, most episodes of a rollout, each of at most rollout.max_new_tokens", low=1, high=100)
    max_tokens: int = key(0, "most tokens of the policy in all episodes of a rollout; 0: count x rollout.max_new_tokens", low=0)
    feedback: str = key(
        "binary",
        "what the policy is told of an episode: that it is over, whether it was right, or in words what its answer was",
        choices=("none", "binary", "text"),
    )
    objective: str = key(
        "sum",
        "what of the episodes' rewards is maximised: their sum (RL^2 (13)), the last (E-RL^2 (14)), the best, the first (plain RL)",
        choices=("sum", "final", "any", "first"),
    )
    gammas: tuple[float, ...] = key(
        (1.0,),
        "discounts a token that the policy writes before its solution (21), any token where no word begins one; of several each group has"
        " one, which its prompt tells by a tag: work quickly, take a moment, take your time. Held-out problems have the largest, and"
        " before and after RL each",
    )
    tool: str = key(
        "none",
        "what an episode may call: a calculator ([CALC 3 * 7]), or Python programs ([PYTHON] ... [/PYTHON]) in a sandbox. Needs"
        " tokenizer.path",
        choices=("none", "calculator", "python"),
    )
    tool_workers: int = key(1, "python: programs that run at once", low=1, high=64)
    tool_deadline_s: float = key(2.0, "python: a program that takes longer is ended", low=0.1, high=600.0)
    tool_memory_mib: int = key(256, "python: address space of a program", low=64)
    tool_output_chars: int = key(1000, "python: what a program prints beyond is cut", low=10, high=100000)
