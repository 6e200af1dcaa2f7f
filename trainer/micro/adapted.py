"""An adapter trained for a few minutes on the corpus, and what its references then bring through."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

ALIGNED = 0.92  # share of an adapter's time that goes into its alignment
DROPPED = 0.08  # share of samples without reference and caption


class Encoded:
    """What the base's frozen encoders make of all pictures, line layers and a caption of each, in memory."""

    def __init__(self, backbone: Backbone, pictures: Pictures, seed: int = 0) -> None:
        self.features: list[Tensor] = []
        self.texts: list[Tensor] = []
        rng = np.random.default_rng(seed)
        for lines in (False, True):
            features, texts = [], []
            for start in range(0, len(pictures), 64):
                chosen = np.arange(start, min(start + 64, len(pictures)))
                pixels = pictures.read(chosen, np.full(len(chosen), lines))
                features.append(backbone.encode_image(as_images(pixels)).half())
                captions = [caption_of(pictures.scenes[i], rng, line=lines) for i in chosen]
                texts.append(backbone.encode_text(captions).half())
            self.features.append(torch.cat(features))
            self.texts.append(torch.cat(texts))

    def read(self, indices: np.ndarray, lines: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return image features (B,N,E) and text states (B,77,C): of the line layer where `lines` (B,) is true."""
        is_line = torch.from_numpy(lines)[:, None, None]
        features, texts = (
            torch.where(is_line, line[indices], colour[indices]).float() for colour, line in (self.features, self.texts)
        )
        return features, texts


class Adapted:
    """The base with an adapter trained on the corpus for a while, and what references then bring through."""

    def __init__(self, backbone: Backbone, sampler: Sampler, seed: int) -> None:
        self.backbone, self.sampler, self.seed = backbone, sampler, seed
        torch.manual_seed(seed)
        width = backbone.unet.config.cross_attention_dim
        embedding_dim = backbone.image_encoder.config.hidden_size
        config = AdapterConfig(cross_attention_dim=width, embedding_dim=embedding_dim, dim=width)
        self.adapter = Adapter.for_unet(backbone.unet, config)

    def train(self, latents: Latents, encoded: Encoded, seconds: float) -> dict[str, int]:
        """Train for so long on pictures that are their own references, half of them line art; return the steps.

        For ALIGNED of the time the image branch is aligned with the captions (trainer/align.py), then noise teaches
        it, without text and mostly at high noise, where a reference decides. A share of the references is dropped
        throughout, and their captions with them.
        """
        unet, scheduler, rng = self.backbone.unet, ddim(), np.random.default_rng(self.seed)
        null, empty = self.backbone.encode_image_null(1), self.sampler.text([""])
        begun = time.monotonic()
        self.adapter.attach(unet)

        def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
            """Latents, text states and image features of `count` samples."""
            chosen = rng.integers(len(encoded.features[0]), size=count)
            lines, shown = rng.random(count) < 0.5, torch.from_numpy(rng.random(count) > DROPPED)[:, None, None]
            hidden, text = encoded.read(chosen, lines)
            return latents.read(chosen, lines), torch.where(shown, text, empty), torch.where(shown, hidden, null)

        def noisy(timestep: int) -> None:
            clean, text, _ = batch(16)
            t = torch.full((16,), timestep)
            x = add_noise(scheduler, clean, torch.randn_like(clean), t)
            self.adapter.denoise(unet, x, t, text, text[:, :0], 0.0)

        def done() -> float:
            return (time.monotonic() - begun) / seconds

        calls = [functools.partial(noisy, timestep) for timestep in TIMESTEPS]
        queries = record_queries(unet, calls)
        aligned = align(
            self.adapter, unet, queries, empty, lambda _: batch(48)[1:], progress=lambda _: done() / ALIGNED
        )
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.01)
        step = 0
        while done() < 1:
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1, (step + 1) / 30, 2.5 * (1 - done()) / (1 - ALIGNED) + 0.02)
            clean, _, hidden = batch(24)
            noise, t = torch.randn_like(clean), (1000 * torch.rand(24) ** 0.4).long()
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
