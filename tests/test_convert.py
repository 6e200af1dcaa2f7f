"""A published .bin to an adapter folder: what is kept, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.published import flat, nested
from trainer.__main__ import main
from trainer.adapter import Adapter, AdapterError, read_config
from trainer.backbone import load_backbone
from trainer.convert import convert


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("variant", ["plus", "base"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_published_pickle_keeps_keys_shapes_dtypes_and_values(
    tmp_path: Path, twin: Path, capsys: pytest.CaptureFixture[str], variant: str, dtype: torch.dtype
):
    state = nested(variant, dtype)
    file = written(tmp_path / "ip-adapter_twin.bin", state)
    assert main(["convert", str(file), "--output", str(tmp_path / "adapter")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["variant"], said["tensors"]) == (variant, len(flat(state)))

    saved = load_file(tmp_path / "adapter" / "ip_adapter.safetensors")
    assert saved.keys() == flat(state).keys()
    assert all(value.dtype == dtype and torch.equal(value, flat(state)[key]) for key, value in saved.items())
    assert read_config(tmp_path / "adapter")["source"]["file"] == "ip-adapter_twin.bin"
    assert str(tmp_path) not in (tmp_path / "adapter" / "config.json").read_text()
    Adapter.from_pretrained(tmp_path / "adapter").attach(load_backbone(str(twin)).unet)


def test_flat_keys_and_a_mix_of_dtypes_are_kept_too(tmp_path: Path):
    state = flat(nested())
    state["image_proj.latents"] = state["image_proj.latents"].float()
    state["ip_adapter.1.to_k_ip.weight"] = state["ip_adapter.1.to_k_ip.weight"].bfloat16()
    convert(written(tmp_path / "flat.pt", state), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "ip_adapter.safetensors")
    assert {key: value.dtype for key, value in saved.items()} == {key: value.dtype for key, value in state.items()}


def without(part: str, key: str) -> dict:
    state = nested()
    del state[part][key]
    return state


def changed(part: str, key: str, value: object) -> dict:
    state = nested()
    state[part][key] = value  # type: ignore[assignment]
    return state


class Bomb:
    def __reduce__(self):
        return (os.system, ("echo ran > bomb",))


WIDE = torch.zeros(1).expand(1 << 16, 1 << 16)  # 4 bytes on the disk, 17 GB when written out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (without("image_proj", "latents"), r"1 missing: image_proj\.latents"),
        (without("ip_adapter", "5.to_v_ip.weight"), r"1 missing: ip_adapter\.5\.to_v_ip\.weight"),
        (without("ip_adapter", "1.to_k_ip.weight"), r"ip_adapter\.1\.to_k_ip\.weight"),
        (changed("image_proj", "extra", torch.zeros(2)), r"1 unknown: image_proj\.extra"),
        (changed("image_proj", "norm_out.bias", torch.zeros(7)), r"image_proj\.norm_out\.bias \(7,\), not \(32,\)"),
        (changed("image_proj", "norm_out.bias", torch.zeros(32).long()), r"image_proj\.norm_out\.bias is torch\.int64"),
        (changed("image_proj", "norm_out.bias", [0.0] * 32), r"image_proj\.norm_out\.bias is list"),
        (changed("image_proj", "norm_out.bias", torch.full((32,), torch.nan)), r"norm_out\.bias holds NaN"),
        (
            changed("image_proj", "norm_out.bias", torch.zeros(32).to_sparse()),
            r"norm_out\.bias is torch\.float32, not a",
        ),
        (changed("image_proj", "norm_out.bias", WIDE), r"norm_out\.bias have more than"),
        ({**nested(), "ip_adapter": {}}, "nothing in ip_adapter"),
        ({**nested(), "ip_adapter": [1]}, "ip_adapter is list"),
        ({"unet.down.weight": torch.zeros(1)}, r"unet\.down\.weight where image_proj"),
        ({"image_proj": nested()["image_proj"]}, "ip_adapter is missing"),
        ({}, "nothing where image_proj"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"image_proj": {}, "ip_adapter": {"1": Bomb()}}, "could run code"),
        (Bomb(), "could run code"),
    ],
)
def test_anything_else_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, words: str
):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "odd.bin", content)
    with pytest.raises(AdapterError, match=words) as refused:
        convert(file, tmp_path / "adapter")
    assert "odd.bin" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.bin"]


def test_bare_pickles_other_files_and_large_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty.bin").write_bytes(b"")
    save_file(flat(nested()), tmp_path / "named.bin")
    bomb = tmp_path / "bomb.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(8 << 20))
    good = written(tmp_path / "good.bin", nested())
    for name, words, limit in (
        ("bare.bin", "not a file of torch.save", 1 << 30),
        ("empty.bin", "not a file of torch.save", 1 << 30),
        ("named.bin", "is a safetensors file", 1 << 30),
        ("bomb.bin", "unpacks to more than", 1 << 20),
        ("good.bin", "more than the 1,000 of any adapter", 1000),
    ):
        with pytest.raises(AdapterError, match=words):
            convert(tmp_path / name, tmp_path / "adapter", max_bytes=limit)
    with pytest.raises(FileNotFoundError, match=r"No file at .*absent\.bin"):
        convert(tmp_path / "absent.bin", tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds something already"):
        convert(good, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    assert not (tmp_path / "bomb").exists()
    assert not (tmp_path / "adapter").exists()
    assert main(["convert", str(tmp_path / "bare.bin"), "--output", str(tmp_path / "adapter")]) == 2


def test_damaged_files_are_refused_whatever_byte_it_is(tmp_path: Path):
    data = io.BytesIO()
    torch.save(nested(), data)
    whole, rng = data.getvalue(), random.Random(0)
    reference = flat(nested())
    file, refused = tmp_path / "damaged.bin", 0
    for number in range(60):
        damaged = bytearray(whole)
        if number % 2:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            adapter = convert(file, tmp_path / f"adapter{number}")
        except AdapterError:
            refused += 1
        else:  # a flip in the zip's padding or its times changes no tensor
            assert all(torch.equal(value.half(), reference[key]) for key, value in adapter.state_dict().items())
    assert refused >= 50
