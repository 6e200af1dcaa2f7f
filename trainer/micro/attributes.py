"""The attributes of a drawing as numbers, and which of them are judged."""

from __future__ import annotations

import re
from collections.abc import Iterator

from factory.toon import traits
from factory.toon.traits import Scene

VALUES: dict[str, tuple[str, ...]] = {
    "hair": traits.HAIR,
    "hair_style": traits.HAIR_STYLES,
    "eyes": traits.EYES,
    "expression": traits.EXPRESSIONS,
    "accessory": traits.ACCESSORIES,
    "background": traits.BACKGROUNDS,
    "clothes": traits.CLOTHES,
    "camera": traits.CAMERAS,
    "lighting": traits.LIGHTINGS,
}
COLOURS = ("hair", "eyes", "background", "lighting")  # what line art does not show, or hardly
SHOWN_BY_LINES = ("hair_style", "expression", "accessory")
JUDGED = ("hair", "hair_style", "eyes", "expression", "accessory", "background")  # the others are reported


def value_of(scene: Scene, name: str, figure: int = 0) -> str:
    """Return an attribute of the scene, or that of its `figure`."""
    return getattr(scene if hasattr(scene, name) else scene.figures[figure], name)


def labels(scene: Scene, figure: int = 0) -> list[int]:
    """Return the place of each attribute's value among its VALUES, for the scene and its `figure`."""
    return [values.index(value_of(scene, name, figure)) for name, values in VALUES.items()]


def named(caption: str) -> dict[str, str]:
    """Return the attributes that a caption of one figure names, by the words of `factory.toon`; absent: not named.

    No accessory named is "none", no light is "day". Of an attribute with two values named, none is.
    """
    text = caption.lower().replace("an azure", "a azure")
    found: dict[str, set[str]] = {name: set() for name in VALUES}
    for style, forms in traits.WORDS["hair_style"].items():
        for hair, words in traits.WORDS["hair"].items():
            if any(_says(text, form.format(word)) for form in forms for word in words):
                found["hair"].add(hair)
                found["hair_style"].add(style)
    for name in VALUES:
        if name in ("hair", "hair_style"):
            continue
        for value, words in traits.WORDS[name].items():
            if any(word and _says(text, word) for word in words):
                found[name].add(value)
    silent = {"accessory": {"none"}, "lighting": {"day"}}
    values = {name: said or silent.get(name, set()) for name, said in found.items()}
    return {name: said.pop() for name, said in values.items() if len(said) == 1}


def rights(scene: Scene, caption: str) -> Iterator[tuple[str, bool]]:
    """Yield for each figure every attribute that is to be seen, and whether the caption names it rightly.

    Of two figures the left one comes first; where the caption tells of one, nothing of a figure is named rightly, but
    place, framing and light may be. An empty caption names nothing, not even that there is no accessory.
    """
    parts = caption.split(" beside ")
    about = named(caption) if caption else {}
    for figure in range(len(scene.figures)):
        told = named(parts[figure]) if caption and len(parts) == len(scene.figures) else {}
        for name in VALUES:
            if not (name == "clothes" and scene.camera == "close-up"):
                words = about if hasattr(scene, name) else told
                yield name, words.get(name) == value_of(scene, name, figure)


def _says(text: str, words: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", text) is not None
