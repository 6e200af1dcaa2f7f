"""A training run: what it writes, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import lance
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from factory import schema, settings
from factory.files import SUMS, check_sealed, new_folder, seal, write_atomic
from trainer import loop
from trainer.__main__ import main
from trainer.adapter import Adapter, AdapterConfig, read_config
from trainer.backbone import ddim, load_backbone
from trainer.base import find_base
from trainer.config import DataConfig, TrainerConfig, WorkersConfig, micro, paper
from trainer.loss import add_noise, noise_loss
from trainer.run import Run

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset root with ten drawings to train on and three held out."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(13):
        width, height = [(96, 72), (72, 96), (80, 80)][number % 3]
        picture = np.full((height, width), 255, np.uint8)
        for points in rng.integers(0, 72, (6, 3, 2)).astype(np.int32):
            cv2.polylines(picture, [points], False, 0, 2, cv2.LINE_AA)
        rows.append(
            {
                "frame_id": f"source-{number:012d}",
                "source_id": "source",
                "training_sketch": cv2.imencode(".png", picture)[1].tobytes(),
                "caption": f"drawing {number}",
                "keywords": ["anime sketch", "line art"],
                "split": "train" if number < 10 else "validation",
                "selected": True,
            }
        )
    root = tmp_path_factory.mktemp("data") / "lines"
    table = schema.to_table("samples", rows)
    lance.write_dataset(table, str(root / "samples.lance"), data_storage_version=schema.STORAGE_VERSION)
    return str(root)


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


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_logs_every_step_and_writes_sealed_folders(whole: Path, dataset: str, twin: Path):
    history = Run(whole).history()
    steps = [record for record in history if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0.5 < record["loss"] < 2 for record in steps)  # the noise has variance 1, the base is random
    assert set(steps[0]) == {"step", "loss", "learning_rate", "samples_per_second", "seconds"}
    validations = {record["step"]: record["validation_loss"] for record in history if "validation_loss" in record}
    assert list(validations) == [0, 3, 6]

    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-3", "step-6"]
    for folder in ("adapter", "best", "checkpoints/step-3", "checkpoints/step-6"):
        check_sealed(whole / folder)
    assert not (whole / ".ray").exists()
    assert files(whole / "adapter") == files(whole / "checkpoints" / "step-6" / "adapter")
    best = read_config(whole / "best")
    assert best["validation_loss"] == min(validations[3], validations[6]) == validations[best["step"]]

    facts = read_config(whole)
    assert facts["step"] == 6
    assert facts["base"] == {"id": twin.name, "weights_hash": find_base(str(twin)).hash(), "random_weights": True}
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
    saved = [tensor for path in (whole / "checkpoints").rglob("*.pt") for tensor in _tensors(path)]
    assert max(tensor.numel() for tensor in saved) <= sum(tensor.numel() for tensor in state.values())


def _tensors(path: Path) -> list[torch.Tensor]:
    def find(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from find(item)

    return list(find(torch.load(path, weights_only=False)))


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
        ({"workers": WorkersConfig(num_workers=1)}, "num_workers=2"),
    ],
)
def test_a_run_made_otherwise_is_refused_by_the_setting_that_differs(
    whole: Path, config: TrainerConfig, change: dict, name: str
):
    with pytest.raises(ValueError, match=f"was made with {name}.*another --output"):
        loop.fit(dataclasses.replace(config, output=str(whole), **change))


# --- without Ray ---------------------------------------------------------------------------------------------------


def _checkpoint(run: Run, step: int) -> dict[str, bytes]:
    """Write a checkpoint as `Worker.save` does and return its adapter's files."""
    with new_folder(run.checkpoint(step)) as aside:
        (aside / "adapter").mkdir()
        write_atomic(aside / "adapter" / "config.json", f"{step}")
        seal(aside / "adapter")
    return files(run.checkpoint(step) / "adapter")


