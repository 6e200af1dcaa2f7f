"""The UNet2DConditionModel: SD v1.5's levels, block types and layers, narrow, on the trained VAE and text encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from factory.caption import sample_text
from factory.toon.traits import Scene
from trainer.backbone import ddim
from trainer.base import GUIDANCE
from trainer.loss import add_noise
from trainer.micro.pictures import LINES, SIDE, Pictures
from trainer.micro.sheet import write_sheet
from trainer.micro.text import KEYWORDS, caption_of
from trainer.micro.training import Recipe, train

RECIPE = Recipe(steps=3200, batch_size=32, learning_rate=1e-3, ema=0.998, decay_from=0.5)
FACTOR = 4  # pixels per latent along a side
FOCUS = 0.35  # share of samples that are taken from single busts, which the measures judge, beside their own share
NO_TEXT = 0.1  # share of samples without text, for classifier-free guidance
NO_CAPTION = 0.1  # share of line layers whose text is the keywords alone, as where a film has no captions
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", eq. for epsilon


def new_unet(latent_channels: int, text_width: int) -> UNet2DConditionModel:
    """Return the model with new weights: adapter keys 1 to 31, as SD v1.5's."""
    return UNet2DConditionModel(
        sample_size=SIDE // FACTOR,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(48, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=text_width,
        attention_head_dim=(2, 2, 4, 4),  # SD v1.5's name for the number of heads
        norm_num_groups=8,
    )


class Latents:
    """The latents of all pictures and line layers, mean and standard deviation, scaled, in memory."""

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, pictures: Pictures) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        for lines in (False, True):
            held = []
            for start in range(0, len(pictures), 64):
                chosen = np.arange(start, min(start + 64, len(pictures)))
                held.append(vae.encode(pictures.read(chosen, np.full(len(chosen), lines))).latent_dist)
            mean = torch.cat([posterior.mean for posterior in held]) * vae.config.scaling_factor
            std = torch.cat([posterior.std for posterior in held]) * vae.config.scaling_factor
            self.parts.append((mean, std))

    def read(self, indices: np.ndarray, lines: np.ndarray) -> Tensor:
        """Return latents (B,8,16,16) drawn from the posterior of the line layer where `lines`, else of the picture."""
        (colour, colour_std), (line, line_std) = self.parts
        chosen = torch.from_numpy(lines)[:, None, None, None]
        mean = torch.where(chosen, line[indices], colour[indices])
        return mean + torch.where(chosen, line_std[indices], colour_std[indices]) * torch.randn_like(mean)


class TextStates:
    """Texts -> states (B,77,C), the same as `Backbone.encode_text` gives."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.encoder(ids.input_ids)[0]


def train_unet(
    vae: AutoencoderKL,
    pictures: Pictures,
    held_out: Pictures,
    text: TextStates,
    folder: Path,
    recipe: Recipe = RECIPE,
) -> UNet2DConditionModel:
    """Train it to predict the noise of SD v1.5's schedule, and return it with averaged weights."""
    latents, scenes = Latents(vae, pictures), pictures.scenes
    torch.manual_seed(recipe.seed)
    channels = latents.parts[0][0].shape[1]
    unet = new_unet(channels, text.encoder.config.hidden_size)
    squares = np.flatnonzero(~pictures.wide)
    busts = np.array([i for i in squares if len(scenes[i].figures) == 1 and scenes[i].camera == "bust"])
    scheduler = ddim()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        count = recipe.batch_size
        lines, focus = rng.random(count) < LINES, rng.random(count) < FOCUS
        # White bars above and below are nothing on paper, but no text tells of them in colour: wide pictures as lines.
        chosen = np.where(lines, rng.integers(len(scenes), size=count), rng.choice(squares, count))
        chosen = np.where(focus, rng.choice(busts, count), chosen)
        texts = [caption_of(scenes[i], rng, line=bool(line)) for i, line in zip(chosen, lines, strict=True)]
        bare = lines & (rng.random(count) < NO_CAPTION)
        texts = [sample_text(None, KEYWORDS) if b else t for b, t in zip(bare, texts, strict=True)]
        texts = ["" if silent else t for silent, t in zip(rng.random(count) < NO_TEXT, texts, strict=True)]
        clean = latents.read(chosen, lines)
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (count,))
        made = unet(add_noise(scheduler, clean, noise, t), t, text(texts)).sample
        error_B = F.mse_loss(made, noise, reduction="none").mean((1, 2, 3))
        return {"loss": (error_B * snr[t].clamp(max=MIN_SNR) / snr[t]).mean(), "eps": error_B.mean()}

    fixed, sampler = _fixed(Latents(vae, held_out), held_out.scenes), Sampler(vae, unet, text)

    def validate() -> dict[str, float]:
        clean, texts, noise, t = fixed
        write_sheet(sampler(texts[:24], seed=0, steps=20), folder / "sheet.png")
        noisy = add_noise(scheduler, clean, noise, t)
        made, other = (unet(noisy, t, text(words)).sample for words in (texts, texts[1:] + texts[:1]))
        return {"validation": float(F.mse_loss(made, noise)), "other_text": float(F.mse_loss(other, noise))}

    train("unet", unet, recipe, loss, folder=folder, validate=validate)
    return unet


def _fixed(latents: Latents, scenes: list[Scene], count: int = 256) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Held-out latents, texts, noise and evenly spread time steps, the same for every validation."""
    rng, count = np.random.default_rng(0), min(count, len(scenes))
    torch.manual_seed(0)
    chosen, lines = np.arange(count), np.arange(count) % 10 < 10 * LINES
    clean = latents.read(chosen, lines)
    texts = [caption_of(scenes[i], rng, line=bool(line)) for i, line in zip(chosen, lines, strict=True)]
    t = torch.linspace(10, 990, count).long()[torch.randperm(count)]
    return clean, texts, torch.randn_like(clean), t


class Sampler:
    """DDIM with classifier-free guidance over a text, batched: what the base draws."""

    def __init__(self, vae: AutoencoderKL, unet: nn.Module, text: Callable[[list[str]], Tensor]) -> None:
        self.vae, self.unet, self.text, self.scheduler = vae, unet, text, ddim()

    @torch.no_grad()
    def __call__(
        self, texts: list[str], *, seed: int, steps: int = 50, denoise: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return pictures (B,3,64,64) in [-1,1] of the texts; picture i uses the noise of `seed` + i.

        `denoise` takes the UNet's place: latents (2B,8,16,16), the time step and text states, first those of no text.
        """
        shape = (self.vae.config.latent_channels, SIDE // FACTOR, SIDE // FACTOR)
        x = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(texts))]
        )
        states = torch.cat([self.text([""] * len(texts)), self.text(texts)])
        denoise = denoise or (lambda *inputs: self.unet(*inputs).sample)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            free, led = denoise(torch.cat([x, x]), t, states).chunk(2)
            x = self.scheduler.step(free + GUIDANCE * (led - free), t, x).prev_sample
        return self.vae.decode(x / self.vae.config.scaling_factor).sample.clamp(-1, 1)
