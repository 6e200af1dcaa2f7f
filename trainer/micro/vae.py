"""The AutoencoderKL: 64 x 64 pictures to 16 x 16 latents of 8 channels, for colour and line art alike.

A factor of 4, not SD's 8, and 8 channels, not 4: at this size an eye is five pixels wide. In trials of the same length
a factor of 8 left lines blurred and eyes grey, and 4 channels lost the colour of every third eye.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from trainer.micro.pictures import Pictures
from trainer.micro.sheet import write_sheet
from trainer.micro.training import Recipe, train

LATENT_CHANNELS = 8
RECIPE = Recipe(steps=9_000, batch_size=3, learning_rate=1e-3, ema=0.998, decay_from=0.4)
LOG_VARIANCE = -5.0  # of the posterior when training begins
KL_WEIGHT = 2e-4


def new_vae() -> AutoencoderKL:
    """Return the model with new weights."""
    vae = AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,  # measured when trained, see `scale`
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] += LOG_VARIANCE  # type: ignore[index,union-attr]
    return vae


def picture_loss(made: Tensor, true: Tensor, sharp: float) -> dict[str, Tensor]:
    """Return the terms of the reconstruction loss of pictures (B,3,H,W) in [-1,1].

    Ink and shape: squared error, then, by `sharp` (0 to 1), the absolute error and that of the gradients, which would
    leave thin lines out if they ruled from the start. Colour: squared error of the opponent part, weighted by
    saturation, whole and in blocks of four pixels: without it small coloured things, such as eyes, come out grey long
    after the lines are sharp.
    """
    error = made - true
    grey, true_grey = made.mean(1, keepdim=True), true.mean(1, keepdim=True)
    chroma = (made - grey) - (true - true_grey)
    saturation = 1 + 10 * (true - true_grey).square().sum(1, keepdim=True)
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    terms = {
        "l1": error.abs().mean(),
        "mse": error.square().mean(),
        "gradient": (across + down) / 2,
        "chroma": (chroma.square() * saturation).mean(),
        "tone": F.avg_pool2d(chroma, 4).square().mean(),
    }
    squared = 4 * terms["mse"] + 4 * terms["chroma"] + 3 * terms["tone"]
    terms["loss"] = squared + sharp * (terms["l1"] + 0.4 * terms["gradient"])
    return terms


def train_vae(pictures: Pictures, held_out: Pictures, folder: Path, recipe: Recipe = RECIPE) -> AutoencoderKL:
    """Train it on `pictures`, and return it with `scaling_factor` measured on them."""
    torch.manual_seed(recipe.seed)
    vae = new_vae()

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        true = pictures.draw(rng, recipe.batch_size)
        posterior = vae.encode(true).latent_dist
        terms = picture_loss(
            vae.decode(posterior.sample()).sample, true, min(1.0, max(0.0, 4 * step / recipe.steps - 1))
        )
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return terms | {"loss": terms["loss"] + KL_WEIGHT * kl, "kl": kl}

    train("vae", vae, recipe, loss, folder=folder, validate=functools.partial(_validate, vae, held_out, folder))
    scale(vae, pictures)
    return vae


def _validate(vae: AutoencoderKL, held_out: Pictures, folder: Path) -> dict[str, float]:
    """The dB of both layers; a sheet of originals and reconstructions is left in `folder`."""
    rows, found = [], {}
    for kind in ("colour", "line"):
        true = held_out.first(64, lines=kind == "line")
        made = reconstruct(vae, true)
        rows += [true[:12], made[:12]]
        found[f"psnr_{kind}"] = psnr(made, true)
    write_sheet(torch.cat(rows), folder / "sheet.png")
    return found


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the pictures (B,3,64,64) encoded and decoded."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in pixels.split(64)])


def psnr(made: Tensor, true: Tensor) -> float:
    """Return the mean over pictures (B,3,H,W) in [-1,1] of the peak signal-to-noise ratio, dB."""
    return float((10 * torch.log10(4 / (made - true).square().mean((1, 2, 3)))).mean())


@torch.no_grad()
def scale(vae: AutoencoderKL, pictures: Pictures) -> None:
    """Set `scaling_factor` so that latents have a standard deviation of 1, as SD's 0.18215 does."""
    rng = np.random.default_rng(0)
    latents = torch.cat([vae.encode(pictures.draw(rng, 32)).latent_dist.mean for _ in range(32)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
