"""Pictures that a run draws while it trains: the same texts, references and noise each time, on a sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from factory.files import write_atomic
from trainer.config import PicturesConfig, TrainerConfig
from trainer.data import Samples, spread

if TYPE_CHECKING:  # the driver checks what is asked for, and needs no model library
    from trainer.adapter import Adapter
    from trainer.backbone import Backbone


def asked(config: TrainerConfig) -> list[tuple[str, Image.Image]]:
    """Return the texts and references to draw from. ValueError for a reference that is no picture, FileNotFoundError
    for one that is absent."""
    wanted = config.pictures
    samples = None if wanted.prompts and wanted.references else Samples(config.data, "validation")
    held_out = samples.read(spread(min(wanted.count, len(samples)), len(samples))) if samples else []
    prompts = wanted.prompts or [sample.text for sample in held_out]
    references = [_open(path) for path in wanted.references] or [sample.reference for sample in held_out]
    return list(zip(prompts, references, strict=False))  # a small split has fewer than were given


@torch.no_grad()
def draw_picture(
    base: Backbone,
    adapter: Adapter,
    prompt: str,
    reference: Image.Image,
    config: PicturesConfig,
    *,
    side: int,
    seed: int,
) -> Image.Image:
    """Return the picture (side x side, RGB) that DDIM draws with the attached adapter: the server's, of that recipe.

    Classifier-free guidance goes from no text and no picture.
    """
    text_2TC = base.encode_text(["", prompt])
    hidden_2NE = torch.cat([base.encode_image_null(1), base.encode_image([reference])])
    image_2IC = adapter.image_tokens(hidden_2NE)
    scheduler = base.scheduler()
    scheduler.set_timesteps(config.num_inference_steps)
    shape = (1, base.vae.config.latent_channels, side // base.latent_factor, side // base.latent_factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(base.device)
    for t in scheduler.timesteps:
        both, at = latents.repeat(2, 1, 1, 1).to(base.dtype), t.repeat(2).to(base.device)
        eps = adapter.denoise(base.unet, both, at, text_2TC, image_2IC, config.adapter_scale).float()
        eps_without, eps_with = eps.chunk(2)
        eps = eps_without + config.guidance_scale * (eps_with - eps_without)
        latents = scheduler.step(eps, t, latents).prev_sample  # type: ignore[union-attr]
    return Image.fromarray(base.latents_to_image(latents)[0])


def write_sheet(rows: Sequence[tuple[Image.Image, Image.Image]], path: Path) -> None:
    """Write a PNG with one row for each (reference, picture); the reference is fitted into a square on white."""
    side = rows[0][1].width
    sheet = Image.new("RGB", (2 * side, side * len(rows)), "white")
    for row, (reference, picture) in enumerate(rows):
        sheet.paste(ImageOps.pad(reference, (side, side), color="white"), (0, row * side))
        sheet.paste(picture, (side, row * side))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_atomic(path, data.getvalue())


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"No reference {path}. Give picture files in pictures.references.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"Reference {path} is not a whole picture ({error}). Give another.") from None
