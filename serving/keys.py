"""API keys: a file of sha256 digests, and the check of an Authorization header against it.

One line a key: 64 hex digits, then anything (a name). Empty lines and lines that begin with # are skipped. The key
itself is stored nowhere. To make one and allow it:

    KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')
    printf %s "$KEY" | sha256sum >> /etc/animesketch/keys
"""

from __future__ import annotations

import hashlib
import hmac
import re
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
            f"Key file {path} holds no key, so nobody could call the server. Add one as serving/keys.py says."
        )
    return frozenset(digests)


def find_key(authorization: str, digests: frozenset[str]) -> str | None:
    """Return the digest of the key in an `Authorization: Bearer KEY` header; None unless it is one of `digests`."""
    scheme, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).hexdigest()
    found = [hmac.compare_digest(digest, known) for known in digests]
    return digest if scheme.lower() == "bearer" and any(found) else None
