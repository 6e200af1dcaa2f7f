"""The studio as a person uses it: a server to open it from, strokes on its sheet, and what it then shows."""

from __future__ import annotations

import base64
import io
import math
import shutil
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from serving.pictures import read_recipe

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# what a page has shown of a figure, in order
WATCH = """
window.seen = [];
new MutationObserver((changes) => {
  for (const { target } of changes) window.seen.push([target.querySelector("b").textContent, target.dataset.state]);
}).observe(document.getElementById("stage"), { subtree: true, attributes: true, attributeFilter: ["data-state"] });
"""


def until(page: Page, condition: str, seconds: float = 20) -> None:
    """Wait for a condition in the page. Not playwright's wait_for_function: it is eval, which the page forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < deadline, f"{condition}; told: {told(page)}"
        page.wait_for_timeout(20)


def draw(page: Page, *strokes: list[tuple[float, float]]) -> None:
    """Draw on the sheet with the mouse: points in shares of its side."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


def circle(points: int = 24) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / points for i in range(points + 1)]
    return [(0.5 + 0.3 * math.cos(turn), 0.5 + 0.3 * math.sin(turn)) for turn in turns]


def sheet(page: Page, mode: str = "L") -> np.ndarray:
    """The sketch as the server would get it: (768, 768), dark where there is ink."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(page.evaluate("sheet.png()")))).convert(mode))


def generate(page: Page, **fields: Any) -> None:
    """Set fields by their ids, and wait until the server has answered all."""
    for id, value in {"steps": 8, **fields}.items():
        page.evaluate("([id, value]) => set(id, value)", [id, value])
    page.get_by_role("button", name="Generate").click()
    until(page, "!running")


def told(page: Page) -> str:
    return page.locator("#told").inner_text()


def same(one: bytes, other: bytes) -> bool:
    """Whether two files are the same picture by the same recipe: a neighbour in the batch may change a last bit."""
    images = [Image.open(io.BytesIO(data)) for data in (one, other)]
    pixels = [np.asarray(image).astype(int) for image in images]
    return read_recipe(images[0]) == read_recipe(images[1]) and bool(abs(pixels[0] - pixels[1]).max() <= 1)


def shown(page: Page) -> dict[str, bytes]:
    """The pictures on the stage, by the names under them."""
    found = page.eval_on_selector_all(
        "#stage figure", "all => all.map((one) => [one.querySelector('b').textContent, one.querySelector('img').src])"
    )
    return {name: base64.b64decode(source.partition(",")[2]) for name, source in found}
