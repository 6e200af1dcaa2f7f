"""Making a cache: actors of Ray Data encode samples a unit at a time, the driver makes one table of all of them.

A unit is a file START-END.arrow in `KEY.units/` beside the table, put there by rename; a killed run goes on with those
that are not there. They become one fragment, of one file, that one transaction commits: before it there is no table at
all, and so none is ever read in halves. Batches at random are read out of one file twice as fast as out of sixteen.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import torch
from lance.fragment import write_fragments
from torch import Tensor

from factory.files import locked, new_file, sync
from factory.schema import STORAGE_VERSION
from factory.session import check_gpus, ray_session
from factory.stage import Progress
from trainer.base import find_base
from trainer.cache import TENSORS, cache_facts, checksum, exists, schema_of, uri_of
from trainer.config import TrainerConfig
from trainer.data import Samples
from trainer.loop import ENVIRONMENT, absolute_inputs
from trainer.run import RunBusy

BATCH = 16  # samples that the encoders see at once
UNIT = 256  # samples of a unit at most: what a crash costs an actor
ATTEMPTS = 3  # for a unit whose actor dies


def write_cache(config: TrainerConfig) -> dict[str, Any]:
    """Make the cache that `fit` with the same settings trains on; return its uri, samples, rows and bytes.

    The same call goes on where a killed one stopped, and does nothing where the cache is whole. Raises ValueError and
    FileNotFoundError for what the user gave, RunBusy when another process makes this cache, RayError for lost actors.
    """
    config = absolute_inputs(config)
    if "://" in (config.data.cache_root or config.data.root):
        raise ValueError(
            f"A cache is written to a folder that all nodes see, not to {config.data.cache_root or config.data.root}. "
            "Give one, to `cache` and to `fit`: --set data.cache_root=/shared/anime"
        )
    samples = Samples(config.data, "train")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, version=samples.version))
    base = find_base(config.pretrained_model_name_or_path, config.image_encoder)
    facts = cache_facts(config, samples, base, base.hash())
    uri = uri_of(config.data, facts)
    units = Path(uri).with_suffix(".units")
    if exists(uri):
        shutil.rmtree(units, ignore_errors=True)
        print(f"Cache {uri} is whole. Nothing to do.", flush=True)
    else:
        try:
            with locked(units, wait=False):
                if not exists(uri):
                    _write(config, facts, uri, units, len(samples))
                shutil.rmtree(units, ignore_errors=True)  # another process may have, of a whole cache
        except BlockingIOError:
            raise RunBusy(f"Another process makes the cache {uri}. Wait for it.") from None
    table = lance.dataset(uri)
    size = sum(file.stat().st_size for file in Path(uri).rglob("*") if file.is_file())
    return {"cache": uri, "samples": len(samples), "rows": table.count_rows(), "bytes": size}


def _write(config: TrainerConfig, facts: dict[str, Any], uri: str, units: Path, count: int) -> None:
    """Encode the units that are not done, then make the table of all of them, in order."""
    for half in units.glob(".*.tmp.*"):  # of an actor that was killed while it wrote
        half.unlink()
    copies = 1 + config.data.random_flip
    done = {part for part in _named(units) if _rows(_file(units, part)) == copies * (part[1] - part[0])}
    missing = _missing(done, count, _unit_size(count, config.workers.num_workers))
    if done:
        print(f"cache    goes on: {sum(b - a for a, b in done):,} of {count:,} samples are there", flush=True)
    progress = Progress("cache", "units", len(missing), "samples", sum(b - a for a, b in missing))
    with ray_session(config.workers.num_workers * config.workers.cpus_per_worker + 1):
        check_gpus(float(config.workers.use_gpu), "workers.use_gpu=false")
        for start, end in _encoded(missing, config, facts, units):
            if not _file(units, (start, end)).is_file():
                raise ValueError(
                    f"A unit of the cache was written on another node, and is not in {units} here. Give a folder that "
                    "all nodes see: --set data.cache_root=/shared/anime"
                )
            progress.step(end - start, rows=copies * (end - start))
    _commit(uri, [_file(units, part) for part in sorted({*done, *missing})])


def _commit(uri: str, parts: list[Path]) -> None:
    """Make the table of the rows of `parts`, in one file."""
    shutil.rmtree(uri, ignore_errors=True)  # of a command that was stopped here
    with pa.OSFile(str(parts[0])) as file:
        schema = pa.ipc.open_file(file).schema
    rows = pa.RecordBatchReader.from_batches(schema, (batch for part in parts for batch in _batches(part)))
    (fragment,) = write_fragments(
        rows,
        uri,
        schema=schema,
        mode="create",
        data_storage_version=STORAGE_VERSION,
        max_rows_per_file=1 << 30,
        max_bytes_per_file=1 << 50,
    )
    sync([Path(uri, "data", file.path) for file in fragment.files], top=Path(uri))
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, [fragment]))
    sync(sorted(Path(uri).rglob("*.manifest")), top=Path(uri).parent)


def _batches(part: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(part)) as file:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _rows(part: Path) -> int:
    """Return the rows of a unit's file; 0 where it is not as it was written."""
    try:
        return sum(batch.num_rows for batch in _batches(part))
    except (OSError, pa.ArrowInvalid):
        return 0


