"""The settings of a training run and its presets. Light: imports no model library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from factory.settings import STRICT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a training sample is made of."""

    __pydantic_config__ = STRICT

    root: str = ""  # dataset root, a folder or URI; --root
    version: int | str | None = (
        None  # version or tag of samples.lance; None: the newest when the run starts, then pinned
    )
    resolution: int = 512  # side of the square target, in pixels
    target: Literal["training_sketch", "image"] = (
        "training_sketch"  # column of the picture that is learned: lines, colour
    )
    reference: Literal["training_sketch", "image"] = "training_sketch"  # column of what the image encoder sees
    keywords: bool = True  # texts end with the sample's keywords; those of line art are wrong beside a colour target
    accepted_only: bool = False  # only samples that a reviewer has accepted
    image_drop_rate: float = 0.05  # share of samples without image, for classifier-free guidance
    text_drop_rate: float = 0.05  # share without text
    both_drop_rate: float = 0.05  # share with neither
    random_flip: bool = False  # half of the samples are mirrored, target and reference alike; captions stay as they are
    validation_samples: int = 16  # pictures of the held-out split that are scored, spread over it; 0: no validation
    cache: Literal["auto", "required", "never"] = (
        "auto"  # train on what `python -m trainer cache` made: where it is there
    )
    cache_root: str | None = None  # folder that all nodes see, for caches; None: the dataset's root
    cache_dtype: Literal["float16", "float32"] = "float16"  # of a cache's numbers; float16 rounds to 11 bits: 0.05 %

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in ("image_drop_rate", "text_drop_rate", "both_drop_rate")}
        if min(rates.values()) < 0 or sum(rates.values()) > 1:
            raise ValueError(f"drop rates are shares that sum to at most 1, got {rates}.")
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 pixels, got {self.resolution}.")
        if self.validation_samples < 0:
            raise ValueError(f"validation_samples must be 0 or more, got {self.validation_samples}.")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Who trains: Ray Train workers, each a DeepSpeed rank."""

    __pydantic_config__ = STRICT

    num_workers: int = 1  # --num-workers; a run may be resumed with others, to the same losses but for rounding
    use_gpu: bool = False  # one GPU per worker
    cpus_per_worker: float = 0.5  # logical CPUs that Ray reserves per worker, not a number of threads
    num_threads: int = 1  # torch threads per worker; more in all than cores slows everything down
    zero_stage: Literal[0, 1, 2, 3] = 1  # what DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 weights too
    max_failures: int = 0  # lost workers that Ray replaces before the command ends; each resumes from a checkpoint

    def __post_init__(self) -> None:
        if min(self.num_workers, self.num_threads) < 1:
            raise ValueError(
                f"num_workers and num_threads must be at least 1, got {self.num_workers}, {self.num_threads}."
            )
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker must be above 0, got {self.cpus_per_worker}.")


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """Pictures that are drawn during training, always the same ones: a sheet in pictures/ of the run folder."""

    __pydantic_config__ = STRICT

    steps: int = 0  # steps between sheets; there is one at the end too; 0: none at all
    count: int = 4  # pictures of a sheet, of held-out samples
    prompts: tuple[str, ...] = ()  # texts to draw in place of the samples' own, one for each picture
    references: tuple[str, ...] = ()  # picture files to draw from in place of the samples', one for each picture
    num_inference_steps: int = 30  # of DDIM
    guidance_scale: float = 7.5
    adapter_scale: float = 0.5  # the paper's alpha
    seed: int = 0  # picture i draws its noise from seed + i, as the server does

    def __post_init__(self) -> None:
        if self.steps < 0 or not 1 <= self.num_inference_steps <= 999:
            raise ValueError(
                f"steps must be 0 or more, num_inference_steps from 1 to 999, got {self.steps}, "
                f"{self.num_inference_steps}."
            )
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}; steps=0 draws no pictures.")
        for name in ("prompts", "references"):
            given = getattr(self, name)
            if given and len(given) != self.count:
                raise ValueError(f"{name} must be {self.count}, one for each picture (count), got {len(given)}.")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """One training run. The command line lays a YAML file and `--set key=value` over a preset of this."""

    __pydantic_config__ = STRICT

    output: str = ""  # run folder; --output
    pretrained_model_name_or_path: str = ""  # the frozen base: a diffusers folder or hub id; --base
    image_encoder: str | None = None  # folder, or owner/name/sub/folder on the hub; None: the base's own
    adapter: str | None = None  # start from this adapter's weights; None: a new one
    variant: Literal["plus", "base"] = "plus"  # of a new adapter: IP-Adapter-Plus, or IP-Adapter with 4 tokens
    resampler_dim: int | None = None  # width of a new Resampler; None: the base's text width, rounded up to 64
    data: DataConfig = field(default_factory=DataConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    alignment_steps: int = 0  # before the first step, a new adapter learns from the texts' states (trainer/align.py)
    learning_rate: float = 1e-4  # the highest one
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine"] = "constant"  # cosine: to 0 at max_train_steps
    lr_warmup_steps: int = 0  # in which the learning rate rises from 0, for the latter two
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 0.0  # a longer gradient is shortened to it; 0: none; --max-grad-norm
    snr_gamma: float = 0.0  # min-SNR weighting of the time steps (Hang et al. 2023, where it is 5); 0: none
    noise_offset: float = 0.0  # of noise that is the same all over a channel, added to the noise; 0: none
    ema_decay: float = 0.0  # of the average of the weights that is then scored and published in their place; 0: none
    max_train_steps: int = 1000  # optimizer steps; raise it and run again to go on
    train_batch_size: int = 8  # samples per optimizer step, over all workers and accumulation steps
    gradient_accumulation_steps: int = 1  # parts that a worker splits its share of the batch into
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16: the frozen models in bf16, the adapter in fp32 under autocast
    seed: int = 0  # of the new adapter, the order, the drops, the time steps and the noise
    checkpointing_steps: int = 500  # steps between checkpoints; there is one at the end too
    checkpoints_total_limit: int = 2  # checkpoints that are kept
    validation_steps: int = 500  # steps between validations; there is one at the start and one at the end too
    logging_steps: int = 10  # steps between printed lines; metrics.jsonl has every step
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"  # gets a copy of metrics.jsonl; --report-to

    def __post_init__(self) -> None:
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "validation_steps",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.alignment_steps < 0:
            raise ValueError(f"alignment_steps must be 0 or more, got {self.alignment_steps}.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm", "snr_gamma", "noise_offset", "ema_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be below 1, got {self.ema_decay}.")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("lr_warmup_steps needs lr_scheduler=constant_with_warmup or cosine.")

    def samples_per_pass(self) -> int:
        """Return the samples of one pass of a worker; ValueError when the batch does not divide into such passes.

        Asked by what trains or plans: a cache of the same settings has no batch.
        """
        parts = self.workers.num_workers * self.gradient_accumulation_steps
        if self.train_batch_size % parts:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be a multiple of num_workers "
                f"{self.workers.num_workers} x gradient_accumulation_steps {self.gradient_accumulation_steps}."
            )
        return self.train_batch_size // parts


def micro() -> TrainerConfig:
    """Return the embedded default: small pictures and numbers, for CPU cores."""
    return TrainerConfig(
        pretrained_model_name_or_path="animesketch/micro",  # shipped, trainer/weights/micro
        # in so few steps a reference learns little beside texts; mirrored, a few hundred drawings teach more
        data=DataConfig(resolution=64, text_drop_rate=0.85, random_flip=True),
        alignment_steps=1000,
        learning_rate=2e-4,  # what the alignment has learned is soon forgotten at more
        max_train_steps=60,
        train_batch_size=16,
        checkpointing_steps=30,
        validation_steps=30,
    )


def paper() -> TrainerConfig:
    """Return the paper's run: SD v1.5, ViT-H/14, AdamW 1e-4, 100,000 steps.

    Batch, resolution and drop rates are not in the paper: they are IP-Adapter's (tutorial_train_plus.py).
    """
    return TrainerConfig(
        pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",  # where runwayml's weights are now
        image_encoder="h94/IP-Adapter/models/image_encoder",
        workers=WorkersConfig(use_gpu=True, cpus_per_worker=2, num_threads=2, zero_stage=2, max_failures=3),
        max_train_steps=100_000,
        gradient_checkpointing=True,  # fits the paper's 24 GB
        mixed_precision="bf16",
        checkpointing_steps=2_000,
        validation_steps=2_000,
        pictures=PicturesConfig(steps=10_000),
    )


PRESETS = {"micro": micro, "paper": paper}
