"""The HTTP interface over a backend without models: what is refused, how it is said, and what gets through."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.config import Limits, ServingConfig
from serving.pictures import MOST_EXIF, read_recipe, write_picture
from serving.protocol import ApiError, parse_json
from serving.recipe import MAX_SEED
from tests.asking import (
    CONFIG,
    EDITS,
    GENERATIONS,
    GOOD,
    JSON,
    FakeBackend,
    ask,
    b64,
    check_error,
    huge_header,
    picture,
)

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
    ("size", "512x264", "invalid_value"),  # within all pixels, but more than 16 times the base's own
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
        (b'{"\\ud800": 1}', "\\ud800", "unknown_parameter"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "\\ud800", "duplicate_parameter"),
        (b'{"prompt": "a", "user": "\\ud800"}', "user", "invalid_value"),
        (b'{"prompt": "a", "guidance_scale": ' + b"9" * 400 + b"}", "guidance_scale", "invalid_value"),
        (b"[" * 10_000 + b"]" * 10_000, None, "invalid_json"),
        (b'{"prompt":' * 5000 + b"1" + b"}" * 5000, None, "invalid_json"),
        (b"[" * 1400 + b"]" * 1400, None, "invalid_json"),  # few enough to be parsed
        (b'{"prompt":' * 1400 + b"1" + b"}" * 1400, None, "invalid_json"),
        (b"{}", "prompt", "missing_required_parameter"),
        (b'{"prompt": null}', "prompt", "missing_required_parameter"),
    ],
    ids=_name,
)
def test_a_bad_json_body_is_refused(body: bytes, param: str | None, code: str) -> None:
    check_error(ask("POST", GENERATIONS, content=body, headers=JSON), 400, param, code)


def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.loads", lambda *args, **options: pytest.fail("it was parsed"))
    for values in (b"[[" + b"],[" * 4_000_000 + b"]]", b'{"":0' + b',"":0' * 2_000_000 + b"}", b"{" * 2_000_000):
        with pytest.raises(ApiError, match="more values"):
            parse_json(values, Limits())


def test_a_prompt_of_nothing_but_commas_is_no_body_of_too_many_values() -> None:
    backend = FakeBackend()
    punctuation = {"prompt": "," * 500, "negative_prompt": "[" * 500, "user": ":" * 512}
    assert ask("POST", GENERATIONS, backend=backend, json=punctuation).status_code == 200
    assert backend.jobs[0].recipe.prompt == "," * 500


def test_a_prompt_of_a_megabyte_is_refused_by_name() -> None:
    config = ServingConfig(adapter="/a")
    error = check_error(ask("POST", GENERATIONS, json={"prompt": "鉛" * 350_000}, config=config), 400, "prompt")
    assert error["message"] == "prompt has 350000 characters, more than this server's limit of 4000."
    form = {"prompt": "a" * 1_000_000}
    files = {"image": ("a.png", picture())}
    check_error(ask("POST", EDITS, data=form, files=files, config=config), 400, "prompt", "invalid_value")


def test_a_whole_number_may_be_written_with_a_point() -> None:
    backend = FakeBackend()
    body = b'{"prompt": "a", "n": 2.0, "num_inference_steps": 2e1, "seed": 4.0, "guidance_scale": 7}'
    assert ask("POST", GENERATIONS, backend=backend, content=body, headers=JSON).status_code == 200
    recipe = backend.jobs[0].recipe
    assert (recipe.n, recipe.num_inference_steps, recipe.seed, recipe.guidance_scale) == (2, 20, 4, 7.0)


def test_a_default_beyond_a_servers_limit_is_the_limit() -> None:
    backend = FakeBackend()
    limits = Limits(max_num_inference_steps=20, max_guidance_scale=5.0)
    config = ServingConfig(adapter="/a", limits=limits)
    assert ask("POST", GENERATIONS, backend=backend, json=GOOD, config=config).status_code == 200
    recipe = backend.jobs[0].recipe
    assert (recipe.num_inference_steps, recipe.guidance_scale) == (20, 5.0)
    error = check_error(
        ask("POST", GENERATIONS, json={**GOOD, "num_inference_steps": 50}, config=config), 400, "num_inference_steps"
    )
    assert "at most 20" in error["message"]
    schema = ask("GET", "/openapi.json", config=config).json()
    for path, kind in ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data")):
        fields = schema["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]["properties"]
        assert fields["num_inference_steps"]["default"] == 20


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
    assert (recipe.size, recipe.n, job.reference, job.output_format) == ((64, 64), 1, None, "png")
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
    (job,) = backend.jobs
    recipe = job.recipe
    assert (recipe.prompt, recipe.negative_prompt, recipe.num_inference_steps) == ("鉛筆 ✏️", "no", 7)
    assert (recipe.guidance_scale, recipe.adapter_scale, recipe.seed, recipe.n) == (3, 0.25, 41, 3)
    assert recipe.size == (128, 64)
    assert job.reference == picture("JPEG")
    data = response.json()["data"]
    assert [item["seed"] for item in data] == [41, 42, 43]
    image = Image.open(io.BytesIO(base64.b64decode(data[2]["b64_json"])))
    assert (image.format, image.size, read_recipe(image)) == ("JPEG", (128, 64), {"seed": 43})


def test_adapter_scale_without_an_image_is_told_about() -> None:
    body = ask("POST", GENERATIONS, json={**GOOD, "adapter_scale": 1}).json()
    assert any("adapter_scale has no effect" in warning for warning in body["warnings"])


def test_prompts_that_a_jpeg_cannot_hold_are_refused_before_it_is_drawn() -> None:
    limits = dataclasses.replace(CONFIG.limits, max_prompt_chars=4000, max_body_bytes=200_000)
    config = dataclasses.replace(CONFIG, limits=limits)

    def told(char: str, format: str) -> httpx.Response:
        body = {"prompt": 4000 * char, "negative_prompt": 4000 * char, "output_format": format}
        return ask("POST", GENERATIONS, config=config, json=body)

    assert [told("線", "jpeg").status_code, told("\U0001f58c", "webp").status_code] == [200, 200]
    check_error(told("\U0001f58c", "jpeg"), 400, "prompt", "invalid_value")
    write_picture(
        Image.new("RGB", (8, 8)), "jpeg", 90, {"prompt": MOST_EXIF * "a", "more": 1000 * "a"}
    )  # there is room


# edits


def test_an_edit_takes_its_fields_as_text_and_the_sketch_as_a_file() -> None:
    backend = FakeBackend()
    form = {"prompt": "a", "n": "2", "seed": "5", "guidance_scale": "4.5", "size": "64x72", "output_format": "webp"}
    response = ask("POST", EDITS, backend=backend, data=form, files={"image": ("s.webp", picture("WEBP"))})
    assert response.status_code == 200, response.text
    (job,) = backend.jobs
    recipe = job.recipe
    assert (recipe.n, recipe.seed, recipe.guidance_scale, recipe.size) == (2, 5, 4.5, (64, 72))
    assert job.reference == picture("WEBP")
    assert [item["seed"] for item in response.json()["data"]] == [5, 6]


@pytest.mark.parametrize(
    ("form", "files", "param", "code"),
    [
        ({"prompt": "a"}, [("other", b"x")], "other", "unknown_parameter"),
        ({"prompt": "a"}, [("mask", b"x")], "mask", "unsupported_parameter"),
        ({"prompt": "a"}, [("image[]", picture()), ("image[]", picture())], "image", "duplicate_parameter"),
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


def test_health_says_when_no_replica_runs() -> None:
    backend = FakeBackend()
    assert ask("GET", "/health", backend=backend).json() == {"status": "ok"}
    assert ask("HEAD", "/health", backend=backend).status_code == 200
    backend.down = "No replica runs: DEPLOY_FAILED"
    error = check_error(ask("GET", "/health", backend=backend), 503, None, "unavailable")
    assert "DEPLOY_FAILED" in error["message"]
    assert ask("HEAD", "/health", backend=backend).status_code == 503


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
