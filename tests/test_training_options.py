"""What a run may be told beside the recipe: rates, weights, noise, trackers, pictures."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from factory import settings
from serving.engine import Engine
from serving.recipe import Recipe
from tests.lines import write_lines
from trainer import loop, tracker
from trainer.__main__ import main
from trainer.adapter import Adapter, AdapterConfig
from trainer.backbone import ddim, load_backbone
from trainer.config import DataConfig, PicturesConfig, TrainerConfig, micro
from trainer.data import draw
from trainer.loss import min_snr_weights, noise_loss
from trainer.optimizers import ema_decay_at, learning_rate_at
from trainer.pictures import asked, draw_picture, write_sheet
from trainer.run import Run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("data") / "lines")


# --- rates, weights, noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "warmup"), [("constant", 0), ("constant_with_warmup", 5), ("cosine", 4)])
def test_learning_rates_are_those_of_diffusers(name: str, warmup: int):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        ours = learning_rate_at(step, learning_rate=3e-4, scheduler=name, warmup=warmup, total=20)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_the_average_of_the_weights_is_that_of_diffusers():
    weight = torch.nn.Parameter(torch.zeros(3))
    theirs, ours = EMAModel([weight], decay=0.5), torch.zeros(3)
    for step in range(12):
        weight.data = torch.arange(3.0) * (step + 1) ** 2
        theirs.step([weight])
        ours.lerp_(weight.detach(), 1 - ema_decay_at(step, 0.5))
        assert torch.allclose(ours, theirs.shadow_params[0])
    assert ema_decay_at(1000, 0.999) == pytest.approx(1001 / 1010)


def test_min_snr_weights_noise_that_is_easily_told_less():
    timesteps = torch.tensor([0, 100, 500, 999])
    abar = ddim().alphas_cumprod.double()[timesteps]
    snr = abar / (1 - abar)
    weights = min_snr_weights(ddim(), timesteps, 5.0)
    assert torch.allclose(weights.double(), torch.minimum(snr, torch.tensor(5.0).double()) / snr)
    assert weights[0] < 0.01
    assert weights[2:].tolist() == [1, 1]

    made, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    each = torch.stack([noise_loss(a[None], b[None]) for a, b in zip(made, noise, strict=True)])
    assert noise_loss(made, noise, weights) == pytest.approx((each * weights).mean().item())
    assert noise_loss(made, noise, torch.ones(4)) == pytest.approx(noise_loss(made, noise).item())


def test_offset_noise_is_the_same_all_over_a_channel_and_nothing_else_changes():
    plain = [draw(0, step, 0, (4, 8, 8), DataConfig()) for step in range(200)]
    moved = [draw(0, step, 0, (4, 8, 8), DataConfig(), 0.1) for step in range(200)]
    offsets = torch.stack([b.noise_4hw - a.noise_4hw for a, b in zip(plain, moved, strict=True)])
    assert offsets.flatten(2).std(-1).max() < 1e-6
    assert offsets.mean((2, 3)).std().item() == pytest.approx(0.1, rel=0.1)
    assert all(
        a.timestep == b.timestep and torch.equal(a.posterior_4hw, b.posterior_4hw)
        for a, b in zip(plain, moved, strict=True)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lr_warmup_steps=10", "needs lr_scheduler=constant_with_warmup or cosine"),
        ("lr_scheduler=linear", "Setting lr_scheduler"),
        ("ema_decay=1", "ema_decay must be below 1"),
        ("max_grad_norm=-1", "max_grad_norm must be 0 or more"),
        ("snr_gamma=.nan", "snr_gamma must be 0 or more"),
        ("noise_offset=.inf", "noise_offset must be 0 or more"),
        ("workers.zero_stage=4", "Setting workers.zero_stage"),
        ("pictures.prompts=[a, b]", "prompts must be 4, one for each picture"),
        ("pictures.num_inference_steps=1000", "from 1 to 999"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(change: str, words: str):
    with pytest.raises(ValueError, match=words):
        settings.load(micro(), None, [change])


# --- trackers ------------------------------------------------------------------------------------------------------


class FakeService:
    """A module that stands in for TensorBoard's, wandb and mlflow, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.util = SimpleNamespace(generate_id=lambda: "id-1")

    def SummaryWriter(self, folder: str, purge_step: int) -> Any:  # noqa: N802
        self.told.append(("open", Path(folder).name, purge_step))
        close = functools.partial(self.told.append, "closed")
        return SimpleNamespace(add_scalar=lambda *scalar: self.told.append(scalar), flush=lambda: None, close=close)

    def init(self, **given: Any) -> Any:
        self.told.append(("open", given["id"], given["resume"]))
        finish = functools.partial(self.told.append, "closed")
        return SimpleNamespace(log=self.told.append, define_metric=lambda *_, **__: None, finish=finish)

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.told.append(("open", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    def end_run(self) -> None:
        self.told.append("closed")

    def log_params(self, settings: dict[str, Any]) -> None:
        self.told.append(settings)

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((step, numbers))


@pytest.mark.parametrize(
    ("name", "module", "told", "again"),
    [
        ("tensorboard", "torch.utils.tensorboard", [("open", "tensorboard", 1), ("loss", 0.5, 7)], "tensorboard"),
        ("wandb", "wandb", [("open", "id-1", "allow"), {"loss": 0.5, "step": 7}], "id-1"),
        ("mlflow", "mlflow", [("open", None, "run"), {"seed": 3}, (7, {"loss": 0.5})], "run-1"),
    ],
)
def test_a_tracker_gets_the_numbers_and_a_resumed_run_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, told: list[Any], again: str
):
    service = FakeService()
    monkeypatch.setitem(sys.modules, module, service)  # type: ignore[arg-type]
    run = Run(tmp_path / "run")
    tracker.check(name)
    tracked = tracker.Tracker(name, run, 0, {"seed": 3})
    tracked.report(7, {"loss": 0.5})
    tracked.close(7)
    assert service.told == [*told, "closed"]
    tracker.Tracker(name, run, 7, {"seed": 3})
    assert again in service.told[-1]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    tmp_path: Path, dataset: str, twin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # type: ignore[arg-type]
    output = tmp_path / "run"
    arguments = ["--root", dataset, "--output", str(output), "--base", str(twin), "--report-to", "mlflow"]
    assert main(["fit", *arguments]) == 2
    assert "pip install mlflow" in capsys.readouterr().err
    assert not (output / "run.json").exists()


def test_a_tracker_that_fails_is_told_of_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    service = FakeService()
    monkeypatch.setitem(sys.modules, "mlflow", service)  # type: ignore[arg-type]
    tracked = tracker.Tracker("mlflow", Run(tmp_path), 0, {})

    def fail(numbers: dict[str, float], step: int) -> None:
        raise ConnectionError("no route to the service")

    service.log_metrics = fail  # type: ignore[method-assign]
    tracked.report(1, {"loss": 1.0})
    tracked.report(2, {"loss": 1.0})
    tracked.close(2)
    told = capsys.readouterr().out
    assert told.count("mlflow failed at step 1") == 1
    assert "no route to the service" in told
    assert "closed" not in service.told
    monkeypatch.setattr(service, "start_run", lambda **_: 1 / 0)  # nor does one that can't be opened
    tracker.Tracker("mlflow", Run(tmp_path), 5, {}).report(6, {"loss": 1.0})
    assert "mlflow failed at step 5" in capsys.readouterr().out


# --- pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_sheet_is_the_one_that_the_server_draws(tmp_path: Path, dataset: str, twin: Path):
    base = load_backbone(str(twin))
    torch.manual_seed(0)
    adapter = Adapter.for_unet(base.unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64))
    adapter.attach(base.unet)
    config = PicturesConfig(steps=1, count=2, num_inference_steps=3, seed=4, guidance_scale=3.0)
    wanted = asked(TrainerConfig(data=DataConfig(root=dataset, resolution=64), pictures=config))
    assert [prompt for prompt, _ in wanted] == [f"drawing {i}, anime sketch, line art" for i in (10, 11)]
    prompt, reference = wanted[1]
    ours = draw_picture(base, adapter, prompt, reference, config, side=64, seed=5)
    recipe = Recipe(prompt=prompt, reference=reference, num_inference_steps=3, seed=5, guidance_scale=3.0)
    (theirs,) = Engine(base, adapter).infer(recipe)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1

    write_sheet([(reference, ours)] * 3, tmp_path / "pictures" / "step-1.png")
    with Image.open(tmp_path / "pictures" / "step-1.png") as sheet:
        assert sheet.size == (128, 192)
        assert np.array_equal(np.asarray(sheet.crop((64, 64, 128, 128))), np.asarray(ours))


