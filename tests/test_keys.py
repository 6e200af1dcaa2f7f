"""API keys: what needs one, and the file that holds their digests."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import re
from typing import Any

import httpx
import pytest

from serving.api import create_api
from serving.keys import find_key, load_keys
from serving.protocol import ApiError
from serving.rates import Rates
from tests.asking import (
    CONFIG,
    EDITS,
    GENERATIONS,
    GOOD,
    JSON,
    FakeBackend,
    ask,
    check_error,
    client,
)


def basic(*parts: str) -> dict[str, str]:
    """The header that a browser makes of user name and password."""
    return {"Authorization": f"Basic {base64.b64encode(':'.join(parts).encode()).decode()}"}


def test_with_keys_every_route_but_health_needs_one() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "right"},
             {"Authorization": "Bearer "}, {"Authorization": f"Bearer {next(iter(digests))}"},
             {"Authorization": b"Bearer \xff\xfe"}, basic("x", "wrong"), basic("right", ""),
             basic("right")]  # fmt: skip
    routes = [("POST", GENERATIONS), ("POST", EDITS), ("GET", "/v1/models"), ("GET", "/docs"), ("GET", "/openapi.json"),
              ("GET", "/metrics"), ("GET", "/v1/models/animesketch"), ("GET", "/static-offline-docs/swagger-ui.css"),
              ("GET", "/nowhere")]  # fmt: skip
    for headers in wrong:
        for method, path in routes:
            check_error(ask(method, path, digests=digests, headers=headers), 401, None, "invalid_api_key")
    assert ask("GET", "/health", digests=digests).status_code == 200
    right = {"Authorization": "Bearer right"}
    assert ask("POST", GENERATIONS, digests=digests, headers=right, json=GOOD).status_code == 200
    # no key, no look at the body: the length is not even compared
    large = ask("POST", GENERATIONS, digests=digests, content=b"x" * 70_000, headers=JSON)
    assert large.status_code == 401


def test_a_browser_is_asked_for_the_key_and_gives_it_as_a_password() -> None:
    digests = frozenset({hashlib.sha256("ключ:1".encode()).hexdigest()})
    key = basic("anybody", "ключ:1")
    pages = dict.fromkeys(("/", "/studio", "/docs"), 'Basic realm="AnimeSketch"')
    for path, asked in (pages | {"/v1/models": "Bearer", GENERATIONS: "Bearer"}).items():
        refused = ask("GET", path, digests=digests)
        check_error(refused, 401, None, "invalid_api_key")
        assert refused.headers["WWW-Authenticate"] == asked
    assert ask("GET", "/", digests=digests, headers=key, follow_redirects=True).url.path == "/studio"
    scripts = re.findall(r'(?:src|href)="([^"]+)"', ask("GET", "/docs", digests=digests, headers=key).text)
    assert len(scripts) >= 2
    assert all(path.startswith("/") for path in scripts)  # none of another host
    for path in ("/studio", "/docs", "/v1/models", "/metrics", *scripts):
        assert ask("GET", path, digests=digests, headers=key).status_code == 200
    assert ask("POST", GENERATIONS, digests=digests, headers=key, json=GOOD).status_code == 200


def test_a_page_of_another_site_cannot_use_the_browsers_password() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    key, bearer = basic("", "right"), {"Authorization": "Bearer right"}
    link = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

    def status(method: str, *headers: dict[str, str]) -> int:
        path, body = ("/studio", {}) if method == "GET" else (GENERATIONS, {"json": GOOD})
        sent = {name: value for part in headers for name, value in part.items()}
        return ask(method, path, digests=digests, headers=sent, **body).status_code

    for site in ("cross-site", "same-site", "?"):
        here = {"Sec-Fetch-Site": site}
        assert status("POST", key, here) == 403
        assert status("POST", key, here, link) == 403  # a form that sends itself
        assert status("GET", key, here, {**link, "Sec-Fetch-Dest": "iframe"}) == 403
        assert status("GET", key, here, link) == 200  # a link in a chat
        assert status("POST", bearer, here) == 200  # no browser sends that by itself
    for site in ("same-origin", "none"):
        assert status("POST", key, {"Sec-Fetch-Site": site}) == 200
    # over plain HTTP, browsers leave Sec-Fetch-Site out
    for origin in ("http://evil.example", "null", "http://[", "http://127.0.0.1.evil.example"):
        assert status("POST", key, {"Origin": origin}) == 403
    assert status("POST", key, {"Origin": "http://127.0.0.1"}) == 200
    assert status("POST", key) == 200  # curl


def test_without_keys_no_page_of_another_site_uses_a_server_on_this_machine() -> None:
    def code(method: str, **headers: str) -> tuple[int, str | None]:
        path, body = ("/v1/models", {}) if method == "GET" else (GENERATIONS, {"json": GOOD})
        answer = ask(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}, **body)
        return answer.status_code, answer.json().get("error", {}).get("code")

    for method in ("GET", "POST"):
        assert code(method, Sec_Fetch_Site="cross-site") == (403, "foreign_page")
        assert code(method, Sec_Fetch_Site="same-origin") == (200, None)
        assert code(method, Host="rebound.example") == (403, "foreign_host")
        assert code(method, Host="[oops") == (403, "foreign_host")
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            assert code(method, Host=host) == (200, None)
    assert code("POST", Origin="http://evil.example") == (403, "foreign_page")
    assert ask("GET", "/health", headers={"Host": "a-probe"}).status_code == 200


def test_refusals_are_counted_by_their_reason_wherever_they_are_made() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})

    async def main() -> str:
        async with client(FakeBackend(), CONFIG, digests) as http:
            right = {"Authorization": "Bearer right"}
            await http.post(GENERATIONS, json=GOOD)
            await http.post(GENERATIONS, content=b"x" * 70_000, headers={**right, **JSON})
            await http.post(GENERATIONS, json={**GOOD, "n": 0}, headers=right)
            await http.get("/nowhere", headers=right)
            await http.post(EDITS, content=b"--b\r\nx", headers={**right, "Content-Type": "multipart/form-data"})
            return (await http.get("/metrics", headers=right)).text

    metrics = asyncio.run(main())
    for code in ("invalid_api_key", "body_too_large", "invalid_value", "404", "400"):
        assert f'animesketch_http_refused_total{{code="{code}"}} 1.0' in metrics


def test_a_path_is_what_comes_after_the_applications_own() -> None:
    """Serve leaves its route_prefix in the path, and names it as root_path."""
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    app = create_api(CONFIG, FakeBackend(), digests)

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, root_path="/sketch")
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/sketch") as http:
            key = {"Authorization": "Bearer right"}
            return [await http.get("/health"), await http.get("/studio"), await http.get("/", headers=key),
                    await http.get("/metrics", headers=key)]  # fmt: skip

    health, studio, start, metrics = asyncio.run(main())
    assert health.status_code == 200
    assert studio.headers["WWW-Authenticate"] == 'Basic realm="AnimeSketch"'
    assert start.headers["Location"] == "/sketch/studio"
    assert 'animesketch_http_responses_total{route="/health",status="200"} 1.0' in metrics.text


def test_the_document_says_which_routes_need_a_key() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    right = {"Authorization": "Bearer right"}
    paths = ask("GET", "/openapi.json", digests=digests, headers=right).json()["paths"]
    locked = {path: "security" in operation for path, item in paths.items() for operation in item.values()}
    keyed = (GENERATIONS, EDITS, "/v1/models", "/v1/models/{model}", "/metrics")
    assert locked == dict.fromkeys(keyed, True) | {"/health": False}
    open_to_all = ask("GET", "/openapi.json").json()
    assert "security" not in str(open_to_all["paths"])


def test_a_key_file_holds_digests_only(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"# ours\n\n{digest}  -\n{digest.upper()} again\n")
    assert load_keys(str(file)) == {digest}
    assert find_key("bearer k", load_keys(str(file))) == digest
    assert find_key("Bearer K", load_keys(str(file))) is None
    file.write_text("plain-secret-key\n")
    with pytest.raises(ValueError, match="line 1: not a sha256") as error:
        load_keys(str(file))
    assert "plain-secret-key" not in str(error.value)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        load_keys(str(file))
    with pytest.raises(FileNotFoundError, match="No key file"):
        load_keys(str(tmp_path / "absent"))


def test_a_key_has_bounds_of_its_own_and_a_refusal_says_how_long() -> None:
    now = 0.0
    rates = Rates(concurrent=2, per_minute=3, clock=lambda: now)
    with rates.held("a"), rates.held("a"):
        with pytest.raises(ApiError) as refused, rates.held("a"):
            pass
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
        with rates.held("b"), rates.held(None), rates.held(None), rates.held(None), rates.held(None):
            pass
    with rates.held("a"):
        pass
    with pytest.raises(ApiError, match=r"3 requests a minute\. Try again in 20 s") as refused, rates.held("a"):
        pass
    assert refused.value.headers["Retry-After"] == "20"
    now = 20.0
    with rates.held("a"):
        pass
    now = 1000.0  # it never holds more than a minute's
    for _ in range(3):
        with rates.held("a"):
            pass
    with pytest.raises(ApiError), rates.held("a"):
        pass


def test_requests_beyond_a_keys_bounds_are_answered_429() -> None:
    digests = frozenset({hashlib.sha256(b"right").hexdigest()})
    config = dataclasses.replace(CONFIG, limits=dataclasses.replace(CONFIG.limits, max_per_minute_per_key=2))

    async def main() -> list[httpx.Response]:
        async with client(FakeBackend(), config, digests) as http:
            headers = {"Authorization": "Bearer right"}
            return [await http.post(GENERATIONS, json=GOOD, headers=headers) for _ in range(3)]

    *good, refused = asyncio.run(main())
    assert [reply.status_code for reply in good] == [200, 200]
    check_error(refused, 429, None, "rate_limit_exceeded")
    assert refused.headers["Retry-After"] == "30"
