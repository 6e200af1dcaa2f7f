"""Recipes to pictures: DDIM with classifier-free guidance on a frozen Stable Diffusion with an image-prompt adapter.

    engine = Engine.load("/runs/7", base="/models/stable-diffusion-v1-5")
    engine.infer(Recipe(prompt="a girl under a tree", reference=Image.open("sketch.png"), seed=7))[0].save("out.png")

Pictures are drawn in slots. Each slot has its own recipe and its own time step, and `step` takes any slots of one shape
a step further at once: pictures join and leave between steps (`serving/batcher.py` decides which). What does not depend
on the step is made once for a slot, and kept for later ones with the same content.

Plain torch: no Ray, no HTTP. Shape suffixes: N slots, B rows of a batch (a slot has two under guidance), T text tokens,
I image tokens, E vision width, C text width, h and w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from serving.attention import Layers, States, attach, image_layers, nbytes, side_by_side, text_layers
from serving.cache import Cache
from serving.recipe import Recipe
from trainer.adapter import Adapter, AdapterError, read_config
from trainer.backbone import Backbone, load_backbone, pixels_to_image

ONLY = "adapter"  # name of the adapter of an engine that has one
CACHE_BYTES = 256 * 2**20  # of keys and values; a text of SD v1.5 takes 7.7 MB in fp32


@dataclass(eq=False, kw_only=True)
class Slot:
    """One picture that is being drawn."""

    # without its reference, which the rows know
    recipe: Recipe
    # which picture of the recipe
    number: int
    # what each row attends to, the unconditional one first; without guidance there is but one
    rows: tuple[tuple[Layers, Layers | None, float], ...]
    # (1,4,h,w), fp32
    latents: Tensor
    # image tokens that its adapter makes: those of a batch have as many
    image_tokens: int
    # what the sampler still has to go through, the next one first
    timesteps: list[int] = field(default_factory=list)
    # the clean latents (1,4,h,w) that the last step predicted: Engine.picture makes them a preview
    x0: Tensor | None = None
    # of the steps that drew it, 1 / N of one that drew N, and of their seconds: kept by the worker
    share: float = 0.0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.recipe.num_inference_steps - len(self.timesteps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What slots must share to be denoised together: h, w, I."""
        return self.latents.shape[2], self.latents.shape[3], self.image_tokens


