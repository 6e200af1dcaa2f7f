"""The base IP-Adapter: its published layout, its tokens and noise against diffusers, its training, and its serving."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from serving.engine import Engine
from serving.recipe import Recipe
from tests.lines import files, write_lines
from tests.published import SD15, flat, nested
from trainer import loop
from trainer.adapter import Adapter, PooledAdapterConfig, read_config
from trainer.backbone import Backbone, load_backbone
from trainer.config import DataConfig, TrainerConfig
from trainer.projection import POOLED, VARIANTS

SMALL = PooledAdapterConfig(cross_attention_dim=32, embedding_dim=24)


@pytest.fixture
def base(twin: Path) -> Backbone:
    return dataclasses.replace(load_backbone(str(twin)), features=POOLED)


@pytest.fixture
def adapter(base: Backbone) -> Adapter:
    torch.manual_seed(1)
    adapter = Adapter.for_unet(base.unet, SMALL)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.attach(base.unet)
    return adapter


def pictures(count: int = 2) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (count, 56, 56, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


def test_the_published_layout_loads_strictly_and_is_saved_to_the_byte(tmp_path: Path):
    state = flat(nested("base", **SD15))
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (36, 22_319_616)
    save_file(state, tmp_path / "ip-adapter_sd15.safetensors")
    adapter = Adapter.from_pretrained(tmp_path / "ip-adapter_sd15.safetensors")
    assert adapter.config == PooledAdapterConfig(cross_attention_dim=768, embedding_dim=1024)
    adapter.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "ip_adapter.safetensors"
    assert saved.stat().st_size == 44_642_768  # as published
    assert all(torch.equal(value, state[key]) for key, value in load_file(saved).items())


def test_noise_equals_stock_diffusers_that_loaded_the_saved_folder(
    base: Backbone, adapter: Adapter, twin: Path, tmp_path: Path
):
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 421])
    text = base.encode_text(["a girl with a hat", "line art"])
    features = base.encode_image(pictures())
    assert features.shape == (2, 1, 24)
    with torch.no_grad():
        tokens = adapter.image_tokens(features)
        assert tokens.shape == (2, 4, 32)
        ours = adapter.denoise(base.unet, latents, timesteps, text, tokens, scale=0.5)

    adapter.save_pretrained(tmp_path / "run" / "adapter", step=1)
    assert read_config(tmp_path / "run")["adapter"]["variant"] == "base"
    stock = StableDiffusionPipeline.from_pretrained(str(twin))
    stock.load_ip_adapter(
        str(tmp_path / "run"), subfolder="adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    stock.set_ip_adapter_scale(0.5)
    with torch.no_grad():
        embeds, nothing = stock.encode_image(pictures(), "cpu", 1)
        theirs = stock.unet(latents, timesteps, text, added_cond_kwargs={"image_embeds": [embeds[:, None]]}).sample
    assert (embeds - features[:, 0]).abs().max() < 1e-5
    assert torch.equal(base.encode_image_null(2)[:, 0], nothing)  # zeros, not the embedding of a picture
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_it_is_trained_saved_resumed_from_and_served(ray_session: str, twin: Path, tmp_path: Path):
    config = TrainerConfig(
        output=str(tmp_path / "run"),
        pretrained_model_name_or_path=str(twin),
        variant="base",
        data=DataConfig(root=write_lines(tmp_path / "lines"), resolution=64, validation_samples=2),
        learning_rate=1e-3,
        max_train_steps=2,
        train_batch_size=2,
    )
    assert loop.fit(config)["step"] == 2
    facts = read_config(tmp_path / "run")
    assert facts["adapter"] == {"variant": "base", "cross_attention_dim": 32, "embedding_dim": 24, "num_tokens": 4}
    assert facts["preprocessing"]["features"] == "image_embeds"
    torch.manual_seed(config.seed)
    start = Adapter.for_unet(load_backbone(str(twin)).unet, SMALL).state_dict()
    end = Adapter.from_pretrained(tmp_path / "run").state_dict()
    assert all(0 < (end[key] - start[key]).abs().max() < 0.01 for key in start)
    with pytest.raises(ValueError, match="was made with variant='base'"):
        loop.fit(dataclasses.replace(config, variant="plus"))

    engine = Engine.load(str(tmp_path / "run"), base=str(twin))
    recipe = Recipe(prompt="line art", reference=pictures()[0], num_inference_steps=2, seed=1)
    (drawn,) = engine.infer(recipe)
    (other,) = engine.infer(dataclasses.replace(recipe, reference=pictures()[1]))
    assert drawn.size == (64, 64)
    assert drawn.tobytes() != other.tobytes()


def test_a_run_from_a_published_file_in_fp16_resumes_to_the_same_bits(ray_session: str, twin: Path, tmp_path: Path):
    save_file(flat(nested("base")), tmp_path / "ip-adapter.safetensors")
    config = TrainerConfig(
        output=str(tmp_path / "run"),
        pretrained_model_name_or_path=str(twin),
        adapter=str(tmp_path / "ip-adapter.safetensors"),
        data=DataConfig(root=write_lines(tmp_path / "lines"), resolution=64, validation_samples=0),
        ema_decay=0.5,
        learning_rate=1e-3,
        max_train_steps=2,
        train_batch_size=2,
        checkpointing_steps=1,
    )
    loop.fit(config)
    last = tmp_path / "run" / "checkpoints" / "step-2"
    whole = files(last)
    assert {value.dtype for value in load_file(last / "adapter" / "ip_adapter.safetensors").values()} == {torch.float16}
    shutil.rmtree(last)
    loop.fit(config)
    assert files(last) == whole


def test_the_base_variant_has_no_resampler_and_says_so(base: Backbone):
    with pytest.raises(ValueError, match="no Resampler: leave resampler_dim out, got 64"):
        VARIANTS["base"].fitting(32, base.image_encoder.config, 64)
