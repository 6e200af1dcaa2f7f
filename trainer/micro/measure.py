"""What the family can do, in numbers: each function measures one model on drawings that no training saw."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from factory.caption import Captioner
from factory.toon.traits import Scene
from trainer.micro import blip
from trainer.micro.attributes import JUDGED, SHOWN_BY_LINES, VALUES, rights, value_of
from trainer.micro.clip import embed, normalised
from trainer.micro.corpus import Corpus, random_scene
from trainer.micro.falsehoods import changed
from trainer.micro.pictures import SIDE, Pictures
from trainer.micro.probe import Probe, judge
from trainer.micro.text import caption_of
from trainer.micro.unet import FACTOR, Sampler
from trainer.micro.vae import psnr, reconstruct

REPORTED = (*JUDGED, "clothes")
CHANCE = {name: round(1 / len(VALUES[name]), 4) for name in REPORTED} | {
    "all": float(f"{1 / math.prod(len(VALUES[name]) for name in JUDGED):.1e}")
}
PART = 50  # pictures sampled at once


def shares(
    hits: dict[str, Tensor], names: Sequence[str] = JUDGED, *, judged: Sequence[str] | None = None
) -> dict[str, float]:
    """Return per attribute the share that was right, and `all`: of pictures with all of `judged` (or `names`) right."""
    found = {name: round(float(hits[name].float().mean()), 4) for name in names}
    every = torch.stack([hits[name] for name in judged or names]).all(0)
    return found | {"all": round(float(every.float().mean()), 4)}


def base(
    sampler: Sampler, probe: Probe, *, count: int, seed: int, steps: int = 50, held_out: bool = False
) -> tuple[dict[str, float], Tensor, list[str]]:
    """Return what the probe sees of pictures for `count` prompts of single busts by day, the pictures, the prompts.

    `held_out`: of combinations that no training saw.
    """
    scenes = [random_scene(random.Random(f"prompts/{i}"), judged=True, held_out=held_out) for i in range(count)]
    texts = [caption_of(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    pictures = _drawn(sampler, texts, seed, steps)
    return shares(judge(probe, pictures, scenes), REPORTED, judged=JUDGED), pictures, texts


def judge_itself(probe: Probe, pictures: Pictures) -> dict[str, dict[str, Any]]:
    """Return by framing, of colour and of lines, what the probe sees of drawings of one figure themselves.

    Where this is low, the probe can say little of what a model draws.
    """
    found = {}
    for kind, lines in (("colour", False), ("line", True)):
        for camera in VALUES["camera"]:
            fits = [len(scene.figures) == 1 and scene.camera == camera for scene in pictures.scenes]
            chosen = np.flatnonzero(np.array(fits) & ~pictures.wide)
            true = pictures.read(chosen, np.full(len(chosen), lines))
            names = SHOWN_BY_LINES if lines else JUDGED
            hits = judge(probe, true, [pictures.scenes[i] for i in chosen])
            found[f"{kind}, {camera}"] = {"pictures": len(chosen)} | shares(hits, names)
    return found


def framings(
    sampler: Sampler, probe: Probe, *, count: int, seed: int, steps: int = 50
) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """Return by framing what the probe sees of pictures for prompts of one figure in any light, and the pictures.

    `count` prompts are drawn from the corpus's mix; those of two figures, which the probe does not know, are left out.
    """
    scenes = [random_scene(random.Random(f"framings/{i}")) for i in range(count)]
    scenes = [scene for scene in scenes if len(scene.figures) == 1]
    pictures = _drawn(sampler, [caption_of(s, np.random.default_rng(i)) for i, s in enumerate(scenes)], seed, steps)
    found = {}
    for camera in VALUES["camera"]:
        group = torch.tensor([scene.camera == camera for scene in scenes])
        if not group.any():
            continue
        hits = judge(probe, pictures[group], [scene for scene in scenes if scene.camera == camera])
        names = [name for name in VALUES if not (name == "clothes" and camera == "close-up")]
        found[camera] = {"pictures": int(group.sum())} | shares(hits, names, judged=JUDGED)
    return found, pictures


def _drawn(sampler: Sampler, texts: list[str], seed: int, steps: int) -> Tensor:
    starts = range(0, len(texts), PART)
    return torch.cat([sampler(texts[i : i + PART], seed=100_000 * seed + i, steps=steps) for i in starts])


@torch.no_grad()
def guided_step_ms(sampler: Sampler, rounds: int = 30) -> float:
    """Return the median time of one step of one picture with guidance (a batch of two), in milliseconds."""
    x = torch.randn(2, sampler.vae.config.latent_channels, SIDE // FACTOR, SIDE // FACTOR)
    states, spent = sampler.text(["", "a girl"]), []
    for _ in range(rounds):
        begun = time.perf_counter()
        sampler.unet(x, 500, states)
        spent.append(1000 * (time.perf_counter() - begun))
    return round(float(np.median(spent)), 1)


def judged(pictures: Pictures) -> np.ndarray:
    """Return the places of what is judged: one figure, bust, by day, filling the square."""
    fits = [len(s.figures) == 1 and s.camera == "bust" and s.lighting == "day" for s in pictures.scenes]
    return np.flatnonzero(np.array(fits) & ~pictures.wide)


def coder(vae: AutoencoderKL, probe: Probe, pictures: Pictures) -> dict[str, Any]:
    """Return the probe on originals and reconstructions of single busts, dB of both layers, and the lines' F-score."""
    busts = judged(pictures)
    chosen = [pictures.scenes[i] for i in busts]
    found: dict[str, Any] = {"pictures": len(busts)}
    for kind, lines in (("colour", False), ("line", True)):
        true = pictures.read(busts, np.full(len(busts), lines))
        made = reconstruct(vae, true)
        names = SHOWN_BY_LINES if lines else JUDGED
        found[kind] = {
            "psnr": round(psnr(made, true), 2),
            "original": shares(judge(probe, true, chosen), names),
            "reconstruction": shares(judge(probe, made, chosen), names),
        }
        if lines:
            pairs = zip(as_grey(made), as_grey(true), strict=True)
            found[kind]["f_score"] = round(float(np.mean([f_score(m, t) for m, t in pairs])), 4)
    return found


