"""The adapter: the published layout to the byte, the maths against diffusers, and what a damaged file does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from PIL import Image
from safetensors.torch import load_file, save, save_file

from tests import published
from trainer.adapter import Adapter, AdapterConfig, AdapterError, DecoupledCrossAttention, Resampler, read_config
from trainer.backbone import Backbone, load_backbone, make_twin

SD15 = AdapterConfig(cross_attention_dim=768, embedding_dim=1280, dim=768)
SMALL = AdapterConfig(cross_attention_dim=32, embedding_dim=40, dim=128)  # for the twin; two heads


@pytest.fixture(scope="module")
def base(twin: Path) -> Backbone:
    return load_backbone(str(twin))


@pytest.fixture
def adapter(base: Backbone) -> Adapter:
    torch.manual_seed(1)
    adapter = Adapter.for_unet(base.unet, SMALL)
    with torch.no_grad():  # away from copies of the base, so that a mix-up of the two shows
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    yield adapter
    adapter.detach(base.unet)


def sd15_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
        )


def inputs(base: Backbone, count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(count, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([900, 421, 5][:count]),
        "text_tokens": base.encode_text(["a girl with a hat", "line art", ""][:count]),
    }


def pictures(count: int = 2) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (count, 56, 56, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


# --- the published layout ------------------------------------------------------------------------------------------


def test_sd15_sized_adapter_has_the_published_count_keys_and_shapes():
    unet = sd15_unet()
    layers = {str(n): size for n, size in zip(range(1, 32, 2), _widths(), strict=True)}
    with torch.device("meta"):
        adapter = Adapter(SD15, layers)
    adapter.attach(unet)  # the keys fit the layers of a real-size UNet, in diffusers' order
    state = adapter.state_dict()

    assert sum(tensor.numel() for tensor in state.values()) == 49_087_488
    assert len(state) == 83
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == _published()


def _widths() -> list[int]:
    return [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]


def _published() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of ip-adapter-plus_sd15."""
    return published.flat(published.shapes("plus", **published.SD15))


def test_sd15_sized_file_in_fp16_has_the_published_size_and_loads_as_a_bare_file(tmp_path: Path):
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in _published().items()}
    save_file(state, tmp_path / "ip-adapter-plus_sd15.safetensors")
    adapter = Adapter.from_pretrained(tmp_path / "ip-adapter-plus_sd15.safetensors", dtype=torch.float16)
    assert adapter.config == SD15
    adapter.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ip_adapter.safetensors").stat().st_size == 98_183_288


def test_new_layers_start_as_copies_of_the_layer_they_stand_beside(base: Backbone):
    adapter = Adapter.for_unet(base.unet, SMALL)
    assert list(adapter.ip_adapter) == [str(n) for n in range(1, 32, 2)]
    first = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    last = base.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert torch.equal(adapter.ip_adapter["1"].to_k_ip.weight, first.to_k.weight)
    assert torch.equal(adapter.ip_adapter["31"].to_v_ip.weight, last.to_v.weight)


# --- the maths -----------------------------------------------------------------------------------------------------


def test_resampler_equals_diffusers_with_the_same_weights():
    torch.manual_seed(0)
    ours = Resampler(AdapterConfig(cross_attention_dim=96, embedding_dim=40, dim=192))
    theirs = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        ours.state_dict(), low_cpu_mem_usage=False
    )
    hidden = torch.randn(3, 17, 40)
    with torch.no_grad():
        assert ours(hidden).shape == (3, 16, 96)
        assert (ours(hidden) - theirs(hidden)).abs().max() < 1e-5


