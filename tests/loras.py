"""Small LoRA files in each key style, written by hand: no code of the package names their keys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 4
# Of a block: diffusers' name → the name in Wan's own code.
LAYERS = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
STYLES = ("diffusers", "peft", "comfy", "lightx2v", "kohya")
Pair = tuple[torch.Tensor, torch.Tensor]


def pairs(transformer: Any, seed: int = 0, size: float = 0.02) -> dict[str, Pair]:
    """a [r, K] and b [N, r] for the layers of every block."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for block in range(len(transformer.blocks)):
        for name in LAYERS:
            layer = transformer.get_submodule(f"blocks.{block}.{name}")
            a = torch.randn(RANK, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, RANK, generator=generator) * size
            result[f"blocks.{block}.{name}"] = a, b
    return result


def write(path: Path, pairs: Mapping[str, Pair], style: str = "diffusers", **notes: Any) -> Path:
    """The same LoRA in one of the STYLES. kohya's has an alpha of half the rank, and b doubled."""
    tensors = {}
    for name, (a, b) in pairs.items():
        block, _, inner = name.removeprefix("blocks.").partition(".")
        original = f"blocks.{block}.{LAYERS[inner]}"
        if style == "kohya":
            module = f"lora_unet_{original.replace('.', '_')}"
            tensors[f"{module}.alpha"] = torch.tensor(RANK / 2)
            tensors |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b * 2}
            continue
        module, down, up = {
            "diffusers": (f"transformer.{name}", "lora_A", "lora_B"),
            "peft": (f"base_model.model.{name}", "lora_A.default", "lora_B.default"),
            "comfy": (f"diffusion_model.{original}", "lora_A", "lora_B"),
            "lightx2v": (f"diffusion_model.{original}", "lora_down", "lora_up"),
        }[style]
        tensors |= {f"{module}.{down}.weight": a, f"{module}.{up}.weight": b}
    notes = {key: x if isinstance(x, str) else json.dumps(x) for key, x in notes.items()}
    save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata=notes)
    return path