def test_texts_and_references_may_be_given(tmp_path: Path, dataset: str):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    config = TrainerConfig(
        data=DataConfig(root=str(tmp_path / "none")),  # is not asked
        pictures=PicturesConfig(count=1, prompts=("a cat",), references=(str(tmp_path / "a.png"),)),
    )
    ((prompt, reference),) = asked(config)
    assert (prompt, reference.size, reference.getpixel((0, 0))) == ("a cat", (30, 20), (255, 0, 0))
    for path, error in (("none.png", FileNotFoundError), ("bad.png", ValueError)):
        (tmp_path / "bad.png").write_text("no picture")
        one = dataclasses.replace(config.pictures, references=(str(tmp_path / path),))
        with pytest.raises(error, match=path):
            asked(dataclasses.replace(config, pictures=one))


# --- a run with all of them ----------------------------------------------------------------------------------------


def test_a_run_with_all_options_goes_on_to_the_same_average(
    ray_session: str, dataset: str, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings.load(
        TrainerConfig(
            output=str(tmp_path / "run"),
            pretrained_model_name_or_path=str(twin),
            data=DataConfig(root=dataset, resolution=64, validation_samples=2),
            train_batch_size=4,
            max_train_steps=4,
            checkpointing_steps=2,
            validation_steps=2,
        ),
        None,
        [
            *("workers.num_workers=2", "workers.zero_stage=3", "learning_rate=1e-3", "lr_scheduler=cosine"),
            *("lr_warmup_steps=1", "max_grad_norm=0.5", "snr_gamma=5", "noise_offset=0.1", "ema_decay=0.6"),
            *("gradient_checkpointing=true", "pictures={steps: 2, count: 2, num_inference_steps: 2}"),
        ],
    )
    loop.fit(config)
    run = Run(config.output)
    steps = [record for record in run.history() if "loss" in record]
    assert [record["learning_rate"] for record in steps] == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3])
    assert all(0 <= record["data_wait"] <= record["seconds"] and record["peak_memory_mib"] > 100 for record in steps)
    assert {path.name: _size(path) for path in (run.folder / "pictures").iterdir()} == {
        "step-2.png": (128, 128),
        "step-4.png": (128, 128),
    }
    assert json.loads((run.checkpoint(2) / "run.json").read_text())["ema_decay"] == 0.6

    def end() -> tuple[Any, ...]:
        losses = [(record["step"], record.get("loss"), record.get("validation_loss")) for record in run.history()]
        names = ("adapter/ip_adapter.safetensors", "state/optimizer.safetensors")
        return losses, *((run.checkpoint(4) / name).read_bytes() for name in names)

    once = end()
    shutil.rmtree(run.checkpoint(4))
    loop.fit(config)
    assert end() == once
    with pytest.raises(ValueError, match="made with max_train_steps=4, this command says 5"):
        loop.fit(dataclasses.replace(config, max_train_steps=5))


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
