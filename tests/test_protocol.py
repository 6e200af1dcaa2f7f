"""The HTTP interface over a backend without models: what is refused, how it is said, and what gets through."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.api import create_api
from serving.config import Limits, ServingConfig
from serving.engine import MAX_SEED
from serving.keys import allowed, load_keys
from serving.pictures import BadPicture, read_picture, read_recipe, write_picture
from serving.protocol import ApiError, Busy
from serving.worker import Event, Facts, Job, Picture, Started

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(max_body_bytes=60_000, max_image_bytes=30_000, max_image_pixels=10_000, max_prompt_chars=500)
CONFIG = ServingConfig(adapter="/a", limits=LIMITS, max_queued_requests=1, max_ongoing_requests=1, request_timeout_s=5)


class FakeBackend:
    """Answers with flat pictures; keeps the jobs it got. `hold` makes a job wait, `fail` makes it raise."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.hold: asyncio.Event | None = None
        self.fail: Exception | None = None
        self.down: str | None = None
        self.closed = 0

    async def facts(self) -> Facts:
        return Facts(
            model="animesketch", base="twin", base_weights_hash="ab", native_size=(64, 64), size_multiple=8,
            random_weights=False,
        )  # fmt: skip

    async def trouble(self) -> str | None:
        return self.down

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        self.jobs.append(job)
        try:
            if isinstance(self.fail, (Busy, ApiError)):
                raise self.fail
            yield Started(warnings=("told by the replica",))
            if self.hold is not None:
                await self.hold.wait()
            if self.fail is not None:
                raise self.fail
            for partial in [*range(job.partial_images), None]:
                for i in range(job.recipe.n):
                    image = Image.new("RGB", job.recipe.size or (1, 1), (i, 0, 0))
                    data = write_picture(
                        image, job.output_format, job.output_compression, {"seed": job.recipe.seed + i}
                    )
                    yield Picture(data=data, seed=job.recipe.seed + i, partial=partial)
        finally:
            self.closed += 1


@asynccontextmanager
async def client(
    backend: FakeBackend, config: ServingConfig = CONFIG, digests: frozenset[str] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(config, backend, digests))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
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
BAD_FIELDS = [
    # field, value, code
    ("prompt", 7, "invalid_value"),
    ("prompt", ["a"], "invalid_value"),
    ("prompt", "a" * 501, "invalid_value"),
    ("prompt", "a\0b", "invalid_value"),
    ("n", 0, "invalid_value"),
    ("n", 5, "invalid_value"),
    ("n", 1.5, "invalid_value"),
    ("n", "1", "invalid_value"),
    ("n", True, "invalid_value"),
    ("n", 10**400, "invalid_value"),
    ("size", "65x64", "invalid_value"),
    ("size", "56x64", "invalid_value"),
    ("size", "1032x64", "invalid_value"),
    ("size", "0x0", "invalid_value"),
    ("size", "-64x64", "invalid_value"),
    ("size", "64x64x64", "invalid_value"),
    ("size", "64", "invalid_value"),
    ("size", "٦٤x64", "invalid_value"),
    ("size", "9" * 5000 + "x64", "invalid_value"),
    ("size", [64, 64], "invalid_value"),
    ("response_format", "url", "invalid_value"),
    ("output_format", "gif", "invalid_value"),
    ("output_compression", 101, "invalid_value"),
    ("output_compression", -1, "invalid_value"),
    ("stream", "true", "invalid_value"),
    ("partial_images", 4, "invalid_value"),
    ("partial_images", 1, "invalid_value"),  # without stream
    ("user", "u" * 513, "invalid_value"),
    ("negative_prompt", "b" * 501, "invalid_value"),
    ("num_inference_steps", 0, "invalid_value"),
    ("num_inference_steps", 201, "invalid_value"),
    ("num_inference_steps", 10.5, "invalid_value"),
    ("guidance_scale", -1, "invalid_value"),
    ("guidance_scale", 31, "invalid_value"),
    ("guidance_scale", "7", "invalid_value"),
    ("adapter_scale", -0.1, "invalid_value"),
    ("adapter_scale", 2.1, "invalid_value"),
    ("seed", -1, "invalid_value"),
    ("seed", 2**63, "invalid_value"),
    ("seed", 1.5, "invalid_value"),
    ("image", "https://example.org/a.png", "invalid_value"),
    ("image", "data:image/png;base64," + b64(picture()), "invalid_value"),
    ("image", "not base64!", "invalid_value"),
    ("image", b64(b"not a picture"), "invalid_value"),
    ("image", b64(picture("GIF")), "invalid_value"),
    ("image", b64(picture("BMP")), "invalid_value"),
    ("image", b64(picture(size=(101, 100))), "invalid_value"),
    ("image", b64(huge_header()), "invalid_value"),
    ("image", b64(picture("JPEG", (90, 90))[:300]), "invalid_value"),
    ("image", "A" * 40_004, "invalid_value"),
    ("image", "", "invalid_value"),
    ("image", {"url": "x"}, "invalid_value"),
    ("quality", "high", "unsupported_parameter"),
    ("style", "vivid", "unsupported_parameter"),
    ("background", "transparent", "unsupported_parameter"),
    ("moderation", None, "unsupported_parameter"),
    ("mask", "x", "unsupported_parameter"),
    ("input_fidelity", "high", "unsupported_parameter"),
    ("steps", 20, "unknown_parameter"),
    ("Prompt", "x", "unknown_parameter"),
]


