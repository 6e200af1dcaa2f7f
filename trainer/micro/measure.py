"""What the family can do, in numbers: each function measures one model on drawings that no training saw."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# (diffusers and transformers type their configs as dict and their outputs as tuples)
from __future__ import annotations

import functools
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

from factory.caption import Captioner
from factory.toon.traits import Scene
from trainer.adapter import Adapter, AdapterConfig
from trainer.align import align, record_queries
from trainer.backbone import Backbone, ddim
from trainer.loss import add_noise, noise_loss
from trainer.micro import blip
from trainer.micro.attributes import JUDGED, VALUES, named, value_of
from trainer.micro.clip import normalised
from trainer.micro.corpus import Corpus, random_scene
from trainer.micro.pictures import SIDE, Pictures
from trainer.micro.probe import Probe, judge
from trainer.micro.sheet import as_images
from trainer.micro.text import caption_of
from trainer.micro.unet import FACTOR, Latents, Sampler
from trainer.micro.vae import psnr, reconstruct

REPORTED = (*JUDGED, "clothes")
CHANCE = {name: round(1 / len(VALUES[name]), 4) for name in REPORTED} | {
    "all": float(f"{1 / math.prod(len(VALUES[name]) for name in JUDGED):.1e}")
}
SHOWN_BY_LINES = ("hair_style", "expression", "accessory")
_PART = 50  # pictures sampled at once


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
    starts = range(0, len(texts), _PART)
    return torch.cat([sampler(texts[i : i + _PART], seed=100_000 * seed + i, steps=steps) for i in starts])


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
    frames, rng = blip.Frames(corpus), np.random.default_rng(7)
    changes: list[str] = []
    parts: tuple[list[Tensor], ...] = ([], [], [], [])  # scores: true, false; the same of a blank sheet
    for start in range(0, len(corpus), _PART):
        chosen = np.arange(start, min(start + _PART, len(corpus)))
        told = [corpus.scenes[i] for i in chosen]
        others = [blip.changed(scene, rng, line=lines, any_combination=True) for scene in told]
        for one, other in zip(told, others, strict=True):
            changes += [name for name in VALUES if value_of(one, name) != value_of(other, name)]
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


def captioner(captioner: Captioner, corpus: Corpus) -> dict[str, Any]:
    """Return per framing the share of pictures of one figure whose caption names each attribute rightly; empty ones."""
    found, empty = {}, 0
    for camera in VALUES["camera"]:
        single = [i for i, s in enumerate(corpus.scenes) if len(s.figures) == 1 and s.camera == camera]
        hits: dict[str, list[bool]] = {name: [] for name in VALUES}
        for i in single:
            caption = captioner(corpus.images[i])
            empty += not caption
            said = named(caption)
            for name in VALUES:
                if not (name == "clothes" and camera == "close-up"):
                    hits[name].append(said.get(name) == value_of(corpus.scenes[i], name))
        found[camera] = {"pictures": len(single)} | {
            name: round(float(np.mean(right)), 4) for name, right in hits.items() if right
        }
    return found | {"empty": empty}


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


class Features:
    """The image encoder's features of all pictures and line layers, in memory."""

    def __init__(self, backbone: Backbone, pictures: Pictures) -> None:
        self.parts: list[Tensor] = []
        for lines in (False, True):
            held = []
            for start in range(0, len(pictures), 64):
                chosen = np.arange(start, min(start + 64, len(pictures)))
                pixels = pictures.read(chosen, np.full(len(chosen), lines))
                held.append(backbone.encode_image(as_images(pixels)).half())
            self.parts.append(torch.cat(held))

    def read(self, indices: np.ndarray, lines: np.ndarray) -> Tensor:
        """Return features (B,N,E): of the line layer where `lines` (B,) is true, else of the colour picture."""
        colour, line = (part[indices] for part in self.parts)
        return torch.where(torch.from_numpy(lines)[:, None, None], line, colour).float()


