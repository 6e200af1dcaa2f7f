"""Checkpoints: damage is seen wherever it is, and the optimizer's state fits any number of workers and any stage."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from factory.files import new_folder, seal, write_atomic
from trainer.run import Run

REPO = Path(__file__).parent.parent
FILES = ("adapter/config.json", "adapter/ip_adapter.safetensors", "state/optimizer.safetensors", "run.json")


def checkpoint(run: Run, step: int) -> Path:
    """Write a checkpoint with the files that `Worker.save` leaves, of random bytes."""
    rng = random.Random(step)
    with new_folder(run.checkpoint(step)) as aside:
        for name in FILES[:2]:
            write_atomic(aside / name, rng.randbytes(300))
        seal(aside / "adapter")
        for name in FILES[2:]:
            write_atomic(aside / name, rng.randbytes(300))
    return run.checkpoint(step)


def damage(folder: Path, rng: random.Random) -> str:
    """Damage a checkpoint as disks and broken copies do, and say how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = rng.choice(("flip", "cut", "half a copy"))
    if kind == "half a copy":  # files come one after the other, the last one not to its end
        order = rng.sample(files, len(files))
        for path in order[rng.randrange(len(order)) :]:
            path.unlink()
        return kind
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    return f"{kind} in {path.relative_to(folder)}"


def test_a_hundred_of_a_hundred_damaged_checkpoints_are_refused_by_name_for_the_good_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.fsync", lambda _: None)
    run = Run(tmp_path / "run")
    checkpoint(run, 10)
    good = checkpoint(run, 20)
    shutil.copytree(good, tmp_path / "good")
    assert run.newest() == 20
    for seed in range(100):
        how = damage(good, random.Random(seed))
        assert run.newest() == 10, how
        assert "Checkpoint step-20 is damaged and not used" in capsys.readouterr().out, how
        shutil.rmtree(good)
        shutil.copytree(tmp_path / "good", good)
        assert run.newest() == 20


def test_no_bit_and_no_length_of_the_sums_themselves_is_taken_for_another(tmp_path: Path):
    run = Run(tmp_path)
    with new_folder(run.checkpoint(1)) as aside:
        write_atomic(aside / "a", b"1")
        write_atomic(aside / "b", b"2")
    file = run.checkpoint(1) / "SHA256SUMS"
    data = file.read_bytes()
    flips = [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]
    for changed in [*flips, *(data[:length] for length in range(len(data))), data + b"\n"]:
        file.write_bytes(changed)
        assert run.newest() == 0, changed
    file.write_bytes(data)
    assert run.newest() == 1


def test_the_last_ones_are_kept_and_what_is_no_checkpoint_is_left_alone(tmp_path: Path):
    run = Run(tmp_path)
    for step in (1, 2, 10, 11):
        checkpoint(run, step)
    (tmp_path / "checkpoints" / "step-2 (copy)").mkdir()
    assert run.steps() == [11, 10, 2, 1]
    run.prune(2, upto=10)  # a run that went on from 9, and has just saved 10: 11 was damaged
    assert run.steps() == [10, 2]
    assert (tmp_path / "checkpoints" / "step-2 (copy)").is_dir()


STATES = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
from trainer.adapter import Adapter, AdapterConfig
from trainer.config import TrainerConfig, WorkersConfig
from trainer.engine import load_optimizer_state, make_engine, optimizer_state, set_learning_rate, whole_parameters
torch.set_num_threads(1)

def make(stage, weights=None, precision="no"):
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig(cross_attention_dim=33, embedding_dim=41, dim=64, depth=1), {"1": 35, "3": 37})
    if weights:
        adapter.load_state_dict(weights)
    def forward(hidden):
        tokens = adapter.image_tokens(hidden)
        return sum(layer.to_k_ip(tokens).square().mean() + layer.to_v_ip(tokens).sin().mean()
                   for layer in adapter.ip_adapter.values())
    adapter.forward = forward
    workers = WorkersConfig(zero_stage=stage)
    return make_engine(adapter, TrainerConfig(train_batch_size=2, mixed_precision=precision, workers=workers))

def train(engine, steps):
    for step in steps:
        set_learning_rate(engine, 1e-3 * (step + 1))
        hidden = torch.randn(2, 5, 41, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(hidden[rank * 2 // world : (rank + 1) * 2 // world]))
        engine.step()

def weights(engine):
    with whole_parameters(engine):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}

def again(stage, saved, precision="no"):
    engine = make(stage, load_file(f"{folder}/weights-{saved}"), precision)
    load_optimizer_state(engine, load_file(f"{folder}/state-{saved}"), 3)
    return engine

for stage, precision in [(0, "no"), (1, "no"), (2, "no"), (3, "no"), (1, "bf16"), (3, "bf16")]:
    if world == 2:
        name = f"{stage}{precision.removeprefix('no')}"
        engine = make(stage, precision=precision)
        train(engine, range(3))
        files = {f"{folder}/state-{name}": optimizer_state(engine), f"{folder}/weights-{name}": weights(engine)}
        train(engine, range(3, 6))
        files[f"{folder}/end-{name}"] = weights(engine)
        if rank == 0:
            for path, tensors in files.items():
                save_file(tensors, path)
        dist.barrier()
        engine = again(stage, name, precision)
        assert all(torch.equal(a, files[f"{folder}/state-{name}"][k]) for k, a in optimizer_state(engine).items())
        train(engine, range(3, 6))
        ours = weights(engine)
        assert all(torch.equal(a, ours[k]) for k, a in files[f"{folder}/end-{name}"].items()), name
    elif precision == "no":
        for saved in range(4):
            engine = again(stage, saved)
            train(engine, range(3, 6))
            ours, start = weights(engine), load_file(f"{folder}/weights-{saved}")
            for name, theirs in load_file(f"{folder}/end-{saved}").items():
                moved, apart = (theirs - start[name]).abs().mean(), (theirs - ours[name]).abs().mean()
                assert moved > 3e-3 and apart < 2e-3 * moved, (stage, saved, name, moved, apart)
print("equal")
"""


def test_a_state_of_two_workers_goes_on_bit_for_bit_and_on_one_worker_with_any_stage(tmp_path: Path):
    for world in (2, 1):
        environment = os.environ | {"PYTHONPATH": str(REPO), "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", STATES, str(rank), str(world), str(tmp_path)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        for process in ranks:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            assert "equal" in out


def test_what_a_killed_worker_left_is_put_back_or_removed(tmp_path: Path):
    run = Run(tmp_path)
    good = checkpoint(run, 3)
    good.rename(good.with_name(".step-3.0123abcd.old"))  # killed between the two renames that replace a folder
    (tmp_path / "best").mkdir()
    (tmp_path / ".best.0123abcd.old").mkdir()  # killed just after them
    (tmp_path / ".adapter.0123abcd.tmp").mkdir()
    run.tidy()
    assert run.newest() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]
