"""Training from its command to its last checkpoint: `fit` on the driver, `train_loop_per_worker` on every worker."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from factory.files import SUMS, DamagedFolder, check_sealed, sha256_file
from factory.session import check_gpus, ray_session
from factory.settings import absolute
from trainer.base import find_base, name_of
from trainer.cache import cache_facts, find_cache, key_of
from trainer.config import TrainerConfig
from trainer.data import FITTING, Samples
from trainer.pictures import asked
from trainer.run import Run, code_version
from trainer.tracker import Tracker, check

ENVIRONMENT = {  # of processes that load models
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # bars of model loading
    "TRANSFORMERS_VERBOSITY": "error",
}


def fit(config: TrainerConfig) -> dict[str, Any]:
    """Train to `max_train_steps` and return a summary: output, step, loss, validation_loss, best_validation_loss.

    The same call goes on where a killed one stopped, and does nothing when the run is finished. Raises ValueError and
    FileNotFoundError for what the user gave; ray.train's TrainingFailedError when workers fail.
    """
    config = _absolute(config)
    run = Run(config.output)
    with run.lock():
        config, facts, cache = _describe(config, run)
        step = run.newest()
        if step >= config.max_train_steps:
            print(f"Run {run.folder} is finished: step {step} of {config.max_train_steps}. Nothing to do.", flush=True)
        else:
            with ray_session(config.workers.num_workers * config.workers.cpus_per_worker + 1):
                check_gpus(config.workers.num_workers * config.workers.use_gpu, "workers.use_gpu=false")
                _train(config, facts, cache)
        run.tidy()
        _mend(run)
    return _summary(run)


def train_loop_per_worker(job: dict[str, Any]) -> None:
    """Train on one worker: resume, then steps, validations and checkpoints until the last."""
    from ray.train.torch import get_device

    from trainer.worker import Worker  # loads the model libraries, which only workers need

    config: TrainerConfig = job["config"]
    worker = Worker(config, get_device(), job["facts"], job["cache"])  # type: ignore[arg-type]
    step = first = worker.first
    log = _Log(config, first) if worker.rank == 0 else None
    best = worker.best_loss()

    def validate() -> None:
        nonlocal best
        if config.data.validation_samples:
            loss = worker.validate()
            base = worker.validate(scale=0.0) if step == 0 else None
            if log:
                log.validated(step, loss, base)
            if step and (best is None or loss < best):
                best = loss
                worker.save_best(step, loss)

    if step == 0:
        validate()
    while step < config.max_train_steps:
        if log:
            log.goes_on()
        done = worker.step(step)
        step += 1
        if log:
            log.stepped(step, done)
        last = step == config.max_train_steps
        if last or step % config.validation_steps == 0:
            validate()
        if config.pictures.steps and (last or step % config.pictures.steps == 0):
            worker.draw_pictures(step)
        if last or step % config.checkpointing_steps == 0:
            worker.save(step)
            ray.train.report({"step": step, "loss": done["loss"]})  # a barrier: every worker reports equally often
    if log:
        log.tracker.close(step)


class _Log:
    """Rank 0's record: every step to metrics.jsonl, some to the screen."""

    def __init__(self, config: TrainerConfig, first: int) -> None:
        self.config, self.first = config, first
        self.run = Run(config.output)
        self.tracker = Tracker(config.report_to, self.run, first, {name: getattr(config, name) for name in _SETTINGS})
        self.start = self.before = time.monotonic()  # the start of the run, and of a step
        workers = config.workers
        print(
            f"{'Resumed at' if first else 'Starting from'} step {first} of {config.max_train_steps}: "
            f"{workers.num_workers} worker(s), ZeRO-{workers.zero_stage}, batch {config.train_batch_size}",
            flush=True,
        )

    def stepped(self, step: int, done: dict[str, float]) -> None:
        """Record optimizer step `step` (from 1)."""
        now = time.monotonic()
        seconds, self.before = now - self.before, now
        speed = self.config.train_batch_size / seconds
        self._log(step, {**done, "samples_per_second": round(speed, 3), "seconds": round(seconds, 4)})
        if step % self.config.logging_steps == 0 or step in (self.first + 1, self.config.max_train_steps):
            left = (now - self.start) / (step - self.first) * (self.config.max_train_steps - step)
            total, loss = self.config.max_train_steps, done["loss"]
            print(f"step {step}/{total}  loss {loss:.4f}  {speed:.1f} samples/s  {_clock(left)} left", flush=True)

    def validated(self, step: int, loss: float, base: float | None) -> None:
        """Record the validation loss after `step` steps, and beside the first one that of the base alone."""
        self._log(step, {"validation_loss": loss, **({"base_validation_loss": base} if base is not None else {})})
        alone = f" (the base alone {base:.4f})" if base is not None else ""
        print(f"step {step}/{self.config.max_train_steps}  validation loss {loss:.4f}{alone}", flush=True)

    def goes_on(self) -> None:
        """Begin to count the seconds of the next step: what came before is not part of it."""
        self.before = time.monotonic()

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})
        self.tracker.report(step, numbers)


