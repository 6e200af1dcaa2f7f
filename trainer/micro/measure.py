"""What the family can do, in numbers: each function measures one model on drawings that no training saw."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# (diffusers and transformers type their configs as dict and their outputs as tuples)
from __future__ import annotations

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
from trainer.backbone import Backbone, ddim
from trainer.loss import add_noise, noise_loss
from trainer.micro import blip
from trainer.micro.attributes import JUDGED, VALUES, named, value_of
from trainer.micro.corpus import Corpus, random_scene
from trainer.micro.pictures import SIDE, Pictures
from trainer.micro.probe import Probe, judge
from trainer.micro.sheet import as_images
from trainer.micro.text import caption_of
from trainer.micro.unet import FACTOR, Latents, Sampler
from trainer.micro.vae import psnr, reconstruct

CHANCE = {name: round(1 / len(VALUES[name]), 4) for name in (*JUDGED, "clothes")}
SHOWN_BY_LINES = ("hair_style", "expression", "accessory")
_PART = 50  # pictures sampled at once


def shares(hits: dict[str, Tensor], names: Sequence[str] = JUDGED) -> dict[str, float]:
    """Return per attribute the share that was right, and `all`: of pictures with every one of `names` right."""
    found = {name: round(float(hits[name].float().mean()), 4) for name in names}
    return found | {"all": round(float(torch.stack([hits[name] for name in names]).all(0).float().mean()), 4)}


def base(
    sampler: Sampler,
    probe: Probe,
    *,
    count: int,
    seeds: Sequence[int],
    steps: int = 50,
    **mix: bool,
) -> tuple[dict[str, dict[str, float]], Tensor, list[str]]:
    """Return by seed what the probe sees of `count` prompts' pictures; also the first seed's pictures and the prompts.

    `mix` is random_scene's: `judged`, `held_out`.
    """
    scenes = [random_scene(random.Random(f"prompts/{i}"), **mix) for i in range(count)]
    texts = [caption_of(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    found, first = {}, torch.empty(0)
    for seed in seeds:
        parts = [sampler(texts[i : i + _PART], seed=100_000 * seed + i, steps=steps) for i in range(0, count, _PART)]
        pictures = torch.cat(parts)
        first = pictures if not len(first) else first
        hits = judge(probe, pictures, scenes)
        found[f"seed {seed}"] = shares(hits, tuple(VALUES)) | {"all": shares(hits)["all"]}
    return found, first, texts


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


def judged(pictures: Pictures, scenes: list[Scene]) -> np.ndarray:
    """Return the places of what is judged: one figure, bust, by day, filling the square."""
    fits = [len(s.figures) == 1 and s.camera == "bust" and s.lighting == "day" for s in scenes]
    return np.flatnonzero(np.array(fits) & ~pictures.wide)


def coder(vae: AutoencoderKL, probe: Probe, pictures: Pictures, scenes: list[Scene]) -> dict[str, Any]:
    """Return the probe on originals and reconstructions of single busts, dB of both layers, and the lines' F-score."""
    busts = judged(pictures, scenes)
    chosen = [scenes[i] for i in busts]
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


def matcher(model: Any, tokenizer: Any, corpus: Corpus, *, lines: bool = False) -> float:
    """Return the area under the ROC curve of match scores: true captions against such with one attribute changed."""
    frames, rng = blip.Frames(corpus), np.random.default_rng(7)
    true, false = [], []
    for start in range(0, len(corpus), _PART):
        chosen = np.arange(start, min(start + _PART, len(corpus)))
        pairs = [blip.pair_of_texts(corpus.scenes[i], rng, line=lines) for i in chosen]
        pixels = frames.read(chosen, np.full(len(chosen), lines))
        for side, kept in ((0, true), (1, false)):
            kept.append(blip.match_scores(model, tokenizer, pixels, [pair[side] for pair in pairs]))
    high, low = torch.cat(true), torch.cat(false)
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


class Adapted:
    """The base with an adapter trained on the corpus for a while, and what references then bring through."""

    def __init__(self, backbone: Backbone, sampler: Sampler, seed: int) -> None:
        self.backbone, self.sampler, self.seed = backbone, sampler, seed
        torch.manual_seed(seed)
        width = backbone.unet.config.cross_attention_dim
        embedding_dim = backbone.image_encoder.config.hidden_size
        config = AdapterConfig(cross_attention_dim=width, embedding_dim=embedding_dim, dim=width)
        self.adapter = Adapter.for_unet(backbone.unet, config)

    def train(self, pictures: Pictures, latents: Latents, scenes: list[Scene], seconds: float) -> int:
        """Train for so long on pictures that are their own references, half of them line art; return the steps."""
        unet, scheduler, rng = self.backbone.unet, ddim(), np.random.default_rng(self.seed)
        self.adapter.attach(unet)
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3, weight_decay=0.01)
        begun, step = time.monotonic(), 0
        while (spent := time.monotonic() - begun) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 30, 2.5 * (1 - spent / seconds) + 0.02)
            chosen, lines = rng.integers(len(scenes), size=24), rng.random(24) < 0.5
            clean, t = latents.read(chosen, lines), torch.randint(0, 1000, (24,))
            noise = torch.randn_like(clean)
            texts = [
                "" if rng.random() < 0.6 else caption_of(scenes[i], rng, line=bool(line))
                for i, line in zip(chosen, lines, strict=True)
            ]
            hidden = self.backbone.encode_image(as_images(pictures.read(chosen, lines)))
            dropped = torch.from_numpy(rng.random(24) < 0.08)
            hidden = torch.where(dropped[:, None, None], self.backbone.encode_image_null(24), hidden)
            made = self.adapter(unet, add_noise(scheduler, clean, noise, t), t, self.sampler.text(texts), hidden)
            loss = noise_loss(made, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        return step

    @torch.no_grad()
    def draw(self, references: Tensor, *, scale: float = 1.0, steps: int = 25) -> Tensor:
        """Return pictures for references (B,3,64,64), with an empty prompt."""
        hidden = self.backbone.encode_image(as_images(references))
        tokens = self.adapter.image_tokens(torch.cat([self.backbone.encode_image_null(len(hidden)), hidden]))

        def denoise(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.adapter.denoise(self.backbone.unet, x, t, states, tokens, scale)

        return self.sampler([""] * len(hidden), seed=1000 * self.seed, steps=steps, denoise=denoise)


def adapted(model: Adapted, probe: Probe, pictures: Pictures, scenes: list[Scene], count: int = 100) -> dict[str, Any]:
    """Return what comes through of `count` held-out single busts with an empty prompt, by kind of reference.

    `scale 0` is what there is without a reference, whatever it be: chance.
    """
    busts = judged(pictures, scenes)[:count]
    chosen, found = [scenes[i] for i in busts], {}
    for name, lines, scale in (("colour", False, 1.0), ("line", True, 1.0), ("scale 0", False, 0.0)):
        references = pictures.read(busts, np.full(len(busts), lines))
        made = torch.cat([model.draw(part, scale=scale) for part in references.split(_PART)])
        found[name] = shares(judge(probe, made, chosen), SHOWN_BY_LINES if lines else JUDGED)
    return found
