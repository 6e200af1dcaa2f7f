"""`trainer plan`: counted sizes, counted work, a predicted peak that a real step confirms, and its answers."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import peak
from tests.lines import write_lines
from tests.test_training_parts import alone
from trainer import plan
from trainer.__main__ import main
from trainer.adapter import Adapter, AdapterError, PooledAdapterConfig
from trainer.config import DataConfig, TrainerConfig, micro, paper
from trainer.sd15 import BaseSizes, count, on_meta
from trainer.walk import Meter, Walker, make_inputs

GIB = 2**30


def test_checkpointing_takes_work_for_memory_and_both_grow_with_the_batch():
    small = Walker(peak.sizes(8), peak.config(128))
    plain, saving, twice = small.walk(2, False), small.walk(2, True), small.walk(4, False)
    unet = "UNet and adapter"
    assert saving.peaks[unet] < 0.5 * plain.peaks[unet]
    assert 1.2 * plain.flops[unet] < saving.flops[unet] < 1.5 * plain.flops[unet]
    assert saving.peaks["VAE"] == pytest.approx(plain.peaks["VAE"], rel=0.01)
    assert twice.flops["VAE"] == 2 * plain.flops["VAE"]
    assert twice.peaks["VAE"] == pytest.approx(2 * plain.peaks["VAE"], rel=0.05)
    assert small.walk(2, False) == plain  # the same each time


COUNTED = """
import dataclasses, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from trainer.config import DataConfig, TrainerConfig
from trainer.plan import base_sizes
from trainer.walk import Meter, Walker
from trainer.worker import Worker
data = DataConfig(root="{root}", resolution=64, image_drop_rate=0, text_drop_rate=0, both_drop_rate=0)
config = TrainerConfig(
    output="{output}", pretrained_model_name_or_path="{twin}", data=data, train_batch_size=4,
    gradient_accumulation_steps=2,
)
walker = Walker(base_sizes(config), config)
for on in (False, True):
    config = dataclasses.replace(config, gradient_checkpointing=on)
    worker = Worker(config, torch.device("cpu"), {{"base": {{}}, "preprocessing": {{}}}})
    with Meter() as real:
        worker.step(0)
    print(real.flops, 2 * sum(walker.walk(2, on).flops.values()))
"""


def test_the_walked_pass_has_the_work_of_a_real_workers(tmp_path: Path, twin: Path):
    """A whole `Worker.step` of two passes with DeepSpeed, to the last FLOP; nothing is dropped, as the plan has it."""
    root = write_lines(tmp_path / "lines")
    asked = {"file": tmp_path / "store", "root": root, "output": tmp_path / "run", "twin": twin}
    said = alone(COUNTED.format(**asked), tmp_path).splitlines()[-2:]
    (plain, planned), (saving, planned_saving) = (map(int, line.split()) for line in said)
    assert (plain, saving) == (planned, planned_saving)
    assert 0 < plain < saving


def test_an_adapter_to_start_from_gives_its_own_sizes(twin: Path, tmp_path: Path):
    """A new one would be Plus: what is planned is the base variant that the file has, with 8 tokens."""
    config = TrainerConfig(pretrained_model_name_or_path=str(twin), data=DataConfig(resolution=64))
    sizes = plan.base_sizes(config)

    def started_from(**sizes_of_it: int) -> Walker:
        file = tmp_path / "-".join(map(str, sizes_of_it.values()))
        Adapter(PooledAdapterConfig(**sizes_of_it), widths).save_pretrained(file)
        return Walker(sizes, dataclasses.replace(config, adapter=str(file)))

    new = Walker(sizes, dataclasses.replace(config, variant="base"))
    widths = {key: layer.to_k_ip.out_features for key, layer in new.adapter.ip_adapter.items()}  # type: ignore[union-attr]
    begun = started_from(cross_attention_dim=32, embedding_dim=24, num_tokens=8)
    assert begun.parameters["adapter"] == new.parameters["adapter"] + 4 * 32 * (24 + 1)
    assert begun.walk(1, False).parameters == begun.parameters  # it reads what the file's variant reads
    with pytest.raises(AdapterError, match="reads features of width 40; the image encoder gives 24"):
        started_from(cross_attention_dim=32, embedding_dim=40, num_tokens=4)
    with pytest.raises(AdapterError, match="does not fit this UNet"):
        started_from(cross_attention_dim=64, embedding_dim=24, num_tokens=4)


@pytest.fixture(scope="module")
def full() -> Walker:
    return Walker(BaseSizes(), paper())


def test_full_size_models_have_the_published_parameter_counts():
    counts = {name: count(model) for name, model in on_meta(BaseSizes()).items()}
    assert counts == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "image_encoder": 632_076_800,
    }


def test_full_size_work_is_the_published_figures(full: Walker):
    plain = full.walk(1, False)
    assert plain.parameters["adapter"] == 49_087_488
    assert plain.flops["VAE"] / 1e9 == pytest.approx(1117, rel=0.01)  # facts: counted elsewhere
    with full.fake, Meter() as forward, torch.no_grad():
        inputs = make_inputs(full.base, 512, 1)
        text, features = torch.zeros(1, 77, 768), torch.zeros(1, 257, 1280)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            full.adapter.denoise(full.base.unet, inputs["noise"], inputs["timesteps"], text, features[:, :0, :768], 0.0)
    assert forward.flops / 1e9 == pytest.approx(803, rel=0.01)
    assert plain.frozen_bytes / 1_698_312_107 == pytest.approx(2, rel=0.001)  # bf16


def test_the_predicted_peak_is_that_of_a_real_step():
    """A quarter of SD v1.5's widths; `make soak` does so at its full size."""
    case = (4, 2, 256, False)
    held, said = peak.measured(*case), peak.predicted(*case)
    measured = held["peak"] - held["idle"]
    assert measured == pytest.approx(said["loaded"] + said["step"], rel=0.2)
    assert held["peak"] - held["loaded"] == pytest.approx(said["step"], rel=0.3)  # without the weights


