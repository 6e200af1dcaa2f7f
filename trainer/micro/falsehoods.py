"""False texts of a scene, near the true ones: one attribute changed, or many, and which words of a text are wrong."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizer

from factory.toon.traits import WORDS, Scene
from trainer.micro.attributes import COLOURS, VALUES, value_of
from trainer.micro.corpus import is_held_out


def changed(scene: Scene, rng: np.random.Generator, *, line: bool = False, any_combination: bool = False) -> Scene:
    """Return the scene with one captioned attribute changed to another value; for `line` one that lines show.

    Unless `any_combination`, what is held out from training stays so, and what is not stays that: a combination that
    training saw in false texts only would give itself away.
    """
    names = _told(scene, line)
    while True:
        found = _with_another(scene, names[int(rng.integers(len(names)))], rng)
        if any_combination or _held_out(found) == _held_out(scene):
            return found


def scrambled(scene: Scene, rng: np.random.Generator, *, line: bool = False) -> Scene:
    """Return the scene with each captioned attribute changed or not, as a coin falls; held out as `changed` does."""
    while True:
        found = scene
        for name in _told(scene, line):
            found = _with_another(found, name, rng) if rng.random() < 0.5 else found
        if _held_out(found) == _held_out(scene):
            return found


def _told(scene: Scene, line: bool) -> list[str]:
    names = [name for name in VALUES if not (line and name in COLOURS)]
    # a close-up's text says nothing of clothes: another camera would change that too
    return [name for name in names if not (name in ("clothes", "camera") and scene.camera == "close-up")]


def _with_another(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """Return the scene with another value of an attribute, of the scene or of one of its figures."""
    place = int(rng.integers(len(scene.figures)))
    others = [value for value in VALUES[name] if value not in (value_of(scene, name, place), "close-up")]
    change = {name: others[int(rng.integers(len(others)))]}
    if hasattr(scene, name):
        return dataclasses.replace(scene, **change)
    figures = list(scene.figures)
    figures[place] = dataclasses.replace(figures[place], **change)
    return dataclasses.replace(scene, figures=tuple(figures))


def _held_out(scene: Scene) -> list[bool]:
    return [is_held_out(figure, scene.background) for figure in scene.figures]


FILLERS = {"a", "and", "at", "by", "her", "in", "of", "on", "the", "under"}


class Words:
    """Which tokens of a text about a scene are true of another scene, and which are not."""

    def __init__(self, tokenizer: BertTokenizer) -> None:
        self.beside = tokenizer.convert_tokens_to_ids("beside")  # stands between two figures, and nowhere else
        self.ids: dict[tuple[str, str], set[int]] = {}
        for name, values in VALUES.items():
            for value in values:
                words = set(re.findall(r"\w+", " ".join(WORDS[name][value]).lower())) - FILLERS
                self.ids[name, value] = set(tokenizer.convert_tokens_to_ids(sorted(words)))

    def labels(self, ids_T: Tensor, told: Scene, true: Scene) -> Tensor:
        """Return for each token (T,) of a text about `told`: 1 if `true` is otherwise, 0 if it is so, -100 if the token
        tells nothing, or may stand for two attributes of which one is so (red: hair or eyes). Words that both
        values have, such as the hair of every style, count as otherwise too."""
        ids = ids_T.tolist()
        parts = [len(ids)] if len(told.figures) == 1 else [ids.index(self.beside), len(ids)]
        labels: list[int] = []
        for figure, end in enumerate(parts):
            marks = self._marks(told, true, figure)
            labels += [marks.get(i, -100) for i in ids[len(labels) : end]]
        return torch.tensor(labels)

    def _marks(self, told: Scene, true: Scene, figure: int) -> dict[int, int]:
        found: dict[int, set[bool]] = {}
        for name in VALUES:
            value = value_of(told, name, figure)
            for token in self.ids[name, value]:
                found.setdefault(token, set()).add(value != value_of(true, name, figure))
        return {token: int(wrong.pop()) for token, wrong in found.items() if len(wrong) == 1}
