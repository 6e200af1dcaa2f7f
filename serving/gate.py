"""What every request passes before a route sees it: a name, the key, the encoding, and bounds on its body."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits
from serving.keys import find_key, is_foreign, is_loopback
from serving.metrics import Metrics
from serving.protocol import ApiError

log = logging.getLogger("ray.serve")  # Serve's own logger, so that lines land in the replica's log
OPEN = ("/health",)  # routes that need no key
PAGES = ("/", "/studio", "/docs")  # those that people open: their browser asks them for the key
REQUEST_ID = "X-Request-ID"
_CLIENTS_OWN = re.compile(r"[!-~]{1,128}")  # visible ASCII: nothing that breaks a line of a log or a header


class Gate:
    """ASGI middleware. Refusals are OpenAI's error object; each is counted by its reason, each answer by its status."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, digests: frozenset[str] | None, metrics: Metrics, request_ids: bool
    ) -> None:
        """`digests` and `request_ids` as in `serving.api.create_api`."""
        self.app = app
        self.limits = limits
        self.digests = digests
        self.metrics = metrics
        self.request_ids = request_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on with a `receive` that raises ApiError when the body breaks a limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        path, headers = _path(scope), Headers(scope=scope)
        own = headers.get(REQUEST_ID, "")
        request_id = own if _CLIENTS_OWN.fullmatch(own) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        body, begun = _Body(receive, headers, self.limits), False

        async def answered(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.metrics.answered(path, message["status"])
                reply = MutableHeaders(scope=message)
                if self.request_ids:
                    reply[REQUEST_ID] = request_id
                if body.endless:
                    reply["Connection"] = "close"  # else the server would read and throw away what is still to come
            await send(message)

        try:
            self._check(scope, path, headers, body)
        except ApiError as error:
            self.metrics.refuse(error)
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, answered)
            return
        try:
            await self.app(scope, body.receive, answered)
        except ClientDisconnect:
            self.metrics.left.inc()  # nobody is there to answer
        except asyncio.CancelledError:  # Serve's way to say so
            self.metrics.left.inc()
            raise
        except Exception:
            error = server_error(scope)
            if begun:  # the status is out: break the connection, so that the client sees the answer is cut off
                raise
            await JSONResponse(error.body, error.status)(scope, receive, answered)

    def _check(self, scope: Scope, path: str, headers: Headers, body: _Body) -> None:
        if path not in OPEN:
            self._check_asker(scope, path, headers)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                400, "Send the body as it is: Content-Encoding is not supported.", code="unsupported_encoding"
            )
        if body.declared is None:
            raise ApiError(400, "Content-Length must be a number.", code="invalid_content_length")
        if body.declared > self.limits.max_body_bytes:
            raise body.too_large()

    def _check_asker(self, scope: Scope, path: str, headers: Headers) -> None:
        """Refuse who may not ask: without a key, or without knowing that they do."""
        if is_foreign(scope["method"], headers):
            raise ApiError(403, "A page of another site asked for this through your browser.", code="foreign_page")
        if self.digests is None:
            if not is_loopback(_host(headers)):  # a name that was made to mean this machine
                raise ApiError(
                    403, "Without keys, this server is asked as localhost or 127.0.0.1 only.", code="foreign_host"
                )
            return
        scope["state"]["key"] = key = find_key(headers.get("authorization", ""), self.digests)
        if key is None:
            raise ApiError(
                401,
                "A valid key is needed: send the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="AnimeSketch"' if path in PAGES else "Bearer"},
            )


def _path(scope: Scope) -> str:
    """Return the path of a request below the application's own, which is not "/" where `route_prefix` is not."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


def _host(headers: Headers) -> str | None:
    """Return the host that the client asked for, without its port."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class _Body:
    """The body of a request, with a limit on its bytes, which a chunked one does not declare, and on its time."""

    def __init__(self, receive: Receive, headers: Headers, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._read, self._complete, self._late = 0, False, False
        self._chunked = "transfer-encoding" in headers
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        length = headers.get("content-length", "0")
        # by its header, 0 without one; None for one that is no number
        self.declared = int(length[:16]) if length.isascii() and length.isdigit() else None

    @property
    def endless(self) -> bool:
        """Whether more may come than this server would read."""
        if self._complete:
            return False
        return self._chunked or self._late or (self.declared or 0) > self._limits.max_body_bytes

    async def receive(self) -> Message:
        """Return the next message of the client. ApiError 413 and 408 beyond the limits."""
        if self._complete:  # nothing but a disconnect can come, however late
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self._late = True
            seconds = self._limits.body_timeout_s
            raise ApiError(408, f"The body took more than {seconds:g} seconds.", code="body_timeout") from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._read > self._limits.max_body_bytes:
                raise self.too_large()
        return message

    def too_large(self) -> ApiError:
        """Return the refusal of a body beyond the limit."""
        most = self._limits.max_body_bytes
        return ApiError(413, f"The body is larger than this server's limit of {most} bytes.", code="body_too_large")


def server_error(scope: Scope) -> ApiError:
    """Log the exception being handled, and return the answer that says where to look: not what went wrong."""
    request_id = scope["state"]["request_id"]
    log.exception("Request %s failed.", request_id)
    return ApiError(500, f"The server failed. Its log has the reason under request {request_id}.", type="server_error")
