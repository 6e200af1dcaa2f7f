"""The official `openai` client against the interface on a real socket, with a real engine where pictures matter."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_edit_partial_image_event import ImageEditPartialImageEvent
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent
from PIL import Image

from serving.config import ServingConfig
from serving.engine import Engine
from serving.pictures import read_recipe
from serving.protocol import ApiError, Busy
from serving.worker import Worker
from tests.asking import CONFIG, EngineBackend, FakeBackend, listening

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "the-right-key"
KEYS = frozenset({hashlib.sha256(KEY.encode()).hexdigest()})
QUICK: Any = {"num_inference_steps": 3}  # what OpenAI's fields don't have goes by `extra_body`


def official(port: int, api_key: str = KEY, max_retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=api_key, max_retries=max_retries, timeout=60)


@pytest.fixture(scope="module")
def client(twin: Path, adapter_folder: Path) -> Iterator[OpenAI]:
    engine = Engine.load(str(adapter_folder), base=str(twin))
    with (
        listening(EngineBackend(Worker(engine, "animesketch")), ServingConfig(adapter="/a"), KEYS) as port,
        official(port) as client,
    ):
        yield client


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


def image_of(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def noise() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


# pictures


def test_generate_gives_n_pictures_of_their_own_seeds(client: OpenAI) -> None:
    reply = client.images.generate(
        model="animesketch", prompt="a girl", n=2, size="64x72", output_format="webp", output_compression=100,  # type: ignore[arg-type]
        response_format="b64_json", user="u", extra_body={**QUICK, "seed": 41, "guidance_scale": 2.5},
    )  # fmt: skip
    assert reply.data is not None
    assert [item.seed for item in reply.data] == [41, 42]  # type: ignore[attr-defined]
    images = [image_of(item) for item in reply.data]
    assert [(image.format, image.size) for image in images] == [("WEBP", (64, 72))] * 2
    recipes = [read_recipe(image) for image in images]
    assert [(r["prompt"], r["seed"], r["num_inference_steps"], r["guidance_scale"]) for r in recipes] == [
        ("a girl", 41, 3, 2.5), ("a girl", 42, 3, 2.5),
    ]  # fmt: skip
    assert images[0].tobytes() != images[1].tobytes()
    assert (reply.size, reply.output_format) == ("64x72", "webp")
    assert abs(reply.created - time.time()) < 60


def test_the_same_request_gives_the_same_bytes_and_another_seed_does_not(client: OpenAI) -> None:
    def ask(seed: int) -> str:
        reply = client.images.generate(prompt="a girl", extra_body={**QUICK, "seed": seed})
        return reply.data[0].b64_json  # type: ignore[index, return-value]

    assert ask(5) == ask(5)
    assert ask(5) != ask(6)


@pytest.mark.parametrize(("format", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_format_is_the_format_of_the_file(client: OpenAI, format: Any, pillow: str) -> None:
    reply = client.images.generate(prompt="a girl", output_format=format, extra_body=QUICK)
    assert image_of(reply.data[0]).format == pillow  # type: ignore[index]


def test_edit_takes_the_sketch_as_a_file(client: OpenAI) -> None:
    extra = {**QUICK, "seed": 5, "adapter_scale": 1.0, "negative_prompt": "blurry"}
    sketch = noise()
    edited = client.images.edit(image=("sketch.png", sketch), prompt="a girl", n=2, extra_body=extra)
    listed = client.images.edit(image=[("sketch.png", sketch)], prompt="a girl", n=2, extra_body=extra)
    inline = client.images.generate(
        prompt="a girl", n=2, extra_body={**extra, "image": base64.b64encode(sketch).decode()}
    )
    plain = client.images.generate(prompt="a girl", n=2, extra_body={**extra, "adapter_scale": 0.0})
    assert edited.data == listed.data == inline.data
    assert edited.data != plain.data
    recipe = read_recipe(image_of(edited.data[1]))  # type: ignore[index]
    pixels = Image.open(io.BytesIO(sketch)).tobytes()
    assert recipe["reference_sha256"] == hashlib.sha256(pixels).hexdigest()
    assert (recipe["seed"], recipe["adapter_scale"], recipe["negative_prompt"]) == (6, 1.0, "blurry")


def test_generate_streams_typed_events(client: OpenAI) -> None:
    extra = {"num_inference_steps": 4, "seed": 5}
    with client.images.generate(prompt="a girl", stream=True, partial_images=2, extra_body=extra) as stream:
        events = list(stream)
    *partial, last = events
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partial)
    assert isinstance(last, ImageGenCompletedEvent)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in partial] == [0, 1]  # type: ignore[union-attr]
    assert {(event.size, event.output_format, event.seed) for event in events} == {("64x64", "png", 5)}  # type: ignore[union-attr]
    assert all(abs(event.created_at - time.time()) < 60 for event in events)
    plain = client.images.generate(prompt="a girl", extra_body=extra)
    assert last.b64_json == plain.data[0].b64_json  # type: ignore[index]
    assert partial[0].b64_json != last.b64_json


def test_edit_streams_typed_events_of_every_picture(client: OpenAI) -> None:
    with client.images.edit(
        image=("s.png", noise()), prompt="a girl", n=2, stream=True, partial_images=1, extra_body={**QUICK, "seed": 5}
    ) as stream:
        events = list(stream)
    partial, completed = events[:2], events[2:]
    assert all(isinstance(event, ImageEditPartialImageEvent) for event in partial)
    assert all(isinstance(event, ImageEditCompletedEvent) for event in completed)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"] * 2
    assert [event.seed for event in completed] == [5, 6]  # type: ignore[union-attr]


def test_the_async_client_gets_its_pictures_side_by_side(client: OpenAI) -> None:
    async def main() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0) as http:
            asked = [http.images.generate(prompt="a girl", extra_body={**QUICK, "seed": seed}) for seed in range(4)]
            return [reply.data[0].seed for reply in await asyncio.gather(*asked)]  # type: ignore[index, attr-defined]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_models_are_listed_with_what_they_are(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve("animesketch") == model
    for other in ("other", "not/mine"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve(other)
        assert missing.value.code == "model_not_found"
    assert (model.id, model.object, model.owned_by) == ("animesketch", "model", "animesketch")
    assert (model.native_size, model.random_weights) == ("64x64", True)  # type: ignore[attr-defined]


def test_a_reply_carries_the_clients_request_id(client: OpenAI) -> None:
    asked = client.images.with_raw_response
    named = asked.generate(prompt="a girl", extra_body=QUICK, extra_headers={"X-Request-ID": "drawing-17"})
    assert named.headers.get_list("x-request-id") == ["drawing-17"]
    assert named.parse()._request_id == "drawing-17"
    assert len(asked.generate(prompt="a girl", extra_body=QUICK).headers["x-request-id"]) == 32


# errors


def test_errors_are_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a girl", n=5)
    assert (bad.value.param, bad.value.code, bad.value.type) == ("n", "invalid_value", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a girl", quality="high")
    assert (bad.value.param, bad.value.code) == ("quality", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(image=[("a.png", noise()), ("b.png", noise())], prompt="a girl")
    assert (bad.value.param, bad.value.code) == ("image", "duplicate_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a girl", model="dall-e-3")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with official(client.base_url.port or 0, "wrong") as stranger:
        for call in (
            stranger.models.list,
            lambda: stranger.images.generate(prompt="a", stream=True),
            lambda: stranger.images.edit(prompt="a", image=("a.png", noise())),
        ):
            with pytest.raises(openai.AuthenticationError) as locked:
                call()
            assert (locked.value.code, locked.value.status_code) == ("invalid_api_key", 401)


def test_a_body_over_the_limit_is_answered_though_the_client_still_sends(fake: FakeBackend) -> None:
    with listening(fake) as port, official(port) as client, pytest.raises(openai.APIStatusError) as large:
        client.images.edit(image=("s.png", bytes(200_000)), prompt="a girl")
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")


def test_the_client_waits_as_retry_after_says_and_then_is_served(fake: FakeBackend) -> None:
    limits = dataclasses.replace(CONFIG.limits, max_per_minute_per_key=60)
    with (
        listening(fake, dataclasses.replace(CONFIG, limits=limits), KEYS) as port,
        official(port, max_retries=1) as patient,
        official(port) as hasty,
    ):
        for _ in range(60):
            hasty.images.generate(prompt="a girl")
        with pytest.raises(openai.RateLimitError) as refused:
            hasty.images.generate(prompt="a girl")
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "1"
        begun = time.monotonic()
        assert patient.images.generate(prompt="a girl").data
    assert 0.9 < time.monotonic() - begun < 5  # its own wait would be half a second at most


def test_a_full_queue_is_a_rate_limit_error(fake: FakeBackend) -> None:
    fake.fail = Busy()
    with listening(fake) as port, official(port) as client, pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(prompt="a girl")
    assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
    assert refused.value.response.headers["retry-after"] == "5"


def test_failures_of_the_server_are_internal_server_errors(fake: FakeBackend) -> None:
    with listening(fake) as port, official(port) as client:
        for failure, status, code in [
            (ApiError(503, "No replica.", type="server_error", code="unavailable"), 503, "unavailable"),
            (RuntimeError("secret detail"), 500, None),
        ]:
            fake.fail = failure
            with pytest.raises(openai.InternalServerError) as failed:
                client.images.generate(prompt="a girl")
            assert (failed.value.status_code, failed.value.code, failed.value.type) == (status, code, "server_error")
            assert "secret" not in str(failed.value)
        assert failed.value.request_id is not None
        assert failed.value.request_id in failed.value.message


def test_a_failure_after_the_first_event_is_an_api_error_of_the_stream(fake: FakeBackend) -> None:
    fake.fail_after, fake.fail = 1, RuntimeError("secret detail")
    with listening(fake) as port, official(port) as client:
        with client.images.generate(prompt="a girl", stream=True, partial_images=3) as stream:
            assert isinstance(next(stream), ImageGenPartialImageEvent)
            with pytest.raises(openai.APIError) as failed:
                next(stream)
        assert not isinstance(failed.value, openai.APIStatusError)
        assert failed.value.type == "server_error"
        assert "secret" not in str(failed.value)
    assert fake.closed == 1
