"""The way of a request for pictures: read, given a place, drawn by the backend, and answered as JSON or as events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from python_multipart.multipart import parse_options_header

from serving import protocol
from serving.adapters import Adapters, Served
from serving.config import ServingConfig
from serving.connection import EventStream, while_there
from serving.gate import server_error
from serving.job import Event, Facts, Job, Picture, Started
from serving.metrics import Metrics
from serving.pictures import BadPicture
from serving.protocol import ApiError, Busy, EditRequest, GenerationRequest
from serving.rates import Rates
from serving.recipe import Recipe

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
EVENTS = {GENERATIONS: "image_generation", EDITS: "image_edit"}  # OpenAI's names of streamed events
REPLY_S = 5.0  # how long a first word of a replica is waited for


class Backend(Protocol):
    """Where jobs run."""

    async def facts(self) -> Facts:
        """Return what the server is; waits for the first replica."""
        ...

    async def trouble(self) -> str | None:
        """Return why jobs can't run now, None when they can."""
        ...

    def replicas(self) -> int:
        """Return how many replicas run, as far as is known."""
        ...

    def generate(self, job: Job) -> AsyncGenerator[Event]:
        """Yield the events of a job; closing the iterator gives it up.

        Busy when there is no place for it, BadPicture when its reference can't be decoded.
        """
        ...


class Answers:
    """The answers of the two routes that draw, for one ingress, and what there is to draw with."""

    def __init__(self, config: ServingConfig, backend: Backend, metrics: Metrics) -> None:
        self._config, self._backend, self._metrics = config, backend, metrics
        self._adapters = Adapters(config.adapter_folder)
        limits = config.limits
        self._rates = Rates(concurrent=limits.max_concurrent_per_key, per_minute=limits.max_per_minute_per_key)

    async def facts(self) -> Facts:
        """Return what the server is. ApiError 503 when no replica says so within REPLY_S."""
        try:
            async with asyncio.timeout(REPLY_S):
                return await self._backend.facts()
        except TimeoutError:
            message, headers = "No replica has answered yet. Try again.", _retry_after(self._config)
            raise ApiError(503, message, type="server_error", code="unavailable", headers=headers) from None

    def drained_in(self) -> int | None:
        """Return the seconds in which what is under way here will be done; None where nobody knows."""
        return self._metrics.drained_in(max(1, self._backend.replicas()) / self._config.ingress_replicas)

    def _bounds(self) -> tuple[float, float, float]:
        """Return what this ingress has a share in: replicas, their seconds a request, and requests that may always try.

        Where the autoscaler may start one more replica it is counted, and so many may try that it does.
        """
        config, running, few = self._config, max(1, self._backend.replicas()), 1.0
        if running < config.max_replicas:
            few += running * config.target_ongoing_requests
            running += 1
        return running / config.ingress_replicas, config.request_timeout_s, few / config.ingress_replicas

    async def models(self, facts: Facts) -> list[str]:
        """Return the names of all models, the server's own first."""
        names = await asyncio.to_thread(self._adapters.names)
        return [facts.model, *(name for name in names if name != facts.model)]

    async def find_model(self, name: str, facts: Facts) -> Served | None:
        """Return the adapter of the folder that `name` means; None for the server's own. ApiError 404 for neither."""
        if name == facts.model:
            return None
        served = await asyncio.to_thread(self._adapters.find, name)
        if served is None:
            message = f"There is no model {name[:100]!r} here: see /v1/models."
            raise ApiError(404, message, param="model", code="model_not_found")
        return served

    async def answer(self, http: Request, route: str) -> Response:
        """Return the answer to a request for pictures, whichever route it came by. ApiError and Busy refuse it."""
        holder = contextlib.AsyncExitStack()
        started = time.monotonic()
        try:
            if self._no_place() or self._metrics.full(*self._bounds()):
                raise Busy  # before a byte of the body is read; a place is not kept for who sends it slowly
            holder.enter_context(self._rates.held(getattr(http.state, "key", None)))
            async with asyncio.timeout(self._config.request_timeout_s):
                facts = await self.facts()
                request, recipe, data = await self._read_request(http, route, facts)
                holder.enter_context(self._place())
                job, warnings = await self._to_job(request, recipe, data, facts)
                holder.enter_context(self._metrics.owed(facts, job, *self._bounds()))
                events = self._backend.generate(job)
                holder.push_async_callback(events.aclose)
                # Started: only now is it known that there is a place
                first: Event = await while_there(http, anext(events))  # type: ignore[arg-type]
            if not isinstance(first, Started):
                raise TypeError(f"A job begins with Started, got {type(first).__name__}.")
            warnings += first.warnings
            if request.stream:
                body = self._stream(events, http, route, job, warnings, started)
                return EventStream(body, holder.pop_all(), self._config.limits.send_timeout_s)
            async with asyncio.timeout_at(_deadline(self._config, started)):
                pictures = await while_there(http, _finished(events))
            for picture in pictures:
                self._metrics.drawn(route, picture)
            self._metrics.done(route, time.monotonic() - started)
            return JSONResponse(
                {
                    "created": int(time.time()),
                    "data": [{"b64_json": _b64(picture.data), "seed": picture.seed} for picture in pictures],
                    "size": _size(job),
                    "output_format": job.output_format,
                    "warnings": list(warnings),
                }
            )
        except BadPicture as error:
            raise protocol.bad_reference(error) from None
        except TimeoutError:
            raise _timeout(self._config) from None
        finally:
            await holder.aclose()

    def _no_place(self) -> bool:
        return self._metrics.active >= self._config.max_requests

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places."""
        if self._no_place():
            raise Busy
        self._metrics.active += 1
        self._metrics.in_progress.set(self._metrics.active)
        try:
            yield
        finally:
            self._metrics.active -= 1
            self._metrics.in_progress.set(self._metrics.active)

    async def _read_request(self, http: Request, route: str, facts: Facts) -> tuple[Any, Recipe, bytes | None]:
        """Return the checked request, its recipe without the reference, and the reference's file if there is one."""
        rules: Any = {"native_size": facts.native_size, "factor": facts.size_multiple, "limits": self._config.limits}
        if route == GENERATIONS:
            _content_type(http, "application/json")
            body = b"".join([chunk async for chunk in http.stream()])  # http.body() would keep it for the whole request
            request: Any
            request, recipe = protocol.parse_request(
                GenerationRequest, protocol.parse_json(body, self._config.limits), **rules
            )
            text, request.image = request.image, None
            return request, recipe, None if text is None else protocol.decode_base64(text, self._config.limits)
        _content_type(http, "multipart/form-data")
        _utf8(http)
        async with http.form(max_files=4, max_fields=64) as form:
            values, file = protocol.form_fields(form.multi_items())
            request, recipe = protocol.parse_request(EditRequest, values, **rules)
            if file is None:
                raise ApiError(
                    400, "image is missing: the reference sketch, a file.", param="image",
                    code="missing_required_parameter",
                )  # fmt: skip
            return request, recipe, await file.read()

    async def _to_job(
        self, request: Any, recipe: Recipe, data: bytes | None, facts: Facts
    ) -> tuple[Job, tuple[str, ...]]:
        """Return the job of a request, and warnings about fields that will have no effect."""
        served = None if request.model is None else await self.find_model(request.model, facts)
        warnings: tuple[str, ...] = ()
        if data is not None:
            await asyncio.to_thread(protocol.check_reference, data, self._config.limits)  # headers can be long
        elif "adapter_scale" in request.model_fields_set:
            warnings = ("adapter_scale has no effect without an image.",)
        job = Job(
            recipe=recipe,
            reference=data,
            adapter=served,
            output_format=request.output_format,
            output_compression=request.output_compression,
            partial_images=request.partial_images,
        )
        return job, warnings

    async def _stream(
        self,
        events: AsyncGenerator[Event],
        http: Request,
        route: str,
        job: Job,
        warnings: tuple[str, ...],
        started: float,
    ) -> AsyncGenerator[bytes]:
        """Yield server-sent events: previews, each finished picture, or an error that came after the first byte."""
        first = True
        shared = {"size": _size(job), "output_format": job.output_format, "quality": "auto", "background": "opaque"}
        try:
            while True:
                async with asyncio.timeout_at(_deadline(self._config, started)):  # no yield in it: that cancels readers
                    event = await anext(events, None)
                if event is None:
                    break
                if not isinstance(event, Picture):
                    continue
                if first:
                    self._metrics.first.observe(time.monotonic() - started)
                    first = False
                data = {"b64_json": _b64(event.data), "seed": event.seed, "created_at": int(time.time()), **shared}
                if event.partial is not None:
                    yield _sse(f"{EVENTS[route]}.partial_image", {**data, "partial_image_index": event.partial})
                else:
                    self._metrics.drawn(route, event)
                    yield _sse(f"{EVENTS[route]}.completed", {**data, "warnings": list(warnings)})
            self._metrics.done(route, time.monotonic() - started)
        except TimeoutError:
            yield self._failed(_timeout(self._config))
        except ApiError as error:
            yield self._failed(error)
        except Exception:
            yield self._failed(server_error(http.scope))

    def _failed(self, error: ApiError) -> bytes:
        self._metrics.refuse(error)
        return _sse("error", error.body)


