"""Recipes to pictures: DDIM with classifier-free guidance on a frozen Stable Diffusion with an image-prompt adapter.

    engine = Engine.load("/runs/7", base="/models/stable-diffusion-v1-5")
    engine.infer(Recipe(prompt="a girl under a tree", reference=Image.open("sketch.png"), seed=7))[0].save("out.png")

Plain torch: no Ray, no HTTP. Shape suffixes: B pictures of a batch, T text tokens, I image tokens, N image patches +
CLS, E vision width, C text width, h and w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from trainer.adapter import Adapter, AdapterError, read_config
from trainer.backbone import Backbone, load_backbone

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a picture, apart from the models. The same recipe gives the same picture."""

    prompt: str
    # what the unconditional half of the guidance is told
    negative_prompt: str = ""
    # the sketch whose style and content guide the picture; None = text alone, which is the base model itself
    reference: Image.Image | None = None
    # DDIM steps, 1 to 999
    num_inference_steps: int = 50
    # eps = eps_u + guidance_scale (eps_c - eps_u); 1 leaves the unconditional half out
    guidance_scale: float = 7.5
    # the paper's alpha: weight of the image branch in every cross-attention
    adapter_scale: float = 0.5
    # picture i draws its noise from seed + i
    seed: int = 0
    # width and height in pixels, multiples of the VAE's factor; None = the base's native size
    size: tuple[int, int] | None = None
    # number of pictures
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 999:
            raise ValueError(f"num_inference_steps must be from 1 to 999, got {self.num_inference_steps}.")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}.")
        if not 0 <= self.seed <= MAX_SEED - self.n + 1:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - self.n + 1} for n = {self.n}, got {self.seed}.")
        for name in ("guidance_scale", "adapter_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One DDIM step that is done, handed to `on_step`."""

    # steps done and to do for the whole recipe; with n above the batch size they count over all batches
    number: int
    total: int
    # which picture of the recipe the first one of this batch is
    first: int
    # the clean latents (B,4,h,w) that this step predicts: Engine.decode makes them a preview
    x0: Tensor


class Engine:
    """A base with an adapter attached. Not for several threads at once: the adapter lives in the UNet."""

    def __init__(self, backbone: Backbone, adapter: Adapter, *, batch_size: int = 4) -> None:
        """Attach `adapter` to `backbone.unet`; `batch_size` pictures go through the UNet at once."""
        self.backbone = backbone
        self.adapter = adapter.to(backbone.device, backbone.unet.dtype).requires_grad_(False).eval()
        self.batch_size = batch_size
        self.adapter.attach(backbone.unet)

    @classmethod
    def load(
        cls,
        adapter: str,
        *,
        base: str | None = None,
        image_encoder: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch_size: int = 4,
    ) -> Engine:
        """Return an engine for an adapter or run folder on `base`, by default the base that the adapter's config names.

        FileNotFoundError when something is absent, AdapterError when the adapter is damaged or was trained on a base
        with other weights. A bare published .safetensors file names no base, so `base` is needed and nothing compared.
        """
        trained_on = read_config(adapter).get("base") or {}
        base = base or trained_on.get("id")
        if base is None:
            raise ValueError(f"Adapter {adapter} names no base. Give it: base=/absolute/folder or base=owner/name.")
        backbone = load_backbone(base, image_encoder=image_encoder, dtype=dtype, device=device)
        wanted = trained_on.get("weights_hash")
        if wanted is not None and wanted != backbone.weights_hash:
            raise AdapterError(
                f"Adapter {adapter} was trained on base {trained_on.get('id')} {wanted[:12]}…, this server runs "
                f"{backbone.id} {backbone.weights_hash[:12]}…. Start it with base=… or pick another adapter."
            )
        loaded = Adapter.from_pretrained(adapter, dtype=dtype)
        backbone.features = loaded.config.features
        return cls(backbone, loaded, batch_size=batch_size)

    def infer(self, recipe: Recipe, on_step: Callable[[Step], None] | None = None) -> list[Image.Image]:
        """Return the `recipe.n` RGB pictures of a recipe.

        `on_step` is called after each step; what it raises ends the sampling and comes out of here. Pictures are the
        same for the same recipe on the same machine; another batch size, dtype or device changes them by float noise.
        ValueError for a size that the VAE can't make; ArithmeticError when the models give no finite numbers.
        """
        width, height = self.size(recipe)
        with torch.inference_mode():
            text_2TC, image_2IC, scale = self._condition(recipe)
            images: list[Image.Image] = []
            for first in range(0, recipe.n, self.batch_size):
                seeds = [recipe.seed + i for i in range(first, min(first + self.batch_size, recipe.n))]
                noise_B4hw = self.noise(seeds, (width, height))
                latents_B4hw = self._sample(recipe, noise_B4hw, text_2TC, image_2IC, scale, first, on_step)
                if not bool(torch.isfinite(latents_B4hw).all()):
                    raise ArithmeticError("Sampling gave NaN or infinity. Run with dtype float32 or bfloat16.")
                images += self.decode(latents_B4hw)
        return images

    def size(self, recipe: Recipe) -> tuple[int, int]:
        """Return width and height in pixels of a recipe's pictures. ValueError unless the VAE can make them."""
        native, factor = self.backbone.native_size, self.backbone.latent_factor
        width, height = recipe.size or (native, native)
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"Sides must be multiples of {factor}, got {width}x{height}.")
        return width, height

    def noise(self, seeds: list[int], size: tuple[int, int]) -> Tensor:
        """Return start latents (B,4,h,w), each drawn on the CPU from its own seed: no picture depends on another."""
        factor = self.backbone.latent_factor
        shape = (1, self.backbone.vae.config["latent_channels"], size[1] // factor, size[0] // factor)
        drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        return torch.cat(drawn).to(self.backbone.device)

    def decode(self, latents_B4hw: Tensor) -> list[Image.Image]:
        """Return RGB pictures of scaled latents, decoded one by one so that memory does not grow with the batch."""
        return [Image.fromarray(self.backbone.latents_to_image(one)[0]) for one in latents_B4hw.split(1)]

    def cut_tokens(self, text: str) -> int:
        """Return how many tokens of `text` the text encoder does not see, 0 for most."""
        return max(0, self.backbone.token_count(text) - self.backbone.max_tokens)

    def _condition(self, recipe: Recipe) -> tuple[Tensor, Tensor, float]:
        """Return text tokens (2,T,C) and image tokens (2,I,C), negative first, and alpha; once per recipe.

        The unconditional image is a zero pixel tensor through the encoder. Without a reference alpha is 0: the image
        branch isn't computed, and its tokens are empty.
        """
        text_2TC = self.backbone.encode_text([recipe.negative_prompt, recipe.prompt])
        if recipe.reference is None or recipe.adapter_scale == 0:
            return text_2TC, text_2TC[:, :0], 0.0
        hidden_2NE = torch.cat([self.backbone.encode_image_null(1), self.backbone.encode_image([recipe.reference])])
        return text_2TC, self.adapter.image_tokens(hidden_2NE), recipe.adapter_scale

    def _sample(
        self,
        recipe: Recipe,
        noise_B4hw: Tensor,
        text_2TC: Tensor,
        image_2IC: Tensor,
        scale: float,
        first: int,
        on_step: Callable[[Step], None] | None,
    ) -> Tensor:
        """Return the clean latents (B,4,h,w) that DDIM (eta 0) makes of `noise`. Latents stay in float32."""
        backbone, batch = self.backbone, len(noise_B4hw)
        scheduler = backbone.scheduler()
        scheduler.set_timesteps(recipe.num_inference_steps)
        timesteps = scheduler.timesteps.tolist()
        stride = len(scheduler.alphas_cumprod) // recipe.num_inference_steps
        guided = recipe.guidance_scale != 1.0
        halves = slice(None) if guided else slice(1, None)
        text, image = (tokens[halves].repeat_interleave(batch, dim=0) for tokens in (text_2TC, image_2IC))
        latents = noise_B4hw
        for done, t in enumerate(timesteps, start=1):
            model_input = latents.repeat(2 if guided else 1, 1, 1, 1).to(backbone.unet.dtype)
            at = torch.full((len(model_input),), t, device=latents.device)
            eps = self.adapter.denoise(backbone.unet, model_input, at, text, image, scale).float()
            if guided:
                eps_u, eps_c = eps.chunk(2)
                eps = eps_u + recipe.guidance_scale * (eps_c - eps_u)
            previous = t - stride
            abar_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
            latents, x0 = ddim_step(latents, eps, scheduler.alphas_cumprod[t], abar_previous)
            if on_step is not None:
                batches = math.ceil(recipe.n / self.batch_size)
                number = first // self.batch_size * len(timesteps) + done
                on_step(Step(number=number, total=batches * len(timesteps), first=first, x0=x0))
        return latents


def ddim_step(x: Tensor, eps: Tensor, abar: Tensor, abar_previous: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x', x0): the latents one DDIM step earlier in time and the clean latents that `eps` implies.

    x0 = (x - sqrt(1 - abar) eps) / sqrt(abar),  x' = sqrt(abar') x0 + sqrt(1 - abar') eps

    Denoising Diffusion Implicit Models (Song et al. 2021), equation 12 with eta = 0; `abar` are the cumulative products
    of 1 - beta at the two time steps.
    """
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    return abar_previous**0.5 * x0 + (1 - abar_previous) ** 0.5 * eps, x0
