"""Training without Ray: the adapter after a kill, precision, presets, and the command line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factory import settings
from factory.files import SUMS, check_sealed, new_folder, seal, write_atomic
from tests.lines import files, write_lines
from trainer import loop
from trainer.__main__ import main
from trainer.backbone import ddim
from trainer.config import WorkersConfig, micro, paper
from trainer.loss import add_noise, noise_loss
from trainer.run import Run

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("data") / "lines")


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
from trainer.engine import make_engine
torch.set_num_threads(1)
torch.manual_seed(0)
unet = load_backbone("{twin}", dtype=torch.{dtype}).unet
adapter = Adapter.for_unet(unet, AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64))
adapter.attach(unet)
engine = make_engine(adapter, TrainerConfig(train_batch_size=1, learning_rate=1e-2, mixed_precision="{precision}"))
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
from trainer.engine import make_engine, whole_parameters
torch.set_num_threads(1)
torch.manual_seed(0)
start = Adapter(AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=64), {{"1": 32}})
hidden = torch.randn(2, 17, 40)
for stage, longest in [(stage, longest) for stage in (0, 1, 2, 3) for longest in (0.0, 0.5)]:
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    for adapter in (ours, theirs):
        adapter.ip_adapter.requires_grad_(False)
        adapter.forward = adapter.image_tokens
    workers = WorkersConfig(zero_stage=stage)
    config = TrainerConfig(train_batch_size=1, learning_rate=1e-2, max_grad_norm=longest, workers=workers)
    engine = make_engine(ours, config)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=config.weight_decay)
    norms = []
    for factor in (1000, 10):
        engine.backward(factor * engine(hidden).square().mean())
        engine.step()
        optimizer.zero_grad()
        (factor * theirs(hidden).square().mean()).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None]).item())
        if longest:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), longest)
        optimizer.step()
    with whole_parameters(engine):
        pairs = zip(ours.image_proj.parameters(), theirs.image_proj.parameters(), strict=True)
        apart = [(a - b).abs() for a, b in pairs]
    assert min(norms) > 2 and norms[0] > 10 * norms[1], norms
    # where a gradient is but rounding, AdamW makes a step of it: clipped by a norm summed in another order, few differ
    apart = max(difference.mean().item() if longest else difference.max().item() for difference in apart)
    assert apart < 1e-6, (stage, longest, apart)
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
        dataclasses.replace(micro(), workers=WorkersConfig(num_workers=3)).samples_per_pass()


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
        (
            ["fit", "--root", "/tmp/x", "--output", "/tmp/y", "--num-workers", "3"],
            "must be a multiple of num_workers 3",
        ),
        (["plan", "--preset", "micro", "--num-workers", "3"], "must be a multiple of num_workers 3"),
        (["cache", "--num-workers", "3"], "No dataset given"),  # it has no batch to share
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
