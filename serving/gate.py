"""What every request passes before a route sees it: the key, the encoding, and a bound on size and time of its body."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits
from serving.keys import find_key, is_foreign
from serving.protocol import ApiError

log = logging.getLogger("ray.serve")  # Serve's own logger, so that lines land in the replica's log
OPEN = ("/health",)  # routes that need no key
PAGES = ("/studio", "/docs")  # those that people open: their browser asks them for the key


class Gate:
    """ASGI middleware. Refusals are OpenAI's error object; what comes later is counted by `count(path, status)`."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, digests: frozenset[str] | None, count: Callable[[str, int], None]
    ) -> None:
        self.app = app
        self.limits = limits
        self.digests = digests
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on with a `receive` that raises ApiError when the body breaks a limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, counted)
            return
        try:
            await self.app(scope, self._bounded(receive), counted)
        except ClientDisconnect:
            return  # while it sent its body: nobody is left to answer
        except Exception:
            error = server_error(Headers(scope=scope))
            if begun:  # the status is out: break the connection, so that the client sees the answer is cut off
                raise
            await JSONResponse(error.body, error.status)(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.digests is not None and scope["path"] not in OPEN:
            if is_foreign(scope["method"], headers):
                raise ApiError(
                    403, "A page of another site asked for this with your browser's password.", code="foreign_page"
                )
            key = find_key(headers.get("authorization", ""), self.digests)
            if key is None:
                raise ApiError(
                    401,
                    "A valid key is needed: send the header `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": 'Basic realm="AnimeSketch"' if scope["path"] in PAGES else "Bearer"},
                )
            scope.setdefault("state", {})["key"] = key
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                400, "Send the body as it is: Content-Encoding is not supported.", code="unsupported_encoding"
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "Content-Length must be a number.")
        if len(length) > 15 or int(length) > self.limits.max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Return `receive` with a limit on the body's bytes, which a chunked body does not declare, and on its time."""
        read, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.limits.body_timeout_s

        async def bounded() -> Message:
            nonlocal read, complete
            if complete:  # nothing but a disconnect can come, however late
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                seconds = self.limits.body_timeout_s
                raise ApiError(408, f"The body took more than {seconds:g} seconds.", code="body_timeout") from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if read > self.limits.max_body_bytes:
                    raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        most = self.limits.max_body_bytes
        return ApiError(413, f"The body is larger than this server's limit of {most} bytes.", code="body_too_large")


def server_error(headers: Headers) -> ApiError:
    """Log the exception being handled, and return the answer that says where to look: not what went wrong."""
    request_id = headers.get("x-request-id", uuid.uuid4().hex)[:128].encode("unicode_escape").decode()
    log.exception("Request %s failed.", request_id)
    return ApiError(500, f"The server failed. Its log has the reason under request {request_id}.", type="server_error")
