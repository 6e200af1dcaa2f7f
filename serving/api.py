"""The HTTP interface as a FastAPI app over a backend: a Ray Serve handle in production, a Worker in tests."""

from __future__ import annotations

from enum import Enum
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from serving import openapi, protocol
from serving.answers import EDITS, GENERATIONS, Answers, Backend
from serving.config import ServingConfig
from serving.gate import Gate
from serving.job import Facts
from serving.metrics import Metrics
from serving.page import studio
from serving.protocol import ApiError, Busy, EditRequest, GenerationRequest

DRAW: list[str | Enum] = ["pictures"]  # headings of /docs
LIST: list[str | Enum] = ["models"]
STATE: list[str | Enum] = ["state"]
ROUTES = (GENERATIONS, EDITS, "/v1/models", "/health", "/metrics")  # counted by name


def create_api(
    config: ServingConfig, backend: Backend, digests: frozenset[str] | None, *, request_ids: bool = True
) -> FastAPI:
    """Return the app: routes of contract 3, every error as OpenAI's error object.

    `digests` are those of the allowed keys (`serving/keys.py`); None asks for none. `request_ids` puts the header
    X-Request-ID into every answer; False behind Serve, whose proxy does it.
    """
    metrics = Metrics(ROUTES)
    answers = Answers(config, backend, metrics)

    async def busy(http: Request, error: Exception) -> Response:
        """Answer 429: at once, so that a client can wait or go elsewhere."""
        wait = answers.drained_in() or config.retry_after_s
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
    body = openapi.json_body(GenerationRequest, config.limits)

    @api.post(GENERATIONS, tags=DRAW, openapi_extra=body, responses=openapi.pictures(), dependencies=locked)
    async def generations(http: Request) -> Response:
        """Pictures for a prompt, and for a reference sketch when `image` holds one."""
        return await answers.answer(http, GENERATIONS)

    form = openapi.form_body(EditRequest, config.limits)

    @api.post(EDITS, tags=DRAW, openapi_extra=form, responses=openapi.pictures(), dependencies=locked)
    async def edits(http: Request) -> Response:
        """Pictures for a prompt and the reference sketch `image`, a file."""
        return await answers.answer(http, EDITS)

    @api.get("/v1/models", tags=LIST, responses=openapi.responses(protocol.ModelList, *refusals), dependencies=locked)
    async def models() -> Response:
        """The models of this server: adapters of one base."""
        facts = await answers.facts()
        return JSONResponse({"object": "list", "data": [_model(name, facts) for name in await answers.models(facts)]})

    one = openapi.responses(protocol.Model, 404, *refusals)
    name: Any = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}

    # the name is taken from the request: as an argument, FastAPI would document an answer of 422 that never comes
    @api.get(
        "/v1/models/{model:path}", tags=LIST, openapi_extra={"parameters": [name]}, responses=one, dependencies=locked
    )
    async def one_model(http: Request) -> Response:
        """One model of this server."""
        facts, model = await answers.facts(), http.path_params["model"]
        await answers.find_model(model, facts)
        return JSONResponse(_model(model, facts))

    @api.get("/health", tags=STATE, responses=openapi.responses(protocol.Health, 400, 413, 500, 503))
    async def health() -> Response:
        """200 when pictures can be asked for, 503 when not. Needs no key."""
        trouble = await backend.trouble()
        if trouble is not None:
            raise ApiError(503, trouble, type="server_error", code="unavailable")
        return JSONResponse({"status": "ok"})

    @api.head("/health", include_in_schema=False)
    async def health_alone() -> Response:
        """The status of /health, for who asks for no more."""
        await health()
        return Response()

    @api.get("/", include_in_schema=False)
    async def start(http: Request) -> Response:
        """The way to the studio, for who opens the server's address."""
        return RedirectResponse(http.scope.get("root_path", "") + "/studio")

    @api.get("/studio", include_in_schema=False)
    async def page() -> Response:
        """A page that draws by this API."""
        return studio()

    @api.get(
        "/metrics", tags=STATE, response_class=PlainTextResponse, responses=openapi.text(*refusals), dependencies=locked
    )
    async def prometheus() -> Response:
        """Counters of this ingress replica, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    api.add_middleware(Gate, limits=config.limits, digests=digests, metrics=metrics, request_ids=request_ids)
    return api


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
