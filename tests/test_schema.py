"""schemathesis asks what /openapi.json allows, and what it forbids, of a real engine: the answers are those it says.

Without a seed of chance: the same requests each time. `make soak` asks for more of them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import schemathesis
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serving.api import create_api
from serving.config import Limits, ServingConfig
from serving.engine import Engine
from serving.recipe import MAX_SEED
from serving.worker import Worker
from tests.asking import EDITS, GENERATIONS, EngineBackend, FakeBackend, listening, picture

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = {"Authorization": "Bearer right"}
KEYS = frozenset({hashlib.sha256(b"right").hexdigest()})
# what is valid is drawn: let that be quick
LIMITS = Limits(
    max_n=2, max_num_inference_steps=2, max_side=128, max_pixels=64 * 72, max_prompt_chars=100, max_body_bytes=100_000,
    max_image_bytes=20_000, max_per_minute_per_key=100_000,
)  # fmt: skip


CONFIG = ServingConfig(adapter="/a", limits=LIMITS)
api = schemathesis.openapi.from_dict(
    create_api(CONFIG, FakeBackend(), KEYS).openapi(),
    config=schemathesis.Config.from_dict({
        "seed": 0,
        "generation": {"deterministic": True, "max-examples": 40},
        # what is wrong may be too large as well
        "checks": {"negative_data_rejection": {"expected-statuses": [400, 401, 403, 404, 405, 413]}},
    }),
)  # fmt: skip

# how bytes are framed is between the HTTP client and uvicorn, which refuses what is wrong in its own words
FRAMING = {"connection", "content-length", "expect", "transfer-encoding", "upgrade"}


@api.hook
def filter_headers(_: schemathesis.HookContext, headers: dict[str, str]) -> bool:
    return FRAMING.isdisjoint(name.lower() for name in headers or ())


@pytest.fixture(scope="module")
def server(twin: Path, adapter_folder: Path) -> Iterator[str]:
    engine = Engine.load(str(adapter_folder), base=str(twin))
    with listening(EngineBackend(Worker(engine, "animesketch")), CONFIG, KEYS) as port:
        yield f"http://127.0.0.1:{port}"


@api.exclude(path=EDITS).parametrize()
def test_every_answer_is_one_that_the_document_says(case: schemathesis.Case, server: str) -> None:
    # not every size and string is a picture's: the next test
    case.call_and_validate(server, headers=KEY, excluded_checks=[positive_data_acceptance])


@st.composite
def forms(draw: st.DrawFn, mode: GenerationMode) -> schemathesis.Case:
    """A form of /v1/images/edits. schemathesis 4.32 stumbles over some broken ones that it makes itself: not those."""
    try:
        return draw(api[EDITS]["POST"].as_strategy(mode))
    except ValueError as error:
        if "Unsupported type: 'Binary'" not in str(error):
            raise
        hypothesis.reject()


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_to_a_form_is_one_that_the_document_says(mode: GenerationMode, examples: int, server: str) -> None:
    asked = []

    @hypothesis.settings(api.config.get_hypothesis_settings(), max_examples=examples)
    @hypothesis.given(case=forms(mode))
    def check(case: schemathesis.Case) -> None:
        # a prompt that is `false` instead of a string is the text "false" in a form: test_protocol.py has the bad forms
        response = case.call_and_validate(
            server, headers=KEY, excluded_checks=[positive_data_acceptance, negative_data_rejection]
        )
        asked.append(response.status_code)

    check()
    assert len(asked) >= examples // 2


@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("route", [GENERATIONS, EDITS])
def test_what_the_document_allows_is_drawn(route: str, examples: int, server: str) -> None:
    statuses = []

    @hypothesis.settings(api.config.get_hypothesis_settings(), max_examples=examples)
    @hypothesis.given(case=api[route]["POST"].as_strategy(GenerationMode.POSITIVE))
    def check(case: schemathesis.Case) -> None:
        """What a schema can't say is put right: the size's multiples, the picture, and how fields hang together."""
        body = case.body
        assert isinstance(body, dict)
        body.pop("model", None)
        body["size"] = "64x72"
        if body.get("image") is not None:
            body["image"] = base64.b64encode(picture()).decode() if route == GENERATIONS else picture()
        if not body.get("stream"):
            body.pop("partial_images", None)
        if body.get("seed") is not None:
            body["seed"] = min(body["seed"], MAX_SEED - 1)
        response = case.call_and_validate(server, headers=KEY)
        statuses.append(response.status_code)

    check()
    assert len(statuses) >= 10
    assert set(statuses) == {200}


@pytest.mark.soak
@api.exclude(path=EDITS).parametrize()
@hypothesis.settings(max_examples=2000)
def test_every_answer_of_thousands_is_one_that_the_document_says(case: schemathesis.Case, server: str) -> None:
    case.call_and_validate(server, headers=KEY, excluded_checks=[positive_data_acceptance])