def test_scale_zero_equals_the_base_bit_for_bit(base: Backbone, adapter: Adapter):
    x = inputs(base)
    with torch.no_grad():
        plain = base.unet(x["latents"], x["timesteps"], x["text_tokens"]).sample
        adapter.attach(base.unet)
        tokens = adapter.image_tokens(base.encode_image(pictures()))
        assert torch.equal(adapter.denoise(base.unet, **x, image_tokens=tokens, scale=0.0), plain)
        assert not torch.allclose(adapter.denoise(base.unet, **x, image_tokens=tokens, scale=0.5), plain, atol=1e-3)
        adapter.detach(base.unet)
        assert torch.equal(base.unet(x["latents"], x["timesteps"], x["text_tokens"]).sample, plain)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_noise_equals_stock_diffusers_that_loaded_the_saved_folder(
    base: Backbone, adapter: Adapter, twin: Path, tmp_path: Path, scale: float
):
    adapter.attach(base.unet)
    x = inputs(base)
    hidden = base.encode_image(pictures())
    with torch.no_grad():
        ours = adapter.denoise(base.unet, **x, image_tokens=adapter.image_tokens(hidden), scale=scale)

    adapter.save_pretrained(tmp_path / "run" / "adapter", step=1)
    stock = StableDiffusionPipeline.from_pretrained(str(twin))
    stock.load_ip_adapter(
        str(tmp_path / "run"), subfolder="adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    stock.set_ip_adapter_scale(scale)
    with torch.no_grad():
        embeds, _ = stock.encode_image(pictures(), "cpu", 1, output_hidden_states=True)
        theirs = stock.unet(
            x["latents"], x["timesteps"], x["text_tokens"], added_cond_kwargs={"image_embeds": [embeds[:, None]]}
        ).sample
    assert (embeds - hidden).abs().max() < 1e-5  # square pictures: no crop, the same preprocessing
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_a_scale_per_sample_equals_runs_of_one_sample(base: Backbone, adapter: Adapter):
    adapter.double().attach(base.unet)  # double: the twin's group norms on 1x1 maps amplify single precision
    unet, scales = base.unet.double(), (0.0, 0.5, 1.3)
    try:
        x = {name: value.double() if value.is_floating_point() else value for name, value in inputs(base, 3).items()}
        tokens = adapter.image_tokens(base.encode_image(pictures(3)).double())
        with torch.no_grad():
            together = adapter.denoise(unet, **x, image_tokens=tokens, scale=torch.tensor(scales, dtype=torch.float64))
            for i, scale in enumerate(scales):
                one = {name: value[i : i + 1] for name, value in x.items()}
                alone = adapter.denoise(unet, **one, image_tokens=tokens[i : i + 1], scale=scale)
                assert (together[i] - alone[0]).abs().max() < 1e-9
    finally:
        unet.float()


def test_only_the_adapter_gets_gradients_also_under_checkpointing(base: Backbone, adapter: Adapter):
    adapter.attach(base.unet)
    hidden = base.encode_image(pictures())
    gradients = []
    for checkpointing in (False, True):
        adapter.zero_grad()
        base.unet.train(checkpointing)
        (base.unet.enable_gradient_checkpointing if checkpointing else base.unet.disable_gradient_checkpointing)()
        x = inputs(base)
        adapter(base.unet, *x.values(), hidden).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
    base.unet.eval().disable_gradient_checkpointing()
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))
    adapter.detach(base.unet)
    assert all(parameter.grad is None for parameter in base.unet.parameters())


# --- use and misuse ------------------------------------------------------------------------------------------------


def test_an_adapter_refuses_an_unattached_unet_and_one_of_other_widths(base: Backbone, adapter: Adapter):
    with pytest.raises(AdapterError, match=r"attach\(unet\) first"):
        adapter.denoise(base.unet, **inputs(base), image_tokens=torch.zeros(2, 16, 32))
    with pytest.raises(AdapterError, match="layer 1 is"):
        adapter.attach(sd15_unet())
    assert not any(isinstance(p, DecoupledCrossAttention) for p in base.unet.attn_processors.values())


def test_save_and_load_give_the_same_tensors_from_an_adapter_or_run_folder(adapter: Adapter, tmp_path: Path):
    adapter.save_pretrained(tmp_path / "run" / "adapter", step=7, base={"id": "twin", "weights_hash": "ab"})
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):
        loaded = Adapter.from_pretrained(folder)
        assert loaded.config == SMALL
        assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in loaded.state_dict().items())
        assert read_config(folder)["step"] == 7
    assert read_config(tmp_path / "run")["base"] == {"id": "twin", "weights_hash": "ab"}
    for text in ("[]", '{"base": "twin"}', "{"):
        (folder / "config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"config\.json"):
            read_config(folder)
    saved = load_file(tmp_path / "run" / "adapter" / "ip_adapter.safetensors")
    assert {key.split(".")[0] for key in saved} == {"image_proj", "ip_adapter"}
    assert str(tmp_path) not in (tmp_path / "run" / "adapter" / "config.json").read_text()


def flip(path: Path, _: Adapter) -> str:
    data = bytearray((path / "ip_adapter.safetensors").read_bytes())
    data[-100] ^= 1
    (path / "ip_adapter.safetensors").write_bytes(data)
    return "ip_adapter.safetensors"


def truncate(path: Path, _: Adapter) -> str:
    data = (path / "ip_adapter.safetensors").read_bytes()
    (path / "ip_adapter.safetensors").write_bytes(data[:-1000])
    return "ip_adapter.safetensors"


def remove_config(path: Path, _: Adapter) -> str:
    (path / "config.json").unlink()
    return "config.json"


def remove_seal(path: Path, _: Adapter) -> str:
    (path / "SHA256SUMS").unlink()
    return "SHA256SUMS"


@pytest.mark.parametrize("damage", [flip, truncate, remove_config, remove_seal])
def test_a_damaged_folder_is_refused_by_the_name_of_its_file(adapter: Adapter, tmp_path: Path, damage):
    adapter.save_pretrained(tmp_path / "adapter")
    name = damage(tmp_path / "adapter", adapter)
    with pytest.raises(AdapterError, match=name):
        Adapter.from_pretrained(tmp_path / "adapter")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["ip_adapter.safetensors", "ip-adapter-plus_sd15.bin"])
