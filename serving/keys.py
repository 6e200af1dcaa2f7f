"""API keys: a file of sha256 digests, and the check of an Authorization header against it.

One line a key: 64 hex digits, then anything (a name). Empty lines and lines that begin with # are skipped. The key
itself is stored nowhere. To make one and allow it:

    KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')
    printf %s "$KEY" | sha256sum >> /etc/animesketch/keys
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path


def load_keys(path: str) -> frozenset[str]:
    """Return the digests in a key file. FileNotFoundError when it is absent, ValueError when it holds none or else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"No key file {path}. Make one as serving/keys.py says, or leave key_file out.")
    digests = set()
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        word = line.split(maxsplit=1)[0] if line.strip() else "#"
        if word.startswith("#"):
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}", word):  # the line is not shown: it may be a plain key
            raise ValueError(
                f"Key file {path}, line {number}: not a sha256 of 64 hex digits. Write the digest, never the key: "
                'printf %s "$KEY" | sha256sum'
            )
        digests.add(word.lower())
    if not digests:
        raise ValueError(
            f"Key file {path} holds no key, so nobody could call the server. Add one: "
            f'printf %s "$KEY" | sha256sum >> {path}'
        )
    return frozenset(digests)


def find_key(authorization: str, digests: frozenset[str]) -> str | None:
    """Return the digest of the key in an Authorization header; None unless it is one of `digests`.

    The header is `Bearer KEY`, or what a browser makes of its password box: `Basic`, with the key as the password and
    any user name.
    """
    scheme, _, key = authorization.partition(" ")
    key = _password(key) if scheme.lower() == "basic" else key.strip()
    digest = hashlib.sha256((key or "").encode("utf-8", "surrogatepass")).hexdigest()
    found = [hmac.compare_digest(digest, known) for known in digests]
    return digest if key and scheme.lower() in ("bearer", "basic") and any(found) else None


def is_foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Say whether a browser asks this for a page of another site (CSRF), with what it has without that page's doing: a
    password, or that it runs on this machine.

    To follow a link is not that, and no browser sends a Bearer key by itself. Browsers say over HTTPS and on loopback
    for which page they ask (`Sec-Fetch-Site`); over plain HTTP they name the page's origin with all that is no GET.
    `headers` are Starlette's: of any case.
    """
    if headers.get("authorization", "").lower().startswith("bearer "):
        return False
    site = headers.get("sec-fetch-site")
    if site is None:
        origin = headers.get("origin")
        return origin is not None and origin.partition("://")[2] != headers.get("host")
    link = (
        method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )
    return site not in ("same-origin", "none") and not link


def is_loopback(host: str | None) -> bool:
    """Say whether a host, without its port, is this machine by name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _password(text: str) -> str | None:
    """Return the password in the base64 of `user:password`; None when it is none."""
    try:
        _, colon, password = base64.b64decode(text.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return password if colon else None
