"""VAE, UMT5 and CLIP in the layouts that people have, held to what they were written from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from sagewan.checkpoint.infer import config_of
from sagewan.checkpoint.names import vae_names
from sagewan.checkpoint.source import Source, open_source
from sagewan.checkpoint.whole import same_shape
from tests import shrunken
from tests.checkpoint import part_writers
from tests.checkpoint.writers import _add
from tests.published import VAES

T2V, TI2V = "wan2.1-t2v-14b", "wan2.2-ti2v-5b"
KINDS = ("vae", "text_encoder", "image_encoder")


def vae(name: str) -> Any:
    from diffusers import AutoencoderKLWan

    return shrunken.filled(AutoencoderKLWan(**shrunken.vae_config(name)), 2)


def check(source: Source, module: Any) -> None:
    wanted = {
        name.removeprefix("vision_model."): weight
        for name, weight in module.state_dict().items()
        if name != "encoder.embed_tokens.weight" and not name.endswith("position_ids")
    }
    assert source.entries.keys() == wanted.keys()
    assert source.unknown == ()
    for name, weight in wanted.items():
        found = source.read(name)
        assert isinstance(found, Tensor)
        assert same_shape(found.shape, weight.shape)
        assert torch.equal(found.view(weight.shape), weight), name


def test_names_of_a_vae_are_those_that_diffusers_converts_to() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        state = AutoencoderKLWan(**VAES[T2V]).state_dict()
    originals = part_writers.vae_original(state, res_blocks=2)
    ours = vae_names(originals)
    assert set(ours.values()) == state.keys()
    by_diffusers = convert_wan_vae_to_diffusers(originals)
    assert {id(value): name for name, value in by_diffusers.items()} == {
        id(originals[name]): new for name, new in ours.items()
    }


def test_names_of_the_vae_of_wan_2_2() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        state = AutoencoderKLWan(**VAES[TI2V]).state_dict()
    originals = part_writers.vae_original(state, res_blocks=2)
    # As they stand in the published Wan2.2_VAE.pth.
    for name in (
        "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "decoder.upsamples.1.upsamples.3.time_conv.weight",
        "decoder.middle.1.to_qkv.weight",
        "conv1.weight",
    ):
        assert name in originals
    assert {name: id(originals[old]) for old, name in vae_names(originals).items()} == {
        name: id(weight) for name, weight in state.items()
    }


@pytest.mark.parametrize("name", [T2V, TI2V])
@pytest.mark.parametrize("file", ["Wan_VAE.pth", "wan_vae.safetensors", "all_in_one.safetensors"])
def test_a_vae_in_wan_s_layout(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writers, "vae_last", {"encoder.down": 1, "decoder.up": 2})
    module = vae(name)
    state = part_writers.vae_original(module.state_dict(), res_blocks=1)
    if file.endswith(".pth"):
        torch.save(state, tmp_path / file)
    else:
        prefix = "first_stage_model." if "all" in file else ""
        save_file(
            {prefix + key: value.contiguous() for key, value in state.items()}, tmp_path / file
        )
    source = open_source(tmp_path / file, "vae")
    check(source, module)
    config, wanted = config_of(source), shrunken.vae_config(name)
    for key in ("latents_mean", "latents_std"):
        wanted.pop(key)
    assert {key: config[key] for key in wanted} == wanted
    if name == TI2V:
        assert len(config["latents_mean"]) == len(config["latents_std"]) == 48


def test_a_vae_whose_statistics_nobody_knows_wants_its_config(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    config = {
        **shrunken.vae_config(T2V),
        "z_dim": 8,
        "latents_mean": [0] * 8,
        "latents_std": [1] * 8,
    }
    module = shrunken.filled(AutoencoderKLWan(**config), 2)
    save_file(module.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"only its config\.json tells"):
        config_of(open_source(tmp_path / "vae.safetensors", "vae"))
    text = json.dumps({**module.config, "_class_name": "AutoencoderKLWan"})
    (tmp_path / "config.json").write_text(text)
    assert config_of(open_source(tmp_path / "vae.safetensors", "vae"))["z_dim"] == 8


def wan_ai(state: dict[str, Tensor], path: Path) -> None:
    torch.save(part_writers.umt5_original(state), path)


def kijai(state: dict[str, Tensor], path: Path) -> None:
    save_file(part_writers.umt5_original(state), path)


def comfy(state: dict[str, Tensor], path: Path) -> None:
    carried = {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    save_file({**state, **carried}, path)


def llama(state: dict[str, Tensor], path: Path) -> None:
    writer = gguf.GGUFWriter(None, "t5encoder")
    for name, weight in part_writers.umt5_original(state, llama=True).items():
        _add(writer, name, weight.numpy(), "F32")
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("write", [wan_ai, kijai, comfy, llama])
def test_umt5(write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    module = shrunken.filled(shrunken.text_encoder(), 1)
    state = {
        name: weight for name, weight in module.state_dict().items() if "embed_tokens" not in name
    }
    path = tmp_path / {wan_ai: "t5.pth", llama: "t5.gguf"}.get(write, "t5.safetensors")
    write(state, path)
    source = open_source(path, "text_encoder")
    check(source, module)
    config = config_of(source)
    for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
                "relative_attention_num_buckets", "relative_attention_max_distance",
                "feed_forward_proj", "layer_norm_epsilon"):  # fmt: skip
        assert config[key] == getattr(module.config, key), key


def test_scaled_fp8_umt5_has_embeddings_without_scales(tmp_path: Path) -> None:
    state = shrunken.filled(shrunken.text_encoder(), 1).state_dict()
    tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, weight in state.items():
        if "embed_tokens" in name:
            continue
        if weight.ndim < 2:
            tensors[name] = weight
        elif "shared" in name or "relative" in name:
            tensors[name] = weight.to(torch.float8_e4m3fn)
        else:
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale
    save_file(tensors, tmp_path / "umt5_fp8_scaled.safetensors")
    source = open_source(tmp_path / "umt5_fp8_scaled.safetensors", "text_encoder")
    assert source.entries["encoder.block.0.layer.0.SelfAttention.q.weight"].weight.scale


@pytest.mark.parametrize("layout", ["original", "transformers", "older transformers"])
def test_clip(layout: str, tmp_path: Path) -> None:
    module = shrunken.filled(shrunken.image_encoder(), 5)
    state = {name.removeprefix("vision_model."): x for name, x in module.state_dict().items()}
    path = tmp_path / "clip.pth"
    if layout == "original":
        torch.save(part_writers.clip_original(state), path)
    else:
        prefix = "" if layout == "transformers" else "vision_model."
        projection = {"visual_projection.weight": torch.zeros(4, 4)}
        save_file({**{prefix + name: x for name, x in state.items()}, **projection}, path)
    check(open_source(path, "image_encoder"), module)