def test_states_are_shared_by_workers():
    assert [plan.state_bytes(100, stage, 1) for stage in plan.STAGES] == [1200, 2000, 2000, 2800]
    assert [plan.state_bytes(100, stage, 8) for stage in plan.STAGES] == [1200, 608, 608, 1060]
    assert [plan.state_bytes(100, stage, 8, copy=True) for stage in plan.STAGES] == [1600, 1008, 1008, 1060]


def test_the_paper_s_run_is_planned_in_seconds_without_weights(capsys: pytest.CaptureFixture[str]):
    began = time.monotonic()
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    assert time.monotonic() - began < 120
    for words in ("859,520,964", "632,076,800", "49,087,488", "ZeRO-2, gradient checkpointing on", "100,000 steps"):
        assert words in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert {gpu.name for gpu in plan.GPUS.values()} <= rows.keys()
    assert " yes " in rows["A10"]  # the paper's GPU
    assert text.strip() in (peak.REPO / "docs" / "planning.md").read_text()


def test_attention_s_work_is_counted_forward_and_backward():
    """Two products of B x H x S x T x D forward; backward the scores again, and four more."""
    shapes = (2, 3, 50, 64), (2, 3, 16, 64), (2, 3, 16, 64)
    with FakeTensorMode(), Meter() as meter:
        query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert meter.flops == (2 + 5) * 2 * 2 * 3 * 50 * 16 * 64


def test_answers_follow_from_memory_and_work():
    asked = plan.Walked(
        batch=8,
        gradient_checkpointing=False,
        parameters={"adapter": GIB // 16},
        frozen={"UNet": 3 * GIB, "VAE": GIB},
        peaks={"UNet and adapter": 40 * GIB},
        flops={"UNet and adapter": 30 * 10**12},
    )
    saving = dataclasses.replace(
        asked,
        gradient_checkpointing=True,
        peaks={"UNet and adapter": 20 * GIB},
        flops={"UNet and adapter": 40 * 10**12},
    )
    config = dataclasses.replace(paper(), gradient_checkpointing=False)
    made = plan.Plan(
        config=config,
        base="some",
        asked=asked,
        other=saving,
        utilisation=0.5,
    )
    gpu = plan.Gpu(name="some", mib=80 * 1024, bf16=100, fp32=10)
    small = dataclasses.replace(gpu, mib=32 * 1024)
    smaller = dataclasses.replace(gpu, mib=20 * 1024)
    assert made.seconds(gpu, asked) == pytest.approx(0.6)
    assert made.stage(gpu, asked) == 0
    assert made.stage(small, asked) is None
    # 80 GiB less models, AdamW (5 x 0.25) and 1; a sample takes 1.1 times its share of 39.75 beside 0.25 of gradients
    assert made.largest(gpu, asked) == int(8 * ((80 - 4 - 1.25 - 1) / 1.1 - 0.25) / 39.75)
    assert [plan._advice(made, one) for one in (gpu, small, smaller, dataclasses.replace(gpu, mib=4096))] == [
        "",
        "gradient_checkpointing=true",
        "gradient_checkpointing=true gradient_accumulation_steps=2",
        "a GPU with more memory",
    ]
    swapped = dataclasses.replace(made, config=paper(), asked=saving, other=asked)
    assert plan._advice(swapped, gpu) == "gradient_checkpointing=false: 600 ms"


def test_a_folder_or_a_shipped_base_is_read_and_other_ids_are_refused(capsys: pytest.CaptureFixture[str]):
    said = ["--gpu", "a100-40", "--utilisation", "0.1", "--max-train-steps", "77"]
    assert main(["plan", "--preset", "micro", *said]) == 0
    text = capsys.readouterr().out
    assert "animesketch/micro, 64 px, fp32" in text
    assert "  77 steps" in text
    for arguments, words in (
        (["--base", "owner/other"], "The sizes of owner/other"),
        (["--gpu", "abacus"], "No GPU 'abacus'. There are: a10, a100-40, a100-80, h100, h200"),
        (["--utilisation", "1.5"], "--utilisation is a share"),
        (["--set", "learning_rat=1"], "Did you mean learning_rate?"),
    ):
        assert main(["plan", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_the_gpus_named_in_help_are_those_there_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(plan.GPUS) in text
    assert plan.base_sizes(micro()).id == "animesketch/micro"
    assert f"default: {plan.UTILISATION}" in text
    assert torch.get_default_dtype() == torch.float32
