"""A run's adapter for the hub: what the folder holds, that its card tells the truth, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from factory.files import check_sealed, new_folder, write_atomic
from tests.published import flat, nested
from trainer.__main__ import main
from trainer.adapter import Adapter, AdapterError
from trainer.backbone import load_backbone
from trainer.export import export
from trainer.run import Run

FACTS: dict[str, Any] = {
    "base": {"id": "twin", "weights_hash": "ab" * 32, "image_encoder": None, "random_weights": True},
    "dataset": {"uri": "lines", "version": 3, "tag": "spring", "samples": 1818},
    "training": {"learning_rate": 1e-4, "train_batch_size": 8},
    "preprocessing": {
        "resolution": 64,
        "target_column": "image",
        "reference_column": "training_sketch",
        "reference": "resized to a square",
        "size": 56,
        "features": "hidden_states[-2]",
    },
    "code_version": "0123456789ab",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints at steps 2 and 4, the best at 2, and sheets of pictures."""
    folder = tmp_path / "run"
    for step in (2, 4):
        adapter = Adapter.from_state(flat(nested()), name="synthetic")
        with torch.no_grad():
            adapter.image_proj.norm_out.bias.fill_(step)
        with new_folder(folder / "checkpoints" / f"step-{step}") as aside:
            adapter.save_pretrained(aside / "adapter", **FACTS, step=step)
            write_atomic(aside / "state", "optimizer")
        if step == 2:
            adapter.save_pretrained(folder / "best", **FACTS, step=2, validation_loss=0.25)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "pictures" / f"step-{step}.png")
    record = Run(folder)
    record.publish_adapter(4)
    record.claim({"seed": 0, "data.keywords": True})
    for at, loss in ((0, 1.0), (2, 0.25), (4, 0.5)):
        record.log({"step": at, "validation_loss": loss})
        record.log({"step": at, "loss": loss})
    return folder


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_folder_for_the_hub_holds_weights_card_pictures_and_sums(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hub = tmp_path / "line-adapter"
    assert main(["export", str(run), "--output", str(hub), "--license", "cc-by-4.0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(hub), "license": "cc-by-4.0"}
    check_sealed(hub)
    names = sorted(path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "ip_adapter.safetensors",
        "pictures/step-2.png",
        "pictures/step-4.png",
    ]
    assert (hub / "ip_adapter.safetensors").read_bytes() == (run / "adapter" / "ip_adapter.safetensors").read_bytes()
    assert front(hub) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "cc-by-4.0",
        "tags": ["ip-adapter", "image-prompt", "stable-diffusion", "line-art", "anime"],
    }
    card = (hub / "README.md").read_text()
    for words in (
        "# line-adapter",
        "IP-Adapter-Plus (16 image tokens)",
        "ab" * 32,
        "| learned pictures | `image`, 64 px |",
        "lines, version 3 (tag spring), 1,818 samples",
        "learning_rate 0.0001, train_batch_size 8",
        "| 2 | 0.2500 (least) |",
        "| 4 | 0.5000 |",
        "The base has random weights",
        "(pictures/step-4.png)",
    ):
        assert words in card
    assert str(tmp_path) not in card


def test_the_card_of_a_hub_base_names_it_and_its_image_encoder(run: Path, tmp_path: Path):
    base = {"id": "owner/base-model", "weights_hash": "cd" * 32, "image_encoder": "h94/IP-Adapter/models/image_encoder"}
    adapter = Adapter.from_pretrained(run)
    adapter.save_pretrained(run / "best", **(FACTS | {"base": base}), step=2)
    export(run, tmp_path / "hub", step="best", license=None)
    assert front(tmp_path / "hub")["base_model"] == "owner/base-model"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'from_pretrained("h94/IP-Adapter", subfolder="models/image_encoder")' in card
    assert "random weights" not in card


def test_a_licence_that_nobody_gave_stays_unknown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), "--output", str(tmp_path / "hub")]) == 0
    assert "No --license was given: the card says unknown." in capsys.readouterr().err
    assert front(tmp_path / "hub")["license"] == "unknown"
    assert "licence | unknown: nobody has said so far" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(("step", "value", "pictures"), [("2", 2, 1), ("4", 4, 2), ("best", 2, 1), (None, 4, 2)])
