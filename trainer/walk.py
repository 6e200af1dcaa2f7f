"""A training pass walked on tensors without data: the memory that it would hold at its peak, and its work in FLOPs.

torch's FakeTensorMode runs the same pass as the worker's (the same models and functions, in the same order; a test
compares their FLOPs), backward and recomputation included, on shapes alone. Whatever a tensor would take is counted
when it is made, and no more when the last reference to it is gone.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.adapter import Adapter, adapter_sizes, cross_attention
from trainer.backbone import Backbone, ddim, set_checkpointing
from trainer.config import TrainerConfig
from trainer.loss import add_noise, noise_loss
from trainer.projection import HIDDEN, Sizes
from trainer.sd15 import BaseSizes, backbone_of, count

PARTS = ("VAE", "text encoder", "image encoder", "UNet and adapter")


@dataclass(frozen=True, kw_only=True)
class Walked:
    """What one forward and backward pass of `batch` samples takes on one device."""

    batch: int
    gradient_checkpointing: bool
    parameters: dict[str, int]  # by model; "adapter" too
    frozen: dict[str, int]  # by frozen model: bytes of its weights and buffers
    peaks: dict[str, int]  # of PARTS: bytes that are held at most beside weights: activations, gradients, temporaries
    flops: dict[str, int]  # of PARTS; a multiplication and an addition are two

    @property
    def frozen_bytes(self) -> int:
        """The bytes of all frozen models."""
        return sum(self.frozen.values())

    @property
    def peak_bytes(self) -> int:
        """The peak of the whole pass."""
        return max(self.peaks.values())

    def largest(self, room: int) -> int:
        """Return the most samples whose pass stays within `room` bytes; 0 for none."""
        gradients = 4 * self.parameters["adapter"]  # of the last part's peak; the rest grows with the samples
        most = []
        for part, peak in self.peaks.items():
            fixed = gradients if part == PARTS[-1] else 0
            most.append((room - fixed) * self.batch // (peak - fixed))
        return max(0, min(most))


def training_pass(
    base: Backbone,
    adapter: Adapter,
    scheduler: Any,
    inputs: dict[str, Tensor],
    autocast: contextlib.AbstractContextManager,
) -> Iterator[str]:
    """Take the same forward and backward pass as `Worker.step`, all samples whole, on prepared inputs; yield each of
    PARTS as it is done.

    `inputs`: pixels (B,3,H,W), ids (B,77), reference (B,3,h,w), noise and posterior (B,4,H/8,W/8), timesteps (B,).
    """
    latents = base.image_to_latents(inputs["pixels"], inputs["posterior"])
    yield PARTS[0]
    with torch.no_grad():
        text = base.text_encoder(inputs["ids"])[0]
    yield PARTS[1]
    hidden = base.encode_pixels(inputs["reference"])
    yield PARTS[2]
    noisy = add_noise(scheduler, latents, inputs["noise"], inputs["timesteps"]).to(base.dtype)
    with autocast:
        loss = noise_loss(adapter(base.unet, noisy, inputs["timesteps"], text, hidden), inputs["noise"])
    loss.backward()
    yield PARTS[3]


def make_inputs(base: Backbone, resolution: int, batch: int) -> dict[str, Tensor]:
    """Return random inputs of `training_pass` on torch's default device."""
    latent = (batch, base.vae.config.latent_channels, *(resolution // base.latent_factor,) * 2)
    side = base.image_encoder.config.image_size
    return {
        "pixels": torch.randn(batch, 3, resolution, resolution),
        "ids": torch.zeros(batch, base.text_encoder.config.max_position_embeddings, dtype=torch.long),
        "reference": torch.randn(batch, 3, side, side),
        "noise": torch.randn(latent),
        "posterior": torch.randn(latent),
        "timesteps": torch.full((batch,), 500),
    }


def new_adapter(base: Backbone, sizes: Sizes) -> Adapter:
    """Return a new adapter attached to the UNet, with random weights in torch's default dtype."""
    adapter = Adapter(sizes, {key: attn.to_k.out_features for key, attn in cross_attention(base.unet).items()})
    adapter.attach(base.unet)
    return adapter


class Walker:
    """Models of one size without data, to walk steps with."""

    def __init__(self, sizes: BaseSizes, config: TrainerConfig) -> None:
        """Make the frozen models in the precision that `config` trains in, and in fp32 the adapter that it trains: of
        the sizes of `config.adapter`'s file, else a new one. Errors as of `adapter_sizes` and `Adapter.attach`."""
        self.config, self.scheduler = config, ddim()
        self.bf16 = config.mixed_precision == "bf16"
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            with _default_dtype(torch.bfloat16 if self.bf16 else torch.float32):
                self.base = backbone_of(sizes.models(), HIDDEN)
            models = {"UNet": self.base.unet, "VAE": self.base.vae, "text encoder": self.base.text_encoder}
            models["image encoder"] = self.base.image_encoder
            self.frozen = {name: sum(tensor.nbytes for tensor in tensors_of(model)) for name, model in models.items()}
            self.parameters = {name: count(model) for name, model in models.items()}
        trained = adapter_sizes(self.base, config)  # a file is read as it is, not in shapes
        self.base.features = trained.features
        with self.fake:
            self.adapter = new_adapter(self.base, trained)
        for module in self.base.unet.modules():  # the adapter's layers are among them
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.register_forward_pre_hook(_in_float)
        self.parameters["adapter"] = count(self.adapter)

    def walk(self, batch: int, gradient_checkpointing: bool) -> Walked:
        """Return what a pass of `batch` samples takes."""
        set_checkpointing(self.base, gradient_checkpointing)
        modules = (self.adapter, self.base.unet, self.base.vae, self.base.text_encoder, self.base.image_encoder)
        meter = Meter(tensor for module in modules for tensor in tensors_of(module))
        done, peaks = {}, {}
        with self.fake, meter:
            inputs = make_inputs(self.base, self.config.data.resolution, batch)
            autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)
            for part in training_pass(self.base, self.adapter, self.scheduler, inputs, autocast):
                done[part] = meter.flops - sum(done.values())
                gc.collect()  # some outputs are in cycles: when those go would be chance
                peaks[part], meter.peak = meter.peak, meter.now
        self.adapter.zero_grad()
        return Walked(
            batch=batch,
            gradient_checkpointing=gradient_checkpointing,
            parameters=self.parameters,
            frozen=self.frozen,
            peaks=peaks,
            flops=done,
        )


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that ops make while it is entered: `now`, and `peak`; and the ops' `flops`.
    Storages of `known` tensors are left out.

    torch's FlopCounterMode has the same formulas, but its hooks keep what gradient checkpointing recomputes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor, counts=True)
        return made

    def _see(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, name, size).atexit = False

    def _forget(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def _in_float(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast, have norms give fp32 as they do on GPUs: on CPUs, where the walk is, they stay in bf16."""
    return tuple(value.float() for value in args) if torch.is_autocast_enabled("cpu") else args


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Any] = {  # torch's own know the GPU's attention only
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