def _train(config: TrainerConfig, facts: dict[str, Any], cache: str | None) -> None:
    """Run Ray Train. Its own storage is thrown away: resuming is decided by the seals of the run folder alone."""
    storage = Path(config.output) / ".ray"
    environment = {
        **ENVIRONMENT,
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it shows each printed line twice
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of torch, about what DeepSpeed calls
    }
    if not config.workers.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    resources = {"CPU": config.workers.cpus_per_worker, **({"GPU": 1} if config.workers.use_gpu else {})}
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config, "facts": facts, "cache": cache},
        scaling_config=ScalingConfig(
            num_workers=config.workers.num_workers, use_gpu=config.workers.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],  # a new name: Ray would resume an old one from its own snapshot
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    logging.getLogger(TorchTrainer.fit.__module__).setLevel(logging.INFO)  # it says that Ctrl-C has been heard
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _absolute(config: TrainerConfig) -> TrainerConfig:
    """Return `config` with absolute paths; ValueError for one that is missing, or relative in a Ray job, and for a
    batch that the workers can't share."""
    if not config.output:
        raise ValueError("No run folder given. Say where to train: --output /path/of/the/run")
    config.samples_per_pass()  # says now, not on a worker, that the batch does not divide
    return dataclasses.replace(
        absolute_inputs(config),
        output=absolute(config.output, "--output"),
        pictures=dataclasses.replace(
            config.pictures,
            references=tuple(absolute(path, "pictures.references") for path in config.pictures.references),
        ),
    )


def absolute_inputs(config: TrainerConfig) -> TrainerConfig:
    """Return `config` with absolute paths of dataset, base and adapter; ValueError as of `_absolute`."""
    if not config.data.root:
        raise ValueError("No dataset given. Say where it is: --root /path/of/the/dataset")
    if not config.pretrained_model_name_or_path:
        raise ValueError(
            "No base model given. Say --base with a diffusers folder or hub id; the small one that is shipped is "
            "animesketch/micro."
        )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            root=absolute(config.data.root, "--root"),
            cache_root=config.data.cache_root and absolute(config.data.cache_root, "data.cache_root"),
        ),
        pretrained_model_name_or_path=_model(config.pretrained_model_name_or_path, "--base"),
        image_encoder=config.image_encoder and _model(config.image_encoder, "image_encoder"),
        adapter=config.adapter and absolute(config.adapter, "adapter"),
    )


def _model(name_or_path: str, option: str) -> str:
    """Return a hub id unchanged, a folder's path absolute."""
    local = os.path.isdir(name_or_path) or name_or_path.startswith((".", "/"))
    return absolute(name_or_path, option) if local else name_or_path


