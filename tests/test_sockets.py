"""What hostile and clumsy clients do to a connection, over real sockets: the others are served all the same."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.config import Limits, ServingConfig
from serving.engine import Engine
from serving.worker import Worker
from tests.asking import CONFIG, EDITS, GENERATIONS, GOOD, EngineBackend, FakeBackend, listening

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"prompt": "long", "num_inference_steps": 200, "n": 4, "output_format": "webp"}


@contextmanager
def connected(port: int, head: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has sent a head (lines) and what there is of a body."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        wire.sendall("\r\n".join([*head.strip().split("\n"), "Host: localhost", "", ""]).encode("latin-1") + body)
        yield wire


def answer(wire: socket.socket) -> tuple[int, str, bytes]:
    """Status, head and body of the answer: up to the end of the connection, or of the body by its length."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            break
        more = wire.recv(65536)
        if not more:
            break
        data += more
    return int(head.split()[1]), head.decode("latin-1"), body


def posted(body: bytes, path: str = GENERATIONS, kind: str = "application/json") -> tuple[str, bytes]:
    return f"POST {path} HTTP/1.1\nContent-Type: {kind}\nContent-Length: {len(body)}", body


@pytest.fixture(params=["httptools", "h11"])  # uvicorn's two parsers; Serve's proxy has the first one
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    with listening(FakeBackend(), http=request.param) as port:
        yield port


def served(port: int) -> bool:
    return httpx.post(f"http://127.0.0.1:{port}{GENERATIONS}", json=GOOD, timeout=10).status_code == 200


# bodies


@pytest.mark.parametrize(("path", "kind", "start"), [
    (GENERATIONS, "application/json", b'{"prompt": "'),
    (EDITS, "multipart/form-data; boundary=b",
     b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'),
])  # fmt: skip
def test_a_chunked_body_of_a_gigabyte_is_refused_and_not_read(port: int, path: str, kind: str, start: bytes) -> None:
    chunk, sent = b"10000\r\n" + b"x" * 65536 + b"\r\n", 0
    head = f"POST {path} HTTP/1.1\nContent-Type: {kind}\nTransfer-Encoding: chunked"
    with connected(port, head, b"%x\r\n%s\r\n" % (len(start), start)) as wire:
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(2**30 // 65536):
                wire.sendall(chunk)
                sent += len(chunk)
        assert sent < 32 * 2**20  # what the kernel's buffers on both sides hold, and no more
        status, head, body = answer(wire)
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    assert "connection: close" in head
    assert served(port)


def test_a_body_too_large_by_its_length_is_refused_before_it_is_sent(port: int) -> None:
    head = f"POST {GENERATIONS} HTTP/1.1\nContent-Type: application/json\nContent-Length: {2**30}"
    for expect in ("", "\nExpect: 100-continue"):
        with connected(port, head + expect) as wire:
            status, head_, body = answer(wire)
            assert wire.recv(1) == b""  # the connection is over
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
        assert "connection: close" in head_


def test_a_refusal_of_a_body_within_the_limit_keeps_the_connection(port: int) -> None:
    with connected(port, *posted(b"{" + b" " * 50_000)) as wire:
        for _ in range(2):
            status, head, _ = answer(wire)
            assert status == 400
            assert "connection: close" not in head
            wire.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")


def test_a_gzip_bomb_is_refused_without_being_unpacked(port: int) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9, 31)
    assert len(bomb) < 60_000
    head, body = posted(bomb)
    for encoding in ("gzip", "deflate", "br", "identity, gzip"):
        with connected(port, f"{head}\nContent-Encoding: {encoding}", body) as wire:
            status, _, reply = answer(wire)
        assert (status, json.loads(reply)["error"]["code"]) == (400, "unsupported_encoding")


@pytest.mark.parametrize(
    "lengths",
    [
        "Content-Length: -5",
        "Content-Length: abc",
        "Content-Length: 5\nContent-Length: 6",
        "Content-Length: 5\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, gzip",
    ],
)
def test_lengths_that_contradict_are_refused(port: int, lengths: str) -> None:
    with connected(
        port, f"POST {GENERATIONS} HTTP/1.1\nContent-Type: application/json\n{lengths}", b"0\r\n\r\n"
    ) as wire:
        status, _, _ = answer(wire)
    assert status in (400, 501)
    assert served(port)


def test_no_body_at_all_is_refused_by_both_routes(port: int) -> None:
    for path, kind in ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=b")):
        with connected(port, f"POST {path} HTTP/1.1\nContent-Type: {kind}") as wire:
            status, _, body = answer(wire)
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_form_in_an_encoding_of_pythons_own_is_refused(port: int) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a-" + b"ba" * 20_000 + b"\r\n--b--\r\n"
    for charset in ("undefined", "punycode", "utf-7", "idna", "hex"):
        with connected(port, *posted(part, EDITS, f"multipart/form-data; boundary=b; charset={charset}")) as wire:
            status, _, body = answer(wire)
        assert (status, json.loads(body)["error"]["code"]) == (400, "unsupported_charset")


# slow clients


def test_slow_headers_and_slow_bodies_take_nobodys_place() -> None:
    limits = Limits(body_timeout_s=1.0)
    config = ServingConfig(adapter="/a", limits=limits, max_ongoing_requests=1, max_queued_requests=1)
    with listening(FakeBackend(), config) as port:
        slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(50)]
        for wire in slow:
            wire.sendall(b"POST /v1/images/generations HTTP/1.1\r\nX-Slow: ")
        assert served(port)
        head = f"POST {GENERATIONS} HTTP/1.1\nContent-Type: application/json\nContent-Length: 10"
        with ExitStack() as open_ones:
            wire, *_ = [open_ones.enter_context(connected(port, head)) for _ in range(config.max_requests + 1)]
            begun = time.monotonic()
            assert served(port)
            assert time.monotonic() - begun < 0.8  # while all of them are still awaited
            status, head, body = answer(wire)
            assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")
            assert "connection: close" in head
            assert time.monotonic() - begun < 5
        assert served(port)
        for wire in slow:
            wire.close()