def test_the_adapter_becomes_the_newest_good_checkpoints_after_a_kill(tmp_path: Path):
    run, adapter = Run(tmp_path), tmp_path / "adapter"
    third = _checkpoint(run, 3)
    loop._mend(run)  # killed before there was one
    assert files(adapter) == third

    sixth = _checkpoint(run, 6)  # killed before it was published
    loop._mend(run)
    assert files(adapter) == sixth
    check_sealed(adapter)

    (adapter / "config.json").write_text("damaged")
    loop._mend(run)
    assert files(adapter) == sixth
    (adapter / SUMS).unlink()
    loop._mend(run)
    assert files(adapter) == sixth

    before = adapter.stat().st_ino
    loop._mend(run)  # nothing to do
    assert adapter.stat().st_ino == before

    (run.checkpoint(6) / "adapter" / "config.json").write_text("damaged")
    loop._mend(run)
    assert files(adapter) == third


ENGINE = """
import shutil, torch, torch.distributed as dist
assert not shutil.which("ninja") and not shutil.which("g++") and not shutil.which("cc")
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from trainer.adapter import Adapter, AdapterConfig
from trainer.backbone import load_backbone
from trainer.config import TrainerConfig
from trainer.worker import _engine
torch.set_num_threads(1)
torch.manual_seed(0)
unet = load_backbone("{twin}", dtype=torch.{dtype}).unet
adapter = Adapter.for_unet(unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64))
adapter.attach(unet)
engine = _engine(adapter, TrainerConfig(train_batch_size=1, learning_rate=1e-2, mixed_precision="{precision}"))
before = adapter.image_proj.latents.detach().clone()
x = [torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32), torch.randn(1, 17, 40)]
noise = engine(unet, *(value.to(unet.dtype) if value.is_floating_point() else value for value in x))
engine.backward(noise.float().square().mean())
engine.step()
moved = (adapter.image_proj.latents - before).abs().max().item()
print("moved", round(moved, 4), noise.dtype, adapter.image_proj.latents.dtype)
"""


@pytest.mark.parametrize(("precision", "dtype"), [("no", "float32"), ("bf16", "bfloat16")])
def test_training_needs_no_compiler_and_keeps_the_adapter_in_single_precision(
    tmp_path: Path, twin: Path, precision: str, dtype: str
):
    output = alone(ENGINE.format(file=tmp_path / "store", twin=twin, precision=precision, dtype=dtype), tmp_path)
    # AdamW's first step is the learning rate; weight decay adds a little
    assert f"moved 0.01 torch.{dtype} torch.float32" in output.replace("0.0101", "0.01")


