"""One Serve application on a free loopback port: real HTTP, real replicas, random weights."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from serving.engine import Engine
from serving.pictures import read_recipe
from serving.recipe import Recipe
from serving.replica import MAX_ADAPTERS
from tests.asking import picture
from tests.servers import processes, serving
from trainer.adapter import WEIGHTS, Adapter

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = {"prompt": "long", "num_inference_steps": 999, "n": 4}  # a minute and more on one core


@pytest.fixture(scope="module")
def more_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of further adapters, empty."""
    return tmp_path_factory.mktemp("more")


@pytest.fixture(scope="module")
def arguments(twin: Path, adapter_folder: Path, more_adapters: Path) -> dict[str, str]:
    """Of the application: one replica runs one request, one more waits, the next is refused.

    `max_replicas` of 2 lets the ingress take three, so that Serve's own refusal is met as well as the ingress's.
    """
    return {
        "adapter": str(adapter_folder.parent), "base": str(twin), "adapter_folder": str(more_adapters),
        "num_cpus": "0.5", "ingress_num_cpus": "0.1",
        "max_replicas": "2", "max_ongoing_requests": "1", "max_queued_requests": "1",
        "limits.max_num_inference_steps": "999", "limits.max_body_bytes": "2000000",
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(ray_session: str, arguments: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of the application."""
    with serving("sketch", **arguments) as client:
        yield client


@pytest.fixture(scope="module")
def sketch() -> Image.Image:
    noise = np.random.default_rng(2).integers(0, 256, (6, 6), dtype=np.uint8)
    return Image.fromarray(noise).resize((48, 48), Image.Resampling.NEAREST).convert("RGB")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pictures(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text[:500]
    return [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]


def generate(server: httpx.Client, **fields: Any) -> httpx.Response:
    return server.post("/v1/images/generations", json={"prompt": "a girl", "num_inference_steps": 3, **fields})


def test_it_is_healthy_and_says_what_it_is(server: httpx.Client, twin: Path) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    (model,) = server.get("/v1/models").json()["data"]
    assert (model["id"], model["base"], model["random_weights"]) == ("animesketch", twin.name, True)
    assert "swagger" in server.get("/docs").text.lower()
    assert "/v1/images/edits" in server.get("/openapi.json").json()["paths"]
    assert "animesketch_http_responses_total" in server.get("/metrics").text


def test_the_same_request_gives_the_same_bytes(server: httpx.Client) -> None:
    fields = {"seed": 5, "n": 2}
    first, second = (pictures(generate(server, **fields)) for _ in range(2))
    assert first == second
    image = Image.open(io.BytesIO(first[1]))
    assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    recipe = read_recipe(image)
    assert (recipe["prompt"], recipe["seed"], recipe["num_inference_steps"]) == ("a girl", 6, 3)
    # the recipe in the file makes the picture again
    again = generate(server, seed=recipe["seed"], guidance_scale=recipe["guidance_scale"], size=recipe["size"])
    back = np.asarray(Image.open(io.BytesIO(pictures(again)[0]))).astype(int)
    assert abs(back - np.asarray(image)).max() <= 1
    assert pictures(generate(server, seed=7))[0] != first[0]


def test_a_random_seed_is_returned_and_reproduces_the_picture(server: httpx.Client) -> None:
    reply = generate(server)
    seed = reply.json()["data"][0]["seed"]
    assert pictures(generate(server, seed=seed)) == pictures(reply)
    assert any("random weights" in warning for warning in reply.json()["warnings"])


def test_a_reference_by_either_route_is_the_engines_picture(
    server: httpx.Client, sketch: Image.Image, twin: Path, adapter_folder: Path
) -> None:
    fields: dict[str, Any] = {"seed": 5, "adapter_scale": 1.0}
    by_json = generate(server, image=base64.b64encode(png(sketch)).decode(), **fields)
    form = {"prompt": "a girl", "num_inference_steps": "3", "seed": "5", "adapter_scale": "1.0"}
    by_form = server.post("/v1/images/edits", data=form, files={"image": ("s.png", png(sketch))})
    assert pictures(by_json) == pictures(by_form)
    assert pictures(by_json) != pictures(generate(server, seed=5))
    engine = Engine.load(str(adapter_folder.parent), base=str(twin))
    alone = engine.infer(Recipe(prompt="a girl", num_inference_steps=3, reference=sketch, **fields))[0]
    served = Image.open(io.BytesIO(pictures(by_json)[0]))
    assert abs(np.asarray(served).astype(int) - np.asarray(alone)).max() <= 1
    assert read_recipe(served)["reference_sha256"] == hashlib.sha256(sketch.tobytes()).hexdigest()


def test_adapters_come_and_go_without_a_restart(
    server: httpx.Client, sketch: Image.Image, adapter_folder: Path, more_adapters: Path
) -> None:
    fields: dict[str, Any] = {"seed": 5, "adapter_scale": 1.0, "image": base64.b64encode(png(sketch)).decode()}
    own = pictures(generate(server, **fields))
    assert generate(server, model="other", **fields).status_code == 404
    other = Adapter.from_pretrained(adapter_folder)
    with torch.no_grad():
        for module in other.ip_adapter.values():
            module.to_v_ip.weight.mul_(-1)  # type: ignore[union-attr]
    other.save_pretrained(more_adapters / "other")
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["animesketch", "other"]
    theirs = pictures(generate(server, model="other", **fields))
    assert theirs != own
    assert read_recipe(Image.open(io.BytesIO(theirs[0])))["model"] == "other"
    assert pictures(generate(server, **fields)) == own
    Adapter.from_pretrained(adapter_folder).save_pretrained(more_adapters / "other")  # replaced: by a copy of ours
    again = pictures(generate(server, model="other", **fields))
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(one[0]))) for one in (again, own)))
    torn = shutil.copytree(more_adapters / "other", more_adapters / "torn") / WEIGHTS
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1] + b"?")
    damaged = [generate(server, model="torn", **fields) for _ in range(2)]
    assert [(one.status_code, one.json()["error"]["code"]) for one in damaged] == 2 * [(503, "model_unavailable")]
    assert [one.headers["x-should-retry"] for one in damaged] == ["false", "false"]
    torn.write_bytes(whole)  # copied again
    assert generate(server, model="torn", **fields).status_code == 200
    for name in ("other", "torn"):
        shutil.rmtree(more_adapters / name)
    assert generate(server, model="other", **fields).status_code == 404


def test_a_streamed_answer_ends_with_the_picture_of_a_plain_one(server: httpx.Client) -> None:
    with server.stream(
        "POST", "/v1/images/generations",
        json={"prompt": "a girl", "num_inference_steps": 4, "seed": 5, "stream": True, "partial_images": 2},
    ) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data")]
    assert [event["type"].split(".")[1] for event in events] == ["partial_image", "partial_image", "completed"]
    plain = pictures(generate(server, num_inference_steps=4, seed=5))
    assert base64.b64decode(events[-1]["b64_json"]) == plain[0]
    assert base64.b64decode(events[0]["b64_json"]) != plain[0]


def test_errors_come_as_openais_object(server: httpx.Client) -> None:
    path = "/v1/images/generations"
    headers = {"Content-Type": "application/json"}
    answers = [
        (404, server.get("/v1/nothing")),
        (405, server.get(path)),
        (400, server.post(path, content=b"{", headers=headers)),
        (400, generate(server, quality="high")),
        (400, generate(server, image=base64.b64encode(picture(size=(64, 64))[:100]).decode())),  # the replica's word
        (413, server.post(path, content=b"x" * 2_000_001, headers=headers)),
        (404, generate(server, model="other")),
    ]
    assert answers[4][1].json()["error"]["message"].startswith("image is damaged: ")
    for status, answer in answers:
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len({answer.headers["x-request-id"] for _, answer in answers}) == len(answers)
    named = server.get("/v1/models", headers={"X-Request-ID": "r-17"})
    assert named.headers.get_list("x-request-id") == ["r-17"]  # Serve's proxy gives it, and the interface no second one


def test_a_disconnect_frees_the_replica(server: httpx.Client) -> None:
    for before_the_first_byte in (True, False):

        def leave(early: bool = before_the_first_byte) -> None:
            with httpx.Client(base_url=server.base_url, timeout=2 if early else 60) as client:
                if early:  # not streamed: nothing comes until the end, the client gives up waiting
                    with pytest.raises(httpx.ReadTimeout):
                        client.post("/v1/images/generations", json=LONG)
                else:  # the status line is there: sampling has begun
                    with client.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as response:
                        assert response.status_code == 200

        leave()
        started = time.monotonic()
        assert len(pictures(generate(server, num_inference_steps=1))) == 1
        assert time.monotonic() - started < 20  # the long one would hold the only place for a minute


def test_beyond_the_queue_the_answer_is_429_at_once(server: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.base_url, timeout=120) as client:
        with client.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as running:
            assert running.status_code == 200
            calls = [pool.submit(generate, server, num_inference_steps=1) for _ in range(6)]
            refused = []
            deadline = time.monotonic() + 20
            while len(refused) < 5 and time.monotonic() < deadline:
                refused = [call.result() for call in calls if call.done()]
                time.sleep(0.05)
            assert [answer.status_code for answer in refused] == [429] * 5, [answer.text for answer in refused]
            assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)
            waits = [int(answer.headers["retry-after"]) for answer in refused]
            assert min(waits) >= 2, waits  # for the 3996 steps under way, at the speed measured at the start
            assert server.get("/health").status_code == 200
        assert sorted(call.result().status_code for call in calls) == [200] + [429] * 5  # the one that waited is served


def test_a_client_that_leaves_the_line_leaves_its_place(server: httpx.Client) -> None:
    with server.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as running:
        assert running.status_code == 200
        for _ in range(3):  # the second would be refused if the first still held the place
            with httpx.Client(base_url=server.base_url, timeout=1) as client, pytest.raises(httpx.ReadTimeout):
                generate(client)
    assert generate(server).status_code == 200


def test_more_adapters_than_are_loaded_at_a_time(
    server: httpx.Client, adapter_folder: Path, more_adapters: Path
) -> None:
    names = [f"adapter-{number}" for number in range(MAX_ADAPTERS + 1)]
    for name in names:
        shutil.copytree(adapter_folder, more_adapters / name)
    for name in [*names, *names[:2]]:
        assert generate(server, model=name, num_inference_steps=1).status_code == 200


def test_what_was_accepted_is_finished_through_an_update(server: httpx.Client, arguments: dict[str, str]) -> None:
    from ray import serve

    from serving.app import build

    long = {"num_inference_steps": 300, "seed": 5}
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(generate, server, **long)
        while "animesketch_requests_in_progress 1.0" not in server.get("/metrics").text:
            assert not accepted.done()
        serve.run(build({**arguments, "model": "renamed"}), name="sketch", route_prefix="/")
        assert read_recipe(Image.open(io.BytesIO(pictures(accepted.result())[0])))["model"] == "animesketch"
    deadline = time.monotonic() + 60
    while server.get("/v1/models").json()["data"][0]["id"] != "renamed":
        assert time.monotonic() < deadline
    now = generate(server, model="renamed", seed=5)
    assert read_recipe(Image.open(io.BytesIO(pictures(now)[0])))["model"] == "renamed"


def test_a_killed_replica_is_told_of_and_replaced(server: httpx.Client) -> None:
    victims = processes("sketch", "SketchReplica").values()
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.base_url, timeout=120) as other:
        with server.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as response:
            waits = pool.submit(generate, other)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if "data:" in line]
        assert (events[-1]["type"], events[-1]["error"]["code"]) == ("error", "unavailable")
        assert waits.result().status_code == 200
    assert server.get("/health").status_code == 200


def test_without_keys_only_loopback_is_served() -> None:
    from serving.app import _refuse_open_bind

    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        _refuse_open_bind(host)
    for host in ("0.0.0.0", "192.168.1.5", "::", "10.0.0.1"):
        with pytest.raises(ValueError, match="no key_file is set"):
            _refuse_open_bind(host)