def test_a_client_that_never_reads_loses_its_place_and_no_others() -> None:
    limits = Limits(send_timeout_s=0.5, max_times_native=256)
    config = ServingConfig(adapter="/a", limits=limits, max_ongoing_requests=1, max_queued_requests=1)
    backend = FakeBackend()
    body = json.dumps(
        {**GOOD, "stream": True, "partial_images": 3, "n": 4, "size": "1024x1024", "output_format": "png"}
    )
    backend.noise = True  # megabytes of it: more than the buffers of a connection take
    with listening(backend, config) as port, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", port))
        head, content = posted(body.encode())
        wire.sendall((head.replace("\n", "\r\n") + "\r\nHost: localhost\r\n\r\n").encode() + content)
        until(lambda: backend.closed == 1)
        assert f"{metric(port, 'animesketch_requests_in_progress')}" == "0.0"
        backend.noise = False
        assert served(port)


# names of requests


def test_the_clients_request_id_is_kept_when_it_is_short_and_plain(port: int) -> None:
    for own in ("drawing-17", "a" * 128, "{}!~"):
        with connected(port, f"GET /health HTTP/1.1\nX-Request-ID: {own}") as wire:
            _, head, _ = answer(wire)
        assert head.lower().split("\r\n").count(f"x-request-id: {own}".lower()) == 1
        assert head.lower().count("x-request-id") == 1


@pytest.mark.parametrize("own", ["a" * 129, "a b", "caf\xe9", "\x80\xff", "a\tb", ""])
def test_another_request_id_is_replaced(port: int, own: str) -> None:
    with connected(port, f"GET /health HTTP/1.1\nX-Request-ID: {own}") as wire:
        _, head, _ = answer(wire)
    (given,) = re.findall(r"x-request-id: (.*)", head, re.IGNORECASE)
    assert re.fullmatch(r"[0-9a-f]{32}", given.strip())


@pytest.mark.parametrize("own", ["a\r\nSet-Cookie: x=1", "a\nSet-Cookie: x=1", "a\rSet-Cookie: x=1", "a\0b",
                                 "a\r\n Set-Cookie: x=1", "%0d%0aSet-Cookie: x=1"])  # fmt: skip
