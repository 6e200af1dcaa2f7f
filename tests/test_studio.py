"""The studio in a real browser, over real HTTP: drawing, previews, comparing, history, copied code, errors."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from factory.files import seal
from serving.config import ServingConfig
from serving.engine import Engine
from serving.pictures import read_recipe
from serving.protocol import ApiError, Busy
from serving.worker import Worker
from tests.asking import CONFIG, EngineBackend, FakeBackend, listening, picture
from tests.browsing import CHROMIUM, WATCH, circle, draw, generate, same, sheet, shown, told, until
from trainer.adapter import Adapter, AdapterConfig

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup installs it")
Page = playwright.Page
expect = playwright.expect

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here. On Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def folder(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of random weights: `own`, and `more/other`, which is its opposite."""
    from trainer.backbone import load_backbone

    made = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        adapter = Adapter.for_unet(
            load_backbone(str(twin)).unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64)
        )
        with torch.no_grad():
            for module in adapter.ip_adapter.values():
                torch.nn.init.normal_(module.to_v_ip.weight, std=0.5)  # type: ignore[union-attr, arg-type]
            adapter.save_pretrained(made / "own")
            for module in adapter.ip_adapter.values():
                module.to_v_ip.weight.mul_(-1)  # type: ignore[union-attr, operator]
    adapter.save_pretrained(made / "more" / "other")
    return made


@pytest.fixture(scope="module")
def server(twin: Path, folder: Path) -> Iterator[str]:
    """The address of a server that draws with both adapters."""
    config = ServingConfig(adapter=str(folder / "own"), adapter_folder=str(folder / "more"))
    backend = EngineBackend(Worker(Engine.load(config.adapter, base=str(twin)), config.model))
    with listening(backend, config) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """A call that opens the studio of a server in a fresh profile. It may complain of nothing but answers of 4xx."""
    contexts, complaints = [], []

    def opened(url: str, key: str = "") -> Page:
        here = re.compile(rf"(data|blob):|http://(.*@)?{url.removeprefix('http://')}/")
        context = chromium.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("request", lambda asked: here.match(asked.url) or complaints.append(asked.url))
        page.goto(f"{url}/studio".replace("//", f"//anybody:{key}@") if key else f"{url}/studio")
        until(page, "document.getElementById('model').options.length")
        page.wait_for_timeout(50)
        page.evaluate(WATCH)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in complaints if "Failed to load resource" not in line] == []


def test_a_sketch_gives_a_picture_through_previews(visit: Any, server: str) -> None:
    page = visit(server)
    assert sheet(page).min() == 255
    draw(page, circle())
    dark = np.argwhere(sheet(page) < 128)
    distances = np.hypot(*(dark - 383.5).T)
    assert distances.min() > 0.3 * 768 - 7  # a round line, though the hand went in 24 straight pieces
    assert distances.max() < 0.3 * 768 + 6
    ring = np.histogram(np.arctan2(*(dark - 383.5).T), 72, (-math.pi, math.pi))[0]
    assert ring.min() > 0  # without a gap
    generate(page, seed=5, count=2)
    assert told(page).startswith("Done in ")
    assert "random weights" in told(page)  # the server's own warning
    seen = page.evaluate("seen")
    assert [state for _, state in seen][-2:] == ["done", "done"]
    assert [state for _, state in seen].count("partial") == 6
    assert [state for _, state in seen].index("partial") < [state for _, state in seen].index("done")
    page.get_by_role("button", name="Use seed 6 again").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("6")
    generate(page, count=1)
    (mine,) = shown(page).values()
    asked = {"prompt": page.locator("#prompt").input_value(), "seed": 6, "num_inference_steps": 8, "adapter_scale": 0.5}
    recipe = read_recipe(Image.open(io.BytesIO(mine)))
    assert asked.items() <= recipe.items()
    assert recipe["guidance_scale"] == float(page.locator("#guidance").input_value())
    assert recipe["reference_sha256"] == hashlib.sha256(sheet(page, "RGB").tobytes()).hexdigest()


