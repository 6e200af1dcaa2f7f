"""Requests, responses and errors of the HTTP interface: OpenAI Images with a few fields more.

A request is checked in two steps: names and types by pydantic, then values against the server's `Limits`. Every
refusal is an ApiError, which has the status, the field (`param`) and OpenAI's error object.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.config import Limits
from serving.pictures import MOST_EXIF, BadPicture, check_picture
from serving.recipe import MAX_SEED, Recipe

# fields of OpenAI's image routes that have no meaning here
UNSUPPORTED = ("background", "input_fidelity", "mask", "moderation", "quality", "style")


class ApiError(Exception):
    """An answer other than 200: HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        message, param = _sendable(message), None if param is None else _sendable(param)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class Busy(Exception):
    """Every place in the replicas and in the queue is taken."""


class _Request(BaseModel):
    """Fields that both routes take."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="What to draw. What the tokenizer cuts off is told in `warnings`.")
    model: str | None = Field(None, description="A name that /v1/models lists.")
    n: int = Field(1, ge=1, description="Number of pictures; picture i uses seed + i.")
    size: str | None = Field(
        None, description="WIDTHxHEIGHT, multiples of 8; omitted or `auto`: the model's native size."
    )
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp; png is lossless.")
    stream: bool = Field(False, description="Send server-sent events with partial pictures.")
    partial_images: int = Field(0, ge=0, le=3, description="Partial pictures per picture, with `stream`.")
    user: str | None = Field(None, max_length=512, description="Accepted and ignored.")
    negative_prompt: str = Field("", description="What not to draw.")
    num_inference_steps: int = Field(50, ge=1, description="DDIM steps.")
    guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance.")
    adapter_scale: float = Field(0.5, ge=0, description="Weight of the reference sketch, the paper's alpha.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Omitted: drawn at random, and returned.")


class GenerationRequest(_Request):
    """JSON body of /v1/images/generations."""

    image: str | None = Field(None, description="Reference sketch: base64 of a PNG, JPEG or WebP file.")


class EditRequest(_Request):
    """Form of /v1/images/edits, besides the file `image`: text that reads as the same values."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class ImageData(BaseModel):
    """One picture of a response."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """Answer of both routes."""

    created: int
    data: list[ImageData]
    size: str
    output_format: str
    warnings: list[str]


class _Event(BaseModel):
    """What the pictures of a stream have in common."""

    b64_json: str
    seed: int
    created_at: int
    size: str
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["auto"]
    background: Literal["opaque"]


class PartialEvent(_Event):
    """Event of a stream: a partial picture."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_Event):
    """Event of a stream: a finished picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    warnings: list[str]


class Model(BaseModel):
    """One model of a server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    base: str
    base_weights_hash: str
    native_size: str
    random_weights: bool


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok"]


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer other than 200."""

    error: ErrorBody


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in `body`. ApiError 400 for anything else, duplicate keys, NaN, and endless nesting.

    What has more values than any request is refused before it is parsed: 16 MB of `[],` are ten seconds of work.
    """
    if sum(map(body.count, (b"[", b"{", b",", b":"))) > 2 * limits.max_prompt_chars + 2000:
        raise ApiError(400, "The JSON body has more values than a request can have.", code="invalid_json")
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "The JSON body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # also not UTF-8, and numbers of thousands of digits
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The JSON body must be an object.", code="invalid_json")
    return value


def parse_request(
    cls: type[_Request], values: dict[str, Any], *, native_size: tuple[int, int], factor: int, limits: Limits
) -> tuple[_Request, Recipe]:
    """Return a checked request and its recipe, without a reference from `values`' file part; ApiError 400 otherwise.

    `values` are the fields of a JSON object or of a form; null means omitted. `native_size` is used when `size` is
    omitted, `factor` is the number of pixels that sides must be multiples of. A default beyond a limit is the limit.
    """
    request = _validate(cls, values)
    for name in ("prompt", "negative_prompt"):
        _check_text(name, getattr(request, name), limits.max_prompt_chars)
    if request.output_format == "jpeg" and len(json.dumps([request.prompt, request.negative_prompt])) > MOST_EXIF:
        raise _invalid(
            "prompt", "The prompts are too long for the recipe in a JPEG. Ask for output_format png or webp."
        )
    numbers = {}
    for name, most in (
        ("n", limits.max_n),
        ("num_inference_steps", limits.max_num_inference_steps),
        ("guidance_scale", limits.max_guidance_scale),
        ("adapter_scale", limits.max_adapter_scale),
    ):
        numbers[name] = getattr(request, name)
        if numbers[name] > most:
            if name in request.model_fields_set:
                raise _invalid(name, f"{name} must be at most {most} on this server, got {numbers[name]}.")
            numbers[name] = most
    if request.partial_images and not request.stream:
        raise _invalid("partial_images", "partial_images needs stream: true.")
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed > MAX_SEED - request.n + 1:
        raise _invalid("seed", f"seed must be at most {MAX_SEED - request.n + 1} for n = {request.n}, got {seed}.")
    recipe = Recipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=seed,
        size=_parse_size(request.size, native_size, factor, limits),
        **numbers,
    )
    return request, recipe


