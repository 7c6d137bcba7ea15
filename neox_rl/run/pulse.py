"""A wake-up call for the tasks of one event loop."""

from __future__ import annotations

import asyncio


class Pulse:
    """``fire`` wakes every task that waits now. On one event loop nothing can come between a check and the wait after it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()
