"""The HTTP interface as a FastAPI app over a backend: a Ray Serve handle in production, a Worker in tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from serving import protocol
from serving.adapters import Adapters
from serving.config import ServingConfig
from serving.gate import Gate, server_error
from serving.page import studio
from serving.protocol import ApiError, Busy, EditRequest, GenerationRequest
from serving.rates import Rates
from serving.worker import Event, Facts, Job, Picture, Started

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
EVENTS = {GENERATIONS: "image_generation", EDITS: "image_edit"}  # OpenAI's names of streamed events
REPLY_S = 5.0  # how long /health waits for a first word of a replica


class Backend(Protocol):
    """Where jobs run."""

    async def facts(self) -> Facts:
        """Return what the server is; waits for the first replica."""
        ...

    async def trouble(self) -> str | None:
        """Return why jobs can't run now, None when they can."""
        ...

    def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield the events of a job. Busy when there is no place for it; closing the iterator gives the job up."""
        ...


def create_api(config: ServingConfig, backend: Backend, digests: frozenset[str] | None) -> FastAPI:
    """Return the app: routes of contract 3, every error as OpenAI's error object.

    `digests` are those of the allowed keys (`serving/keys.py`); None asks for none.
    """
    metrics, adapters = _Metrics(), Adapters(config.adapter_folder)
    rates = Rates(concurrent=config.limits.max_concurrent_per_key, per_minute=config.limits.max_per_minute_per_key)

    async def busy(http: Request, error: Exception) -> Response:
        """Answer 429: at once, so that a client can wait or go elsewhere."""
        wait = metrics.drained_in(config.min_replicas) or config.retry_after_s
        message = f"Every place is taken, in the replicas and in the queue. Try again in {wait} seconds."
        headers = {"Retry-After": str(wait)}
        return await told(http, ApiError(429, message, type="rate_limit_error", code="queue_full", headers=headers))

    async def told(http: Request, error: Exception) -> Response:
        """Answer with an error object, counted by its code."""
        assert isinstance(error, ApiError)
        metrics.refused.labels(error.body["error"]["code"] or str(error.status)).inc()
        return JSONResponse(error.body, error.status, headers=error.headers)

    api = FastAPI(
        title="AnimeSketch",
        description="Pictures in the style and content of a sketch. OpenAI Images is the dialect.",
        docs_url="/docs",
        redoc_url=None,
        exception_handlers={ApiError: told, Busy: busy, HTTPException: _http_error},
    )

    @contextlib.asynccontextmanager
    async def place() -> AsyncIterator[None]:
        """Hold one of the places; the count is looked at before a byte of the body is read."""
        if metrics.active >= config.max_requests:
            raise Busy
        metrics.active += 1
        metrics.in_progress.set(metrics.active)
        try:
            yield
        finally:
            metrics.active -= 1
            metrics.in_progress.set(metrics.active)

    async def answer(http: Request, route: str) -> Response:
        """Return the answer to a generation request, whichever route it came by."""
        holder = contextlib.AsyncExitStack()
        started = time.monotonic()
        try:
            holder.enter_context(rates.held(getattr(http.state, "key", None)))
            await holder.enter_async_context(place())
            async with asyncio.timeout(config.request_timeout_s):
                request, job, warnings = await read_job(http, route)
                holder.enter_context(metrics.owed(await backend.facts(), job))
                events = backend.generate(job)
                holder.push_async_callback(events.aclose)
                first = await anext(events)  # Started: only now is it known that there is a place
            if not isinstance(first, Started):
                raise TypeError(f"A job begins with Started, got {type(first).__name__}.")
            warnings += first.warnings
            if request.stream:
                body = stream(events, http, job, warnings, started)
                return _EventStream(body, holder.pop_all(), config.limits.send_timeout_s)
            async with asyncio.timeout_at(_deadline(config, started)):
                pictures = [event async for event in events if isinstance(event, Picture) and event.partial is None]
            metrics.done(route, len(pictures), time.monotonic() - started)
            return JSONResponse(
                {
                    "created": int(time.time()),
                    "data": [{"b64_json": _b64(picture.data), "seed": picture.seed} for picture in pictures],
                    "size": _size(job),
                    "output_format": job.output_format,
                    "warnings": list(warnings),
                }
            )
        except TimeoutError:
            raise _timeout(config) from None
        finally:
            await holder.aclose()

    async def read_job(http: Request, route: str) -> tuple[Any, Job, tuple[str, ...]]:
        """Return the checked request, its job, and warnings about fields that will have no effect."""
        facts = await backend.facts()
        rules: Any = {"native_size": facts.native_size, "factor": facts.size_multiple, "limits": config.limits}
        if route == GENERATIONS:
            _content_type(http, "application/json")
            values = protocol.parse_json(await http.body())
            request, recipe = protocol.parse_request(GenerationRequest, values, **rules)
            text = request.image  # type: ignore[attr-defined]
            data = None if text is None else protocol.decode_base64(text, config.limits)
        else:
            _content_type(http, "multipart/form-data")
            async with http.form(max_files=4, max_fields=64) as form:
                values, file = protocol.form_fields(form.multi_items())
                request, recipe = protocol.parse_request(EditRequest, values, **rules)
                if file is None:
                    raise ApiError(
                        400, "image is missing: the reference sketch, a file.", param="image",
                        code="missing_required_parameter",
                    )  # fmt: skip
                data = await file.read()
        served = None
        if request.model not in (None, facts.model):
            served = await asyncio.to_thread(adapters.find, request.model)
            if served is None:
                raise ApiError(
                    404, f"There is no model {request.model[:100]!r} here: see /v1/models.", param="model",
                    code="model_not_found",
                )  # fmt: skip
        warnings: tuple[str, ...] = ()
        if data is not None:
            picture = await asyncio.to_thread(protocol.decode_reference, data, config.limits)
            recipe = dataclasses.replace(recipe, reference=picture)
        elif "adapter_scale" in request.model_fields_set:
            warnings = ("adapter_scale has no effect without an image.",)
        job = Job(
            recipe=recipe,
            adapter=served,
            output_format=request.output_format,
            output_compression=request.output_compression,
            partial_images=request.partial_images,
        )
        return request, job, warnings

    async def stream(
        events: AsyncGenerator[Event], http: Request, job: Job, warnings: tuple[str, ...], started: float
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events: previews, each finished picture, or an error that came after the first byte."""
        route, pictures, first = http.url.path, 0, True
        shared = {"size": _size(job), "output_format": job.output_format, "quality": "auto", "background": "opaque"}
        try:
            while True:
                async with asyncio.timeout_at(
                    _deadline(config, started)
                ):  # not around a yield: it would cancel the reader
                    event = await anext(events, None)
                if event is None:
                    break
                if not isinstance(event, Picture):
                    continue
                if first:
                    metrics.first.observe(time.monotonic() - started)
                    first = False
                data = {"b64_json": _b64(event.data), "seed": event.seed, "created_at": int(time.time()), **shared}
                if event.partial is not None:
                    yield _sse(f"{EVENTS[route]}.partial_image", {**data, "partial_image_index": event.partial})
                else:
                    pictures += 1
                    yield _sse(f"{EVENTS[route]}.completed", {**data, "warnings": list(warnings)})
            metrics.done(route, pictures, time.monotonic() - started)
        except TimeoutError:
            yield _sse("error", _timeout(config).body)
        except ApiError as error:
            yield _sse("error", error.body)
        except Exception:
            yield _sse("error", server_error(Headers(scope=http.scope)).body)

    @api.post(GENERATIONS, openapi_extra=_body("application/json", GenerationRequest), responses=_RESPONSES)
    async def generations(http: Request) -> Response:
        """Pictures for a prompt, and for a reference sketch when `image` holds one."""
        return await answer(http, GENERATIONS)

    @api.post(EDITS, openapi_extra=_body("multipart/form-data", EditRequest, file=True), responses=_RESPONSES)
    async def edits(http: Request) -> Response:
        """Pictures for a prompt and the reference sketch `image`, a file."""
        return await answer(http, EDITS)

    @api.get("/v1/models")
    async def models() -> Response:
        """The models of this server: adapters of one base."""
        facts = await backend.facts()
        names = [facts.model, *(name for name in await asyncio.to_thread(adapters.names) if name != facts.model)]
        model = {"object": "model", "created": 0, "owned_by": "animesketch", **_describe(facts)}
        return JSONResponse({"object": "list", "data": [{"id": name, **model} for name in names]})

    @api.get("/health")
    async def health() -> Response:
        """200 when pictures can be asked for, 503 when not. Needs no key."""
        try:
            async with asyncio.timeout(REPLY_S):
                trouble = await backend.trouble()
                if trouble is None:
                    await backend.facts()
        except TimeoutError:
            trouble = "No replica has answered yet."
        if trouble is not None:
            raise ApiError(503, trouble, type="server_error", code="unavailable")
        return JSONResponse({"status": "ok"})

    @api.get("/studio", include_in_schema=False)
    async def page() -> Response:
        """A page that draws by this API."""
        return studio()

    @api.get("/metrics")
    async def prometheus() -> Response:
        """Counters of this ingress replica, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    api.add_middleware(Gate, limits=config.limits, digests=digests, count=metrics.count)
    return api


class _EventStream(StreamingResponse):
    """Server-sent events that hold `holder` until they end.

    They end too when the client left before the first one, or takes longer than `send_timeout_s` to take one.
    """

    def __init__(self, events: AsyncIterator[bytes], holder: contextlib.AsyncExitStack, send_timeout_s: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._holder = holder
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None  # it is there, but reads nothing: no different for the others

        async with self._holder:
            await super().__call__(scope, receive, in_time)


class _Metrics:
    """Counters in a registry of their own, so that two apps in one process don't collide."""

    def __init__(self) -> None:
        self.active = 0
        self._owed, self._speed = 0.0, 0.0  # steps of a picture; and of them, what a replica takes in a second
        self.registry = CollectorRegistry()
        one: Any = {"registry": self.registry}
        self.responses = Counter("animesketch_http_responses", "Answers.", ["route", "status"], **one)
        self.refused = Counter("animesketch_http_refused", "Requests refused, by the error's code.", ["code"], **one)
        self.first = Histogram("animesketch_first_partial_seconds", "Time to a stream's first picture.", **one)
        self.pictures = Counter("animesketch_pictures", "Finished pictures.", ["route"], **one)
        self.seconds = Histogram("animesketch_request_seconds", "Time of finished requests.", ["route"], **one)
        self.in_progress = Gauge("animesketch_requests_in_progress", "Requests that hold a place.", **one)

    @contextlib.contextmanager
    def owed(self, facts: Facts, job: Job) -> Iterator[None]:
        """Count the steps of a job, in pictures of the native size, as under way while the block runs."""
        recipe, (width, height) = job.recipe, facts.native_size
        area = math.prod(recipe.size or facts.native_size) / (width * height)
        steps = recipe.n * recipe.num_inference_steps * area
        self._speed = facts.steps_per_second
        self._owed += steps
        try:
            yield
        finally:
            self._owed -= steps

    def drained_in(self, replicas: int) -> int | None:
        """Return the seconds in which what is under way will be done, 1 at least; None where nobody knows."""
        return max(1, math.ceil(self._owed / (self._speed * replicas))) if self._speed else None

    def count(self, path: str, status: int) -> None:
        known = path in (GENERATIONS, EDITS, "/v1/models", "/health", "/metrics")
        self.responses.labels(path if known else "other", str(status)).inc()

    def done(self, route: str, pictures: int, seconds: float) -> None:
        self.pictures.labels(route).inc(pictures)
        self.seconds.labels(route).observe(seconds)


