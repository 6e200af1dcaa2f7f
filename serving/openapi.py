"""What /openapi.json says of the routes: bodies with this server's limits, and every answer that can come."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serving.config import Limits
from serving.protocol import CompletedEvent, ErrorResponse, ImagesResponse, PartialEvent

_ERRORS = {
    400: "A field is wrong; `param` names it",
    401: "No or a wrong key",
    403: "A browser asks for a page of another site",
    404: "No such model",
    408: "The body took too long",
    413: "The body is too large",
    429: "Every place is taken; `Retry-After` says when to try again",
    500: "The server failed",
    503: "No replica, or no result in time",
}
_ERROR = {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}
_REQUEST_ID = {
    "X-Request-ID": {
        "description": "What the request is called in the server's log: the client's own name of up to 128 visible "
        "ASCII characters, or one made here.",
        "schema": {"type": "string"},
    }
}
_NOT_AGAIN = {"X-Should-Retry": {"description": "false: trying again is of no use.", "schema": {"type": "string"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}


def responses(model: type[BaseModel], *errors: int) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route: 200 with `model`, and error objects of those statuses."""
    refusals = {status: {"model": ErrorResponse, **_refusal(status)} for status in errors}
    return {200: {"model": model, "description": "Done", "headers": _REQUEST_ID}, **refusals}


def pictures() -> dict[int | str, dict[str, Any]]:
    """Return the answers of the routes that draw: as JSON, or as events."""
    found = responses(ImagesResponse, *_ERRORS)
    data = [PartialEvent.model_json_schema(), CompletedEvent.model_json_schema(), _ERROR]
    event = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": data}}
    fields = {"event": {"type": "string"}, "data": event}
    found[200]["content"] = {
        "text/event-stream": {"itemSchema": {"type": "object", "properties": fields, "required": [*fields]}}
    }
    return found


def text(*errors: int) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route that answers with text, and refuses with error objects of those statuses."""
    refusals = {status: {"content": {"application/json": {"schema": _ERROR}}, **_refusal(status)} for status in errors}
    return {200: {"description": "Done", "headers": _REQUEST_ID}, **refusals}


def _refusal(status: int) -> dict[str, Any]:
    headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {}) | (_NOT_AGAIN if status == 503 else {})
    return {"description": _ERRORS[status], "headers": headers}


def json_body(model: type[BaseModel], limits: Limits) -> dict[str, Any]:
    """Return the entry of a JSON body that the route parses itself. Null means omitted, as OpenAI has it."""
    schema = _limited(model, limits)
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            kept = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(model: type[BaseModel], limits: Limits) -> dict[str, Any]:
    """Return the entry of a form with the file `image`."""
    schema = _limited(model, limits)
    schema["properties"]["image"] = {
        "type": "string", "format": "binary", "description": "Reference sketch: a PNG, JPEG or WebP file.",
    }  # fmt: skip
    schema["required"] = [*schema["required"], "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _limited(model: type[BaseModel], limits: Limits) -> dict[str, Any]:
    """Return the schema of a request on a server with `limits`; no field says that it may be null."""
    schema = model.model_json_schema()
    fields = schema["properties"]
    for field in fields.values():
        if "anyOf" in field:
            (kind,) = (kind for kind in field.pop("anyOf") if kind != {"type": "null"})
            field |= kind
            if field.get("default", ...) is None:
                del field["default"]
    for name in ("n", "num_inference_steps", "guidance_scale", "adapter_scale"):
        most = getattr(limits, f"max_{name}")
        fields[name] |= {"maximum": most, "default": min(most, fields[name]["default"])}
    for name in ("prompt", "negative_prompt"):
        fields[name] |= {"maxLength": limits.max_prompt_chars, "pattern": "^[^\\x00]*$"}  # no NUL
    fields["size"]["pattern"] = "^(auto|[0-9]{1,6}x[0-9]{1,6})$"
    if "image" in fields:
        fields["image"] |= {"contentEncoding": "base64", "maxLength": (limits.max_image_bytes + 2) // 3 * 4}
    return schema
