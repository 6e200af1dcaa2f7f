"""API keys: what needs one, and the file that holds their digests."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from serving.keys import allowed, load_keys
from tests.asking import (
    EDITS,
    GENERATIONS,
    GOOD,
    JSON,
    ask,
    check_error,
)


def test_with_keys_every_route_but_health_needs_one() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "right"},
             {"Authorization": "Bearer "}, {"Authorization": f"Bearer {next(iter(digests))}"},
             {"Authorization": b"Bearer \xff\xfe"}]  # fmt: skip
    routes = [("POST", GENERATIONS), ("POST", EDITS), ("GET", "/v1/models"), ("GET", "/docs"), ("GET", "/openapi.json"),
              ("GET", "/metrics"), ("GET", "/nowhere")]  # fmt: skip
    for headers in wrong:
        for method, path in routes:
            check_error(ask(method, path, digests=digests, headers=headers), 401, None, "invalid_api_key")
    assert ask("GET", "/health", digests=digests).status_code == 200
    right = {"Authorization": "Bearer right"}
    assert ask("POST", GENERATIONS, digests=digests, headers=right, json=GOOD).status_code == 200
    # no key, no look at the body: the length is not even compared
    large = ask("POST", GENERATIONS, digests=digests, content=b"x" * 70_000, headers=JSON)
    assert large.status_code == 401


def test_a_key_file_holds_digests_only(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"# ours\n\n{digest}  -\n{digest.upper()} again\n")
    assert load_keys(str(file)) == {digest}
    assert allowed("bearer k", load_keys(str(file)))
    assert not allowed("Bearer K", load_keys(str(file)))
    file.write_text("plain-secret-key\n")
    with pytest.raises(ValueError, match="line 1: not a sha256") as error:
        load_keys(str(file))
    assert "plain-secret-key" not in str(error.value)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        load_keys(str(file))
    with pytest.raises(FileNotFoundError, match="No key file"):
        load_keys(str(tmp_path / "absent"))