def _deadline(config: ServingConfig, started: float) -> float:
    return asyncio.get_running_loop().time() + config.request_timeout_s - (time.monotonic() - started)


def _content_type(http: Request, wanted: str) -> None:
    got = http.headers.get("content-type", "")
    if got.partition(";")[0].strip().lower() != wanted:
        raise ApiError(400, f"Content-Type must be {wanted}, got {got[:100]!r}.", code="unsupported_content_type")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _size(job: Job) -> str:
    width, height = job.recipe.size or (0, 0)
    return f"{width}x{height}"


def _describe(facts: Facts) -> dict[str, Any]:
    return {
        "base": facts.base,
        "base_weights_hash": facts.base_weights_hash,
        "native_size": "{}x{}".format(*facts.native_size),
        "random_weights": facts.random_weights,
    }


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def _timeout(config: ServingConfig) -> ApiError:
    message = f"No result within {config.request_timeout_s:g} seconds, waiting included. Try again, or ask for less."
    return ApiError(503, message, type="server_error", code="timeout", headers=_retry_after(config))


def _retry_after(config: ServingConfig) -> dict[str, str]:
    return {"Retry-After": str(config.retry_after_s)}


async def _http_error(http: Request, error: Exception) -> Response:
    """Turn FastAPI's own refusals (unknown path, method, malformed form) into the error object."""
    assert isinstance(error, HTTPException)
    path = http.url.path[:200]
    messages = {404: f"There is no {path} here.", 405: f"{http.method} is not allowed on {path}."}
    answer = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)[:500]))
    return JSONResponse(answer.body, error.status_code, headers=error.headers)


def _body(content_type: str, model: type, *, file: bool = False) -> dict[str, Any]:
    """Return the OpenAPI entry of a body that the route parses itself."""
    schema = model.model_json_schema()  # type: ignore[attr-defined]
    if file:
        schema["properties"]["image"] = {"type": "string", "format": "binary", "description": "Reference sketch."}
        schema["required"] = [*schema["required"], "image"]
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": protocol.ImagesResponse},
    **{
        status: {"model": protocol.ErrorResponse, "description": text}
        for status, text in {
            400: "A field is wrong; `param` names it",
            401: "No or a wrong key",
            413: "The body is too large",
            429: "Every place is taken; `Retry-After` says when to try again",
            500: "The server failed",
            503: "No replica, or no result in time",
        }.items()
    },
}