class Engine:
    """A base with adapters. Not for several threads at once."""

    def __init__(
        self, backbone: Backbone, adapters: Adapter | Mapping[str, Adapter], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Make `backbone.unet` take the keys and values of slots. Adapters make them: none is attached."""
        self.backbone = backbone
        self.adapters: dict[str, Adapter] = {}
        for name, adapter in ({ONLY: adapters} if isinstance(adapters, Adapter) else adapters).items():
            self.add(name, adapter)
        attach(backbone.unet)
        self._kept: Cache[Layers] = Cache(cache_bytes, nbytes)
        scheduler = backbone.scheduler()
        self._scheduler = scheduler
        # at t + 1 the alpha-bar of t; at 0 that of the time before the last step
        abar = torch.cat([scheduler.final_alpha_cumprod.view(1), scheduler.alphas_cumprod])
        self._abar, self._train_steps = abar.to(backbone.device), len(abar) - 1
        self._batch: tuple[list[Slot], States] | None = None
        self._compiled = False

    @classmethod
    def load(
        cls,
        adapter: str,
        *,
        base: str | None = None,
        image_encoder: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        channels_last: bool = False,
        compile: bool = False,
    ) -> Engine:
        """Return an engine for an adapter or run folder on `base`, by default the base that the adapter's config names.

        `channels_last` and `compile` make steps faster where they pay, and change pictures by float noise only.
        FileNotFoundError when something is absent, AdapterError when the adapter is damaged or was trained on a base
        with other weights. A bare published .safetensors file names no base, so `base` is needed and nothing compared.
        """
        trained_on = read_config(adapter).get("base") or {}
        base = base or trained_on.get("id")
        if base is None:
            raise ValueError(f"Adapter {adapter} names no base. Give it: base=/absolute/folder or base=owner/name.")
        backbone = load_backbone(base, image_encoder=image_encoder, dtype=dtype, device=device)
        engine = cls(backbone, {})
        engine.quicken(channels_last=channels_last, compile=compile)
        engine.add(ONLY, engine.read_adapter(adapter))
        return engine

    def quicken(self, *, channels_last: bool = False, compile: bool = False) -> None:
        """Lay out the UNet's convolutions with channels last, compile it: each first step of a new shape takes longer.

        A compiled UNet takes any number of slots of any multiple of `size_multiple`; torch compiles forms of it by
        batch and size, most of them in `serving.warmup.draw_shapes`. One engine of a process can be compiled: others
        would share its code.
        """
        if channels_last:
            self.backbone.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            # the modules are frozen: that they are still the same need not be asked at each step
            same = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            self.backbone.unet.compile(options={"max_autotune": True, "guard_filter_fn": same})
            self._compiled = True

    def read_adapter(self, adapter: str) -> Adapter:
        """Return the adapter of a folder or file. AdapterError when it was trained on a base with other weights."""
        trained_on = read_config(adapter).get("base") or {}
        wanted = trained_on.get("weights_hash")
        if wanted is not None and wanted != self.backbone.weights_hash:
            raise AdapterError(
                f"Adapter {adapter} was trained on base {trained_on.get('id')} {wanted[:12]}…, this server runs "
                f"{self.backbone.id} {self.backbone.weights_hash[:12]}…. Start it with base=… or pick another adapter."
            )
        return Adapter.from_pretrained(adapter, dtype=self.backbone.dtype)

    def add(self, name: str, adapter: Adapter) -> None:
        """Have `adapter` draw for recipes that name it. AdapterError when it does not fit the UNet."""
        adapter.check(self.backbone.unet)
        self.adapters[name] = adapter.to(self.backbone.device, self.backbone.dtype).requires_grad_(False).eval()

    def remove(self, name: str) -> None:
        """Give an adapter up; slots that it has made are drawn to their end."""
        del self.adapters[name]
        self._kept.drop(lambda key: isinstance(key, tuple) and key[0] == name)

    @torch.inference_mode()
    def slot(self, recipe: Recipe, number: int = 0, adapter: str = ONLY) -> Slot:
        """Return a slot for picture `number` of a recipe, at its first step. ValueError for a size that can't be made.

        The unconditional image is a zero pixel tensor through the encoder. Without a reference, or at alpha 0, there is
        no image branch.
        """
        size = self.size(recipe)
        found, scale = self.adapters[adapter], recipe.adapter_scale
        told = [(recipe.negative_prompt, None), (recipe.prompt, recipe)]
        if recipe.guidance_scale == 1.0:
            del told[0]
        shown = recipe.reference is not None and scale != 0
        rows = tuple((self._text(text), self._image(adapter, it) if shown else None, scale) for text, it in told)
        self._scheduler.set_timesteps(recipe.num_inference_steps)
        return Slot(
            recipe=replace(recipe, reference=None),
            number=number,
            rows=rows,
            latents=self.noise(recipe.seed + number, size),
            image_tokens=found.config.num_tokens,
            timesteps=self._scheduler.timesteps.tolist(),
        )

    @torch.inference_mode()
    def step(self, slots: Sequence[Slot]) -> None:
        """Take slots of one shape a DDIM step (eta 0) further, each at its own time. Latents stay in float32."""
        unet = self.backbone.unet
        guided = [i for i, slot in enumerate(slots) if len(slot.rows) == 2]
        order = [*guided, *range(len(slots))]  # unconditional rows first
        latents_N4hw = torch.cat([slot.latents for slot in slots])
        times = [slot.timesteps[0] for slot in slots]
        t_N = torch.tensor(times, device=latents_N4hw.device)
        before_N = [t - self._train_steps // s.recipe.num_inference_steps for t, s in zip(times, slots, strict=True)]
        model_input = latents_N4hw[order].to(self.backbone.dtype)
        eps = unet(model_input, t_N[order], encoder_hidden_states=self._states(slots), return_dict=False)[0].float()
        eps_N4hw = eps[len(guided) :]
        if guided:
            without = eps_N4hw.clone()
            without[guided] = eps[: len(guided)]
            scale = torch.tensor([slot.recipe.guidance_scale for slot in slots], device=eps.device).view(-1, 1, 1, 1)
            eps_N4hw = without + scale * (eps_N4hw - without)
        abar = self._abar[[t + 1 for t in times]].view(-1, 1, 1, 1)
        abar_before = self._abar[[max(t, -1) + 1 for t in before_N]].view(-1, 1, 1, 1)
        latents_N4hw, x0_N4hw = ddim_step(latents_N4hw, eps_N4hw, abar, abar_before)
        for slot, latents, x0 in zip(slots, latents_N4hw.split(1), x0_N4hw.split(1), strict=True):
            slot.latents, slot.x0 = latents, x0
            del slot.timesteps[0]

    def infer(self, recipe: Recipe, on_step: Callable[[list[Slot]], None] | None = None) -> list[Image.Image]:
        """Return the `recipe.n` RGB pictures of a recipe, drawn side by side.

        `on_step` is called after each step; what it raises ends the sampling and comes out of here. Pictures are the
        same for the same recipe on the same machine; other neighbours, dtypes or devices change them by float noise.
        ValueError for a size that the VAE can't make; ArithmeticError when the models give no finite numbers.
        """
        slots = [self.slot(recipe, i) for i in range(recipe.n)]
        while slots[0].timesteps:
            self.step(slots)
            if on_step is not None:
                on_step(slots)
        return [self.picture(slot) for slot in slots]

    @torch.inference_mode()
    def picture(self, slot: Slot) -> Image.Image:
        """Return the RGB picture of a slot that is done, or as its last step predicts it.

        ArithmeticError when its latents or pixels are not finite.
        """
        latents = slot.x0 if slot.timesteps and slot.x0 is not None else slot.latents
        pixels_13HW = self.backbone.decode(latents)
        if not bool(torch.isfinite(pixels_13HW).all()):
            raise ArithmeticError("Sampling gave NaN or infinity: the adapter holds some, or float16 overflows.")
        return Image.fromarray(pixels_to_image(pixels_13HW)[0])

    @property
    def size_multiple(self) -> int:
        """Pixels that sides are multiples of: the VAE's factor; of a compiled UNet, what it halves without a rest."""
        halvings = len(self.backbone.unet.config["block_out_channels"]) - 1 if self._compiled else 0
        return self.backbone.latent_factor * 2**halvings

    def size(self, recipe: Recipe) -> tuple[int, int]:
        """Return width and height in pixels of a recipe's pictures. ValueError unless the VAE can make them."""
        native, factor = self.backbone.native_size, self.backbone.latent_factor
        width, height = recipe.size or (native, native)
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"Sides must be multiples of {factor}, got {width}x{height}.")
        return width, height

    def noise(self, seed: int, size: tuple[int, int]) -> Tensor:
        """Return start latents (1,4,h,w), drawn on the CPU from their own seed: no picture depends on another."""
        factor = self.backbone.latent_factor
        shape = (1, self.backbone.vae.config["latent_channels"], size[1] // factor, size[0] // factor)
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(self.backbone.device)

    def cut_tokens(self, text: str) -> int:
        """Return how many tokens of `text` the text encoder does not see, 0 for most."""
        return max(0, self.backbone.token_count(text) - self.backbone.max_tokens)

    def _text(self, text: str) -> Layers:
        """Return what a text is to each layer."""
        return self._kept.get(text, lambda: text_layers(self.backbone.unet, self.backbone.encode_text([text])))

    def _image(self, name: str, recipe: Recipe | None) -> Layers:
        """Return what a recipe's reference, or none, is to each layer by the adapter of that name."""
        picture, sha256 = (recipe.reference, recipe.reference_sha256) if recipe else (None, None)

        def make() -> Layers:
            adapter = self.adapters[name]
            self.backbone.features = adapter.config.features
            hidden = self.backbone.encode_image_null(1) if picture is None else self.backbone.encode_image([picture])
            return image_layers(self.backbone.unet, adapter, adapter.image_tokens(hidden))

        return self._kept.get((name, picture and (picture.size, sha256)), make)

    def _states(self, slots: Sequence[Slot]) -> States:
        """Return what the rows of a batch attend to; made anew when a slot has joined or left."""
        if self._batch is None or self._batch[0] != list(slots):
            rows = [slot.rows[0] for slot in slots if len(slot.rows) == 2]
            rows += [slot.rows[-1] for slot in slots]
            self._batch = list(slots), side_by_side(rows, slots[0].image_tokens, one_form=self._compiled)
        return self._batch[1]


def ddim_step(x: Tensor, eps: Tensor, abar: Tensor, abar_previous: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x', x0): the latents one DDIM step earlier in time and the clean latents that `eps` implies.

    x0 = (x - sqrt(1 - abar) eps) / sqrt(abar),  x' = sqrt(abar') x0 + sqrt(1 - abar') eps

    Denoising Diffusion Implicit Models (Song et al. 2021), equation 12 with eta = 0; `abar` are the cumulative products
    of 1 - beta at the two time steps.
    """
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    return abar_previous**0.5 * x0 + (1 - abar_previous) ** 0.5 * eps, x0