def test_a_pickle_is_refused_unopened_whatever_its_name(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match=name):
        Adapter.from_pretrained(tmp_path / name)


def test_a_truncated_bare_file_and_one_of_another_layout_are_refused(adapter: Adapter, tmp_path: Path):
    state = adapter.state_dict()
    (tmp_path / "short.safetensors").write_bytes(save(state)[:-10])
    with pytest.raises(AdapterError, match=r"short\.safetensors"):
        Adapter.from_pretrained(tmp_path / "short.safetensors")
    face = {"image_proj.proj.0.weight": torch.zeros(4, 4), "ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4)}
    (tmp_path / "face.safetensors").write_bytes(save(face))
    with pytest.raises(
        AdapterError, match=r"face\.safetensors is not an IP-Adapter file \(1 missing: image_proj\.proj_in"
    ):
        Adapter.from_pretrained(tmp_path / "face.safetensors")
    (tmp_path / "extra.safetensors").write_bytes(save({**state, "image_proj.odd": torch.zeros(1)}))
    with pytest.raises(AdapterError, match=r"image_proj\.odd"):
        Adapter.from_pretrained(tmp_path / "extra.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        Adapter.from_pretrained(tmp_path / "nothing")


# --- the twin and the base -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_twin_and_a_complete_one_is_kept(twin: Path, base: Backbone, tmp_path: Path):
    again = load_backbone(str(make_twin(tmp_path / "again")))
    other = load_backbone(str(make_twin(tmp_path / "other", seed=1)))
    assert again.weights_hash == base.weights_hash != other.weights_hash
    assert (base.id, base.random_weights, base.native_size, base.max_tokens) == ("twin", True, 64, 77)
    assert len(base.tokenizer) == 514
    before = (tmp_path / "again" / "SHA256SUMS").stat().st_mtime_ns
    make_twin(tmp_path / "again")
    assert (tmp_path / "again" / "SHA256SUMS").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not the twin of seed 5"):
        make_twin(tmp_path / "again", seed=5)
    index = json.loads((twin / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def test_no_picture_is_zero_pixels_after_normalisation_and_references_are_not_cropped(base: Backbone):
    with torch.no_grad():
        zeros = base.image_encoder(torch.zeros(1, 3, 56, 56), output_hidden_states=True).hidden_states[-2]
    assert base.encode_image_null(2).shape == (2, 17, 40)
    assert torch.equal(base.encode_image_null(2)[1], zeros[0])
    assert not torch.allclose(base.encode_image([Image.new("RGB", (90, 56), 0)]), zeros, atol=0.1)  # no black picture
    wide = Image.new("L", (200, 56), 255)
    marked = wide.copy()
    marked.paste(0, (0, 0, 20, 56))  # outside a centre crop
    assert not torch.equal(base.encode_image([wide]), base.encode_image([marked]))


def test_texts_beyond_the_tokenizers_length_are_counted(base: Backbone):
    assert base.token_count("") == 2
    assert base.token_count("a" * 75) == 77
    assert base.token_count("a" * 100) == 102 > base.max_tokens
    assert base.encode_text(["a" * 100]).shape == (1, 77, 32)


def test_a_missing_base_says_what_to_give(tmp_path: Path, twin: Path):
    with pytest.raises(FileNotFoundError, match="nor to be had from the Hugging Face hub"):
        load_backbone("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with pytest.raises(FileNotFoundError, match="No model folder at"):
        load_backbone(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="not a Stable Diffusion pipeline folder"):
        load_backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No image encoder in"):
        load_backbone(str(twin), image_encoder=str(tmp_path))
