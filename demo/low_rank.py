"""LoRA on the transformer's blocks: added, trained, saved as diffusers names it, merged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "transformer."  # how diffusers' pipelines name this component


class LowRank(nn.Module):
    """A frozen linear layer plus a product of two thin matrices, of which B begins at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        outputs, inputs = linear.weight.shape
        self.lora_A = nn.Parameter(
            torch.randn(rank, inputs, device=self.weight.device) / inputs**0.5
        )
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


def add(transformer: WanTransformer3DModel, rank: int) -> list[nn.Parameter]:
    """Freeze the model; put a LowRank in place of every linear layer of its blocks
    → the parameters to train."""
    transformer.requires_grad_(False)
    layers = [(n, m) for n, m in transformer.blocks.named_modules() if isinstance(m, nn.Linear)]
    trained = []
    for name, linear in layers:
        parent, _, last = name.rpartition(".")
        low = LowRank(linear, rank)
        setattr(transformer.blocks.get_submodule(parent), last, low)
        trained += [low.lora_A, low.lora_B]
    return trained


def save(transformer: WanTransformer3DModel, path: Path, sampling: dict | None = None) -> None:
    """bf16, with lora_B·lora_A at strength 1; `sampling` is what a distilled model was taught."""
    tensors = {
        f"{PREFIX}{name}.weight": parameter.detach().to(torch.bfloat16).cpu().contiguous()
        for name, parameter in transformer.named_parameters()
        if name.endswith(("lora_A", "lora_B"))
    }
    notes = {"sagewan.sampling": json.dumps(sampling)} if sampling else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=notes)


@torch.no_grad()
def merge(transformer: WanTransformer3DModel, path: Path, strength: float = 1.0) -> int:
    """Add a saved LoRA to the weights → the number of layers changed."""
    tensors = load_file(path)
    ending = ".lora_A.weight"
    names = [n[: -len(ending)] for n in tensors if n.endswith(ending)]
    for name in names:
        weight = transformer.get_parameter(name.removeprefix(PREFIX) + ".weight")
        product = tensors[f"{name}.lora_B.weight"].float() @ tensors[name + ending].float()
        weight.add_((strength * product).to(weight.device, weight.dtype))
    return len(names)
