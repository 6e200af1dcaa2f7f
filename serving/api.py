"""The HTTP interface as a FastAPI app over a backend: a Ray Serve handle in production, a Worker in tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

from fastapi import FastAPI, Request, Security
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

from serving import openapi, protocol
from serving.adapters import Adapters, Served
from serving.config import ServingConfig
from serving.connection import EventStream, while_there
from serving.gate import Gate, server_error
from serving.metrics import Metrics
from serving.page import studio
from serving.protocol import ApiError, Busy, EditRequest, GenerationRequest
from serving.rates import Rates
from serving.recipe import Recipe
from serving.worker import Event, Facts, Job, Picture, Started

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ROUTES = (GENERATIONS, EDITS, "/v1/models", "/health", "/metrics")  # counted by name
EVENTS = {GENERATIONS: "image_generation", EDITS: "image_edit"}  # OpenAI's names of streamed events
REPLY_S = 5.0  # how long a first word of a replica is waited for, and for the state of all


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


def create_api(
    config: ServingConfig, backend: Backend, digests: frozenset[str] | None, *, request_ids: bool = True
) -> FastAPI:
    """Return the app: routes of contract 3, every error as OpenAI's error object.

    `digests` are those of the allowed keys (`serving/keys.py`); None asks for none. `request_ids` puts the header
    X-Request-ID into every answer; False behind Serve, whose proxy does it.
    """
    metrics, adapters = Metrics(ROUTES), Adapters(config.adapter_folder)
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
        metrics.refuse(error)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def refused(http: Request, error: Exception) -> Response:
        """Turn FastAPI's own refusals (unknown path, method, malformed form) into the error object."""
        assert isinstance(error, HTTPException)
        path = http.scope["path"][:200]
        messages = {404: f"There is no {path} here.", 405: f"{http.method} is not allowed on {path}."}
        message = messages.get(error.status_code, str(error.detail)[:500])
        headers = dict(error.headers or {})
        return await told(http, ApiError(error.status_code, message, headers=headers))

    api = FastAPIOffline(  # /docs without scripts of another host
        title="AnimeSketch",
        description="Pictures in the style and content of a sketch. OpenAI Images is the dialect.",
        redoc_url=None,
        exception_handlers={ApiError: told, Busy: busy, HTTPException: refused},
    )

    bearer = HTTPBearer(auto_error=False, description="A key of the server's key file.")  # for /docs: the gate checks
    locked = [] if digests is None else [Security(bearer)]
    refusals = (400, 401, 403, 413, 500, 503)

    async def known() -> Facts:
        try:
            async with asyncio.timeout(REPLY_S):
                return await backend.facts()
        except TimeoutError:
            message, headers = "No replica has answered yet. Try again.", _retry_after(config)
            raise ApiError(503, message, type="server_error", code="unavailable", headers=headers) from None

    def look_for_place() -> None:
        if metrics.active >= config.max_requests:
            raise Busy

    @contextlib.contextmanager
    def place() -> Iterator[None]:
        """Hold one of the places."""
        look_for_place()
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
            look_for_place()  # before a byte of the body is read; it is not kept for who sends it slowly
            holder.enter_context(rates.held(getattr(http.state, "key", None)))
            async with asyncio.timeout(config.request_timeout_s):
                facts = await known()
                request, recipe, data = await read_request(http, route, facts)
                holder.enter_context(place())
                job, warnings = await to_job(request, recipe, data, facts)
                holder.enter_context(metrics.owed(facts, job, config.min_replicas, config.request_timeout_s))
                events = backend.generate(job)
                holder.push_async_callback(events.aclose)
                # Started: only now is it known that there is a place
                first: Event = await while_there(http, anext(events))  # type: ignore[arg-type]
            if not isinstance(first, Started):
                raise TypeError(f"A job begins with Started, got {type(first).__name__}.")
            warnings += first.warnings
            if request.stream:
                body = stream(events, http, route, job, warnings, started)
                return EventStream(body, holder.pop_all(), config.limits.send_timeout_s)
            async with asyncio.timeout_at(_deadline(config, started)):
                pictures = await while_there(http, _finished(events))
            for picture in pictures:
                metrics.drawn(route, picture)
            metrics.done(route, time.monotonic() - started)
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

    async def read_request(http: Request, route: str, facts: Facts) -> tuple[Any, Recipe, bytes | None]:
        """Return the checked request, its recipe without the reference, and the reference's file if there is one."""
        rules: Any = {"native_size": facts.native_size, "factor": facts.size_multiple, "limits": config.limits}
        if route == GENERATIONS:
            _content_type(http, "application/json")
            values = protocol.parse_json(await http.body(), config.limits)
            request, recipe = protocol.parse_request(GenerationRequest, values, **rules)
            text = request.image  # type: ignore[attr-defined]
            return request, recipe, None if text is None else protocol.decode_base64(text, config.limits)
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

    async def to_job(request: Any, recipe: Recipe, data: bytes | None, facts: Facts) -> tuple[Job, tuple[str, ...]]:
        """Return the job of a request, and warnings about fields that will have no effect."""
        served = None if request.model is None else await find_model(request.model, facts)
        warnings: tuple[str, ...] = ()
        if data is not None:
            picture = await asyncio.to_thread(protocol.decode_reference, data, config.limits)
            recipe = dataclasses.replace(recipe, reference=picture)
            await asyncio.to_thread(getattr, recipe, "reference_sha256")  # it goes with the recipe to the replica
        elif "adapter_scale" in request.model_fields_set:
            warnings = ("adapter_scale has no effect without an image.",)
        job = Job(
            recipe=recipe,
            adapter=served,
            output_format=request.output_format,
            output_compression=request.output_compression,
            partial_images=request.partial_images,
        )
        return job, warnings

    async def find_model(name: str, facts: Facts) -> Served | None:
        """Return the adapter of the folder that `name` means; None for the server's own. ApiError 404 for neither."""
        if name == facts.model:
            return None
        served = await asyncio.to_thread(adapters.find, name)
        if served is None:
            message = f"There is no model {name[:100]!r} here: see /v1/models."
            raise ApiError(404, message, param="model", code="model_not_found")
        return served

    async def stream(
        events: AsyncGenerator[Event], http: Request, route: str, job: Job, warnings: tuple[str, ...], started: float
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events: previews, each finished picture, or an error that came after the first byte."""
        first = True
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
                    metrics.drawn(route, event)
                    yield _sse(f"{EVENTS[route]}.completed", {**data, "warnings": list(warnings)})
            metrics.done(route, time.monotonic() - started)
        except TimeoutError:
            yield failed(_timeout(config))
        except ApiError as error:
            yield failed(error)
        except Exception:
            yield failed(server_error(http.scope))

    def failed(error: ApiError) -> bytes:
        metrics.refuse(error)
        return _sse("error", error.body)

    body = openapi.json_body(GenerationRequest, config.limits)

    @api.post(GENERATIONS, openapi_extra=body, responses=openapi.pictures(), dependencies=locked)
    async def generations(http: Request) -> Response:
        """Pictures for a prompt, and for a reference sketch when `image` holds one."""
        return await answer(http, GENERATIONS)

    form = openapi.form_body(EditRequest, config.limits)

    @api.post(EDITS, openapi_extra=form, responses=openapi.pictures(), dependencies=locked)
    async def edits(http: Request) -> Response:
        """Pictures for a prompt and the reference sketch `image`, a file."""
        return await answer(http, EDITS)

    @api.get("/v1/models", responses=openapi.responses(protocol.ModelList, *refusals), dependencies=locked)
    async def models() -> Response:
        """The models of this server: adapters of one base."""
        facts = await known()
        names = [facts.model, *(name for name in await asyncio.to_thread(adapters.names) if name != facts.model)]
        return JSONResponse({"object": "list", "data": [_model(name, facts) for name in names]})

    @api.get("/v1/models/{model}", responses=openapi.responses(protocol.Model, 404, *refusals), dependencies=locked)
    async def model(model: str) -> Response:
        """One model of this server."""
        facts = await known()
        await find_model(model, facts)
        return JSONResponse(_model(model, facts))

    @api.get("/health", responses=openapi.responses(protocol.Health, 400, 413, 500, 503))
    async def health() -> Response:
        """200 when pictures can be asked for, 503 when not. Needs no key."""
        try:
            async with asyncio.timeout(REPLY_S):
                trouble = await backend.trouble()
        except TimeoutError:
            trouble = "Serve's controller does not answer."
        if trouble is not None:
            raise ApiError(503, trouble, type="server_error", code="unavailable")
        return JSONResponse({"status": "ok"})

    @api.get("/", include_in_schema=False)
    async def start() -> Response:
        """The way to the studio, for who opens the server's address."""
        return RedirectResponse("studio")

    @api.get("/studio", include_in_schema=False)
    async def page() -> Response:
        """A page that draws by this API."""
        return studio()

    @api.get("/metrics", response_class=PlainTextResponse, responses=openapi.text(*refusals), dependencies=locked)
    async def prometheus() -> Response:
        """Counters of this ingress replica, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    api.add_middleware(Gate, limits=config.limits, digests=digests, metrics=metrics, request_ids=request_ids)
    return api


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


def _model(name: str, facts: Facts) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "animesketch",
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
