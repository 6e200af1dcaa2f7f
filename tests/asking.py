"""Requests to the HTTP interface over a backend without models, and the errors it answers with."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from itertools import product
from typing import Any

import httpx
import uvicorn
from PIL import Image

from serving.answers import Backend
from serving.api import create_api
from serving.config import Limits, ServingConfig
from serving.job import Event, Facts, Job, Picture, Started
from serving.pictures import read_picture, write_picture
from serving.protocol import ApiError, Busy
from serving.worker import Worker

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(max_body_bytes=60_000, max_image_bytes=30_000, max_image_pixels=10_000, max_prompt_chars=500)
CONFIG = ServingConfig(adapter="/a", limits=LIMITS, max_queued_requests=1, max_ongoing_requests=1, request_timeout_s=5)


class FakeBackend:
    """Answers with flat pictures; keeps the jobs it got. `hold` makes a job wait, `fail` makes it raise.

    It fails before its first picture, or after `fail_after` of them.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.hold: asyncio.Event | None = None
        self.fail: Exception | None = None
        self.fail_after = 0
        self.noise = False  # in place of one colour
        self.down: str | None = None
        self.closed = 0
        self.speed, self.running = 0.0, 1

    async def facts(self) -> Facts:
        return Facts(
            model="animesketch", base="twin", base_weights_hash="ab", native_size=(64, 64), size_multiple=8,
            random_weights=False, steps_per_second=self.speed,
        )  # fmt: skip

    async def trouble(self) -> str | None:
        return self.down

    def replicas(self) -> int:
        return self.running

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        self.jobs.append(job)
        try:
            if isinstance(self.fail, (Busy, ApiError)):
                raise self.fail
            if job.reference is not None:
                read_picture(job.reference)
            yield Started(warnings=("told by the replica",))
            if self.hold is not None:
                await self.hold.wait()
            for number, (partial, i) in enumerate(product([*range(job.partial_images), None], range(job.recipe.n))):
                if self.fail is not None and number >= self.fail_after:
                    raise self.fail
                size, seed = job.recipe.size or (1, 1), job.recipe.seed + i
                image = (Image.effect_noise(size, 50) if self.noise else Image.new("RGB", size, (i, 0, 0))).convert(
                    "RGB"
                )
                data = write_picture(image, job.output_format, job.output_compression, {"seed": seed})
                steps = job.recipe.num_inference_steps if partial is None else 0
                yield Picture(data=data, seed=seed, partial=partial, steps=steps, share=steps / 4, seconds=steps / 40)
        finally:
            self.closed += 1


class EngineBackend:
    """A real engine, as a replica has it, without Serve: with the adapters of a folder too."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.loaded: set[str] = set()

    async def facts(self) -> Facts:
        return self.worker.facts()

    async def trouble(self) -> str | None:
        return None

    def replicas(self) -> int:
        return 1

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        if job.adapter is not None and job.adapter.id not in self.loaded:
            await self.worker.add_adapter(job.adapter)
            self.loaded.add(job.adapter.id)
        async with aclosing(self.worker.generate(job)) as events:
            async for event in events:
                yield event


@contextmanager
def listening(
    backend: Backend, config: ServingConfig = CONFIG, digests: frozenset[str] | None = None, http: str = "httptools"
) -> Iterator[int]:
    """A port of 127.0.0.1 where the interface is served by uvicorn, as Serve's proxy does, with that HTTP parser."""
    how: Any = {"log_level": "critical", "lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(
        uvicorn.Config(create_api(config, backend, digests), host="127.0.0.1", port=0, http=http, **how)  # type: ignore[arg-type]
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@asynccontextmanager
async def client(
    backend: FakeBackend, config: ServingConfig = CONFIG, digests: frozenset[str] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(config, backend, digests))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield http


def ask(method: str, path: str, *, backend: FakeBackend | None = None, **how: Any) -> httpx.Response:
    """Return the answer to one request; `config` and `digests` are the app's, the rest is httpx's."""
    app = {key: how.pop(key) for key in ("config", "digests") if key in how}

    async def main() -> httpx.Response:
        async with client(backend or FakeBackend(), **app) as http:
            return await http.request(method, path, **how)

    return asyncio.run(main())


def picture(format: str = "PNG", size: tuple[int, int] = (20, 10), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format, **options)
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def huge_header() -> bytes:
    """A PNG of 60,000 x 60,000 pixels by its header, 100 bytes long."""
    chunk = b"IHDR" + (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)


GOOD: dict[str, Any] = {"prompt": "a girl"}


def check_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> dict:
    """Assert status and OpenAI's error object, and return it."""
    assert response.status_code == status, response.text[:300]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    assert code is None or body["error"]["code"] == code, body
    assert 5 < len(body["error"]["message"]) < 700
    return body["error"]