def test_the_step_that_is_asked_for_is_exported(run: Path, tmp_path: Path, step: str | None, value: int, pictures: int):
    chosen = ["--step", step] if step else []
    assert main(["export", str(run), "--output", str(tmp_path / "hub"), *chosen]) == 0
    assert Adapter.from_pretrained(tmp_path / "hub").image_proj.norm_out.bias[0] == value
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"| step | {value} |" in card
    assert ("| 4 | 0.5000 |" in card) == (value == 4)  # no losses from after the step
    assert card.count("](pictures/") == pictures


def test_a_run_without_pictures_is_told_how_to_get_some(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hint = "--set pictures.steps=N"
    assert main(["export", str(run), "--output", str(tmp_path / "with")]) == 0
    assert hint not in capsys.readouterr().err
    shutil.rmtree(run / "pictures")
    assert main(["export", str(run), "--output", str(tmp_path / "without")]) == 0
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "keywords", "prompt"),
    [
        ("training_sketch", True, "a girl with long red hair, anime sketch, line art"),
        ("training_sketch", False, "a girl with long red hair"),
        ("image", True, "a girl with long red hair"),
    ],
)
def test_the_example_s_text_suits_what_was_learned(run: Path, tmp_path: Path, target: str, keywords: bool, prompt: str):
    facts = FACTS | {"preprocessing": {**FACTS["preprocessing"], "target_column": target}}
    Adapter.from_pretrained(run).save_pretrained(run / "best", **facts, step=2)
    (run / "run.json").write_text(json.dumps({"data.keywords": keywords}))
    export(run, tmp_path / "hub", step="best")
    assert f'pipeline("{prompt}", ip_adapter_image' in (tmp_path / "hub" / "README.md").read_text()


def test_the_card_s_own_code_draws_with_stock_diffusers_and_sees_a_wide_reference_as_training_did(
    run: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export(run, tmp_path / "hub")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "hub")
    noise = np.random.default_rng(3).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    wide = Image.fromarray(noise).resize((192, 64), Image.Resampling.NEAREST)
    wide.save("reference.png")
    assert 'base = "twin"  # its folder' in code
    code = code.replace('base = "twin"', f'base = "{twin}"').replace("num_inference_steps=50", "num_inference_steps=2")
    names: dict[str, Any] = {}
    exec(code, names)
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)

    def seen(reference: Image.Image) -> torch.Tensor:
        return names["pipeline"].encode_image(reference, "cpu", 1, output_hidden_states=True)[0]

    ours = load_backbone(str(twin)).encode_image([wide])
    assert (seen(names["reference"]) - ours).abs().max() < 1e-5
    assert (seen(wide) - ours).abs().max() > 0.1  # what diffusers sees of it unasked: the centre


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "step"),
    [
        ("adapter/ip_adapter.safetensors", None),
        ("adapter/config.json", None),
        ("best/ip_adapter.safetensors", "best"),
        ("checkpoints/step-2/adapter/ip_adapter.safetensors", 2),
        ("checkpoints/step-2/state", 2),
    ],
)
def test_a_damaged_run_is_refused_by_the_name_of_its_file(
    run: Path, tmp_path: Path, damaged: str, step: int | str | None
):
    flipped(run / damaged)
    with pytest.raises(AdapterError, match=Path(damaged).name):
        export(run, tmp_path / "hub", step=step)
    assert not (tmp_path / "hub").exists()


def test_what_is_not_there_or_in_the_way_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FileNotFoundError, match=r"step-3/adapter is not there.*4, 2, best"):
        export(run, tmp_path / "hub", step=3)
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        export(run / "adapter", tmp_path / "hub")
    with pytest.raises(FileExistsError, match="holds something already"):
        export(run, run)
    Adapter.from_pretrained(run).save_pretrained(run / "best", base={})
    with pytest.raises(AdapterError, match=r"config\.json has no dataset"):
        export(run, tmp_path / "hub", step="best")
    assert main(["export", str(run), "--output", str(tmp_path / "hub"), "--step", "last"]) == 2
    assert "--step is a checkpoint's number or best, got 'last'" in capsys.readouterr().err