def _name(value: Any) -> str:
    return str(value)[:24]


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


@pytest.mark.parametrize(("field", "value", "code"), BAD_FIELDS, ids=_name)
def test_a_bad_field_is_named(field: str, value: Any, code: str) -> None:
    backend = FakeBackend()
    response = ask("POST", GENERATIONS, backend=backend, json={**GOOD, field: value})
    check_error(response, 400, field, code)
    assert not backend.jobs


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b"null", None, "invalid_json"),
        (b"\xff\xfe{}", None, "invalid_json"),
        (b'{"prompt": "a", "guidance_scale": NaN}', None, "invalid_json"),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', None, "invalid_json"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale", "invalid_value"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None, "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt", "duplicate_parameter"),
        (b'{"prompt": "\\ud800"}', "prompt", "invalid_value"),
        (b"[" * 10_000 + b"]" * 10_000, None, "invalid_json"),
        (b'{"prompt":' * 5000 + b"1" + b"}" * 5000, None, "invalid_json"),
        (b"{}", "prompt", "missing_required_parameter"),
        (b'{"prompt": null}', "prompt", "missing_required_parameter"),
    ],
    ids=_name,
)
def test_a_bad_json_body_is_refused(body: bytes, param: str | None, code: str) -> None:
    check_error(ask("POST", GENERATIONS, content=body, headers=JSON), 400, param, code)


def test_other_refusals_of_the_interface() -> None:
    check_error(ask("GET", "/v1/images/generation"), 404)
    check_error(ask("GET", GENERATIONS), 405)
    check_error(ask("POST", "/health"), 405)
    check_error(ask("POST", GENERATIONS, content=b"a=b"), 400, None, "unsupported_content_type")
    check_error(ask("POST", GENERATIONS, data={"prompt": "a"}), 400, None, "unsupported_content_type")
    check_error(ask("POST", EDITS, json=GOOD), 400, None, "unsupported_content_type")
    gzip = {**JSON, "Content-Encoding": "gzip"}
    check_error(ask("POST", GENERATIONS, content=b"\x1f\x8b", headers=gzip), 400, None, "unsupported_encoding")
    check_error(ask("POST", GENERATIONS, json={**GOOD, "model": "dall-e-3"}), 404, "model", "model_not_found")
    last = {**GOOD, "n": 2, "seed": MAX_SEED}
    check_error(ask("POST", GENERATIONS, json=last), 400, "seed", "invalid_value")


