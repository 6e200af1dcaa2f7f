"""An adapter trained for a few minutes on the corpus, and what its references then bring through."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory.toon.traits import Scene
from trainer.adapter import Adapter, AdapterConfig
from trainer.align import TIMESTEPS, align, record_queries
from trainer.backbone import Backbone, ddim
from trainer.loss import add_noise, noise_loss
from trainer.micro.attributes import JUDGED, SHOWN_BY_LINES
from trainer.micro.measure import PART, judged, shares
from trainer.micro.pictures import Pictures
from trainer.micro.probe import Probe, judge
from trainer.micro.sheet import as_images
from trainer.micro.text import caption_of
from trainer.micro.unet import Latents, Sampler

ALIGNED = 0.8  # share of an adapter's time that goes into its alignment


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

    def train(self, scenes: list[Scene], latents: Latents, features: Features, seconds: float) -> dict[str, int]:
        """Train for so long on pictures that are their own references, half of them line art; return the steps.

        For ALIGNED of the time the image branch is aligned with the captions (trainer/align.py), then noise teaches
        it, without text and mostly at high noise, where a reference decides. A share of the references is dropped
        throughout.
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

        def told(_: int) -> tuple[Tensor, Tensor]:
            chosen, lines, shown, hidden = references(48)
            return texts(chosen, lines, shown), hidden

        def done() -> float:
            return (time.monotonic() - begun) / seconds

        calls = [functools.partial(noisy, timestep) for timestep in TIMESTEPS]
        queries, empty = record_queries(unet, calls), self.sampler.text([""])
        aligned = align(self.adapter, unet, queries, empty, told, progress=lambda _: done() / ALIGNED)
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.01)
        step = 0
        while done() < 1:
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1, (step + 1) / 30, 2.5 * (1 - done()) / (1 - ALIGNED) + 0.02)
            chosen, lines, _, hidden = references(24)
            clean, t = latents.read(chosen, lines), (1000 * torch.rand(24) ** 0.4).long()
            noise = torch.randn_like(clean)
            made = self.adapter(unet, add_noise(scheduler, clean, noise, t), t, empty.expand(24, -1, -1), hidden)
            noise_loss(made, noise).backward()
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        return {"alignment": len(aligned), "noise": step}

    @torch.no_grad()
    def draw(self, references: Tensor, *, scale: float = 1.0, steps: int = 25, first: int = 0) -> Tensor:
        """Return pictures for references (B,3,64,64), with an empty prompt; `first` counts those drawn before."""
        hidden = self.backbone.encode_image(as_images(references))
        tokens = self.adapter.image_tokens(torch.cat([self.backbone.encode_image_null(len(hidden)), hidden]))

        def denoise(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            return self.adapter.denoise(self.backbone.unet, x, t, states, tokens, scale)

        return self.sampler([""] * len(hidden), seed=1000 * self.seed + first, steps=steps, denoise=denoise)


def measured(model: Adapted, probe: Probe, pictures: Pictures, count: int) -> dict[str, Any]:
    """Return what comes through of `count` held-out single busts with an empty prompt, by kind of reference.

    `scale 0` is what there is without a reference, whatever it be: chance.
    """
    busts = judged(pictures)[:count]
    chosen, found = [pictures.scenes[i] for i in busts], {}
    for name, lines, scale in (("colour", False, 1.0), ("line", True, 1.0), ("scale 0", False, 0.0)):
        references = pictures.read(busts, np.full(len(busts), lines))
        starts = range(0, len(references), PART)
        made = torch.cat([model.draw(references[i : i + PART], scale=scale, first=i) for i in starts])
        found[name] = shares(judge(probe, made, chosen), SHOWN_BY_LINES if lines else JUDGED)
    return found