def _describe(config: TrainerConfig, run: Run) -> tuple[TrainerConfig, dict[str, Any], str | None]:
    """Return `config` with the dataset version pinned, the facts for config.json, and the URI of the cache that is
    trained on, if any; refuse a run made otherwise."""
    pinned = run.pinned_version()
    if pinned is not None and config.data.version is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, version=pinned))
    tag = config.data.version if isinstance(config.data.version, str) else None
    samples = Samples(config.data, "train")
    if config.data.validation_samples:
        Samples(config.data, "validation")  # says now, not on a worker, when there is none
    if config.pictures.steps:
        asked(config)
    check(config.report_to)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, version=samples.version))
    base = find_base(config.pretrained_model_name_or_path, config.image_encoder)
    base_hash = base.hash()
    inputs = cache_facts(config, samples, base, base_hash)
    cache = find_cache(config, inputs, run.began())
    if cache:
        print(f"On the cache {cache}: the encoders run for validation only.", flush=True)
    if config.data.target == "image" and config.data.keywords:
        print(
            "Colour pictures are learned from texts that end with the keywords of line art. If that is not meant: "
            "--set data.keywords=false",
            flush=True,
        )
    run.claim(
        {
            "cache": cache and key_of(inputs),
            "base_weights_hash": base_hash,
            "adapter": config.adapter and _adapter_hash(config.adapter),
            "variant": config.variant,
            "resampler_dim": config.resampler_dim,
            "dataset_version": samples.version,
            "dataset_fingerprint": samples.fingerprint,
            # a cosine ends at the last step: another one would change the steps before it
            "max_train_steps": config.max_train_steps if config.lr_scheduler == "cosine" else None,
            **{f"data.{name}": getattr(config.data, name) for name in _DATA_SETTINGS},
            **{name: getattr(config, name) for name in _SETTINGS},
        }
    )
    facts = {
        "base": {
            "id": base.id,
            "weights_hash": base_hash,
            "image_encoder": config.image_encoder and name_of(config.image_encoder),
        },
        "dataset": {"uri": name_of(config.data.root), "version": samples.version, "tag": tag, "samples": len(samples)},
        "training": {name: getattr(config, name) for name in (*_SETTINGS, "gradient_accumulation_steps")},
        "preprocessing": {
            "target": FITTING[config.data.target],
            "resolution": config.data.resolution,
            "target_column": config.data.target,
            "reference_column": config.data.reference,
        },
        "code_version": code_version(),
    }
    return config, facts, cache


_SETTINGS = (  # what the trained weights depend on
    "seed",
    "alignment_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "snr_gamma",
    "noise_offset",
    "ema_decay",
    "train_batch_size",
    "mixed_precision",
)
_DATA_SETTINGS = (
    "resolution",
    "target",
    "reference",
    "keywords",
    "accepted_only",
    "image_drop_rate",
    "text_drop_rate",
    "both_drop_rate",
    "random_flip",
)


def _adapter_hash(name_or_path: str) -> str:
    from trainer.adapter import WEIGHTS, find_adapter

    path = find_adapter(name_or_path)
    return sha256_file(path / WEIGHTS if path.is_dir() else path)


def _mend(run: Run) -> None:
    """Make `adapter/` that of the newest good checkpoint if a kill fell between the two, or if it is damaged."""
    step, published = run.newest(), run.folder / "adapter"
    with contextlib.suppress(DamagedFolder):
        check_sealed(published)
        if (published / SUMS).read_bytes() == (run.checkpoint(step) / "adapter" / SUMS).read_bytes():
            return
    run.publish_adapter(step)


def _summary(run: Run) -> dict[str, Any]:
    history = run.history()
    losses = [record for record in history if "loss" in record]
    validation = [record["validation_loss"] for record in history if "validation_loss" in record]
    return {
        "output": str(run.folder),
        "step": losses[-1]["step"] if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "validation_loss": validation[-1] if validation else None,
        "best_validation_loss": run.best_loss(),
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
