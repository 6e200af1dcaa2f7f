"""The studio: one page that draws by the public API, for people who would rather look than type."""

from __future__ import annotations

import functools
from pathlib import Path

from fastapi.responses import HTMLResponse

# only what this server gives; pictures are data that the page made or was sent
_POLICY = (
    "default-src 'none'; connect-src 'self' data:; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def studio() -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(_text(), headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})


@functools.cache
def _text() -> str:
    return Path(__file__).with_name("studio.html").read_text()