def test_the_sheet_undoes_rubs_out_and_takes_pictures(visit: Any, server: str, tmp_path: Path) -> None:
    page = visit(server)
    line = [(0.1 + 0.1 * i, 0.5) for i in range(9)]
    draw(page, circle())
    round_ = sheet(page)
    draw(page, line)
    both = sheet(page)
    assert (both != round_).any()
    page.keyboard.press("Control+z")
    assert (sheet(page) == round_).all()
    page.keyboard.press("Control+Shift+Z")
    assert (sheet(page) == both).all()
    page.get_by_role("button", name="Eraser").click()
    draw(page, line)
    assert (sheet(page)[:, 370:400] < 128).sum() < (round_[:, 370:400] < 128).sum() + 50
    assert sheet(page)[384, 384] == 255
    page.get_by_role("button", name="Clear").click()
    assert sheet(page).min() == 255
    expect(page.get_by_label("Sketch α")).to_be_disabled()  # nothing to weigh
    page.get_by_role("button", name="Undo").click()
    assert sheet(page).min() < 128

    file = tmp_path / "wide.png"
    file.write_bytes(picture(size=(40, 20)))
    page.locator("#file").set_input_files(file)
    until(page, "document.getElementById('canvas').ariaLabel.includes('a picture')")
    opened = sheet(page)
    assert opened[100, 384] == 255  # fitted in, white above and below
    assert opened[384, 384] < 128
    page.get_by_role("button", name="Clear").click()
    for kind, event in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """async ([kind, event, data]) => {
              const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
              transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
              const Kind = { paste: ClipboardEvent, drop: DragEvent }[kind];
              document.body.dispatchEvent(new Kind(kind, { [event]: transfer, bubbles: true, cancelable: true }));
            }""",
            [kind, event, base64.b64encode(file.read_bytes()).decode()],
        )
        until(page, "sheet.drawn()")
        assert (sheet(page) == opened).all()
        page.get_by_role("button", name="Clear").click()
    file.write_text("no picture")
    page.locator("#file").set_input_files(file)
    expect(page.locator("#told")).to_contain_text("wide.png is no picture")


def test_two_adapters_are_compared_and_the_history_brings_all_back(visit: Any, server: str) -> None:
    page = visit(server)
    draw(page, circle())
    sketch = sheet(page)
    page.get_by_label("Prompt", exact=True).fill("a girl's <b>hat</b>")
    generate(page, seed=5, alpha=1, other="other")
    compared = shown(page)
    assert list(compared) == ["animesketch", "other"]
    assert len({*compared.values()}) == 2
    recipes = {name: read_recipe(Image.open(io.BytesIO(data))) for name, data in compared.items()}
    assert {name: recipe.pop("model") for name, recipe in recipes.items()} == {name: name for name in compared}
    versions = {name: recipe.pop("model_version") for name, recipe in recipes.items()}
    assert len(versions["other"]) == 12
    assert versions["other"] != versions["animesketch"]
    assert recipes["animesketch"] == recipes["other"]
    generate(page, other="/none")
    assert list(shown(page)) == ["animesketch", "no sketch"]
    assert same(shown(page)["animesketch"], compared["animesketch"])
    assert read_recipe(Image.open(io.BytesIO(shown(page)["no sketch"])))["reference_sha256"] is None

    page.get_by_role("button", name="Clear").click()
    draw(page, [(0.2, 0.2), (0.8, 0.8)])
    generate(page, prompt="something else", seed=9, alpha=0.25, guidance=3, steps=6, other="")
    unfinished = sheet(page)
    page.wait_for_timeout(500)
    page.reload()
    until(page, "document.querySelectorAll('#history li').length === 5")
    until(page, "sheet.drawn()")
    assert (sheet(page) == unfinished).all()  # what was on the sheet is there too
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("something else")
    page.get_by_role("button", name="Use again: a girl's <b>hat</b>; sketch weight 1, adapter other").click()
    until(page, "document.querySelector('#stage img')")
    assert shown(page) == {"other": compared["other"]}
    assert (sheet(page) == sketch).all()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a girl's <b>hat</b>")
    generate(page)
    assert list(shown(page)) == ["other"]
    assert same(shown(page)["other"], compared["other"])
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget all").click()
    page.reload()
    until(page, "document.getElementById('model').options.length")
    page.wait_for_timeout(200)
    assert page.locator("#history li").count() == 0


