"""The cache: what the frozen encoders make of each training sample, computed once and read by index from then on.

`ROOT/caches/KEY.lance` has a row per sample, in the order of `Samples`, and after it one for its mirror image where
`data.random_flip` asks for it. KEY is a hash of all that the rows depend on, so a cache of other weights, data or
settings is not found. The table is there when it is whole: cache_writer.py commits it once, at its end.

Shape suffixes: B batch, h and w latents, T text tokens, C text width, N image patches + CLS, E vision width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import torch
from lance.file import LanceFileReader
from torch import Tensor

from factory.files import sha256_file
from factory.store import state
from trainer.base import BaseFiles
from trainer.config import DataConfig, TrainerConfig
from trainer.data import FITTING, Samples
from trainer.projection import VARIANTS

TENSORS = ("mean", "std", "text", "features")  # of a row, one after the other
RECIPE = 1  # raised when the encoders are given other inputs than before: data.square_pixels, backbone.encode_*
_FACTS, _SHAPES = b"animesketch.cache", b"animesketch.shapes"
_SETTINGS = ("*.json", "*.txt")  # of a model's folder: what its outputs depend on beside the weights
_READ_AT_ONCE = 4  # rows: of 842 kB each, half as fast again as all at once


class DamagedCache(ValueError):
    """A cache whose rows are not those that were written."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as the encoders left it."""

    mean: Tensor  # (4,h,w) of its latents, fp32, unscaled
    std: Tensor  # (4,h,w)
    text: Tensor  # (T,C)
    features: Tensor  # (N,E) of the reference


def cache_facts(config: TrainerConfig, samples: Samples, base: BaseFiles, base_hash: str) -> dict[str, Any]:
    """Return all that the rows of a cache depend on; `base_hash` is `base.hash()`."""
    fragments = [state(fragment.metadata) for fragment in samples.dataset.get_fragments()]
    return {
        "recipe": RECIPE,
        "base_weights": base_hash,
        "base_settings": _settings_hash(base),
        "data_files": hashlib.sha256(json.dumps(fragments).encode()).hexdigest(),  # each version has other ones
        "samples": samples.fingerprint,  # which they are, and their texts: with keywords or without, accepted or all
        "features": _features(config),
        "columns": [config.data.target, config.data.reference],
        "preprocessing": FITTING[config.data.target],
        "resolution": config.data.resolution,
        "random_flip": config.data.random_flip,
        "mixed_precision": config.mixed_precision,  # what the encoders compute in
        "dtype": config.data.cache_dtype,
    }