def decode_base64(text: str, limits: Limits) -> bytes:
    """Return the bytes of a base64 field `image`; ApiError 400 when it is too long, not base64, or a URL."""
    if len(text) > (limits.max_image_bytes + 2) // 3 * 4:
        raise _invalid("image", f"image is longer than {limits.max_image_bytes} bytes, this server's limit.")
    if ":" in text[:64]:
        raise _invalid("image", "image must be the base64 of a picture file; URLs, data: included, are not read.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid("image", f"image is not valid base64: {error}.") from None


def check_reference(data: bytes, limits: Limits) -> None:
    """Refuse a file that can't be a reference by its size and header: ApiError 400 naming `image`."""
    if len(data) > limits.max_image_bytes:
        raise _invalid(
            "image", f"image has {len(data)} bytes, more than this server's limit of {limits.max_image_bytes}."
        )
    try:
        check_picture(data, limits.max_image_pixels)
    except BadPicture as error:
        raise bad_reference(error) from None


def bad_reference(error: BadPicture) -> ApiError:
    """Return the refusal of a reference."""
    return _invalid("image", f"image {error}")


def form_fields(items: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], Any]:
    """Return the text fields and the file `image` (or None) of a form. ApiError 400 for other files and for doubles.

    OpenAI's client sends a list of files as `image[]`: a list of one is that one.
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        name = "image" if name == "image[]" else name
        if name in fields:
            once = "One reference sketch is taken." if name == "image" else f"{name} is given twice."
            raise _invalid(name, once, code="duplicate_parameter")
        if not isinstance(value, str) and name != "image":
            _refuse_unknown(name)
            raise _invalid(name, f"{name} must be text, not a file.")
        fields[name] = value
    image = fields.pop("image", None)
    if isinstance(image, str):
        raise _invalid("image", "image must be a file part of the form, with a filename.")
    return fields, image


def _validate(cls: type[_Request], values: dict[str, Any]) -> _Request:
    """Return the request that `values` are; the first thing wrong is an ApiError 400."""
    for name in values:
        if name not in cls.model_fields:
            _refuse_unknown(name)
    try:
        return cls.model_validate({name: _whole(value) for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        got = "" if first["type"] == "missing" else f" Got {str(first['input'])[:100]!r}."
        raise _invalid(param, f"{param}: {first['msg']}.{got}", code=code) from None


def _whole(value: Any) -> Any:
    """Return 20 for 20.0: the same number in JSON, whatever wrote it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_unknown(name: str) -> None:
    if name in UNSUPPORTED:
        raise _invalid(name, f"{name} is not supported by this server. Leave it out.", code="unsupported_parameter")
    known = ", ".join(sorted({*EditRequest.model_fields, "image"}))
    raise _invalid(name[:100], f"Unknown field {name[:100]!r}. Known here: {known}.", code="unknown_parameter")


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise _invalid(name, f"{name} has {len(text)} characters, more than this server's limit of {most}.")
    if "\0" in text:
        raise _invalid(name, f"{name} holds a NUL character.")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise _invalid(name, f"{name} holds half of a surrogate pair: it is not valid Unicode.")


def _parse_size(size: str | None, native_size: tuple[int, int], factor: int, limits: Limits) -> tuple[int, int]:
    if size is None or size == "auto":
        return native_size
    width, sign, height = size.partition("x")
    if not (sign and all(side.isascii() and side.isdigit() and len(side) <= 6 for side in (width, height))):
        raise _invalid(
            "size", f"size must be WIDTHxHEIGHT, such as {native_size[0]}x{native_size[1]}, got {size[:50]!r}."
        )
    w, h = int(width), int(height)
    if w % factor or h % factor:
        raise _invalid("size", f"size must be multiples of {factor}, got {w}x{h}.")
    most = min(limits.max_pixels, int(limits.max_times_native * native_size[0] * native_size[1]))
    if not all(limits.min_side <= side <= limits.max_side for side in (w, h)) or w * h > most:
        raise _invalid(
            "size",
            f"Sides must be from {limits.min_side} to {limits.max_side} and width x height at most "
            f"{most} on this server, got {w}x{h}.",
        )
    return w, h


def _sendable(text: str) -> str:
    """Return `text` as valid Unicode: JSON can name a field by half of a surrogate pair, which no UTF-8 can say."""
    return text.encode("utf-8", "backslashreplace").decode()


def _invalid(param: str | None, message: str, *, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _invalid(key[:100], f"{key[:100]} is given twice.", code="duplicate_parameter")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
