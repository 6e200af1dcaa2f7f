"""A training run: what it writes, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from ray.train.v2.api.exceptions import WorkerGroupError
from safetensors.torch import load_file

from factory.files import check_sealed
from serving.engine import Engine
from serving.recipe import Recipe
from tests.lines import files, write_lines
from trainer import loop
from trainer.__main__ import main
from trainer.adapter import WEIGHTS, Adapter, AdapterConfig, read_config
from trainer.backbone import ddim, load_backbone
from trainer.base import find_base
from trainer.config import DataConfig, TrainerConfig, WorkersConfig
from trainer.run import Run

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("data") / "lines")


@pytest.fixture(scope="module")
def config(dataset: str, twin: Path) -> TrainerConfig:
    return TrainerConfig(
        pretrained_model_name_or_path=str(twin),
        data=DataConfig(root=dataset, resolution=64, validation_samples=3),
        workers=WorkersConfig(num_workers=2, zero_stage=1),
        learning_rate=1e-3,
        max_train_steps=6,
        train_batch_size=4,
        gradient_accumulation_steps=2,
        checkpointing_steps=3,
        validation_steps=3,
        seed=5,
    )


@pytest.fixture(scope="module")
def whole(ray_session: str, config: TrainerConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in one go, on two workers with ZeRO-1."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    summary = loop.fit(dataclasses.replace(config, output=str(output)))
    assert summary["step"] == 6
    return output


def test_a_run_logs_every_step_and_writes_sealed_folders(whole: Path, dataset: str, twin: Path):
    history = Run(whole).history()
    steps = [record for record in history if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0.5 < record["loss"] < 2 for record in steps)  # the noise has variance 1, the base is random
    assert set(steps[0]) == {
        *("step", "loss", "learning_rate", "data_wait", "peak_memory_mib", "samples_per_second", "seconds")
    }
    validations = {record["step"]: record["validation_loss"] for record in history if "validation_loss" in record}
    assert list(validations) == [0, 3, 6]
    (base,) = [record for record in history if "base_validation_loss" in record]
    assert base["step"] == 0
    assert 0.5 < base["base_validation_loss"] < 2
    assert base["base_validation_loss"] != base["validation_loss"]  # a new adapter adds something already

    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-3", "step-6"]
    for folder in ("adapter", "best", "checkpoints/step-3", "checkpoints/step-6"):
        check_sealed(whole / folder)
    assert not (whole / ".ray").exists()
    assert files(whole / "adapter") == files(whole / "checkpoints" / "step-6" / "adapter")
    best = read_config(whole / "best")
    assert best["validation_loss"] == min(validations[3], validations[6]) == validations[best["step"]]

    facts = read_config(whole)
    assert facts["step"] == 6
    hashed = find_base(str(twin)).hash()
    assert facts["base"] == {
        "id": twin.name,
        "weights_hash": hashed,
        "image_encoder": None,
        "random_weights": True,
    }
    assert facts["dataset"] == {"uri": "lines", "version": 1, "tag": None, "samples": 10}
    assert facts["preprocessing"]["size"] == 56
    assert str(twin.parent) not in json.dumps(facts)
    assert str(Path(dataset).parent) not in json.dumps(facts)


def test_only_the_adapter_is_trained(whole: Path, config: TrainerConfig, twin: Path):
    base = load_backbone(str(twin))
    torch.manual_seed(config.seed)
    start = Adapter.for_unet(base.unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64)).state_dict()
    end = Adapter.from_pretrained(whole).state_dict()
    assert start.keys() == end.keys()
    moved = {key: (end[key] - start[key]).abs().max().item() for key in start}
    assert all(0 < change < 0.05 for change in moved.values()), moved  # AdamW: about 1e-3 a step
    state = load_file(whole / "adapter" / "ip_adapter.safetensors")
    saved = load_file(whole / "checkpoints" / "step-6" / "state" / "optimizer.safetensors")
    assert saved.keys() == {f"{moment}.{key}" for moment in ("exp_avg", "exp_avg_sq") for key in state}
    assert all(tensor.shape == state[key.partition(".")[2]].shape for key, tensor in saved.items())
    assert not [path for path in whole.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]  # nothing to unpickle


def test_stock_diffusers_draws_our_picture_from_every_checkpoint(whole: Path, twin: Path):
    sketch = np.random.default_rng(3).integers(0, 256, (8, 16), dtype=np.uint8)
    reference = Image.fromarray(sketch).resize((160, 80), Image.Resampling.NEAREST).convert("RGB")
    seen = []
    for folder in (whole / "checkpoints" / "step-3", whole / "checkpoints" / "step-6"):
        recipe = Recipe(prompt="line art", reference=reference, num_inference_steps=3, adapter_scale=1.0, seed=7)
        (ours,) = Engine.load(str(folder / "adapter"), base=str(twin)).infer(recipe)
        stock = StableDiffusionPipeline.from_pretrained(twin, local_files_only=True)
        stock.scheduler = ddim()
        stock.set_progress_bar_config(disable=True)
        stock.load_ip_adapter(str(folder), subfolder="adapter", weight_name=WEIGHTS, image_encoder_folder=None)
        stock.set_ip_adapter_scale(1.0)
        theirs = stock(
            recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            ip_adapter_image=reference.resize((56, 56)),  # stock would crop its centre
            num_inference_steps=3,
            guidance_scale=recipe.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]
        assert abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() < 2
        seen.append(np.asarray(ours).astype(int))
    assert abs(seen[0] - seen[1]).max() >= 2  # each drew with its own weights


def test_three_steps_and_again_to_six_equal_six_in_one_go_also_past_a_damaged_checkpoint(
    whole: Path, config: TrainerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    part = dataclasses.replace(config, output=str(tmp_path / "parts"), checkpointing_steps=1)
    loop.fit(dataclasses.replace(part, max_train_steps=3))
    damaged = tmp_path / "parts" / "checkpoints" / "step-3" / "adapter" / "config.json"
    damaged.write_text(damaged.read_text().replace("3", "4"))
    (tmp_path / "parts" / "checkpoints" / ".step-4.0.tmp").mkdir()  # what a killed writer leaves
    # validations beyond the newest good checkpoint: a worker that counts them waits where the other does not. So many
    # that dropping them takes a second: a worker that reads the file for itself reads it before
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write((json.dumps({"step": 3, "validation_loss": 1e-9}) + "\n") * 200_000)
    shutil.rmtree(tmp_path / "parts" / "best")

    capsys.readouterr()
    assert loop.fit(part)["step"] == 6
    assert "step-3 is damaged and not used" in capsys.readouterr().out

    ours, theirs = _weights(tmp_path / "parts"), _weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert _losses(tmp_path / "parts") == _losses(whole)
    assert _losses(tmp_path / "parts", "validation_loss") == _losses(whole, "validation_loss")
    ours, theirs = _weights(tmp_path / "parts", "best"), _weights(whole, "best")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-5", "step-6"]


def test_one_worker_goes_on_where_two_stopped_to_the_same_losses(whole: Path, config: TrainerConfig, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    changes = {"workers": WorkersConfig(num_workers=1, zero_stage=3), "gradient_accumulation_steps": 1}
    loop.fit(dataclasses.replace(config, output=str(tmp_path / "run"), **changes))  # type: ignore[arg-type]
    ours, theirs = _losses(tmp_path / "run"), _losses(whole)
    assert [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    apart = {step: abs(a - b) for (step, a), (_, b) in zip(ours, theirs, strict=True)}
    # step 4 is made by the weights, step 5 by the optimizer's state; a random base then blows rounding up, which
    # tests/test_soak_training.py follows for 20 steps on one that has learned
    assert apart[4] < 1e-6
    assert apart[5] < 1e-5


def _losses(run: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in Run(run).history() if name in record]


def _weights(run: Path, folder: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "ip_adapter.safetensors")


def test_a_new_adapter_is_aligned_first_alike_on_any_number_of_workers(
    ray_session: str, config: TrainerConfig, tmp_path: Path
):
    def run(name: str, workers: int, **changes: object) -> dict[str, torch.Tensor]:
        one = dataclasses.replace(config.workers, num_workers=workers)
        still = {"learning_rate": 1e-9, "max_train_steps": 1, "gradient_accumulation_steps": 1, "workers": one}
        loop.fit(dataclasses.replace(config, output=str(tmp_path / name), **still | changes))  # type: ignore[arg-type]
        return Adapter.from_pretrained(tmp_path / name).state_dict()

    alone, shared = run("alone", 1, alignment_steps=5), run("shared", 2, alignment_steps=5)
    torch.manual_seed(config.seed)
    sizes = AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64)
    new = Adapter.for_unet(load_backbone(config.pretrained_model_name_or_path).unet, sizes).state_dict()
    for key, value in alone.items():
        moved, apart = (value - new[key]).norm().item(), (value - shared[key]).norm().item()
        assert moved > 1e-5, key
        assert apart < 0.5 * moved, (key, apart, moved)  # Muon rounds to bf16
    begun = run("begun", 1, alignment_steps=5, adapter=str(tmp_path / "alone"))  # no new one: left as it is
    assert all(torch.allclose(begun[key], alone[key], atol=1e-7) for key in alone)


def test_a_finished_run_says_so_and_does_nothing(
    whole: Path, config: TrainerConfig, capsys: pytest.CaptureFixture[str]
):
    before = files(whole)
    summary = loop.fit(dataclasses.replace(config, output=str(whole)))
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert summary["step"] == 6
    assert files(whole) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 2e-3}, "learning_rate=0.001"),
        ({"seed": 6}, "seed=5"),
        ({"train_batch_size": 8}, "train_batch_size=4"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=0.0"),
    ],
)
def test_a_run_made_otherwise_is_refused_by_the_setting_that_differs(
    whole: Path, config: TrainerConfig, change: dict, name: str
):
    with pytest.raises(ValueError, match=f"was made with {name}.*another --output"):
        loop.fit(dataclasses.replace(config, output=str(whole), **change))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(line, cwd=REPO, env=os.environ | environment, capture_output=True, text=True, timeout=240)


def test_the_command_ends_a_finished_run_with_zero_and_a_locked_one_with_one(
    whole: Path, config: TrainerConfig, capsys: pytest.CaptureFixture[str]
):
    names = ("learning_rate", "train_batch_size", "seed", "alignment_steps")
    changes = [f"{name}={getattr(config, name)}" for name in names]
    changes += [
        f"data.text_drop_rate={config.data.text_drop_rate}",
        f"data.random_flip={str(config.data.random_flip).lower()}",
        "gradient_accumulation_steps=2",
        "data.validation_samples=3",
        "max_train_steps=6",
    ]
    arguments = ["fit", "--root", config.data.root, "--output", str(whole), "--num-workers", "2"]
    arguments += ["--base", config.pretrained_model_name_or_path, *(f"--set={change}" for change in changes)]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 6
    with Run(whole).lock():
        done = command(*arguments)
    assert done.returncode == 1
    assert "Another process trains in" in done.stderr


def test_a_run_that_comes_to_nan_ends_and_one_without_a_checkpoint_begins_anew(
    ray_session: str, config: TrainerConfig, tmp_path: Path
):
    workers = dataclasses.replace(config.workers, num_workers=1)
    wild = dataclasses.replace(config, learning_rate=1e37, workers=workers, output=str(tmp_path / "wild"))
    for _ in range(2):
        with pytest.raises(WorkerGroupError, match=r"The loss of step 2 is not finite\. There is no checkpoint yet"):
            loop.fit(wild)
    run = Run(tmp_path / "wild")
    assert run.steps() == []
    assert [record["step"] for record in run.history()] == [0, 1]  # not those of the first time too
    soon = dataclasses.replace(wild, checkpointing_steps=1, output=str(tmp_path / "soon"))
    with pytest.raises(WorkerGroupError, match=r"step 2 is not finite\. The newest checkpoint is step-1\."):
        loop.fit(soon)
    assert Run(tmp_path / "soon").newest() == 1