def key_of(facts: dict[str, Any]) -> str:
    """Return the key of a cache: 16 hex digits of the sha256 of its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def uri_of(config: DataConfig, facts: dict[str, Any]) -> str:
    """Return where the cache of these facts is, or would be."""
    return f"{(config.cache_root or config.root).rstrip('/')}/caches/{key_of(facts)}.lance"


def exists(uri: str) -> bool:
    """Return whether a whole cache is at `uri`."""
    if "://" not in uri:
        return any(Path(uri, "_versions").glob("*.manifest"))
    try:
        lance.dataset(uri)
    except ValueError:  # not found
        return False
    return True


def find_cache(config: TrainerConfig, facts: dict[str, Any], began: dict[str, Any] | None) -> str | None:
    """Return the URI of the cache that a run trains on; None where the encoders run in each step.

    `began` is what the run was made with (`Run.began`): it goes on as it began. FileNotFoundError when there is none,
    and `data.cache=required` or the run's beginning asks for it.
    """
    wanted, uri = config.data.cache, uri_of(config.data, facts)
    if wanted == "auto" and began is not None:
        wanted = "required" if began.get("cache") else "never"
    if wanted == "never":
        return None
    if exists(uri):
        return uri
    place = " --set data.cache_root=/a/folder/that/all/nodes/see" if "://" in uri else ""
    make = f"python -m trainer cache --root {shlex.quote(config.data.root)}{place}, with the --preset, --base and --set"
    make += " of fit" + (", which needs data.cache_root too" if place else "")
    if wanted == "required":
        raise FileNotFoundError(
            f"No cache {uri}: none was made for this base, dataset version and settings. Make it: {make}; or train a "
            "new run without: --set data.cache=never"
        )
    print(f"No cache for this run: the encoders run in each step. To make one: {make}", flush=True)
    return None


def schema_of(facts: dict[str, Any], shapes: dict[str, Sequence[int]]) -> pa.Schema:
    """Return the columns of a cache: `shapes` are those of TENSORS for one sample.

    All of a row's numbers are one value: it is read in half the time that a column for each tensor takes.
    """
    numbers = sum(int(np.prod(shapes[name])) for name in TENSORS)
    return pa.schema(
        [
            pa.field("frame_id", pa.string(), nullable=False),
            pa.field("mirrored", pa.bool_(), nullable=False),
            pa.field("numbers", pa.binary(numbers * np.dtype(facts["dtype"]).itemsize), nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),  # Lance has no checksums of its own
        ],
        metadata={_FACTS: json.dumps(facts), _SHAPES: json.dumps(shapes)},
    )


def checksum(frame_id: str, mirrored: bool, numbers: np.ndarray) -> int:
    """Return the CRC-32 of a row: whose it is, and its numbers, the tensors in the order of TENSORS."""
    return zlib.crc32(numbers, zlib.crc32(f"{frame_id}/{int(mirrored)}".encode()))


class Cache:
    """The rows of a cache, read by index; no more than is asked for is in memory."""

    def __init__(
        self, uri: str, frame_ids: Sequence[str], *, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        """Open the cache of the samples `frame_ids`; text and image states are given in `dtype`. DamagedCache when it
        has not their number of rows, or was made for something else than its name says."""
        table = lance.dataset(uri)
        metadata = table.schema.metadata or {}
        self._facts, self._shapes = json.loads(metadata[_FACTS]), json.loads(metadata[_SHAPES])
        self._uri, self._frame_ids, self._device, self._dtype = uri, frame_ids, device, dtype
        self._copies = 1 + self._facts["random_flip"]
        if key_of(self._facts) != Path(uri).stem:
            raise DamagedCache(f"Cache {uri} is another one, {key_of(self._facts)}. {_remake(uri)}")
        rows, expected = table.count_rows(), len(frame_ids) * self._copies
        if rows != expected:
            raise DamagedCache(f"Cache {uri} has {rows} rows, not {expected}. {_remake(uri)}")
        with self._damage():
            self._file = open_rows(table)

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> list[Encoded]:
        """Return the samples at `indices`, those of `flips` mirrored. DamagedCache naming a row that is not as it was
        written."""
        with self._damage():
            rows = read_rows(self._file, [self._copies * i + flip for i, flip in zip(indices, flips, strict=True)])
        samples = []
        for i, flip, (numbers, crc) in zip(indices, flips, rows, strict=True):
            if checksum(self._frame_ids[i], flip, numbers) != crc:
                raise DamagedCache(
                    f"The row of sample {self._frame_ids[i]} in cache {self._uri} does not match its checksum. "
                    f"{_remake(self._uri)}"
                )
            samples.append(self._encoded(numbers))
        return samples

    def _encoded(self, numbers: np.ndarray) -> Encoded:
        ends = np.cumsum([np.prod(self._shapes[name]) for name in TENSORS])[:-1]
        parts = np.split(numbers.view(self._facts["dtype"]), ends)
        mean, std, text, features = (
            torch.from_numpy(part.astype(np.float32)).view(*self._shapes[name])
            for name, part in zip(TENSORS, parts, strict=True)
        )
        return Encoded(mean=mean, std=std, text=text.to(self._dtype), features=features.to(self._dtype))

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Tell in words what Lance can't read, as OSError."""
        try:
            yield
        except (OSError, ValueError) as error:  # a disk that does not answer is no damage
            raise OSError(
                f"Cache {self._uri} cannot be read: {error}. Try again; if it stays so, it is damaged. "
                f"{_remake(self._uri)}"
            ) from error

    def posterior(self, samples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B,4,h,w) of latents, fp32, unscaled."""
        return self._stacked([s.mean for s in samples]), self._stacked([s.std for s in samples])

    def texts(self, samples: Sequence[Encoded]) -> Tensor:
        """Return text tokens (B,T,C)."""
        return self._stacked([s.text for s in samples])

    def features(self, samples: Sequence[Encoded]) -> Tensor:
        """Return image features (B,N,E)."""
        return self._stacked([s.features for s in samples])

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).to(self._device)


def open_rows(table: lance.LanceDataset) -> LanceFileReader:
    """Return what reads the rows of a table of one file: in half the time that `take` of the table needs."""
    (fragment,) = table.get_fragments()
    (file,) = fragment.data_files()
    return LanceFileReader(f"{table.uri}/data/{file.path}", columns=["numbers", "crc32"])


def read_rows(file: LanceFileReader, rows: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """Return the bytes of the numbers of each of `rows`, read-only, and their checksum."""
    ascending, places = np.unique(rows, return_inverse=True)  # Lance wants them so
    found: list[tuple[np.ndarray, int]] = []
    for batch in file.take_rows(ascending.tolist(), batch_size=_READ_AT_ONCE).to_batches():
        values, size = batch["numbers"], batch["numbers"].type.byte_width
        numbers = np.frombuffer(values.buffers()[1], np.uint8, len(values) * size, values.offset * size)
        found += zip(numbers.reshape(len(values), size), batch["crc32"].to_pylist(), strict=True)
    return [found[place] for place in places]


def _remake(uri: str) -> str:
    return f"Remove the folder and make it again: rm -r {shlex.quote(uri)}, then python -m trainer cache as before."


def _features(config: TrainerConfig) -> str:
    """Return what the adapter that is trained reads of the image encoder."""
    if not config.adapter:
        return VARIANTS[config.variant].features
    from trainer.adapter import Adapter  # loads the model libraries

    return Adapter.from_pretrained(config.adapter).config.features


def _settings_hash(base: BaseFiles) -> str:
    """Return sha256 over the small files that say how the encoders and the tokenizer work, with their names."""
    folders = {
        "vae": base.folder / "vae",
        "text_encoder": base.folder / "text_encoder",
        "tokenizer": base.folder / "tokenizer",
        "image_encoder": base.image_encoder,
        "image_processor": base.image_processor,
    }
    sums = [
        f"{part}/{file.name} {sha256_file(file)}"
        for part, folder in folders.items()
        for kind in _SETTINGS
        for file in sorted(folder.glob(kind))
    ]
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()
