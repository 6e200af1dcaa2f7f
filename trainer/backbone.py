"""The frozen base: VAE, text encoder, UNet and image encoder of a Stable Diffusion v1.5 family.

Shape suffixes: B batch, N image patches + CLS, E vision width, C text width, H and W pixels, h and w latents.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from factory.files import check_sealed, new_folder, write_atomic
from trainer.base import BaseFiles, find_base
from trainer.projection import HIDDEN, POOLED

TWIN = "twin.json"  # marks a pipeline folder with random weights
TWIN_RECIPE = 1  # raised when make_twin gives other weights for the same seed


@dataclass(kw_only=True, eq=False)
class Backbone:
    """The frozen models of one base, in eval mode, without gradients."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    image_encoder: CLIPVisionModelWithProjection
    image_processor: CLIPImageProcessor  # gives mean and std; the picture is resized here, see encode_image
    files: BaseFiles  # what was loaded
    random_weights: bool  # True for a twin: pictures are noise, shapes and code paths are real
    features: str = HIDDEN  # what encode_image gives: `config.features` of the adapter that reads it

    @property
    def id(self) -> str:
        """The hub id, or the folder's name: never a path."""
        return self.files.id

    @functools.cached_property
    def weights_hash(self) -> str:
        """sha256 over the loaded safetensors files (`BaseFiles.hash`), read when first asked for."""
        return self.files.hash()

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.unet.conv_in.weight.device  # `unet.device` and `unet.dtype` go through all parameters: milliseconds

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> int:
        """The side in pixels that the UNet was made for: 512 for SD v1.5."""
        return self.unet.config.sample_size * self.latent_factor

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along a side: 8 for SD v1.5."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What encode_image does to a reference picture, for config.json."""
        return {
            "reference": "RGB, whole picture resized to a square (bicubic, no crop), /255, normalised",
            "size": self.image_encoder.config.image_size,
            "mean": list(self.image_processor.image_mean),
            "std": list(self.image_processor.image_std),
            "features": self.features,
        }

    def token_count(self, text: str) -> int:
        """Return the tokens of `text`, start and end included; beyond `max_tokens` the rest is cut by encode_text."""
        return len(self.tokenizer(text, truncation=False, verbose=False).input_ids)

    @property
    def max_tokens(self) -> int:
        """The longest text that is read whole, in tokens: 77 for SD v1.5."""
        return self.tokenizer.model_max_length

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return text tokens (B,77,C): the text encoder's last hidden state, of texts padded or cut to 77 tokens."""
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Return `features` (B,N,E) of the image encoder for PIL pictures of any size and mode.

        HIDDEN is hidden_states[-2], N patches + CLS; POOLED the projected embedding, N = 1 (IP-Adapter, section 3.2.1).
        The whole picture is resized to the encoder's square, aspect not kept, so that nothing is cut off: the stock
        processor crops the centre (the IP-Adapter README advises this too). For a square picture both are the same.
        """
        squares = [self.squeeze(image) for image in images]
        pixels = self.image_processor(squares, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
        return self.encode_pixels(pixels)

    def squeeze(self, image: Image.Image) -> Image.Image:
        """Return all of a picture, RGB, in the image encoder's square: what `encode_image` sees of it. Pillow alone."""
        side = self.image_encoder.config.image_size
        return image.convert("RGB").resize((side, side), Image.Resampling(self.image_processor.resample))

    @torch.no_grad()
    def encode_image_null(self, batch: int) -> Tensor:
        """Return `features` (B,N,E) of "no picture", as IP-Adapter was trained: those of pixels that are zero after
        normalisation; of POOLED, zeros."""
        side = self.image_encoder.config.image_size
        features_1NE = self.encode_pixels(torch.zeros(1, 3, side, side))
        return (torch.zeros_like(features_1NE) if self.features == POOLED else features_1NE).expand(batch, -1, -1)

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Return `features` (B,N,E) of normalised pixels, squares of the image encoder's size."""
        pixels_B3HW = pixels_B3HW.to(self.device, self.image_encoder.dtype)
        return _FEATURES[self.features](self.image_encoder(pixels_B3HW, output_hidden_states=True))

    @torch.no_grad()
    def posterior(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B,4,h,w), fp32, of the latents, unscaled, of pixels in [-1,1]."""
        posterior = self.vae.encode(pixels_B3HW.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def sample_latents(self, mean_B4hw: Tensor, std_B4hw: Tensor, noise_B4hw: Tensor) -> Tensor:
        """Return scaled latents (B,4,h,w): the sample of a posterior that standard normal `noise` draws."""
        return (mean_B4hw + std_B4hw * noise_B4hw.to(mean_B4hw)) * self.vae.config.scaling_factor

    def image_to_latents(self, pixels_B3HW: Tensor, noise_B4hw: Tensor | None = None) -> Tensor:
        """Return scaled latents (B,4,h,w), fp32, of pixels in [-1,1]: a sample drawn with `noise`, else the mode."""
        mean, std = self.posterior(pixels_B3HW)
        return self.sample_latents(mean, std, torch.zeros_like(mean) if noise_B4hw is None else noise_B4hw)

    @torch.no_grad()
    def latents_to_image(self, latents_B4hw: Tensor) -> np.ndarray:
        """Return uint8 RGB pictures (B,H,W,3) of scaled latents."""
        return pixels_to_image(self.decode(latents_B4hw))

    def decode(self, latents_B4hw: Tensor) -> Tensor:
        """Return pixels (B,3,H,W), about -1 to 1, of scaled latents."""
        return self.vae.decode(latents_B4hw.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()

    def scheduler(self) -> DDIMScheduler:
        """Return a new DDIM scheduler for SD v1.5, whatever the folder says: some mirrors lack clip_sample."""
        return ddim()


def pixels_to_image(pixels_B3HW: Tensor) -> np.ndarray:
    """Return uint8 RGB pictures (B,H,W,3) of pixels from -1 to 1; what is beyond is cut."""
    return (pixels_B3HW.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


_FEATURES: dict[str, Callable[[Any], Tensor]] = {
    HIDDEN: lambda output: output.hidden_states[-2],
    POOLED: lambda output: output.image_embeds[:, None],
}


def load_backbone(
    pretrained_model_name_or_path: str,
    *,
    image_encoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Return the frozen models of a diffusers pipeline folder or hub id.

    `image_encoder` is the folder, or `owner/name/sub/folder` on the hub, of the image encoder when the pipeline has no
    `image_encoder` of its own: SD v1.5 with `h94/IP-Adapter/models/image_encoder`. FileNotFoundError when something
    is absent. Only safetensors are read, never pickles.
    """
    base = find_base(pretrained_model_name_or_path, image_encoder)
    load: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    marker = base.folder / TWIN
    backbone = Backbone(
        vae=AutoencoderKL.from_pretrained(base.folder / "vae", **load),
        text_encoder=CLIPTextModel.from_pretrained(base.folder / "text_encoder", **load),
        tokenizer=CLIPTokenizer.from_pretrained(base.folder / "tokenizer", local_files_only=True),
        unet=UNet2DConditionModel.from_pretrained(base.folder / "unet", **load),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(base.image_encoder, **load),
        image_processor=_processor(base.image_processor),
        files=base,
        random_weights=marker.is_file() and json.loads(marker.read_text())["random_weights"],
    )
    for model in (backbone.vae, backbone.text_encoder, backbone.unet, backbone.image_encoder):
        model.requires_grad_(False).eval().to(device)
    return backbone