@pytest.mark.parametrize("kind", ["curl", "Python"])
def test_copied_code_draws_the_same_pictures(visit: Any, server: str, tmp_path: Path, kind: str) -> None:
    if kind == "curl" and shutil.which("curl") is None:
        pytest.skip("no curl here")
    if kind == "Python":
        pytest.importorskip("openai")
    page = visit(server)
    prompt = """it's @a "girl"; $HOME `no` \\n {brace} é"""
    draw(page, circle())
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Negative prompt").fill("<hat")
    generate(page, seed=5, other="/none")
    page.get_by_role("button", name=f"Copy as {kind}").click()
    expect(page.locator("#note")).to_contain_text("Copied.")
    code = page.evaluate("navigator.clipboard.readText()")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the sketch").click()
    assert download.value.suggested_filename == "sketch.png"
    download.value.save_as(tmp_path / "sketch.png")
    command = ["bash", "-euc", code] if kind == "curl" else [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    names = ["animesketch-5.png", "animesketch-no-sketch-5.png"]
    assert (ran.returncode, ran.stdout.split()) == (0, names), ran.stderr
    files = [(tmp_path / name).read_bytes() for name in names]
    assert all(same(*pair) for pair in zip(files, shown(page).values(), strict=True))
    recipe = read_recipe(Image.open(io.BytesIO(files[0])))
    assert (recipe["prompt"], recipe["negative_prompt"]) == (prompt, "<hat")


def test_what_goes_wrong_is_told_in_words(visit: Any, tmp_path: Path) -> None:
    backend, (gone, own) = FakeBackend(), (tmp_path / "gone", tmp_path / "own")
    config = dataclasses.replace(
        CONFIG, adapter_folder=str(tmp_path), retry_after_s=1, limits=dataclasses.replace(CONFIG.limits, max_n=3)
    )
    for path in (gone, own):
        path.mkdir()
        (path / "ip_adapter.safetensors").write_bytes(save({"a": np.zeros(1)}))
        (path / "config.json").write_text("{}")
        seal(path)
    keys: Any = {hashlib.sha256(b"right").hexdigest()}  # is cleared further down
    with listening(backend, config, keys) as port:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/studio").headers["WWW-Authenticate"] == 'Basic realm="AnimeSketch"'
        page = visit(url, key="right")
        generate(page, other="own")
        assert told(page).startswith("Done in ")
        assert "without a sketch, adapters have no say" in told(page)
        page.get_by_role("button", name="Copy as Python").click()
        expect(page.locator("#code")).to_contain_text('api_key=os.environ["ANIMESKETCH_KEY"]')
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.locator("#code")).to_contain_text("curl")
        code = page.locator("#code").text_content() or ""
        for key, said in (("right", "animesketch"), ("wrong", "A valid key is needed")):
            ran = subprocess.run(
                ["bash", "-c", code], cwd=tmp_path, env={**os.environ, "ANIMESKETCH_KEY": key}, timeout=60, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert said in ran.stdout

        backend.fail = Busy()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#told")).to_contain_text("Every place is taken")
        expect(page.locator("#told")).to_contain_text("This page does so by itself")
        backend.fail = None
        until(page, "!running")
        assert told(page).startswith("Done in ")
        assert shown(page)

        def wrong(*words: str, **fields: Any) -> None:
            generate(page, **fields)
            assert all(word in told(page) for word in words), told(page)
            assert "wrong" in (page.locator("#told").get_attribute("class") or "")

        backend.fail = ApiError(503, "The replica that worked on this is gone. Try again.", type="server_error")
        wrong("The replica that worked on this is gone. Try again.")
        backend.fail = RuntimeError("a secret")
        wrong("The server failed. Its log has the reason under request")
        backend.fail = None
        wrong("n must be at most 3 on this server, got 4.", count=4)
        shutil.rmtree(gone)
        wrong("There is no model 'gone' here any more. Pick another adapter.", model="gone", count=1)
        until(page, "document.getElementById('model').value === 'animesketch'")

        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        until(page, "!running")
        assert told(page).startswith("Done in ")
        before = backend.closed
        backend.hold = asyncio.Event()
        page.get_by_role("button", name="Generate").press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_focused()
        expect(page.locator("#told")).to_have_text("Drawing…")
        page.keyboard.press("Enter")
        expect(page.locator("#told")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        page.wait_for_timeout(300)
        assert backend.closed == before + 1  # its place is free
        backend.hold = None

        page.context.set_offline(True)
        wrong("The server does not answer.", "try again")
        page.context.set_offline(False)

        def answered(answer: dict[str, Any], route: Any) -> None:
            route.fulfill(**answer)

        for answer, words in (
            ({"status": 200, "body": "event: x\ndata: {"}, ["The connection broke before the picture was done."]),
            ({"status": 502, "body": "<h1>Bad gateway"}, ["The server answered 502", "without saying why"]),
        ):
            page.route("**/v1/images/generations", functools.partial(answered, answer))
            wrong(*words)
        page.unroute("**/v1/images/generations")
        keys.clear()
        wrong("The server does not take this key. Reload the page")


def test_the_policy_lets_nothing_else_in(visit: Any, server: str) -> None:
    page = visit(server)
    policy = httpx.get(f"{server}/studio").headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    # whatever has no name of its own, a screen reader can't tell
    nameless = page.eval_on_selector_all(
        "button, input, select, textarea, canvas, a",
        "all => all.filter((one) => !(one.ariaLabel || one.labels?.length || one.textContent.trim())).map((one) => one.id)",  # noqa: E501
    )
    assert nameless == []
    assert json.loads(page.evaluate("JSON.stringify(GUIDANCE)")) == {"animesketch/micro": 3.5}
