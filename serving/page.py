"""The studio: one page that draws by the public API, for people who would rather look than type."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from pathlib import Path

from fastapi.responses import HTMLResponse

from trainer.base import GUIDANCE, MICRO

_FOLDER = Path(__file__).with_name("studio")
_SCRIPTS = ("sheet.js", "history.js", "code.js", "studio.js")


def studio() -> HTMLResponse:
    """Return the page, whole: style and scripts are in it, and its policy lets nothing else in."""
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


@functools.cache
def _page() -> tuple[str, str]:
    """Return the text, and a Content-Security-Policy that names its style and script by their hashes."""
    style = (_FOLDER / "style.css").read_text()
    parts = ['"use strict";', f"const GUIDANCE = {json.dumps({MICRO: GUIDANCE})};"]
    script = "\n".join([*parts, *((_FOLDER / name).read_text() for name in _SCRIPTS)])
    text = (_FOLDER / "page.html").read_text()
    text = text.replace("/* style.css */", style).replace("/* script.js */", script)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data: blob:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