def test_a_request_id_brings_no_header_into_the_answer(port: int, own: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        wire.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {own}\r\n\r\n".encode())
        status, head, _ = answer(wire)
    assert status in (200, 400)
    assert not re.search(r"^set-cookie", head, re.IGNORECASE | re.MULTILINE)


def test_every_answer_is_named_whatever_it_is(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        answers = [
            http.get("/health"), http.get("/metrics"), http.get("/v1/models"), http.get("/nowhere"), http.get(EDITS),
            http.post(GENERATIONS, json=GOOD), http.post(GENERATIONS, json={}), http.post(EDITS, data=GOOD),
            http.post(GENERATIONS, json={**GOOD, "stream": True}), http.post(GENERATIONS, content=b"x" * 70_000),
        ]  # fmt: skip
    assert [a.status_code for a in answers] == [200, 200, 200, 404, 405, 200, 400, 400, 200, 413]
    names = [a.headers["x-request-id"] for a in answers]
    assert len(set(names)) == len(names)


def test_odd_hosts_and_paths_are_answered_and_never_a_failure(port: int) -> None:
    for head in ("GET /%00%ff%0a HTTP/1.1", "GET //v1/models HTTP/1.1", "GET /v1/models?%ff=\xff HTTP/1.1",
                 "GET /v1/../health HTTP/1.1", "OPTIONS /v1/models HTTP/1.1", "PATCH /health HTTP/1.1",
                 "GET http://elsewhere/v1/models HTTP/1.1"):  # fmt: skip
        with connected(port, head) as wire:
            status, _, _ = answer(wire)
        assert status in (200, 400, 404, 405), head
    for host in ("[", "a/b?c", "a@b", "]:99999", ""):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
            body = json.dumps({**GOOD, "stream": True})
            wire.sendall(
                f"POST {GENERATIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            status, _, reply = answer(wire)
        assert status in (400, 403), host
        assert b"error" in reply or status == 400


# clients that leave


@pytest.fixture(scope="module")
def worker(twin: Path, adapter_folder: Path) -> Worker:
    return Worker(Engine.load(str(adapter_folder), base=str(twin)), "animesketch")


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metric(port: int, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return float(re.search(rf"^{name} (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two steps"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_frees_its_slots_after_the_step_in_flight(
    worker: Worker, stream: bool, steps: int, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on, taken = threading.Event(), threading.Event(), []
    step = worker.engine.step

    def held(slots: list) -> None:
        """Stop within the step after `steps` of them, until the client is gone."""
        if len(taken) == steps:
            reached.set()
            assert go_on.wait(20)
        taken.append(len(slots))
        step(slots)

    monkeypatch.setattr(worker.engine, "step", held)
    with listening(
        EngineBackend(worker), ServingConfig(adapter="/a", max_ongoing_requests=1, max_queued_requests=1)
    ) as port:
        with connected(port, *posted(json.dumps({**LONG, "stream": stream}).encode())) as wire:
            assert reached.wait(20)
            if reset:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: metric(port, "animesketch_requests_in_progress") == 0)
        until(lambda: metric(port, "animesketch_clients_left_total") == 1)
        go_on.set()
        assert served_by_engine(port)
        assert metric(port, "animesketch_clients_left_total") == 1
    assert taken == [4] * (steps + 1) + [1]
    assert not worker.batcher


def served_by_engine(port: int) -> bool:
    quick = {**GOOD, "num_inference_steps": 1}
    return httpx.post(f"http://127.0.0.1:{port}{GENERATIONS}", json=quick, timeout=20).status_code == 200


def test_a_client_that_leaves_while_it_sends_its_body_leaves_nothing() -> None:
    backend = FakeBackend()
    with listening(backend, CONFIG) as port:
        for number in range(5):
            with connected(
                port, f"POST {GENERATIONS} HTTP/1.1\nContent-Type: application/json\nContent-Length: 9", b"{"
            ):
                assert metric(port, "animesketch_requests_in_progress") == 0  # no place for who sends slowly
            until(lambda left=number + 1: metric(port, "animesketch_clients_left_total") == left)
        assert served(port)
    assert len(backend.jobs) == 1
