"""Answers that are streamed, late, or not to be had, over a backend without models."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from serving import connection
from serving.api import create_api
from serving.config import Limits, ServingConfig
from serving.protocol import Busy
from tests.asking import (
    CONFIG,
    EDITS,
    GENERATIONS,
    GOOD,
    JSON,
    FakeBackend,
    ask,
    check_error,
    client,
    picture,
)


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


def test_a_stream_that_is_quiet_for_long_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "QUIET_S", 0.05)

    async def main() -> tuple[str, int]:
        backend = FakeBackend()
        backend.hold = asyncio.Event()
        async with client(backend) as http:
            asked = asyncio.create_task(http.post(GENERATIONS, json={**GOOD, "stream": True, "partial_images": 1}))
            await asyncio.sleep(0.5)
            backend.hold.set()
            return (await asked).text, backend.closed

    text, closed = asyncio.run(main())
    quiet, _, rest = text.partition("event: ")
    assert quiet.count("\n\n") >= 2
    assert set(quiet.split("\n\n")) == {": drawing", ""}
    assert [name for name, _ in events_of(rest)] == ["image_generation.partial_image", "image_generation.completed"]
    assert closed == 1


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


@pytest.mark.parametrize(("running", "ingresses", "seconds"), [(1, 1, "32"), (4, 1, "8"), (4, 2, "16"), (0, 1, "32")])
def test_a_refusal_says_how_long_what_is_under_way_will_take(running: int, ingresses: int, seconds: str) -> None:
    patient = dataclasses.replace(
        CONFIG, request_timeout_s=60, ingress_replicas=ingresses, max_queued_requests=2 * ingresses - 1
    )

    async def main() -> httpx.Response:
        backend = FakeBackend()
        backend.running = running
        backend.hold, backend.speed = asyncio.Event(), 10.0
        async with client(backend, patient) as http:  # one replica with one place, and one in the queue
            asked = {**GOOD, "num_inference_steps": 40, "size": "128x64", "n": 2}  # 160 steps of 64 x 64 pixels
            waiting = [asyncio.create_task(http.post(GENERATIONS, json=asked)) for _ in range(2)]
            while len(backend.jobs) < 2:
                await asyncio.sleep(0)
            refused = await http.post(GENERATIONS, json=GOOD)
            backend.hold.set()
            await asyncio.gather(*waiting)
        return refused

    refused = asyncio.run(main())
    check_error(refused, 429, None, "queue_full")
    assert refused.headers["retry-after"] == seconds


def test_what_would_not_be_done_in_time_is_refused_before_it_is_begun() -> None:
    async def main() -> list[int]:
        backend = FakeBackend()
        backend.hold, backend.speed = asyncio.Event(), 1.0
        config = ServingConfig(adapter="/a", request_timeout_s=100.0)
        async with client(backend, config) as http:
            alone = {**GOOD, "num_inference_steps": 120}  # longer than that, but on an idle server it may try
            first = asyncio.create_task(http.post(GENERATIONS, json=alone))
            while not backend.jobs:
                await asyncio.sleep(0)
            refused = await http.post(GENERATIONS, json=GOOD)
            backend.hold.set()
            return [
                (await first).status_code,
                refused.status_code,
                (await http.post(GENERATIONS, json=GOOD)).status_code,
            ]

    assert asyncio.run(main()) == [200, 429, 200]


@pytest.mark.parametrize(("under_way", "read"), [(60, True), (95, False)])  # of 100 seconds that can be waited
def test_behind_a_full_line_no_body_is_read_until_a_job_ends(under_way: int, read: bool) -> None:
    async def main() -> list[int]:
        backend = FakeBackend()
        backend.hold, backend.speed = asyncio.Event(), 1.0
        async with client(backend, ServingConfig(adapter="/a", request_timeout_s=100.0)) as http:
            first = asyncio.create_task(http.post(GENERATIONS, json={**GOOD, "num_inference_steps": under_way}))
            while not backend.jobs:
                await asyncio.sleep(0)
            malformed = await http.post(GENERATIONS, content=b"{", headers=JSON)
            large = await http.post(GENERATIONS, json={**GOOD, "num_inference_steps": 50})
            backend.hold.set()
            after = await first, await http.post(GENERATIONS, content=b"{", headers=JSON)
            return [response.status_code for response in (malformed, large, *after)]

    assert asyncio.run(main()) == [400 if read else 429, 429, 200, 400]


def test_a_line_is_full_no_longer_once_more_replicas_run() -> None:
    async def main() -> list[int]:
        backend = FakeBackend()
        backend.hold, backend.speed = asyncio.Event(), 1.0
        async with client(backend, ServingConfig(adapter="/a", request_timeout_s=100.0, max_replicas=1)) as http:
            first = asyncio.create_task(http.post(GENERATIONS, json={**GOOD, "num_inference_steps": 95}))
            while not backend.jobs:
                await asyncio.sleep(0)
            statuses = [(await http.post(GENERATIONS, json=GOOD)).status_code]
            backend.running = 2
            second = asyncio.create_task(http.post(GENERATIONS, json=GOOD))
            while len(backend.jobs) < 2:
                await asyncio.sleep(0)
            backend.hold.set()
            return [*statuses, (await first).status_code, (await second).status_code]

    assert asyncio.run(main()) == [429, 200, 200]


@pytest.mark.parametrize(("running", "most", "steps", "taken"), [
    (1, 1, 60, 1),  # of 100 seconds, by one replica
    (2, 2, 60, 3),
    (1, 2, 30, 6),  # by that one and another which it may bring: 200 seconds
    (1, 2, 100, 4),  # so many bring it, whatever they ask for
])  # fmt: skip
def test_what_is_accepted_goes_by_the_replicas_that_run(running: int, most: int, steps: int, taken: int) -> None:
    async def main() -> int:
        backend = FakeBackend()
        backend.hold, backend.speed, backend.running = asyncio.Event(), 1.0, running
        config = ServingConfig(adapter="/a", request_timeout_s=100.0, max_replicas=most, target_ongoing_requests=3)
        async with client(backend, config) as http:
            asked = [http.post(GENERATIONS, json={**GOOD, "num_inference_steps": steps}) for _ in range(10)]
            tasks = [asyncio.create_task(one) for one in asked]
            while sum(task.done() for task in tasks) + len(backend.jobs) < len(tasks):
                await asyncio.sleep(0)
            backend.hold.set()
            return [(await task).status_code for task in tasks].count(200)

    assert asyncio.run(main()) == taken


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
    assert 'animesketch_http_refused_total{code="queue_full"} 8.0' in metrics
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


@pytest.mark.parametrize("quiet", [False, True])  # what it does not read is an event, or a comment before the first
@pytest.mark.parametrize("stuck", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("version", ["2.0", "2.4"])  # of ASGI: the stream runs in a task group, or in none
def test_a_client_that_reads_nothing_loses_its_place(
    version: str, stuck: str, quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "QUIET_S", 0.02)
    limits = Limits(send_timeout_s=0.05)
    config = ServingConfig(adapter="/a", limits=limits, max_queued_requests=1, max_ongoing_requests=1)

    async def main() -> tuple[FakeBackend, list[str], int, str]:
        backend, forever, sent = FakeBackend(), asyncio.Event(), []
        backend.hold = asyncio.Event() if quiet else None
        api = create_api(config, backend, None)
        requests = [{"type": "http.request", "body": json.dumps({**GOOD, "stream": True}).encode()}]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": version}, "method": "POST", "path": GENERATIONS,
            "query_string": b"", "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
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
        backend.hold = None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as http:
            after = (await http.post(GENERATIONS, json=GOOD)).status_code
            return backend, sent, after, (await http.get("/metrics")).text

    backend, sent, after, metrics = asyncio.run(main())
    assert sent == ["http.response.start", "http.response.body"][: 1 + (stuck == "http.response.body")]
    assert (after, backend.closed) == (200, 2)
    assert "animesketch_requests_in_progress 0.0" in metrics
