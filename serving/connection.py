"""The client at the other end: what happens to a request when it leaves, or takes nothing of what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")
QUIET_S = 5.0  # of a stream, until a comment is sent: proxies end a quiet one, and notice who left by sending alone


async def while_there(http: Request, work: Awaitable[T]) -> T:
    """Return what `work` returns. ClientDisconnect when the client leaves first: `work` is cancelled then, and ended.

    The body must have been read. Serve cancels the whole request by itself; other servers only tell who asks.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events that hold `holder` until they end.

    ClientDisconnect when the client leaves before the last one, or takes longer than `send_timeout_s` to take one.
    Between them come comments, which readers of server-sent events skip.
    """

    def __init__(self, events: AsyncGenerator[bytes], holder: contextlib.AsyncExitStack, send_timeout_s: float) -> None:
        self._events, self._sent = _with_comments(events), False  # whether all of it is
        super().__init__(self._events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._holder = holder
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None  # it is there, but reads nothing: no different for the others
            self._sent = not message.get("more_body", True)

        async with self._holder, contextlib.aclosing(self._events):
            await super().__call__(scope, receive, in_time)
        if not self._sent:  # one that leaves may end the above without a word
            raise ClientDisconnect


async def _with_comments(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the events, and a comment after each QUIET_S without one."""
    coming = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            while not (await asyncio.wait((coming,), timeout=QUIET_S))[0]:
                yield b": drawing\n\n"
            event = coming.result()
            if event is None:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()
