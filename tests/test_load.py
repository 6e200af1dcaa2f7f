"""The load generator: what it sends, what it counts, and whom it does not bother."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serving import load
from serving.api import create_api
from tests.asking import CONFIG, FakeBackend


def arguments(*more: str) -> Any:
    return load.make_parser().parse_args(["--rate", "50", "--seconds", "0.4", *more])


def run(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    """A load on the app itself, without a network."""
    args = arguments(*more)

    transport = httpx.ASGITransport(create_api(CONFIG, backend, None), raise_app_exceptions=False)
    real = httpx.AsyncClient
    with monkeypatch.context() as patch:
        patch.setattr(httpx, "AsyncClient", lambda **how: real(**how | {"transport": transport}))
        return load.summary(*asyncio.run(load.load(args, load.make_bodies(args))))


def test_the_same_arguments_send_the_same_mixed_requests() -> None:
    args = arguments("--steps", "2-4", "--size", "64x64", "--size", "96x64", "--seed", "3")
    bodies = load.make_bodies(args)
    assert bodies == load.make_bodies(args)
    assert len(bodies) == 20
    assert {body["num_inference_steps"] for body in bodies} == {2, 3, 4}
    assert {body["size"] for body in bodies} == {"64x64", "96x64"}
    assert len({body["seed"] for body in bodies}) == 20
    with pytest.raises(ValueError, match="from 1 to 100000"):
        load.make_bodies(load.make_parser().parse_args(["--rate", "1e6", "--seconds", "1e6"]))


def test_every_request_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run(FakeBackend(), monkeypatch)
    assert (told["answered"] + told["refused"], told["left"], told["failed"]) == (20, 0, {})
    assert told["answered"] > 0
    assert 0 < told["latency"]["p50"] <= told["latency"]["p95"] <= told["latency"]["max"] < told["seconds"]
    assert told["goodput"] == pytest.approx(told["answered"] / told["seconds"], rel=0.02)
    assert (told["occupancy"], told["step_seconds"]) == (4.0, 0.1)  # as the backend's pictures say
    broken = FakeBackend()
    broken.fail = RuntimeError("a fault of its own")
    told = run(broken, monkeypatch)
    assert (told["answered"], told["latency"]) == (0, None)
    assert told["failed"]["status 500"] + told["refused"] == 20
    assert "The server failed" in told["said"]["status 500"]


def test_percentiles_are_of_the_sorted_values() -> None:
    assert load.percentiles([]) is None
    assert load.percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 51, "p95": 96, "p99": 100, "max": 100}


@pytest.mark.parametrize("url", ["http://example.org", "http://10.0.0.1:8000", "http://[2001:db8::1]", "nonsense"])
def test_only_a_server_on_this_machine_is_loaded(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", url]) == 2
    assert "only a server on this machine" in capsys.readouterr().err
