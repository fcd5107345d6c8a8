"""Who waits for an answer: a client, who may leave, and the pictures of one request, which wait for each other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request

from service.errors import Refusal

T = TypeVar("T")

SIDE_BY_SIDE = 4  # pictures of one request that are under way at a time, so that it does not fill the queue


@asynccontextmanager
async def departure(request: Request) -> "AsyncIterator[asyncio.Task[None]]":
    """A task that is done when the client has left; the body must have been read."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(until_gone())
    try:
        yield task
    finally:
        task.cancel()


class Siblings:
    """The pictures of one request: `turns` bounds how many are under way, and none is refused because of another."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(SIDE_BY_SIDE)
        self._running = 0
        self._one_is_done = asyncio.Event()

    async def segment(self, run: Callable[[], Awaitable[T]]) -> T:
        """Segment one of them; where it is refused as overloaded, again once another that is being run is done.

        Waiting ends by the deadline, as the others have the same. Raises what `run` raises.
        """
        while True:
            self._running += 1
            waits = False
            try:
                return await run()
            except Refusal as refusal:
                waits = refusal.code == "overloaded" and self._running > 1
                if not waits:
                    raise
            finally:
                self._running -= 1
                if not waits:
                    self._one_is_done.set()
                    self._one_is_done = asyncio.Event()
            await self._one_is_done.wait()
