"""Settings of the server: where its models are, how it scales, and what a request may ask for."""

from __future__ import annotations

import json
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from factory import settings

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; beyond it the answer is 400 naming the field, or 413 for the body as a whole."""

    __pydantic_config__ = settings.STRICT

    # pictures of one request
    max_n: int = 4
    # DDIM steps; 1000 is out of reach, since the schedule's leading spacing starts at step 1
    max_num_inference_steps: int = 200
    max_guidance_scale: float = 30.0
    max_adapter_scale: float = 2.0
    # sides of a picture in pixels, each a multiple of the VAE's factor (8 for SD v1.5)
    min_side: int = 64
    max_side: int = 1024
    # width x height of one picture: 1 Mpx needs about four times the time of 512 x 512
    max_pixels: int = 1024 * 1024
    # the same, in pictures of the base's native size: a step of 256 times those pixels takes minutes on a CPU, and far
    # from its size a model draws badly
    max_times_native: float = 16.0
    # characters, long before 77 tokens are reached; what the tokenizer cuts is told in `warnings`
    max_prompt_chars: int = 4000
    # bytes of the reference's file, after base64
    max_image_bytes: int = 8 * 2**20
    # pixels of the reference, read from its header before anything is decoded: 4K x 4K
    max_image_pixels: int = 4096 * 4096
    # bytes of a request, enforced by Content-Length and while a chunked body is read
    max_body_bytes: int = 16 * 2**20
    # requests that one key may have under way at a time, and send in a minute, at each ingress replica; a request of
    # many pictures counts like one of one
    max_concurrent_per_key: int = 16
    max_per_minute_per_key: int = 600
    # seconds that a client has to send its body
    body_timeout_s: float = 60.0
    # seconds that a client has to take one event of a streamed answer, before its place is given to another; Serve's
    # proxy takes all of them for it: behind it, http_options.request_timeout_s ends such a connection
    send_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} must be above 0, got {value}.")
        if self.max_num_inference_steps > 999:
            raise ValueError(f"limits.max_num_inference_steps must be at most 999, got {self.max_num_inference_steps}.")
        if self.min_side > self.max_side:
            raise ValueError(f"limits.min_side {self.min_side} is above limits.max_side {self.max_side}.")


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """One server. `adapter` is required; every other field has a value that suits a single machine."""

    __pydantic_config__ = settings.STRICT

    # adapter or run folder, absolute, or a published .safetensors file
    adapter: str = ""
    # a folder of more adapters of the same base, absolute, that all nodes see: each adapter or run folder in it, and
    # each .safetensors file, is served under its name (`model`), from the next request on; the least recently asked for
    # are unloaded
    adapter_folder: str | None = None
    # the frozen Stable Diffusion, an absolute folder or a hub id; None = the one that the adapter's config names
    base: str | None = None
    # folder or hub id of the CLIP image encoder; None = the one in the base's folder
    image_encoder: str | None = None
    # the name under which clients ask for it (`model`) and which /v1/models lists
    model: str = "animesketch"
    # float32, float16 or bfloat16; None = bfloat16 on a GPU, which halves memory and time, and float32 on a CPU
    dtype: str | None = None
    # "cpu", "cuda"; None = a GPU when num_gpus is set
    device: str | None = None
    # torch.compile the UNet, tuned: faster steps after a start of many minutes; needs a C++ compiler on a CPU
    compile: bool = False
    # keep the weights of convolutions, and what goes through them, with channels last: faster on tensor cores
    channels_last: bool = False
    # replicas that are always there, and how far the autoscaler goes under load
    min_replicas: int = 1
    max_replicas: int = 1
    # requests for each replica, under way or waiting, beyond which the autoscaler starts another one
    target_ongoing_requests: float = 4.0
    # replicas that a rolling update starts before it stops old ones, in percent of those there are: 100 updates a
    # single replica without a gap, and waits where there is no room (a free GPU) for the new one beside it
    max_surge_percent: int = 0
    # ingresses, which share the places and the queue; two on several nodes outlive one of them
    ingress_replicas: int = 1
    # requests that one replica has accepted: as many pictures as fit are denoised together, the others wait for a place
    max_ongoing_requests: int = 16
    # requests that wait for a replica; the next one gets 429 with Retry-After
    max_queued_requests: int = 16
    # seconds that a client is told to wait after 429, until the first request tells how fast the replicas are
    retry_after_s: int = 5
    # seconds until a request is given up with 503, waiting included
    request_timeout_s: float = 600.0
    # logical CPUs of a replica and of the ingress; fractions, so that a demo on two cores has room for both
    num_cpus: float = 1.0
    ingress_num_cpus: float = 0.25
    # GPUs of a replica; 0 = CPU
    num_gpus: float = 0.0
    # torch threads of a replica; None = what Ray gives, which is num_cpus. More threads than cores slows all down
    num_threads: int | None = None
    # pictures of the native size that are denoised at once, at most; fewer where more bring nothing, as measured at the
    # start, and more smaller ones
    max_batch_size: int = 16
    # file with one sha256 of a key per line (`serving/keys.py`); None = no key, and loopback only
    key_file: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        for name in (
            "min_replicas",
            "ingress_replicas",
            "target_ongoing_requests",
            "max_ongoing_requests",
            "max_queued_requests",
            "max_batch_size",
            "request_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {self.num_threads}.")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}.")
        if not 0 <= self.max_surge_percent <= 100:
            raise ValueError(f"max_surge_percent must be from 0 to 100, got {self.max_surge_percent}.")
        if min(self.num_cpus, self.ingress_num_cpus, self.num_gpus, self.retry_after_s) < 0:
            raise ValueError("num_cpus, ingress_num_cpus, num_gpus and retry_after_s must not be negative.")
        if not re.fullmatch(r"[A-Za-z0-9._:/-]{1,128}", self.model):
            raise ValueError(f"model must be 1 to 128 letters, digits and . _ : / -, got {self.model!r}.")
        for name in ("adapter", "adapter_folder", "key_file"):
            value = getattr(self, name)
            if value and "://" not in value and not os.path.isabs(value):
                raise ValueError(_relative(name, value))
        for name in ("base", "image_encoder"):
            value = getattr(self, name)
            if value and "://" not in value and not os.path.isabs(value) and not _hub_id(value):
                raise ValueError(_relative(name, value))

    @property
    def device_and_dtype(self) -> tuple[str, str]:
        """Where the models of a replica are, and what they compute in."""
        device = self.device or ("cuda" if self.num_gpus else "cpu")
        return device, self.dtype or ("float32" if device == "cpu" else "bfloat16")

    @property
    def max_requests(self) -> int:
        """Generation requests that an ingress holds at a time: its share of those in replicas and those that wait."""
        places = self.max_replicas * self.max_ongoing_requests + self.max_queued_requests
        return math.ceil(places / self.ingress_replicas)


def from_args(args: Mapping[str, Any]) -> ServingConfig:
    """Return the settings that `args` name: strings from `serve run … key=value`, or values from a Serve config file.

    Nested keys are written `limits.max_n=2`, or as a mapping. ValueError for an unknown key (with the nearest known
    one), a wrong type or value, a relative path, or when `adapter` is missing.
    """
    hints = typing.get_type_hints(ServingConfig)
    texts = {name for name, hint in hints.items() if str in (hint, *typing.get_args(hint))}
    overrides = []
    for key, value in args.items():
        plain = isinstance(value, str) and key not in texts  # text of a number or a bool: read as YAML
        overrides.append(f"{key}={value if plain else json.dumps(value)}")
    config = settings.load(ServingConfig(), overrides=overrides)
    if not config.adapter:
        raise ValueError("adapter is missing. Start with: serve run serving.app:build adapter=/absolute/run/folder")
    return config


def _hub_id(value: str) -> bool:
    """Say whether `value` reads as `owner/name[/sub/folder]` of a model hub, and is no folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", value)) and not os.path.exists(value)


def _relative(name: str, value: str) -> str:
    return (
        f"{name} {value!r} is relative, but replicas run in folders of their own. Give the absolute path: "
        f'{name}="$PWD/{value.removeprefix("./")}"'
    )