def _unit_size(count: int, num_workers: int) -> int:
    """Return the samples of a unit: some units for each actor."""
    return max(BATCH, min(UNIT, -(-count // (4 * num_workers))))


def _missing(done: Iterable[tuple[int, int]], count: int, size: int) -> list[tuple[int, int]]:
    """Return what `done` leaves of `count` samples, in units of at most `size`: first sample, and one after the last.

    Units that are there may have another size: they were made for another number of actors.
    """
    missing, at = [], 0
    for start, end in [*sorted(done), (count, count)]:
        missing += [(first, min(first + size, start)) for first in range(at, start, size)]
        at = end
    return missing


def _named(units: Path) -> list[tuple[int, int]]:
    """Return the units that have a file: first sample, and one after the last."""
    names = [file.stem.split("-") for file in units.glob("*.arrow")]
    return [(int(start), int(end)) for start, end in names]


def _file(units: Path, part: tuple[int, int]) -> Path:
    return units / f"{part[0]}-{part[1]}.arrow"


def _encoded(
    parts: list[tuple[int, int]], config: TrainerConfig, facts: dict[str, Any], units: Path
) -> Iterator[tuple[int, int]]:
    """Yield the units of `parts` as actors have written them, each with a copy of the encoders."""
    import ray.data
    from ray.exceptions import RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    if not parts:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # Progress prints
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # that it is done
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items([{"start": a, "end": b} for a, b in parts], override_num_blocks=len(parts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # ray 2.60 has no other way to bound the attempts
            written = rows.map(
                EncodeUnit,  # type: ignore[arg-type]
                fn_constructor_args=(config, facts, units),
                compute=ray.data.ActorPoolStrategy(size=min(config.workers.num_workers, len(parts))),
                num_cpus=config.workers.cpus_per_worker,
                num_gpus=1 if config.workers.use_gpu else 0,
                runtime_env={"env_vars": ENVIRONMENT | ({} if config.workers.use_gpu else {"DS_ACCELERATOR": "cpu"})},
                max_restarts=ATTEMPTS - 1,
                max_task_retries=ATTEMPTS - 1,
            )
    for row in written.iter_rows():
        if row["raised"]:
            error = RayTaskError.from_bytes(row["raised"])
            raise error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        yield row["start"], row["end"]


class EncodeUnit:
    """A range of samples -> their rows, in a file in the folder of units."""

    def __init__(self, config: TrainerConfig, facts: dict[str, Any], units: Path) -> None:
        from trainer.backbone import load_backbone  # loads the model libraries, which only actors need
        from trainer.encoders import Encoders

        torch.set_num_threads(config.workers.num_threads)
        base = load_backbone(
            config.pretrained_model_name_or_path,
            image_encoder=config.image_encoder,
            dtype=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32,
            device="cuda" if config.workers.use_gpu else "cpu",
        )
        base.features = facts["features"]
        self._samples = Samples(config.data, "train")
        self._encoders = Encoders(base, self._samples)
        self._facts, self._units = facts, units
        self._dtype = np.dtype(config.data.cache_dtype)
        self._flips = (False, True) if config.data.random_flip else (False,)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from ray.exceptions import RayTaskError

        part = (int(row["start"]), int(row["end"]))
        try:
            self._write(part)
        except Exception as error:  # Ray Data would wrap it in one of its own
            return row | {"raised": RayTaskError("EncodeUnit", traceback.format_exc(), error).to_bytes()}
        return row | {"raised": b""}

    def _write(self, part: tuple[int, int]) -> None:
        batches = self._batches(*part)
        first, shapes = next(batches)
        schema = schema_of(self._facts, shapes)
        with new_file(_file(self._units, part)) as aside, pa.ipc.new_file(aside, schema) as file:
            for columns in (first, *(columns for columns, _ in batches)):
                file.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

    def _batches(self, start: int, end: int) -> Iterator[tuple[list[pa.Array], dict[str, list[int]]]]:
        """Yield the columns of a few samples, and the shapes of their tensors: each as it is, then its mirror image."""
        for at in range(start, end, BATCH):
            indices = [i for i in range(at, min(at + BATCH, end)) for _ in self._flips]
            flips = [*self._flips] * (len(indices) // len(self._flips))
            samples = self._encoders.read(indices, flips)
            mean, std = self._encoders.posterior(samples)
            text = self._encoders.texts(samples[:: len(self._flips)]).repeat_interleave(len(self._flips), 0)
            tensors = (mean, std, text, self._encoders.features(samples))
            stored = [self._stored(name, tensor) for name, tensor in zip(TENSORS, tensors, strict=True)]
            numbers = np.concatenate(stored, axis=1)
            names = [self._samples.frame_ids[i] for i in indices]
            sums = [checksum(*row) for row in zip(names, flips, numbers, strict=True)]
            binary, buffer = pa.binary(numbers[0].nbytes), pa.py_buffer(numbers)
            values = pa.FixedSizeBinaryArray.from_buffers(binary, len(numbers), [None, buffer])
            columns = [pa.array(names), pa.array(flips), values, pa.array(sums, pa.uint32())]
            yield columns, {name: list(tensor.shape[1:]) for name, tensor in zip(TENSORS, tensors, strict=True)}

    def _stored(self, name: str, tensor: Tensor) -> np.ndarray:
        """Return a tensor (B,...) as rows (B,n) in the cache's numbers. ValueError where they can't hold a value."""
        array = tensor.float().cpu().numpy().reshape(len(tensor), -1)
        with np.errstate(over="ignore"):
            stored = array.astype(self._dtype)
        if not np.isfinite(stored).all():
            reach = np.abs(array).max()
            raise ValueError(
                f"The encoders gave {name} of up to {reach}, which {self._dtype} can't hold. "
                "Make the cache, and train, with --set data.cache_dtype=float32."
            )
        return stored
