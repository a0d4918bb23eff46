"""The names and shapes of the published full-size checkpoints, kept in ``manifests.json``.

Written by ``python -m tests.checkpoint.manifests`` from the published configs, on the meta device
by diffusers' and transformers' own classes; numbers of blocks stand once, as ``*``.
"""

import json
import re
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("manifests.json")
Shapes = dict[str, tuple[int, ...]]
_BLOCK = re.compile(r"(?<=blocks\.)\d+|(?<=block\.)\d+|(?<=layers\.)\d+")
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
CLIP_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def load(name: str) -> Shapes:
    """The weights of a part by diffusers' or transformers' names."""
    found: Shapes = {}
    for pattern, (count, shape) in json.loads(PATH.read_text())[name].items():
        for number in range(count):
            found[pattern.replace("*", str(number))] = tuple(shape)
    return found


def names() -> list[str]:
    return list(json.loads(PATH.read_text()))


def _compact(shapes: Shapes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        # Only what has the same shape in all blocks stands once: UMT5's first block has one more,
        # and the VAE's differ.
        pattern = _BLOCK.sub("*", name, count=1)
        alike = {key: value for key, value in shapes.items() if _BLOCK.sub("*", key, 1) == pattern}
        if "*" in pattern and len(alike) > 4 and set(alike.values()) == {shape}:
            found[pattern] = [len(alike), list(shape)]
        else:
            found[name] = [1, list(shape)]
    return found


def _write() -> None:
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    from tests.published import TRANSFORMERS, VAES

    with torch.device("meta"):
        modules = {name: WanTransformer3DModel(**config) for name, config in TRANSFORMERS.items()}
        modules["vae-2.1"] = AutoencoderKLWan(**VAES["wan2.1-t2v-14b"])
        modules["vae-2.2"] = AutoencoderKLWan(**VAES["wan2.2-ti2v-5b"])
        modules["umt5-xxl"] = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        modules["clip-h"] = CLIPVisionModel(CLIPVisionConfig(**CLIP_H))
    found = {}
    for name, module in modules.items():
        shapes = {
            key.removeprefix("vision_model."): tuple(weight.shape)
            for key, weight in module.named_parameters()
            if key != "encoder.embed_tokens.weight"
        }
        found[name] = _compact(shapes)
    lines = [f'"{name}": {json.dumps(shapes)}' for name, shapes in found.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _write()
