"""Servers that refuse a request (4xx): whose fault it is, and whether anybody is left to wait for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from neox_rl.errors import NeoxRLError, RefusedError, ServerFailedError, WireError

OF_THE_REQUEST = frozenset({400, 413, 422})
"""Refusals for what the request holds. Others (404, 408, 429) say how the server is just now: the same one may take it later."""


class Server(Protocol):
    """What is known of one. ``answers``: this life of it has answered a request; ``life``: a number that no other server has, nor this one
    once it was started again."""

    serving: bool
    answers: bool
    life: int


class RefusalError(NeoxRLError):
    """A server that does not want the request: its own fault where another one answers it, the request's where all refuse.
    ``life``: that of the server; ``of_the_request``: for what it holds."""

    def __init__(self, words: str, life: int, of_the_request: bool) -> None:
        super().__init__(words)
        self.life, self.of_the_request = life, of_the_request


class Refusals:
    """Those of one request. What an earlier life of a server refused is no refusal of the one that is there."""

    def __init__(self, rollout_id: str) -> None:
        self._rollout_id = rollout_id
        self._errors: dict[int, RefusalError] = {}

    def add(self, error: RefusalError) -> None:
        self._errors[error.life] = error

    def may_ask(self, server: Server) -> bool:
        """Whether it serves, and has not refused."""
        return server.serving and server.life not in self._errors

    def judge(self, servers: Collection[Server]) -> None:
        """Raises where there is nobody to wait for: RefusedError where those that refuse what the request holds answer others, so that no
        other would take it; WireError where all refuse it for that; ServerFailedError where all refuse it, some of them only for now."""
        refusing = [(server, self._errors[server.life]) for server in servers if server.life in self._errors]
        if not refusing or any(map(self.may_ask, servers)):
            return
        words = "; ".join(str(error) for _, error in refusing)
        if all(server.answers and error.of_the_request for server, error in refusing):
            fix = "if it is too long, raise seq_length or lower metarl.rollout.max_new_tokens; if not, see the log of that server"
            raise RefusedError(f"rollout {self._rollout_id}: servers that answer other requests refuse this one: {words}; {fix}")
        if len(refusing) == len(servers):
            raise WireError(words) if all(error.of_the_request for _, error in refusing) else ServerFailedError(words)