def as_grey(pixels: Tensor) -> np.ndarray:
    """Return pictures (B,3,H,W) in [-1,1] as uint8 (B,H,W)."""
    return (pixels.mean(1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def f_score(made: np.ndarray, true: np.ndarray, *, reach: int = 1, level: int = 160) -> float:
    """Return the F-score of ink in uint8 lines (H,W), darker than `level`, against the true ones, darker than 160.

    Ink within `reach` pixels of true ink is a hit. No ink where there is none to find scores 1.
    """
    ink, want = made < level, true < 160
    if not ink.any() and not want.any():
        return 1.0
    near = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    precision = (ink & cv2.dilate(want.astype(np.uint8), near).astype(bool)).sum() / max(1, ink.sum())
    recall = (want & cv2.dilate(ink.astype(np.uint8), near).astype(bool)).sum() / max(1, want.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


def matcher(model: Any, tokenizer: Any, corpus: Corpus, *, lines: bool = False) -> dict[str, dict[str, float]]:
    """Return areas under the ROC curve of match scores: true captions against such with one attribute changed.

    By framing of the pictures of one figure, for those of two, and for all; in each the area over all changes, and for
    each attribute that against its changes alone. `no picture` is a blank sheet in place of the busts: what the texts
    alone give away.
    """
    frames, rng = blip.Frames(corpus, model.config.vision_config.image_size), np.random.default_rng(7)
    changes: list[str] = []
    parts: tuple[list[Tensor], ...] = ([], [], [], [])  # scores: true, false; the same of a blank sheet
    for start in range(0, len(corpus), PART):
        chosen = np.arange(start, min(start + PART, len(corpus)))
        told = [corpus.scenes[i] for i in chosen]
        others = [changed(scene, rng, line=lines, any_combination=True) for scene in told]
        for one, other in zip(told, others, strict=True):
            changes.append(next(name for name in VALUES if _values(one, name) != _values(other, name)))
        pixels = frames.read(chosen, np.full(len(chosen), lines))
        texts = [[caption_of(scene, rng, line=lines) for scene in scenes] for scenes in (told, others)]
        for i, seen in enumerate((pixels, normalised(torch.ones_like(pixels)))):
            for j in (0, 1):
                parts[2 * i + j].append(blip.match_scores(model, tokenizer, seen, texts[j]))
    true, false, blank_true, blank_false = (torch.cat(scores) for scores in parts)
    framing = np.array([scene.camera if len(scene.figures) == 1 else "two figures" for scene in corpus.scenes])
    found: dict[str, dict[str, float]] = {}
    for name in (*VALUES["camera"], "two figures"):
        if (framing == name).any():
            found[name] = _areas(true, false, np.array(changes), framing == name)
    found["all"] = _areas(true, false, np.array(changes), framing != "")
    return found | {"no picture": _areas(blank_true, blank_false, np.array(changes), framing == "bust")}


def _values(scene: Scene, name: str) -> list[str]:
    return [value_of(scene, name, figure) for figure in range(len(scene.figures))]


def _areas(true: Tensor, false: Tensor, changes: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """Return the areas of the `group`: `any` change, and by changed attribute."""
    found = {"pictures": int(group.sum()), "any": _auc(true[group], false[group])}
    return found | {
        n: _auc(true[group], false[group & (changes == n)]) for n in VALUES if (group & (changes == n)).any()
    }


def _auc(high: Tensor, low: Tensor) -> float:
    """Return the share of pairs (one of each) that are in order, a draw being half of one."""
    wins = (high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()
    return round(float(wins.mean()), 4)


def judges(pair: Any, words: Any, matcher: Any, tokenizer: Any, pixels: Tensor, texts: list[str]) -> dict[str, Any]:
    """Return what the judging CLIP pair and matcher say of pictures (N,3,64,64) in [-1,1] and their texts.

    The mean probability that picture and text belong together, of its own text and of the next one's, and the share of
    pictures whose own text is the nearest of all N.
    """
    side = matcher.config.vision_config.image_size
    large = normalised(F.interpolate(pixels, size=(side, side), mode="bilinear"))
    own, other = (
        float(blip.match_scores(matcher, tokenizer, large, told).mean()) for told in (texts, texts[1:] + texts[:1])
    )
    image, text = embed(pair, words, pixels, texts)
    nearest = (F.normalize(image) @ F.normalize(text).T).argmax(1)
    return {
        "pictures": len(texts),
        "match": round(own, 4),
        "match, another's text": round(other, 4),
        "nearest by CLIP": round(float((nearest == torch.arange(len(texts))).float().mean()), 4),
    }


def captioner(captioner: Captioner, corpus: Corpus) -> dict[str, Any]:
    """Return the share of figures of which the caption names each attribute rightly: per framing of one figure, of all
    those, of two figures, and of all figures; and the number of empty captions."""
    said = [captioner(image) for image in corpus.images]
    pairs = np.array([len(scene.figures) == 2 for scene in corpus.scenes])
    cameras = np.array([scene.camera for scene in corpus.scenes])
    groups = {camera: ~pairs & (cameras == camera) for camera in VALUES["camera"]}
    groups |= {"one figure": ~pairs, "two figures": pairs, "all": np.ones_like(pairs)}
    found: dict[str, Any] = {}
    for group, chosen in groups.items():
        hits: dict[str, list[bool]] = {}
        for i in np.flatnonzero(chosen):
            for name, right in rights(corpus.scenes[i], said[i]):
                hits.setdefault(name, []).append(right)
        if hits:
            shares = {name: round(float(np.mean(hits[name])), 4) for name in VALUES if name in hits}
            found[group] = {"pictures": int(chosen.sum())} | shares
    return found | {"captions": len(said), "empty": sum(not caption for caption in said)}


def sketch_scores(
    convert: Callable[[np.ndarray], np.ndarray], pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, reach: int = 1
) -> list[float]:
    """Return the F-scores of a converter (RGB uint8 -> lines uint8) on each (picture, exact lines), at its best level.

    The level that parts ink from paper is the converter's best over all pictures: soft edges are not held against it.
    """
    made = [convert(image) for image, _ in pairs]
    by_level = [
        [f_score(m, lines, reach=reach, level=level) for m, (_, lines) in zip(made, pairs, strict=True)]
        for level in range(32, 256, 16)
    ]
    return max(by_level, key=lambda scores: sum(scores))
