"""One training worker: a DeepSpeed rank that holds the frozen base, the adapter and its share of every batch.

Imported in Ray Train workers only, after Ray has set DS_ACCELERATOR: DeepSpeed picks its device at import.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from factory.files import new_folder, write_atomic
from trainer.adapter import WEIGHTS, Adapter, adapter_sizes, cross_attention
from trainer.align import TIMESTEPS, align, record_queries
from trainer.backbone import load_backbone, set_checkpointing
from trainer.cache import Cache
from trainer.config import TrainerConfig
from trainer.data import Draw, Samples, batch_indices, draw, generator_of, share, spread
from trainer.encoders import Encoders, Source, with_drops
from trainer.engine import load_optimizer_state, make_engine, optimizer_state, set_learning_rate, whole_parameters
from trainer.loss import add_noise, min_snr_weights, noise_loss
from trainer.optimizers import ema_decay_at, learning_rate_at
from trainer.pictures import asked, draw_picture, write_sheet
from trainer.run import Run

# of a checkpoint: AdamW's moments; the weights too where the adapter folder has their average, or has them rounded
STATE = "state/optimizer.safetensors"
T = TypeVar("T")
RECORDED = 16  # samples of a pass whose queries the alignment takes
QUANTILES = (125, 375, 625, 875)  # time steps at which every validation picture is scored


class Diverged(ArithmeticError):
    """Training has come to NaN or infinity: it would not come back."""


class Worker:
    """What `train_loop_per_worker` calls; every method runs on all ranks together."""

    def __init__(
        self, config: TrainerConfig, device: torch.device, facts: dict[str, Any], cache: str | None = None
    ) -> None:
        """Load the base, build the adapter and its DeepSpeed engine; `facts` go into every adapter's config.json.

        With the URI of a `cache` the encoders' part of training is read from there.
        """
        torch.set_num_threads(config.workers.num_threads)
        self.config, self.device, self.facts = config, device, facts
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run = Run(config.output)
        self.samples = Samples(config.data, "train")
        bf16 = config.mixed_precision == "bf16"
        self.base = load_backbone(
            config.pretrained_model_name_or_path,
            image_encoder=config.image_encoder,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            device=device,
        )
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        self.scheduler = self.base.scheduler()
        side = config.data.resolution // self.base.latent_factor
        self.latent = (self.base.vae.config.latent_channels, side, side)
        set_checkpointing(self.base, config.gradient_checkpointing)
        adapter = self._new_adapter()
        self.base.features = adapter.config.features
        self.facts["base"]["random_weights"] = self.base.random_weights
        self.facts["preprocessing"] |= self.base.preprocessing
        self.null_1NE, self.null_1TC = self.base.encode_image_null(1), self.base.encode_text([""])
        self.source: Source = Encoders(self.base, self.samples)
        if cache:
            self.source = Cache(cache, self.samples.frame_ids, device=device, dtype=self.base.dtype)
        self._ahead = ThreadPoolExecutor(1)  # reads the next batch while this one trains
        self._next: tuple[int, Future[tuple[list[Draw], list[Any]]]] | None = None
        self._waited = 0.0  # seconds that a step has waited for its samples
        self._newest = self._of_rank_0(self.run.newest)  # step of the checkpoint that this run goes on from
        state = self._load(adapter) if self._newest else {}
        adapter.attach(self.base.unet)
        if self.rank == 0:
            self.run.rewind(self._newest or -1)  # a run that has no checkpoint yet begins anew, its step 0 too
        if config.alignment_steps and not config.adapter and not self._newest:
            self._align(adapter)
        # what is scored and published, where that is not the adapter in training itself: whole on every rank
        self._copy: Adapter | None = None
        if config.ema_decay or config.workers.zero_stage == 3:
            self._copy = copy.deepcopy(adapter).requires_grad_(False)
        for prefix, module in (("weight.", adapter), ("average.", self._copy)):
            if found := {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}:
                assert module is not None
                module.load_state_dict(found)
        self.engine = make_engine(adapter, config)
        if state:
            load_optimizer_state(self.engine, state, self._newest)
        self._validation: list[tuple[Tensor, ...]] | None = None
        self._asked: list[tuple[str, Image.Image]] | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter in training."""
        return self.engine.module

    @property
    def first(self) -> int:
        """The step of the newest good checkpoint, from which this run goes on; 0 for a new one."""
        return self._newest

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        config = self.config
        return learning_rate_at(
            step,
            learning_rate=config.learning_rate,
            scheduler=config.lr_scheduler,
            warmup=config.lr_warmup_steps,
            total=config.max_train_steps,
        )

    def step(self, step: int) -> dict[str, float]:
        """Take optimizer step `step` (from 0) on its global batch and return what is to be logged of it.

        loss, the mean over the batch; data_wait, seconds that the slowest rank waited for its samples; peak_memory_mib,
        of the rank with most so far: on a GPU, that of torch; else that of the process.
        """
        size, accumulate = self.config.train_batch_size, self.config.gradient_accumulation_steps
        places = share(size, self.rank, self.world_size)
        draws, samples = self._read(step, places)
        part = len(places) // accumulate
        total = torch.zeros((), device=self.device)
        set_learning_rate(self.engine, rate := self.learning_rate(step))
        for start in range(0, len(places), part):
            batch = self._encode(samples[start : start + part], draws[start : start + part])
            loss = self._loss(self.engine, batch, self.config.snr_gamma)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / accumulate
        if self.config.ema_decay:
            self._average(1 - ema_decay_at(step, self.config.ema_decay))
        mine = torch.tensor([total.item(), self._waited, _peak_memory(self.device)], dtype=torch.float64)
        ranks = [torch.zeros_like(mine, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(ranks, mine.to(self.device))
        losses, waits, peaks = torch.stack(ranks, dim=1).tolist()
        if not all(map(math.isfinite, losses)):
            raise Diverged(f"The loss of step {step + 1} is not finite. {self._go_on()}")
        return {
            "loss": sum(losses) / self.world_size,
            "learning_rate": rate,
            "data_wait": round(max(waits), 4),
            "peak_memory_mib": round(max(peaks)),
        }

    @torch.no_grad()
    def validate(self, scale: float = 1.0) -> float:
        """Return the loss on the held-out split, with fixed noise at fixed time steps: comparable between runs.

        With `scale` 0 that of the base alone, from the texts.
        """
        if self._validation is None:
            self._validation = self._held_out()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self._published() as adapter, self.autocast:
            for batch in self._validation:
                loss = self._loss(functools.partial(adapter, scale=scale), batch)
                total += torch.tensor([loss.item() * len(batch[0]), len(batch[0])], device=self.device)
        dist.all_reduce(total)
        dist.broadcast(total, 0)  # all ranks decide by it what is best: it must be one number to the last bit
        return (total[0] / total[1]).item()

    def best_loss(self) -> float | None:
        """Return the lowest validation loss of the run so far, as rank 0 reads it, on every rank."""
        return self._of_rank_0(self.run.best_loss)

    def draw_pictures(self, step: int) -> None:
        """Write the sheet pictures/step-N.png on rank 0, from the adapter as it is."""
        config = self.config.pictures
        with self._published() as adapter, self.autocast:
            if self.rank == 0:
                self._asked = self._asked or asked(self.config)
                side, rows = self.config.data.resolution, []
                for i, (prompt, reference) in enumerate(self._asked):
                    seed = config.seed + i
                    made = draw_picture(self.base, adapter, prompt, reference, config, side=side, seed=seed)
                    rows.append((reference, made))
                write_sheet(rows, self.run.folder / "pictures" / f"step-{step}.png")
        dist.barrier()

    def save(self, step: int) -> None:
        """Write checkpoints/step-N aside on rank 0, the adapter and its state; then seal, rename, prune."""
        state = optimizer_state(self.engine)
        # what the adapter folder does not have to the last bit
        rounded = any(dtype != torch.float32 for dtype in self.adapter.stored.values())
        if self.config.ema_decay or rounded:
            with whole_parameters(self.engine):
                state |= _copies("weight.", self.adapter)
        if self.config.ema_decay and rounded:
            assert self._copy is not None
            state |= _copies("average.", self._copy)
        with self._published() as adapter:
            if not all(bool(value.isfinite().all()) for value in adapter.parameters()):
                raise Diverged(f"After step {step} the adapter's weights are not finite. {self._go_on()}")
            if self.rank == 0:
                with new_folder(self.run.checkpoint(step)) as aside:
                    adapter.save_pretrained(aside / "adapter", **self.facts, step=step)
                    write_atomic(aside / STATE, save(state))
                    shutil.copyfile(self.run.folder / "run.json", aside / "run.json")
                self.run.publish_adapter(step)
                self.run.prune(self.config.checkpoints_total_limit, step)
        dist.barrier()

    def save_best(self, step: int, validation_loss: float) -> None:
        """Write best/ from the adapter as it is."""
        with self._published() as adapter:
            if self.rank == 0:
                folder = self.run.folder / "best"
                adapter.save_pretrained(folder, **self.facts, step=step, validation_loss=validation_loss)
        dist.barrier()

    @contextlib.contextmanager
    def _published(self) -> Iterator[Adapter]:
        """Yield the adapter that is scored and published, attached to the UNet: the average, or that in training."""
        if self._copy is None:
            yield self.adapter
            return
        if not self.config.ema_decay:
            self._average(1.0)
        self._copy.attach(self.base.unet)
        try:
            yield self._copy
        finally:  # not by attach: it compares shapes, and ZeRO-3 leaves none
            for key, attention in cross_attention(self.base.unet).items():
                attention.set_processor(self.adapter.ip_adapter[key])

    @torch.no_grad()
    def _average(self, share: float) -> None:
        """Move the copy by `share` of the way to the adapter in training."""
        assert self._copy is not None
        with whole_parameters(self.engine):
            for average, parameter in zip(self._copy.parameters(), self.adapter.parameters(), strict=True):
                average.lerp_(parameter, share)

    def _go_on(self) -> str:
        newest = self.run.newest() if self.rank == 0 else self._newest
        kept = f"The newest checkpoint is step-{newest}." if newest else "There is no checkpoint yet."
        return f"{kept} Try a new run with a lower learning_rate, or with max_grad_norm=1."

    def _load(self, adapter: Adapter) -> dict[str, Tensor]:
        """Load the weights of the newest checkpoint into a new adapter, and return the state beside them."""
        folder = self.run.checkpoint(self._newest)
        adapter.load_state_dict(load_file(folder / "adapter" / WEIGHTS))
        return load_file(folder / STATE)

    def _of_rank_0(self, read: Callable[[], T]) -> T:
        """Return what `read` gives on rank 0: files change under the other ranks, and all must decide alike."""
        value: list[Any] = [read() if self.rank == 0 else None]
        dist.broadcast_object_list(value)
        return value[0]

    def _new_adapter(self) -> Adapter:
        """Return the adapter to train, on the device in fp32, the same on every rank."""
        sizes = adapter_sizes(self.base, self.config)
        if self.config.adapter:
            return Adapter.from_pretrained(self.config.adapter).to(self.device)
        torch.manual_seed(self.config.seed)
        return Adapter.for_unet(self.base.unet, sizes).to(self.device)

    def _align(self, adapter: Adapter) -> None:
        """Give a new adapter its warm start. Its batches are those of as many training steps, without noise."""
        size, steps = self.config.train_batch_size, self.config.alignment_steps
        places = share(size, self.rank, self.world_size)

        def told(draws: list[Draw]) -> list[Draw]:
            # what an adapter adds without a picture is nothing: no text either
            return [dataclasses.replace(d, drop_text=d.drop_image) for d in draws]

        def noisy(step: int) -> None:  # the same on every rank
            draws, samples = self._drawn(step, range(min(size, RECORDED)))
            draws = [dataclasses.replace(d, timestep=TIMESTEPS[step]) for d in told(draws)]
            noisy, timesteps, text, _, _ = self._encode(samples, draws)
            adapter.denoise(self.base.unet, noisy, timesteps, text, text[:, :0], 0.0)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            draws, samples = self._read(step, places)
            return self._told(samples, told(draws))

        def progress(losses: list[float]) -> float:
            step, every = len(losses), self.config.logging_steps
            if self.rank == 0 and step:
                self.run.log({"step": 0, "alignment_step": step, "alignment_loss": losses[-1]})
            if self.rank == 0 and step and (step % every == 0 or step == steps):
                print(f"alignment {step}/{steps}  loss {sum(losses[-every:]) / min(step, every):.3f}", flush=True)
            return step / steps

        def average(gradient: Tensor) -> None:
            dist.all_reduce(gradient)
            gradient /= self.world_size

        torch.manual_seed(self.config.seed)
        passes = [functools.partial(noisy, step) for step in range(len(TIMESTEPS))]
        queries, bf16 = record_queries(self.base.unet, passes), self.config.mixed_precision == "bf16"
        align(adapter, self.base.unet, queries, self.null_1TC, batch, progress=progress, bf16=bf16, reduce=average)

    def _read(self, step: int, places: Sequence[int]) -> tuple[list[Draw], list[Any]]:
        """Return this rank's draws and samples of `step`, and begin to read those of the next."""
        ahead = self._next[1] if self._next and self._next[0] == step else self._ahead.submit(self._drawn, step, places)
        begun = time.monotonic()
        read = ahead.result()
        self._waited = time.monotonic() - begun
        self._next = (step + 1, self._ahead.submit(self._drawn, step + 1, places))
        return read

    def _drawn(self, step: int, places: Sequence[int]) -> tuple[list[Draw], list[Any]]:
        """Return draws and samples at `places` of the global batch of `step`."""
        seed, data = self.config.seed, self.config.data
        indices = batch_indices(seed, step, self.config.train_batch_size, len(self.samples))
        draws = [draw(seed, step, place, self.latent, data, self.config.noise_offset) for place in places]
        return draws, self.source.read([indices[place] for place in places], [d.flip for d in draws])

    def _encode(
        self, samples: Sequence[Any], draws: Sequence[Draw], source: Source | None = None
    ) -> tuple[Tensor, ...]:
        """Return what one forward pass takes: noisy latents, time steps, text tokens, image features, noise (fp32)."""
        source = source or self.source
        noise = torch.stack([d.noise_4hw for d in draws]).to(self.device)
        timesteps = torch.tensor([d.timestep for d in draws], device=self.device)
        mean, std = source.posterior(samples)
        latents = self.base.sample_latents(mean, std, torch.stack([d.posterior_4hw for d in draws]))
        noisy = add_noise(self.scheduler, latents, noise, timesteps).to(self.base.dtype)
        return noisy, timesteps, *self._told(samples, draws, source), noise

    def _told(
        self, samples: Sequence[Any], draws: Sequence[Draw], source: Source | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return text states (B,77,C) and image features (B,N,E), each of nothing where it is dropped."""
        source = source or self.source
        text = with_drops(self.null_1TC, samples, [d.drop_text for d in draws], source.texts)
        return text, with_drops(self.null_1NE, samples, [d.drop_image for d in draws], source.features)

    def _loss(self, model: Any, batch: tuple[Tensor, ...], snr_gamma: float = 0.0) -> Tensor:
        noisy, timesteps, text, hidden, noise = batch
        weights = min_snr_weights(self.scheduler, timesteps, snr_gamma) if snr_gamma else None
        return noise_loss(model(self.base.unet, noisy, timesteps, text, hidden), noise, weights)

    def _held_out(self) -> list[tuple[Tensor, ...]]:
        """Return this rank's encoded validation batches: each picture at each of QUANTILES, nothing dropped."""
        held_out = Samples(self.config.data, "validation")
        encoders = Encoders(self.base, held_out)
        count = min(self.config.data.validation_samples, len(held_out))
        chosen = spread(count, len(held_out))
        jobs = [(i, timestep) for i in chosen for timestep in QUANTILES][self.rank :: self.world_size]
        part = self.config.train_batch_size // (self.world_size * self.config.gradient_accumulation_steps)
        batches = []
        for start in range(0, len(jobs), part):
            chunk = jobs[start : start + part]
            draws = [
                Draw(
                    drop_image=False,
                    drop_text=False,
                    timestep=timestep,
                    posterior_4hw=torch.zeros(self.latent),
                    noise_4hw=torch.randn(
                        self.latent, generator=generator_of("validation", held_out.frame_ids[i], timestep)
                    ),
                )
                for i, timestep in chunk
            ]
            samples = encoders.read([i for i, _ in chunk], [False] * len(chunk))
            batches.append(self._encode(samples, draws, encoders))
        return batches


def _copies(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    """Return copies of the adapter's parameters on the CPU, by name after `prefix`."""
    return {prefix + name: value.detach().cpu().clone() for name, value in adapter.named_parameters()}


def _peak_memory(device: torch.device) -> float:
    """Return MiB that torch has held at most on a GPU; elsewhere those that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