def test_a_large_body_is_refused_by_its_length_and_while_it_is_read() -> None:
    check_error(ask("POST", GENERATIONS, content=b"x" * 60_001, headers=JSON), 413, None, "body_too_large")
    forged = {**JSON, "Content-Length": "9" * 400}
    check_error(ask("POST", GENERATIONS, content=b"{}", headers=forged), 413, None, "body_too_large")
    sent = 0

    async def chunks(head: bytes) -> AsyncIterator[bytes]:
        nonlocal sent
        yield head
        for _ in range(1000):
            sent += 1
            yield b"x" * 1000

    check_error(ask("POST", GENERATIONS, content=chunks(b""), headers=JSON), 413, None, "body_too_large")
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    check_error(ask("POST", EDITS, content=chunks(head), headers=form), 413, None, "body_too_large")
    assert sent == 61 + 60  # neither body was read to its end


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    config = ServingConfig(adapter="/a", limits=Limits(body_timeout_s=0.05))
    check_error(ask("POST", GENERATIONS, content=stuck(), headers=JSON, config=config), 408, None, "body_timeout")


def test_a_request_without_fields_gets_the_defaults_and_a_seed() -> None:
    backend = FakeBackend()
    response = ask("POST", GENERATIONS, backend=backend, json=GOOD)
    assert response.status_code == 200
    body = response.json()
    (job,) = backend.jobs
    recipe = job.recipe
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.adapter_scale) == (50, 7.5, 0.5)
    assert (recipe.size, recipe.n, recipe.reference, job.output_format) == ((64, 64), 1, None, "png")
    assert body["data"][0]["seed"] == recipe.seed
    assert 0 <= recipe.seed < 2**32
    assert body["warnings"] == ["told by the replica"]
    assert (body["size"], body["output_format"]) == ("64x64", "png")
    other = FakeBackend()
    ask("POST", GENERATIONS, backend=other, json=GOOD)
    assert other.jobs[0].recipe.seed != recipe.seed


def test_every_field_reaches_the_recipe() -> None:
    backend = FakeBackend()
    fields = {
        "prompt": "鉛筆 ✏️", "model": "animesketch", "n": 3, "size": "128x64", "user": "u", "output_format": "jpeg",
        "output_compression": 50, "response_format": "b64_json", "negative_prompt": "no", "num_inference_steps": 7,
        "guidance_scale": 3, "adapter_scale": 0.25, "seed": 41, "image": b64(picture("JPEG")), "stream": None,
    }  # fmt: skip
    response = ask("POST", GENERATIONS, backend=backend, json=fields)
    assert response.status_code == 200, response.text
    recipe = backend.jobs[0].recipe
    assert (recipe.prompt, recipe.negative_prompt, recipe.num_inference_steps) == ("鉛筆 ✏️", "no", 7)
    assert (recipe.guidance_scale, recipe.adapter_scale, recipe.seed, recipe.n) == (3, 0.25, 41, 3)
    assert recipe.size == (128, 64)
    assert recipe.reference is not None
    assert recipe.reference.size == (20, 10)
    data = response.json()["data"]
    assert [item["seed"] for item in data] == [41, 42, 43]
    image = Image.open(io.BytesIO(base64.b64decode(data[2]["b64_json"])))
    assert (image.format, image.size, read_recipe(image)) == ("JPEG", (128, 64), {"seed": 43})


def test_adapter_scale_without_an_image_is_told_about() -> None:
    body = ask("POST", GENERATIONS, json={**GOOD, "adapter_scale": 1}).json()
    assert any("adapter_scale has no effect" in warning for warning in body["warnings"])


# edits


def test_an_edit_takes_its_fields_as_text_and_the_sketch_as_a_file() -> None:
    backend = FakeBackend()
    form = {"prompt": "a", "n": "2", "seed": "5", "guidance_scale": "4.5", "size": "64x72", "output_format": "webp"}
    response = ask("POST", EDITS, backend=backend, data=form, files={"image": ("s.webp", picture("WEBP"))})
    assert response.status_code == 200, response.text
    recipe = backend.jobs[0].recipe
    assert (recipe.n, recipe.seed, recipe.guidance_scale, recipe.size) == (2, 5, 4.5, (64, 72))
    assert recipe.reference.size == (20, 10)
    assert [item["seed"] for item in response.json()["data"]] == [5, 6]


