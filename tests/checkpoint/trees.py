"""Whole models of shrunken parts, laid out as ComfyUI's users and as Wan-AI's repositories have."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint import part_writers
from tests.checkpoint.writers import Writer, original


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors files of a part's folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def comfyui(folder: Path, target: Path, writer: Writer, names: tuple[str, ...]) -> Path:
    """``folder``, a diffusers folder, as ComfyUI keeps models: a folder for each kind of part.

    Returns the file of the first transformer. The VAE keeps its config, whose statistics are of no
    published one.
    """
    (target / "diffusion_models").mkdir(parents=True)
    parts = ("transformer", "transformer_2")
    for part, name in zip(parts, names, strict=False):
        writer(weights(folder / part), target / "diffusion_models" / name)
    (target / "vae").mkdir()
    vae = part_writers.vae_original(weights(folder / "vae"), res_blocks=1)
    save_file(vae, target / "vae" / "wan_vae.safetensors")
    shutil.copy(folder / "vae" / "config.json", target / "vae")
    (target / "text_encoders").mkdir()
    save_file(weights(folder / "text_encoder"), target / "text_encoders" / "umt5.safetensors")
    shutil.copytree(folder / "tokenizer", target / "tokenizer")
    if (folder / "image_encoder").is_dir():
        shutil.copytree(folder / "image_encoder", target / "clip_vision")
    return target / "diffusion_models" / names[0]


def wan_ai(folder: Path, target: Path) -> Path:
    """``folder``, a diffusers folder, as Wan-AI publishes it: shards, and archives for the rest."""
    experts = [part for part in ("transformer", "transformer_2") if (folder / part).is_dir()]
    places = [target]
    if len(experts) == 2:
        places = [target / "high_noise_model", target / "low_noise_model"]
    for part, place in zip(experts, places, strict=True):
        place.mkdir(parents=True)
        original(weights(folder / part), place / "whole.safetensors")
        _shard(place)
        (place / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 256}))
    vae = part_writers.vae_original(weights(folder / "vae"), res_blocks=1)
    torch.save(vae, target / "Wan2.1_VAE.pth")
    umt5 = part_writers.umt5_original(weights(folder / "text_encoder"))
    torch.save(umt5, target / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(folder / "tokenizer", target / "google" / "umt5-xxl")
    return target


def _shard(place: Path) -> None:
    """Two shards and their index in place of one file."""
    whole = load_file(place / "whole.safetensors")
    (place / "whole.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    names = sorted(whole)
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: whole[name] for name in some}, place / file)
        index["weight_map"] |= dict.fromkeys(some, file)
    path = place / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
