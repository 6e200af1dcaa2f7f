"""Where the files of a base model are, and their hash. Light: loads no model library, so a driver can ask early."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.files import sha256_file
from factory.models import OWNER, find_model

WEIGHTS = Path(__file__).parent / "weights"  # the models that are shipped with the code
MICRO = OWNER + "micro"
GUIDANCE = 3.5  # the guidance scale for MICRO: SD v1.5's usual 7.5 burns the colours of pictures as small as its own
PARTS = ("unet", "vae", "text_encoder")
_FILES = (
    "config.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "*index.json",
    "*-of-*.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The files of one base on this machine."""

    id: str  # hub id, or the folder's name: never a path
    folder: Path  # the diffusers pipeline folder
    image_encoder: Path  # the image encoder's folder
    image_processor: Path  # where its preprocessor_config.json is looked for
    weights: tuple[Path, ...]  # the safetensors files that are loaded

    def hash(self) -> str:
        """Return sha256 over the sorted sha256 of `weights`: 64 hex digits, the same wherever the files lie."""
        digests = sorted(sha256_file(file) for file in self.weights)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def find_base(pretrained_model_name_or_path: str, image_encoder: str | None = None) -> BaseFiles:
    """Return the files of a pipeline folder or hub id, and of its image encoder.

    `image_encoder` is a folder, or `owner/name/sub/folder` on the hub, where the pipeline has none of its own. Raises
    FileNotFoundError when something is absent: what is on the hub is downloaded, if the hub can be reached.
    """
    wanted = [f"{part}/{name}" for part in (*PARTS, "image_encoder") for name in _FILES]
    base = _local(pretrained_model_name_or_path, ["model_index.json", "tokenizer/*", "feature_extractor/*", *wanted])
    for part in (*PARTS, "tokenizer"):
        if not (base / part).is_dir():
            raise FileNotFoundError(
                f"{base / part} is missing: {pretrained_model_name_or_path} is not a Stable Diffusion pipeline folder. "
                "Give one with unet/, vae/, text_encoder/ and tokenizer/, or a hub id."
            )
    encoder = _local(image_encoder, [*_FILES, "preprocessor_config.json"]) if image_encoder else base / "image_encoder"
    if not (encoder / "config.json").is_file():
        raise FileNotFoundError(
            f"No image encoder in {encoder}. Give a folder, or image_encoder=h94/IP-Adapter/models/image_encoder."
        )
    return BaseFiles(
        id=name_of(pretrained_model_name_or_path),
        folder=base,
        image_encoder=encoder,
        image_processor=encoder if image_encoder else base / "feature_extractor",
        weights=tuple(_weights([*(base / part for part in PARTS), encoder])),
    )


def name_of(name_or_path: str) -> str:
    """Return a hub id unchanged, and of a folder its name: what may be written into an adapter's config.json."""
    return Path(os.path.abspath(name_or_path)).name if os.path.isdir(name_or_path) else name_or_path


def _local(name_or_path: str, patterns: Sequence[str]) -> Path:
    """Return the local folder of a path, of a shipped id, or of `owner/name[/sub/folder]` on the hub, downloading
    `patterns` of it."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    if name_or_path.startswith(OWNER):
        return find_model(name_or_path, WEIGHTS)
    parts = name_or_path.split("/")
    if os.path.isabs(name_or_path) or name_or_path.startswith(".") or len(parts) < 2:
        raise FileNotFoundError(f"No model folder at {name_or_path}. Give a diffusers folder that exists, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, sub = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        found = snapshot_download(repo, allow_patterns=[f"{sub}/{name}" if sub else name for name in patterns])
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # offline and unreachable hubs are OSErrors
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}). Check the spelling, or download it where there is a network and give the "
            "folder's absolute path."
        ) from error
    return Path(found) / sub


def _weights(folders: Iterable[Path]) -> Iterable[Path]:
    """Yield the safetensors files that from_pretrained reads in each folder: one file, or the shards of its index."""
    for folder in folders:
        single = [
            folder / n for n in ("diffusion_pytorch_model.safetensors", "model.safetensors") if (folder / n).is_file()
        ]
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        if single:
            yield single[0]
        elif indexes:
            index = json.loads(indexes[0].read_text())
            yield from (folder / shard for shard in sorted(set(index["weight_map"].values())))
        else:
            raise FileNotFoundError(f"No safetensors weights in {folder}. Convert them: pickled files are not opened.")
