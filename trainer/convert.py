"""A published IP-Adapter file (`.bin`, `.pt`: a torch pickle) to an adapter folder. The one place that reads a pickle.

It is read once, whole, and unpickled by torch with `weights_only=True`, which makes tensors and plain containers only.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapter import Adapter, AdapterError

PARTS = ("image_proj", "ip_adapter")
MAX_BYTES = 2 << 30  # the largest published file, for SDXL, has 0.9 GB
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(file: str | Path, folder: str | Path, *, max_bytes: int = MAX_BYTES) -> Adapter:
    """Write the adapter in a published `.bin` or `.pt` to `folder` and return it; keys, shapes and dtypes stay.

    Nested {"image_proj": {…}, "ip_adapter": {…}} or flat ("image_proj.…"). FileNotFoundError when there is none,
    FileExistsError when `folder` holds something, AdapterError for what is no such file: one with code, a damaged one,
    one with tensors that are missing, unknown, of odd shape or dtype, or not finite, or one above `max_bytes`.
    """
    file, folder = Path(file), Path(folder)
    if not file.is_file():
        raise FileNotFoundError(f"No file at {file}. Give a published adapter, such as ip-adapter-plus_sd15.bin.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already. Give another --output.")
    size = file.stat().st_size
    if size > max_bytes:
        raise AdapterError(f"{file} has {size:,} bytes, more than the {max_bytes:,} of any adapter that is known.")
    data = file.read_bytes()
    adapter = Adapter.from_state(_flat(_unpickle(data, file, max_bytes), file, max_bytes), name=str(file))
    adapter.save_pretrained(folder, source={"file": file.name, "sha256": hashlib.sha256(data).hexdigest()})
    return adapter


def _unpickle(data: bytes, file: Path, max_bytes: int) -> Any:
    """Return what torch's restricted unpickler makes of `data`; AdapterError for anything that is not a whole file."""
    if file.suffix == ".safetensors" or data[8:9] == b"{":
        raise AdapterError(
            f"{file} is a safetensors file: it needs no conversion, give it wherever an adapter is asked."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > max_bytes:
                raise AdapterError(f"{file} unpacks to more than {max_bytes:,} bytes: it is no adapter.")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, zlib.error) as error:
        raise AdapterError(
            f"{file} is damaged or not a file of torch.save ({error}). Download it again, or take the .safetensors."
        ) from None
    if damaged:
        raise AdapterError(f"{file} is damaged: {damaged} in it does not match its checksum. Download it again.")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(iter(str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()), "")
        raise AdapterError(
            f"{file} holds more than tensors, and was not opened: it could run code ({reason}). Take the .safetensors."
        ) from None
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise AdapterError(f"{file} is not a whole file of torch.save ({error}). Download it again.") from None


def _flat(loaded: Any, file: Path, max_bytes: int) -> dict[str, Tensor]:
    """Return the tensors by flat key ("image_proj.latents"); AdapterError naming what is no tensor of an adapter."""
    if not isinstance(loaded, Mapping):
        raise AdapterError(f"{file} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    if loaded and set(loaded) <= set(PARTS):
        for part in PARTS:
            if not isinstance(loaded.get(part), Mapping):
                what = type(loaded[part]).__name__ if part in loaded else "missing"
                raise AdapterError(f"{file}: {part} is {what}, not a dictionary of tensors.")
        loaded = {f"{part}.{key}": value for part in PARTS for key, value in loaded[part].items()}
    strange = [str(key) for key in loaded if str(key).split(".")[0] not in PARTS]
    if strange or not loaded:
        raise AdapterError(
            f"{file} has {', '.join(strange[:3]) or 'nothing'}{', …' if len(strange) > 3 else ''} where image_proj and "
            "ip_adapter are wanted. A training checkpoint is no adapter file: convert it as its authors say."
        )
    total = 0
    for key, value in loaded.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in DTYPES:
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise AdapterError(f"{file}: {key} is {what}, not a dense tensor of float32, float16 or bfloat16.")
        total += value.numel() * value.itemsize  # a view may be larger than what it was stored in
        if total > max_bytes:
            raise AdapterError(f"{file}: its tensors up to {key} have more than {max_bytes:,} bytes: it is no adapter.")
        if not torch.isfinite(value).all():
            raise AdapterError(f"{file}: {key} holds NaN or infinity: this adapter can't have worked.")
    return dict(loaded)
