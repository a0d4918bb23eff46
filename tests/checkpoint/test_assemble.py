"""Models that are no diffusers folder: found, named, and what they lack."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.inspection import inspect
from sagewan.errors import CheckpointError
from sagewan.pipeline.build import Components, build
from tests.checkpoint import part_writers
from tests.checkpoint.trees import comfyui, wan_ai, weights
from tests.checkpoint.writers import kijai, original
from tests.pipeline.runs import plain_plan

Folder = Callable[[str], Path]
ONE = ("wan_14B_t2v.safetensors",)
TWO = ("Wan2_2-I2V-A14B-HIGH_fp8.safetensors", "Wan2_2-I2V-A14B-LOW_fp8.safetensors")
OTHER = {
    "wan2.1-t2v-14b": "wan2.1-t2v-14b",
    "wan2.1-i2v-14b": "wan2.1-i2v-14b",
    "wan2.2-i2v-a14b": "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b": "wan2.2-ti2v-5b",
}


@pytest.fixture(autouse=True)
def no_models_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(part_writers, "vae_last", {"encoder.down": 1, "decoder.up": 2})


def components(path: Path) -> Components:
    return build(plain_plan(find_model(str(path))), Launcher())


def same_weights(found: Components, expected: Components, *, transformers: bool = True) -> None:
    names = ("text_encoder", "vae", *(("image_encoder",) if expected.image_encoder else ()))
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    if transformers:
        pairs += zip(found.transformers, expected.transformers, strict=True)
    for one, other in pairs:
        with one.on("cpu") as module, other.on("cpu") as wanted:
            both = zip(module.named_parameters(), wanted.parameters(), strict=True)
            for (name, weight), same in both:
                # The writers keep 16 bits of the transformer.
                same = same.bfloat16().float() if one in found.transformers else same
                assert torch.equal(weight, same), name


@pytest.mark.parametrize("name", OTHER)
def test_comfyui_s_folders(name: str, shrunken_folder: Folder, tmp_path: Path) -> None:
    folder = shrunken_folder(name)
    names = TWO if "a14b" in name else ONE
    file = comfyui(folder, tmp_path / "ComfyUI" / "models", original, names)
    model, expected = find_model(str(file)), find_model(str(folder))
    for trait in ("family", "tasks", "experts", "layers", "heads", "ffn", "in_channels", "spatial",
                  "parameters", "image_encoder", "expand_timesteps", "boundary"):  # fmt: skip
        assert getattr(model, trait) == getattr(expected, trait), trait
    assert model.name == file.name
    if "a14b" in name:
        assert "HIGH_fp8.safetensors is the high-noise expert" in model.notes[0]
        # Whichever of the two is named, both run in their order.
        other = find_model(str(file.with_name(TWO[1])))
        assert other.parts == model.parts
        assert find_model(str(file.parent)).parts == model.parts
    same_weights(components(file), components(folder))


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"])
def test_wan_ai_s_own_folder(name: str, shrunken_folder: Folder, tmp_path: Path) -> None:
    target = wan_ai(shrunken_folder(name), tmp_path / "Wan")
    model, expected = find_model(str(target)), find_model(str(shrunken_folder(name)))
    for trait in ("family", "tasks", "experts", "layers", "parameters", "boundary"):
        assert getattr(model, trait) == getattr(expected, trait), trait
    same_weights(components(target), components(shrunken_folder(name)))
    found = inspect(target)
    assert (found.kind, found.missing, found.problems) == ("model", None, [])
    assert {part.container for part in found.parts} == {"safetensors", "pth"}


def test_a_file_stands_in_for_the_transformer_of_the_folder_it_lies_in(
    shrunken_folder: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(shrunken_folder("wan2.2-ti2v-5b"), tmp_path / "mine")
    kijai(weights(folder / "transformer"), folder / "fp8.safetensors")
    shutil.rmtree(folder / "transformer")
    model = find_model(str(folder / "fp8.safetensors"))
    assert model.expand_timesteps
    assert model.parts["transformer"] == folder / "fp8.safetensors"
    assert model.parts["vae"] == folder / "vae"
    same_weights(
        components(folder / "fp8.safetensors"),
        components(shrunken_folder("wan2.2-ti2v-5b")),
        transformers=False,
    )


@pytest.mark.parametrize("where", ["models", "hub/models--Wan-AI--Wan2.1/snapshots/abc"])
def test_missing_parts_are_found_in_the_usual_places(
    where: str, shrunken_folder: Folder, tmp_path: Path
) -> None:
    name = "wan2.1-t2v-14b"
    shutil.copytree(shrunken_folder(name), tmp_path / where / "any")
    if "hub" in where:
        for part in (tmp_path / where / "any").iterdir():
            part.rename(tmp_path / where / part.name)
    alone = tmp_path / "downloads" / "alone" / "wan.safetensors"
    alone.parent.mkdir(parents=True)
    original(weights(shrunken_folder(name) / "transformer"), alone)
    model = find_model(str(alone))
    assert model.parts["transformer"] == alone
    assert all(str(model.parts[part]).startswith(str(tmp_path / where.partition("/")[0]))
               for part in ("vae", "text_encoder", "tokenizer"))  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("vae", "its VAE of 16 channels is missing"),
        ("text_encoders", "text encoder .* is missing"),
        ("tokenizer", "tokenizer .* is missing"),
        ("clip_vision", "image encoder .* is missing"),
    ],
)
def test_a_missing_part_is_named_with_the_places(
    missing: str, sentence: str, shrunken_folder: Folder, tmp_path: Path
) -> None:
    file = comfyui(shrunken_folder("wan2.1-i2v-14b"), tmp_path / "m", original, ONE)
    shutil.rmtree(tmp_path / "m" / missing)
    with pytest.raises(CheckpointError, match=sentence) as error:
        find_model(str(file))
    assert str(tmp_path / "m" / "diffusion_models") in str(error.value)
    assert "sagewan download" in str(error.value)
    assert "\n" not in str(error.value)
    assert find_model(str(file), need_files=False).tasks == ("i2v",), "enough for a plan"
    found = inspect(file)
    assert found.missing == str(error.value)


def test_a_part_of_another_model_is_passed_over(shrunken_folder: Folder, tmp_path: Path) -> None:
    file = comfyui(shrunken_folder("wan2.1-t2v-14b"), tmp_path / "m", original, ONE)
    other = part_writers.vae_original(weights(shrunken_folder("wan2.2-ti2v-5b") / "vae"), 1)
    save_file(other, tmp_path / "m" / "vae" / "a_wan2.2_vae.safetensors")
    (tmp_path / "m" / "vae" / "b_broken.safetensors").write_text("<html>")
    (tmp_path / "m" / "vae" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKLWan", **find_config(shrunken_folder)})
    )
    model = find_model(str(file))
    assert model.parts["vae"].name in ("wan_vae.safetensors", "vae")


def find_config(shrunken_folder: Folder) -> dict[str, object]:
    path = shrunken_folder("wan2.1-t2v-14b") / "vae" / "config.json"
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_an_expert_alone_is_refused(shrunken_folder: Folder, tmp_path: Path) -> None:
    file = comfyui(shrunken_folder("wan2.2-i2v-a14b"), tmp_path / "m", original, TWO)
    low = file.with_name(TWO[1])
    low.rename(tmp_path / "low.safetensors")
    with pytest.raises(CheckpointError, match=r"high-noise expert .* low-noise one is not beside"):
        find_model(str(file))
    nameless = file.rename(file.with_name("mystery.safetensors"))
    with pytest.raises(CheckpointError, match="does not say which: put both"):
        find_model(str(nameless))
    (tmp_path / "low.safetensors").rename(nameless.with_name("low_noise.safetensors"))
    with pytest.raises(CheckpointError, match="does not say which"):
        find_model(str(nameless))


def test_a_folder_of_many_models_wants_a_name(shrunken_folder: Folder, tmp_path: Path) -> None:
    file = comfyui(shrunken_folder("wan2.1-t2v-14b"), tmp_path / "m", original, ONE)
    shutil.copy(file, file.with_name("second.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds 2 transformers.*name the file"):
        find_model(str(file.parent))
    assert find_model(str(file)).name == file.name