def alone(script: str, home: Path) -> str:
    """Return what `script` prints in a process of its own, as the one DeepSpeed rank, with no program on its PATH."""
    environment = {"PATH": str(home), "HOME": str(home), "PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


CLIPPING = """
import copy, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from trainer.adapter import Adapter, AdapterConfig
from trainer.config import TrainerConfig, WorkersConfig
from trainer.worker import _engine
torch.set_num_threads(1)
torch.manual_seed(0)
start = Adapter(AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64), {{"1": 32}})
hidden = torch.randn(2, 17, 40)
for stage in (0, 1, 2):
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    for adapter in (ours, theirs):
        adapter.ip_adapter.requires_grad_(False)
        adapter.forward = adapter.image_tokens
    config = TrainerConfig(train_batch_size=1, learning_rate=1e-2, workers=WorkersConfig(zero_stage=stage))
    engine = _engine(ours, config)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=config.weight_decay)
    norms = []
    for factor in (1000, 10):
        engine.backward(factor * engine(hidden).square().mean())
        engine.step()
        optimizer.zero_grad()
        (factor * theirs(hidden).square().mean()).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None]).item())
        optimizer.step()
    pairs = zip(ours.image_proj.parameters(), theirs.image_proj.parameters(), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    assert min(norms) > 2 and norms[0] > 10 * norms[1], norms
    assert apart < 1e-6, (stage, apart)
print("equal")
"""


def test_two_steps_on_large_gradients_equal_plain_adamw(tmp_path: Path):
    assert "equal" in alone(CLIPPING.format(file=tmp_path / "store"), tmp_path)


NOISED = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from trainer.config import DataConfig, TrainerConfig
from trainer.data import Draw
from trainer.worker import Worker
data = DataConfig(root="{root}", resolution=64)
config = TrainerConfig(
    output="{output}", pretrained_model_name_or_path="{twin}", data=data, train_batch_size=3, mixed_precision="bf16"
)
worker = Worker(config, torch.device("cpu"), {{"base": {{}}, "preprocessing": {{}}}})
samples = worker.samples.read([0, 1, 2])
zeros = torch.zeros(4, 8, 8)
draws = [
    Draw(drop_image=False, drop_text=False, timestep=t, posterior_4hw=zeros, noise_4hw=torch.randn(4, 8, 8))
    for t in (0, 1, 5)
]
noisy, timesteps, _, _, target = worker._encode(samples, draws)
assert torch.equal(target, torch.stack([d.noise_4hw for d in draws])) and target.dtype == torch.float32
betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
alpha_bar = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
latents = worker.base.image_to_latents(torch.stack([s.target for s in samples]))
expected = alpha_bar.sqrt() * latents.double() + (1 - alpha_bar).sqrt() * target.double()
assert ((noisy.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()  # what rounding to bf16 leaves
print(noisy.dtype, latents.dtype)
"""


def test_a_bf16_run_has_the_right_noise_at_small_time_steps(tmp_path: Path, dataset: str, twin: Path):
    script = NOISED.format(file=tmp_path / "store", root=dataset, output=tmp_path / "run", twin=twin)
    assert "torch.bfloat16 torch.float32" in alone(script, tmp_path)


def test_noise_is_added_in_single_precision_whatever_the_latents_are():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator).bfloat16()
    timesteps = torch.tensor([0, 1, 5])
    noisy = add_noise(ddim(), latents, noise, timesteps)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    expected = alpha_bar.sqrt() * latents.double() + (1 - alpha_bar).sqrt() * noise.double()
    assert noisy.dtype == torch.float32
    assert (noisy - expected).abs().max() < 1e-5


def test_the_loss_is_the_mean_square_in_single_precision():
    a, b = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([0.0, 4.0])
    loss = noise_loss(a.view(1, 2, 1, 1), b.view(1, 2, 1, 1))
    assert (loss.item(), loss.dtype) == (2.5, torch.float32)


def test_presets_are_the_papers_and_small_numbers():
    config = paper()
    assert (config.learning_rate, config.weight_decay, config.max_train_steps) == (1e-4, 0.01, 100_000)
    assert (config.data.resolution, config.mixed_precision, config.workers.zero_stage) == (512, "bf16", 2)
    assert config.image_encoder == "h94/IP-Adapter/models/image_encoder"
    assert dataclasses.replace(micro(), max_train_steps=2).max_train_steps == 2
    changed = settings.load(micro(), None, ["workers.num_workers=2", "data.version=first"])
    assert (changed.workers.num_workers, changed.data.version) == (2, "first")
    with pytest.raises(ValueError, match="must be a multiple of num_workers 3"):
        dataclasses.replace(micro(), workers=WorkersConfig(num_workers=3))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(line, cwd=REPO, env=os.environ | environment, capture_output=True, text=True, timeout=240)


def test_help_teaches_and_wrong_usage_ends_with_two(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "ray job submit" in text
    for arguments, message in (
        (["fit", "--output", "/tmp/x"], "No dataset given"),
        (["fit", "--root", "/tmp/x"], "No run folder given"),
        (["fit", "--root", "/tmp/x", "--output", "/tmp/y", "--base", ""], "No base model given"),
        (["fit", "--set", "learning_rat=1"], "Did you mean learning_rate?"),
        (["fit", "--set", "data.resolution=100"], "multiple of 8"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_relative_paths_are_refused_in_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dataset: str
):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["fit", "--root", dataset, "--output", "runs/a", "--base", "/x"]) == 2
    assert '--output "$PWD/runs/a"' in capsys.readouterr().err
    assert main(["twin", "--output", "twin"]) == 2
    assert '--output "$PWD/twin"' in capsys.readouterr().err


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