class Adapted:
    """The base with an adapter trained on the corpus for a while, and what references then bring through."""

    def __init__(self, backbone: Backbone, sampler: Sampler, seed: int) -> None:
        self.backbone, self.sampler, self.seed = backbone, sampler, seed
        torch.manual_seed(seed)
        width = backbone.unet.config.cross_attention_dim
        embedding_dim = backbone.image_encoder.config.hidden_size
        config = AdapterConfig(cross_attention_dim=width, embedding_dim=embedding_dim, dim=width)
        self.adapter = Adapter.for_unet(backbone.unet, config)

    def train(
        self, scenes: list[Scene], latents: Latents, features: Features, seconds: float, *, alignment_steps: int
    ) -> int:
        """Train for so long on pictures that are their own references, half of them line art; return the steps.

        First the image branch is aligned with the captions (trainer/align.py), then noise teaches it, without text and
        mostly at high noise, where a reference decides. A share of the references is dropped throughout.
        """
        unet, scheduler, rng = self.backbone.unet, ddim(), np.random.default_rng(self.seed)
        null, begun = self.backbone.encode_image_null(1), time.monotonic()
        self.adapter.attach(unet)

        def references(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
            chosen = rng.integers(len(scenes), size=count)
            lines, shown = rng.random(count) < 0.5, rng.random(count) > 0.08
            hidden = features.read(chosen, lines)
            return chosen, lines, shown, torch.where(torch.from_numpy(shown)[:, None, None], hidden, null)

        def texts(chosen: np.ndarray, lines: np.ndarray, shown: np.ndarray) -> Tensor:
            captions = [caption_of(scenes[i], rng, line=bool(b)) for i, b in zip(chosen, lines, strict=True)]
            return self.sampler.text([c if s else "" for c, s in zip(captions, shown, strict=True)])

        def noisy(timestep: int) -> None:
            chosen, lines, shown, _ = references(16)
            clean, t = latents.read(chosen, lines), torch.full((16,), timestep)
            x, text = add_noise(scheduler, clean, torch.randn_like(clean), t), texts(chosen, lines, shown)
            self.adapter.denoise(unet, x, t, text, text[:, :0], 0.0)

        def told(step: int) -> tuple[Tensor, Tensor]:
            chosen, lines, shown, hidden = references(16)
            return texts(chosen, lines, shown), hidden

        calls = [functools.partial(noisy, timestep) for timestep in (990, 900, 800, 700, 500, 300)]
        empty = self.sampler.text([""])
        align(self.adapter, unet, record_queries(unet, calls), empty, told, steps=alignment_steps)
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.01)
        start, step = time.monotonic() - begun, 0
        while (spent := time.monotonic() - begun) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1, (step + 1) / 30, 2.5 * (seconds - spent) / (seconds - start) + 0.02)
            chosen, lines, _, hidden = references(24)
            clean, t = latents.read(chosen, lines), (1000 * torch.rand(24) ** 0.4).long()
            noise = torch.randn_like(clean)
            made = self.adapter(unet, add_noise(scheduler, clean, noise, t), t, empty.expand(24, -1, -1), hidden)
            noise_loss(made, noise).backward()
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        return step

    @torch.no_grad()
    def draw(self, references: Tensor, *, scale: float = 1.0, steps: int = 25, first: int = 0) -> Tensor:
        """Return pictures for references (B,3,64,64), with an empty prompt; `first` counts those drawn before."""
        hidden = self.backbone.encode_image(as_images(references))
        tokens = self.adapter.image_tokens(torch.cat([self.backbone.encode_image_null(len(hidden)), hidden]))

        def denoise(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.adapter.denoise(self.backbone.unet, x, t, states, tokens, scale)

        return self.sampler([""] * len(hidden), seed=1000 * self.seed + first, steps=steps, denoise=denoise)


def adapted(model: Adapted, probe: Probe, pictures: Pictures, count: int) -> dict[str, Any]:
    """Return what comes through of `count` held-out single busts with an empty prompt, by kind of reference.

    `scale 0` is what there is without a reference, whatever it be: chance.
    """
    busts = judged(pictures)[:count]
    chosen, found = [pictures.scenes[i] for i in busts], {}
    for name, lines, scale in (("colour", False, 1.0), ("line", True, 1.0), ("scale 0", False, 0.0)):
        references = pictures.read(busts, np.full(len(busts), lines))
        starts = range(0, len(references), _PART)
        made = torch.cat([model.draw(references[i : i + _PART], scale=scale, first=i) for i in starts])
        found[name] = shares(judge(probe, made, chosen), SHOWN_BY_LINES if lines else JUDGED)
    return found