def set_checkpointing(base: Backbone, on: bool) -> None:
    """Have the UNet recompute its activations in the backward pass, or keep them."""
    (base.unet.enable_gradient_checkpointing if on else base.unet.disable_gradient_checkpointing)()
    base.unet.train(on)  # it acts in train mode only; SD v1.5 has no dropout


def ddim() -> DDIMScheduler:
    """Return the DDIM scheduler of SD v1.5: 1000 steps, scaled-linear betas, epsilon, leading spacing."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,  # the class default True is for DDPM, and wrong here
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def make_twin(folder: str | Path, seed: int = 0) -> Path:
    """Write a random-weight twin of SD v1.5 to `folder` and return it: same classes, 64 px, about 15 MB.

    The UNet has SD v1.5's block types, hence its 16 cross-attention layers (adapter keys 1 to 31). The same seed gives
    the same weights hash. A complete twin of that seed is kept; FileExistsError when `folder` holds something else.
    """
    folder = Path(folder)
    facts = {"random_weights": True, "seed": seed, "recipe": TWIN_RECIPE}
    if folder.exists():
        marker = folder / TWIN
        if marker.is_file() and json.loads(marker.read_text()) == facts:
            check_sealed(folder)
            return folder
        raise FileExistsError(
            f"{folder} exists and is not the twin of seed {seed}. Give another --output, or remove it."
        )
    with new_folder(folder) as aside:
        _twin(seed).save_pretrained(aside)
        # transformers without torchvision writes the name of its PIL backend, which older installs do not know
        for name in ("model_index.json", "feature_extractor/preprocessor_config.json"):
            text = (aside / name).read_text()
            write_atomic(aside / name, text.replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
        write_atomic(aside / TWIN, json.dumps(facts) + "\n")
        for file in aside.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them readable by the owner alone
    return folder


def _twin(seed: int) -> StableDiffusionPipeline:
    """Return the twin's pipeline with weights drawn from `seed` alone (sizes: widths of one norm group and a bit)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=2,
            down_block_types=attention,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=32,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            sample_size=64,
        )
        tokenizer = _byte_tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision = CLIPVisionConfig(
            hidden_size=40,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=24,
            hidden_act="gelu",
        )
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=_square_processor(vision.image_size),
            image_encoder=CLIPVisionModelWithProjection(vision),
            requires_safety_checker=False,
        )


def _byte_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of single bytes: 514 ids, no merges, 77 tokens at most."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]  # GPT-2's byte alphabet
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _processor(folder: Path) -> CLIPImageProcessor:
    """Return the CLIP image processor of `folder`; CLIP's own mean and std where none is kept, as in h94/IP-Adapter."""
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    return CLIPImageProcessor()


def _square_processor(side: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
