"""Training samples out of `samples.lance`, and what is drawn for them: both pure functions of seed and step.

The global batch of a step, and each sample's noise, time step and drops, do not depend on the number of workers, so a
run resumes from nothing but its step. Shape suffixes: H, W pixels; h, w latents.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lance
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from factory.caption import sample_text
from trainer.config import DataConfig

_SIZED = "to a square; area-averaged down or bicubic up to the resolution; [-1,1]"
FITTING = {  # how a target becomes a square
    "training_sketch": f"padded with white, nothing cut off, {_SIZED}",
    "image": f"cropped about its centre {_SIZED}",
}
_COLUMNS = ("frame_id", "caption", "keywords", "split", "selected")
_VERB = {
    "training_sketch": "sketch",
    "caption": "caption",
    "keywords": "caption",
    "split": "select",
    "selected": "select",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample."""

    frame_id: str
    text: str  # "{caption}, {keywords}"
    target: Tensor  # the picture that is learned, the sketch by default: (3,H,W) in [-1,1]
    reference: Image.Image  # what the image encoder sees, whole and unpadded


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The chance part of one training sample."""

    drop_image: bool
    drop_text: bool
    timestep: int  # 0..999
    posterior_4hw: Tensor  # standard normal, for the VAE's sample
    noise_4hw: Tensor  # standard normal, what the UNet shall predict
    flip: bool = False  # whether target and reference are mirrored


class Samples:
    """The selected rows of one split, sorted by frame_id, at one version of the table."""

    def __init__(self, config: DataConfig, split: str) -> None:
        """Open the table. FileNotFoundError when absent; ValueError when a column is missing or no row is left."""
        self.config = config
        self.dataset = open_samples(config)
        self.version: int = self.dataset.version
        rows = self.dataset.to_table(
            columns=["frame_id", "caption", "keywords"],
            filter=" AND ".join((*_wanted(config), f"split = '{split}'", *_pictured(config))),
            with_row_id=True,
        ).sort_by("frame_id")
        if not rows.num_rows:
            raise ValueError(_why_empty(self.dataset, split, config))
        self.frame_ids: list[str] = rows["frame_id"].to_pylist()
        self._row_ids: list[int] = rows["_rowid"].to_pylist()
        captions = rows["caption"].to_pylist()
        keywords = rows["keywords"].to_pylist() if config.keywords else [None] * len(captions)
        self.texts = [sample_text(caption, words) for caption, words in zip(captions, keywords, strict=True)]

    def __len__(self) -> int:
        return len(self.frame_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the frame_ids and texts: the same for the same samples, wherever the dataset lies."""
        lines = (f"{frame}\t{text}\n" for frame, text in zip(self.frame_ids, self.texts, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples at `indices` (0 to len - 1) in order; ValueError naming the row that can't be decoded."""
        columns = dict.fromkeys((self.config.target, self.config.reference))  # each once: they may be the same
        pictures = {column: self._pictures(column, indices) for column in columns}
        targets, references = pictures[self.config.target], pictures[self.config.reference]
        return [
            Sample(
                frame_id=self.frame_ids[i],
                text=self.texts[i],
                target=target_pixels(target, self.config),
                reference=reference,
            )
            for i, target, reference in zip(indices, targets, references, strict=True)
        ]

    def _pictures(self, column: str, indices: Sequence[int]) -> list[Image.Image]:
        """Return the decoded RGB pictures of a blob column."""
        ids = [self._row_ids[i] for i in indices]
        blobs = self.dataset.read_blobs(column, ids=ids, preserve_order=True)
        pictures = []
        for i, (_, blob) in zip(indices, blobs, strict=True):
            try:
                pictures.append(Image.open(io.BytesIO(blob or b"")).convert("RGB"))
            except OSError as error:
                raise ValueError(
                    f"Column {column!r} of sample {self.frame_ids[i]} in {self.dataset.uri} is not a whole picture "
                    f"({error}). Restore the files of that table from a copy, or build into a new root: "
                    f"{_command('build', 'NEW_ROOT')}"
                ) from error
        return pictures


def open_samples(config: DataConfig) -> lance.LanceDataset:
    """Return `samples.lance` of the dataset root at the asked version; its columns are checked."""
    uri = f"{config.root.rstrip('/')}/samples.lance"
    if "://" not in uri and not os.path.exists(uri):
        raise FileNotFoundError(f"No table {uri!r}. Make the dataset first: {_command('build', config.root)}")
    try:
        dataset = lance.dataset(uri)
    except ValueError as error:
        raise FileNotFoundError(
            f"No table {uri!r} ({str(error).splitlines()[0][:200]}). Give the dataset root that "
            "`python -m factory build` wrote."
        ) from None
    if config.version is not None:
        try:
            dataset = lance.dataset(uri, version=config.version)
        except ValueError:
            raise ValueError(
                f"Table {uri!r} has no version or tag {config.version!r}; its newest version is {dataset.version}. "
                "Give --set data.version=..., or another --output to train on the newest."
            ) from None
    if config.accepted_only and "review" not in dataset.schema.names:
        raise ValueError(
            f"Table {uri!r} has no column 'review': nothing says which samples are accepted. Train on all: "
            "--set data.accepted_only=false"
        )
    for column in dict.fromkeys((*_COLUMNS, config.target, config.reference)):
        if column not in dataset.schema.names:
            command = _command(_VERB.get(column, "build"), config.root)
            raise ValueError(f"Table {uri!r} has no column {column!r}. Run: {command}")
    return dataset


def target_pixels(picture: Image.Image, config: DataConfig) -> Tensor:
    """Return pixels (3,H,W) in [-1,1] of an RGB picture of the target's column, fitted to the resolution by FITTING.

    A colour frame is cropped about its centre, as the pictures were that Stable Diffusion has learned from: bars beside
    it would be learned too. The reference is not: the encoder sees it whole, also what the target has lost.
    """
    if config.target == "image":
        side = min(picture.size)
        picture = ImageOps.fit(picture, (side, side))
    return square_pixels(picture, config.resolution)


def square_pixels(picture: Image.Image, side: int) -> Tensor:
    """Return pixels (3,side,side) in [-1,1] of an RGB picture, padded with white to a square: paper is white.

    Centre-cropping, as photographs get it, would cut lines off; the price is white bars beside a wide frame.
    """
    square = ImageOps.pad(picture, (max(picture.size), max(picture.size)), color="white")
    method = Image.Resampling.BOX if square.width > side else Image.Resampling.BICUBIC
    array = np.asarray(square.resize((side, side), method), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def batch_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Return the sample indices of the global batch of `step` (from 0): epoch after epoch, each its own permutation."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(seed, position // length, length)[position % length]) for position in positions]


def spread(count: int, length: int) -> list[int]:
    """Return `count` indices of 0 to `length` - 1, evenly apart: samples are sorted by film and time."""
    return [i * length // count for i in range(count)]


def share(count: int, rank: int, world_size: int) -> range:
    """Return the places in a global batch of `count` that belong to `rank`: equal parts in order."""
    part = count // world_size
    return range(rank * part, (rank + 1) * part)


def draw(
    seed: int, step: int, place: int, latent: tuple[int, int, int], config: DataConfig, noise_offset: float = 0.0
) -> Draw:
    """Return what is drawn for the sample at `place` in the global batch of `step`; `latent` is (4,h,w).

    One uniform number decides the drops, as in tutorial_train_plus.py: image, then text, then both. Where asked, each
    channel of the noise gets `noise_offset` times a standard normal number (Guttenberg 2023, "Diffusion with Offset
    Noise"; train_text_to_image.py).
    """
    generator = generator_of(seed, "train", step, place)
    u = torch.rand((), generator=generator).item()
    image, text = config.image_drop_rate, config.image_drop_rate + config.text_drop_rate
    both = text + config.both_drop_rate
    drawn = Draw(
        drop_image=u < image or text <= u < both,
        drop_text=image <= u < both,
        timestep=int(torch.randint(0, 1000, (), generator=generator)),
        posterior_4hw=torch.randn(latent, generator=generator),
        noise_4hw=torch.randn(latent, generator=generator),
        flip=config.random_flip and torch.rand((), generator=generator).item() < 0.5,
    )
    if noise_offset:
        offset_411 = torch.randn(latent[0], 1, 1, generator=generator_of(seed, "offset", step, place))
        drawn = replace(drawn, noise_4hw=drawn.noise_4hw + noise_offset * offset_411)
    return drawn


def flipped(samples: Sequence[Sample], flips: Sequence[bool]) -> list[Sample]:
    """Return the samples, those of `flips` with target and reference mirrored; texts stay."""
    return [
        replace(s, target=s.target.flip(-1), reference=ImageOps.mirror(s.reference)) if flip else s
        for s, flip in zip(samples, flips, strict=True)
    ]


def generator_of(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by `key`: the same numbers on every machine and device."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


@functools.lru_cache(maxsize=2)  # a batch touches at most two epochs, unless it is longer than one
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return torch.randperm(length, generator=generator_of(seed, "order", epoch)).numpy()


def _wanted(config: DataConfig) -> list[str]:
    """Return the conditions on a row that the dataset's makers have decided."""
    return ["selected", *(["review = 'accepted'"] if config.accepted_only else [])]


def _pictured(config: DataConfig) -> list[str]:
    return [f"{column} IS NOT NULL" for column in dict.fromkeys((config.target, config.reference))]


def _why_empty(dataset: lance.LanceDataset, split: str, config: DataConfig) -> str:
    """Return the message for a split without rows: what is missing, and what to do."""
    table = f"Table {dataset.uri!r} has"
    at = f"at version {dataset.version}."
    wanted = " AND ".join(_wanted(config))
    if not dataset.count_rows():
        return f"{table} no rows {at} Run: {_command('build', config.root)}"
    if not dataset.count_rows("selected"):
        return f"{table} no selected rows {at} Run: {_command('select', config.root)}"
    if not dataset.count_rows(wanted):
        return f"{table} no selected row that is accepted {at} Review it, or train on all: {_ALL}"
    if dataset.count_rows(f"{wanted} AND split = '{split}'"):
        absent = [column for column in (config.target, config.reference) if not _count(dataset, split, column, wanted)]
        column = absent[0] if absent else f"{config.target} and {config.reference}"
        message = f"{table} no row of split {split!r} with {column} {at} "
        message += f"Run: {_command('build' if column == 'image' else 'sketch', config.root)}"
    elif config.accepted_only and dataset.count_rows(f"selected AND split = '{split}'"):
        message = f"{table} no accepted row of split {split!r} {at} Review it, or train on all: {_ALL}"
    else:  # a film keeps its split, so that the same root can't be split anew
        films = 'split.holdout=["FILM.mkv"]' if split == "validation" else "split.validation_share=0"
        message = f"{table} no selected rows with split {split!r} {at} "
        message += f"Say what is held out when building a new root: {_command('build', 'NEW_ROOT')} --set '{films}'"
    if split == "validation":
        message += " — or train without validation: --set data.validation_samples=0"
    return message


_ALL = "--set data.accepted_only=false"


def _count(dataset: lance.LanceDataset, split: str, column: str, wanted: str) -> int:
    return dataset.count_rows(f"{wanted} AND split = '{split}' AND {column} IS NOT NULL")


def _command(verb: str, root: str) -> str:
    return f"python -m factory {verb} {'SOURCES ' if verb == 'build' else ''}--root {shlex.quote(root)}"
