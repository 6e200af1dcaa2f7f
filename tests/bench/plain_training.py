"""The peers of the training benchmark: plain DDP in place of DeepSpeed, and a plain loop.

The loop follows tutorial_train_plus.py of tencent-ailab/IP-Adapter, without accelerate around it: pictures are opened
with PIL by a DataLoader, all encoders run in every step, AdamW trains the adapter under DDP. The adapter is ours: the
same model on both sides.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from trainer.adapter import Adapter, AdapterConfig
from trainer.backbone import load_backbone
from trainer.config import TrainerConfig


class PlainDdp:
    """What `Worker` asks of a DeepSpeed engine, by torch alone."""

    def __init__(self, adapter: Adapter, config: TrainerConfig) -> None:
        self.module = adapter
        self._ddp = DistributedDataParallel(adapter)
        self.optimizer = torch.optim.AdamW(
            adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def __call__(self, *inputs: Any) -> Tensor:
        return self._ddp(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class PlainLoop:
    """The loop: `step` takes one optimizer step, as that of `Worker` does."""

    def __init__(self, config: TrainerConfig, files: Path, num_workers: int) -> None:
        self._base = load_backbone(config.pretrained_model_name_or_path)
        width = self._base.unet.config.cross_attention_dim
        hidden = self._base.image_encoder.config.hidden_size
        torch.manual_seed(config.seed)
        sizes = AdapterConfig(cross_attention_dim=width, embedding_dim=hidden, dim=-(-width // 64) * 64)
        self._adapter = Adapter.for_unet(self._base.unet, sizes)
        self._adapter.attach(self._base.unet)
        self._engine = PlainDdp(self._adapter, config)
        pictures = _Pictures(files, self._base.tokenizer, self._base.image_processor, config)
        self._loader = DataLoader(
            pictures,
            batch_size=config.train_batch_size // dist.get_world_size(),
            sampler=DistributedSampler(pictures),
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
            persistent_workers=num_workers > 0,
            drop_last=True,
        )
        self._batches = self._endless()
        self._scheduler = self._base.scheduler()

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._loader

    def step(self, _: int) -> dict[str, float]:
        """Take one step on this rank's part of a batch; return the mean loss over all ranks, and data_wait: the seconds
        that the slowest rank waited for its DataLoader."""
        begun = time.perf_counter()
        batch = next(self._batches)
        waited = torch.tensor(time.perf_counter() - begun)
        base = self._base
        with torch.no_grad():
            latents = base.vae.encode(batch["image"]).latent_dist.sample() * base.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),))
            noisy = self._scheduler.add_noise(latents, noise, timesteps)
            pixels = torch.where(batch["drop_image"].view(-1, 1, 1, 1), 0.0, batch["clip_image"])
            hidden = base.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
            text = base.text_encoder(batch["ids"])[0]
        loss = F.mse_loss(self._engine(base.unet, noisy, timesteps, text, hidden).float(), noise.float())
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        self._engine.backward(loss)
        self._engine.step()
        dist.all_reduce(waited, dist.ReduceOp.MAX)
        return {"loss": mean.item() / dist.get_world_size(), "data_wait": waited.item()}


class _Pictures(Dataset):
    """Items of the script's JSON list: the picture for the VAE, the picture for CLIP, tokens, and whether it is
    dropped."""

    def __init__(self, folder: Path, tokenizer: Any, processor: Any, config: TrainerConfig) -> None:
        self._folder, self._items = folder, json.loads((folder / "data.json").read_text())
        self._tokenizer, self._processor, self._data = tokenizer, processor, config.data

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, data = self._items[index], self._data
        picture = Image.open(self._folder / item["image_file"]).convert("RGB")
        u = random.random()
        image, text = data.image_drop_rate, data.image_drop_rate + data.text_drop_rate
        words = "" if image <= u < text + data.both_drop_rate else item["text"]
        ids = self._tokenizer(
            words,
            max_length=self._tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return {
            "image": _cropped(picture, data.resolution),
            "clip_image": self._processor(images=picture, return_tensors="pt").pixel_values[0],
            "ids": ids,
            "drop_image": u < image or text <= u < text + data.both_drop_rate,
        }


def _cropped(picture: Image.Image, side: int) -> Tensor:
    """Return pixels (3,side,side) in [-1,1]: shortest side resized (bilinear), the centre cut out, as torchvision's
    Resize, CenterCrop, ToTensor and Normalize do."""
    scale = side / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    square = small.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