@pytest.mark.parametrize(
    ("form", "files", "param", "code"),
    [
        ({"prompt": "a"}, [("other", b"x")], "other", "unknown_parameter"),
        ({"prompt": "a"}, [("mask", b"x")], "mask", "unsupported_parameter"),
        ({"prompt": "a"}, [("image[]", picture())], "image[]", "unsupported_parameter"),
        ({"prompt": "a"}, [("image", picture()), ("image", picture())], "image", "duplicate_parameter"),
        ({"prompt": "a"}, [("prompt", b"x")], "prompt", "duplicate_parameter"),
        ({"prompt": "a"}, [("image", b"not a picture")], "image", "invalid_value"),
        ({"prompt": "a"}, [("image", b"")], "image", "invalid_value"),
        ({"prompt": "a"}, [("image", picture("BMP", (100, 99)))], "image", "invalid_value"),
        ({"prompt": "a", "n": "two"}, [("image", picture())], "n", "invalid_value"),
        ({"prompt": "a", "guidance_scale": "nan"}, [("image", picture())], "guidance_scale", "invalid_value"),
        ({"prompt": "a", "guidance_scale": "inf"}, [("image", picture())], "guidance_scale", "invalid_value"),
        ({"prompt": "a", "seed": ""}, [("image", picture())], "seed", "invalid_value"),
        ({"prompt": "a", "stream": "maybe"}, [("image", picture())], "stream", "invalid_value"),
        ({"n": "1"}, [("image", picture())], "prompt", "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_bad_form_is_refused(form: dict, files: list, param: str, code: str) -> None:
    parts = [(name, ("file", data)) for name, data in files]
    check_error(ask("POST", EDITS, data=form, files=parts), 400, param, code)


def test_an_edit_needs_its_sketch_as_a_file() -> None:
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n'
    missing = part % b"prompt" + b"--b--\r\n"
    check_error(ask("POST", EDITS, content=missing, headers=boundary), 400, "image", "missing_required_parameter")
    text = part % b"prompt" + part % b"image" + b"--b--\r\n"
    check_error(ask("POST", EDITS, content=text, headers=boundary), 400, "image", "invalid_value")
    for broken in (b"", b"--b\r\nnonsense", b"garbage"):
        response = ask("POST", EDITS, content=broken, headers=boundary)
        assert response.status_code == 400, broken
        assert "error" in response.json()
    many = b"".join(part % b"f%d" % i for i in range(100)) + b"--b--\r\n"
    check_error(ask("POST", EDITS, content=many, headers=boundary), 400)


# answers that are streamed, late, or not to be had


def events_of(text: str) -> list[tuple[str, dict]]:
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


@pytest.mark.parametrize(("path", "kind"), [(GENERATIONS, "image_generation"), (EDITS, "image_edit")])
def test_a_streamed_answer_has_openais_events(path: str, kind: str) -> None:
    backend = FakeBackend()
    if path == GENERATIONS:
        body: dict = {"json": {**GOOD, "seed": 9, "n": 2, "stream": True, "partial_images": 2}}
    else:
        form = {"prompt": "a", "seed": "9", "n": "2", "stream": "true", "partial_images": "2"}
        body = {"data": form, "files": {"image": ("a.png", picture())}}
    response = ask("POST", path, backend=backend, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [name for name, _ in events] == [f"{kind}.partial_image"] * 4 + [f"{kind}.completed"] * 2
    assert all(data["type"] == name for name, data in events)
    assert [data.get("partial_image_index") for _, data in events] == [0, 0, 1, 1, None, None]
    assert [data["seed"] for _, data in events] == [9, 10] * 3
    assert all(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).size == (64, 64) for _, data in events)
    assert backend.closed == 1


def test_a_streamed_answer_that_fails_ends_with_an_error_event() -> None:
    backend = FakeBackend()
    backend.fail = RuntimeError("secret detail")
    response = ask("POST", GENERATIONS, backend=backend, json={**GOOD, "stream": True})
    assert response.status_code == 200
    ((name, data),) = events_of(response.text)
    assert name == "error"
    assert data["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_a_failure_inside_says_where_to_look_and_not_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend()
    backend.fail = RuntimeError("secret detail")
    response = ask("POST", GENERATIONS, backend=backend, json=GOOD, headers={"X-Request-ID": "r-17"})
    error = check_error(response, 500)
    assert error["type"] == "server_error"
    assert "r-17" in error["message"]
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_a_full_queue_is_answered_429_at_once() -> None:
    backend = FakeBackend()
    backend.fail = Busy()
    response = ask("POST", GENERATIONS, backend=backend, json=GOOD)
    check_error(response, 429, None, "queue_full")
    assert response.headers["retry-after"] == "5"


def test_the_ingress_holds_no_more_requests_than_there_are_places() -> None:
    async def main() -> tuple[list[int], int, str]:
        backend = FakeBackend()
        backend.hold = asyncio.Event()
        async with client(backend) as http:  # one replica with one place, and one in the queue
            waiting = [asyncio.create_task(http.post(GENERATIONS, json=GOOD)) for _ in range(2)]
            while len(backend.jobs) < 2:
                await asyncio.sleep(0)
            refused = [(await http.post(GENERATIONS, json=GOOD)).status_code for _ in range(8)]
            assert (await http.get("/health")).status_code == 200
            backend.hold.set()
            served = [(await task).status_code for task in waiting]
            again = (await http.post(GENERATIONS, json=GOOD)).status_code
            metrics = (await http.get("/metrics")).text
        return [*served, again, *refused], len(backend.jobs), metrics

    statuses, jobs, metrics = asyncio.run(main())
    assert statuses == [200] * 3 + [429] * 8
    assert jobs == 3
    assert "animesketch_http_refused_total 8.0" in metrics
    assert 'animesketch_http_responses_total{route="/v1/images/generations",status="200"} 3.0' in metrics
    assert "animesketch_requests_in_progress 0.0" in metrics


def test_a_request_that_takes_too_long_is_given_up() -> None:
    for stream in (False, True):

        async def main(stream: bool = stream) -> tuple[httpx.Response, int]:
            backend = FakeBackend()
            backend.hold = asyncio.Event()
            config = ServingConfig(adapter="/a", request_timeout_s=0.1)
            async with client(backend, config) as http:
                response = await http.post(GENERATIONS, json={**GOOD, "stream": stream})
            return response, backend.closed

        response, closed = asyncio.run(main())
        assert closed == 1
        if stream:
            ((name, data),) = events_of(response.text)
            assert (name, data["error"]["code"]) == ("error", "timeout")
        else:
            check_error(response, 503, None, "timeout")


def test_a_cancelled_request_closes_its_job_and_gives_its_place_back() -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.hold = asyncio.Event()
        async with client(backend) as http:
            for stream in (False, True, False, True):
                task = asyncio.create_task(http.post(GENERATIONS, json={**GOOD, "stream": stream}))
                seen = len(backend.jobs)
                while len(backend.jobs) == seen:
                    await asyncio.sleep(0)
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert backend.closed == 4
            backend.hold.set()
            assert (await http.post(GENERATIONS, json=GOOD)).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("stuck", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("version", ["2.0", "2.4"])  # of ASGI: the stream runs in a task group, or in none
def test_a_client_that_reads_nothing_loses_its_place(version: str, stuck: str) -> None:
    limits = Limits(send_timeout_s=0.05)
    config = ServingConfig(adapter="/a", limits=limits, max_queued_requests=1, max_ongoing_requests=1)

    async def main() -> tuple[FakeBackend, list[str], int, str]:
        backend, forever, sent = FakeBackend(), asyncio.Event(), []
        api = create_api(config, backend, None)
        requests = [{"type": "http.request", "body": json.dumps({**GOOD, "stream": True}).encode()}]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": version}, "method": "POST", "path": GENERATIONS,
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip

        async def receive() -> Any:
            if not requests:
                await forever.wait()  # the client stays
            return requests.pop()

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if message["type"] == stuck:
                await forever.wait()

        await asyncio.wait_for(api(scope, receive, send), 5)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as http:
            after = (await http.post(GENERATIONS, json=GOOD)).status_code
            return backend, sent, after, (await http.get("/metrics")).text

    backend, sent, after, metrics = asyncio.run(main())
    assert sent == ["http.response.start", "http.response.body"][: 1 + (stuck == "http.response.body")]
    assert (after, backend.closed) == (200, 2)
    assert "animesketch_requests_in_progress 0.0" in metrics


def test_health_says_when_no_replica_runs() -> None:
    backend = FakeBackend()
    assert ask("GET", "/health", backend=backend).json() == {"status": "ok"}
    backend.down = "No replica runs: DEPLOY_FAILED"
    error = check_error(ask("GET", "/health", backend=backend), 503, None, "unavailable")
    assert "DEPLOY_FAILED" in error["message"]


def test_models_docs_and_the_schema_are_there() -> None:
    models = ask("GET", "/v1/models").json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"], model["native_size"]) == ("animesketch", "model", "64x64")
    assert "swagger" in ask("GET", "/docs").text.lower()
    schema = ask("GET", "/openapi.json").json()
    body = schema["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "image", "adapter_scale"} <= set(body["properties"])
    form = schema["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["image"]["format"] == "binary"
    assert "image" in form["required"]


# keys


def test_with_keys_every_route_but_health_needs_one() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "right"},
             {"Authorization": "Bearer "}, {"Authorization": f"Bearer {next(iter(digests))}"},
             {"Authorization": b"Bearer \xff\xfe"}]  # fmt: skip
    routes = [("POST", GENERATIONS), ("POST", EDITS), ("GET", "/v1/models"), ("GET", "/docs"), ("GET", "/openapi.json"),
              ("GET", "/metrics"), ("GET", "/nowhere")]  # fmt: skip
    for headers in wrong:
        for method, path in routes:
            check_error(ask(method, path, digests=digests, headers=headers), 401, None, "invalid_api_key")
    assert ask("GET", "/health", digests=digests).status_code == 200
    right = {"Authorization": "Bearer right"}
    assert ask("POST", GENERATIONS, digests=digests, headers=right, json=GOOD).status_code == 200
    # no key, no look at the body: the length is not even compared
    large = ask("POST", GENERATIONS, digests=digests, content=b"x" * 70_000, headers=JSON)
    assert large.status_code == 401


def test_a_key_file_holds_digests_only(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"# ours\n\n{digest}  -\n{digest.upper()} again\n")
    assert load_keys(str(file)) == {digest}
    assert allowed("bearer k", load_keys(str(file)))
    assert not allowed("Bearer K", load_keys(str(file)))
    file.write_text("plain-secret-key\n")
    with pytest.raises(ValueError, match="line 1: not a sha256") as error:
        load_keys(str(file))
    assert "plain-secret-key" not in str(error.value)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        load_keys(str(file))
    with pytest.raises(FileNotFoundError, match="No key file"):
        load_keys(str(tmp_path / "absent"))


# pictures


def test_transparency_lies_on_white_and_exif_turns_the_picture() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(file, "PNG")
    assert read_picture(file.getvalue(), 100).getpixel((0, 0)) == (255, 255, 255)
    file = io.BytesIO()
    Image.new("P", (2, 2)).save(file, "PNG", transparency=0)
    assert read_picture(file.getvalue(), 100).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(picture("JPEG", exif=exif), 1000).size == (10, 20)
    file = io.BytesIO()
    Image.new("I;16", (2, 2), 32768).save(file, "PNG")
    assert read_picture(file.getvalue(), 100).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_refused_or_read_and_never_crash(format: str) -> None:
    data = picture(format, (64, 64))
    read = 0
    for position in range(0, len(data), max(1, len(data) // 60)):
        for broken in (data[:position], data[:position] + b"\xff\x00" + data[position + 2 :]):
            with contextlib.suppress(BadPicture):  # and nothing else
                assert read_picture(broken, 10_000).mode == "RGB"
                read += 1
    assert read < 120


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_written_picture_holds_its_recipe_and_is_the_same_each_time(format: str) -> None:
    image, recipe = Image.effect_noise((16, 16), 50).convert("RGB"), {"prompt": "鉛筆\n✏️", "seed": 2**62}
    first, second = (write_picture(image, format, 100, recipe) for _ in range(2))
    assert first == second
    back = Image.open(io.BytesIO(first))
    assert read_recipe(back) == recipe
    if format != "jpeg":
        assert back.convert("RGB").tobytes() == image.tobytes()