def _deadline(config: ServingConfig, started: float) -> float:
    return asyncio.get_running_loop().time() + config.request_timeout_s - (time.monotonic() - started)


def _content_type(http: Request, wanted: str) -> None:
    got = http.headers.get("content-type", "")
    if got.partition(";")[0].strip().lower() != wanted:
        raise ApiError(400, f"Content-Type must be {wanted}, got {got[:100]!r}.", code="unsupported_content_type")


def _utf8(http: Request) -> None:
    """Refuse a form in another encoding: Python has some that take hours, and some that are none of text."""
    _, options = parse_options_header(http.headers["content-type"])  # as the form's parser reads it
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise ApiError(400, f"A form must be UTF-8, got charset {charset[:50]!r}.", code="unsupported_charset")


async def _finished(events: AsyncGenerator[Event]) -> list[Picture]:
    return [event async for event in events if isinstance(event, Picture) and event.partial is None]


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _size(job: Job) -> str:
    width, height = job.recipe.size or (0, 0)
    return f"{width}x{height}"


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def _timeout(config: ServingConfig) -> ApiError:
    message = f"No result within {config.request_timeout_s:g} seconds, waiting included. Try again, or ask for less."
    return ApiError(503, message, type="server_error", code="timeout", headers=_retry_after(config))


def _retry_after(config: ServingConfig) -> dict[str, str]:
    return {"Retry-After": str(config.retry_after_s)}
